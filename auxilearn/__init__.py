"""Joint task and data scheduling for auxiliary learning (JTDS; Chen et al., ICML 2022).

from auxilearn import Bilevel, MonoJoint, TaskLosses
"""

import importlib

__version__ = "1.0.0"

_HOMES = {
    "Bilevel": "bilevel",
    "HyperNet": "hypernet",
    "MonoJoint": "hypernet",
    "Naive_hyper": "hypernet",
    "StableJoint": "stable",
    "TaskLosses": "losses",
    "adam_scale": "optim",
    "conjugate_gradient": "solvers",
    "exact": "solvers",
    "fill_missing": "losses",
    "fit_stable": "stable",
    "identity": "implicit_diff",
    "neumann": "implicit_diff",
    "preconditioned": "implicit_diff",
    "register": "methods",
    "schedule_weights": "weights",
    "scheduled_loss": "hypernet",
}
__all__ = [*_HOMES]


def __getattr__(name):
    # On first use: importing the package alone loads neither PyTorch nor anything else.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"auxilearn.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
