"""What is refused of a person's own model, data and optimisers; steps that are not finite."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from auxilearn import (
    Bilevel,
    HyperNet,
    MonoJoint,
    Naive_hyper,
    StableJoint,
    TaskLosses,
    adam_scale,
    fill_missing,
    identity,
    neumann,
    preconditioned,
    scheduled_loss,
)
from auxilearn.errors import Unsupported
from auxilearn.hypernet import weighted_mean
from tests.test_reads import reads_counted

B, D, K = 9, 5, 3
pytestmark = pytest.mark.usefixtures("float64")


def same_bits(one, other):
    """Whether two nested states are equal."""
    (a, one_form), (b, other_form) = tree_flatten(one), tree_flatten(other)
    return one_form == other_form and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


class Model(nn.Module):
    """``output`` makes TaskLosses of the predictions, features and targets."""

    def __init__(self, output=None):
        super().__init__()
        self.body, self.heads = nn.Sequential(nn.Linear(4, D), nn.Tanh()), nn.Linear(D, K)
        self.output = output or (lambda p, f, y: TaskLosses((p - y).square(), f))

    def forward(self, batch):
        x, y = batch
        features = self.body(x)
        return self.output(self.heads(features), features, y)


def batch(rows=B):
    return torch.randn(rows, 4), torch.randn(rows, K)


def bilevel(output=None, scheduler=None, lower=None, solver=None):
    model, scheduler = Model(output), scheduler or MonoJoint(0, K, D)
    lower = (lower or (lambda p: torch.optim.SGD(p, lr=0.1)))(model.parameters())
    upper = torch.optim.SGD(scheduler.parameters(), lr=0.1)
    return Bilevel(model, scheduler, lower, upper, solver=solver or neumann(0.05, 1))


# ------------------------------------------------------------------ missing targets


def filled(predictions, features, y):
    targets, mask = fill_missing(y)
    return TaskLosses((predictions - targets).square(), features, mask=mask)


def poisoned(predictions, features, y):
    return TaskLosses((predictions - y).square(), features, mask=~y.isnan())


def with_missing():
    x, y = batch()
    y[0, 1] = y[2, 0] = torch.nan
    return x, y


def test_fill_missing():
    numbers, mask = fill_missing(torch.tensor([[1.5, torch.nan], [-2.0, torch.inf]]))
    assert numbers.tolist() == [[1.5, 0.0], [-2.0, torch.inf]]
    assert mask.tolist() == [[True, False], [True, True]]
    classes, mask = fill_missing(torch.tensor([3, -1, 0, -100]))
    assert classes.tolist() == [3, 0, 0, 0] and classes.dtype == torch.int64
    assert mask.tolist() == [True, False, True, False] and mask.dtype == torch.bool


def test_a_filled_target_costs_nothing():
    """The gradients are those of the loss that is written out without the missing entries."""
    levels, (x, y) = bilevel(filled), with_missing()
    result = levels.lower_step((x, y))
    assert torch.isfinite(result.gradient_norm)
    assert result.outputs.losses[0, 1].isfinite() and not result.weights[0, 1]
    upper = levels.upper_step([(x, y)], [(x, y)])
    z = y.clone()
    z[0, 1], z[2, 0] = 7.0, -3.0  # whatever stands in their places
    same = bilevel(lambda p, f, _: TaskLosses((p - z).square(), f, mask=~y.isnan()))
    same.load_state_dict(levels.state_dict())
    found, expected = (b.hypergradient([(x, y)], [(x, y)])[0] for b in (levels, same))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert upper.hypergradient_norm > 0


@pytest.mark.parametrize("scheduler", [MonoJoint, StableJoint])
def test_a_masked_target_that_is_not_filled_is_refused_with_the_cure(scheduler):
    levels, bad = bilevel(poisoned, scheduler(0, K, D)), with_missing()
    before = copy.deepcopy(levels.state_dict())
    cure = r"0 times NaN is NaN; fill these before the loss: .*auxilearn.fill_missing\(targets\)"
    for step in (
        lambda: levels.lower_step(bad),
        lambda: levels.upper_step([bad], [batch()]),
        lambda: levels.upper_step([batch()], [bad]),
        lambda: scheduled_loss(levels.scheduler, levels.model(bad)),
    ):
        with pytest.raises(ValueError, match=cure):
            step()
    assert same_bits(levels.state_dict(), before)


FILLED_TOO_LATE = {
    "torch.where": lambda e, mask: torch.where(mask, e, 0.0),
    "masked_fill": lambda e, mask: e.masked_fill(~mask, 0.0),
    "nan_to_num": lambda e, mask: e.nan_to_num(),
    "infinite": lambda e, mask: e.where(mask, torch.inf),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FILLED_TOO_LATE)
def test_a_target_that_is_filled_after_the_loss_is_refused_with_the_cure(name, fused):
    def late(predictions, features, y):
        mask = ~y.isnan()
        errors = FILLED_TOO_LATE[name]((predictions - y).square(), mask)
        return TaskLosses(errors, features, mask=mask)

    levels = bilevel(late, lower=lambda p: torch.optim.Adam(p, fused=fused))
    before = copy.deepcopy(levels.model.state_dict())
    for step in (
        lambda: levels.lower_step(with_missing()),
        lambda: levels.upper_step([with_missing()], [batch()]),
        lambda: levels.upper_step([batch()], [with_missing()]),
    ):
        with pytest.raises(ValueError, match=r"auxilearn.fill_missing\(targets\)"):
            step()
    assert same_bits(levels.model.state_dict(), before)


def test_a_step_that_was_not_taken_leaves_the_next_upper_step_alone():
    scale = []
    levels = bilevel(
        lower=torch.optim.Adam,
        solver=preconditioned(identity(), lambda: scale.extend(found()) or scale[-4:]),
    )

    def found():
        return adam_scale(levels.lower, levels.model.parameters())

    good = batch()
    levels.lower_step(good)
    levels.lower_step((good[0], good[1] * torch.nan))
    assert levels.upper_step([good], [good]).hypergradient_norm > 0
    assert all(d.isfinite().all() for d in scale)


class Closure(torch.optim.SGD):
    def step(self, closure):
        closure()


def without_target(predictions, features, y):
    mask = (torch.arange(K) > 0).expand_as(y)
    return TaskLosses((predictions - y).square(), features, mask=mask)


def other(cls=torch.optim.SGD, **options):
    return lambda p: cls(Model().parameters(), 0.1, **options)


MISTAKES = {
    "a function for a model": (
        lambda: Bilevel(print, MonoJoint(0, K, D), other()(0)),
        TypeError,
        "model must be an instance of Module, not builtin_function",
    ),
    "no scheduler": (
        lambda: Bilevel(Model(), nn.Linear(2, 2), other()(0)),
        TypeError,
        "scheduler must be an instance of HyperNet, not Linear",
    ),
    "an optimiser's class": (
        lambda: bilevel(lower=lambda p: torch.optim.SGD),
        TypeError,
        "lower must be an instance of Optimizer, not SGD",
    ),
    "parameters for an optimiser": (
        lambda: bilevel(lower=list),
        TypeError,
        "lower must be an instance of Optimizer, not list",
    ),
    "LBFGS": (
        lambda: bilevel(lower=torch.optim.LBFGS),
        TypeError,
        "LBFGS evaluates its loss by itself",
    ),
    "a closure of one's own": (
        lambda: bilevel(lower=lambda p: Closure(p, 0.1)),
        TypeError,
        "Closure evaluates its loss by itself",
    ),
    "maximize": (
        lambda: bilevel(lower=lambda p: torch.optim.SGD(p, 0.1, maximize=True)),
        ValueError,
        "lower maximises",
    ),
    "a solver that is not made": (
        lambda: bilevel(solver=neumann),
        TypeError,
        r"solver=neumann\(alpha=0.1\), not neumann",
    ),
    "a solver's name": (lambda: bilevel(solver="cg"), TypeError, "not 'cg'"),
    "a list of scales": (
        lambda: preconditioned(identity(), [torch.ones(2)]),
        TypeError,
        "scale must be a callable.* not list",
    ),
    "another model's optimiser, lower": (
        lambda: bilevel(lower=other()).lower_step(batch()),
        ValueError,
        "no gradient reaches the parameters of the lower optimiser",
    ),
    "another model's optimiser, upper": (
        lambda: bilevel(lower=other()).upper_step([batch()], [batch()]),
        ValueError,
        "depends on no parameter that the lower optimiser holds",
    ),
    "development data without the target": (
        lambda: bilevel(without_target).upper_step([batch()], [batch()]),
        ValueError,
        "no loss under the target task",
    ),
    "a DataLoader": (
        lambda: bilevel().upper_step(DataLoader([batch()]), [batch()]),
        TypeError,
        "train_batches must be a list of batches, not DataLoader",
    ),
    "nothing": (
        lambda: bilevel().upper_step([batch()], None),
        TypeError,
        "dev_batches must be a list of batches, not NoneType",
    ),
    "losses of integers": (
        lambda: bilevel(lambda p, f, y: TaskLosses(p.long(), f)).lower_step(batch()),
        ValueError,
        "losses must be real numbers, not torch.int64",
    ),
    "losses in a list": (
        lambda: bilevel(lambda p, f, y: TaskLosses([p], f)).lower_step(batch()),
        TypeError,
        "losses of TaskLosses must be a tensor, not list",
    ),
    "features of another precision": (
        lambda: bilevel(lambda p, f, y: TaskLosses(p, f.half())).lower_step(batch()),
        ValueError,
        r"features are torch.float16 .* MonoJoint torch.float64: .* features.float\(\)",
    ),
    "places that are no integers": (
        lambda: bilevel(
            lambda p, f, y: TaskLosses(p, sample_id=torch.arange(1.0 * B)), Naive_hyper(B, K)
        ).lower_step(batch()),
        ValueError,
        "sample_id must be integers, .* not torch.float64",
    ),
    "a model for its parameters": (
        lambda: adam_scale(other(torch.optim.Adam)(0), Model()),
        TypeError,
        r"give model.parameters\(\)",
    ),
    "named parameters": (
        lambda: adam_scale(other(torch.optim.Adam)(0), Model().named_parameters()),
        TypeError,
        "takes real tensors, such as model.parameters.*, not tuple",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line(name):
    make, kind, words = MISTAKES[name]
    with pytest.raises(kind, match=words) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_optimisers_in_the_wrong_order():
    model, scheduler = Model(), MonoJoint(0, K, D)
    of_model, of_scheduler = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, scheduler))
    with pytest.raises(ValueError, match=r"the order is Bilevel\(model, scheduler, lower, upper\)"):
        Bilevel(model, scheduler, of_scheduler, of_model)


def test_complex_parameters_are_refused():
    levels = bilevel()
    levels.model.filter = nn.Parameter(torch.randn(2, dtype=torch.complex128))
    levels.lower.add_param_group({"params": [levels.model.filter]})
    with pytest.raises(Unsupported, match=r"complex parameters: .*view_as_complex\(\)"):
        levels.hypergradient([batch()], [batch()])


def test_masked_nan_without_a_gradient_does_no_harm():
    """A model that writes NaN where nothing is known, after the loss."""

    def marked(predictions, features, y):
        outputs = filled(predictions, features, y)
        return outputs._replace(losses=outputs.losses.masked_fill(~outputs.mask, torch.nan))

    levels, same, data = bilevel(marked), bilevel(filled), with_missing()
    same.load_state_dict(levels.state_dict())
    for one in (levels, same):
        one.lower_step(data)
        one.upper_step([data], [data])
    assert same_bits(levels.state_dict(), same.state_dict())


def test_forward_mode_gives_masked_entries_no_weight():
    """The identity solver takes no backward pass through the training losses."""
    data, dev = with_missing(), batch()
    levels, same = bilevel(poisoned, solver=identity()), bilevel(filled, solver=identity())
    same.load_state_dict(levels.state_dict())
    found, expected = (b.hypergradient([data], [dev])[0] for b in (levels, same))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ steps that are not finite

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_lower_step_that_is_not_finite_is_not_taken(name, first, bad, monkeypatch):
    levels, good = bilevel(lower=OPTIMIZERS[name]), batch()
    if not first:
        levels.lower_step(good)
    before = copy.deepcopy(levels.state_dict())
    x, y = batch()
    y[3, 2] = bad
    with reads_counted(monkeypatch) as reads:
        result = levels.lower_step((x, y))
    assert reads.count == (0 if "fused" in name else 1)
    assert not torch.isfinite(result.gradient_norm)
    if first:  # a fused optimiser makes its state all the same, at zero
        assert same_bits(levels.model.state_dict(), before["model"])
    else:
        assert same_bits(levels.state_dict(), before)
    untouched = bilevel(lower=OPTIMIZERS[name])
    untouched.load_state_dict(before)
    for one in (levels, untouched):
        one.lower_step(good)
        one.lower_step(good)
    assert same_bits(levels.state_dict(), untouched.state_dict())
    assert not same_bits(levels.state_dict(), before)
    assert not hasattr(levels.lower, "found_inf")


def test_an_upper_step_that_is_not_finite_is_not_taken():
    levels = bilevel(solver=neumann(1e200, 3))
    before = copy.deepcopy(levels.state_dict())
    result = levels.upper_step([batch()], [batch()])
    assert result.hypergradient_norm is None
    assert same_bits(levels.state_dict(), before)


# ------------------------------------------------------------------ batches, shapes, gradients

ONE_BATCH = r"train_batches must be a list of batches, not one batch \(.*\): give \[batch\]"


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (batch, ONE_BATCH),
        (lambda: [torch.randn(B, 4), torch.zeros(B).long()], ONE_BATCH),  # of a DataLoader
        (lambda: torch.randn(B, 4), ONE_BATCH),
        (lambda: {"x": torch.randn(B, 4)}, ONE_BATCH),
        (lambda: TaskLosses(torch.randn(B, K)), ONE_BATCH),  # any NamedTuple
        (lambda: 3, ONE_BATCH),
        (
            lambda: (batch() for _ in range(2)),
            r"not generator, .* no end: give \[next\(batches\)\]",
        ),
        (lambda: iter([batch()]), "not list_iterator, which can be read once"),
    ],
)
def test_something_else_than_a_list_of_batches(batches, message):
    levels = bilevel()
    for call in (levels.upper_step, levels.hypergradient):
        with pytest.raises(TypeError, match=message):
            call(batches(), [batch()])
        with pytest.raises(TypeError, match=message.replace("train", "dev")):
            call([batch()], batches())


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda p, f, y: ((p - y).square(), f), TypeError, "must return TaskLosses, not tuple"),
        (
            lambda p, f, y: TaskLosses((p - y)[:, 0], f),
            ValueError,
            r"losses must be \(B, 3\).*\(9,\)",
        ),
        (lambda p, f, y: TaskLosses((p - y)[:, :1], f), ValueError, r"be \(B, 3\).*\(9, 1\)"),
        (lambda p, f, y: TaskLosses(p - y, f[:, None]), ValueError, r"be \(9, d\).*\(9, 1, 5\)"),
        (
            lambda p, f, y: TaskLosses(p - y, f[:, :4]),
            ValueError,
            r"features must be \(B, 5\), the feature_dim of MonoJoint, not \(9, 4\)",
        ),
        (lambda p, f, y: TaskLosses(p - y, f, mask=y), ValueError, r"mask must be bool \(9, 3\)"),
    ],
)
def test_wrong_outputs_are_named_on_both_levels(output, error, message):
    levels = bilevel(output)
    for step in (
        lambda: levels.lower_step(batch()),
        lambda: levels.upper_step([batch()], [batch()]),
    ):
        with pytest.raises(error, match=message):
            step()


def test_an_empty_batch_is_refused_on_both_levels():
    levels = bilevel()
    for step in (
        lambda: levels.lower_step(batch(0)),
        lambda: levels.upper_step([batch()], [batch(0)]),
        lambda: levels.upper_step([batch(0)], [batch()]),
    ):
        with pytest.raises(ValueError, match=r"not shape \(0, 3\): the batch is empty"):
            step()


def test_weights_that_broadcast_are_refused():
    features, losses = torch.randn(B, 1, D), torch.rand(B, K)
    with pytest.raises(
        ValueError, match=r"weights must be \(B, K\) like losses, \(9, 3\), not \(9, 9, 3\)"
    ):
        MonoJoint(0, K, D)(features, losses)
    with pytest.raises(ValueError, match=r"not \(9, 1, 3\)"):
        Naive_hyper(B, K)(losses, torch.arange(B)[:, None])
    with pytest.raises(ValueError, match=r"not \(3,\)"):
        weighted_mean(torch.ones(K), losses)


class Unreduced(HyperNet):
    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        return losses.mean(dim=0)


def test_a_scheduler_that_returns_no_scalar_is_named():
    outputs = TaskLosses(torch.rand(B, K))
    with pytest.raises(ValueError, match=r"Unreduced.scheduled_loss must return a scalar, not .*3"):
        scheduled_loss(Unreduced(0, K), outputs)


class Number(MonoJoint):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.balance = 0.5


class Layer(MonoJoint):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.balance = nn.Linear(2, 2)


class Buffer(MonoJoint):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("balance", torch.zeros(K))


class Function(MonoJoint):
    def balance(self):
        return 0.5

    def clamp(self):
        assert self.balance() == 0.5


class Property(MonoJoint):
    @property
    def balance(self):
        return 0.5


@pytest.mark.parametrize("kind", [Number, Layer, Buffer, Function, Property])
def test_a_scheduler_may_call_something_else_balance(kind):
    """Only a ``Balance`` is taught: the step is that of a scheduler without the attribute."""
    steps = []
    for scheduler in (MonoJoint(0, K, D), kind(0, K, D)):
        for parameter in scheduler.parameters():
            nn.init.constant_(parameter, 0.3)
        torch.manual_seed(0)
        levels = bilevel(scheduler=scheduler)
        norm = levels.upper_step([batch()], [batch()]).hypergradient_norm
        steps.append((norm, scheduler.feature_sel.weight.detach(), scheduler.loss_w.detach()))
    assert same_bits(*steps) and steps[0][0] > 0


def test_nothing_to_learn_is_named():
    levels = bilevel()
    levels.scheduler.requires_grad_(False)
    with pytest.raises(ValueError, match="upper optimiser holds no parameter of the scheduler"):
        levels.upper_step([batch()], [batch()])
    levels = bilevel()
    levels.model.requires_grad_(False)
    for step in (
        lambda: levels.lower_step(batch()),
        lambda: levels.upper_step([batch()], [batch()]),
    ):
        with pytest.raises(ValueError, match="nothing to train: all parameters .* frozen"):
            step()


def test_losses_that_no_gradient_reaches_are_named():
    levels = bilevel(lambda p, f, y: TaskLosses((p.detach() - y).square(), f))
    with pytest.raises(ValueError, match="no gradient reaches .* the losses have no graph"):
        levels.lower_step(batch())
    levels = bilevel(lower=lambda p: torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1))
    with pytest.raises(ValueError, match="no gradient reaches .* the losses depend on others"):
        levels.lower_step(batch())


class AsTheyCome(HyperNet):
    """Weights from all that it sees, without a detach of its own."""

    def __init__(self):
        super().__init__(0, K)
        self.a = nn.Parameter(torch.randn(D, K))
        self.u = nn.Parameter(torch.randn(K))

    def scheduled_loss(self, losses, seen):
        weights = torch.sigmoid(seen.features @ self.a + self.u * seen.losses * seen.labels)
        return (weights * losses).mean(dim=0).sum()


@pytest.mark.parametrize("terms", [0, 2])
def test_what_a_scheduler_looks_at_reaches_it_detached(terms):
    """The hypergradient, written out with the schedule as a constant of the model."""

    def output(p, f, y):
        return TaskLosses((p - y).square(), f, labels=p)

    levels = bilevel(output, AsTheyCome(), solver=neumann(0.05, terms))
    train, dev = batch(), batch()
    found, *_ = levels.hypergradient([train], [dev])
    model, net = levels.model, levels.scheduler
    theta = list(model.parameters())
    p, f, y = model.heads(model.body(train[0])), model.body(train[0]), train[1]
    losses = (p - y).square()
    weights = torch.sigmoid(f.detach() @ net.a + net.u * losses.detach() * p.detach())
    g = torch.autograd.grad((weights * losses).mean(dim=0).sum(), theta, create_graph=True)
    v = torch.autograd.grad((model(dev).losses[:, 0]).mean(), theta)
    total, term = list(v), list(v)
    for _ in range(terms):
        products = torch.autograd.grad(g, theta, term, retain_graph=True)
        term = [t - 0.05 * h for t, h in zip(term, products, strict=True)]
        total = [a + b for a, b in zip(total, term, strict=True)]
    expected = [-e for e in torch.autograd.grad(g, [net.a, net.u], total)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_nothing_warns_of_a_sound_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        levels = bilevel()
        levels.lower_step(batch())
        levels.upper_step([batch()], [batch()])
