"""The lower level: a backbone, one head per task, and the matrix of losses they give."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call

from auxilearn.errors import UserError
from auxilearn.hypernet import TaskLosses

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        outputs = self.linear(features)  # (B, sum of widths)
        # Slices, not gathers: the backward pass of a gather is slow.
        widths = [_width(classes) * tasks for classes, tasks in self.groups]
        labels = labels.split([tasks for _, tasks in self.groups], dim=1)
        losses = []
        for group, wanted, (classes, _) in zip(
            outputs.split(widths, dim=1), labels, self.groups, strict=True
        ):
            if classes is None:
                losses.append((group - wanted).square())
                continue
            group, flat = group.reshape(-1, classes), wanted.reshape(-1).long()
            loss = F.cross_entropy(group, flat, reduction="none")
            losses.append(loss.reshape(wanted.shape))
        return torch.cat(losses, dim=1)


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
        self.cast = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in backbone.named_modules()
            if not isinstance(module, NORMALISATIONS)  # these keep their parameters in float32
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


# --------------------------------------------------------------------------------------------------
# Backbones
# --------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """A small backbone for images of 24 to 96 pixels: three strided 3x3 convolutions and one 1x1.

    Each 3x3 convolution halves the side of the image; the features are averaged over positions.
    """

    def __init__(self, feature_dim, widths=(32, 64, 128)):
        super().__init__()
        layers = []
        channels = 3
        for width in widths:
            layers += _convolution(channels, width, kernel=3, stride=2)
            channels = width
        layers += _convolution(channels, feature_dim, kernel=1, stride=1)
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return self.layers(images)


def _convolution(channels, width, kernel, stride):
    return [
        nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]


class Backbone(NamedTuple):
    """``build``: d -> module whose output is (B, d). ``smallest``: images with a shorter side are
    shrunk to a single position, where batch norm cannot train on a batch of one image. ``rows``:
    its inputs are rows; ``build`` takes (d, ``RowsShape``)."""

    build: Callable[..., nn.Module]
    smallest: int = 1
    rows: bool = False


BACKBONES: dict[str, Backbone] = {}


def register_backbone(name: str, *, smallest: int = 1, rows: bool = False) -> Callable:
    """A decorator that makes a builder, d -> module, the ``--backbone`` called ``name``.

    The module takes images (B, 3, H, W), normalised as for ImageNet, and returns features (B, d).
    With ``rows`` the builder takes (d, ``auxilearn.data.contract.RowsShape``), and the module
    numbers (B, n) float32 and codes (B, c) int64.
    Raises ValueError: the name is taken.
    """
    if name in BACKBONES:
        raise ValueError(f"there is a backbone {name!r} already: choose another name")

    def decorator(build):
        BACKBONES[name] = Backbone(build, smallest, rows)
        return build

    return decorator


register_backbone("convnet", smallest=9)(ConvNet)
RESNET18_DIM = 512


@register_backbone("resnet18", smallest=33)
def resnet18(feature_dim):
    """torchvision's ResNet-18 without its classifier.

    Where ``feature_dim`` is not its 512, a linear layer and a ReLU bring it there.
    """
    resnet = torchvision.models.resnet18(weights=None)
    resnet.fc = nn.Identity()
    if feature_dim == RESNET18_DIM:
        return resnet
    return nn.Sequential(resnet, nn.Linear(RESNET18_DIM, feature_dim), nn.ReLU())


def build_backbone(name, feature_dim, pretrained=False, weights_path=None, rows=None):
    """A backbone whose pooled output has ``feature_dim`` entries.

    ``rows``: the ``RowsShape`` of the inputs, for a backbone that takes rows.

    ``pretrained`` loads ImageNet weights (resnet18 only), ``weights_path`` a file: a torchvision
    state dict, or a checkpoint of this project.

    Raises UserError: weights that cannot be had, or that belong to another architecture.
    """
    shape = (rows,) if BACKBONES[name].rows else ()
    backbone = BACKBONES[name].build(feature_dim, *shape)
    if weights_path:
        _load_backbone(backbone, weights_path, name)
    elif pretrained:
        _load_imagenet_weights(backbone if feature_dim == RESNET18_DIM else backbone[0])
    return backbone


def _load_imagenet_weights(resnet):
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    folder = f"{torch.hub.get_dir()}/checkpoints/"
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        load_matching(resnet, _without_classifier(state), f"{folder}: not torchvision's weights")
    except Exception as error:  # no network, a proxy's page, a damaged file: many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"the ImageNet weights of resnet18 could not be loaded ({reason}): fetch {weights.url} "
            f"by hand and put it into {folder} (in place of a damaged file there), or give "
            "--backbone_weights PATH, or start from random weights with --backbone_pretrain 0"
        ) from None


def _without_classifier(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def load_file(path):
    """A file written by ``torch.save``, on the CPU; no code in it is run. UserError if broken."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a file of weights") from None
    except Exception:  # of many kinds, on a file that is not torch's
        raise UserError(
            f"{path}: not a weights file that can be read without executing code from it "
            "(damaged, cut short, or not written by torch.save)"
        ) from None


def _load_backbone(backbone, path, name):
    state = load_file(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # our own checkpoint
        prefix, state = "backbone.", state["model"]
        state = {k[len(prefix) :]: v for k, v in state.items() if str(k).startswith(prefix)}
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise UserError(f"{path}: expected a state dict, that is, tensors by name")
    state = _without_classifier(state)
    if isinstance(backbone, nn.Sequential) and set(state) <= set(backbone[0].state_dict()):
        backbone = backbone[0]  # without the layer that changes the width
    load_matching(backbone, state, f"{path}: not weights of --backbone {name}")


def load_matching(module, state, complaint):
    """``load_state_dict``; what does not fit is one line. UserError, ``complaint`` first."""
    # Files from before batch norm counted its batches lack the counter, which nothing here reads.
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        module.load_state_dict(counters | state)
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{complaint}: {reason[:300]}") from None
    if not all(torch.isfinite(value).all() for value in module.state_dict().values()):
        raise UserError(f"{complaint}: it has values that are not finite")
