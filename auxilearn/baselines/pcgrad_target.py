"""Yu et al., "Gradient Surgery for Multi-Task Learning" (PCGrad), NeurIPS 2020, for a target.

In Algorithm 1 every task's gradient is projected off those of all others that it conflicts with.
Here auxiliary gradients alone are projected, off the target's G_0 alone, which stays as it is:

    G_k <- G_k - min(0, <G_k, G_0>) / |G_0|^2 G_0     k an auxiliary task

with G_k the gradient of a_k L_k, L_k the mean loss, in the parameters that all tasks share. The sum
of all is the gradient of a weighted loss, sum_k w_k a_k L_k, with

    w_0 = 1 - sum_k min(0, <G_k, G_0>) / |G_0|^2,  w_k = 1

so K products are all that is needed: one forward-mode pass, as in ``gradient_cosine``. Parameters
of a task's own (heads) are not projected: see ``TargetProjection``.
"""

import torch

from auxilearn.baselines.gradient_cosine import GradientCosine
from auxilearn.losses import masked_column_means, times_aux_weight
from auxilearn.second_order.evaluation import ModelFunction, unwrapped
from auxilearn.vectors import dot


class TargetProjection(GradientCosine):
    """A weight of the target, renewed before every lower step; nothing is learned.

    Heads get the plain gradient of the sum of the losses: what w_0 adds to it, (w_0 - 1) times h,
    the target's gradient in the heads, is taken back by a term that is 0 and has this gradient,
    - (w_0 - 1) <h, p - p'>, with p the heads' parameters and p' the same as constants. A batch
    without a target label has G_0 = 0, and w_0 = 1.

    Args: ``aux_weight``: a_k of auxiliary tasks; ``shared`` as of ``GradientCosine``.
    """

    def __init__(self, main_task, input_dim, aux_weight=1.0, **shared):
        super().__init__(main_task, input_dim, **shared)
        self.aux_weight = aux_weight
        self._own = []  # (parameter, h) of the lower step that follows

    def before_lower_step(self, model, batch, dev_batches, average):
        """Set ``weights`` for ``batch``; the model is left as it is."""
        inner = unwrapped(model)
        learned = [(self.shared(n), p) for n, p in inner.named_parameters() if p.requires_grad]
        shared = [p for is_shared, p in learned if is_shared]
        own = [p for is_shared, p in learned if not is_shared]
        self.weights.fill_(1.0)
        if not shared:  # frozen: nothing to project
            return
        with ModelFunction(inner, shared) as function:
            of_target = self._target_gradient(function, batch, [*shared, *own])
            target = average(of_target[: len(shared)], [batch])
            products = self._products_along(target, function, batch, average)
        square = dot(target, target)
        conflicts = times_aux_weight(products[None], self.aux_weight, self.main_task)[0].clamp(
            max=0
        )
        # 0 / 0 without a target label; what is not finite stays so, and no step is taken.
        added = torch.where(square == 0, 0.0, -conflicts / square)
        is_target = torch.arange(self.input_dim, device=added.device) == self.main_task
        self.weights[self.main_task] += added.masked_fill(is_target, 0.0).sum()
        self._own = list(zip(own, of_target[len(shared) :], strict=True))

    def scheduled_loss(self, losses, seen):
        own, self._own = self._own, []
        loss = (self.weights * masked_column_means(losses, seen.mask)).sum()
        excess = self.weights[self.main_task] - 1
        for parameter, h in own:
            loss = loss - excess * (h * (parameter - parameter.detach())).sum()
        return loss
