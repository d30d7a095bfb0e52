"""The library's promise on other people's models: the hypergradient is that of double backward.

A table of models and habits. Each hypergradient is held against double backward that is written
here and uses nothing of the package but the scheduler, in float64.
"""

import collections
import copy
import dataclasses
import random
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models.resnet import BasicBlock

from auxilearn.baselines.gradient_cosine import GradientCosine
from auxilearn.bilevel import Bilevel
from auxilearn.errors import Unsupported
from auxilearn.hypernet import MonoJoint, TaskLosses
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.second_order.evaluation import ModelFunction

pytestmark = pytest.mark.usefixtures("float64")
D, K, ALPHA, TERMS = 8, 3, 0.05, 2


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    """Squared errors of K heads on the features that ``body`` makes of x: (B, ..., D)."""

    def __init__(self, body, features=D, tasks=K):
        super().__init__()
        self.body, self.heads = body, nn.Linear(features, tasks)

    def features(self, x):
        return self.body(x)

    def losses(self, features, y):
        return (self.heads(features) - y).square()

    def forward(self, batch):
        x, y = batch
        hidden = self.features(x)
        features = hidden.flatten(1, -2).mean(dim=1) if hidden.dim() > 2 else hidden
        return TaskLosses(self.losses(features, y), features)


class Call(nn.Module):
    """A layer of its own out of a function (layer, x) and what it needs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def perceptron(*between):
    return nn.Sequential(nn.Linear(6, D), *between, nn.Tanh())


def images(*layers):
    """Convolutional layers, with the channels last in the end."""
    return nn.Sequential(*layers, Call(lambda _, x: x.movedim(1, -1)))


def at_the_losses(function):
    """A perceptron whose losses are ``function(model, features, y)``."""

    class Model(Regression):
        def losses(self, features, y):
            return function(self, features, y)

    return lambda: Model(perceptron())


def around(function, body=perceptron, features=D, **parts):
    """Features ``function(layer, x)``, which calls ``layer.body``."""
    return lambda: Regression(Call(function, body=body(), **parts), features)


def half_own(model, features, y):
    """Errors against targets of which half is the model's own prediction, without a gradient."""
    with torch.no_grad():
        own = model.heads(features)
    return (model.heads(features) - (y + own) / 2).square()


def switched(model, features, y):
    torch.set_grad_enabled(False)
    own = model.heads(features)
    torch.set_grad_enabled(True)
    return (model.heads(features) - (y + own) / 2).square()


def nested_switches(model, features, y):
    with torch.no_grad():
        constant = model.heads(features)
        with torch.enable_grad():
            prediction = model.heads(features)
    return (prediction - (y + constant) / 2).square()


def left_off(model, features, y):
    losses = (model.heads(features) - y).square()
    torch.set_grad_enabled(False)  # and left so
    return losses


def inference(model, features, y):
    with torch.inference_mode():
        constant = model.heads(features)
    return (model.heads(features) - (y + constant.clone()) / 2).square()


@torch.no_grad()
def teacher(layer, x):
    return layer.body(x)


def standardised(layer, x):
    x = layer.body(x)
    with torch.no_grad():
        mean, std = x.mean(dim=0), x.std(dim=0)
    return (x - mean) / std


def moving_average(layer, x):
    x = layer.body(x)
    with torch.no_grad():
        layer.average.mul_(0.9).add_(x.mean(dim=0), alpha=0.1)
    return x - layer.average


def plain_moving_average(layer, x):
    """The same in a list of tensors that are no buffers."""
    x = layer.body(x)
    layer.kept[0].mul_(0.9).add_(x.detach().mean(dim=0), alpha=0.1)
    layer.calls += 1
    return x * layer.kept[0] / layer.calls


def written_in_place(layer, x):
    x = layer.body(x) + 1
    with torch.no_grad():
        x.mul_(1.5)
    return x


def straight_through(layer, x):
    x = layer.body(x)
    return x + (x.sign() - x).detach()


def quantised_codes(layer, x):
    x = layer.body(x)
    with torch.no_grad():
        nearest = torch.cdist(x, layer.codes).argmin(dim=1)
    codes = layer.codes[nearest]
    return x + (codes - x).detach() + 0.1 * codes


def lazily_registered(layer, x):
    x = layer.body(x)
    if not hasattr(layer, "scale"):
        layer.register_buffer("scale", 1 / x.detach().std(dim=0))
    return x * layer.scale


def keeps(layer, x):
    layer.kept = layer.body(x)
    layer.history.append(layer.kept)
    layer.seen["last"] = layer.kept
    return layer.kept


def numbers_for_a_log(layer, x):
    x = layer.body(x)
    layer.log = float(x.detach().numpy().mean()) + x.mean().item()
    return x


def gradient_penalty(layer, x):
    x = x.clone().requires_grad_()
    hidden = layer.body(x)
    (slope,) = torch.autograd.grad(hidden.sum(), x, create_graph=True)
    return hidden * (1 + slope.square().mean())


def inner_step(layer, x):
    """A step of gradient descent within the model."""
    weight = layer.weight
    loss = (x @ weight).square().mean()
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    return torch.tanh(x @ (weight - 0.1 * slope))


def functional_inner(layer, x):
    parameters = {name: 1.1 * p for name, p in layer.body.named_parameters()}
    return torch.func.functional_call(layer.body, parameters, (x,))


