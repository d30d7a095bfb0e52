"""Networks that make features: torchvision's and a small one for images, two for rows.

``build_backbone`` makes one by name. ``register_backbone`` adds your own.
"""

import copy
import difflib
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torchvision
from torch import nn
from torch.func import functional_call
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

from auxilearn.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_DIM = 512  # of a backbone that can have any width


class Backbone(NamedTuple):
    """A kind of network whose output is (B, d).

    build: d -> module of images; with ``rows``: (d, ``RowsShape``) -> module of rows.
    smallest: images with a shorter side are shrunk to a single position, where batch norm cannot
    train on a batch of one image. pretrained: torchvision has ImageNet weights for it.
    """

    build: Callable[..., nn.Module]
    smallest: int = 1
    pretrained: bool = False
    rows: bool = False


BACKBONES: dict[str, Backbone] = {}  # those of torchvision aside


def register_backbone(name: str, *, smallest: int = 1, rows: bool = False) -> Callable:
    """A decorator that makes a builder, d -> module, the ``--backbone`` called ``name``.

    The module takes images (B, 3, H, W), normalised as for ImageNet, and returns features (B, d).
    With ``rows`` the builder is (d, ``RowsShape``) -> module, and the module takes numbers
    (B, n) float32 and codes (B, c) int64. Raises ValueError: the name is taken.
    """
    if name in backbone_names():
        raise ValueError(f"there is a backbone {name!r} already: choose another name")

    def decorator(build):
        BACKBONES[name] = Backbone(build, smallest, rows=rows)
        return build

    return decorator


def backbone_names():
    """Every name that ``--backbone`` takes: the registered ones, then torchvision's."""
    return [*BACKBONES, *list_models(module=torchvision.models)]


def find_backbone(name):
    """The ``Backbone`` called ``name``. UserError: there is none; its line suggests like names."""
    if name in BACKBONES:
        return BACKBONES[name]
    names = backbone_names()
    if name in names:
        return Backbone(partial(torchvision_network, name), _smallest(name), pretrained=True)
    near = difflib.get_close_matches(name.lower(), names, n=5)
    if near:
        raise UserError(f"--backbone {name} is unknown: did you mean {' or '.join(near)}?")
    raise UserError(
        f"--backbone {name} is unknown: choose from {', '.join(BACKBONES)} and torchvision's "
        "classification networks, such as resnet18"
    )


def feature_width(name):
    """The default width d of the features of ``name``: torchvision's networks have their own."""
    if not find_backbone(name).pretrained:
        return DEFAULT_DIM
    try:
        with torch.device("meta"):  # no memory, no random numbers
            network = _torchvision_model(name)
    except NotImplementedError:  # RegNets compute their shapes with tensors
        with torch.random.fork_rng(devices=[]):
            network = _torchvision_model(name)
    return _remove_classifier(network)


def build_backbone(
    name, feature_dim, pretrained=False, weights_path=None, *, image_size=None, rows=None
):
    """The module of the backbone ``name``, with ``feature_dim`` features.

    Args:
        pretrained: start from torchvision's default weights, which are downloaded.
        weights_path: start from this file: a torchvision state dict, or a checkpoint of this
            project.
        image_size: side of the images in pixels, to be checked; None: what the weights expect.
        rows: ``RowsShape`` of the rows; None: the samples are images.

    Raises UserError: the name is unknown or is not for such samples; images of this size cannot be
    taken; weights cannot be had, or belong to another architecture.
    """
    backbone = find_backbone(name)
    _check_kind(name, backbone, rows)
    module = backbone.build(*((feature_dim, rows) if backbone.rows else (feature_dim,)))
    if backbone.pretrained:
        _check_images(name, module, image_size)
    if weights_path:
        _load_backbone(module, weights_path, name)
    elif pretrained:
        if not backbone.pretrained:
            raise UserError(f"--backbone_pretrain 1: there are no ImageNet weights for {name}")
        _load_imagenet_weights(name, _core(module))
    return module


def _check_kind(name, backbone, rows):
    if backbone.rows == (rows is not None):
        return
    known = [n for n, other in BACKBONES.items() if other.rows != backbone.rows]
    if rows is None:
        raise UserError(
            f"--backbone {name} takes rows of columns, but the samples are images: choose from "
            f"{', '.join(known)} and torchvision's classification networks, such as resnet18"
        )
    raise UserError(
        f"--backbone {name} takes images, but the samples are rows of columns: choose from "
        f"{', '.join(known)}"
    )


# --------------------------------------------------------------------------------------------------
# Images: a small network
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


register_backbone("convnet", smallest=9)(ConvNet)


# --------------------------------------------------------------------------------------------------
# Images: torchvision's classification networks
# --------------------------------------------------------------------------------------------------

