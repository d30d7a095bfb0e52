"""The data contract: what training knows of a data set, whatever it was read from.

A ``Split`` has tasks with the target first, labels of which any may be missing, the sets, and a
source of inputs: image files, or rows of columns.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Task:
    """What a column of labels means.

    classes: their number C, or None for a real number. class_names: C names; () of a real number,
    which is trained as (label - mean) / std. A split as it is loaded has mean 0 and std 1:
    ``dataset.fitted`` takes them from the labels that a run may see.
    """

    name: str
    classes: int | None
    class_names: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def kind(self):
        """In words."""
        return f"{self.classes} classes" if self.classes else "a number"


class RowsShape(NamedTuple):
    """What a backbone for rows must know: it is called with (numbers (B, n), codes (B, c)).

    numbers: n. categories: how many codes each of the c categorical columns has, the code 0 of
    missing and unseen values included.
    """

    numbers: int
    categories: list[int]


class Rows(NamedTuple):
    """Inputs that are columns. numbers (N, n) float32: standardised on the training rows, 0 where
    missing. codes (N, c) int64: from 1, and 0 where missing or not among the training rows.
    features: how they come from a table, in its order: {name, mean, std} of a number, and {name,
    values} of categories, whose first value has the code 1."""

    numbers: np.ndarray
    codes: np.ndarray
    shape: RowsShape
    features: list[dict]


@dataclass(frozen=True, eq=False)
class Split:
    """A preprocessed data set of N samples and K tasks.

    ``indices`` has the sets full_train, dev, rest_train (full_train without dev), valid and test.
    The inputs are images (``paths``) or ``rows``; the other one is None.
    """

    tasks: list[Task]  # K, the target first
    labels: np.ndarray  # (N, K) int64, or float64 where a task is a real number; 0 where missing
    mask: np.ndarray | None  # (N, K) bool, True where there is a label; None: everywhere
    indices: dict[str, np.ndarray]  # name of the set -> int64 positions
    ids: list[str]  # N, what tables call a sample
    data_root: Path
    info: dict  # the content of split_info.json
    fingerprint: str  # hex; covers all labels, sets and inputs
    paths: list[str] | None = None  # N, relative to image_folder
    image_folder: Path | None = None
    rows: Rows | None = None
    roles: dict[str, str] | None = None  # name of an auxiliary task -> a word such as noise

    @property
    def target(self):
        return self.tasks[0]

    @property
    def has_target(self):
        """(N,) bool: whether there is a target label."""
        return np.ones(len(self.labels), bool) if self.mask is None else self.mask[:, 0]

    @property
    def preprocessed_targets(self):
        """(N,) target labels before anybody edited image_dictionary.json.

        The present ones if samples were added or removed since.
        """
        recorded = np.array(self.info.get("labels", []), dtype=np.int64)
        return recorded if len(recorded) == len(self.labels) else self.labels[:, 0]

    def image_path(self, i):
        """The file of the i-th image."""
        return self.image_folder / self.paths[i]


def scale_of(values):
    """(mean, std) that standardise ``values`` (n,): std 1 of a constant, (0, 1) of none at all."""
    if not len(values):
        return 0.0, 1.0
    # Of a constant the computed std may be its rounding error, not 0.
    return float(values.mean()), float(values.std()) if np.ptp(values) > 0 else 1.0
