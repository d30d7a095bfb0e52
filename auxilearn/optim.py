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
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    scales = []
    for parameter in parameters:
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
        s, r, factor = _NEXT_MOMENT[kind](state, group, g)
        root = s.sqrt()
        scale = (root + group["eps"]).square_().mul_(root)
        scale.div_(torch.add(r, root, alpha=group["eps"])).div_(factor)
        scales.append(scale.masked_fill_(s == 0, 1.0))
    return scales


@torch.no_grad()
def _stand_in(parameter, group, coupled):
    """A guess of the gradient that the optimiser's next step will see; with weight decay, where
    ``coupled``."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    gradient = parameter.grad.to_dense()
    other = gradient == 0
    reached = (~other).sum().clamp(min=1).to(gradient.dtype)
    size = torch.linalg.vector_norm(gradient) / reached.sqrt()
    gradient = (-gradient if group["maximize"] else gradient.clone()).masked_fill_(other, size)
    if coupled and group["weight_decay"]:
        gradient.add_(parameter, alpha=group["weight_decay"])
    return gradient


# Functions (state, group, g) -> s, r and a factor of the whole step, after the next step of a
# parameter. Counts of steps may be on the device, where they stay.


def _next_of_adam(state, group, g):
    s, r, correction = _moving_mean(state["exp_avg_sq"], group["betas"][1], g, _next_step(state))
    if group.get("amsgrad", False):
        largest = state["max_exp_avg_sq"]
        s, r = torch.maximum(s, largest), torch.where(s > largest, r, largest)
    return s.div_(correction), r.div_(correction), 1.0


def _next_of_radam(state, group, g):
    beta, step = group["betas"][1], _next_step(state)
    s, r, correction = _moving_mean(state["exp_avg_sq"], beta, g, step)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / correction
    rectifier = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    factor = (rectifier.clamp(min=0) * correction).sqrt()
    # The first steps are gradient descent's, which s = r = 1 and the factor 1 + eps make of D.
    plain = length <= 5
    one = torch.ones_like(s)
    return (
        torch.where(plain, one, s),
        torch.where(plain, one, r),
        torch.where(plain, 1 + group["eps"], factor),
    )


def _next_of_adagrad(state, group, g):
    past = state["sum"]
    return past + g.square(), past, 1 / (1 + (_next_step(state) - 1) * group["lr_decay"])


def _next_of_rmsprop(state, group, g):
    alpha = group["alpha"]
    s, r, _ = _moving_mean(state["square_avg"], alpha, g)
    if group["centered"]:
        mean = alpha * state["grad_avg"] + (1 - alpha) * g
        s = (s - mean.square()).clamp(min=0)
        r = (r - alpha * mean * state["grad_avg"]).clamp(min=0)
    return s, r, 1.0


def _moving_mean(moment, beta, g, step=None):
    """s, r and the correction of the bias that starting at zero leaves after ``step`` steps."""
    r = beta * moment
    return torch.addcmul(r, g, g, value=1 - beta), r, None if step is None else 1 - beta**step


def _next_step(state):
    return torch.as_tensor(state["step"], dtype=torch.float64) + 1


_NEXT_MOMENT = {
    torch.optim.Adam: _next_of_adam,
    torch.optim.AdamW: _next_of_adam,
    torch.optim.NAdam: _next_of_adam,
    torch.optim.RAdam: _next_of_radam,
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
