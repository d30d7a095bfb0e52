"""How well the target task is predicted: accuracy of classes, RMSE of a real number."""

import math


class Accuracy:
    """The share of samples whose class is predicted."""

    name = words = "accuracy"

    def points(self, outputs, labels):
        """(B,) what each sample adds, of target outputs (B, C) and labels (B, K)."""
        return outputs.argmax(dim=1) == labels[:, 0]

    def value(self, points, samples):
        """The metric of so many samples whose points sum to ``points``."""
        return points / samples

    def better(self, value, other):
        return value > other

    def text(self, value):
        return f"{value:.4f}"

    def short(self, value):
        """As a sentence gives it."""
        return f"{value:.1%}"


class RMSE:
    """The root of the mean squared error of a real number, in the label's own unit.

    Args: ``std``, by which the labels of batches are divided.
    """

    name, words = "rmse", "RMSE"

    def __init__(self, std):
        self.std = std

    def points(self, outputs, labels):
        return (outputs[:, 0] - labels[:, 0]).square()

    def value(self, points, samples):
        return self.std * math.sqrt(points / samples)  # math.sqrt(nan) is nan

    def better(self, value, other):
        return value < other

    def text(self, value):
        return f"{value:.6g}"

    def short(self, value):
        return f"{value:.4g}"


def metric_of(task):
    """The metric of a target ``Task``, whose ``std`` is what its labels are divided by."""
    return Accuracy() if task.classes else RMSE(task.std)
