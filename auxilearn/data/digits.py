"""A small real data set in the layout of CUB-200-2011: 1,797 scanned digits with attributes.

The scans come with scikit-learn (8 x 8 pixels, 10 classes), so nothing is downloaded. Each has 22
attributes of three known roles. CUB has no known roles; here one can check whether a schedule
separates useful auxiliary tasks from useless ones.
"""

import json

import numpy as np
from PIL import Image
from tqdm import tqdm

from auxilearn.errors import UserError
from auxilearn.files import new_folder

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_PER_CLASS = 72
SEED, IMAGE_SIZE = 0, 32

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


def write_digits(root):
    """Write the digits to ``root``, a folder that does not exist or is empty, in CUB's layout.

    Every call writes the same files. The official split has 72 training scans per class; the others
    are for testing. The images are grey PNG of 32 x 32 pixels. ``attribute_roles.json`` gives each
    attribute's role.

    Raises ``UserError`` as ``new_folder`` does, and when scikit-learn is not installed.
    """
    with new_folder(root) as draft:
        _write(draft, *_load_scans())


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


def _draw_attributes(scans, digits):
    """(names, roles, bits (N, 22) int): the three kinds in a scrambled order."""
    rng_order, rng_coins = (np.random.default_rng([SEED, purpose]) for purpose in (1, 2))
    names = [*INFORMATIVE, *IMAGE, *NOISE]
    roles = ["informative"] * len(INFORMATIVE) + ["image"] * len(IMAGE) + ["noise"] * len(NOISE)
    known = np.stack([np.isin(digits, list(having)) for having in INFORMATIVE.values()], axis=1)
    chance = rng_coins.uniform(0.2, 0.8, size=len(NOISE))
    coins = rng_coins.random((len(digits), len(NOISE))) < chance
    bits = np.concatenate([known, measure(scans), coins], axis=1).astype(int)
    order = rng_order.permutation(len(names))
    return [names[i] for i in order], [roles[i] for i in order], bits[:, order]


def _draw_training_set(digits):
    """(N,) bool: ``TRAIN_PER_CLASS`` scans of each digit."""
    rng = np.random.default_rng([SEED, 0])
    is_train = np.zeros(len(digits), dtype=bool)
    for digit in range(len(CLASSES)):
        is_train[rng.permutation(np.flatnonzero(digits == digit))[:TRAIN_PER_CLASS]] = True
    return is_train


def _write(root, scans, digits):
    is_train = _draw_training_set(digits)
    names, roles, bits = _draw_attributes(scans, digits)
    (root / "attributes").mkdir()
    folders = [f"{digit + 1:03d}.{name}" for digit, name in enumerate(CLASSES)]
    for folder in folders:
        (root / "images" / folder).mkdir(parents=True)
    paths, counts = [], [0] * len(CLASSES)
    shown = tqdm(scans, "writing digits", unit="image", disable=None)
    for scan, digit in zip(shown, digits, strict=True):
        counts[digit] += 1
        paths.append(f"{folders[digit]}/{CLASSES[digit]}_{counts[digit]:04d}.png")
        grey = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))
        large = grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
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
