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
    """images (B, 3, H, W) uint8; labels (B, K) int64; sample_id (B,); mask (B, K) bool or None."""

    images: torch.Tensor
    labels: torch.Tensor
    sample_id: torch.Tensor
    mask: torch.Tensor | None = None


class TaskHeads(nn.Module):
    """All heads in one matrix product, and the losses of neighbours of equal width in one call.

    Args:
        feature_dim: d.
        class_counts: number of classes of every task, K entries; any mixture of widths.
    """

    def __init__(self, feature_dim, class_counts):
        super().__init__()
        self.class_counts = list(class_counts)
        self.linear = nn.Linear(feature_dim, sum(self.class_counts))
        self.groups = [
            (width, len(list(tasks))) for width, tasks in itertools.groupby(self.class_counts)
        ]

    def target_logits(self, features):
        """Logits of the target task alone, (B, C)."""
        classes = self.class_counts[0]
        return F.linear(features, self.linear.weight[:classes], self.linear.bias[:classes])

    def forward(self, features, labels):
        """Unreduced cross entropies L (B, K) of ``labels`` (B, K).

        Labels of masked entries must be valid class numbers; their losses are the caller's to mask.
        """
        logits = self.linear(features)  # (B, sum of class counts)
        # Slices, not gathers: the backward pass of a gather is slow.
        logits = logits.split([width * tasks for width, tasks in self.groups], dim=1)
        labels = labels.split([tasks for _, tasks in self.groups], dim=1)
        losses = []
        for group, wanted, (width, _) in zip(logits, labels, self.groups, strict=True):
            group = group.reshape(-1, width)
            loss = F.cross_entropy(group, wanted.reshape(-1), reduction="none")
            losses.append(loss.reshape(wanted.shape))
        return torch.cat(losses, dim=1)


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

    def features(self, images):
        """Features F (B, d) of uint8 images (B, 3, H, W); normalised here, on the device."""
        images = (images - self.pixel_mean).div_(self.pixel_std)
        if not self.bf16:
            return self._checked(self.backbone(images))
        # torch.autocast does not see through torch.func, so the weights are cast by hand.
        weights = {
            name: weight.bfloat16() if name in self.cast else weight
            for name, weight in self.backbone.named_parameters()
        }
        features = functional_call(self.backbone, weights, (images.bfloat16(),))
        return self._checked(features).float()

    def _checked(self, features):
        wanted = self.heads.linear.in_features
        if features.dim() != 2 or features.shape[1] != wanted:
            raise UserError(
                f"--backbone: its features must be (B, {wanted}), with --feature_dim {wanted} "
                f"columns, not {tuple(features.shape)}"
            )
        return features

    def forward(self, batch):
        features = self.features(batch.images)
        losses = self.heads(features, batch.labels)
        return TaskLosses(losses, features, batch.sample_id, batch.mask, batch.labels)

    def predict(self, images):
        """Logits of the target task (B, C)."""
        return self.heads.target_logits(self.features(images))


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
    shrunk to a single position, where batch norm cannot train on a batch of one image."""

    build: Callable[[int], nn.Module]
    smallest: int = 1


BACKBONES: dict[str, Backbone] = {}


def register_backbone(name: str, *, smallest: int = 1) -> Callable:
    """A decorator that makes a builder, d -> module, the ``--backbone`` called ``name``.

    The module takes images (B, 3, H, W), normalised as for ImageNet, and returns features (B, d).
    Raises ValueError: the name is taken.
    """
    if name in BACKBONES:
        raise ValueError(f"there is a backbone {name!r} already: choose another name")

    def decorator(build):
        BACKBONES[name] = Backbone(build, smallest)
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


def build_backbone(name, feature_dim, pretrained=False, weights_path=None):
    """A backbone whose pooled output has ``feature_dim`` entries.

    ``pretrained`` loads ImageNet weights (resnet18 only), ``weights_path`` a file: a torchvision
    state dict, or a checkpoint of this project.

    Raises UserError: weights that cannot be had, or that belong to another architecture.
    """
    backbone = BACKBONES[name].build(feature_dim)
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
