"""Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping for Sample Weighting", NeurIPS 2019.

A network V of a sample's loss gives its weight. Ahead of every lower step, Theta, the network's
parameters, take one step down the development loss at the parameters after a plain step:

    theta^ = theta - alpha / n sum_i V(L_i0; Theta) gradient L_i0
    Theta <- Theta - beta d L_dev(theta^) / dTheta
           = Theta + beta alpha / n sum_i dV(L_i0; Theta) / dTheta <gradient L_i0, v>

with v the development gradient at theta^; the lower step then uses the new Theta. The paper
differentiates through the step; one forward-mode pass along v is the same, see ``one_step``.
"""

import torch
from torch import nn

from auxilearn.baselines.one_step import LearnsAhead


class MetaWeightNet(LearnsAhead):
    """A learned weight in (0, 1) of every sample of the target, from its loss.

    The network has one hidden layer with ReLU and a sigmoid output, as in the paper. The paper has
    one task: auxiliary ones keep weight 1, and are part of the step that is looked ahead of. The
    weights are not normalised over a batch.

    Args: ``lower_lr`` and ``aux_weight`` as of ``LearnsAhead``; ``hidden``: units; ``rate`` and
    ``decay``: of the network's Adam.
    """

    def __init__(
        self, main_task, input_dim, lower_lr, aux_weight=1.0, hidden=100, rate=1e-3, decay=1e-4
    ):
        super().__init__(main_task, input_dim, lower_lr, aux_weight)
        self.net = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid()
        )
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=rate, weight_decay=decay, fused=True
        )

    def weights(self, losses):
        target = torch.arange(self.input_dim, device=losses.device) == self.main_task
        of_target = self.net(losses[:, self.main_task, None].to(self.net[0].weight))  # (B, 1)
        return torch.where(target, of_target, 1.0)
