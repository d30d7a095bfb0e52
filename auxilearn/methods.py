"""The methods: what turns the matrix of losses into one scalar, and whether it is learned.

One training loop serves them all. A method is a row of ``METHODS``; the scheduler it builds is its
only code.
"""

from collections.abc import Callable
from typing import NamedTuple

from auxilearn.baselines.gradient_cosine import GradientCosine
from auxilearn.hypernet import (
    Identity,
    MonoJoint,
    MonoLinearHyperNet,
    MonoNonlinearHyperNet,
    Naive_hyper,
    StableJoint,
    Uncertainty,
)


class Problem(NamedTuple):
    """What a scheduler may need to know to be built."""

    tasks: int  # K, the target task included
    feature_dim: int  # d
    samples: int  # size of the training set
    hidden_sizes: list[int]  # of the monotone network
    factors: list[str]  # of JTDS's schedule, those that are learned
    target_share: str  # of joint_stable's schedule
    weighted_cosines: bool  # which of the two versions of gcs

    @classmethod
    def of(cls, config, samples):
        """The problem of a resolved ``Config`` with ``samples`` training samples."""
        return cls(
            config.task_num,
            config.in_dim,
            samples,
            config.aux_hidden_dim,
            config.factors,
            config.target_share,
            config.gcs == "weighted",
        )


UPPER, LOWER = "upper", "lower"


class Method(NamedTuple):
    """``build``: ``Problem`` -> scheduler. ``learned``: the level whose optimiser trains the
    scheduler, upper (by hypergradients on the development set) or lower (with the task model), or
    None. ``auxiliary``: uses the auxiliary tasks. ``fine_tuned``: training ends on the development
    set. ``defaults``: {setting of Config: value} where it takes another value than most methods."""

    title: str
    paper: str
    learned: str | None
    auxiliary: bool
    build: Callable[[Problem], object]
    fine_tuned: bool = False
    defaults: dict[str, object] = {}

    @property
    def bilevel(self):
        """Whether there is an upper level."""
        return self.learned == UPPER


METHODS = {
    "joint": Method(
        "JTDS: a weight per sample and task from features, losses and tasks",
        "Chen et al., ICML 2022",
        learned=UPPER,
        auxiliary=True,
        build=lambda p: MonoJoint(0, p.tasks, p.feature_dim, K=p.tasks, factors=p.factors),
    ),
    "joint_stable": Method(
        "JTDS with a schedule that cannot run away, then the target task on the development set",
        "this project, docs/stability.md",
        learned=UPPER,
        auxiliary=True,
        build=lambda p: StableJoint(
            0, p.tasks, p.feature_dim, factors=p.factors, target_share=p.target_share
        ),
        fine_tuned=True,
        defaults={
            "aux_lr": 0.03,
            "upper_optimizer": "adam",
            "warmup_epochs": 5,
            "hyperstep": 5,
            "solver": "identity",
            "precondition": "adam",
            "max_grad_norm": 0.0,
            "n_meta_train_loss_accum": 4,
            "hold_out_dev": False,
            "target_share": "learned",
        },
    ),
    "naive": Method(
        "N-JTDS: a free weight per training sample and task",
        "Chen et al., ICML 2022",
        learned=UPPER,
        auxiliary=True,
        build=lambda p: Naive_hyper(p.samples, p.tasks),
    ),
    "task": Method(
        "AuxiLearn: a monotone network of the losses",
        "Navon et al., ICLR 2021",
        learned=UPPER,
        auxiliary=True,
        build=lambda p: MonoNonlinearHyperNet(
            0, p.tasks, p.hidden_sizes, weight_normalization=False
        ),
    ),
    "linear": Method(
        "one learned, non-negative weight per task",
        "Navon et al., ICLR 2021",
        learned=UPPER,
        auxiliary=True,
        build=lambda p: MonoLinearHyperNet(0, p.tasks, weight_normalization=False),
    ),
    "common": Method(
        "all weights 1",
        "Caruana, Machine Learning 1997",
        learned=None,
        auxiliary=True,
        build=lambda p: Identity(0, p.tasks),
    ),
    "common_dev": Method(
        "all weights 1, then the target task alone on the development set",
        "Caruana, Machine Learning 1997",
        learned=None,
        auxiliary=True,
        build=lambda p: Identity(0, p.tasks),
        fine_tuned=True,
    ),
    "uncertainty": Method(
        "a weight per task from its learned noise",
        "Kendall et al., CVPR 2018",
        learned=LOWER,
        auxiliary=True,
        build=lambda p: Uncertainty(0, p.tasks),
    ),
    "gcs": Method(
        "a weight per task and step from its gradient's cosine with the target's",
        "Du et al., 2018",
        learned=None,
        auxiliary=True,
        build=lambda p: GradientCosine(0, p.tasks, weighted=p.weighted_cosines),
    ),
    "single": Method(
        "target task alone",
        "no auxiliary learning",
        learned=None,
        auxiliary=False,
        build=lambda p: Identity(0, p.tasks),
    ),
}
