"""CUB-200-2011, or any folder of its shape: reading, checking, splitting, loading.

``read_annotations`` reads the text files of the published archive and refuses whatever is not
exactly right, by file and line. ``make_split`` divides the images, ``write_split`` records the
division in ``preprocess_data/``, ``load_split`` gives it to training after checking that the
input is still the one that was divided.
"""

import codecs
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from auxilearn.errors import UserError
from auxilearn.files import is_text, open_regular, read_regular

IMAGES = "images.txt"
LABELS = "image_class_labels.txt"
OFFICIAL_SPLIT = "train_test_split.txt"
CLASSES = "classes.txt"
ATTRIBUTE_LABELS = "attributes/image_attribute_labels.txt"
ATTRIBUTES = "attributes.txt"
ROLES = "attribute_roles.json"
REQUIRED_FILES = (IMAGES, LABELS, OFFICIAL_SPLIT, CLASSES, ATTRIBUTE_LABELS)

DICTIONARY_FILE = "image_dictionary.json"
SET_FILES = {
    "full_train": "full_train_set.json",
    "dev": "aux_set.json",
    "rest_train": "rest_train_set.json",
    "valid": "valid_set.json",
    "test": "test_set.json",
}
SPLIT_FILES = (DICTIONARY_FILE, *SET_FILES.values())
INFO_FILE = "split_info.json"

_REPAIR = "unpack the archive again"

# Others that Pillow knows are programs to be run, as EPS by Ghostscript, or for one system.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Annotations:
    """The text files of a CUB-shaped folder. N images in file order, C classes, A attributes."""

    root: Path
    image_ids: list[str]  # N
    paths: list[str]  # N, relative to root/images
    labels: np.ndarray  # (N,) int64, 0..C-1
    is_train: np.ndarray  # (N,) bool, the official split
    attributes: np.ndarray  # (N, A) uint8, 0 or 1
    class_names: list[str]  # C
    attribute_names: list[str]  # A


def read_annotations(root):
    """Read and check the annotation files under ``root``; see that every image file is there.

    C and A come from the files. ``attributes.txt`` may lie in ``root``, in ``root/attributes``
    or, as in the published archive, beside ``root``; without it the names are ``attribute_1`` and
    so on.

    Raises ``UserError``, with file and line, for a missing, empty, truncated or garbled file; an id
    that is repeated, unknown or without a label, split or attribute; a class id out of range; an
    image path that leaves ``images/``; an image file that is missing or empty; a class without a
    training image.
    """
    root = Path(root)
    _check_root(root)
    images = _read_images(root)
    class_names = _read_names(root / CLASSES, "class_id name")
    labels = _read_per_image(root, LABELS, "class_id", images, 1, len(class_names)) - 1
    is_train = _read_per_image(root, OFFICIAL_SPLIT, "is_train", images, 0, 1).astype(bool)
    names_file = _attributes_file(root)
    attribute_names = names_file and _read_names(names_file, "attribute_id name")
    attributes = _read_attributes(root, images, attribute_names, names_file)
    annotations = Annotations(
        root=root,
        image_ids=list(images),
        paths=[path for _, path in images.values()],
        labels=labels,
        is_train=is_train,
        attributes=attributes,
        class_names=class_names,
        attribute_names=attribute_names
        or [f"attribute_{number}" for number in range(1, attributes.shape[1] + 1)],
    )
    _check_training_images(annotations, needed=1, why="every class needs one")
    for line, path in images.values():
        _image_size(root, path, f"{root / IMAGES}, line {line}: ")
    return annotations


def _check_root(root):
    if os.path.isdir(root):  # unlike Path.is_dir, no exception where it may not be looked at
        inner = root / "CUB_200_2011"
        if not os.path.exists(root / IMAGES) and os.path.exists(inner / IMAGES):
            raise UserError(f"{root / IMAGES} is missing; did you mean --data_root {inner}?")
        return
    problem = "is not a folder" if os.path.exists(root) else "does not exist"
    raise UserError(
        f"data root {root} {problem}; get CUB-200-2011 with python data_preprocess.py --download, "
        f"or give the folder that holds {IMAGES} as --data_root"
    )


