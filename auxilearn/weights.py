"""From a model, a scheduler and data to the schedule: the weight of every sample under every task.

    from auxilearn import schedule_weights

    table = schedule_weights(model, scheduler, batches)
    table.weights  # (n, K)

The weight of sample i under task k is what the scheduled loss S makes of the sample's loss,

    W_ik = N_k dS/d(a_k L_ik),  N_k samples with a loss under task k: the batch size without a mask,
                                a_k is 1 for the target and aux_weight for auxiliary tasks.

For JTDS and N-JTDS, whose schedule is a constant to the task model, this is the W of the formula.
For the combiners of losses (linear, monotone network) it is the weight with which the sample's
gradient enters the training step: one number per task for the linear one, a function of all losses
of the sample for the network.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from auxilearn.hypernet import HyperNet, JointSchedule, loss_of_schedule
from auxilearn.losses import TaskLosses, check_outputs, task_losses, times_aux_weight


@dataclass(frozen=True)
class ScheduleTable:
    """The schedule of n samples under K tasks. NaN wherever a mask says that there is no loss.

    weights (n, K), raw losses (n, K), sample_id (n,) places in the training set, prediction (n,) or
    (n, K) or None; factors of the schedule where it has some: feature (n, K), loss (n, K), task
    (K,).
    """

    weights: np.ndarray
    losses: np.ndarray
    sample_id: np.ndarray
    prediction: np.ndarray | None = None
    factors: dict[str, np.ndarray] = field(default_factory=dict)


def schedule_weights(
    model: torch.nn.Module,
    scheduler: HyperNet,
    batches: Iterable[Any],
    predict: Callable[[Any, TaskLosses], Any] | None = None,
    aux_weight: float = 1.0,
) -> ScheduleTable:
    """The ``ScheduleTable`` of all samples in ``batches``, after one pass in evaluation mode.

    Args:
        model: nn.Module; ``model(batch)`` returns ``TaskLosses``, as for ``Bilevel``.
        scheduler: a ``HyperNet``.
        batches: iterable of what the model takes, in any order, each sample once.
        predict: optional; ``predict(batch, task_losses)`` gives the predicted classes (B,), or
            what is predicted under every task (B, K).
        aux_weight: as for ``Bilevel``. Schedules do not depend on it, networks of the losses do.

    The schedule is computed for all samples at once, so that losses are standardised over the data
    set and the weights do not depend on how it was batched. Held in memory: n (3 K + d) numbers.
    Both modules are left in the mode they were in, and no gradient is left behind.
    """
    modes = [(module, module.training) for module in (*model.modules(), *scheduler.modules())]
    model.eval()
    scheduler.eval()
    try:
        with torch.no_grad():
            outputs, predictions = _evaluate(model, batches, predict)
        return _table(scheduler, outputs, predictions, aux_weight)
    finally:
        for module, training in modes:
            module.training = training


def _evaluate(model, batches, predict):
    """``TaskLosses`` of all batches in one, and all predictions or None."""
    parts, predictions = [], []
    for batch in batches:
        outputs = task_losses(model(batch))
        parts.append(outputs)
        if predict is not None:
            predictions.append(torch.as_tensor(predict(batch, outputs)))
    if not parts:
        raise ValueError("batches is empty: there is no sample to weigh")
    columns = zip(*parts, strict=True)
    joined = TaskLosses(*(None if c[0] is None else torch.cat(c) for c in columns))
    return joined, torch.cat(predictions).cpu().numpy() if predictions else None


def _table(scheduler, outputs, prediction, aux_weight):
    absent = None if outputs.mask is None else ~outputs.mask
    sample_id = outputs.sample_id
    if sample_id is None:
        sample_id = torch.arange(len(outputs.losses))
    weights = _array(sample_weights(scheduler, outputs, aux_weight), absent)
    factors = {}
    if isinstance(scheduler, JointSchedule) and hasattr(scheduler, "factors"):
        with torch.no_grad():
            values = scheduler.factors(outputs.features, outputs.losses, outputs.mask)
        factors = {
            name: _array(value, absent if value.dim() == 2 else None)
            for name, value in zip(("feature", "loss", "task"), values, strict=True)
        }
    return ScheduleTable(
        weights=weights,
        losses=_array(outputs.losses, absent),
        sample_id=sample_id.cpu().numpy(),
        prediction=prediction,
        factors=factors,
    )


def sample_weights(scheduler, outputs, aux_weight=1.0):
    """The weights W (B, K) of ``TaskLosses`` taken as one batch; 0 outside the mask."""
    check_outputs(outputs, scheduler)
    losses = outputs.losses.detach().clone()
    losses = times_aux_weight(losses, aux_weight, scheduler.main_task).requires_grad_()
    loss = loss_of_schedule(scheduler, losses, outputs)
    (slope,) = torch.autograd.grad(loss, [losses], allow_unused=True, materialize_grads=True)
    return slope * samples_with_loss(outputs)


def samples_with_loss(outputs):
    """N_k: how many samples of ``TaskLosses`` have a loss under task k; (K,), or a number."""
    return len(outputs.losses) if outputs.mask is None else outputs.mask.sum(dim=0)


def _array(values, absent):
    values = values.detach() if absent is None else values.detach().masked_fill(absent, torch.nan)
    return values.float().cpu().numpy()
