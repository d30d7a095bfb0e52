"""A tiny random folder of CUB-200-2011's shape, with the quirks of the published one."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_cub_shape(
    root,
    classes=5,
    train_per_class=4,
    test_per_class=4,
    attributes=7,
    image_size=(40, 32),
    seed=0,
    jpeg=True,
):
    """Write the folder and return its path. ``image_size`` is (width, height), give or take 25 %.

    The quirks: about every 50th row of image_attribute_labels.txt has extra fields, every seventh
    image is grey, the aspect ratios vary, training and test images of a class are mixed.
    ``attributes.txt`` lies inside, so that several such folders can share a parent.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    folders = [f"{number:03d}.Bird_{number}" for number in range(1, classes + 1)]
    (root / "attributes").mkdir(parents=True)
    images, labels, is_train = [], [], []
    for number, folder in enumerate(folders, start=1):
        (root / "images" / folder).mkdir(parents=True)
        for part in rng.permutation([1] * train_per_class + [0] * test_per_class):
            images.append(
                f"{folder}/Bird_{number}_{len(images) + 1:05d}.{'jpg' if jpeg else 'png'}"
            )
            labels.append(number)
            is_train.append(part)
            picture = _random_picture(rng, image_size, grey=len(images) % 7 == 3)
            picture.save(root / "images" / images[-1])
    present = rng.random((len(images), attributes)) < 0.3
    _write_rows(root / "images.txt", images)
    _write_rows(root / "image_class_labels.txt", labels)
    _write_rows(root / "train_test_split.txt", is_train)
    _write_rows(root / "classes.txt", folders)
    names = [f"has_part_{number // 3 + 1}::kind_{number % 3 + 1}" for number in range(attributes)]
    _write_rows(root / "attributes.txt", names)
    _write_attribute_labels(root / "attributes" / "image_attribute_labels.txt", present, rng)
    return root


def _random_picture(rng, size, grey):
    width, height = (max(1, round(side * rng.uniform(0.75, 1.25))) for side in size)
    shape = (height, width) if grey else (height, width, 3)
    return Image.fromarray(rng.integers(0, 256, size=shape, dtype=np.uint8))


def _write_rows(path, values):
    path.write_text("".join(f"{i} {value}\n" for i, value in enumerate(values, start=1)))


def _write_attribute_labels(path, present, rng):
    certainty = rng.integers(1, 5, size=present.shape)
    seconds = rng.exponential(5, size=present.shape).round(3)
    extra = rng.random(present.shape) < 0.02
    extra.flat[rng.integers(extra.size)] = True  # at least one, however small the folder is
    with path.open("w") as file:
        for i, row in enumerate(present.astype(int).tolist()):
            for a, bit in enumerate(row):
                tail = f"{certainty[i, a]} {seconds[i, a]}"
                if extra[i, a]:
                    tail = f"{certainty[i, a]} 0 {seconds[i, a]} 1.5"
                file.write(f"{i + 1} {a + 1} {bit} {tail}\n")
