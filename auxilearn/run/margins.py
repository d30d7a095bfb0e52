"""margins.npy: the mean margin of every training sample over training.

    margin = logit of the given target label - largest other logit

A label that the model learns only late, or against its neighbours, keeps a low or negative mean:
the area under the margin of Pleiss et al., NeurIPS 2020. The logits are those of metrics.jsonl's
training accuracy, which every lower step computes anyway: of the features of the step, by the
target's head after it. (By the head before it, rankings are the same to the third digit.)
"""

import numpy as np
import torch


class Margins:
    """The sum of the margins of each of n training samples, and how many there were.

    Both stay on the device: ``add`` waits for nothing. Over several ranks each has its share. (Of a
    batch with fewer samples than ranks every rank counts all.)

    Args: ``samples`` n; ``device`` of the logits.
    """

    def __init__(self, samples, device):
        self.total = torch.zeros(samples, dtype=torch.float64, device=device)
        self.count = torch.zeros(samples, dtype=torch.int64, device=device)

    @classmethod
    def of_run(cls, run):
        """Those of a ``Run``; None if its target is a real number, which has no margin."""
        return cls(len(run.train_set), run.device) if run.tasks[0].classes else None

    @torch.no_grad()
    def add(self, outputs, logits):
        """Count the ``TaskLosses`` of a training batch, whose target logits are (B, C)."""
        given = outputs.labels[:, :1].long()
        others = logits.scatter(1, given, -torch.inf).amax(dim=1)
        margin = (logits.gather(1, given)[:, 0] - others).double()
        known = torch.ones_like(outputs.sample_id)
        if outputs.mask is not None:
            known = outputs.mask[:, 0].long()
            margin = margin.masked_fill(~outputs.mask[:, 0], 0)
        self.total.index_add_(0, outputs.sample_id, margin)
        self.count.index_add_(0, outputs.sample_id, known)

    def state(self):
        """In main memory, for a checkpoint."""
        return {"total": self.total.cpu(), "count": self.count.cpu()}

    def restore(self, state):
        """Go on from ``state()``."""
        self.total.copy_(state["total"])
        self.count.copy_(state["count"])


def mean_margins(states):
    """(n,) float64 means of the ``Margins.state()`` of all ranks; NaN of a sample never seen."""
    total, count = (sum(state[name].numpy() for state in states) for name in ("total", "count"))
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
