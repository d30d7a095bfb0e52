"""A small real data set in the layout of CUB-200-2011: 1,797 scanned digits with attributes.

The scans come with scikit-learn (8 x 8 pixels, 10 classes), so nothing is downloaded. Each has 22
attributes of three known roles. CUB has no known roles; here one can check whether a schedule
separates useful auxiliary tasks from useless ones.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from auxilearn.errors import UserError

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_PER_CLASS = 72

# Known from the class: the digits that have the attribute.
INFORMATIVE = {
    "has_loop::closed": {0, 6, 8, 9},
    "has_parity::even": {0, 2, 4, 6, 8},
    "has_stroke::straight": {1, 4, 5, 7},
    "has_value::above_four": {5, 6, 7, 8, 9},
    "has_divisor::three": {0, 3, 6, 9},
    "has_top::curved": {0, 2, 3, 8, 9},
    "has_bottom::curved": {0, 3, 5, 6, 8},
    "has_factors::prime": {2, 3, 5, 7},
}
# Measured on the scan (``measure``): true, but only loosely tied to the class.
IMAGE = (
    "has_ink::plenty",
    "has_slant::rightward",
    "has_width::broad",
    "has_weight::top_heavy",
    "has_balance::left_heavy",
    "has_line::solid",
)
# Coins: tied to nothing.
NOISE = (
    "has_paper::laid",
    "has_margin::ruled",
    "has_corner::folded",
    "has_pen::blue",
    "has_script::formal",
    "has_sheet::numbered",
    "has_seal::round",
    "has_clerk::junior",
)
DESCRIPTION = (
    "Scanned digits of scikit-learn. informative: known from the class; image: measured on the "
    "scan, above the median or not, loosely tied to the class; noise: coins, tied to nothing."
)


def write_digits(root, *, seed=0, image_size=32, progress=True):
    """Write the digits to ``root``, a folder that does not exist or is empty, in CUB's layout.

    ``seed`` decides the official split (72 training scans per class, the others for testing), the
    order of the attributes and the coins; the same seed writes the same files. The images are
    grey PNG of ``image_size`` x ``image_size`` pixels. ``attribute_roles.json`` gives each
    attribute's role. The folder is made aside and renamed: it is there complete or not at all.

    Raises ``UserError`` when ``root`` is not empty or can not be written, ``image_size`` is under
    8, ``seed`` is negative, or scikit-learn is not installed.
    """
    root = Path(root)
    if image_size < 8:
        raise UserError(f"image_size is {image_size}; expected 8 or more, the size of the scans")
    if seed < 0:
        raise UserError(f"seed is {seed}; expected 0 or more")
    if os.path.lexists(root) and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(f"{root} is not empty; give a new folder, or move this one away")
    scans, digits = _load_scans()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as aside:
            draft = Path(aside) / root.name
            _write(draft, scans, digits, seed, image_size, progress)
            if root.exists():
                root.rmdir()
            os.rename(draft, root)
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror}") from None


def _load_scans():
    """The scans, (N, 8, 8) in 0..16, and their digits, (N,); ordered by digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn, which is not installed; "
            "run pip install scikit-learn"
        ) from None
    data = load_digits()
    order = np.argsort(data.target, kind="stable")
    return data.images[order], data.target[order]


def measure(scans):
    """The image attributes of scans (N, 8, 8): (N, 6) bool, columns as in ``IMAGE``.

    Each is a moment of the ink's distribution over the pixels, compared with its median.
    """
    y, x = np.mgrid[0:8, 0:8]
    ink = scans.sum(axis=(1, 2))

    def mean(values):
        return (scans * values).sum(axis=(1, 2)) / ink

    centre_x, centre_y = mean(x), mean(y)
    from_x, from_y = x - centre_x[:, None, None], y - centre_y[:, None, None]
    figures = (
        ink,
        -mean(from_x * from_y) / mean(from_y**2),  # y points down: leaning right is negative
        mean(from_x**2),
        -centre_y,
        -centre_x,
        (scans == 16).sum(axis=(1, 2)) / (scans > 0).sum(axis=(1, 2)),
    )
    return np.stack([figure > np.median(figure) for figure in figures], axis=1)


def _draw_attributes(scans, digits, seed):
    """(names, roles, bits (N, 22) int): the three kinds in an order that the seed scrambles."""
    rng_order, rng_coins = (np.random.default_rng([seed, purpose]) for purpose in (1, 2))
    names = [*INFORMATIVE, *IMAGE, *NOISE]
    roles = ["informative"] * len(INFORMATIVE) + ["image"] * len(IMAGE) + ["noise"] * len(NOISE)
    known = np.stack([np.isin(digits, list(having)) for having in INFORMATIVE.values()], axis=1)
    chance = rng_coins.uniform(0.2, 0.8, size=len(NOISE))
    coins = rng_coins.random((len(digits), len(NOISE))) < chance
    bits = np.concatenate([known, measure(scans), coins], axis=1).astype(int)
    order = rng_order.permutation(len(names))
    return [names[i] for i in order], [roles[i] for i in order], bits[:, order]


def _draw_training_set(digits, seed):
    """(N,) bool: ``TRAIN_PER_CLASS`` scans of each digit."""
    rng = np.random.default_rng([seed, 0])
    is_train = np.zeros(len(digits), dtype=bool)
    for digit in range(len(CLASSES)):
        is_train[rng.permutation(np.flatnonzero(digits == digit))[:TRAIN_PER_CLASS]] = True
    return is_train


def _write(root, scans, digits, seed, image_size, progress):
    is_train = _draw_training_set(digits, seed)
    names, roles, bits = _draw_attributes(scans, digits, seed)
    (root / "attributes").mkdir(parents=True)
    folders = [f"{digit + 1:03d}.{name}" for digit, name in enumerate(CLASSES)]
    for folder in folders:
        (root / "images" / folder).mkdir(parents=True)
    paths, counts = [], [0] * len(CLASSES)
    for scan, digit in zip(
        tqdm(scans, "writing digits", unit="image", disable=not progress or None),
        digits,
        strict=True,
    ):
        counts[digit] += 1
        paths.append(f"{folders[digit]}/{CLASSES[digit]}_{counts[digit]:04d}.png")
        grey = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))
        large = grey.resize((image_size, image_size), Image.Resampling.BICUBIC)
        large.save(root / "images" / paths[-1])
    tables = {
        "images.txt": enumerate(paths, start=1),
        "image_class_labels.txt": enumerate((digits + 1).tolist(), start=1),
        "train_test_split.txt": enumerate(is_train.astype(int).tolist(), start=1),
        "classes.txt": enumerate(folders, start=1),
        "attributes.txt": enumerate(names, start=1),
        "attributes/image_attribute_labels.txt": (
            (image, attribute, bit, 4, "0.0")
            for image, row in enumerate(bits.tolist(), start=1)
            for attribute, bit in enumerate(row, start=1)
        ),
    }
    for name, rows in tables.items():
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (root / name).write_text(text, encoding="utf-8")
    content = {"description": DESCRIPTION, "roles": dict(zip(names, roles, strict=True))}
    (root / "attribute_roles.json").write_text(json.dumps(content, indent=1) + "\n")
