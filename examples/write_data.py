"""Real data in the forms that own data have, from scikit-learn: pictures with a table, and a table.

  python examples/write_data.py DIR

writes DIR/photos/*.png with DIR/photos.csv (1,797 scanned digits: the digit, the number of its
loops, how much ink it has, known for two of three) and DIR/cancer.csv (569 tumours: a diagnosis, 30
measurements, and the set of each: every third row is for training, for validation, for the test).
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits

LOOPS = ("one", "none", "none", "none", "one", "none", "one", "none", "two", "one")


def write_table(path, names, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


def main():
    folder = Path(sys.argv[1])
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    rows = []
    digits = load_digits()
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"{number:04d}.png"
        picture = Image.fromarray(np.rint(scan * 255 / 16).astype(np.uint8))
        picture.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "photos" / name)
        ink = f"{scan.mean():.4f}" if number % 3 else ""
        rows.append((name, digit, LOOPS[digit], ink))
    write_table(folder / "photos.csv", ("file", "digit", "loops", "ink"), rows)
    cancer = load_breast_cancer()
    names = ("set", "diagnosis", *(name.replace(" ", "_") for name in cancer.feature_names))
    sets = np.resize(("train", "valid", "test"), len(cancer.target))
    rows = zip(sets, cancer.target_names[cancer.target], *cancer.data.T, strict=True)
    write_table(folder / "cancer.csv", names, rows)


if __name__ == "__main__":
    main()