class Cube(torch.autograd.Function):
    """Without forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


class WithForwardMode(Cube):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return Cube.forward(ctx, x)

    @staticmethod
    def jvp(ctx, x_t):
        (x,) = ctx.saved_tensors
        return 3 * x_t * x**2


def own_cube(_, x):
    return Cube.apply(x)


def clipped(layer, x):
    """Parameters that shrink with every forward pass."""
    with torch.no_grad():
        layer.body[0].weight.mul_(0.9).clamp_(-0.3, 0.3)
    return layer.body(x)


class Recurrent(nn.Module):
    def __init__(self, kind, packed=False, **options):
        super().__init__()
        self.cell, self.packed = kind(6, D, batch_first=True, **options), packed

    def forward(self, x):
        if self.packed:
            lengths = 1 + torch.arange(len(x)) % x.shape[1]
            x = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            return nn.utils.rnn.pad_packed_sequence(self.cell(x)[0], batch_first=True)[0]
        return self.cell(x)[0]


def own_cell(kind):
    def unrolled(layer, x):
        state = None
        for step in x.unbind(dim=1):
            state = layer.body(step, state)
        return state[0] if isinstance(state, tuple) else state

    return around(unrolled, lambda: kind(6, D))


def attention(layer, x):
    x = layer.body(x)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=layer.dropout, is_causal=layer.causal)
    return x + out.transpose(1, 2).flatten(2)


def attends(dropout=0.0, causal=False):
    return around(attention, qkv=nn.Linear(D, 3 * D), dropout=dropout, causal=causal)


def multihead(layer, x):
    x = layer.body(x)
    return layer.attention(x, x, x, need_weights=layer.weights)[0]


def encoder(**options):
    layer = nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True, **options)
    return Regression(nn.Sequential(nn.Linear(6, D), layer))


def encoder_decoder(layer, x):
    x = layer.body(x)
    return layer.transformer(x, x[:, :2])


def tokens(**options):
    return lambda: Regression(nn.Embedding(10, D, **options))


def tied_embedding(layer, x):
    x = F.embedding(x, layer.weight)
    return torch.tanh(x @ layer.weight.T) @ layer.weight


def old_weight_norm():
    layer = nn.utils.weight_norm(LINEAR())
    layer.weight = layer.weight.detach()  # PyTorch cannot copy it otherwise
    return layer


class TwoNames(Regression):
    """A backbone, and once more in pieces."""

    def __init__(self):
        super().__init__(BATCH_NORM())
        self.again = nn.Sequential(*self.body.children())

    def features(self, x):
        return self.again(x)


def twice(layer, x):
    return layer.body(layer.body(x))


def tied_weights():
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, D))
    body[2].weight = body[0].weight
    return Regression(body)


def frozen():
    model = Regression(perceptron(nn.BatchNorm1d(D), nn.Tanh(), nn.Linear(D, D)))
    model.body[0].requires_grad_(False)
    return model


def evaluation_mode(build):
    return lambda: build().eval()


def evaluated_within(layer, x):
    """A second pass, in evaluation mode, through the batch norm that the first has moved."""
    hidden = layer.body(x)
    layer.body.eval()
    with torch.no_grad():
        steady = layer.body(x)
    layer.body.train()
    return hidden - 0.5 * steady


def own_norm(layer, x):
    x = layer.body(x)
    mean, variance = x.mean(dim=0), x.var(dim=0)
    layer.average = 0.9 * layer.average + 0.1 * mean.detach()
    return (x - mean) / (variance + 1e-5).sqrt() + layer.average


class Dictionary(Regression):
    """Batches are dictionaries."""

    def forward(self, batch):
        return super().forward((batch["inputs"], batch["targets"]))


class Masked(Regression):
    def forward(self, batch):
        losses, features, *_ = super().forward(batch)
        mask = torch.arange(losses.numel()).reshape(losses.shape) % 4 > 0
        return TaskLosses(losses, features, mask=mask)


def compiled(part=False):
    model = Regression(perceptron())
    if part:
        model.body = torch.compile(model.body, backend="aot_eager")
        return model
    return torch.compile(model, backend="aot_eager")


def compiled_in_place():
    model = Regression(perceptron())
    model.compile(backend="aot_eager")
    return model


def checkpointed(rest):
    """``rest``: makes the part that is evaluated again in the backward pass."""

    def call(layer, x):
        return checkpoint(layer.rest, layer.body(x), use_reentrant=False)

    return lambda: around(call, rest=rest())()


def saved_elsewhere(layer, x):
    with torch.autograd.graph.save_on_cpu():
        return layer.body(x)


def mixture(layer, x):
    x = layer.body(x)
    gate, chosen = layer.gate(x).softmax(dim=1).max(dim=1)
    out = torch.zeros_like(x)
    for number, expert in enumerate(layer.experts):
        rows = (chosen == number).nonzero().flatten()
        out = out.index_add(0, rows, gate[rows, None] * expert(x[rows]))
    return out


def graph_convolution(layer, x):
    neighbours = torch.arange(len(x)).roll(1)
    return torch.zeros(len(x), D).scatter_add(0, neighbours[:, None].expand(-1, D), layer.body(x))


def hypernetwork(layer, x):
    weights = layer.body(x).unflatten(1, (D, 6))
    return torch.bmm(weights, x[:, :, None])[:, :, 0].tanh()


def vmapped(layer, x):
    return torch.vmap(lambda row: torch.tanh(layer.body(row)))(x)


def halved_gradients():
    body = perceptron()
    body[0].register_full_backward_hook(lambda module, of_x, of_y: (None,))
    body[1].register_full_backward_hook(lambda module, of_x, of_y: (of_x[0] / 2,))
    return body


def reversed_gradients(layer, x):
    x = layer.body(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: -gradient)
    return x


def decayed(model, features, y):
    penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    return (model.heads(features) - y).square() + 0.1 * penalty


def criticised(layer, x):
    """A pass through a part that is frozen meanwhile."""
    x = layer.body(x)
    layer.critic.requires_grad_(False)
    score = layer.critic(x)
    layer.critic.requires_grad_(True)
    return x * score + layer.critic(x.detach())


@torch.library.custom_op("auxilearn_tests::cube", mutates_args=())
def registered_cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


registered_cube.register_autograd(
    lambda ctx, grad: 3 * grad * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def adversarial(layer, x):
    """A step on the input, found without a graph."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(layer.body(x).square().sum(), x)
    return layer.body(x + 0.1 * slope)


def momentum_encoder(layer, x):
    for own, other in zip(layer.slow.parameters(), layer.body.parameters(), strict=True):
        own.data = 0.9 * own.data + 0.1 * other.data
    with torch.no_grad():
        key = layer.slow(x)
    return layer.body(x) - key


def clamped(layer, x):
    layer.body[0].weight.data.clamp_(-0.2, 0.2)
    return layer.body(x)


def in_a_closure():
    weight = nn.Parameter(torch.randn(6, D))
    return Call(lambda layer, x: torch.tanh(x @ weight) * layer.weight.mean(), weight=weight)


