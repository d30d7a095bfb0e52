"""``Bilevel.hypergradient`` against double backward and closed forms, in float64."""

import copy
import warnings
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from auxilearn.baselines.combiners import (
    MonoLinearHyperNet,
    MonoNonlinearHyperNet,
    NonlinearHyperNet,
)
from auxilearn.bilevel import Bilevel
from auxilearn.hypernet import MonoJoint, Naive_hyper, TaskLosses, scheduled_loss
from auxilearn.implicit_diff import identity, neumann
from auxilearn.models import Batch, TaskModel
from auxilearn.second_order.double_backward import double_backward_operators, gradients
from auxilearn.second_order.products import Derivatives, FastOperators
from auxilearn.solvers import conjugate_gradient, exact
from auxilearn.stable import StableJoint
from tests import small

SAMPLES, TASKS, WIDTH = 12, 4, 6


pytestmark = pytest.mark.usefixtures("float64")


class SmallResNet(nn.Module):
    """Two residual blocks with batch norm, a dropout, a head of several widths."""

    def __init__(self, dropout=0.0, masked=False, width=WIDTH):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3 * TASKS)
        self.masked = masked

    def forward(self, batch):
        images, labels, sample_id = batch
        hidden = torch.relu(self.stem(images))
        hidden = torch.relu(hidden + self.block(hidden))
        features = self.dropout(hidden.mean(dim=(2, 3)))
        logits = self.head(features).reshape(-1, TASKS, 3)
        mask = None
        if self.masked:
            mask = torch.ones(labels.shape, dtype=torch.bool)
            mask[::2, 0] = False
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return TaskLosses(losses, features, sample_id, mask)


def batch(size=SAMPLES):
    return (
        torch.randn(size, 3, 5, 5),
        torch.randint(3, (size, TASKS)),
        torch.randperm(SAMPLES)[:size],
    )


def stable():
    """The stable form away from its start, where samples and auxiliary tasks count alike."""
    return small.drawn(StableJoint(0, TASKS, WIDTH))


SCHEDULERS = {
    "joint": lambda: MonoJoint(0, TASKS, WIDTH),
    "joint_stable": stable,
    "naive": lambda: Naive_hyper(SAMPLES, TASKS),
    "linear": lambda: MonoLinearHyperNet(0, TASKS),
    "task": lambda: MonoNonlinearHyperNet(0, TASKS, [5, 5], init_lower=0.0, init_upper=0.5),
    "task, dropout": lambda: NonlinearHyperNet(0, TASKS, [5, 5], dropout_rate=0.5),
}


class DoubleBackwardOperators:
    """``FastOperators`` by PyTorch's double backward, rebuilding the graph each time."""

    def __init__(self, problem):
        self.problem = problem

    def _product(self, vector, which):
        problem = self.problem

        def product(batch):
            with problem.evaluated(batch) as outputs:
                loss = scheduled_loss(problem.scheduler, outputs, problem.aux_weight)
                g = gradients(loss, problem.theta, create_graph=True)
                return double_backward_operators(g, problem.theta, problem.phi)[which](vector)

        return problem.training_mean(product)

    def hvp(self, u):
        return self._product(u, 0)

    def mixed(self, p):
        return self._product(p, 1)


def bilevel(model, scheduler, solver, **options):
    """Both levels, for their hypergradient alone."""
    lower = torch.optim.SGD(model.parameters(), 0.1)
    return Bilevel(model, scheduler, lower, solver=solver, **options)


def double_backward(model, scheduler, solver, train_batches, dev_batches, **options):
    with mock.patch("auxilearn.bilevel.FastOperators", DoubleBackwardOperators):
        levels = bilevel(model, scheduler, solver, **options)
        return levels.hypergradient(train_batches, dev_batches)


def average_of_one(tensors, _):
    return tensors


def derivatives(model, scheduler, train_batches):
    theta = [p for p in model.parameters() if p.requires_grad]
    phi = list(scheduler.parameters())
    return Derivatives(model, scheduler, theta, phi, train_batches, 1.0, average_of_one)


