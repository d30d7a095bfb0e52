"""Predictions of a run's best checkpoint for new samples."""

import csv
import io
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from auxilearn.backbones import load_file, load_matching
from auxilearn.data import table
from auxilearn.data.columns import rows_of
from auxilearn.data.contract import Split, Task
from auxilearn.data.dataset import in_order, sample_set
from auxilearn.data.folder import images_below, warn_of
from auxilearn.errors import UserError
from auxilearn.files import write_aside
from auxilearn.run.build import build_model, open_inputs, stream
from auxilearn.run.config import choose_device, from_record
from auxilearn.run.record import BEST_FILE


def predict(run_dir, source, out=None, device=None, num_workers=None):
    """Write a CSV file with a row per sample of ``source``. Returns its path.

    Columns: sample (path of the image, or number of the row from 1); probability, of the target's
    predicted class; then the predictions of all tasks, the target first: names of classes, numbers
    in the unit of the training table.

    Args: ``run_dir``: the run's folder; ``source``: a folder of images, or a table with the columns
    that the model was trained on; ``out``: default RUN_DIR/predictions.csv.

    Raises UserError: no checkpoint; a source of the other kind; a column or image that is missing
    or cannot be read.
    """
    checkpoint = Path(run_dir) / BEST_FILE
    state = load_file(checkpoint)
    if not (isinstance(state, dict) and {"model", "config", "tasks"} <= state.keys()):
        raise UserError(f"{checkpoint} is not a checkpoint of train_bilevel.py")
    config = from_record(state["config"])
    workers = config.num_workers if num_workers is None else num_workers
    config = replace(
        config, device=str(choose_device(device)), num_workers=workers, cache_dir="none"
    )
    tasks = [Task(**task) for task in state["tasks"]]
    split = (
        _table(source, tasks, state["features"]) if state["features"] else _folder(source, tasks)
    )
    model = build_model(config, split, pretrained=False)
    load_matching(model, state["model"], f"{checkpoint}: the model does not fit its settings")
    model.eval()
    order = in_order(len(split.ids), config.test_batch_size)
    samples = sample_set(split, "new", tasks)
    batches = stream(config, open_inputs(config, split), samples, order, "new", augment=False)
    rows = []
    total = -(-len(split.ids) // config.test_batch_size)
    with torch.inference_mode():
        for batch in tqdm(batches, "predicting", total, unit="batch", disable=None):
            columns = _columns(model, model.features(batch.inputs), tasks)
            rows += zip(*columns, strict=True)
    names = [task.name for task in tasks]
    own = ["sample", "probability"] if tasks[0].classes else ["sample"]
    head = [_new(name, names) for name in own] + names
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows((name, *row) for name, row in zip(split.ids, rows, strict=True))
    out = Path(out or Path(run_dir) / "predictions.csv")
    try:
        write_aside(out, lambda file: file.write(text.getvalue().encode()))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; give another --out") from None
    return out


def _columns(model, features, tasks):
    """The columns of a batch after the sample's name."""
    columns = []
    for task, part in zip(tasks, model.heads.predictions(features).cpu().T.tolist(), strict=True):
        if task.classes:
            columns.append([task.class_names[int(c)] for c in part])
        else:
            columns.append([_decimal(value * task.std + task.mean, task.std) for value in part])
    if tasks[0].classes:
        probability = model.heads.target_logits(features).softmax(dim=1).amax(dim=1)
        columns.insert(0, [f"{p:.4f}" for p in probability.tolist()])
    return columns


def _new(name, taken):
    """``name``, with underscores behind it until no task is called so."""
    return name if name not in taken else _new(f"{name}_", taken)


def _decimal(value, std):
    """``value`` to a millionth of ``std``, and not less than six digits."""
    digits = 6 + math.ceil(math.log10(max(abs(value) / std, 1)))
    return f"{value:.{min(digits, 17)}g}"


def _folder(source, tasks):
    """The images of a folder as a ``Split`` without labels, whose one set is ``new``."""
    root = Path(os.path.abspath(source))
    if not root.exists():
        raise UserError(f"--predict {source}: no such folder")
    if not root.is_dir():
        raise UserError(f"--predict {source}: expected a folder of images, as the run was trained")
    paths, others = images_below(root, root)
    warn_of(root, others)
    return _unlabelled(tasks, paths, root, paths=paths, image_folder=root)


def _table(source, tasks, features):
    """The rows of a table as a ``Split`` without labels, whose one set is ``new``."""
    if Path(source).is_dir():
        raise UserError(f"--predict {source}: expected a table, as the run was trained on rows")
    found = table.read_table(source, "--predict")

    def values(feature):
        column = found.columns.get(feature["name"])
        if column is None:
            raise UserError(
                f"{source}: there is no column {feature['name']}, which the model was trained on"
            )
        if "mean" in feature:
            table.check_number(found, column)
            return column.numbers
        if column.codes is None:
            raise UserError(f"{source}, column {column.name}: too many different values")
        code = {value: number for number, value in enumerate(feature["values"], start=1)}
        codes = np.array([code.get(value, 0) for value in column.values] + [0])[column.codes]
        if unknown := int(((codes == 0) & column.present).sum()):
            print(
                f"warning: {source}, column {column.name}: {unknown} values are in no training "
                "row; they count as missing",
                file=sys.stderr,
            )
        return codes

    ids = [str(number) for number in range(1, found.rows + 1)]
    rows = rows_of(features, values, found.rows)
    return _unlabelled(tasks, ids, Path(source).absolute().parent, rows=rows)


def _unlabelled(tasks, ids, root, **inputs):
    shape = len(ids), len(tasks)
    return Split(
        tasks=tasks,
        labels=np.zeros(shape, np.int64),
        mask=np.zeros(shape, bool),
        indices={"new": np.arange(len(ids))},
        ids=ids,
        data_root=root,
        info={},
        fingerprint="",
        **inputs,
    )