def _numbered_lines(path):
    """Yield (line number, text) for each line of a small text file that is not blank."""
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; expected the files of CUB-200-2011: get them with "
            "python data_preprocess.py --download, or give their folder as --data_root"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not data.strip():
        raise UserError(f"{path}, line 1: the file is empty; {_REPAIR}")
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(
                f"{path}, line {number}: not readable text (UTF-8 expected); {_REPAIR}"
            ) from None
        if text:
            yield number, text


def _read_table(path, columns):
    """Read 'id text' rows into {id: (line number, text)}, in file order; ids are checked."""
    rows = {}
    for line, text in _numbered_lines(path):
        fields = text.split(maxsplit=1)
        if len(fields) != 2 or not re.fullmatch(r"[1-9][0-9]{0,17}", fields[0]):
            raise UserError(
                f"{path}, line {line}: expected '{columns}', found {_short(text)}; {_REPAIR}"
            )
        key, value = fields
        if key in rows:
            raise UserError(
                f"{path}, line {line}: id {key} occurs a second time (first on line "
                f"{rows[key][0]}); every id is expected once"
            )
        rows[key] = line, value
    return rows


def _short(text):
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _read_names(path, columns):
    """Read a file of names whose ids are 1..n in any order; the names sorted by id."""
    rows = _read_table(path, columns)
    for key, (line, _) in rows.items():
        if int(key) > len(rows):
            raise UserError(
                f"{path}, line {line}: id {key} is out of range; the file has {len(rows)} rows, "
                f"so the ids 1 to {len(rows)} are expected"
            )
    return [rows[str(number)][1] for number in range(1, len(rows) + 1)]


def _read_images(root):
    """{image id: (line number, path relative to images/)}, in file order."""
    path = root / IMAGES
    images = _read_table(path, "image_id path")
    seen = {}
    for line, image in images.values():
        where = f"{path}, line {line}: "
        _check_image_path(image, where)
        file = PurePosixPath(image)  # a/./b and a//b are a/b
        if file in seen:
            raise UserError(
                f"{where}image {image} occurs a second time (first on line {seen[file]}); "
                "one image under two ids could be both trained and tested on"
            )
        seen[file] = line
    return images


def _check_image_path(path, where):
    """Refuse a path that could name a file outside ``images/``, on any system."""
    parts = path.replace("\\", "/").split("/")
    if (
        PurePosixPath(path).is_absolute()
        or ".." in parts
        or parts[0] == ""
        or re.match("[A-Za-z]:", path)
    ):
        raise UserError(
            f"{where}image path {_short(path)} leaves images/; "
            "expected a path relative to images/, without '..'"
        )


def _read_per_image(root, name, column, images, low, high):
    """Read the one integer in low..high that a file gives each image: (N,) int64, image order."""
    path = root / name
    rows = _read_table(path, f"image_id {column}")
    for key, (line, value) in rows.items():
        if key not in images:
            raise UserError(
                f"{path}, line {line}: image id {key} is not in {IMAGES}; "
                f"expected an id that {root / IMAGES} lists"
            )
        if not re.fullmatch(r"[0-9]{1,18}", value) or not low <= int(value) <= high:
            raise UserError(
                f"{path}, line {line}: {column} {_short(value)} is out of range; "
                f"expected {low} to {high}"
            )
    for key, (line, _) in images.items():
        if key not in rows:
            raise UserError(
                f"{path}: no row for image id {key} ({IMAGES}, line {line}); "
                f"expected one row for each image; {_REPAIR}"
            )
    return np.array([int(rows[key][1]) for key in images], dtype=np.int64)


def _attributes_file(root):
    """Where ``attributes.txt`` lies, or None. Inside ``root`` wins over beside it."""
    beside = (Path(os.path.abspath(root)).parent, root.resolve().parent)  # differ for a link
    places = (root, root / "attributes", *beside)
    return next(
        (place / ATTRIBUTES for place in places if os.path.exists(place / ATTRIBUTES)), None
    )


