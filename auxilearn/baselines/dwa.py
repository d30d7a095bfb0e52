"""Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.

Dynamic weight average, the paper's section of that name: with L_k(e) a task's mean loss in epoch e,

    r_k = L_k(e - 1) / L_k(e - 2),  1 in the first two epochs
    lambda_k = K exp(r_k / T) / sum_l exp(r_l / T)

so that a task whose loss falls slowly counts more. Nothing but losses is looked at.
"""

import torch
import torch.distributed as dist

from auxilearn.hypernet import HyperNet
from auxilearn.losses import masked_column_means


class DynamicWeightAverage(HyperNet):
    """A weight per task and epoch; nothing is learned.

    An epoch ends when so many samples have been trained on as the training set has. The samples of
    all processes count, and losses where the mask has them. A task without a loss in one of the two
    epochs has r = 1, and so has one whose loss was 0. A batch with a loss that is not finite, on
    which no step is taken, is left out of the means.

    Args: ``samples``: in the training set; ``temperature``: T.

    ``means`` (2, K): of the last epoch and of the one before, where ``known``.
    """

    def __init__(self, main_task, input_dim, samples, temperature=2.0):
        super().__init__(main_task, input_dim)
        self.samples, self.temperature = samples, temperature
        self.register_buffer("weights", torch.ones(input_dim))
        self.register_buffer("means", torch.zeros(2, input_dim))
        self.register_buffer("known", torch.zeros(2, input_dim, dtype=torch.bool))
        self.register_buffer("sums", torch.zeros(input_dim))  # of losses in this epoch
        self.register_buffer("counts", torch.zeros(input_dim))  # of losses in this epoch
        self.register_buffer("passed", torch.zeros((), dtype=torch.int64))  # samples in this epoch
        self._step = None  # (batch, average) of the lower step that follows

    def before_lower_step(self, model, batch, dev_batches, average):
        """Set ``weights`` if an epoch has ended, without waiting for the device to know."""
        self._step = batch, average
        ended = self.passed >= self.samples
        last = self.sums / self.counts.clamp(min=torch.finfo(self.counts.dtype).tiny)
        means = torch.stack([last, self.means[0]])
        known = torch.stack([self.counts > 0, self.known[0]])
        compared = known.all(dim=0) & (means[1] != 0)
        ratios = torch.where(compared, means[0] / torch.where(compared, means[1], 1.0), 1.0)
        weights = self.input_dim * torch.softmax(ratios / self.temperature, dim=0)
        for buffer, value in (
            (self.weights, weights),
            (self.means, means),
            (self.known, known),
            (self.sums, torch.zeros_like(self.sums)),
            (self.counts, torch.zeros_like(self.counts)),
            (self.passed, self.passed - self.samples),
        ):
            buffer.copy_(torch.where(ended, value, buffer))

    def scheduled_loss(self, losses, seen):
        step, self._step = self._step, None
        if step is not None:
            self._add(seen, *step)
        return (self.weights * masked_column_means(losses, seen.mask)).sum()

    def _add(self, seen, batch, average):
        losses, size = seen.losses, len(seen.losses)
        mask = torch.ones_like(losses, dtype=torch.bool) if seen.mask is None else seen.mask
        losses = losses.masked_fill(~mask, 0.0)
        share = losses.new_full((1,), 1 / size)
        sums, counts, share = average(
            [losses.sum(dim=0) / size, mask.to(losses).sum(dim=0) / size, share], [batch]
        )
        # The mean of 1 / n_r over processes r, weighted by their n_r samples: processes / samples.
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        samples = torch.round(processes / share[0])
        finite = sums.isfinite().all()
        self.sums += torch.where(finite, samples * sums, 0.0)
        self.counts += torch.where(finite, torch.round(samples * counts), 0.0)
        self.passed += samples.to(self.passed)
