"""CUB-200-2011, or any folder of its layout: read it, check it, recognise it later.

``read_annotations`` reads the text files of the published archive and refuses every error by file
and line. ``check_images`` decodes every image. ``fingerprint`` identifies the data, so that every
run can compare it.
"""

import codecs
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from auxilearn.data import image_files
from auxilearn.data.image_files import hash_images, image_size
from auxilearn.errors import UserError
from auxilearn.files import hash_file

IMAGES = "images.txt"
LABELS = "image_class_labels.txt"
OFFICIAL_SPLIT = "train_test_split.txt"
CLASSES = "classes.txt"
ATTRIBUTE_LABELS = "attributes/image_attribute_labels.txt"
ATTRIBUTES = "attributes.txt"
ROLES = "attribute_roles.json"
REQUIRED_FILES = (IMAGES, LABELS, OFFICIAL_SPLIT, CLASSES, ATTRIBUTE_LABELS)

_ARCHIVE = "unpack the archive again if this is CUB-200-2011"
_REPAIR = f"correct it, or {_ARCHIVE}"
_REPLACE = f"put it back, or {_ARCHIVE}"
_PUT_BACK = f"give --data_root, or {_REPLACE}"


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
    image file that is missing or empty; a class without a training image.
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
    check_training_images(annotations, needed=1, why="every class needs one")
    for line, path in images.values():
        image_size(root / "images", path, f"{root / IMAGES}, line {line}: ", cure=_REPLACE)
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
        f"or give the folder that holds {IMAGES} as --data_root, or own data by --table or --images"
    )


def _numbered_lines(path):
    """Yield (line number, text) for each line of a small text file that is not blank."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; expected the files of CUB-200-2011: get them with "
            "python data_preprocess.py --download, or give their folder as --data_root; own data: "
            "--table or --images"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not data.strip():
        raise UserError(f"{path}, line 1: the file is empty; {_REPAIR}")
    for number, line in enumerate(data.splitlines(), start=1):  # at \n, \r\n and \r
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
                f"{path}, line {line}: expected '{columns}', found {shown(text)}; "
                f"{_cure_of_row(line, fields)}"
            )
        key, value = fields
        if key in rows:
            raise UserError(
                f"{path}, line {line}: id {key} occurs a second time (first on line "
                f"{rows[key][0]}); every id is expected once"
            )
        rows[key] = line, value
    return rows


def _cure_of_row(line, fields):
    """What to do about a row that is not 'id text', by the mistakes that people make."""
    if len(fields) == 2 and re.fullmatch("0+", fields[0]):
        return "ids begin at 1: number the rows from 1, in the other files as well"
    if line == 1 and not re.match(r"[+-]?[0-9]", fields[0]):
        return f"a row begins with its id, a number: delete a line of headings, or {_ARCHIVE}"
    return _REPAIR


def shown(text):
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
        file = PurePosixPath(image)  # a/./b and a//b are a/b
        if file in seen:
            raise UserError(
                f"{path}, line {line}: image {image} occurs a second time (first on line "
                f"{seen[file]}); one image under two ids could be both trained and tested on"
            )
        seen[file] = line
    return images


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
                f"{path}, line {line}: {column} {shown(value)} is out of range; "
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

    Some published rows have extra fields, so fields beyond the third are ignored. The bulk parser
    takes the whole file. Only if it fails is the file read line by line, to find the wrong line.
    """
    if not path.is_file() or path.stat().st_size == 0:
        next(_numbered_lines(path))  # raises the message for a missing or empty file
    with open(path, "rb") as file:
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
                        f"certainty_id seconds', found {shown(line.strip())}; "
                        f"{_cure_of_row(number, line.split())}"
                    ) from None
        raise UserError(f"{path}, line 1: no rows could be read ({error}); {_REPAIR}") from None
    return rows.T


def _line_of_row(path, row):
    """The line number of the row-th line that is not blank (rows count from 0)."""
    with path.open(encoding="latin-1") as lines:
        filled = (number for number, line in enumerate(lines, start=1) if line.strip())
        return next(number for count, number in enumerate(filled) if count == row)


def check_training_images(annotations, needed, why):
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


def check_images(annotations):
    """Decode every image in full. Raises ``UserError`` naming those that cannot be read."""
    image_files.check_images(annotations.root / "images", annotations.paths, _REPLACE)


# ---------------------------------------------------------------------------------------------
# Recognising the input again
# ---------------------------------------------------------------------------------------------


def fingerprint(root):
    """The identity of the input: {"files": {file name: sha256}, "images": sha256}.

    Every annotation file is hashed whole. Of the images only paths and byte sizes are hashed, so
    that every run can afford it at its start.
    """
    root = Path(root)
    files = {name: hash_file(root / name, cure=_PUT_BACK) for name in REQUIRED_FILES}
    for name, file in ((ATTRIBUTES, _attributes_file(root)), (ROLES, root / ROLES)):
        if file is not None and file.is_file():
            files[name] = hash_file(file, cure=_PUT_BACK)
    return {
        "files": files,
        "images": _hash_images(root, [path for _, path in _read_images(root).values()]),
    }


def check_fingerprint(recorded, root, command):
    """Raise ``UserError`` naming what changed under ``root`` since ``recorded`` was taken.

    ``command``: the command line that the message recommends.
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


def check_image_files(root, paths, recorded, command):
    """The files ``paths`` below images/ must exist, and match ``recorded`` unless that is None."""
    images = _hash_images(root, paths)
    if recorded is not None and images != recorded["images"]:
        _refuse_changes([_IMAGES_DIFFER], root, command)


_IMAGES_DIFFER = "the set of image files (paths and byte sizes) differs"


def _hash_images(root, paths):
    return hash_images(root / "images", paths, _REPLACE)


def _refuse_changes(changes, root, command):
    raise UserError(
        f"data root {root} has changed since it was preprocessed: {', '.join(changes)}; "
        f"run {command} again"
    )
