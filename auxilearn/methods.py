"""The methods: what turns the matrix of losses into one scalar, and whether it is learned.

One training loop serves them all. A method is a row of ``METHODS``; the scheduler it builds is its
only code.
"""

from collections.abc import Callable
from typing import NamedTuple

from auxilearn.hypernet import (
    Identity,
    MonoJoint,
    MonoLinearHyperNet,
    MonoNonlinearHyperNet,
    Naive_hyper,
)


class Problem(NamedTuple):
    """What a scheduler may need to know to be built."""

    tasks: int  # K, the target task included
    feature_dim: int  # d
    samples: int  # size of the training set
    hidden_sizes: list[int]  # of the monotone network


class Method(NamedTuple):
    """``bilevel``: has an upper level, which trains on the development set. ``auxiliary``: uses the
    auxiliary tasks. ``build``: ``Problem`` -> scheduler."""

    title: str
    paper: str
    bilevel: bool
    auxiliary: bool
    build: Callable[[Problem], object]


METHODS = {
    "joint": Method(
        "JTDS: a weight per sample and task from features, losses and tasks",
        "Chen et al., ICML 2022",
        bilevel=True,
        auxiliary=True,
        build=lambda p: MonoJoint(0, p.tasks, p.feature_dim, K=p.tasks),
    ),
    "naive": Method(
        "N-JTDS: a free weight per training sample and task",
        "Chen et al., ICML 2022",
        bilevel=True,
        auxiliary=True,
        build=lambda p: Naive_hyper(p.samples, p.tasks),
    ),
    "task": Method(
        "AuxiLearn: a monotone network of the losses",
        "Navon et al., ICLR 2021",
        bilevel=True,
        auxiliary=True,
        build=lambda p: MonoNonlinearHyperNet(
            0, p.tasks, p.hidden_sizes, weight_normalization=False
        ),
    ),
    "linear": Method(
        "one learned, non-negative weight per task",
        "Navon et al., ICLR 2021",
        bilevel=True,
        auxiliary=True,
        build=lambda p: MonoLinearHyperNet(0, p.tasks, weight_normalization=False),
    ),
    "common": Method(
        "all weights 1",
        "Caruana, Machine Learning 1997",
        bilevel=False,
        auxiliary=True,
        build=lambda p: Identity(0, p.tasks),
    ),
    "single": Method(
        "target task alone",
        "no auxiliary learning",
        bilevel=False,
        auxiliary=False,
        build=lambda p: Identity(0, p.tasks),
    ),
}
