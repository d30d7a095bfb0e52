"""What can be wrong with the arguments of ``Bilevel``, one line each."""

import inspect
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from auxilearn.errors import Unsupported
from auxilearn.hypernet import HyperNet
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.losses import POISONED, finite_inside_mask, masked_column_means
from auxilearn.optim import held
from auxilearn.second_order.double_backward import gradients
from auxilearn.second_order.evaluation import ModelFunction
from auxilearn.vectors import norm

_MAKERS = (neumann, identity, preconditioned)  # of solvers, but none themselves


def check_kinds(model, scheduler, lower, upper, solver):
    """Errors as of ``Bilevel``."""
    optimizers = {"lower": lower} | ({} if upper is None else {"upper": upper})
    expected = {"model": (model, nn.Module), "scheduler": (scheduler, HyperNet)}
    expected |= {name: (o, torch.optim.Optimizer) for name, o in optimizers.items()}
    for name, (value, kind) in expected.items():
        if not isinstance(value, kind):
            given = value if isinstance(value, type) else type(value)  # a class, or an instance
            raise TypeError(f"{name} must be an instance of {kind.__name__}, not {given.__name__}")
    for name, optimizer in optimizers.items():
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


def check_dev_batches(scheduler, dev_batches):
    """Errors of the development batches of a lower step, for a scheduler that needs them."""
    if dev_batches is None or (isinstance(dev_batches, Sequence) and not dev_batches):
        raise ValueError(
            f"{type(scheduler).__name__} needs development batches before every lower step: "
            "lower_step(batch, dev_batches)"
        )
    check_batches("dev_batches", dev_batches)


def check_theta(parameters):
    """Error of a lower level that learns nothing."""
    if not parameters:
        raise ValueError(
            "nothing to train: all parameters that the lower optimiser holds are frozen "
            "(requires_grad is False)"
        )


def check_real(parameters):
    """Error of parameters that an upper step cannot differentiate by."""
    if any(p.is_complex() for p in parameters):
        raise Unsupported(
            "the lower level has complex parameters: hold them as real ones and use "
            "torch.view_as_complex() in forward()"
        )


def check_graph(losses):
    """Error of losses that reach no parameter at all."""
    if not losses.requires_grad:
        raise ValueError(
            "no gradient reaches the parameters of the lower optimiser: the losses have no "
            "graph; compute them outside torch.no_grad(), from tensors that are not detached"
        )


def check_reached(gradients):
    """Error of losses that reach none of the lower optimiser's parameters."""
    if not gradients:
        raise ValueError(
            "no gradient reaches the parameters of the lower optimiser: the losses depend on "
            "others; give it those of the model that is trained"
        )


def check_upper(upper, phi):
    """Errors of an upper optimiser that has nothing to step."""
    if upper is None:
        raise ValueError("Bilevel was built without an upper optimiser: give one as upper=")
    if not phi:
        raise ValueError(
            "the upper optimiser holds no parameter of the scheduler that requires a gradient: "
            "build it on scheduler.parameters()"
        )


def refuse_poisoned_step(outputs):
    """ValueError where a masked loss is why a lower step's gradient is not finite."""
    if finite_inside_mask(outputs):
        raise ValueError(POISONED)


def refuse_poisoned_hypergradient(model, theta, batches):
    """ValueError where a masked loss is why a hypergradient is not finite."""
    with ModelFunction(model, theta) as function:
        for batch in batches:
            with function.evaluated(batch) as outputs:
                if finite_inside_mask(outputs):
                    loss = masked_column_means(outputs.losses, outputs.mask).sum()
                    if not math.isfinite(norm(gradients(loss, function.theta)).item()):
                        raise ValueError(POISONED)


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