def relative_error(found, expected):
    found, expected = (torch.cat([t.flatten() for t in v]) for v in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("method", SCHEDULERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_forward_mode_equals_double_backward(method, masked, dropout):
    model, scheduler = SmallResNet(dropout, masked), SCHEDULERS[method]()
    train_batches, dev_batches = [batch(), batch(7)], [batch(5), batch(5), batch(5)]
    solver = neumann(alpha=0.05, terms=3)
    torch.manual_seed(1)
    fast, solution, dev_loss = bilevel(model, scheduler, solver).hypergradient(
        train_batches, dev_batches
    )
    torch.manual_seed(1)
    plain, plain_solution, plain_dev_loss = double_backward(
        model, scheduler, solver, train_batches, dev_batches
    )
    assert relative_error(fast, plain) < 1e-10
    assert solution.residual == pytest.approx(plain_solution.residual, rel=1e-10)
    assert dev_loss == pytest.approx(plain_dev_loss, rel=1e-12)
    assert sum(t.abs().sum() for t in plain) > 1e-8  # the comparison is not of zeros


@pytest.mark.parametrize(("bf16", "low", "high"), [(False, 1e-9, 1e-4), (True, 1e-5, 3e-3)])
def test_low_precision_is_off_by_its_rounding_only(bf16, low, high):
    """A smooth network against float64: float32, and a thousandth with ``--precision bf16``.

    (A network of ReLU has no such bound in any precision: what is zero but for rounding.)
    """
    smooth = [nn.BatchNorm2d(8), nn.Softplus()]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    backbone = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), *smooth),
        *(nn.Conv2d(8, 8, 3, stride=2, bias=False), *copy.deepcopy(smooth), *pool),
    )
    model, scheduler = TaskModel(backbone, 8, [2] * TASKS), MonoJoint(0, TASKS, 8)
    train_batch, dev_batch = (
        Batch(
            torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8),
            torch.randint(2, (size, TASKS)),
            sample_id=None,
            mask=None,
        )
        for size in (24, 16)
    )

    def hypergradient(model, scheduler):
        levels = bilevel(model, scheduler, neumann(alpha=0.05, terms=3))
        return levels.hypergradient([train_batch], [dev_batch])[0]

    expected = hypergradient(model, scheduler)
    model.bf16 = bf16
    model = model.float().to(memory_format=torch.channels_last)
    assert low < relative_error(hypergradient(model, scheduler.float()), expected) < high


class Convolutions(SmallResNet):
    """Every kind of convolution, among batch norms and a dropout."""

    def __init__(self):
        super().__init__(dropout=0.3)
        width = WIDTH
        self.stem[0] = nn.Conv2d(3, width, 3, padding="same", padding_mode="circular")
        self.kinds = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=3),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            weight_norm(nn.Conv2d(width, width, (1, 3), padding="same")),
            nn.BatchNorm2d(width),
            weight_norm(nn.Conv2d(width, width, 2, stride=(2, 1), bias=False)),
            nn.Conv2d(width, width, 1),
            nn.ReLU(inplace=True),
        )
        self.kinds[-2].weight = self.twice = nn.Parameter(torch.randn(width, width, 1, 1))
        self.frozen = nn.Conv2d(width, width, 1).requires_grad_(False)

    def forward(self, batch):
        images, *rest = batch
        hidden = self.frozen(self.kinds(torch.relu(self.stem(images))))
        hidden = nn.functional.conv2d(hidden, self.twice) + self.block(hidden)
        features = self.dropout(hidden.mean(dim=(2, 3)))
        losses = self.head(features).reshape(-1, TASKS, 3).square().mean(dim=2)
        return TaskLosses(losses, features)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_products_with_every_kind_of_convolution(batches, memory_format):
    model, scheduler = Convolutions().to(memory_format=memory_format), SCHEDULERS["joint"]()
    train_batches = [batch() for _ in range(batches)]
    for images, *_ in train_batches:
        images.data = images.to(memory_format=memory_format)
    problem = derivatives(model, scheduler, train_batches)
    fast, plain = FastOperators(problem), DoubleBackwardOperators(problem)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for _ in range(3):
        u = [torch.randn_like(t) for t in problem.theta]
        found, expected = (
            dict(zip(names, operators.hvp(u), strict=True)) for operators in (fast, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
        # A bias before a batch norm has no influence.
        assert all(t.any() for name, t in expected.items() if not name.endswith("bias"))


def test_plain_autograd_agrees_without_any_of_our_operators():
    """One batch, BatchNorm in train mode: written out with torch.autograd.grad alone."""
    model, scheduler = SmallResNet(), SCHEDULERS["joint"]()
    train, dev, alpha = batch(), batch(5), 0.03
    fast, *_ = bilevel(model, scheduler, neumann(alpha, 2)).hypergradient([train], [dev])

    theta = list(model.parameters())
    v = torch.autograd.grad(model(dev).losses[:, 0].mean(), theta, retain_graph=False)
    out = model(train)
    loss = (scheduler.schedule(out.features, out.losses) * out.losses).sum(dim=1).mean()
    g = torch.autograd.grad(loss, theta, create_graph=True)
    p, term = list(v), list(v)
    for _ in range(2):
        product = torch.autograd.grad(g, theta, term, retain_graph=True)
        term = [t - alpha * h for t, h in zip(term, product, strict=True)]
        p = [a + b for a, b in zip(p, term, strict=True)]
    expected = torch.autograd.grad(g, list(scheduler.parameters()), p)
    assert relative_error(fast, [-e for e in expected]) < 1e-10


@pytest.mark.parametrize("solver", [identity(), conjugate_gradient(30.0, 60), exact(1.0)])
def test_other_solvers_on_both_operators(solver):
    model, scheduler = SmallResNet(width=2), MonoJoint(0, TASKS, 2)
    arguments = [batch()], [batch(5)]
    fast, solution, _ = bilevel(model, scheduler, solver).hypergradient(*arguments)
    plain, *_ = double_backward(model, scheduler, solver, *arguments)
    assert relative_error(fast, plain) < 1e-8
    assert 0 <= solution.residual <= 1


def test_model_state_and_random_state_policy():
    """Running statistics, parameters and gradients stay; the generator advances by one draw."""
    model, scheduler = SmallResNet(dropout=0.5), SCHEDULERS["joint"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in scheduler.parameters()]
    torch.manual_seed(7)
    torch.randint(2**31, ())
    expected_state = torch.get_rng_state()
    torch.manual_seed(7)
    levels = bilevel(model, scheduler, neumann(0.01, 1))
    levels.hypergradient([batch_from_generator()], [batch_from_generator()])
    assert torch.equal(torch.get_rng_state(), expected_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in scheduler.parameters()] == flags
    assert model.training


def batch_from_generator():
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(SAMPLES, 3, 5, 5, generator=generator),
        torch.randint(3, (SAMPLES, TASKS), generator=generator),
        torch.arange(SAMPLES),
    )


class CubeWithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


class NoForwardMode(SmallResNet):
    def forward(self, batch):
        outputs = super().forward(batch)
        return outputs._replace(losses=CubeWithoutForwardMode.apply(outputs.losses))


def test_operator_without_forward_mode_falls_back_with_one_warning():
    model, scheduler = NoForwardMode(), SCHEDULERS["joint"]()
    levels = bilevel(model, scheduler, neumann(0.05, 2))
    arguments = [batch()], [batch(5)]
    with pytest.warns(UserWarning, match="autograd.Function.*no forward-mode derivative"):
        found, *_ = levels.hypergradient(*arguments)
    expected, *_ = double_backward(model, scheduler, neumann(0.05, 2), *arguments)
    assert relative_error(found, expected) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        levels.hypergradient(*arguments)


def test_finite_differences_through_a_fully_solved_lower_level():
    """d(dev loss of argmin f)/dphi, by solving the lower level again for every perturbed phi."""

    class Ridge(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, TASKS) * 0.1)

        def forward(self, batch):
            inputs, targets = batch
            # The ridge term makes the lower level strongly convex.
            penalty = 0.05 * self.weight.square().sum(dim=0)
            losses = (inputs @ self.weight.cumsum(dim=1) - targets).square() + penalty
            return TaskLosses(losses, inputs, torch.arange(len(inputs)))

    model, scheduler = Ridge(), Naive_hyper(9, TASKS)
    train = torch.randn(9, 5), torch.randn(9, TASKS)
    dev = torch.randn(6, 5), torch.randn(6, TASKS)

    def solved_dev_loss():
        # The lower level is quadratic in its weight: one Newton step from anywhere solves it.
        def objective(weight):
            losses = torch.func.functional_call(model, {"weight": weight}, (train,)).losses
            return scheduled_loss(scheduler, TaskLosses(losses, sample_id=torch.arange(9)))

        weight = model.weight.detach()
        slope = torch.func.grad(objective)(weight).flatten()
        curvature = torch.func.hessian(objective)(weight).reshape(len(slope), len(slope))
        with torch.no_grad():
            model.weight -= torch.linalg.solve(curvature, slope).reshape(weight.shape)
            return model(dev).losses[:, 0].mean().item()

    solved_dev_loss()
    (found,), solution, _ = bilevel(model, scheduler, exact()).hypergradient([train], [dev])
    assert solution.residual < 1e-10
    table, step = scheduler.weights.weight, 1e-4
    for i, k in [(0, 0), (3, 1), (8, 2), (5, 0)]:
        with torch.no_grad():
            table[i, k] += step
            above = solved_dev_loss()
            table[i, k] -= 2 * step
            below = solved_dev_loss()
            table[i, k] += step
        numeric = (above - below) / (2 * step)
        assert found[i, k].item() == pytest.approx(numeric, rel=1e-4, abs=1e-8)


