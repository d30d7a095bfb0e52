"""A data set as columns in ``preprocess_data/``: all readers but CUB's write it.

tasks.json       tasks and features in order: name, file, and classes or mean and std
column_N.npy     (N,) one column of labels or inputs, as ``Columns`` has them
*_set.npy        positions of the samples in each set
images.json      paths of the images, where the inputs are images
split_info.json  written last: where the data were, seed, counts, checksums
"""

import hashlib
import io
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from auxilearn.data.contract import Rows, RowsShape, Split, Task, scale_of
from auxilearn.data.image_files import hash_images
from auxilearn.errors import UserError
from auxilearn.files import (
    bytes_or_none,
    hash_file,
    locked,
    read_json,
    replace_together,
    to_json,
    writing_split,
)

TASKS_FILE, IMAGES_FILE, INFO_FILE = "tasks.json", "images.json", "split_info.json"
SET_FILES = {
    "full_train": "full_train_set.npy",
    "dev": "aux_set.npy",
    "rest_train": "rest_train_set.npy",
    "valid": "valid_set.npy",
    "test": "test_set.npy",
}


@dataclass
class Feature:
    """A column of inputs.

    values (N,): float64, NaN where missing; or, with ``names`` of the categories, their numbers
    from 0, -1 where missing.
    """

    name: str
    values: np.ndarray
    names: tuple[str, ...] | None = None


@dataclass
class Columns:
    """A data set of N samples as a reader hands it over.

    labels: a column (N,) for every task: class numbers from 0, -1 where missing; or float64, NaN
    where missing. sets: full_train (development samples included), dev, rest_train, valid, test;
    positions (n,). The inputs are ``paths`` of images relative to ``root``, or ``features``.
    root: absolute, where the data are; files: those that were read. All samples of dev, and one at
    least of valid and of test, have a target label.
    """

    tasks: list[Task]
    labels: list[np.ndarray]
    sets: dict[str, np.ndarray]
    root: Path
    files: list[Path] = field(default_factory=list)
    paths: list[str] | None = None
    features: list[Feature] = field(default_factory=list)


def target_first(tasks, labels, target):
    """(tasks, labels) as lists, the task called ``target`` first. UserError: there is none."""
    names = [task.name for task in tasks]
    if target not in names:
        raise UserError(f"--target {target}: the tasks of this data set are {', '.join(names)}")
    pairs = zip(tasks, labels, strict=True)
    pairs = sorted(pairs, key=lambda pair: pair[0].name != target)
    return tuple(map(list, zip(*pairs, strict=True)))


def write_columns(split_dir, columns, **settings):
    """Write ``Columns`` to ``split_dir``. Returns (content of split_info.json, whether it changed).

    Files are written aside and renamed, ``split_info.json`` last, as ``split.write_split`` does.

    Args: ``settings``: recorded; split_seed and aux_shot, and ``command``, which prepares the data
    again. Raises UserError: an image is missing, or ``split_dir`` cannot be written.
    """
    split_dir = Path(split_dir)
    contents, described = {}, {"tasks": [], "features": []}

    def add(values):
        name = f"column_{len(described['tasks']) + len(described['features'])}.npy"
        contents[name] = _npy(values)
        return name

    for task, values in zip(columns.tasks, columns.labels, strict=True):
        kind = np.int32 if task.classes else np.float64
        entry = {"name": task.name, "file": add(np.asarray(values, kind))}
        names = list(task.class_names) if task.classes else None
        described["tasks"].append(entry | {"class_names": names})
    train = columns.sets["full_train"]
    for feature in columns.features:
        values, entry = _prepared(feature, train)
        described["features"].append({"name": feature.name, "file": add(values), **entry})
    for name, file in SET_FILES.items():
        contents[file] = _npy(np.asarray(columns.sets[name], np.int64))
    images = None
    if columns.paths is not None:
        contents[IMAGES_FILE] = to_json(columns.paths)
        images = hash_images(columns.root, columns.paths)
    contents[TASKS_FILE] = to_json(described)
    info = {
        "data_root": str(columns.root),
        **settings,
        "fingerprint": {
            "files": {os.path.abspath(file): hash_file(file) for file in columns.files},
            "images": images,
        },
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "counts": {
            "samples": len(columns.labels[0]),
            "tasks": len(columns.tasks),
            "features": len(columns.features),
            **{name: len(columns.sets[name]) for name in SET_FILES},
        },
    }
    contents[INFO_FILE] = to_json(info)
    with writing_split(split_dir):
        if all(bytes_or_none(split_dir / name) == data for name, data in contents.items()):
            return info, False
        split_dir.mkdir(parents=True, exist_ok=True)
        with locked(split_dir / ".lock"):
            old = _info(split_dir)["sha256"] if is_columns(split_dir) else {}
            replace_together(split_dir, contents, last=INFO_FILE)
            for name in old.keys() - contents.keys():
                (split_dir / name).unlink(missing_ok=True)
    return info, True