# These were trained with auxiliary classifiers, on images that they rescale themselves.
_INCEPTION = {"aux_logits": False, "transform_input": True, "init_weights": True}
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# A network has the same shape and input with and without its weights, so that a checkpoint fits.
_OPTIONS = {
    "googlenet": _INCEPTION,
    "inception_v3": _INCEPTION,
    "vit_h_14": {"image_size": 518},
}
# Most halve the side of an image five times. Measured by training on one image of every size.
_SMALLEST = {"densenet": 61, "googlenet": 47, "inception": 107}


def _smallest(name):
    return next((size for start, size in _SMALLEST.items() if name.startswith(start)), 33)


def torchvision_network(name, feature_dim):
    """torchvision's classification network ``name`` without its classifier.

    Where ``feature_dim`` is not its own width, a linear layer and a ReLU bring it there.
    """
    network = _torchvision_model(name)
    width = _remove_classifier(network)
    preset = get_model_weights(name).DEFAULT.transforms()
    _adapt_inputs(network, tuple(preset.mean), tuple(preset.std))
    if feature_dim == width:
        return network
    return nn.Sequential(network, nn.Linear(width, feature_dim), nn.ReLU())


def _torchvision_model(name):
    return get_model(name, weights=None, **_OPTIONS.get(name, {}))


def _remove_classifier(network):
    """Put nn.Identity in place of the last layer with weights. Returns the width of its input.

    The last layer is linear or, in SqueezeNet, a convolution whose output is averaged.
    """
    layers = [
        name for name, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))
    ]
    parent, _, name = layers[-1].rpartition(".")
    parent = network.get_submodule(parent)
    layer = getattr(parent, name)
    setattr(parent, name, nn.Identity())
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _adapt_inputs(network, mean, std):
    """Normalise images by ``mean`` and ``std``; let Swin V2 compute in other types than float32."""
    if (mean, std) != (IMAGENET_MEAN, IMAGENET_STD):
        network.register_forward_pre_hook(partial(_renormalise, mean, std))
    for layer in network.modules():
        if isinstance(layer, ShiftedWindowAttentionV2):
            layer.cpb_mlp.register_forward_pre_hook(_cast_to_weights)


def _renormalise(mean, std, network, inputs):
    """Images normalised as ImageNet's, in the normalisation that the network's weights expect."""
    (images,) = inputs
    mean, std, own_mean, own_std = (
        images.new_tensor(values).reshape(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    )
    return ((images * std + mean - own_mean) / own_std,)


def _cast_to_weights(layers, inputs):
    """Swin V2's table of coordinates is float32 whatever the weights are."""
    return (inputs[0].to(layers[0].weight.dtype),)


def _core(module):
    """The torchvision network inside a backbone with another width."""
    return module[0] if isinstance(module, nn.Sequential) else module


def _check_images(name, module, image_size):
    """Send an image without content through: UserError if it is too small, or of a wrong size."""
    weights = get_model_weights(name).DEFAULT
    size = image_size or weights.transforms().crop_size[0]
    # Swin V2 divides by the length of vectors, which is 0 where it pads an image: NaN second
    # derivatives. Its last stage has windows of 8 x 8 positions of 32 x 32 pixels.
    if name.startswith("swin_v2") and size % 256:
        raise UserError(
            f"--image_size {size}: {name} has second derivatives on images of a multiple of 256 "
            "pixels: give --image_size 256, or another --backbone such as swin_t"
        )
    state = {
        key: value.to("meta")
        for key, value in itertools.chain(module.named_parameters(), module.named_buffers())
    }
    module.eval()
    try:
        with torch.no_grad():
            functional_call(module, state, (torch.empty(1, 3, size, size, device="meta"),))
    except Exception as error:  # of many kinds
        least = weights.meta["min_size"][0]
        wanted = f"{least} pixels" if least > 200 else f"at least {least} pixels"
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--image_size {size}: {name} takes images of {wanted} ({reason}): give --image_size "
            f"{max(least, 32)}, or another --backbone"
        ) from None
    module.train()


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


class Fields(nn.Module):
    """Every column of a row as a vector: (numbers (B, n), codes (B, c)) -> (B, n + c, e).

    A number becomes its value times the column's vector, a code its row of the column's table (Song
    et al., CIKM 2019, equations 4 and 2). Numbers should be standardised. A missing number is 0, so
    that its field is 0; a missing category needs a code of its own.
    """

    def __init__(self, shape, width):
        super().__init__()
        # Vectors of length about 1, whatever their width.
        self.directions = nn.Parameter(torch.randn(shape.numbers, width) / width**0.5)
        self.tables = nn.ModuleList(nn.Embedding(codes, width) for codes in shape.categories)
        for table in self.tables:
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, numbers, codes):
        fields = [numbers[:, :, None] * self.directions]
        fields += [
            table(column)[:, None]
            for table, column in zip(self.tables, codes.unbind(1), strict=True)
        ]
        return torch.cat(fields, dim=1)


