"""The split of a data set of CUB's layout: divide its images, record the division, load it.

``make_split`` divides the images. ``write_split`` records the division in ``preprocess_data/``.
``load_split`` checks that the input has not changed and gives the division to training; it loads
what other readers wrote (``data.columns``) as well.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePosixPath

import numpy as np

from auxilearn.data.columns import INFO_FILE, is_columns, load_columns
from auxilearn.data.contract import Split, Task
from auxilearn.data.cub import (
    OFFICIAL_SPLIT,
    REQUIRED_FILES,
    ROLES,
    check_fingerprint,
    check_image_files,
    check_training_images,
    fingerprint,
    shown,
)
from auxilearn.errors import UserError
from auxilearn.files import (
    bytes_or_none,
    locked,
    read_json,
    replace_together,
    to_json,
    writing_split,
)

DICTIONARY_FILE = "image_dictionary.json"
SET_FILES = {
    "full_train": "full_train_set.json",
    "dev": "aux_set.json",
    "rest_train": "rest_train_set.json",
    "valid": "valid_set.json",
    "test": "test_set.json",
}
SPLIT_FILES = (DICTIONARY_FILE, *SET_FILES.values())


# ---------------------------------------------------------------------------------------------
# Splitting
# ---------------------------------------------------------------------------------------------


def make_split(annotations, aux_shot, split_seed, dev_from):
    """Divide the images: {"full_train", "dev", "rest_train", "valid", "test": list of image ids}.

    ``full_train`` is the official training set in file order, ``dev`` the first ``aux_shot``
    images of each class in it, ``rest_train`` the others, order kept. The official test ids,
    sorted by number and then shuffled by a generator of ``split_seed``, are halved into ``valid``
    and ``test`` (which gets the odd one): this depends on nothing but the seed and the ids.

    With ``dev_from="valid"``, ``dev`` is the first ``aux_shot`` images of each class in ``valid``,
    which keeps the others. ``rest_train`` is the official training set then, and ``full_train``
    has ``dev`` after it.

    Raises ``UserError`` for a class with fewer than ``aux_shot + 1`` training images (or fewer than
    ``aux_shot`` in ``valid``), and for fewer than two official test images.
    """
    if dev_from == "train":
        why = f"--aux_shot {aux_shot} needs {aux_shot + 1}: those for the development set and one"
        check_training_images(annotations, aux_shot + 1, f"{why} more")
    labels = dict(zip(annotations.image_ids, annotations.labels.tolist(), strict=True))
    train = dict(zip(annotations.image_ids, annotations.is_train.tolist(), strict=True))
    full_train = [image_id for image_id in labels if train[image_id]]
    official_test = [image_id for image_id in labels if not train[image_id]]
    if len(official_test) < 2:
        raise UserError(
            f"{annotations.root / OFFICIAL_SPLIT}: {len(official_test)} test images; expected 2 "
            "or more, to be halved into a validation and a test set"
        )
    shuffled = np.random.default_rng(split_seed).permutation(sorted(official_test, key=int))
    shuffled = shuffled.tolist()
    half = len(shuffled) // 2
    valid, test = shuffled[:half], shuffled[half:]
    if dev_from == "train":
        dev = _first_of_each_class(full_train, labels, aux_shot)
    else:
        dev = _first_of_each_class(valid, labels, aux_shot)
        found = Counter(labels[image_id] for image_id in dev)
        for number, name in enumerate(annotations.class_names):
            if found[number] < aux_shot:
                raise UserError(
                    f"{annotations.root / OFFICIAL_SPLIT}: class {name} has {found[number]} "
                    f"images in the validation half of the test images; --dev_from valid needs "
                    f"{aux_shot} (--aux_shot): take another --split_seed, or --dev_from train"
                )
        if len(dev) == len(valid):
            raise UserError(
                f"--dev_from valid --aux_shot {aux_shot} takes all {len(valid)} validation images: "
                "take fewer, or --dev_from train"
            )
        full_train = full_train + dev
    in_dev = set(dev)
    return {
        "full_train": full_train,
        "dev": dev,
        "rest_train": [image_id for image_id in full_train if image_id not in in_dev],
        "valid": [image_id for image_id in valid if image_id not in in_dev],
        "test": test,
    }


def _first_of_each_class(image_ids, labels, count):
    """The first ``count`` of every class, in order. ``labels``: {image id: class}."""
    taken = Counter()
    first = []
    for image_id in image_ids:
        taken[labels[image_id]] += 1
        if taken[labels[image_id]] <= count:
            first.append(image_id)
    return first


@dataclass(frozen=True)
class Written:
    """What ``write_split`` did: the content of split_info.json, whether any file changed, and the
    copies it kept of files that somebody had edited."""

    info: dict
    changed: bool
    kept: list[Path]


def write_split(split_dir, annotations, aux_shot=1, split_seed=5, dev_from="train"):
    """Divide the images and write the six JSON files and ``split_info.json`` to ``split_dir``.

    Every file is written aside and renamed. The old ``split_info.json`` is removed first and the
    new one written last, so an interrupted run is never taken for a finished one. If all seven
    files already hold the same bytes, nothing is written. A file that somebody edited by hand is
    copied to ``<name>.edited-<hash>.json`` before it is replaced.

    Raises ``UserError`` as ``make_split`` and ``fingerprint`` do, before anything is written, and
    if ``split_dir`` cannot be written.
    """
    split_dir = Path(split_dir)
    ids = make_split(annotations, aux_shot, split_seed, dev_from)
    values = {DICTIONARY_FILE: _image_dictionary(annotations)}
    values.update({file: ids[name] for name, file in SET_FILES.items()})
    contents = {name: to_json(value) for name, value in values.items()}
    info = {
        "labels": annotations.labels.tolist(),
        "data_root": os.path.abspath(annotations.root),
        "split_seed": int(split_seed),
        "aux_shot": int(aux_shot),
        "fingerprint": fingerprint(annotations.root),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "class_names": annotations.class_names,
        "attribute_names": annotations.attribute_names,
        "counts": {
            "images": len(annotations.image_ids),
            "classes": len(annotations.class_names),
            "attributes": len(annotations.attribute_names),
            **{name: len(ids[name]) for name in SET_FILES},
        },
    }
    if dev_from != "train":
        info["dev_from"] = dev_from
    roles_file = annotations.root / ROLES
    if roles_file.is_file():
        info["attribute_roles_file"] = os.path.abspath(roles_file)
        info["attribute_roles"] = _read_roles(roles_file, annotations.attribute_names)
    contents[INFO_FILE] = to_json(info)
    with writing_split(split_dir):
        if all(bytes_or_none(split_dir / name) == data for name, data in contents.items()):
            return Written(info, changed=False, kept=[])
        split_dir.mkdir(parents=True, exist_ok=True)
        with locked(split_dir / ".lock"):
            kept = _keep_edited(split_dir, contents)
            replace_together(split_dir, contents, last=INFO_FILE)
    return Written(info, changed=True, kept=kept)


def combined_fingerprint(info, hashes=None):
    """One hex string for the input and the six JSON files.

    ``info`` is the content of split_info.json; ``hashes`` the {file name: sha256} of the six files
    as they are now, by default as they were written.
    """
    files = info["sha256"] if hashes is None else hashes
    recorded = info["fingerprint"]
    parts = [recorded["files"], recorded["images"], [files[name] for name in SPLIT_FILES]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _image_dictionary(annotations):
    """{image id: [path, class 0..C-1, [A bits]]}, in file order."""
    rows = zip(
        annotations.image_ids,
        annotations.paths,
        annotations.labels.tolist(),
        annotations.attributes.tolist(),
        strict=True,
    )
    return {image_id: [path, label, bits] for image_id, path, label, bits in rows}


def _keep_edited(split_dir, contents):
    """Copy the files that somebody edited: neither as recorded nor as about to be written."""
    recorded = {}  # without a usable record, whatever is there may be somebody's own work
    with suppress(FileNotFoundError, ValueError, LookupError, TypeError):
        recorded = json.loads((split_dir / INFO_FILE).read_bytes())["sha256"]
    kept = []
    for name in SPLIT_FILES:
        data = bytes_or_none(split_dir / name)
        if data is None or data == contents[name]:
            continue
        digest = hashlib.sha256(data).hexdigest()
        if digest == recorded.get(name):
            continue
        copy = split_dir / f"{Path(name).stem}.edited-{digest[:8]}.json"
        shutil.copy2(split_dir / name, copy)
        kept.append(copy)
    return kept


def _read_roles(path, attribute_names):
    """The "roles" mapping of attribute_roles.json; it must give each attribute a role."""
    content = read_json(path)
    roles = content.get("roles") if isinstance(content, dict) else None
    if not isinstance(roles, dict):
        raise UserError(f"{path}, line 1: expected an object with a 'roles' mapping")
    for name in attribute_names:
        if not isinstance(roles.get(name), str):
            raise UserError(f"{path}: attribute {shown(name)} has no role; expected a word")
    unknown = [name for name in roles if name not in set(attribute_names)]
    if unknown:
        raise UserError(f"{path}: {shown(unknown[0])} is not an attribute of this data set")
    return roles


# ---------------------------------------------------------------------------------------------
# Loading a split
# ---------------------------------------------------------------------------------------------


def cub_tasks(class_names, attribute_names):
    """The tasks of a folder of CUB's layout: the class, then an attribute each."""
    attributes = [Task(name, 2, ("no", "yes")) for name in attribute_names]
    return [Task("target", len(class_names), tuple(class_names)), *attributes]


