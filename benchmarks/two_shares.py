"""A plugin for share_oracle.py: the target has one share of all weight, then another.

Nothing is learned; all auxiliary tasks count alike. Training ends on the development set, as that
of common_dev and joint_stable does.
"""

import torch

from auxilearn import HyperNet, register
from auxilearn.hypernet import masked_column_means


class TwoShares(HyperNet):
    """w_T L_T + (1 - w_T) L_A, with L_A the mean of the auxiliary tasks' losses.

    Args: ``first``, ``second``: w_T for the first ``switch`` samples that are trained on, and then.
    """

    def __init__(self, tasks, first, second, switch):
        super().__init__(main_task=0, input_dim=tasks)
        self.first, self.second, self.switch = first, second, switch
        self.register_buffer("passed", torch.zeros((), dtype=torch.int64))

    def scheduled_loss(self, losses, seen):
        share = torch.where(self.passed < self.switch, self.first, self.second)
        self.passed += len(losses)
        means = masked_column_means(losses, seen.mask)
        return share * means[0] + (1 - share) * means[1:].mean()


@register("two_shares", title="Two shares of the target", fine_tuned=True)
def build(problem, first=0.5, second=0.5, switch=1.0):
    """``switch``: in passes over the training set."""
    return TwoShares(problem.tasks, first, second, switch * problem.samples)
