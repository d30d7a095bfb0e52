"""The upper-level step: hypergradient, clip, optimiser."""

from collections.abc import Iterable

import torch
from torch import Tensor

from auxilearn.implicit_diff import Hypergrad


def apply_hypergradient(meta_optimizer, aux_params, hypergrads, max_grad_norm):
    """Clip ``hypergrads`` to ``max_grad_norm`` (None or 0: no clip), in place, and take a step."""
    for parameter, gradient in zip(aux_params, hypergrads, strict=True):
        parameter.grad = gradient
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(aux_params, max_grad_norm)
    meta_optimizer.step()


def held(optimizer):
    """The parameters of all groups of an optimiser, a list."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def upper_adam(parameters, lr, weight_decay):
    """The upper level's Adam. Each parameter moves by about ``lr`` per step, whatever the size of
    the hypergradient."""
    # Upper steps are few: the usual second beta of 0.999 remembers a thousand of them. AdamW: a
    # decay inside Adam would move what has no hypergradient by full steps.
    return torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )


def adam_scale(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> list[Tensor]:
    """What Adam divides the gradient of each of ``parameters`` by: sqrt(second moment) + eps.

    The bias-corrected moment of the last step (Kingma and Ba, 2015, Algorithm 1; with amsgrad the
    largest so far); ones for a parameter that has not been stepped. For
    ``implicit_diff.preconditioned``. Raises ValueError: the optimiser does not hold a parameter.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    scales = []
    for parameter in parameters:
        if parameter not in groups:
            raise ValueError("adam_scale: give parameters that the optimiser holds, no others")
        state, group = optimizer.state.get(parameter), groups[parameter]
        if not state:
            scales.append(torch.ones_like(parameter))
            continue
        # The step may be counted on the device, where it stays.
        steps = torch.as_tensor(state["step"], dtype=torch.float64)
        correction = 1 - group["betas"][1] ** steps
        moment = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        scales.append((moment / correction).sqrt() + group["eps"])
    return scales


class MetaOptimizer:
    """Upper-level optimiser on graphs that the caller has built (double backward).

    Args:
        meta_optimizer: a torch optimiser over the scheduler's parameters.
        hpo_lr: alpha of the Neumann series, by custom the lower level's learning rate.
        truncate_iter: J, the number of Hessian-vector products.
        max_grad_norm: the hypergradient is clipped to this norm.
    """

    def __init__(self, meta_optimizer, hpo_lr, truncate_iter=3, max_grad_norm=10):
        self.meta_optimizer = meta_optimizer
        self.hypergrad = Hypergrad(learning_rate=hpo_lr, truncate_iter=truncate_iter)
        self.max_grad_norm = max_grad_norm

    def step(self, train_loss, val_loss, parameters, aux_params, return_grads=False):
        """One step of the scheduler. With ``return_grads``, the clipped hypergradient as a list.

        Args:
            train_loss: scheduled training loss, with a graph to both sets of parameters.
            val_loss: target-task loss on the development batch.
            parameters: theta; ``aux_params``: phi. Lists or generators.
        """
        aux_params = list(aux_params)
        hypergrads = self.hypergrad.grad(
            loss_val=val_loss, loss_train=train_loss, aux_params=aux_params, params=parameters
        )
        apply_hypergradient(self.meta_optimizer, aux_params, hypergrads, self.max_grad_norm)
        return hypergrads if return_grads else None

    def zero_grad(self):
        self.meta_optimizer.zero_grad()