def test_memory_of_graphs_is_not_kept_between_batches():
    """Only one batch's graph is alive at a time, however many batches and products there are."""
    model, scheduler = SmallResNet(), SCHEDULERS["joint"]()
    alive, highest = [], 0

    class Watch(SmallResNet):
        def forward(self, data):
            nonlocal highest
            outputs = super().forward(data)
            alive[:] = [r for r in alive if r() is not None]
            highest = max(highest, len(alive))
            alive.append(weakref.ref(outputs.losses))
            return outputs

    watch = Watch()
    watch.load_state_dict(model.state_dict())
    bilevel(watch, scheduler, neumann(0.01, 5)).hypergradient(
        [batch() for _ in range(6)], [batch(5) for _ in range(4)]
    )
    assert highest <= 1


def test_frozen_parameters_are_constants():
    model, scheduler = SmallResNet(), SCHEDULERS["joint"]()
    model.stem[0].weight.requires_grad_(False)
    found, *_ = bilevel(model, scheduler, neumann(0.05, 2)).hypergradient([batch()], [batch(5)])
    assert all(torch.isfinite(t).all() for t in found)


def test_the_exact_solver_refuses_a_model_that_is_too_large():
    with pytest.raises(ValueError, match="5 x 5 matrix.* at most 4 parameters"):
        exact(max_parameters=4)(lambda v: v, [torch.ones(2), torch.ones(3)])