def load_split(split_dir, data_root=None):
    """The ``Split`` that ``data_preprocess.py`` wrote to ``split_dir``, of whatever kind.

    ``data_root``: where the images are now, if they were moved. Raises ``UserError``: files are
    missing, damaged or contradict each other, or the data have changed since.
    """
    split_dir = Path(split_dir)
    if is_columns(split_dir):
        return load_columns(split_dir, data_root)
    return _load_cub(split_dir, data_root)


def _load_cub(split_dir, data_root):
    """Load the files of ``write_split``, and check them against each other and against the data.

    ``data_root`` defaults to the recorded one. Raises ``UserError`` for a missing or unreadable
    file, an unknown or repeated id, an id in two sets, a label out of range, a class without a
    training image, a missing image file, and for annotation files that changed since preprocessing
    (if the data root has ``images/`` alone, only the images are compared). JSON files may be
    edited: a warning on stderr names them.
    """
    values, hashes = _read_split_files(split_dir)
    info = values[INFO_FILE]
    _check_info(split_dir / INFO_FILE, info)
    dictionary = split_dir / DICTIONARY_FILE
    paths, labels, attributes = _read_dictionary(dictionary, values[DICTIONARY_FILE], info)
    image_ids = list(values[DICTIONARY_FILE])
    sets = {name: values[file] for name, file in SET_FILES.items()}
    _check_sets(split_dir, sets, image_ids)
    position = {image_id: i for i, image_id in enumerate(image_ids)}
    root = Path(info["data_root"] if data_root is None else data_root)
    split = Split(
        tasks=cub_tasks(info["class_names"], info["attribute_names"]),
        labels=np.column_stack([labels, attributes]),
        mask=None,
        indices={
            name: np.array([position[image_id] for image_id in ids], dtype=np.int64)
            for name, ids in sets.items()
        },
        ids=image_ids,
        data_root=root,
        info=info,
        fingerprint=combined_fingerprint(info, hashes),
        paths=paths,
        image_folder=root / "images",
        roles=info.get("attribute_roles"),
    )
    _check_classes(split_dir, split)
    edited = [name for name in SPLIT_FILES if hashes[name] != info["sha256"].get(name)]
    _check_data(split_dir, split, edited)
    if edited:
        print(
            f"warning: edited since preprocessing, and used as they are now: "
            f"{', '.join(str(split_dir / name) for name in edited)}",
            file=sys.stderr,
            flush=True,
        )
    return split