class Pair(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


def in_a_tuple():
    weight, bias = nn.Parameter(torch.randn(6, D)), nn.Parameter(torch.randn(D))
    call = Call(
        lambda layer, x: torch.tanh(x @ layer.pair.weight + layer.pair.bias),
        weight=weight,
        bias=bias,
    )
    call.pair = Pair(weight, bias)
    return call


def masked_weights():
    body = perceptron()
    body[0].weight.register_hook(lambda gradient: gradient * (torch.arange(6) % 2))
    return body


def weighed_by_kind(layer, x):
    """Looks for parameters by their class."""
    own = [v for v in layer.body[0]._parameters.values() if isinstance(v, nn.Parameter)]
    return layer.body(x) * sum(p.sum() for p in own)


def views(layer, x):
    """A view of a buffer that is written into."""
    x = layer.body(x)
    layer.statistics[0].mul_(0.9).add_(x.detach().mean(dim=0), alpha=0.1)
    return x * layer.statistics[0] + layer.first


def with_views():
    call = Call(views, body=perceptron(), statistics=torch.ones(2, D))
    call.first = call.statistics[0]
    return call


def taps():
    """A hook that keeps activations in a dictionary."""
    kept = {}
    body = perceptron()
    body[0].register_forward_hook(lambda module, args, output: kept.update(hidden=output))
    return Call(lambda layer, x: layer.body(x) + kept["hidden"], body=body)


def own_noise(layer, x):
    x = layer.body(x)
    x = x * torch.rand(x.shape, generator=layer.generator)
    layer.counted.update(["calls"])
    layer.record.average += float(x.mean().detach())
    layer.array += x.detach().numpy().mean()
    return x * layer.counted["calls"] * layer.record.average * layer.array[0] * random.random()


@dataclasses.dataclass
class Record:
    average: float = 1.0


def writes_into_its_batch(layer, x):
    x.mul_(0.5)
    return layer.body(x)


ROWS, SEQUENCE, IMAGES, TOKENS = (6,), (5, 6), (3, 6, 6), (4,)
LINEAR = lambda: nn.Linear(6, D)  # noqa: E731
BATCH_NORM = lambda: nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D), nn.Tanh())  # noqa: E731

