"""Ren, Zeng, Yang and Urtasun, "Learning to Reweight Examples for Robust Deep Learning", ICML 2018.

Algorithm 1: a step of gradient descent on sum_i eps_i L_i0 is looked ahead of at eps = 0, where the
looked-ahead parameters are theta itself. With v the target's development gradient at theta,

    - d L_dev / d eps_i  ~  D_i0 = <gradient of L_i0, v>
    w_i = max(0, D_i0) / sum_j max(0, D_j0),  0 where all are 0

are the weights of the target's samples. All D_i0 come from one forward-mode pass.
"""

import torch

from auxilearn.baselines.one_step import LooksAhead
from auxilearn.hypernet import weighted_mean
from auxilearn.second_order.evaluation import ModelFunction, unwrapped


class LearningToReweight(LooksAhead):
    """Weights of the target's samples, found anew in every lower step; nothing is learned.

    W_i0 = N_0 w_i, with N_0 the samples of the batch that have the target's label: the project's
    mean over them is the paper's sum. The paper has one task: auxiliary ones keep weight 1. A batch
    without any D_i0 > 0 trains the auxiliary tasks alone. In a distributed run the sum is over the
    whole batch. D that is not finite makes the loss NaN, and the step is not taken.

    ``means`` (K,) are the tasks' mean weights in the last lower step, 1 before the first; they
    stand in where there is no lower step to look ahead of.
    """

    def __init__(self, main_task, input_dim):
        super().__init__(main_task, input_dim)
        self.register_buffer("means", torch.ones(input_dim))
        self._of_step = None  # the weights of the lower step that follows

    def before_lower_step(self, model, batch, dev_batches, average):
        model = unwrapped(model)
        theta = [p for p in model.parameters() if p.requires_grad]
        if not theta:  # all is frozen: the step itself says so
            return
        with ModelFunction(model, theta) as function:
            v = self.development_gradient(function, dev_batches, average)
            outputs, derivative = self.response(function, v, batch)
        pull, samples = derivative.clamp(min=0), len(derivative)
        (sums,) = average([pull.sum(dim=0) / samples], [batch])
        total = self.total(sums)
        # Of a smaller number than this the reciprocal overflows.
        shares = torch.where(total < torch.finfo(total.dtype).tiny, 0.0, 1 / total)
        labelled = 1.0 if outputs.mask is None else outputs.mask.to(pull).mean(dim=0)
        self._of_step = self.kept(pull * shares * labelled)
        self.means.copy_(self.kept(sums * shares))

    def total(self, sums):
        """What the weights are divided by, of the tasks' sums (K,)."""
        return sums[self.main_task]

    def kept(self, weights):
        """``weights`` (..., K) with 1 for the auxiliary tasks."""
        auxiliary = torch.arange(self.input_dim, device=weights.device) != self.main_task
        return weights.masked_fill(auxiliary, 1.0)

    def scheduled_loss(self, losses, seen):
        weights, self._of_step = self._of_step, None
        if weights is None:
            weights = self.means.to(losses).expand_as(losses)
        return weighted_mean(weights, losses, seen.mask)
