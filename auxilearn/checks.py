"""What can be wrong with the arguments of ``Bilevel``, one line each."""

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from auxilearn.hypernet import HyperNet
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.optim import held

_MAKERS = (neumann, identity, preconditioned)  # of solvers, but none themselves


def check_kinds(model, scheduler, lower, upper, solver):
    """Errors as of ``Bilevel``."""
    expected = {
        "model": (model, nn.Module),
        "scheduler": (scheduler, HyperNet),
        "lower": (lower, torch.optim.Optimizer),
        "upper": (upper, (torch.optim.Optimizer, type(None))),
    }
    for name, (value, kind) in expected.items():
        if not isinstance(value, kind):
            kind = kind if isinstance(kind, type) else kind[0]
            what = value.__name__ if isinstance(value, type) else type(value).__name__
            raise TypeError(f"{name} must be an instance of {kind.__name__}, not {what}")
    for name, optimizer in (("lower", lower), ("upper", upper)):
        if optimizer is None:
            continue
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise TypeError(
                f"{name}: {type(optimizer).__name__} evaluates its loss by itself (a closure): use "
                "an optimiser whose step() takes the gradients that are there"
            )
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(f"{name} maximises (maximize=True), but both levels minimise")
    own = set(map(id, scheduler.parameters()))
    if own.issuperset(map(id, held(lower))):
        raise ValueError(
            "lower holds parameters of the scheduler alone, not the task model's: the order is "
            "Bilevel(model, scheduler, lower, upper)"
        )
    if solver is not None and (not callable(solver) or solver in _MAKERS):
        raise TypeError(
            "solver must be what a function like neumann makes, not its name and not the function: "
            f"solver=neumann(alpha=0.1), not {getattr(solver, '__name__', repr(solver))}"
        )


def check_batches(name, batches):
    """Errors of what should be a list of batches. One batch is often a sequence itself."""
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{name} must be a list of batches, not {type(batches).__name__}, which can be read "
            "once and may have no end: give [next(batches)], or list(batches)"
        )
    tensors = isinstance(batches, (list, tuple)) and all(isinstance(b, Tensor) for b in batches)
    kinds = {(b.dtype, b.dim()) for b in batches} if tensors else ()
    if batches is None or isinstance(batches, (DataLoader, Dataset)):
        raise TypeError(
            f"{name} must be a list of batches, not {type(batches).__name__}: give "
            "[next(iter(loader))], or several"
        )
    if (
        not isinstance(batches, Sequence)
        or isinstance(batches, str)
        or hasattr(batches, "_fields")
        or len(kinds) > 1
        or (kinds and isinstance(batches, tuple))
    ):
        raise TypeError(
            f"{name} must be a list of batches, not one batch ({type(batches).__name__}): "
            "give [batch]"
        )
    if not batches:
        raise ValueError(f"{name} is empty: an upper step needs training and development batches")