def _count(shape):
    fields = shape.numbers + len(shape.categories)
    if not fields:
        raise UserError("rows need at least one column: name some with --features")
    return fields


@register_backbone("mlp", rows=True)
class Perceptron(nn.Module):
    """A perceptron on the fields of a row: two layers, each with a ReLU."""

    def __init__(self, feature_dim, shape, width=16, hidden=256):
        super().__init__()
        self.fields = Fields(shape, width)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(_count(shape) * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, feature_dim),
            nn.ReLU(),
        )

    def forward(self, numbers, codes):
        return self.layers(self.fields(numbers, codes))


class InteractingLayer(nn.Module):
    """Self-attention over the fields e (B, F, e) of a row: (B, F, heads * width).

    Song et al., CIKM 2019, equations 5 to 8. As there, the inner products are not scaled.
    """

    def __init__(self, fields_width, heads, width):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.residual = (
            nn.Linear(fields_width, heads * width, bias=False) for _ in range(4)
        )

    def forward(self, e):
        query, key, value = (
            layer(e).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, F, width)
            for layer in (self.query, self.key, self.value)
        )
        alpha = torch.softmax(query @ key.transpose(2, 3), dim=3)  # equation 5
        combined = (alpha @ value).transpose(1, 2).flatten(2)  # equations 6 and 7
        return torch.relu(combined + self.residual(e))  # equation 8


@register_backbone("autoint", rows=True)
class AutoInt(nn.Module):
    """AutoInt (Song et al., CIKM 2019): interacting layers on the fields of a row.

    The defaults are the paper's. Its output layer (equation 9) is linear in all fields; here a
    linear layer and a ReLU make features of them, because every task has a linear head.
    """

    def __init__(self, feature_dim, shape, width=16, layers=3, heads=2, head_width=32):
        super().__init__()
        self.fields = Fields(shape, width)
        out = heads * head_width
        self.interacting = nn.Sequential(
            *(InteractingLayer(out if i else width, heads, head_width) for i in range(layers))
        )
        self.out = nn.Sequential(
            nn.Flatten(), nn.Linear(_count(shape) * out, feature_dim), nn.ReLU()
        )

    def forward(self, numbers, codes):
        return self.out(self.interacting(self.fields(numbers, codes)))


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def _load_imagenet_weights(name, network):
    weights = get_model_weights(name).DEFAULT
    folder = f"{torch.hub.get_dir()}/checkpoints/"
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        state = _of_features(state, name, network)
        load_matching(network, state, f"{folder}: not torchvision's weights")
    except Exception as error:  # no network, a proxy's page, a damaged file: many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"the ImageNet weights of {name} could not be loaded ({reason}): fetch {weights.url} "
            f"by hand and put it into {folder} (in place of a damaged file there), or give "
            "--backbone_weights PATH, or start from random weights with --backbone_pretrain 0"
        ) from None


def _of_features(state, name, network):
    """A state dict of torchvision's without its classifiers, with today's names."""
    identities = [key for key, part in network.named_modules() if type(part) is nn.Identity]
    dropped = (f"{identities[-1]}.", *(_AUXILIARY if name in _OPTIONS else ()))
    kept = copy.copy(state)  # with its metadata
    for key in state:
        value = kept.pop(key)
        if not key.startswith(dropped):
            # DenseNets were saved when their layers were called norm.1 and conv.2.
            kept[re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)] = value
    return kept


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


def _load_backbone(module, path, name):
    state = load_file(path)
    own = isinstance(state, dict) and isinstance(state.get("model"), dict)  # our own checkpoint
    if own:
        prefix, state = "backbone.", state["model"]
        state = {k[len(prefix) :]: v for k, v in state.items() if str(k).startswith(prefix)}
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise UserError(f"{path}: expected a state dict, that is, tensors by name")
    if not own and find_backbone(name).pretrained:
        state = _of_features(state, name, _core(module))
    if isinstance(module, nn.Sequential) and set(state) <= set(module[0].state_dict()):
        module = module[0]  # without the layer that changes the width
    load_matching(module, state, f"{path}: not weights of --backbone {name}")


def load_matching(module, state, complaint):
    """``load_state_dict``; what does not fit is one line. UserError, ``complaint`` first."""
    # Files from before batch norm counted its batches lack the counter, which nothing here reads.
    own = module.state_dict()
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    filled = own.__class__(counters | state)
    # The versions of its layers, by which they rename what older files hold.
    filled._metadata = getattr(state, "_metadata", own._metadata)
    try:
        module.load_state_dict(filled)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{complaint}: {reason[:300]}") from None
    # The rest is state of another kind, such as that of an optimiser inside a scheduler.
    tensors = [v for v in module.state_dict().values() if isinstance(v, torch.Tensor)]
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise UserError(f"{complaint}: it has values that are not finite")
