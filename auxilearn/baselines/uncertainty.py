"""Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018."""

import torch
from torch import nn

from auxilearn.hypernet import HyperNet
from auxilearn.losses import masked_column_means


class Uncertainty(HyperNet):
    """Weights from a learned noise per task, sum_k c_k exp(-s_k) L_k + s_k / 2.

    L_k is the task's mean loss, and c_k is 1 for cross entropies, 1/2 for squared errors. s_k is
    the logarithm of the task's variance, 0 at the start; it is trained with the task model, on the
    same loss (Kendall, Gal and Cipolla, CVPR 2018: equation 7 is of squared errors, 10 of both).

    Args: ``real``: numbers of the tasks whose losses are squared errors.
    """

    def __init__(self, main_task, input_dim, real=()):
        super().__init__(main_task, input_dim)
        scale = torch.ones(input_dim)
        scale[list(real)] = 0.5
        self.register_buffer("scale", scale, persistent=False)
        self.log_variance = nn.Parameter(torch.zeros(input_dim))

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        means = masked_column_means(losses, mask)
        penalty = self.log_variance / 2
        if mask is not None:  # a task without a loss in this batch says nothing about its noise
            penalty = penalty * mask.any(dim=0)
        return (torch.exp(-self.log_variance) * self.scale * means + penalty).sum()