MODELS = {
    # Without gradients
    "no_grad": (at_the_losses(half_own), ROWS),
    "set_grad_enabled": (at_the_losses(switched), ROWS),
    "enable_grad in no_grad": (at_the_losses(nested_switches), ROWS),
    "grad mode left off": (at_the_losses(left_off), ROWS),
    "inference_mode": (at_the_losses(inference), ROWS),
    "decorated method": (around(lambda layer, x: layer.body(x) - 0.5 * teacher(layer, x)), ROWS),
    "statistics": (around(standardised), ROWS),
    "moving average": (around(moving_average, average=torch.zeros(8)), ROWS),
    "own batch norm": (around(own_norm, average=torch.zeros(8)), ROWS),
    "written in place": (around(written_in_place), ROWS),
    "straight-through": (around(straight_through), ROWS),
    "codes": (lambda: around(quantised_codes, codes=nn.Parameter(torch.randn(5, D)))(), ROWS),
    "detach and data": (
        around(lambda m, x: m.body(x) * (m.body(x).data - m.body(x).detach() + 1)),
        ROWS,
    ),
    "evaluated within": (around(evaluated_within, BATCH_NORM), ROWS),
    # State
    "state in a list": (
        lambda: around(plain_moving_average, kept=[torch.ones(D)], calls=1)(),
        ROWS,
    ),
    "lazily registered": (around(lazily_registered), ROWS),
    "kept tensors": (lambda: around(keeps, history=[], seen={})(), ROWS),
    "numbers for a log": (around(numbers_for_a_log), ROWS),
    # Sharing
    "used twice": (
        around(twice, lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()), features=6),
        ROWS,
        6,
    ),
    "two names": (TwoNames, ROWS),
    "tied weights": (tied_weights, ROWS),
    "frozen": (frozen, ROWS),
    # Normalisation and parametrisation
    "batch norm": (lambda: Regression(BATCH_NORM()), ROWS),
    "batch norm, evaluation": (evaluation_mode(lambda: Regression(BATCH_NORM())), ROWS),
    "batch norm, not affine": (
        lambda: Regression(perceptron(nn.BatchNorm1d(D, affine=False))),
        ROWS,
    ),
    "batch norm, cumulative": (
        lambda: Regression(perceptron(nn.BatchNorm1d(D, momentum=None))),
        ROWS,
    ),
    "batch norm, no statistics": (
        lambda: Regression(perceptron(nn.BatchNorm1d(D, track_running_stats=False))),
        ROWS,
    ),
    "layer norm": (lambda: Regression(perceptron(nn.LayerNorm(D))), ROWS),
    "RMS norm": (lambda: Regression(perceptron(nn.RMSNorm(D))), ROWS),
    "group norm": (lambda: Regression(perceptron(nn.GroupNorm(2, D))), ROWS),
    "instance norm": (
        lambda: Regression(
            images(nn.Conv2d(3, D, 3), nn.InstanceNorm2d(D, affine=True), nn.Tanh())
        ),
        IMAGES,
    ),
    "weight norm": (
        lambda: Regression(nn.Sequential(parametrizations.weight_norm(LINEAR()), nn.Tanh())),
        ROWS,
    ),
    "old weight norm": (
        lambda: Regression(nn.Sequential(old_weight_norm(), nn.Tanh())),
        ROWS,
    ),
    "spectral norm": (
        lambda: Regression(nn.Sequential(parametrizations.spectral_norm(LINEAR()), nn.Tanh())),
        ROWS,
    ),
    "old spectral norm": (
        lambda: Regression(nn.Sequential(nn.utils.spectral_norm(LINEAR()), nn.Tanh())),
        ROWS,
    ),
    "orthogonal": (
        lambda: Regression(nn.Sequential(LINEAR(), parametrizations.orthogonal(nn.Linear(D, D)))),
        ROWS,
    ),
    # Dropout
    "dropout": (lambda: Regression(perceptron(nn.Dropout(0.5))), ROWS),
    "dropout, transposed": (
        around(lambda m, x: F.dropout(m.body(x).transpose(0, 1)).transpose(0, 1)),
        SEQUENCE,
    ),
    "dropout, channels last": (
        lambda: Regression(images(nn.Conv2d(3, D, 3), nn.Dropout(0.5))).to(
            memory_format=torch.channels_last
        ),
        IMAGES,
    ),
    "alpha dropout": (lambda: Regression(perceptron(nn.AlphaDropout(0.3))), ROWS),
    "dropout of channels": (
        lambda: Regression(images(nn.Conv2d(3, D, 3), nn.Dropout2d(0.3), nn.Tanh())),
        IMAGES,
    ),
    "noise": (around(lambda m, x: m.body(x) * (1 + torch.randn_like(x[:, :1]))), ROWS),
    "Gumbel softmax": (around(lambda m, x: F.gumbel_softmax(m.body(x), hard=True)), ROWS),
    # Convolutions
    "strided": (
        lambda: Regression(images(nn.Conv2d(3, D, 3, stride=2), nn.BatchNorm2d(D), nn.SiLU())),
        IMAGES,
    ),
    "depthwise": (
        lambda: Regression(images(nn.Conv2d(3, 6, 3, groups=3), nn.GELU(), nn.Conv2d(6, D, 1))),
        IMAGES,
    ),
    "transposed": (
        lambda: Regression(images(nn.ConvTranspose2d(3, D, 3, stride=2), nn.Tanh())),
        IMAGES,
    ),
    "one-dimensional": (
        lambda: Regression(images(nn.Conv1d(5, D, 3), nn.BatchNorm1d(D), nn.Tanh())),
        SEQUENCE,
    ),
    "max pooling": (lambda: Regression(images(nn.Conv2d(3, D, 3), nn.MaxPool2d(2))), IMAGES),
    "interpolated": (
        lambda: Regression(
            images(nn.Conv2d(3, D, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh())
        ),
        IMAGES,
    ),
    "ResNet": (
        lambda: Regression(torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=D)),
        (3, 16, 16),
    ),
    "MobileNet": (
        lambda: Regression(torchvision.models.mobilenet_v2(num_classes=D, width_mult=0.25)),
        (3, 16, 16),
    ),
    # Recurrent
    "LSTM": (lambda: Regression(Recurrent(nn.LSTM)), SEQUENCE),
    "GRU": (lambda: Regression(Recurrent(nn.GRU)), SEQUENCE),
    "RNN": (lambda: Regression(Recurrent(nn.RNN)), SEQUENCE),
    "LSTM, packed": (lambda: Regression(Recurrent(nn.LSTM, packed=True)), SEQUENCE),
    "GRU, packed": (lambda: Regression(Recurrent(nn.GRU, packed=True)), SEQUENCE),
    "LSTM of two layers": (
        lambda: Regression(Recurrent(nn.LSTM, num_layers=2, dropout=0.3)),
        SEQUENCE,
    ),
    "GRU, both ways": (
        lambda: Regression(Recurrent(nn.GRU, bidirectional=True), 2 * D),
        SEQUENCE,
        2 * D,
    ),
    "LSTM cell": (own_cell(nn.LSTMCell), SEQUENCE),
    "GRU cell": (own_cell(nn.GRUCell), SEQUENCE),
    # Attention
    "attention": (lambda: attends()(), SEQUENCE),
    "attention, causal": (lambda: attends(causal=True)(), SEQUENCE),
    "attention, dropout": (lambda: attends(dropout=0.2)(), SEQUENCE),
    "MultiheadAttention": (
        lambda: around(
            multihead, attention=nn.MultiheadAttention(D, 2, 0.1, batch_first=True), weights=False
        )(),
        SEQUENCE,
    ),
    "MultiheadAttention, weights": (
        lambda: around(multihead, attention=nn.MultiheadAttention(D, 2), weights=True)(),
        SEQUENCE,
    ),
    "MultiheadAttention, evaluation": (
        evaluation_mode(
            lambda: around(
                multihead, attention=nn.MultiheadAttention(D, 2, batch_first=True), weights=False
            )()
        ),
        SEQUENCE,
    ),
    "encoder": (encoder, SEQUENCE),
    "encoder, evaluation": (evaluation_mode(encoder), SEQUENCE),
    "encoder, norm first": (
        lambda: encoder(norm_first=True, activation="gelu", dropout=0.0),
        SEQUENCE,
    ),
    "Transformer": (
        lambda: around(
            encoder_decoder, transformer=nn.Transformer(D, 2, 1, 1, 2 * D, batch_first=True)
        )(),
        SEQUENCE,
    ),
    "ViT": (
        lambda: Regression(
            torchvision.models.VisionTransformer(16, 8, 1, 2, D, 2 * D, dropout=0.1, num_classes=D)
        ),
        (3, 16, 16),
    ),
    "Swin": (
        lambda: Regression(
            torchvision.models.SwinTransformer([2, 2], D, [2], [2], [2, 2], num_classes=D)
        ),
        (3, 8, 8),
    ),
    # Embeddings
    "embedding": (tokens(), TOKENS),
    "embedding with padding": (tokens(padding_idx=0), TOKENS),
    "embedding with max_norm": (tokens(max_norm=1.0), TOKENS),
    "embedding with max_norm, no forward mode": (
        lambda: Regression(nn.Sequential(nn.Embedding(10, D, max_norm=1.0), Call(own_cube))),
        TOKENS,
    ),
    "clipped parameters": (around(clipped), ROWS),
    "embedding scaled by frequency": (tokens(scale_grad_by_freq=True), TOKENS),
    "embedding tied": (
        lambda: Regression(Call(tied_embedding, weight=nn.Parameter(torch.randn(10, D) / 3))),
        TOKENS,
    ),
    "embedding bag of many": (
        lambda: Regression(Call(lambda m, x: m.table(x).sum(dim=1), table=nn.Embedding(10, D))),
        TOKENS,
    ),
    # Checkpointing and saved tensors
    "checkpointed": (checkpointed(lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh())), ROWS),
    "checkpointed batch norm": (
        checkpointed(lambda: nn.Sequential(nn.BatchNorm1d(D), nn.Tanh())),
        ROWS,
    ),
    "checkpointed dropout": (
        checkpointed(lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5))),
        ROWS,
    ),
    "checkpointed convolution": (
        lambda: Regression(
            images(
                nn.Conv2d(3, D, 3),
                Call(
                    lambda layer, x: checkpoint(layer.rest, x, use_reentrant=False),
                    rest=nn.Sequential(nn.Conv2d(D, D, 3), nn.BatchNorm2d(D), nn.Tanh()),
                ),
            )
        ),
        IMAGES,
    ),
    "checkpointed in pieces": (
        around(
            lambda m, x: checkpoint_sequential(m.body, 2, x, use_reentrant=False),
            lambda: nn.Sequential(*perceptron(), nn.Linear(D, D), nn.BatchNorm1d(D)),
        ),
        ROWS,
    ),
    "saved elsewhere": (around(saved_elsewhere, BATCH_NORM), ROWS),
    # Forward mode differentiates another function, or would
    "backward hook": (lambda: Regression(halved_gradients()), ROWS),
    "hook on a tensor": (around(reversed_gradients), ROWS),
    "penalty of what is trained": (at_the_losses(decayed), ROWS),
    "frozen meanwhile": (lambda: around(criticised, critic=nn.Linear(D, D))(), ROWS),
    "registered operator": (around(lambda m, x: registered_cube(m.body(x))), ROWS),
    "adversarial": (around(adversarial), ROWS),
    # Parameters by other ways
    "momentum encoder": (
        lambda: around(momentum_encoder, slow=perceptron().requires_grad_(False))(),
        ROWS,
    ),
    "clamped through data": (around(clamped), ROWS),
    "in a closure": (lambda: Regression(in_a_closure()), ROWS),
    "in a tuple": (lambda: Regression(in_a_tuple()), ROWS),
    "hook on a parameter": (lambda: Regression(masked_weights()), ROWS),
    "by their class": (around(weighed_by_kind), ROWS),
    # Further state
    "views of a buffer": (lambda: Regression(with_views()), ROWS),
    "state of every kind": (
        lambda: around(
            own_noise,
            generator=torch.Generator().manual_seed(3),
            counted=collections.Counter(),
            record=Record(),
            array=np.ones(2),
        )(),
        ROWS,
    ),
    "batch that is changed": (around(writes_into_its_batch), ROWS),
    # Derivatives within
    "gradient penalty": (around(gradient_penalty), ROWS),
    "inner step": (
        lambda: Regression(Call(inner_step, weight=nn.Parameter(torch.randn(6, D) / 3))),
        ROWS,
    ),
    "functional_call": (around(functional_inner), ROWS),
    "torch.func.grad": (
        around(lambda m, x: m.body(x) + torch.func.grad(lambda z: m.body(z).sum())(x)[:, :1]),
        ROWS,
    ),
    "torch.vmap": (around(vmapped, LINEAR), ROWS),
    "torch.func.jvp": (
        around(lambda m, x: torch.func.jvp(m.body, (x,), (torch.ones_like(x),))[1]),
        ROWS,
    ),
    "own function": (around(lambda m, x: Cube.apply(m.body(x))), ROWS),
    "own function with jvp": (around(lambda m, x: WithForwardMode.apply(m.body(x))), ROWS),
    # Structure
    "mixture of experts": (
        lambda: around(
            mixture, gate=nn.Linear(D, 2), experts=nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        )(),
        ROWS,
    ),
    "graph": (around(graph_convolution), ROWS),
    "hypernetwork": (around(hypernetwork, lambda: nn.Linear(6, 6 * D)), ROWS),
    "masked": (lambda: Masked(perceptron()), ROWS),
    "linear algebra": (
        around(lambda m, x: m.body(x) @ torch.linalg.inv(torch.eye(D) + m.body(x).T @ m.body(x))),
        ROWS,
    ),
    "cdist": (
        lambda: around(
            lambda m, x: torch.cdist(m.body(x), m.anchors), anchors=nn.Parameter(torch.randn(D, D))
        )(),
        ROWS,
    ),
    "complex numbers": (around(lambda m, x: torch.fft.fft(m.body(x)).abs()), ROWS),
    "sorted": (around(lambda m, x: m.body(x).sort(dim=1).values.cumsum(dim=1)), ROWS),
    "one task": (lambda: Regression(perceptron(), tasks=1), ROWS, D, 1),
    "one sample": (lambda: Regression(perceptron()), ROWS),
    "wrapped": (lambda: nn.DataParallel(Regression(perceptron())), ROWS),
    "compiled": (compiled, ROWS),
    "compiled part": (lambda: compiled(part=True), ROWS),
    "compiled in place": (compiled_in_place, ROWS),
    "dictionaries": (lambda: Dictionary(perceptron()), ROWS),
}
OTHER = "the model's forward-mode derivative is not that"
WARNED = {  # model: the operator without a forward-mode derivative
    "backward hook": OTHER,
    "hook on a tensor": OTHER,
    "penalty of what is trained": OTHER,
    "frozen meanwhile": OTHER,
    "registered operator": OTHER,
    "adversarial": OTHER,
    "weight norm": "_weight_norm_interface",
    "old weight norm": "_weight_norm_interface",
    "cdist": "_cdist_forward",
    "inner step": 'the model ("element 0 of tensors does not require grad',
    "torch.func.jvp": "torch.func.jvp inside the model",
    "embedding with max_norm, no forward mode": "Cube (a custom autograd.Function)",
    "embedding scaled by frequency": OTHER,
    "own function": "Cube (a custom autograd.Function)",
}


