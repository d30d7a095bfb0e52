"""The report's data as files: four CSV tables, and all weights in a compressed .npz."""

import csv
import io

import numpy as np

from auxilearn.report.statistics import compact
from auxilearn.run.record import write_aside

SAMPLES_FILE, TASKS_FILE, LABELS_FILE = "samples.csv", "tasks.csv", "clean_labels.csv"
CLASSES_FILE, WEIGHTS_FILE = "classes.csv", "weights.npz"
OF_THE_SAMPLES = (SAMPLES_FILE, LABELS_FILE, CLASSES_FILE, WEIGHTS_FILE)
TABLE_FILES = (TASKS_FILE, *OF_THE_SAMPLES)


def write_tables(directory, findings):
    """Write what ``findings`` hold into ``directory``."""
    if findings.tasks is not None:
        write_tasks(directory / TASKS_FILE, findings.tasks)
    if findings.evaluation is None:
        return
    names = findings.evaluation.split.class_names
    _write_csv(directory / CLASSES_FILE, ["class", "name"], enumerate(names))
    write_samples(directory / SAMPLES_FILE, findings)
    write_clean_labels(directory / LABELS_FILE, findings)
    if findings.tasks is not None:
        write_weights(directory / WEIGHTS_FILE, findings)


def write_samples(path, findings):
    """A row per training sample, in the set's order. Classes are numbers, as in classes.csv.

    Without a target label, the given label, weight and loss are left empty.
    """
    evaluation, target = findings.evaluation, findings.target
    known = dict(zip(target.place.tolist(), range(len(target.place)), strict=True))
    rows = []
    for place, position in enumerate(evaluation.samples.positions.tolist()):
        i = known.get(place)
        rows.append(
            [
                evaluation.split.image_ids[position],
                evaluation.split.paths[position],
                evaluation.split.labels[position],
                "" if i is None else target.given[i],
                "" if i is None or target.weight is None else _short(target.weight[i], 9),
                "" if i is None else _short(target.loss[i], 9),
                evaluation.table.prediction[place],
            ]
        )
    header = ["id", "path", "label", "given_label", "weight", "loss", "prediction"]
    _write_csv(path, header, rows)


def write_tasks(path, tasks):
    """A row per task, the target first."""
    columns = {
        "name": tasks.names,
        "mean_weight": tasks.mean,
        "spread": tasks.spread,
        "task_factor": tasks.factor,
        "family": tasks.families,
        "role": None if tasks.roles is None else ["target", *tasks.roles],
        "mean_loss": tasks.loss,
        "share_of_loss": tasks.share,
        "class_information": tasks.information,
    }
    empty = [""] * len(tasks.names)
    values = [
        empty if column is None else [v if isinstance(v, str) else _short(v) for v in column]
        for column in columns.values()
    ]
    _write_csv(path, list(columns), zip(*values, strict=True))


def write_clean_labels(path, findings):
    """Labels from the most to the least suspicious, in the columns that label-cleaning tools use:
    ``is_label_issue``, ``label_quality`` (0 worst .. 1 best), given and predicted label."""
    evaluation, target = findings.evaluation, findings.target
    by = findings.ranking
    quality, suspected = target.quality(by), target.suspected(by)
    positions = evaluation.samples.positions[target.place]
    rows = [
        [
            evaluation.split.image_ids[positions[i]],
            evaluation.split.paths[positions[i]],
            bool(suspected[i]),
            f"{quality[i]:.6f}",
            target.given[i],
            target.prediction[i],
        ]
        for i in target.order(by)
    ]
    header = ["id", "path", "is_label_issue", "label_quality", "given_label", "predicted_label"]
    _write_csv(path, header, rows)


def write_weights(path, findings):
    """All weights, compressed: ``numpy.load(path)["weights"]`` is n x K, samples as in samples.csv.

    Beside it ids, task_names and, where the schedule has factors, feature_factor (n x K),
    loss_factor (n x K) and task_factor (K). float16 wherever that keeps three digits.
    """
    evaluation = findings.evaluation
    table = evaluation.table
    arrays = {
        "weights": compact(table.weights),
        "ids": np.array([evaluation.split.image_ids[p] for p in evaluation.samples.positions]),
        "task_names": np.array(findings.tasks.names),
    }
    arrays |= {f"{name}_factor": compact(values) for name, values in table.factors.items()}
    write_aside(path, lambda file: np.savez_compressed(file, **arrays))


def _short(value, digits=6):
    """Nine digits tell every float32 from its neighbours: a ranking keeps its order in the file."""
    return "" if np.isnan(value) else f"{value:.{digits}g}"


def _write_csv(path, header, rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_aside(path, lambda file: file.write(text.getvalue().encode()))
