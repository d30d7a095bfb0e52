"""CIFAR-100 and Oxford-IIIT Pet through torchvision's readers and downloads.

The auxiliary tasks are those that the publishers' own files hold. Which ones Chen et al. (2022)
took is not known here.
"""

import pickle
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR100, OxfordIIITPet

from auxilearn.data.samples import Samples, halved
from auxilearn.errors import UserError

SPECIES = ["cat", "dog"]


def read_cifar100(root, seed=5, download=False):
    """CIFAR-100 (Krizhevsky 2009): ``fine`` (100 classes), ``coarse`` (their 20 superclasses).

    ``root`` holds ``cifar-100-python/``; with ``download`` torchvision puts it there. The official
    test set is halved by ``seed``. Images are (60000, 32, 32, 3) uint8, training images first.

    Raises UserError: a file is missing or its MD5 is wrong; the download failed; a file lacks
    superclasses.
    """
    sets = [_opened(CIFAR100, root, download, train=train) for train in (True, False)]
    folder = Path(root) / CIFAR100.base_folder
    coarse, coarse_names = [], _entry(folder / CIFAR100.meta["filename"], "coarse_label_names")
    for files, part in zip((CIFAR100.train_list, CIFAR100.test_list), sets, strict=True):
        labels = [n for name, _ in files for n in _entry(folder / name, "coarse_labels")]
        if len(labels) != len(part) or not {*labels} <= {*range(len(coarse_names))}:
            raise UserError(
                f"{folder / files[0][0]}: expected a superclass from 0 to {len(coarse_names) - 1} "
                f"for each of {len(part)} images; {_again(folder)}"
            )
        coarse += labels
    is_train = np.arange(len(coarse)) < len(sets[0])
    return Samples(
        columns={
            "fine": np.array([n for part in sets for n in part.targets], dtype=np.int64),
            "coarse": np.array(coarse, dtype=np.int64),
        },
        class_names={"fine": list(sets[0].classes), "coarse": list(coarse_names)},
        tasks=["fine", "coarse"],
        sets=halved(is_train, seed),
        images=np.concatenate([part.data for part in sets]),
    )


def read_pets(root, seed=5, download=False):
    """Oxford-IIIT Pet (Parkhi et al. 2012): ``breed`` (37 classes), ``species`` (cat or dog).

    ``root`` holds ``oxford-iiit-pet/`` with ``images/`` and ``annotations/``; with ``download``
    torchvision puts it there. The official test set is halved by ``seed``. Images are files.

    Raises UserError: a folder, list or image is missing; a line of a list is wrong; the download
    failed.
    """
    annotations = Path(root) / "oxford-iiit-pet" / "annotations"
    images = annotations.parent / "images"
    rows, classes = [], []
    for split in ("trainval", "test"):
        try:
            dataset = _opened(OxfordIIITPet, root, download, split=split)
        except ValueError:  # torchvision does not say which line is wrong
            _read_pet_list(annotations / f"{split}.txt", images)
            raise
        classes = classes or dataset.classes
        rows += [(split, *row) for row in _read_pet_list(annotations / f"{split}.txt", images)]
    splits, files, breeds, species = zip(*rows, strict=True)
    if len(classes) != max(breeds) + 1:
        raise UserError(
            f"{annotations / 'trainval.txt'}: expected images of every breed, one name for each; "
            f"found {len(classes)} names, and breeds up to {max(breeds) + 1}; "
            f"{_again(annotations.parent)}"
        )
    return Samples(
        columns={"breed": np.array(breeds), "species": np.array(species)},
        class_names={"breed": list(classes), "species": SPECIES},
        tasks=["breed", "species"],
        sets=halved(np.array(splits) == "trainval", seed),
        images=list(files),
    )


def _opened(dataset, root, download, **options):
    """torchvision's data set. UserError: it is not there, is damaged or cannot be fetched."""
    name = dataset.__name__
    try:
        return dataset(root, download=download, **options)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        if download:
            raise UserError(
                f"the download of {name} into {root} failed ({error}): run it again, or fetch "
                f"{' and '.join(_urls(dataset))} by hand and unpack it there"
            ) from None
        raise UserError(
            f"{root}: {name} is missing or damaged ({error}): fetch it with --download, or unpack "
            f"{' and '.join(_urls(dataset))} there"
        ) from None


def _urls(dataset):
    if dataset is CIFAR100:
        return [dataset.url]
    return ["https://www.robots.ox.ac.uk/~vgg/data/pets/"]


def _again(folder):
    return f"remove {folder} and fetch it again with --download"


# --------------------------------------------------------------------------------------------------
# CIFAR-100's superclasses
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


def _entry(path, key):
    """The list ``key`` of a file of CIFAR-100, which torchvision reads but does not keep."""
    try:
        with open(path, "rb") as file:
            return list(_Unpickler(file, encoding="latin-1").load()[key])
    except Exception as error:  # of many kinds, on a file that is not a pickle
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: no {key} can be read ({reason}); {_again(path.parent)}") from None


# --------------------------------------------------------------------------------------------------
# Pets' lists
# --------------------------------------------------------------------------------------------------


def _read_pet_list(path, images):
    """[(file, breed 0.., species 0 or 1)] of a list. UserError names the line."""
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
            file = images / f"{fields[0]}.jpg"
            if not file.is_file():
                raise UserError(
                    f"{path}, line {number}: {file} is missing; {_again(images.parent)}"
                )
            rows.append((file, int(fields[1]) - 1, int(fields[2]) - 1))
    return rows