def data(shape, size, tasks=K):
    x = torch.randint(10, (size, *shape)) if shape is TOKENS else torch.randn(size, *shape)
    return x, torch.randn(size, tasks)


# --------------------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------------------


def scheduled(scheduler, outputs):
    losses, features, _, mask, _ = outputs
    weights = scheduler.schedule(features.detach(), losses.detach(), mask)
    if mask is None:
        return (weights * losses).sum() / len(losses)
    return sum((weights[m, k] * losses[m, k]).mean() for k, m in enumerate(mask.unbind(dim=1)))


def plain_operators(function):
    """What double backward needs: attention written out, nothing compiled."""

    def call(*args):
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            return function(*args)

    return call


@plain_operators
def by_hand(model, scheduler, train, dev, terms, scale):
    """- d/dphi <g, p> with p = sum_j (I - alpha H / scale)^j v / scale.

    ``train`` and ``dev``: lists of batches. Batch i sees the generator seeded with seed + i.
    """
    model = getattr(model, "_orig_mod", getattr(model, "module", model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    values = {p: p.detach().clone() for p in model.parameters()}
    seed, others = int(torch.randint(2**31, ())), random.getstate()

    def start():
        random.setstate(others)
        for parameter, value in values.items():
            parameter.data = value.clone()

    def outputs(number, batch):
        torch.manual_seed(seed + number)
        start()
        with torch.enable_grad():
            return copy.deepcopy(model, {id(p): p for p in values})(copy.deepcopy(batch))

    def gradient(value, inputs, direction=None, **more):
        return torch.autograd.grad(
            value, inputs, direction, allow_unused=True, materialize_grads=True, **more
        )

    losses = [target_mean(outputs(i, batch)) for i, batch in enumerate(dev)]
    v = gradient(sum(losses) / len(losses), parameters)
    losses = [scheduled(scheduler, outputs(i, batch)) for i, batch in enumerate(train)]
    g = gradient(sum(losses) / len(losses), parameters, create_graph=True)
    p = term = [t / s for t, s in zip(v, scale, strict=True)]
    for _ in range(terms):
        product = gradient(g, parameters, term, retain_graph=True)
        term = [t - ALPHA * h / s for t, h, s in zip(term, product, scale, strict=True)]
        p = [a + b for a, b in zip(p, term, strict=True)]
    found = [-t for t in gradient(g, list(scheduler.parameters()), p)]
    start()
    return found


def target_mean(outputs):
    losses, _, _, mask, _ = outputs
    return losses[:, 0].mean() if mask is None else losses[mask[:, 0], 0].mean()


# --------------------------------------------------------------------------------------------------
# The promise
# --------------------------------------------------------------------------------------------------


def relative_error(found, expected):
    found, expected = (torch.cat([t.flatten() for t in v]) for v in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def levels(model, scheduler, solver):
    lower = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    return Bilevel(model, scheduler, lower, solver=solver)


def state(model):
    """All attributes of all modules, with copies of the numbers."""
    return [
        copy.deepcopy({n: v for n, v in vars(m).items() if n not in ("_modules", "_parameters")})
        for m in model.modules()
        if not isinstance(m, torch._dynamo.eval_frame.OptimizedModule)
    ]


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, (bool, int, float, str)):
        assert one == other


@pytest.mark.parametrize("how", ["neumann", "identity", "preconditioned"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Full backward hook")
def test_the_hypergradient_is_that_of_double_backward(name, how):
    build, shape, features, tasks = (*MODELS[name], *(D, K)[len(MODELS[name]) - 2 :])
    model, scheduler = build(), MonoJoint(0, tasks, features)
    for parameter in scheduler.parameters():
        nn.init.normal_(parameter, std=0.5)
    train = [
        data(shape, 1 if name == "one sample" else 7, tasks)
        for _ in range(2 if how == "preconditioned" else 1)
    ]
    dev = [data(shape, 5, tasks)]
    if name == "dictionaries":
        train, dev = [[{"inputs": x, "targets": y} for x, y in part] for part in (train, dev)]
    learned = [p for p in model.parameters() if p.requires_grad]
    scale = [torch.ones_like(p) for p in learned]
    solver = identity() if how == "identity" else neumann(ALPHA, TERMS)
    if how == "preconditioned":
        scale = [1 + torch.rand_like(p) for p in learned]
        solver = preconditioned(solver, lambda: scale)
    terms = 0 if how == "identity" else TERMS
    torch.manual_seed(1)
    expected = by_hand(model, scheduler, train, dev, terms, scale)
    torch.set_grad_enabled(True)
    own, before = list(model.parameters()), state(model)
    values = [p.detach().clone() for p in own]
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, _, _ = levels(model, scheduler, solver).hypergradient(train, dev)
    said = [str(w.message) for w in said if "forward-mode derivative" in str(w.message)]
    assert [text.startswith(WARNED.get(name, "none")) for text in said] == [True] * (name in WARNED)
    assert relative_error(found, expected) < 1e-8
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, values, strict=True))
    assert_same(state(model), before)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["no_grad", "statistics", "own function", "encoder", "compiled"])
@pytest.mark.filterwarnings("ignore:.*forward-mode derivative")
def test_gradient_cosines_are_those_of_the_model_that_is_trained(name):
    build, shape = MODELS[name]
    model, batch = build(), data(shape, 7)
    inner = getattr(model, "_orig_mod", model)
    shared = [p for n, p in inner.named_parameters() if not n.startswith("heads.")]
    scheduler = GradientCosine(0, K)
    torch.manual_seed(1)
    with ModelFunction(model, shared) as function:
        found = scheduler._products(function, batch, one_process)
    torch.manual_seed(1)
    means = plain_operators(inner)(batch).losses.mean(dim=0)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(mean, shared, retain_graph=True)])
        for mean in means
    ]
    torch.testing.assert_close(found, torch.stack(rows) @ rows[0], rtol=1e-9, atol=1e-12)


