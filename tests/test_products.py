"""A task model as a function of its parameters, and its derivative in forward mode, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jvp
from torch.nn.utils.parametrize import register_parametrization

from auxilearn.bilevel import Bilevel
from auxilearn.hypernet import MonoJoint, TaskLosses
from auxilearn.implicit_diff import neumann
from auxilearn.second_order.batch_norm import SMALLEST_IN_FORWARD_MODE
from auxilearn.second_order.evaluation import ModelFunction
from tests import small
from tests.small import K, Net, batch

pytestmark = pytest.mark.usefixtures("float64")


class Tied(Net):
    """One weight in two places, and a parametrisation."""

    def __init__(self):
        super().__init__()
        first, second = nn.Linear(small.INPUT, small.INPUT), nn.Linear(small.INPUT, small.INPUT)
        second.weight = first.weight
        self.body = nn.Sequential(first, nn.Tanh(), second, self.body)
        register_parametrization(self.heads, "weight", nn.Softplus())


class OwnStatistics(Net):
    """Statistics of its own in a buffer: written in place, then used, then bound anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running", torch.ones(small.D))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)

    def forward(self, batch):
        hidden = self.body(batch.x)
        self.running.mul_(0.5).add_(hidden.square().mean(dim=0), alpha=0.5)
        self.steps += 1
        self.running = self.running + 0.1
        logits = self.heads(hidden / self.running.sqrt()).reshape(-1, K, small.CLASSES)
        losses = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        return TaskLosses(losses, hidden)


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.body.weight.requires_grad_(False)


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Wide(Net):
    """Activations of a size at which forward mode takes our batch norm."""

    def forward(self, batch):
        times = SMALLEST_IN_FORWARD_MODE // batch.x.numel() + 1
        hidden = self.norm(self.body(batch.x).unsqueeze(2).expand(-1, -1, times))
        features = torch.tanh(hidden.mean(dim=2))
        losses = self.heads(features).reshape(-1, K, small.CLASSES).square().mean(dim=2)
        return TaskLosses(losses, features)


MODELS = {
    "plain": Net,
    "dropout": lambda: Net(dropout=0.4),
    "evaluation mode": lambda: Net(dropout=0.4).eval(),
    "tied": Tied,
    "own statistics": OwnStatistics,
    "frozen": Frozen,
    "unused": Unused,
    "wide": Wide,
}


def by_backward_passes(model, data, direction):
    """(losses, D): the gradient of every loss times ``direction``, {name: tensor}."""
    losses = model(data).losses
    names, learned = zip(
        *((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True
    )
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    derivative = []
    for loss in losses.flatten():
        gradient = torch.autograd.grad(loss, learned, **options)
        pairs = zip(names, gradient, strict=True)
        derivative.append(sum((direction[name] * g).sum() for name, g in pairs))
    return losses.detach(), torch.stack(derivative).reshape(losses.shape)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_directional_derivative_is_the_gradients_times_the_direction(name, masked):
    model, data = MODELS[name](), batch(masked=masked)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    direction = {name: torch.randn_like(p) for name, p in learned.items()}
    own = [*model.parameters(), *model.buffers()]
    before = [t.clone() for t in own]
    torch.manual_seed(1)
    with ModelFunction(model, learned.values()) as function:
        outputs, derivative = function.directional_derivative(list(direction.values()), data)
    now = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(now, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    torch.manual_seed(1)
    losses, expected = by_backward_passes(copy.deepcopy(model), data, direction)
    torch.testing.assert_close(outputs.losses, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-11)
    assert derivative.abs().min() > 0
    assert not any(t is not None and t.requires_grad for t in (*outputs, derivative))
    if name == "plain":
        assert torch.equal(outputs.sample_id, data.ids)
        assert outputs.mask is data.mask or torch.equal(outputs.mask, data.mask)


def test_of_losses_that_depend_on_no_parameter_it_is_zero():
    class Constant(Net):
        def forward(self, batch):
            return TaskLosses(batch.x[:, :K].square(), super().forward(batch).features)

    model, data = Constant(), batch()
    theta = list(model.parameters())
    with ModelFunction(model, theta) as function:
        outputs, derivative = function.directional_derivative([p.detach() for p in theta], data)
    assert torch.equal(outputs.losses, data.x[:, :K].square())
    assert torch.equal(derivative, torch.zeros(8, K))


def test_only_the_parameters_that_are_kept_have_a_derivative():
    model, data = Net(), batch()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    kept = [direction[name] for name in ("heads.weight", "heads.bias")]
    with ModelFunction(model, model.heads.parameters()) as function:
        _, derivative = function.directional_derivative(kept, data)
    of_heads = {n: t if n.startswith("heads") else 0 * t for n, t in direction.items()}
    torch.testing.assert_close(derivative, by_backward_passes(model, data, of_heads)[1])


def test_a_model_is_put_back_whatever_happens_in_between():
    model = Tied()
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: t.clone() for name, t in own.items()}
    with (
        pytest.raises(ZeroDivisionError),
        ModelFunction(model, model.parameters()) as function,
        function.evaluated(batch()),
    ):
        for tensor in own.values():
            tensor.data.zero_()
        model.body[0].weight = nn.Parameter(torch.ones(1))
        raise ZeroDivisionError
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == own.keys() and all(now[name] is t for name, t in own.items())
    assert all(torch.equal(now[name], value) for name, value in values.items())


def test_forward_mode_within_the_model_falls_back_with_a_warning():
    class Sensitivity(Net):
        """Losses with the size of the features' derivative along the input."""

        def forward(self, batch):
            outputs = super().forward(batch)
            _, slope = jvp(self.body, (batch.x,), (torch.ones_like(batch.x),))
            return outputs._replace(losses=outputs.losses + slope.square().mean())

    model, scheduler = Sensitivity(), MonoJoint(0, K, small.D)
    levels = Bilevel(
        model, scheduler, torch.optim.SGD(model.parameters(), 0.1), solver=neumann(0.05, 2)
    )
    train, dev = batch(), batch(5)
    with pytest.warns(UserWarning, match=r"torch\.func\.jvp inside the model has no forward"):
        found, *_ = levels.hypergradient([train], [dev])
    losses = [small.by_hand("joint", dict(scheduler.named_parameters()), model(train))]
    dev_losses = [model(dev).losses[:, 0].mean()]
    theta, phi = list(model.parameters()), list(scheduler.parameters())
    expected = small.double_backward(losses, dev_losses, theta, phi, 0.05, terms=2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_draws_are_the_hosts_whatever_the_default_device():
    model, scheduler = small.Net(), MonoJoint(0, small.K, small.D)
    bilevel = Bilevel(model, scheduler, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = [small.batch()]
    expected, _, _ = bilevel.hypergradient(batches, batches)
    with torch.device("meta"):  # stands in for a GPU, of which numpy() is refused as well
        found, _, _ = bilevel.hypergradient(batches, batches)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
