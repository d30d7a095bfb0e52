"""schedule.jsonl: how the schedule moved during training, a row per upper step.

    {"kind": "tasks", "names": ["target", "has_bill_shape::cone", ...]}
    {"kind": "schedule", "step": 20, "samples": 640, "mean_weight": [...],
     "target_weight": {"all": [...], "clean": [...], "corrupted": [...]}}

A row is about the lower steps since the row before it: ``mean_weight`` the mean weight of every
task over their samples, ``target_weight`` the quantiles ``QUANTILES`` of the target weights, of all
samples and, where labels were corrupted, of those whose label is right and of those whose label is
wrong. A task without a label among these samples has null for its mean. The weights are those the
training step itself used, read off its backward pass: nothing is computed twice.
"""

import json
from pathlib import Path

import numpy as np
import torch

from auxilearn.data.dataset import sample_set
from auxilearn.run.record import SCHEDULE_FILE
from auxilearn.weights import samples_with_loss

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class ScheduleHistory:
    """Writes schedule.jsonl.

    Args:
        path: of the file, a Path; appended to.
        names: of the K tasks, the target first.
        corrupted: (n,) bool, whose target label is wrong, by place in the training set; or None.

    ``add`` every lower step; at every upper step ``write`` what ``waiting`` holds on the device.
    """

    def __init__(self, path, names, corrupted=None):
        self.path = path
        self.names = names
        self.corrupted = corrupted
        self._start()
        if not path.exists() or path.stat().st_size == 0:
            self._append({"kind": "tasks", "names": names})

    @classmethod
    def of_run(cls, directory, run):
        """The history of a ``Run`` that is recorded in ``directory``."""
        names, wrong = [task.name for task in run.tasks], None
        if run.config.effective_corrupted_rate:
            clean = sample_set(run.split, run.trained_on, run.tasks)
            wrong = (run.train_set.labels[:, 0] != clean.labels[:, 0]).numpy()
        return cls(Path(directory) / SCHEDULE_FILE, names, wrong)

    def _start(self):
        self.total = self.count = 0
        self.target = []

    def state(self):
        """What is taken down since the last row, for a checkpoint."""
        return {"total": self.total, "count": self.count, "target": self.target}

    def restore(self, state, device):
        """Go on from ``state()``, with weights that are on ``device``."""

        def moved(value):
            return value.to(device) if isinstance(value, torch.Tensor) else value

        self.total, self.count = moved(state["total"]), moved(state["count"])
        self.target = [tuple(map(moved, entry)) for entry in state["target"]]

    def add(self, step):
        """Take down the weights of a ``LowerStep``."""
        outputs, weights = step.outputs, step.weights
        self.total = self.total + weights.sum(dim=0)
        self.count = self.count + samples_with_loss(outputs)
        # Copies of the target's columns: views would keep all tasks, here and in checkpoints.
        labeled = None if outputs.mask is None else outputs.mask[:, 0].clone()
        self.target.append((weights[:, 0].clone(), outputs.sample_id, labeled))

    def waiting(self):
        """What the steps since the last row left on the device, a list of tensors: the total weight
        and the number of losses of every task, and of every sample in every step its target weight,
        its place in the training set and whether it has a target label."""
        if not self.target:
            return []
        weights, places, labeled = zip(*self.target, strict=True)
        weights = torch.cat(weights)
        known = torch.ones_like(weights) if labeled[0] is None else torch.cat(labeled)
        return [
            self.total,
            self.total.new_zeros(()) + self.count,
            weights,
            torch.cat(places),
            known,
        ]

    def write(self, step, waiting):
        """Append the row of the steps since the last one: of ``waiting()``, read into arrays.

        Returns the mean weight of every task, a list of K numbers.
        """
        total, count, weights, places, known = waiting
        means = (total / np.maximum(count, 1)).tolist()
        samples, known = len(weights), known > 0
        weights, places = weights[known], places[known].astype(int)
        groups = {"all": weights}
        if self.corrupted is not None:
            wrong = self.corrupted[places]
            groups |= {"clean": weights[~wrong], "corrupted": weights[wrong]}
        row = {
            "kind": "schedule",
            "step": step,
            "samples": samples,
            "mean_weight": np.where(count > 0, _short(means), None).tolist(),
            "target_weight": {
                name: _short(np.quantile(values, QUANTILES).tolist())
                for name, values in groups.items()
                if len(values)
            },
        }
        self._append(row)
        self._start()
        return means

    def _append(self, row):
        with open(self.path, "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)


def _short(values):
    return [float(f"{value:.5g}") for value in values]