def one_process(tensors, _):
    return tensors


def test_under_autocast():
    """In float32 with bfloat16 products, as the model is trained: 1 % of that double backward."""

    class Autocast(Regression):
        def forward(self, batch):
            with torch.autocast("cpu", torch.bfloat16):
                losses, features, *_ = super().forward(batch)
            return TaskLosses(losses.float(), features.float())

    model = Autocast(perceptron(nn.Linear(D, D), nn.LayerNorm(D))).float()
    scheduler = MonoJoint(0, K, D).float()
    train, dev = ([tuple(t.float() for t in data(ROWS, n))] for n in (16, 12))
    ones = [torch.ones_like(p) for p in model.parameters()]
    expected = by_hand(model, scheduler, train, dev, TERMS, ones)
    found, _, _ = levels(model, scheduler, neumann(ALPHA, TERMS)).hypergradient(train, dev)
    assert relative_error(found, expected) < 1e-2


def test_gradients_may_be_off_around_an_upper_step():
    model, scheduler = Regression(perceptron()), MonoJoint(0, K, D)
    both = levels(model, scheduler, neumann(ALPHA, TERMS))
    train, dev = [data(ROWS, 7)], [data(ROWS, 5)]
    expected, _, _ = both.hypergradient(train, dev)
    with torch.no_grad():
        found, _, _ = both.hypergradient(train, dev)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Relu6Sigmoid(nn.Module):
    """``nn.Hardsigmoid``, written out."""

    def forward(self, x):
        return (x + 3).clamp(0, 6) / 6