def _read_attributes(root, images, names, names_file):
    """Read the attribute bits: (N, A) uint8. Every (image, attribute) pair must occur once."""
    path = root / ATTRIBUTE_LABELS
    image, attribute, present = _parse_attribute_rows(path)

    def refuse(bad, problem):
        """Report the first row where ``bad``; ``problem`` turns its number into words."""
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(f"{path}, line {_line_of_row(path, row)}: {problem(row)}")

    ids = np.array([int(key) for key in images], dtype=np.int64)
    order = np.argsort(ids)
    place = np.searchsorted(ids, image, sorter=order).clip(max=len(ids) - 1)
    index = order[place]  # row -> position of its image
    refuse(
        ids[index] != image,
        lambda row: f"image id {image[row]} is not in {IMAGES}; expected an id that it lists",
    )
    refuse(
        (present != 0) & (present != 1),
        lambda row: f"is_present is {present[row]}; expected 0 or 1",
    )
    count = len(names) if names else int(attribute.max())
    limit = min(count, len(attribute))  # a garbled id must not make a table of its size
    source = f"{names_file} names {count}" if names else f"the file has {len(attribute)} rows"
    refuse(
        (attribute < 1) | (attribute > limit),
        lambda row: (
            f"attribute id {attribute[row]} is out of range; expected 1 to {limit} ({source})"
        ),
    )
    pair = index * count + attribute - 1
    order = np.argsort(pair, kind="stable")
    _refuse_repeat(path, pair, order)
    _refuse_gap(path, pair[order], images, attribute, count)
    return present[order].astype(np.uint8).reshape(len(ids), count)


def _refuse_repeat(path, pair, order):
    """``order`` sorts ``pair``, the number of each row's (image, attribute) pair."""
    repeats = np.flatnonzero(np.diff(pair[order]) == 0)
    if len(repeats):
        first, second = order[repeats[0]], order[repeats[0] + 1]
        raise UserError(
            f"{path}, line {_line_of_row(path, second)}: this image and attribute occurred before, "
            f"on line {_line_of_row(path, first)}; every pair is expected once"
        )


def _refuse_gap(path, ordered, images, attribute, count):
    """``ordered`` are the different pair numbers, rising; 0 to N * count - 1 are expected."""
    if len(ordered) == len(images) * count:
        return
    gaps = np.flatnonzero(ordered != np.arange(len(ordered)))
    gap = gaps[0] if len(gaps) else len(ordered)
    key = list(images)[gap // count]
    raise UserError(
        f"{path}: no row for image id {key} ({IMAGES}, line {images[key][0]}), attribute "
        f"{gap % count + 1}; expected one for each image and each attribute from 1 to {count} "
        f"(line {_line_of_row(path, int(np.argmax(attribute)))} has the highest one); {_REPAIR}"
    )


def _parse_attribute_rows(path):
    """The first three integers of every row, as three int64 arrays.

    Some published rows have extra fields, so a row's width is not looked at beyond the third.
    The bulk parser takes the whole file; only when it refuses is the file read line by line, to
    say which one is wrong.
    """
    if not path.is_file() or path.stat().st_size == 0:
        next(_numbered_lines(path))  # raises the message for a missing or empty file
    with open_regular(path) as file:
        encoding = "utf-8-sig" if file.read(3) == codecs.BOM_UTF8 else "latin-1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # older numpy only warns of 1.5 read as 1, or no rows
            rows = np.loadtxt(
                path,
                dtype=np.int64,
                usecols=(0, 1, 2),
                comments=None,
                ndmin=2,
                encoding=encoding,
            )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, Warning) as error:
        with path.open(encoding=encoding, errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and not re.match(r"\s*([+-]?[0-9]{1,18}(\s+|$)){3}", line):
                    raise UserError(
                        f"{path}, line {number}: expected 'image_id attribute_id is_present "
                        f"certainty_id seconds', found {_short(line.strip())}; {_REPAIR}"
                    ) from None
        raise UserError(f"{path}, line 1: no rows could be read ({error}); {_REPAIR}") from None
    return rows.T


def _line_of_row(path, row):
    """The line number of the row-th line that is not blank (rows count from 0)."""
    with path.open(encoding="latin-1") as lines:
        filled = (number for number, line in enumerate(lines, start=1) if line.strip())
        return next(number for count, number in enumerate(filled) if count == row)


def _check_training_images(annotations, needed, why):
    counts = np.bincount(
        annotations.labels[annotations.is_train], minlength=len(annotations.class_names)
    )
    short = np.flatnonzero(counts < needed)
    if len(short):
        number = short[0] + 1
        path = annotations.root / CLASSES
        line, name = _read_table(path, "class_id name")[str(number)]
        raise UserError(
            f"{path}, line {line}: class {number} ({name}) has {counts[short[0]]} training "
            f"images in {OFFICIAL_SPLIT}; {why}"
        )


def _image_size(root, path, where=""):
    """The byte size of an image file, which must be there and not empty."""
    file = root / "images" / path
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}cannot find image file {file}: {reason}; {_REPAIR}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        problem = "is empty" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise UserError(f"{where}image file {file} {problem}; {_REPAIR}")
    inside = os.path.realpath(root / "images")
    if os.path.commonpath([inside, os.path.realpath(file)]) != inside:
        raise UserError(f"{where}image file {file} is a link that leaves images/; {_REPAIR}")
    return status.st_size


