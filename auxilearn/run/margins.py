"""margins.npy: the mean margin of every training sample over training.

    margin = logit of the given target label - largest other logit

A label that the model learns only late, or against its neighbours, keeps a low or negative mean:
the area under the margin of Pleiss et al., NeurIPS 2020. The logits are those of metrics.jsonl's
training accuracy, which every lower step computes anyway: of the features of the step, by the
target's head after it. (docs/label_audit.md: by the head before it, results are as good.)
"""

import numpy as np
import torch


class Margins:
    """The sum of the margins of each of n training samples, and how many there were.

    All stays on the device, and nothing is waited for: ``add`` takes a step down, ``take`` counts
    those taken down since, which costs as much for ten steps as for one. Over several ranks each
    has its share. (Of a batch with fewer samples than ranks every rank counts all.)

    Args: ``samples`` n; ``device`` of the logits.
    """

    def __init__(self, samples, device):
        self.total = torch.zeros(samples, dtype=torch.float64, device=device)
        self.count = torch.zeros(samples, dtype=torch.int64, device=device)
        self._waiting = []

    @classmethod
    def of_run(cls, run):
        """Those of a ``Run``; None if its target is a real number, which has no margin."""
        return cls(len(run.train_set), run.device) if run.tasks[0].classes else None

    def add(self, outputs, logits):
        """Take down the ``TaskLosses`` of a training batch and its target logits (B, C)."""
        labeled = None if outputs.mask is None else outputs.mask[:, 0]
        self._waiting.append((logits, outputs.labels[:, 0], outputs.sample_id, labeled))

    @torch.no_grad()
    def take(self):
        """Count what was taken down."""
        if not self._waiting:
            return
        logits, labels, places, labeled = zip(*self._waiting, strict=True)
        self._waiting.clear()
        logits, places = torch.cat(logits), torch.cat(places)
        given = torch.cat(labels).long()[:, None]  # (steps x B, 1)
        others = logits.scatter(1, given, -torch.inf).amax(dim=1)
        margins = (logits.gather(1, given)[:, 0] - others).double()
        known = torch.ones_like(places)
        if labeled[0] is not None:
            known = torch.cat(labeled)
            margins = margins.masked_fill(~known, 0)
        self.total.index_add_(0, places, margins)
        self.count.index_add_(0, places, known.long())

    def state(self):
        """All that was added, in main memory, for a checkpoint."""
        self.take()
        return {"total": self.total.cpu(), "count": self.count.cpu()}

    def restore(self, state):
        """Go on from ``state()``."""
        self.total.copy_(state["total"])
        self.count.copy_(state["count"])


def mean_margins(states):
    """(n,) float64 means of the ``Margins.state()`` of all ranks; NaN of a sample never seen."""
    total, count = (sum(state[name].numpy() for state in states) for name in ("total", "count"))
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