class Bags(nn.Module):
    """``nn.EmbeddingBag`` one bag after the other, in a loop."""

    def __init__(self, weight, mode="mean", padding=None, ends=False, weighted=False):
        super().__init__()
        self.weight, self.mode, self.padding = nn.Parameter(weight), mode, padding
        self.ends, self.weighted = ends, weighted

    def forward(self, tokens, offsets=None, per_sample_weights=None):
        if offsets is None:
            bags, factors = list(tokens), per_sample_weights
        else:
            ends = offsets.tolist() if self.ends else [*offsets.tolist(), len(tokens)]
            bags = [tokens[i:j] for i, j in zip(ends, ends[1:], strict=False)]
            factors = per_sample_weights
            if factors is not None:
                factors = [factors[i:j] for i, j in zip(ends, ends[1:], strict=False)]
        return torch.stack(
            [self.bag(bag, None if factors is None else factors[n]) for n, bag in enumerate(bags)]
        )

    def bag(self, tokens, factors):
        rows = self.weight[tokens] * (1 if factors is None else factors[:, None])
        rows = rows[tokens != (-1 if self.padding is None else self.padding)]
        if not len(rows):
            return torch.zeros(D)
        return {"mean": rows.mean(0), "sum": rows.sum(0), "max": rows.amax(0)}[self.mode]


def bagged(layer, x):
    """Bags of one to four tokens, and an empty one."""
    first = torch.cat([torch.tensor([0, 3, 3, 4]), 4 * torch.arange(4, len(x) + 1)])
    return layer.table(x.flatten(), first if layer.ends else first[:-1])


def weighted_bags(layer, x):
    return layer.table(x, per_sample_weights=torch.linspace(-1, 1, 10)[x])


def bags(shape=TOKENS, function=lambda m, x: m.table(x), parts=None, **options):
    def build():
        table = nn.EmbeddingBag(10, D, **options)
        mode, padding = options.get("mode", "mean"), options.get("padding_idx")
        twin = Bags(table.weight.detach().clone(), mode, padding, table.include_last_offset)
        return [
            Regression(Call(function, table=t, **copy.deepcopy(parts or {}))) for t in (table, twin)
        ]

    return build, shape


def squeezes():
    block = torchvision.ops.SqueezeExcitation(D, 2, nn.SiLU, nn.Hardsigmoid)
    twin = copy.deepcopy(block)
    twin.scale_activation = Relu6Sigmoid()
    first = nn.Conv2d(3, D, 3)
    return [
        Regression(images(copy.deepcopy(first), part, nn.Hardswish())) for part in (block, twin)
    ]


def sparse():
    table = nn.Embedding(10, D, sparse=True)
    return [
        Regression(table),
        Regression(nn.Embedding.from_pretrained(table.weight.data.clone(), False)),
    ]


def gates(function=None):
    first, last = LINEAR(), nn.Linear(D, D)
    return [
        Regression(nn.Sequential(copy.deepcopy(first), gate, copy.deepcopy(last)))
        for gate in (function or nn.Hardsigmoid(inplace=True), Relu6Sigmoid())
    ]


ONCE_IN_PYTORCH = {  # models with an operator that has no second derivative, and without it
    "Hardsigmoid": (gates, ROWS),
    "hardsigmoid": (lambda: gates(Call(lambda _, x: F.hardsigmoid(x))), ROWS),
    "squeeze and excitation": (squeezes, IMAGES),
    "sparse embedding": (sparse, TOKENS),
    "mean": bags(),
    "sum": bags(mode="sum"),
    "max": bags(mode="max"),
    "padding": bags(padding_idx=3),
    "padding, max": bags(padding_idx=3, mode="max"),
    "offsets": bags(function=bagged, parts={"ends": False}),
    "offsets, sum, padding": bags(
        function=bagged, parts={"ends": False}, mode="sum", padding_idx=0
    ),
    "offsets, max, last": bags(
        function=bagged, parts={"ends": True}, mode="max", include_last_offset=True
    ),
    "weights": bags(function=weighted_bags, mode="sum"),
}


@pytest.mark.parametrize("terms", [0, TERMS])
@pytest.mark.parametrize("name", ONCE_IN_PYTORCH)
def test_operators_without_second_derivative_are_written_out(name, terms):
    solver = neumann(ALPHA, terms) if terms else identity()
    build, shape = ONCE_IN_PYTORCH[name]
    (model, twin), scheduler = build(), MonoJoint(0, K, D)
    nn.init.normal_(scheduler.feature_sel.weight)
    twin.heads.load_state_dict(model.heads.state_dict())
    train, dev = [data(shape, 7)], [data(shape, 5)]
    torch.testing.assert_close(model(train[0]).losses, twin(train[0]).losses)
    ones = [torch.ones_like(p) for p in twin.parameters()]
    expected = by_hand(twin, scheduler, train, dev, terms, ones)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _, _ = levels(model, scheduler, solver).hypergradient(train, dev)
    assert relative_error(found, expected) < 1e-8


class ForwardModeAlone(WithForwardMode):
    """Without a second derivative."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return Cube.backward(ctx, grad)


def test_a_function_with_forward_mode_alone_is_exact_under_identity():
    model, scheduler = around(lambda m, x: ForwardModeAlone.apply(m.body(x)))(), MonoJoint(0, K, D)
    train, dev = [data(ROWS, 7)], [data(ROWS, 5)]
    with pytest.raises(Unsupported, match=r"ForwardModeAlone .*has no second.*identity\(\)"):
        levels(model, scheduler, neumann(ALPHA, TERMS)).hypergradient(train, dev)
    found, _, _ = levels(model, scheduler, identity()).hypergradient(train, dev)
    twin = around(lambda m, x: m.body(x) ** 3)()
    twin.load_state_dict(model.state_dict())
    ones = [torch.ones_like(p) for p in twin.parameters()]
    assert relative_error(found, by_hand(twin, scheduler, train, dev, 0, ones)) < 1e-8


class OnceDifferentiable(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return Cube.backward(ctx, grad)


def margins(model, features, y):
    of_target = F.multi_margin_loss(model.heads(features), y.argmax(dim=1), reduction="none")
    return of_target[:, None] * torch.ones(K)


def flash(layer, x):
    """A model that insists on fused attention."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attention(layer, x)


