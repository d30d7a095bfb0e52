"""The report's numbers as files: four CSV tables, and all weights in a compressed .npz."""

import numpy as np
import pandas as pd

from auxilearn.files import write_aside

SAMPLES_FILE, TASKS_FILE, LABELS_FILE = "samples.csv", "tasks.csv", "clean_labels.csv"
CLASSES_FILE, WEIGHTS_FILE = "classes.csv", "weights.npz"
OF_THE_SAMPLES = (SAMPLES_FILE, LABELS_FILE, CLASSES_FILE, WEIGHTS_FILE)
TABLE_FILES = (TASKS_FILE, *OF_THE_SAMPLES)
# The columns of label-cleaning tools, and ours.
LABEL_COLUMNS = {
    "id": "id",
    "path": "path",
    "is_label_issue": "suspected",
    "label_quality": "quality",
    "given_label": "given_label",
    "predicted_label": "prediction",
    "margin": "margin",
}


def write_tables(directory, findings):
    """Write the tables of ``findings`` into ``directory``. Classes are numbers, as in classes.csv;
    samples that are rows have no path.

    weights.npz: ``numpy.load(path)["weights"]`` is n x K, samples as in samples.csv, with ids,
    task_names and, if the schedule has factors, feature_factor, loss_factor and task_factor.
    """
    tasks, labels, evaluation = findings.tasks, findings.labels, findings.evaluation
    if tasks is not None:
        _write_csv(directory / TASKS_FILE, tasks.drop(columns=["low", "high"], errors="ignore"))
    if evaluation is None:
        return
    if names := evaluation.tasks[0].class_names:
        classes = pd.DataFrame({"class": range(len(names)), "name": names})
        _write_csv(directory / CLASSES_FILE, classes)
    _write_csv(directory / SAMPLES_FILE, findings.samples)
    columns = {name: labels[ours] for name, ours in LABEL_COLUMNS.items() if ours in labels}
    _write_csv(directory / LABELS_FILE, pd.DataFrame(columns))
    if tasks is not None:
        factors = {f"{name}_factor": v for name, v in evaluation.table.factors.items()}
        arrays = {"ids": findings.samples.id.to_numpy(str), "task_names": tasks.name.to_numpy(str)}
        arrays |= {"weights": evaluation.table.weights} | factors
        write_aside(directory / WEIGHTS_FILE, lambda file: np.savez_compressed(file, **arrays))


def _write_csv(path, frame):
    """Nine digits tell every float32 from its neighbours: a ranking keeps its order in the file."""
    text = frame.to_csv(index=False, float_format="%.9g", lineterminator="\n")
    write_aside(path, lambda file: file.write(text.encode()))
