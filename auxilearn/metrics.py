"""How well the target task is predicted: accuracy of classes, RMSE of a real number."""

import math
from statistics import median


class Metric:
    """A measure of predictions of the target task.

    name: in files; words: for a person. sign: 1 if a higher value is better, else -1; best: the
    word for a column's best mean. Tables show values times ``factor``, in the ``unit``; axis and
    differences are the labels of charts and tests, csv is the number format of CSV files.
    """

    def better(self, value, other):
        return self.sign * value > self.sign * other


class Accuracy(Metric):
    """The share of samples whose class is predicted."""

    name = words = "accuracy"
    sign, best = 1, "highest"
    factor, csv, unit = 100, "%.6f", "in per cent"
    axis, differences = "accuracy (%)", "points"

    def points(self, outputs, labels):
        """(B,) what each sample adds, of target outputs (B, C) and labels (B, K)."""
        return outputs.argmax(dim=1) == labels[:, 0]

    def value(self, points, samples):
        """The metric of so many samples whose points sum to ``points``."""
        return points / samples

    def text(self, value):
        return f"{value:.4f}"

    def short(self, value):
        """As a sentence gives it."""
        return f"{value:.1%}"

    def decimals(self, values):
        """How many a table of ``values`` shows."""
        return 1


class RMSE(Metric):
    """The root of the mean squared error of a real number, in the label's own unit.

    Args: ``std``, by which the labels of batches are divided.
    """

    name, words = "rmse", "RMSE"
    sign, best = -1, "lowest"
    factor, csv, unit = 1, "%.9g", "in the target's own unit"
    axis, differences = "RMSE (lower is better)", "RMSE (negative is better)"

    def __init__(self, std=1.0):
        self.std = std

    def points(self, outputs, labels):
        return (outputs[:, 0] - labels[:, 0]).square()

    def value(self, points, samples):
        return self.std * math.sqrt(points / samples)  # math.sqrt(nan) is nan

    def text(self, value):
        return f"{value:.6g}"

    def short(self, value):
        return f"{value:.4g}"

    def decimals(self, values):
        """So many that the median has three significant digits."""
        middle = median(values) if len(values) else 0
        return max(0, 2 - math.floor(math.log10(middle))) if middle > 0 else 1


ACCURACY = Accuracy()


def metric_of(task):
    """The metric of a target ``Task``, whose ``std`` is what its labels are divided by."""
    return ACCURACY if task.classes else RMSE(task.std)