def check_images(annotations, progress=True):
    """Decode every image in full. Raises ``UserError`` naming those that cannot be read."""
    bad = []
    for path in tqdm(
        annotations.paths, "decoding images", unit="image", disable=not progress or None
    ):
        file = annotations.root / "images" / path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=IMAGE_FORMATS) as image:
                    in_rgb(image)
        except Exception as error:  # Pillow's decoders raise many kinds on damaged files
            bad.append(f"{file} ({error})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{len(bad)} of {len(annotations.paths)} images cannot be decoded: "
            f"{', '.join(bad[:3])}{more}; {_REPAIR}"
        )


def in_rgb(image):
    """A Pillow image in RGB. ValueError where its pixels do not fit, and would become white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits per channel, mode {image.mode}; expected 8")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------
# Recognising the input again
# ---------------------------------------------------------------------------------------------


def fingerprint(root):
    """What the input is: {"files": {file name: sha256}, "images": sha256}.

    Every annotation file is hashed whole; of the images only the paths and byte sizes are, so
    that it stays cheap enough to be done at the start of every run.
    """
    root = Path(root)
    files = {name: hash_file(root / name) for name in REQUIRED_FILES}
    for name, file in ((ATTRIBUTES, _attributes_file(root)), (ROLES, root / ROLES)):
        if file is not None and file.is_file():
            files[name] = hash_file(file)
    return {
        "files": files,
        "images": _hash_images(root, [path for _, path in _read_images(root).values()]),
    }


def check_fingerprint(recorded, root, command=None):
    """Raise ``UserError`` naming what changed under ``root`` since ``recorded`` was taken.

    ``command`` is the command line the message recommends; the default prepares ``root`` again.
    """
    current = fingerprint(root)
    before, now = recorded["files"], current["files"]
    changes = [f"{name} is missing" for name in before if name not in now]
    changes += [f"{name} is new" for name in now if name not in before]
    changes += [f"{name} differs" for name in before if now.get(name, before[name]) != before[name]]
    if recorded["images"] != current["images"] and not any(IMAGES in text for text in changes):
        changes.append(_IMAGES_DIFFER)
    if changes:
        _refuse_changes(changes, root, command)


_IMAGES_DIFFER = "the set of image files (paths and byte sizes) differs"


def _refuse_changes(changes, root, command):
    command = command or f"python data_preprocess.py --data_root {shlex.quote(str(root))}"
    raise UserError(
        f"data root {root} is not what was preprocessed: {', '.join(changes)}; run {command} again"
    )


def _hash_images(root, paths):
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path}\t{_image_size(root, path)}\n".encode())
    return digest.hexdigest()


def hash_file(path, algorithm="sha256"):
    """The hex digest of a file. Raises ``UserError`` if it can not be read."""
    digest = hashlib.new(algorithm)
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {_REPAIR}, or give --data_root") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------
# Splitting
# ---------------------------------------------------------------------------------------------


def make_split(annotations, aux_shot=1, split_seed=5):
    """Divide the images: {"full_train", "dev", "rest_train", "valid", "test": list of image ids}.

    ``full_train`` is the official training set in file order, ``dev`` the first ``aux_shot``
    images of each class in it, ``rest_train`` the others, order kept. The official test ids,
    sorted by number and then shuffled by a generator of ``split_seed``, are halved into ``valid``
    and ``test`` (which gets the odd one): this depends on nothing but the seed and the ids.

    Raises ``UserError`` for a class with fewer than ``aux_shot + 1`` training images, and for
    fewer than two official test images.
    """
    if aux_shot < 1:
        raise UserError(f"aux_shot is {aux_shot}; expected 1 or more development images per class")
    if split_seed < 0:
        raise UserError(f"split_seed is {split_seed}; expected 0 or more")
    why = f"--aux_shot {aux_shot} needs {aux_shot + 1}: those for the development set and one more"
    _check_training_images(annotations, aux_shot + 1, why)
    rows = zip(annotations.image_ids, annotations.labels, annotations.is_train, strict=True)
    full_train, dev, official_test = [], [], []
    taken = Counter()
    for image_id, label, is_train in rows:
        if not is_train:
            official_test.append(image_id)
            continue
        full_train.append(image_id)
        if taken[label] < aux_shot:
            taken[label] += 1
            dev.append(image_id)
    if len(official_test) < 2:
        raise UserError(
            f"{annotations.root / OFFICIAL_SPLIT}: {len(official_test)} test images; expected 2 "
            "or more, to be halved into a validation and a test set"
        )
    in_dev = set(dev)
    shuffled = np.random.default_rng(split_seed).permutation(sorted(official_test, key=int))
    shuffled = shuffled.tolist()
    half = len(shuffled) // 2
    return {
        "full_train": full_train,
        "dev": dev,
        "rest_train": [image_id for image_id in full_train if image_id not in in_dev],
        "valid": shuffled[:half],
        "test": shuffled[half:],
    }


@dataclass(frozen=True)
class Written:
    """What ``write_split`` did: the content of split_info.json, whether any file changed, and the
    copies it kept of files that somebody had edited."""

    info: dict
    changed: bool
    kept: list[Path]


def write_split(split_dir, annotations, aux_shot=1, split_seed=5):
    """Divide the images and write the six JSON files and ``split_info.json`` to ``split_dir``.

    Every file is written aside and renamed, ``split_info.json`` last and after its predecessor is
    gone, so that an interrupted run can not be taken for a finished one. Where all seven files
    already hold the same bytes nothing is touched. A file that somebody edited by hand is copied
    to ``<name>.edited-<hash>.json`` before it is replaced.

    Raises ``UserError`` as ``make_split`` and ``fingerprint`` do, before anything is written, and
    when ``split_dir`` can not be written.
    """
    split_dir = Path(split_dir)
    ids = make_split(annotations, aux_shot, split_seed)
    values = {DICTIONARY_FILE: _image_dictionary(annotations)}
    values.update({file: ids[name] for name, file in SET_FILES.items()})
    contents = {name: _to_json(value) for name, value in values.items()}
    info = {
        "labels": annotations.labels.tolist(),
        "data_root": os.path.abspath(annotations.root),
        "split_seed": int(split_seed),
        "aux_shot": int(aux_shot),
        "fingerprint": fingerprint(annotations.root),
        "sha256": {name: _sha256(data) for name, data in contents.items()},
        "class_names": annotations.class_names,
        "attribute_names": annotations.attribute_names,
        "counts": {
            "images": len(annotations.image_ids),
            "classes": len(annotations.class_names),
            "attributes": len(annotations.attribute_names),
            **{name: len(ids[name]) for name in SET_FILES},
        },
    }
    roles_file = annotations.root / ROLES
    if roles_file.is_file():
        info["attribute_roles_file"] = os.path.abspath(roles_file)
        info["attribute_roles"] = _read_roles(roles_file, annotations.attribute_names)
    contents[INFO_FILE] = _to_json(info)
    for name in contents:
        if os.path.isdir(split_dir / name):
            raise UserError(f"{split_dir / name} is a folder, where a file is to be written")
    try:
        if all(_bytes_or_none(split_dir / name) == data for name, data in contents.items()):
            return Written(info, changed=False, kept=[])
        split_dir.mkdir(parents=True, exist_ok=True)
        with _locked(split_dir, fcntl.LOCK_EX):
            kept = _keep_edited(split_dir, contents)
            _replace_files(split_dir, contents)
    except OSError as error:
        raise UserError(
            f"cannot write to {error.filename or split_dir}: {error.strerror}; "
            "give a folder that can be written as --out_dir"
        ) from None
    return Written(info, changed=True, kept=kept)


def combined_fingerprint(info, hashes=None):
    """One hex string for the input and the six JSON files.

    ``info`` is the content of split_info.json; ``hashes`` the {file name: sha256} of the six files
    as they are now, by default as they were written.
    """
    files = info["sha256"] if hashes is None else hashes
    recorded = info["fingerprint"]
    parts = [recorded["files"], recorded["images"], [files[name] for name in SPLIT_FILES]]
    return _sha256(json.dumps(parts, sort_keys=True).encode())


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


def _to_json(value):
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def _bytes_or_none(path):
    return path.read_bytes() if path.is_file() else None


def _keep_edited(split_dir, contents):
    """Copy the files that are neither as recorded nor as they are about to be written."""
    recorded = {}  # without a usable record, whatever is there may be somebody's own work
    with suppress(FileNotFoundError, ValueError, LookupError, TypeError):
        recorded = json.loads(read_regular(split_dir / INFO_FILE))["sha256"]
    kept = []
    for name in SPLIT_FILES:
        data = _bytes_or_none(split_dir / name)
        if data is None or data == contents[name] or _sha256(data) == recorded.get(name):
            continue
        copy = split_dir / f"{Path(name).stem}.edited-{_sha256(data)[:8]}.json"
        shutil.copy2(split_dir / name, copy)
        kept.append(copy)
    return kept


@contextmanager
def _locked(folder, kind):
    """Hold a lock on a folder for the block; nothing is done where there is none or no locks."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)


