"""Steps of both levels' optimisers, and what an optimiser's step makes of a gradient."""

import math
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


def step_if_finite(optimizer, gradient_norm):
    """The optimiser's step, unless the norm of its gradient (a scalar tensor) is not finite.

    Returns whether the step was taken. None: a fused optimiser decides that on the GPU, and to read
    its decision would wait for the device.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        finite = math.isfinite(gradient_norm)
        if finite:
            optimizer.step()
        return finite
    skipped = ~torch.isfinite(gradient_norm)
    new = [p for p in held(optimizer) if not optimizer.state.get(p)]
    optimizer.found_inf = skipped.float()  # fused kernels change nothing where it is 1
    optimizer.step()
    del optimizer.found_inf
    for p in new:  # except that SGD's first step leaves momentum uninitialised when skipped
        buffer = optimizer.state.get(p, {}).get("momentum_buffer")
        if buffer is not None:
            buffer.masked_fill_(skipped, 0.0)
    return math.isfinite(gradient_norm.numpy()) if gradient_norm.is_cpu else None


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
    """D of ``implicit_diff.preconditioned``: what the optimiser's next step makes of its gradient.

    A step divides the gradient g by sqrt(s) + eps, with s the second moment after that step. It
    holds g^2 itself: s = r + c g^2, r the part that is left of earlier steps. So

        1 / D = d/dg [g / (sqrt(s) + eps)] = (r / sqrt(s) + eps) / (sqrt(s) + eps)^2

    which is 1 / (sqrt(s) + eps) where many steps have made r large beside c g^2, and next to
    nothing where r is zero: the first step of Adam has size lr, whatever the gradient. Momentum is
    left out: it takes every gradient in the end, over several steps. So D > 0, except that
    centred RMSprop can answer a larger gradient with a smaller step; this counts as no answer.

    g, the next gradient, is not known, and ``p.grad``, of the last lower step, stands in. Where
    that is zero, as in a row of an embedding that the batch did not hold, the root mean square of
    the rest of the tensor does: a gradient that comes to such an entry is of that size. D is 1
    wherever no gradient has ever been.

    Args: ``parameters``: in the model's order. Frozen ones are left out.

    Returns: a list of tensors > 0 shaped like the parameters that require a gradient. They are 1
    for SGD. Learning rates are left out, but for Adagrad's decay of it.

    Raises TypeError: D of this optimiser is not known. ValueError: it does not hold a parameter.
    """
    kind = next((kind for kind in _NEXT_MOMENT if isinstance(optimizer, kind)), None)
    if kind is None:
        known = ", ".join(kind.__name__ for kind in _NEXT_MOMENT)
        raise TypeError(
            f"adam_scale knows the steps of {known}, not of {type(optimizer).__name__}: use one of "
            "them as the lower optimiser, or a solver without preconditioned()"
        )
    if isinstance(parameters, torch.nn.Module):
        raise TypeError("adam_scale takes parameters, not a model: give model.parameters()")
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    scales = []
    for parameter in parameters:
        if not isinstance(parameter, Tensor) or parameter.is_complex():
            kind = parameter.dtype if isinstance(parameter, Tensor) else type(parameter).__name__
            raise TypeError(
                f"adam_scale takes real tensors, such as model.parameters(), not {kind}"
            )
        if not parameter.requires_grad:
            continue
        if parameter not in groups:
            raise ValueError(
                "adam_scale: the optimiser does not hold one of the parameters that require a "
                "gradient: give those that it holds, or freeze the others (requires_grad_(False))"
            )
        state, group = optimizer.state.get(parameter), groups[parameter]
        if not state or kind is torch.optim.SGD:
            scales.append(torch.ones_like(parameter))
            continue
        coupled = not group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        g = _stand_in(parameter, group, coupled)
        s, r, eps, factor = _NEXT_MOMENT[kind](state, group, g)
        never, root = s == 0, s.sqrt_()  # in place: a pass over new memory takes twice the time
        r.div_(root).add_(eps)
        scales.append(root.add_(eps).square_().div_(r).div_(factor).masked_fill_(never, 1.0))
    return scales


@torch.no_grad()
def _stand_in(parameter, group, coupled):
    """A guess of the gradient that the optimiser's next step will see; with weight decay, where
    ``coupled``."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    gradient = parameter.grad.to_dense()
    reached = torch.count_nonzero(gradient)
    if not reached.is_cpu or reached.numpy() < gradient.numel():  # looking at a GPU's would wait
        size = torch.linalg.vector_norm(gradient) / reached.clamp(min=1).to(gradient.dtype).sqrt()
        gradient = gradient.masked_fill(gradient == 0, size)
    if coupled and group["weight_decay"]:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
    return gradient


# Functions (state, group, g) -> s, r, eps and the factor of a step g / (sqrt(s) + eps), after the
# next one. The corrections of the bias, c, stand in eps and factor: sqrt(s / c) + eps is
# (sqrt(s) + sqrt(c) eps) / sqrt(c).


def _next_of_adam(state, group, g):
    beta = group["betas"][1]
    s, r = _moving_mean(state["exp_avg_sq"], beta, g)
    if group.get("amsgrad", False):
        largest = state["max_exp_avg_sq"]
        r = torch.where(s > largest, r, largest)
        s = torch.maximum(s, largest)
    root = (1 - beta ** _next_step(state)) ** 0.5
    return s, r, root * group["eps"], root


def _next_of_adagrad(state, group, g):
    factor = 1 / (1 + (_next_step(state) - 1) * group["lr_decay"])
    return state["sum"] + g.square(), state["sum"].clone(), group["eps"], factor


def _next_of_rmsprop(state, group, g):
    alpha = group["alpha"]
    s, r = _moving_mean(state["square_avg"], alpha, g)
    if group["centered"]:
        mean = alpha * state["grad_avg"] + (1 - alpha) * g
        s = (s - mean.square()).clamp(min=0)
        r = (r - alpha * mean * state["grad_avg"]).clamp(min=0)
    return s, r, group["eps"], 1.0


def _moving_mean(moment, beta, g):
    """s and r."""
    r = beta * moment
    return torch.addcmul(r, g, g, value=1 - beta), r


def _next_step(state):
    """A number, or a tensor where the device counts."""
    step = torch.as_tensor(state["step"], dtype=torch.float64)
    return (step.numpy().item() if step.is_cpu else step) + 1


_NEXT_MOMENT = {
    torch.optim.Adam: _next_of_adam,
    torch.optim.AdamW: _next_of_adam,
    torch.optim.NAdam: _next_of_adam,
    torch.optim.Adagrad: _next_of_adagrad,
    torch.optim.RMSprop: _next_of_rmsprop,
    torch.optim.SGD: None,  # divides by nothing
}


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
