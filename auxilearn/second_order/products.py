"""Fast products with second derivatives, for the upper level.

The training loss is f(theta, phi) = S(L(theta); phi): a task model turns a batch into losses L
(B, K), a scheduler turns these into one scalar S. Three operators make the hypergradient:

    v        gradient of the target task's mean loss on development batches: reverse mode
    H u      double backward, with the closed forms of ``batch_norm`` and ``convolution``, in half
             the time of PyTorch's own
    mixed p  d/dphi <df/dtheta, p>. The scheduler depends on theta through the losses alone, so
             <df/dtheta, p> = <dS/dL (phi), D> with D = d/de L(theta + e p): one forward-mode
             pass, then a backward pass through the scheduler alone

Every product runs in the model's own mode (train mode, in training), from the state that the model
had before, and leaves that: an upper step does not move batch norm's running statistics. Dropout
draws one mask per batch and upper step. Memory grows neither with the number of products nor with
the number of batches: with one training batch, its graph serves all products of an upper step; with
several, the graphs are rebuilt for each product, one after the other.
"""

import torch
import torch.nn.functional as F

from auxilearn.errors import Unsupported
from auxilearn.hypernet import loss_of_schedule, scheduled_loss
from auxilearn.losses import check_outputs, masked_column_means, times_aux_weight
from auxilearn.randomness import generator_states, put_back, random_state_kept
from auxilearn.second_order.batch_norm import fast_batch_norm
from auxilearn.second_order.convolution import FastConvolution
from auxilearn.second_order.double_backward import (
    gradients,
    gradients_or_none,
    zeros_for_none,
)
from auxilearn.second_order.evaluation import (
    ModelFunction,
    frozen,
    refuse_once_differentiable,
    second_derivatives,
)
from auxilearn.second_order.operators import TWICE_DIFFERENTIABLE, Operators
from auxilearn.vectors import dot


class Derivatives(ModelFunction):
    """The fixed parts of one upper step, and means of derivatives over its batches.

    Args: as for ``Bilevel``; ``theta`` and ``phi``: what the two levels learn; ``train_batches``
    are the upper step's.
    """

    def __init__(self, model, scheduler, theta, phi, train_batches, aux_weight, average):
        super().__init__(model, theta, scheduler)
        self.scheduler = scheduler
        self.phi = phi
        self.train_batches = train_batches
        self.aux_weight = aux_weight
        self.average = average
        # The host's, whatever torch.set_default_device says, so that nothing is waited for.
        self.seed = int(torch.randint(2**31, (), device="cpu").numpy())

    def development_gradient(self, dev_batches):
        """Mean target loss over the development batches, a scalar, and v, its gradient."""
        target = self.scheduler.main_task

        def loss_and_gradient(batch):
            with self.evaluated(batch) as outputs:
                check_outputs(outputs, self.scheduler)
                mask = outputs.mask
                if mask is not None and mask.is_cpu and not mask[:, target].any().numpy():
                    raise ValueError(
                        "a development batch has no loss under the target task (its mask leaves "
                        "all out): development samples need the target's label"
                    )
                loss = masked_column_means(outputs.losses, mask)[target]
                v = gradients_or_none(loss, self.theta)
                if all(t is None for t in v):
                    raise ValueError(
                        "the development loss depends on no parameter that the lower optimiser "
                        "holds: give it those of the model that is trained"
                    )
                return [loss.detach(), *zeros_for_none(v, self.theta)]

        loss, *v = self.average(self.mean_over(dev_batches, loss_and_gradient), dev_batches)
        return loss, v

    def target_and_rest(self, p, scale):
        """What ``Balance.observe`` learns from: c / |v| and N of the first training batch.

        Args: the solver's p, and D = ``scale`` (None: 1). Losses are without ``aux_weight``.
        """
        target = self.scheduler.main_task
        scale = scale or [torch.ones_like(t) for t in p]

        def of_batch(batch):
            with self.evaluated(batch) as outputs:
                losses = outputs.losses
                with frozen(self.phi):
                    loss = loss_of_schedule(self.scheduler, losses, outputs)
                (weights,) = gradients(loss, [losses], retain_graph=True)
                parts = (weights * losses).sum(dim=0)
                of_target = gradients(parts[target], self.theta, retain_graph=True)
                of_both = gradients(parts.sum(), self.theta)
            of_rest = torch._foreach_sub(of_both, of_target)
            steps = [torch._foreach_div(g, scale) for g in (of_target, of_rest)]
            slopes = torch.stack([dot(of_target, p), dot(of_rest, p)])
            gram = torch.stack([dot(g, step) for g in (of_target, of_rest) for step in steps])
            return slopes, gram.view(2, 2)

        size = dot(p, torch._foreach_mul(p, scale)).sqrt()
        first = self.train_batches[:1]
        slopes, gram = self.average(self.mean_over(first, of_batch), first)
        return slopes / size, gram

    def training_mean(self, function):
        """Mean of ``function`` over the training batches of all processes."""
        return self.average(self.mean_over(self.train_batches, function), self.train_batches)

    def mean_over(self, batches, function):
        """Mean over batches of a function that gives a list of tensors, under fixed randomness."""
        total = None
        for number, batch in enumerate(batches):
            with torch.enable_grad(), random_state_kept(self.theta, self.seed + number):
                values = function(batch)
            total = values if total is None else [t + v for t, v in zip(total, values, strict=True)]
            del values
        return [t / len(batches) for t in total]