def _replace_files(split_dir, contents):
    """Write ``contents`` (split_info.json last) so that no half-written file is ever in place."""
    with tempfile.TemporaryDirectory(dir=split_dir, prefix=".writing-") as aside:
        for name, data in contents.items():
            with (Path(aside) / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        (split_dir / INFO_FILE).unlink(missing_ok=True)
        for name in contents:
            os.replace(Path(aside) / name, split_dir / name)


def _read_roles(path, attribute_names):
    """The "roles" mapping of attribute_roles.json; it must give each attribute a role."""
    content = _parse_json(path)
    roles = content.get("roles") if isinstance(content, dict) else None
    if not isinstance(roles, dict):
        raise UserError(f"{path}, line 1: expected an object with a 'roles' mapping")
    for name in attribute_names:
        if not is_text(roles.get(name)):
            raise UserError(f"{path}: attribute {_short(name)} has no role; expected a word")
    unknown = [name for name in roles if name not in set(attribute_names)]
    if unknown:
        raise UserError(f"{path}: {_short(unknown[0])} is not an attribute of this data set")
    return roles


# ---------------------------------------------------------------------------------------------
# Loading a split
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """A preprocessed data set, as training uses it. N images, C classes, A attributes."""

    image_ids: list[str]  # N, in the order of image_dictionary.json
    paths: list[str]  # N, relative to data_root/images
    labels: np.ndarray  # (N,) int64, 0..C-1
    attributes: np.ndarray  # (N, A) uint8, 0 or 1
    indices: dict[str, np.ndarray]  # full_train, dev, rest_train, valid, test -> int64 positions
    class_names: list[str]  # C
    attribute_names: list[str]  # A
    attribute_roles: dict[str, str] | None  # attribute name -> a word such as noise
    data_root: Path
    info: dict  # the content of split_info.json
    fingerprint: str  # hex; covers the annotation files, the images and the six JSON files

    @property
    def preprocessed_labels(self):
        """(N,) labels as they were before anybody edited image_dictionary.json.

        ``labels`` where images were added or taken away since.
        """
        recorded = self.info.get("labels")
        if not isinstance(recorded, list) or len(recorded) != len(self.labels):
            return self.labels
        known = range(len(self.class_names))
        if not all(type(label) is int and label in known for label in recorded):
            return self.labels
        return np.array(recorded, dtype=np.int64)

    def image_path(self, i):
        """The file of the i-th image."""
        return self.data_root / "images" / self.paths[i]


def load_split(split_dir, data_root=None):
    """Load what ``write_split`` wrote, and check it against itself and against the data.

    ``data_root`` defaults to the recorded one. Raises ``UserError`` for a missing or unreadable
    file, an unknown or repeated id, an id in two sets, a label out of range, a class without a
    training image, a missing image file, and for annotation files that are not those that were
    preprocessed (where the data root has ``images/`` alone, only the images are compared). JSON
    files that were edited since are legitimate: they are named in a warning on stderr.
    """
    split_dir = Path(split_dir)
    with _locked(split_dir, fcntl.LOCK_SH):  # not while somebody replaces them
        values, hashes = _read_split_files(split_dir)
    info = values[INFO_FILE]
    _check_info(split_dir / INFO_FILE, info)
    dictionary = split_dir / DICTIONARY_FILE
    paths, labels, attributes = _read_dictionary(dictionary, values[DICTIONARY_FILE], info)
    image_ids = list(values[DICTIONARY_FILE])
    sets = {name: values[file] for name, file in SET_FILES.items()}
    _check_sets(split_dir, sets, image_ids)
    position = {image_id: i for i, image_id in enumerate(image_ids)}
    split = Split(
        image_ids=image_ids,
        paths=paths,
        labels=labels,
        attributes=attributes,
        indices={
            name: np.array([position[image_id] for image_id in ids], dtype=np.int64)
            for name, ids in sets.items()
        },
        class_names=info["class_names"],
        attribute_names=info["attribute_names"],
        attribute_roles=info.get("attribute_roles"),
        data_root=Path(info["data_root"] if data_root is None else data_root),
        info=info,
        fingerprint=combined_fingerprint(info, hashes),
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
            data = read_regular(path)
        except OSError as error:
            problem = "is missing" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(
                f"{path}: {problem}; run python data_preprocess.py --out_dir "
                f"{shlex.quote(str(split_dir))}"
            ) from None
        values[name] = _parse_json(path, data)
        hashes[name] = _sha256(data)
    return values, hashes


def _parse_json(path, data=None):
    def once(pairs):
        """The object, no name of which may be given twice: json would take the last, silently."""
        found = dict(pairs)
        if len(found) < len(pairs):
            name = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
            raise UserError(f"{path}: {_short(name)} occurs more than once in an object")
        return found

    try:
        return json.loads(read_regular(path) if data is None else data, object_pairs_hook=once)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        problem = f"not valid JSON ({error.msg})"
    except (ValueError, RecursionError):  # not text, numbers of thousands of digits, deep nesting
        where, problem = f"{path}, line 1", "not readable as JSON"
    raise UserError(f"{where}: {problem}; mend it or run python data_preprocess.py again")


def _check_info(path, info):
    """split_info.json is ours; check as much as the code below relies on."""

    def names(value):
        return isinstance(value, list) and value and all(map(is_text, value))

    def _are_roles(value, of):
        known = isinstance(value, dict) and value.keys() == set(of)
        return value is None or (known and all(map(is_text, value.values())))

    fine = (
        isinstance(info, dict)
        and isinstance(info.get("data_root"), str)
        and isinstance(info.get("sha256"), dict)
        and isinstance(info.get("fingerprint"), dict)
        and isinstance(info["fingerprint"].get("files"), dict)
        and isinstance(info["fingerprint"].get("images"), str)
        and names(info.get("class_names"))
        and names(info.get("attribute_names"))
        and _are_roles(info.get("attribute_roles"), info["attribute_names"])
        and {"split_seed", "aux_shot"} <= info.keys()
    )
    if not fine:
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
        _check_image_path(row[0], f"{path}: image id {key}: ")
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
    """Every set is a list of different known ids; what is trained on is never measured on."""
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
        present = np.bincount(split.labels[split.indices[name]], minlength=len(split.class_names))
        absent = np.flatnonzero(present == 0)
        if len(absent):
            raise UserError(
                f"{split_dir / SET_FILES[name]}: no image of class {absent[0]} "
                f"({split.class_names[absent[0]]}); every class needs a training image"
            )


def _check_data(split_dir, split, edited):
    """The data root still holds what was preprocessed."""
    root, info = split.data_root, split.info
    if not os.path.isdir(root / "images"):
        raise UserError(
            f"{root / 'images'} does not exist ({split_dir / INFO_FILE} or --data_root names it); "
            "give the folder that holds images/ as --data_root"
        )
    arguments = {"data_root": root, "out_dir": split_dir}
    arguments.update({key: info[key] for key in ("aux_shot", "split_seed") if key in info})
    command = "python data_preprocess.py" + "".join(
        f" --{key} {shlex.quote(str(value))}" for key, value in arguments.items()
    )
    if any(os.path.exists(root / name) for name in REQUIRED_FILES):
        check_fingerprint(info["fingerprint"], root, command)
        if DICTIONARY_FILE not in edited:
            return  # its images are those of images.txt, which were just looked at
    images = _hash_images(root, split.paths)
    if DICTIONARY_FILE not in edited and images != info["fingerprint"]["images"]:
        _refuse_changes([_IMAGES_DIFFER], root, command)