REFUSED = {
    "once differentiable": (
        around(lambda m, x: OnceDifferentiable.apply(m.body(x))),
        ROWS,
        "OnceDifferentiable",
    ),
    "embedding bag": (
        lambda: Regression(nn.EmbeddingBag(10, D, scale_grad_by_freq=True, mode="sum")),
        TOKENS,
        "_embedding_bag",
    ),
    "margins": (
        at_the_losses(margins),
        ROWS,
        "multi_margin_loss",
    ),
    "fused attention": (
        lambda: around(flash, qkv=nn.Linear(D, 3 * D), dropout=0.0, causal=False)(),
        SEQUENCE,
        "_scaled_dot_product_flash_attention",
    ),
    "TorchScript": (
        lambda: Regression(torch.jit.trace(perceptron(), torch.randn(2, 6))),
        ROWS,
        "body is a TorchScript module",
    ),
}


@pytest.mark.parametrize("solver", [identity(), neumann(ALPHA, TERMS)])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_has_no_derivative_is_refused_by_name(name, solver):
    build, shape, words = REFUSED[name]
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Unsupported, match=words):
        levels(model, MonoJoint(0, K, D), solver).hypergradient([data(shape, 7)], [data(shape, 5)])
    assert_same(model.state_dict(), before)


def test_three_derivatives_of_a_batch_norm_are_refused_and_two_are_exact():
    model, scheduler = around(gradient_penalty, BATCH_NORM)(), MonoJoint(0, K, D)
    train, dev = [data(ROWS, 7)], [data(ROWS, 5)]
    with pytest.raises(Unsupported, match=r"batch_norm does not support 3rd.*identity\(\)"):
        levels(model, scheduler, neumann(ALPHA, TERMS)).hypergradient(train, dev)
    found, _, _ = levels(model, scheduler, identity()).hypergradient(train, dev)
    ones = [torch.ones_like(p) for p in model.parameters()]
    assert relative_error(found, by_hand(model, scheduler, train, dev, 0, ones)) < 1e-8


class Hidden(nn.Module):
    """Layers in a list, and a tensor outside of the model, both trained."""

    def __init__(self):
        super().__init__()
        self.heads, self.layers = nn.Linear(D, K), [nn.Linear(6, D), nn.BatchNorm1d(D)]
        self.offsets = torch.zeros(K, requires_grad=True)

    def forward(self, batch):
        x, y = batch
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return TaskLosses((self.heads(x) + self.offsets - y).square(), x)


def test_all_that_the_lower_optimiser_holds_counts():
    model, scheduler = Hidden(), MonoJoint(0, K, D)
    learned = [p for part in (model.heads, *model.layers) for p in part.parameters()]
    learned.append(model.offsets)
    train, dev = [data(ROWS, 7)], [data(ROWS, 5)]
    both = Bilevel(model, scheduler, torch.optim.SGD(learned, 0.1), solver=neumann(ALPHA, TERMS))
    means = model.layers[1].running_mean.clone()
    found, _, _ = both.hypergradient(train, dev)
    assert torch.equal(model.layers[1].running_mean, means)
    v = p = torch.autograd.grad(model(dev[0]).losses[:, 0].mean(), learned)
    g = torch.autograd.grad(scheduled(scheduler, model(train[0])), learned, create_graph=True)
    for _ in range(TERMS):
        h = torch.autograd.grad(g, learned, v, retain_graph=True)
        v = [t - ALPHA * s for t, s in zip(v, h, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    expected = [-t for t in torch.autograd.grad(g, list(scheduler.parameters()), p)]
    assert relative_error(found, expected) < 1e-8


@pytest.mark.parametrize("before", ["losses of zero", "not finite", "other parameters"])
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_first_comparison_that_says_nothing_does_not_count(before):
    model, scheduler = Regression(halved_gradients()), MonoJoint(0, K, D)
    x, y = data(ROWS, 7)
    dev = [data(ROWS, 5)]
    first = {"losses of zero": (x, model.heads(model.body(x)).detach()), "not finite": (x, y / 0)}
    both = levels(model, scheduler, neumann(ALPHA, TERMS))
    if before == "other parameters":
        lower = torch.optim.SGD(model.heads.parameters(), 0.1)
        Bilevel(model, scheduler, lower, solver=identity()).hypergradient([(x, y)], dev)
    else:
        both.hypergradient([first[before]], dev)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="two backward passes take its place"):
        found, _, _ = both.hypergradient([(x, y)], dev)
    torch.manual_seed(1)
    ones = [torch.ones_like(p) for p in model.parameters()]
    expected = by_hand(model, scheduler, [(x, y)], dev, TERMS, ones)
    assert relative_error(found, expected) < 1e-8


def test_graphs_that_are_open_meanwhile_stay_valid():
    model, scheduler = Regression(perceptron()), MonoJoint(0, K, D)
    both, train, dev = levels(model, scheduler, neumann(ALPHA, 1)), data(ROWS, 7), data(ROWS, 5)
    loss = both.lower_loss(train)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    both.hypergradient([train], [dev])
    found = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Restless(nn.Module):
    """Changes flags, hooks and shapes of its own, and the flag of its batch."""

    def __init__(self):
        super().__init__()
        self.body, self.heads, self.calls = perceptron(), nn.Linear(D, K), 0
        self.register_buffer("bank", torch.ones(6, 2))

    def forward(self, batch):
        x, y = batch
        self.calls += 1
        self.body.requires_grad_(self.calls % 2 == 0)
        self.body.register_forward_hook(lambda module, args, output: 1.1 * output)
        self.bank.t_()
        features = self.body(x.requires_grad_())
        return TaskLosses((self.heads(features) - y).square(), features)


def test_flags_hooks_and_shapes_are_put_back():
    model, scheduler = Restless(), MonoJoint(0, K, D)
    both, train, dev = levels(model, scheduler, neumann(ALPHA, 1)), data(ROWS, 7), data(ROWS, 5)
    both.hypergradient([train, data(ROWS, 6)], [dev])
    assert all(p.requires_grad for p in model.parameters())
    assert not model.body._forward_hooks and model.calls == 0 and model.bank.shape == (6, 2)
    assert not train[0].requires_grad and not dev[0].requires_grad


def test_recurrent_layers_do_without_cudnn():
    """Its recurrent layers have no second derivative."""
    seen = []

    class Watch(Recurrent):
        def forward(self, x):
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(x)

    before = torch.backends.cudnn.enabled
    both = levels(Regression(Watch(nn.GRU)), MonoJoint(0, K, D), identity())
    both.hypergradient([data(SEQUENCE, 7)], [data(SEQUENCE, 5)])
    assert seen and not any(seen) and torch.backends.cudnn.enabled == before
