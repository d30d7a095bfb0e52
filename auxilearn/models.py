"""The lower level: a backbone, one head per task, and the matrix of losses they give."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from auxilearn.backbones import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_backbone,  # noqa: F401  # for ``TaskModel(build_backbone(...), ...)``
)
from auxilearn.errors import UserError
from auxilearn.losses import TaskLosses

# With --precision bf16, batch norms keep float32 parameters for bfloat16 inputs, which CUDA allows
# in no other normalisation.
BATCH_NORM = nn.modules.batchnorm._NormBase


class Batch(NamedTuple):
    """inputs: images (B, 3, H, W) uint8, or rows: (numbers (B, n) float32, codes (B, c) int64);
    labels (B, K) int64, or float32 if a task is a real number; sample_id (B,); mask (B, K) bool or
    None. Labels outside the mask are 0."""

    inputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    labels: torch.Tensor
    sample_id: torch.Tensor
    mask: torch.Tensor | None = None


class TaskHeads(nn.Module):
    """All heads in one matrix product, and the losses of neighbours of one kind in one call.

    Args:
        feature_dim: d.
        class_counts: number of classes of every task, K entries, any mixture; None: a real number.
    """

    def __init__(self, feature_dim, class_counts):
        super().__init__()
        self.class_counts = list(class_counts)
        self.linear = nn.Linear(feature_dim, sum(map(_width, self.class_counts)))
        self.groups = [
            (classes, len(list(tasks))) for classes, tasks in itertools.groupby(self.class_counts)
        ]

    def target_logits(self, features):
        """Outputs of the target task alone: logits (B, C), or a standardised number (B, 1)."""
        width = _width(self.class_counts[0])
        return F.linear(features, self.linear.weight[:width], self.linear.bias[:width])

    def forward(self, features, labels):
        """Unreduced losses L (B, K) of ``labels`` (B, K): cross entropies, or squared errors of
        standardised numbers.

        Labels of masked entries must be valid ones; their losses are the caller's to mask.
        """
        labels = labels.split([tasks for _, tasks in self.groups], dim=1)
        losses = []
        for group, wanted, (classes, _) in zip(
            self._outputs(features), labels, self.groups, strict=True
        ):
            if classes is None:
                losses.append((group - wanted).square())
                continue
            group, flat = group.reshape(-1, classes), wanted.reshape(-1).long()
            loss = F.cross_entropy(group, flat, reduction="none")
            losses.append(loss.reshape(wanted.shape))
        return torch.cat(losses, dim=1)

    def predictions(self, features):
        """(B, K): the predicted class of every task, or its standardised number."""
        predicted = [
            group
            if classes is None
            else group.unflatten(1, (tasks, classes)).argmax(dim=2).to(group.dtype)
            for group, (classes, tasks) in zip(self._outputs(features), self.groups, strict=True)
        ]
        return torch.cat(predicted, dim=1)

    def _outputs(self, features):
        """The outputs of every group of tasks (B, width times tasks)."""
        # Slices, not gathers: the backward pass of a gather is slow.
        widths = [_width(classes) * tasks for classes, tasks in self.groups]
        return self.linear(features).split(widths, dim=1)


def _width(classes):
    """How many outputs a task of so many classes has; None: a real number."""
    return 1 if classes is None else classes


class TaskModel(nn.Module):
    """A backbone and its heads: ``model(batch)`` is the ``TaskLosses`` of a ``Batch``.

    With ``bf16`` the backbone computes in bfloat16; features, heads and losses are float32.
    """

    def __init__(self, backbone, feature_dim, class_counts, bf16=False):
        super().__init__()
        self.backbone = backbone
        self.bf16 = bf16
        self.cast = {  # names of the parameters that are cast to bfloat16
            f"{prefix}.{name}" if prefix else name
            for prefix, module in backbone.named_modules()
            if not isinstance(module, BATCH_NORM)
            for name, _ in module.named_parameters(recurse=False)
        }
        self.heads = TaskHeads(feature_dim, class_counts)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            scaled = 255 * torch.tensor(values).reshape(1, 3, 1, 1)
            self.register_buffer(f"pixel_{name}", scaled, persistent=False)

    def features(self, inputs):
        """Features F (B, d) of the inputs of a ``Batch``; images are normalised here, on the
        device."""
        if isinstance(inputs, tuple):
            return self._of_backbone(*inputs)
        return self._of_backbone((inputs - self.pixel_mean).div_(self.pixel_std))

    def _of_backbone(self, *inputs):
        if not self.bf16:
            return self._checked(self.backbone(*inputs))
        # torch.autocast does not see through torch.func, so the weights are cast by hand.
        weights = {
            name: weight.bfloat16() if name in self.cast else weight
            for name, weight in self.backbone.named_parameters()
        }
        inputs = tuple(i.bfloat16() if i.is_floating_point() else i for i in inputs)
        return self._checked(functional_call(self.backbone, weights, inputs)).float()

    def _checked(self, features):
        wanted = self.heads.linear.in_features
        if features.dim() != 2 or features.shape[1] != wanted:
            raise UserError(
                f"--backbone: its features must be (B, {wanted}), with --feature_dim {wanted} "
                f"columns, not {tuple(features.shape)}"
            )
        return features

    def forward(self, batch):
        features = self.features(batch.inputs)
        losses = self.heads(features, batch.labels)
        return TaskLosses(losses, features, batch.sample_id, batch.mask, batch.labels)

    def predict(self, inputs):
        """Outputs of the target task: logits (B, C), or a standardised number (B, 1)."""
        return self.heads.target_logits(self.features(inputs))