class FastOperators:
    """H u by double backward in closed form, mixed p by one forward-mode pass."""

    def __init__(self, derivatives):
        self.derivatives = derivatives
        self._kept = None  # the product with H, where there is one batch for all products

    def hvp(self, u):
        """H u, a list shaped like theta."""
        derivatives = self.derivatives

        def product(batch):
            hvp = self._kept or self._second_order(batch)
            if len(derivatives.train_batches) == 1:
                self._kept = hvp
            return hvp(u)

        return derivatives.training_mean(product)

    def _second_order(self, batch):
        """The product with one batch's H; it holds the graph of the gradient."""
        states = generator_states(self.derivatives.theta)
        closed_forms = fast_batch_norm() | {F.conv2d: FastConvolution()}
        try:
            return self._by_operators(batch, TWICE_DIFFERENTIABLE | closed_forms)
        except Unsupported:  # perhaps of a closed form, in a model that differentiates by itself
            put_back(states)
            return self._by_operators(batch, TWICE_DIFFERENTIABLE)

    def _by_operators(self, batch, table):
        derivatives, convolution = self.derivatives, table.get(F.conv2d)
        with (
            second_derivatives("H u"),
            derivatives.evaluated(batch, table) as outputs,
            frozen(derivatives.phi),
        ):
            loss = scheduled_loss(derivatives.scheduler, outputs, derivatives.aux_weight)
            refuse_once_differentiable(loss, "H u")
            if convolution:
                convolution.leaf_gradients = False  # of g, its derivatives are what counts
            g = gradients(loss, derivatives.theta, create_graph=True)

        def product(u):
            with second_derivatives("H u"), Operators(table):
                return gradients(g, derivatives.theta, u, retain_graph=True)

        return product

    def mixed(self, p):
        """d/dphi <df/dtheta, p>, a list shaped like phi."""
        derivatives, self._kept = self.derivatives, None

        def product(batch):
            outputs, derivative = derivatives.directional_derivative(p, batch)
            check_outputs(outputs, derivatives.scheduler)
            if outputs.mask is not None:  # 0 dS/dL there, but D may be NaN
                derivative = derivative.masked_fill(~outputs.mask, 0.0)
            scale = (derivatives.aux_weight, derivatives.scheduler.main_task)
            losses = times_aux_weight(outputs.losses, *scale).requires_grad_()
            loss = loss_of_schedule(derivatives.scheduler, losses, outputs)
            (slope,) = gradients(loss, [losses], create_graph=True)  # dS/d(aL) (phi), (B, K)
            return gradients(
                torch.sum(slope * times_aux_weight(derivative, *scale)), derivatives.phi
            )

        return derivatives.training_mean(product)
