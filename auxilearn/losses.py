"""What a task model makes of a batch: the matrix of its losses, and what can be wrong with it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class TaskLosses(NamedTuple):
    """What a task model makes of a batch: ``model(batch)`` returns it.

    losses (B, K) raw; features (B, d); sample_id (B,) places in the training set, for schedulers
    that hold a weight per sample; mask (B, K) bool, True where a loss exists, None for everywhere;
    labels (B, K). Entries that the scheduler does not need may be None.

    Losses outside the mask count for nothing. They must still be computed from finite numbers, or
    the model's gradient is NaN (0 times NaN): ``fill_missing`` puts these in place of missing
    targets.
    """

    losses: Tensor
    features: Tensor | None = None
    sample_id: Tensor | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None

    def detached(self) -> "TaskLosses":
        """The same numbers, without a graph."""
        return TaskLosses(*(None if entry is None else entry.detach() for entry in self))


def fill_missing(targets: Tensor) -> tuple[Tensor, Tensor]:
    """(``targets`` with zeros where they are missing, the mask: bool, True where they are not).

        targets, mask = fill_missing(targets)
        return TaskLosses((prediction - targets).square(), features, mask=mask)

    Missing are NaN among numbers, and negative ones (such as -1 and -100) among classes, of an
    integer dtype.
    """
    targets = torch.as_tensor(targets)
    mask = ~targets.isnan() if targets.is_floating_point() else targets >= 0
    return targets.masked_fill(~mask, 0), mask


def times_aux_weight(losses: Tensor, aux_weight: float, main_task: int = 0) -> Tensor:
    """a_k L_ik (B, K)."""
    if aux_weight == 1:
        return losses
    factors = losses.new_full((losses.shape[1],), aux_weight)
    factors[main_task] = 1.0
    return losses * factors


def masked_column_means(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of every column of ``values`` (B, K) over the entries where ``mask`` holds, shape (K,).

    A column without any such entry has mean 0. Entries outside the mask are never read: they may
    be NaN.
    """
    if mask is None:
        return values.mean(dim=0)
    count = mask.sum(dim=0).clamp(min=1)
    return values.masked_fill(~mask, 0.0).sum(dim=0) / count


def task_losses(outputs) -> TaskLosses:
    """What a model returned. Raises TypeError: it is something else than ``TaskLosses``."""
    if not isinstance(outputs, TaskLosses):
        raise TypeError(
            f"model(batch) must return TaskLosses, not {type(outputs).__name__}: return "
            "TaskLosses(losses, features)"
        )
    for name, entry in outputs._asdict().items():
        if not isinstance(entry, Tensor) and (entry is not None or name == "losses"):
            raise TypeError(f"{name} of TaskLosses must be a tensor, not {type(entry).__name__}")
    return outputs


def check_outputs(outputs, scheduler):
    """Errors as of ``hypernet.scheduled_loss``."""
    losses, features, sample_id, mask, labels = task_losses(outputs)
    tasks = scheduler.input_dim
    if losses.dim() != 2 or losses.shape[1] != tasks:
        raise ValueError(
            f"losses must be (B, {tasks}), a column per task of the scheduler, not "
            f"{tuple(losses.shape)}: leave them unreduced"
        )
    if not losses.is_floating_point():
        raise ValueError(f"losses must be real numbers, not {losses.dtype}")
    rows = len(losses)
    if not rows:
        raise ValueError(
            f"losses must have a row per sample, not shape {tuple(losses.shape)}: the batch is "
            "empty; leave it out"
        )
    if features is not None and (features.dim() != 2 or len(features) != rows):
        raise ValueError(
            f"features must be ({rows}, d), a vector per sample, not {tuple(features.shape)}: "
            "pool or flatten the rest"
        )
    if sample_id is not None and sample_id.shape != (rows,):
        raise ValueError(
            f"sample_id must be ({rows},), a number per sample, not {tuple(sample_id.shape)}"
        )
    if mask is not None and (mask.shape != losses.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool {tuple(losses.shape)} like losses, not {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    if labels is not None and labels.shape != losses.shape:
        raise ValueError(
            f"labels must be {tuple(losses.shape)} like losses, not {tuple(labels.shape)}"
        )
    # On a GPU looking would wait for it: ``Bilevel`` looks there once a gradient is not finite.
    if mask is not None and losses.is_cpu and losses.grad_fn is not None:
        finite = losses.detach().isfinite()
        if not finite.all().numpy() and (finite | ~mask).all().numpy():
            _refuse_poisoned_gradients(losses)


def check_features(scheduler, features):
    """Raises ValueError: a schedule of features got none, or not those of its ``feature_sel``."""
    name = type(scheduler).__name__
    if features is None:
        raise ValueError(f"{name} needs TaskLosses(losses, features=...)")
    layer = getattr(scheduler, "feature_sel", None)
    if not isinstance(layer, nn.Linear):
        return
    weight, width = layer.weight, layer.in_features
    if features.shape[1] != width:
        raise ValueError(
            f"features must be (B, {width}), the feature_dim of {name}, not {tuple(features.shape)}"
        )
    if features.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise ValueError(
            f"features are {features.dtype} and the parameters of {name} {weight.dtype}: "
            "convert the one, as in features.float(), or the other, as in scheduler.double()"
        )


def check_sample_id(scheduler, sample_id):
    """Raises ValueError: a schedule with weights per sample got no places, or no integers."""
    if sample_id is None:
        raise ValueError(f"{type(scheduler).__name__} needs TaskLosses(losses, sample_id=...)")
    if sample_id.is_floating_point():
        raise ValueError(
            f"sample_id must be integers, places in the training set, not {sample_id.dtype}"
        )


POISONED = (
    "a masked loss makes the model's gradient NaN: it was computed from a missing target, or "
    "another number that is not finite, and 0 times NaN is NaN; fill these before the loss: "
    "targets, mask = auxilearn.fill_missing(targets)"
)


def finite_inside_mask(outputs):
    """Whether there is a mask, and all losses inside it are finite. Reads from the device."""
    mask = outputs.mask
    return mask is not None and (outputs.losses.isfinite() | ~mask).all().item()


def _refuse_poisoned_gradients(losses):
    """ValueError: the gradient of masked losses is NaN. NaN in place of them does no harm."""
    leaves, seen, waiting = [], set(), [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(function for function, _ in node.next_functions)
    zeros = torch.zeros_like(losses)
    gradients = torch.autograd.grad(losses, leaves, zeros, retain_graph=True, allow_unused=True)
    if any(g is not None and not g.isfinite().all() for g in gradients):
        raise ValueError(POISONED)
