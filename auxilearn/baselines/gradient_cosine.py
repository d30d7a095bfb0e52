"""Auxiliary tasks weighted by how well their gradients agree with the target's.

Y. Du, W. M. Czarnecki, S. M. Jayakumar, M. Farajtabar, R. Pascanu, B. Lakshminarayanan, "Adapting
Auxiliary Losses Using Gradient Similarity", 2018. With G_k the gradient of task k's mean loss in
the parameters that all tasks share, and cos_k the cosine of G_k and the target's G_0:

    weighted     sum_k max(0, cos_k) L_k         needs every norm |G_k|: a backward pass per task
    unweighted   sum of the L_k with cos_k >= 0  needs signs of <G_k, G_0> alone

All K products <G_k, G_0> together are the directional derivative of the losses along G_0: one
backward and one forward-mode pass, whatever the number of tasks. The target's weight is 1.
"""

import warnings

import torch

from auxilearn.errors import Unsupported
from auxilearn.hypernet import HyperNet
from auxilearn.losses import masked_column_means
from auxilearn.randomness import random_state_kept
from auxilearn.second_order.double_backward import gradients
from auxilearn.second_order.evaluation import ModelFunction, unwrapped

CHUNK = 1 << 26  # numbers in the gradients of the tasks that are taken together


class GradientCosine(HyperNet):
    """A weight per task, renewed before every lower step; nothing is learned.

    Args:
        weighted: which of the two versions above.
        shared: callable (name of a parameter) -> whether the tasks share it.

    ``weights`` (K,) are those of the last call of ``before_lower_step``, 1 before the first.
    A cosine with a gradient of zero counts as 0: a batch without a target label keeps all auxiliary
    tasks in the unweighted version, and none in the weighted one.
    """

    def __init__(
        self,
        main_task,
        input_dim,
        weighted=False,
        shared=lambda name: not name.startswith("heads."),
    ):
        super().__init__(main_task, input_dim)
        self.weighted = weighted
        self.shared = shared
        self.register_buffer("weights", torch.ones(input_dim))
        self._first_order_only = False  # whether the model has first derivatives and no others

    def before_lower_step(self, model, batch, dev_batches, average):
        """Set ``weights`` from the gradients of ``model`` on ``batch``, which it leaves as it is.

        Dropout draws the masks that it will draw in the step itself.
        """
        inner = unwrapped(model)
        theta = [p for n, p in inner.named_parameters() if p.requires_grad and self.shared(n)]
        if not theta:  # what the tasks share is frozen: all gradients are zero
            weights = torch.full_like(self.weights, 0.0 if self.weighted else 1.0)
        else:
            with ModelFunction(inner, theta) as function:
                weights = self._weights(function, batch, average)
        weights[self.main_task] = 1.0
        self.weights.copy_(weights)

    def _weights(self, function, batch, average):
        if not self.weighted:
            return (self._products(function, batch, average) >= 0).to(self.weights)
        products, norms = self._products_and_norms(function, batch, average)
        scale = norms * norms[self.main_task]
        return torch.where(scale > 0, products / scale, 0.0).clamp(min=0)

    def _products(self, function, batch, average):
        """<G_k, G_0> for all tasks, shape (K,)."""
        if self._first_order_only:
            return self._products_and_norms(function, batch, average)[0]
        target = average(self._target_gradient(function, batch, function.theta), [batch])
        return self._products_along(target, function, batch, average)

    def _target_gradient(self, function, batch, parameters):
        """The gradient of the target's mean loss in ``parameters``, a list."""
        with random_state_kept(function.theta), function.evaluated(batch) as outputs:
            loss = masked_column_means(outputs.losses, outputs.mask)[self.main_task]
            return gradients(loss, parameters)

    def _products_along(self, target, function, batch, average):
        """``_products``, with G_0 known."""
        if self._first_order_only:
            return self._products_and_norms(function, batch, average)[0]
        try:
            with random_state_kept(function.theta):
                outputs, derivative = function.directional_derivative(target, batch)
        except Unsupported as error:
            warnings.warn(
                f"gradient products take a backward pass per task, which is slower: {error}",
                stacklevel=2,
            )
            self._first_order_only = True
            return self._products_and_norms(function, batch, average)[0]
        return average([masked_column_means(derivative, outputs.mask)], [batch])[0]

    def _products_and_norms(self, function, batch, average):
        """<G_k, G_0> and |G_k| for all tasks, both (K,), by a backward pass per task."""
        with random_state_kept(function.theta), function.evaluated(batch) as outputs:
            means = masked_column_means(outputs.losses, outputs.mask)
            return self._by_backward_passes(means, function.theta, batch, average)

    def _by_backward_passes(self, means, leaves, batch, average):
        chunk = max(1, CHUNK // sum(leaf.numel() for leaf in leaves))
        directions = torch.eye(len(means), dtype=means.dtype, device=means.device)
        order = [self.main_task, *(k for k in range(len(means)) if k != self.main_task)]
        products, squares = torch.zeros_like(means.detach()), torch.zeros_like(means.detach())
        target = None
        for start in range(0, len(order), chunk):
            tasks = order[start : start + chunk]
            some = _along_each(means, leaves, directions[tasks])
            some = [
                leaf.new_zeros((len(tasks), *leaf.shape)) if g is None else g
                for g, leaf in zip(some, leaves, strict=True)
            ]
            some = [g.flatten(1) for g in average(some, [batch])]
            target = target or [g[0] for g in some]
            products[tasks] = sum(g @ t for g, t in zip(some, target, strict=True))
            squares[tasks] = sum(g.square().sum(dim=1) for g in some)
        return products, squares.sqrt()

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        return (self.weights * masked_column_means(losses, mask)).sum()


def _along_each(means, leaves, directions):
    """Gradients (n, ...) of ``leaves``, for each of n ``directions``; None where none reaches."""
    options = {"retain_graph": True, "allow_unused": True}
    try:
        return torch.autograd.grad(means, leaves, directions, is_grads_batched=True, **options)
    except RuntimeError:  # vmap lacks some operators, and random numbers in checkpointed parts
        rows = [torch.autograd.grad(means, leaves, one, **options) for one in directions]
        return [None if g[0] is None else torch.stack(g) for g in zip(*rows, strict=True)]