def _read_split_files(split_dir):
    """({file name: parsed JSON}, {file name: sha256}) of all seven files."""
    values, hashes = {}, {}
    for name in (INFO_FILE, *SPLIT_FILES):
        path = split_dir / name
        try:
            data = path.read_bytes()
        except OSError as error:
            problem = "is missing" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(
                f"{path}: {problem}; run python data_preprocess.py --out_dir "
                f"{shlex.quote(str(split_dir))} (own data: with --table or --images)"
            ) from None
        try:
            values[name] = json.loads(data)
        except ValueError as error:
            raise UserError(
                f"{path}: not valid JSON ({error}); mend it or run python data_preprocess.py again"
            ) from None
        hashes[name] = hashlib.sha256(data).hexdigest()
    return values, hashes


def _check_info(path, info):
    """UserError unless split_info.json is of this version: only this program writes it."""
    needed = {"data_root", "sha256", "fingerprint", "class_names", "attribute_names", "split_seed"}
    if not isinstance(info, dict) or not needed <= info.keys():
        raise UserError(
            f"{path}, line 1: not what data_preprocess.py writes; run python data_preprocess.py"
        )


def _read_dictionary(path, dictionary, info):
    """image_dictionary.json as (paths, labels (N,) int64, attributes (N, A) uint8)."""
    classes, width = len(info["class_names"]), len(info["attribute_names"])
    if not isinstance(dictionary, dict) or not dictionary:
        raise UserError(f"{path}, line 1: expected an object of images")
    seen = {}
    for key, row in dictionary.items():
        fine = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)
        fine = fine and isinstance(row[2], list) and len(row[2]) == width
        if not fine or not {int}.issuperset(map(type, row[2])):
            raise UserError(
                f"{path}: image id {key}: expected [path, class, [{width} attribute bits]]"
            )
        if type(row[1]) is not int or not 0 <= row[1] < classes:
            raise UserError(
                f"{path}: image id {key}: class {row[1]!r} is out of range; "
                f"expected 0 to {classes - 1}"
            )
        if not {0, 1}.issuperset(row[2]):
            raise UserError(f"{path}: image id {key}: an attribute is neither 0 nor 1")
        first = seen.setdefault(PurePosixPath(row[0]), key)
        if first != key:
            raise UserError(
                f"{path}: image id {key}: {row[0]} is the image of id {first} already; "
                "one image under two ids could be both trained and tested on"
            )
    paths, labels, attributes = zip(*dictionary.values(), strict=True)
    return (
        list(paths),
        np.array(labels, dtype=np.int64),
        np.array(attributes, dtype=np.uint8).reshape(len(paths), width),
    )


