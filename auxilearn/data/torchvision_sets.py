"""CIFAR-100 and Oxford-IIIT Pet, as torchvision fetches and unpacks them.

The auxiliary tasks are those that the publishers' own files hold. Which ones Chen et al. (2022)
took is not known here.
"""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR100, OxfordIIITPet
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from auxilearn.data.columns import Columns, target_first
from auxilearn.data.contract import Task
from auxilearn.data.sets import divide
from auxilearn.errors import UserError
from auxilearn.files import bytes_or_none, hash_file, new_folder

SPECIES = ("cat", "dog")


def cifar100_columns(root, *, target="fine", download=False, **division):
    """CIFAR-100 (Krizhevsky 2009): ``fine`` (100 classes), ``coarse`` (their 20 superclasses).

    ``root`` holds ``cifar-100-python/``; with ``download`` torchvision puts it there. The images
    are written once to ``root/cifar-100-images`` as PNG. Files of another MD5 than the published
    ones are read with a warning. torchvision's reader leaves the superclasses out and runs code
    that a file may hold, so the files are read here.

    Args: ``division``: as of ``sets.divide``. Raises UserError: a file is missing or is not
    CIFAR-100's; the download failed.
    """
    root = Path(os.path.abspath(root))
    if download:
        _torchvision(CIFAR100, root, True)
    folder = root / CIFAR100.base_folder
    meta = folder / CIFAR100.meta["filename"]
    listed = [*CIFAR100.train_list, *CIFAR100.test_list]
    files = [folder / name for name, _ in listed]
    for name, md5 in [*listed, (meta.name, CIFAR100.meta["md5"])]:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing: fetch CIFAR-100 with --download, or unpack "
                f"{CIFAR100.url} in {root}"
            )
        if not check_integrity(folder / name, md5):
            print(
                f"warning: {folder / name} is not the published file: its MD5 is another one",
                file=sys.stderr,
            )
    names = [_entry(meta, f"{name}_label_names", folder) for name in ("fine", "coarse")]
    tasks = [
        Task(name, len(of_task), tuple(map(str, of_task)))
        for name, of_task in zip(("fine", "coarse"), names, strict=True)
    ]
    images, labels = [], []
    for file in files:
        images.append(_images(file, folder))
        labels.append([_class_numbers(file, task, len(images[-1]), folder) for task in tasks])
    paths = _as_png(root / "cifar-100-images", files, images)
    sets = np.repeat(["train"] * len(CIFAR100.train_list) + ["test"], [*map(len, images)])
    tasks, labels = target_first(tasks, map(np.concatenate, zip(*labels, strict=True)), target)
    sets = divide(tasks[0], labels[0], sets, str(folder), **division)
    return Columns(tasks, labels, sets, root / "cifar-100-images", [*files, meta], paths)


def pets_columns(root, *, target="breed", download=False, **division):
    """Oxford-IIIT Pet (Parkhi et al. 2012): ``breed`` (37 classes), ``species`` (cat or dog).

    ``root`` holds ``oxford-iiit-pet/`` with ``images/`` and ``annotations/``; with ``download``
    torchvision puts it there.

    Args: ``division``: as of ``sets.divide``. Raises UserError: a folder, list or image is missing;
    a line of a list is wrong; the download failed.
    """
    root = Path(os.path.abspath(root))
    annotations = root / "oxford-iiit-pet" / "annotations"
    images = annotations.parent / "images"
    rows, names = [], []
    for split, name in (("trainval", "train"), ("test", "test")):
        try:
            dataset = _torchvision(OxfordIIITPet, root, download, split=split)
        except ValueError:  # torchvision does not say which line is wrong
            _read_pet_list(annotations / f"{split}.txt", images)
            raise
        names = names or dataset.classes
        rows += [(name, *row) for row in _read_pet_list(annotations / f"{split}.txt", images)]
    given, paths, *labels = (np.array(column) for column in zip(*rows, strict=True))
    if len(names) != max(labels[0]) + 1:
        raise UserError(
            f"{annotations / 'trainval.txt'}: expected images of every breed, one name for each; "
            f"found {len(names)} names, and breeds up to {max(labels[0]) + 1}; "
            f"{_again(annotations.parent)}"
        )
    tasks = [Task("breed", len(names), tuple(names)), Task("species", 2, SPECIES)]
    tasks, labels = target_first(tasks, labels, target)
    sets = divide(tasks[0], labels[0], given, str(annotations), **division)
    files = [annotations / name for name in ("trainval.txt", "test.txt")]
    return Columns(tasks, labels, sets, images, files, paths.tolist())


