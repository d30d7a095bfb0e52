"""One step of gradient descent and its response on the development set, for rivals that look ahead.

With theta^ = theta - alpha g the parameters after one plain step, and v the gradient of the
target's mean development loss, the response to anything that weighs the losses is

    D_ik = <gradient of L_ik in theta, v>

the derivative of the losses along v: one forward-mode pass, whatever the number of samples and
tasks. Theta are the model's parameters that require a gradient.
"""

import contextlib

import torch

from auxilearn.hypernet import HyperNet, weighted_mean
from auxilearn.losses import check_outputs, masked_column_means, times_aux_weight
from auxilearn.randomness import random_state_kept
from auxilearn.second_order.double_backward import gradients
from auxilearn.second_order.evaluation import ModelFunction, unwrapped


class LooksAhead(HyperNet):
    """A scheduler that looks at development batches in lower steps. They leave the model as it is,
    and dropout draws the masks that it will draw in the step itself."""

    needs_dev = True

    def development_gradient(self, function, batches, average):
        """v, a list like ``function.theta``: of the mean of the batches' mean target losses."""
        total = None
        with random_state_kept(function.theta):
            for batch in batches:
                with function.evaluated(batch) as outputs:
                    check_outputs(outputs, self)
                    means = masked_column_means(outputs.losses, outputs.mask)
                    v = gradients(means[self.main_task], function.theta)
                total = v if total is None else torch._foreach_add(total, v)
        if len(batches) > 1:
            total = torch._foreach_div(total, len(batches))
        return average(total, batches)

    def response(self, function, v, batch):
        """(``TaskLosses`` without graph, D (B, K)), D 0 outside the mask."""
        with random_state_kept(function.theta):
            outputs, derivative = function.directional_derivative(v, batch)
        check_outputs(outputs, self)
        if outputs.mask is not None:
            derivative = derivative.masked_fill(~outputs.mask, 0.0)
        return outputs, derivative


class LearnsAhead(LooksAhead):
    """Weights W(L; phi) (B, K) whose phi takes one step of an optimiser of its own ahead of every
    lower step, down the development loss at theta^:

        theta^ = theta - alpha d/dtheta mean_i sum_k W_ik(phi) a_k L_ik(theta),  W constant
        d L_dev(theta^) / dphi = - alpha d/dphi mean_i sum_k W_ik(phi) a_k D_ik,  v at theta^

    exactly. A response that is not finite changes nothing in phi, and the lower step's loss is NaN:
    it is not taken either, and its result tells.

    Args: ``lower_lr``: alpha, the lower level's learning rate (set the attribute anew if that
    changes); ``aux_weight``: a_k of auxiliary tasks. A subclass makes ``optimizer``, a fused one,
    and ``weights``.
    """

    def __init__(self, main_task, input_dim, lower_lr, aux_weight=1.0):
        super().__init__(main_task, input_dim)
        self.lower_lr, self.aux_weight = lower_lr, aux_weight
        self._sound = 1.0  # NaN in place of 1 where the last response was not finite

    def weights(self, losses):
        """W (B, K) of raw losses, 0 where there is none."""
        raise NotImplementedError

    def _weights(self, seen):
        losses = seen.losses if seen.mask is None else seen.losses.masked_fill(~seen.mask, 0.0)
        return self.weights(losses)

    def before_lower_step(self, model, batch, dev_batches, average):
        model = unwrapped(model)
        theta = [p for p in model.parameters() if p.requires_grad]
        phi = list(self.parameters())
        if not theta:  # all is frozen: the step itself says so
            return
        scale = self.aux_weight, self.main_task
        with ModelFunction(model, theta) as function:
            with random_state_kept(theta), function.evaluated(batch) as outputs:
                check_outputs(outputs, self)
                weights = self._weights(outputs.detached()).detach()
                losses = times_aux_weight(outputs.losses, *scale)
                g = gradients(weighted_mean(weights, losses, outputs.mask), theta)
                del outputs, losses
            function.restore()
            g = average(g, [batch])
            with _moved(theta, g, -self.lower_lr), ModelFunction(model, theta) as moved:
                v = self.development_gradient(moved, dev_batches, average)
            outputs, derivative = self.response(function, v, batch)
        with torch.enable_grad():
            slope = times_aux_weight(derivative, *scale)
            slope = weighted_mean(self._weights(outputs), slope, outputs.mask)
            found = average(gradients(-self.lower_lr * slope, phi), [batch])
        skipped = ~torch.isfinite(torch.stack(torch._foreach_norm(found))).all()
        for p, gradient in zip(phi, found, strict=True):
            p.grad = gradient
        self.optimizer.found_inf = skipped.float()  # fused kernels change nothing where it is 1
        self.optimizer.step()
        del self.optimizer.found_inf
        self.optimizer.zero_grad()
        self._sound = torch.where(skipped, torch.nan, 1.0)

    def scheduled_loss(self, losses, seen):
        sound, self._sound = self._sound, 1.0
        return sound * weighted_mean(self._weights(seen), losses, seen.mask)

    def get_extra_state(self):
        return self.optimizer.state_dict()

    def set_extra_state(self, state):
        self.optimizer.load_state_dict(state)


@contextlib.contextmanager
def _moved(theta, direction, length):
    """Theta + length direction, for a ``with`` block; graphs that hold theta stay valid."""
    values = [p.data for p in theta]
    kept = [value.clone() for value in values]
    try:
        torch._foreach_add_(values, direction, alpha=length)
        yield
    finally:
        torch._foreach_copy_(values, kept)