def _check_sets(split_dir, sets, image_ids):
    """Every set is a list of different known ids; no image is both trained on and tested on."""
    known = set(image_ids)
    members = {}
    for name, ids in sets.items():
        path = split_dir / SET_FILES[name]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, str) for i in ids):
            raise UserError(f"{path}, line 1: expected a non-empty list of image ids (strings)")
        members[name] = set(ids)
        if unknown := members[name] - known:
            raise UserError(f"{path}: image id {min(unknown)} is not in {DICTIONARY_FILE}")
        if len(members[name]) < len(ids):
            repeated = next(image_id for image_id, n in Counter(ids).items() if n > 1)
            raise UserError(f"{path}: image id {repeated} occurs more than once")
    pairs = [*combinations(("dev", "rest_train", "valid", "test"), 2)]
    for one, other in [*pairs, ("full_train", "valid"), ("full_train", "test")]:
        if shared := members[one] & members[other]:
            raise UserError(
                f"{split_dir}: image id {min(shared)} is both in {SET_FILES[one]} and in "
                f"{SET_FILES[other]}; the sets must be disjoint"
            )


def _check_classes(split_dir, split):
    for name in ("full_train", "rest_train"):
        targets = split.labels[split.indices[name], 0]
        present = np.bincount(targets, minlength=split.target.classes)
        absent = np.flatnonzero(present == 0)
        if len(absent):
            raise UserError(
                f"{split_dir / SET_FILES[name]}: no image of class {absent[0]} "
                f"({split.target.class_names[absent[0]]}); every class needs a training image"
            )


def _check_data(split_dir, split, edited):
    """Check that the data root still holds the preprocessed data."""
    root, info = split.data_root, split.info
    if not os.path.isdir(root / "images"):
        raise UserError(
            f"{root / 'images'} does not exist ({split_dir / INFO_FILE} or --data_root names it); "
            "give the folder that holds images/ as --data_root"
        )
    arguments = {"data_root": root, "out_dir": split_dir}
    settings = ("aux_shot", "split_seed", "dev_from")
    arguments.update({key: info[key] for key in settings if key in info})
    command = "python data_preprocess.py" + "".join(
        f" --{key} {shlex.quote(str(value))}" for key, value in arguments.items()
    )
    if any(os.path.exists(root / name) for name in REQUIRED_FILES):
        check_fingerprint(info["fingerprint"], root, command)
        if DICTIONARY_FILE not in edited:
            return  # its images are those of images.txt, which were just looked at
    recorded = None if DICTIONARY_FILE in edited else info["fingerprint"]
    check_image_files(root, split.paths, recorded, command)
