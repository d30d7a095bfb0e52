"""Images in one folder per class, as torchvision's ImageFolder reads them."""

import os
import sys
from pathlib import Path

import numpy as np

from auxilearn.data.columns import Columns
from auxilearn.data.contract import Task
from auxilearn.data.sets import SET_NAMES, divide
from auxilearn.errors import UserError

# What names of images end in: torchvision's ImageFolder has all but the last two.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SUFFIXES += (".gif", ".jfif")


def folder_columns(folder, **division):
    """The ``Columns`` of a folder of images: the class is the name of the folder they are in.

    If the folders inside are called train, valid (or val, validation) and test, these are the sets,
    and the classes are the folders in them. Links are followed.

    Args: ``division``: as of ``sets.divide``. Raises UserError: no folder, none of classes, or a
    class without images.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise UserError(f"--images {folder}: no such folder")
    parts = _folders(root)
    given = "train" in parts and {name.lower() for name in parts} <= SET_NAMES.keys()
    paths, sets, others = [], [], []
    for name in parts if given else [""]:
        for one in _folders(root / name):
            found, left_out = images_below(root, root / name / one)
            paths += found
            sets += [SET_NAMES.get(name.lower())] * len(found)
            others += left_out
    warn_of(root, others)
    names, labels = class_folders(paths, root, depth=1 if given else 0)
    task = Task("folder", len(names), names)
    sets = divide(task, labels, np.array(sets) if given else None, str(folder), **division)
    return Columns([task], [labels], sets, root, paths=paths)


def class_folders(paths, root, depth=0):
    """(class names, numbers (n,)) of ``paths`` by the folder at ``depth``. UserError: too few."""
    parts = [path.split("/") for path in paths]
    loose = next((path for path, p in zip(paths, parts, strict=True) if len(p) < depth + 2), None)
    if loose is not None:
        raise UserError(
            f"{root / loose} is in no folder of a class; expected FOLDER/CLASS/IMAGE, or a --table "
            "with --target"
        )
    of_each = [p[depth] for p in parts]
    names = sorted({*of_each})
    if len(names) < 2:
        found = f"the class {names[0]} alone" if names else "none"
        raise UserError(f"{root}: expected a folder of images for every class, found {found}")
    number = {name: k for k, name in enumerate(names)}
    return tuple(names), np.array([number[name] for name in of_each], np.int32)


def _folders(folder):
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def images_below(root, folder):
    """(Images, other files) in and below ``folder``: their paths, relative to ``root``.

    Raises UserError: there is no image.
    """
    found, others, seen = [], [], set()
    for place, inner, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link back
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(place, name).relative_to(root).as_posix()
            (found if name.lower().endswith(SUFFIXES) else others).append(path)
    if not found:
        raise UserError(
            f"{folder} holds no image ({', '.join(SUFFIXES)}); put some there, or remove it"
        )
    return found, others


def warn_of(folder, others):
    """Say on stderr which files of a folder of images are left out."""
    if others:
        print(
            f"warning: {folder}: {len(others)} files are left out, whose names do not end like an "
            f"image's (such as {others[0]})",
            file=sys.stderr,
        )
