"""How much the target task counts against the auxiliary tasks together, in closed form.

The scheduled loss is w_T L_T + w_A L_A: L_T is the target's loss and L_A the mean of the auxiliary
tasks' losses, both as the rest of the schedule weighs them. On a batch the lower step moves theta
by -eta D^-1 g, with g = w_T g_T + w_A g_A; D is 1 for gradient descent, and about the root of the
second moment for Adam. To second order in eta, with D in place of the curvature, up to a number l,
the development loss changes by

    -eta w . c + (l / 2) eta^2 w' N w      c_a = <g_a, p>, p = D^-1 v    v the development gradient
                                           N_ab = E <g_a, D^-1 g_b>      E the mean over batches

At the best eta this is -(w . c)^2 / (2 l w' N w), which is least along

    w = N^-1 c

So the half whose gradient helps the development set most counts most. A half whose gradients differ
from batch to batch, for want of labels or because labels are wrong, counts less, because N is a
mean of squares. The scale of w, which Adam does not feel, drops out, and there is no learning rate.
A half whose slope is below zero fades; c and N belong to unit weights, so it returns when its slope
does.
"""

import torch
from torch import Tensor, nn

START = 10  # upper steps, with all labels, after which what was seen counts as much as the start
LATE = 2  # running means weigh upper step n by about n^2: training changes, and starts off
FASTEST = 0.12  # change of the odds' logarithm in an upper step, since an estimate may be far off
LIMIT = 50.0  # of the odds, either way


class Balance(nn.Module):
    """The odds w_T : w_A, learned from every upper step.

    Args: ``start``: the odds at first. The estimate of n upper steps counts n / (n + 10), the start
    the rest. Below 1, where few samples have the target's label, an upper step counts as ``start``
    of one: it has seen that part of the labels.
    """

    odds: Tensor

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.start = min(max(start, 1 / LIMIT), LIMIT)
        self.register_buffer("odds", torch.tensor(self.start))
        self.register_buffer("slopes", torch.zeros(2))  # c, a running mean
        self.register_buffer("gram", torch.zeros(2, 2))  # N, a running mean
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def observe(self, slopes: Tensor, gram: Tensor) -> None:
        """Learn from an upper step. Nothing is read from the device; what is not finite is ignored.

        Args: ``slopes`` (2,) and ``gram`` (2, 2): c / |v| and N of ``w_T L_T`` and ``w_A L_A`` at
        the present weights, with |v|^2 = <v, D^-1 v>.
        """
        at = torch.stack([self.odds, torch.ones_like(self.odds)]) / (1 + self.odds)
        slopes, gram = slopes / at, gram / torch.outer(at, at)
        of_target, of_rest = self._at_start(gram)
        square = self.start * of_target + of_rest
        slopes, gram = slopes / square.sqrt(), gram / square  # the unit: the step at the start
        sound = torch.isfinite(slopes.sum() + gram.sum())
        late = (LATE + 1) / (self.steps + 1 + LATE)
        for mean, seen in ((self.slopes, slopes), (self.gram, gram)):
            mean.copy_(torch.where(sound, mean + late * (seen - mean), mean))
        self.steps.add_(sound)
        change = (self._solved() / self.odds).log().clamp(-FASTEST, FASTEST)
        self.odds.mul_(torch.where(sound, change.exp(), 1.0))

    def _at_start(self, gram):
        """N w at w = (start, 1)."""
        return self.start * gram[:, 0] + gram[:, 1]

    def _solved(self):
        """The odds of N^-1 c, drawn towards the start."""
        c, n = self.slopes, self.gram
        at_start = self._at_start(n)  # the c of which the start is the best
        at_start = at_start * (c.abs().sum() / at_start.abs().sum())
        seen = self.steps * min(self.start, 1.0)
        share = seen / (seen + START)
        c = share * c + (1 - share) * at_start
        target = (n[1, 1] * c[0] - n[0, 1] * c[1]).clamp(min=0)
        rest = (n[0, 0] * c[1] - n[0, 1] * c[0]).clamp(min=0)
        solved = (target / rest).clamp(1 / LIMIT, LIMIT)
        return torch.where(torch.isnan(solved), self.odds, solved)  # both 0