def _torchvision(dataset, root, download, **options):
    """torchvision's data set. UserError: it is not there or cannot be fetched."""
    name = dataset.__name__
    url = CIFAR100.url if dataset is CIFAR100 else "https://www.robots.ox.ac.uk/~vgg/data/pets/"
    try:
        return dataset(root, download=download, **options)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        if download:
            raise UserError(
                f"the download of {name} into {root} failed ({error}): run it again, or fetch "
                f"{url} by hand and unpack it there"
            ) from None
        missing = getattr(error, "filename", None) or root
        raise UserError(
            f"{missing}: {name} is missing or incomplete: fetch it with --download, or unpack "
            f"{url} there"
        ) from None


def _again(folder):
    return f"remove {folder} and fetch it again with --download"


# --------------------------------------------------------------------------------------------------
# CIFAR-100's files
# --------------------------------------------------------------------------------------------------

# All that a pickled array of numpy's is made of; none of it runs code of the file.
_ARRAY = np.zeros(0, np.uint8)
_HARMLESS = {
    "_reconstruct": _ARRAY.__reduce__()[0],
    "_frombuffer": _ARRAY.__reduce_ex__(5)[0],
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


class _Unpickler(pickle.Unpickler):
    """Containers, numbers, texts and arrays; anything else in the file is refused."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in _HARMLESS:
            return _HARMLESS[name]
        if (module, name) == ("_codecs", "encode"):  # bytes, in files written for Python 2
            return _encode
        raise pickle.UnpicklingError(f"{module}.{name} is no part of this data set")


def _encode(text, encoding):
    return text.encode("latin-1")


def _entry(path, key, folder):
    """What a file of CIFAR-100 has under ``key``."""
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, encoding="latin-1").load()[key]
    except Exception as error:  # of many kinds, on a file that is not a pickle
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: no {key} can be read ({reason}); {_again(folder)}") from None


def _images(path, folder):
    """(n, 32, 32, 3) uint8."""
    data = np.asarray(_entry(path, "data", folder))
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise UserError(
            f"{path}: expected images of 3072 bytes, found {data.dtype} of shape {data.shape}; "
            f"{_again(folder)}"
        )
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _class_numbers(path, task, images, folder):
    labels = _entry(path, f"{task.name}_labels", folder)
    if len(labels) != images or not {*labels} <= {*range(task.classes)}:
        raise UserError(
            f"{path}: expected a class from 0 to {task.classes - 1} in {task.name}_labels for each "
            f"of {images} images; {_again(folder)}"
        )
    return np.array(labels)


def _as_png(folder, sources, images):
    """Write ``images`` of ``sources`` (files) to ``folder`` unless they are there. Their paths."""
    paths = [
        f"{source.name}/{number:05d}.png"
        for source, of_source in zip(sources, images, strict=True)
        for number in range(len(of_source))
    ]
    record = "".join(f"{source.name} {hash_file(source)}\n" for source in sources).encode()
    if bytes_or_none(folder / "source.txt") == record:
        return paths
    if folder.exists():
        raise UserError(f"{folder} holds the images of other files: remove it")
    with new_folder(folder) as draft:
        for source in sources:
            (draft / source.name).mkdir()
        written = tqdm(np.concatenate(images), "writing images", unit="image", disable=None)
        for path, image in zip(paths, written, strict=True):
            Image.fromarray(image).save(draft / path)
        (draft / "source.txt").write_bytes(record)
    return paths


# --------------------------------------------------------------------------------------------------
# Pets' lists
# --------------------------------------------------------------------------------------------------


def _read_pet_list(path, images):
    """[(file name, breed 0.., species 0 or 1)] of a list. UserError names the line."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            fine = len(fields) == 4 and all(text.isdecimal() for text in fields[1:])
            if not fine or int(fields[1]) < 1 or fields[2] not in ("1", "2"):
                raise UserError(
                    f"{path}, line {number}: expected 'image breed species number', with breeds "
                    f"from 1 and species 1 or 2, found {line.strip()[:60]!r}; "
                    f"{_again(images.parent)}"
                )
            name = f"{fields[0]}.jpg"
            if not (images / name).is_file():
                raise UserError(
                    f"{path}, line {number}: {images / name} is missing; {_again(images.parent)}"
                )
            rows.append((name, int(fields[1]) - 1, int(fields[2]) - 1))
    return rows
