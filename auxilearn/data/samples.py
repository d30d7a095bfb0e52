"""What a reader of a published data set hands on: plain arrays, nothing on disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class Samples:
    """A data set of N samples, as read.

    columns: {name: (N,) array}; classes are int64 codes from 0, numbers are float32.
    class_names: {column: what its codes mean}, for the columns that are classes.
    tasks: the columns to be predicted, the target first. The others are features.
    sets: (N,) "train", "valid" or "test".
    images: (N, H, W, 3) uint8, or the N files, or None where samples are rows of features.
    """

    columns: dict[str, np.ndarray]
    class_names: dict[str, list[str]]
    tasks: list[str]
    sets: np.ndarray
    images: np.ndarray | list[Path] | None = None


def halved(is_train, seed):
    """(N,) sets: the official training set; the rest, shuffled by ``seed``, halved.

    The test set has the odd sample.
    """
    sets = np.where(is_train, "train", "test")
    rest = np.random.default_rng(seed).permutation(np.flatnonzero(~is_train))
    sets[rest[: len(rest) // 2]] = "valid"
    return sets