def _prepared(feature, train):
    """(values to be stored, their description) of a ``Feature``, by the training rows ``train``.

    Categories are numbered from 1; 0 stands for missing ones and for those of no training row.
    """
    values = feature.values
    if feature.names is None:
        known = values[train]
        mean, std = scale_of(known[~np.isnan(known)])
        return values, {"mean": mean, "std": std}
    seen = np.unique(values[train])
    seen = seen[seen >= 0]
    codes = np.zeros(len(feature.names) + 1, np.int32)  # its last entry is that of -1
    codes[seen] = np.arange(1, len(seen) + 1)
    return codes[values], {"values": [feature.names[k] for k in seen]}


def _npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _info(split_dir):
    return read_json(split_dir / INFO_FILE)


def is_columns(split_dir):
    """Whether ``split_dir`` holds what ``write_columns`` wrote."""
    with suppress(UserError, LookupError, TypeError):
        return TASKS_FILE in _info(split_dir)["sha256"]
    return False


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


def load_columns(split_dir, data_root):
    """The ``Split`` in ``split_dir``. ``data_root``: the folder of its images, if moved, or None.

    Raises UserError: a file is missing or differs from what was written, or the data have changed
    since.
    """
    info = _info(split_dir)
    command = info.get("command", "python data_preprocess.py")
    contents = {}
    for name, digest in info["sha256"].items():
        data = contents[name] = bytes_or_none(split_dir / name)
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            problem = "is missing" if data is None else "is not as it was written"
            raise UserError(f"{split_dir / name} {problem}; put it back, or run {command} again")

    def column(entry):
        return np.load(io.BytesIO(contents.pop(entry)), allow_pickle=False)

    described = json.loads(contents[TASKS_FILE])
    tasks, labels = [], []
    for entry in described["tasks"]:
        names = entry["class_names"]
        tasks.append(Task(entry["name"], names and len(names), tuple(names or ())))
        labels.append(column(entry["file"]))
    mask = np.column_stack([v >= 0 if v.dtype == np.int32 else ~np.isnan(v) for v in labels])
    kind = np.int64 if all(task.classes for task in tasks) else np.float64
    labels = np.column_stack(labels).astype(kind)
    labels[~mask] = 0
    root = Path(info["data_root"] if data_root is None else data_root)
    paths, rows = None, None
    if IMAGES_FILE in contents:
        paths = json.loads(contents[IMAGES_FILE])
        ids = paths
    else:
        entries = described["features"]
        rows = rows_of(entries, lambda entry: column(entry["file"]), len(labels))
        ids = [str(number) for number in range(1, len(labels) + 1)]
    _check_data(info, root, paths, command)
    files = [info["sha256"], info["fingerprint"]["images"]]
    return Split(
        tasks=tasks,
        labels=labels,
        mask=None if mask.all() else mask,
        indices={name: column(file) for name, file in SET_FILES.items()},
        ids=ids,
        data_root=root,
        info=info,
        fingerprint=hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        paths=paths,
        image_folder=root if paths else None,
        rows=rows,
    )


def rows_of(features, values_of, samples):
    """The ``Rows`` of so many samples. ``features``: as in ``Rows``; ``values_of``: one of them ->
    its (N,) values, numbers in their own unit or codes from 0."""
    numeric = [entry for entry in features if "mean" in entry]
    categorical = [entry for entry in features if "values" in entry]
    numbers = np.empty((samples, len(numeric)), np.float32)
    codes = np.empty((samples, len(categorical)), np.int64)
    for k, entry in enumerate(numeric):
        values = (values_of(entry) - entry["mean"]) / entry["std"]
        numbers[:, k] = np.nan_to_num(values, nan=0.0)
    for k, entry in enumerate(categorical):
        codes[:, k] = values_of(entry)
    shape = RowsShape(len(numeric), [len(entry["values"]) + 1 for entry in categorical])
    features = [{k: value for k, value in entry.items() if k != "file"} for entry in features]
    return Rows(numbers, codes, shape, features)


def _check_data(info, root, paths, command):
    """Compare the data that are still there with what was preprocessed."""
    recorded = info["fingerprint"]
    changed = [
        file
        for file, digest in recorded["files"].items()
        if os.path.exists(file) and hash_file(file) != digest
    ]
    if paths is not None:
        if not os.path.isdir(root):
            raise UserError(
                f"the folder of images {root} does not exist; give the one that holds "
                f"{paths[0]} as --data_root"
            )
        if hash_images(root, paths) != recorded["images"]:
            changed.append(f"images (paths and byte sizes) in {root}")
    if changed:
        raise UserError(f"changed since preprocessing: {', '.join(changed)}; run {command} again")
