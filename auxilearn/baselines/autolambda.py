"""Liu, James, Davison and Johns, "Auto-Lambda: Disentangling Dynamic Task Relationships", TMLR
2022.

A weight lambda_k per task. Ahead of every lower step the weights take one step down the loss of the
primary task on held-out data, at the parameters after a plain step:

    theta^ = theta - alpha gradient sum_k lambda_k L_k
    d L_dev(theta^) / d lambda_k = - alpha <gradient L_k, v>

with v the development gradient at theta^. The paper approximates the products by finite differences
of two more gradients; one forward-mode pass gives all of them exactly, see ``one_step``.
"""

import torch
from torch import nn

from auxilearn.baselines.one_step import LearnsAhead


class AutoLambda(LearnsAhead):
    """A learned weight per auxiliary task; the target is the primary task.

    Two choices of this project: the target's weight is held at 1 (the paper weighs every task), and
    the others at 0 or above, since a negative weight would train for a larger loss, of which a
    cross entropy has no largest. Weights start at 0.1, as in the paper.

    Args: ``lower_lr`` and ``aux_weight`` as of ``LearnsAhead``; ``initial``: weights at the start;
    ``rate``: of the weights' Adam.
    """

    def __init__(self, main_task, input_dim, lower_lr, aux_weight=1.0, initial=0.1, rate=1e-4):
        super().__init__(main_task, input_dim, lower_lr, aux_weight)
        self.values = nn.Parameter(torch.full((input_dim - 1,), float(initial)))
        self.optimizer = torch.optim.Adam([self.values], lr=rate, fused=True)

    def before_lower_step(self, model, batch, dev_batches, average):
        super().before_lower_step(model, batch, dev_batches, average)
        self.values.data.clamp_(min=0)

    def weights(self, losses):
        before, after = self.values.split([self.main_task, self.input_dim - 1 - self.main_task])
        weights = torch.cat([before, self.values.new_ones(1), after])
        return weights.expand_as(losses)
