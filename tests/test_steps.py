"""The lower and the upper steps of ``Bilevel`` against steps written out by hand, in float64."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from auxilearn.bilevel import Bilevel
from auxilearn.hypernet import HyperNet, MonoJoint
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.optim import adam_scale
from auxilearn.weights import sample_weights
from tests import reference, small
from tests.small import SCHEDULERS, UPPER, Net, batch, drawn

pytestmark = pytest.mark.usefixtures("float64")

LOWER_LR = 0.05


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def same_bits(one, other):
    """Whether two state dicts of tensors are equal."""
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def adam(model, scheduler=None):
    parameters = [*model.parameters(), *(scheduler.parameters() if scheduler else ())]
    return torch.optim.Adam(parameters, lr=LOWER_LR, weight_decay=1e-2)


def momentum(model, scheduler=None):
    parameters = [*model.parameters(), *(scheduler.parameters() if scheduler else ())]
    return torch.optim.SGD(parameters, lr=LOWER_LR, momentum=0.9, weight_decay=1e-2)


def joint(lower=momentum, **options):
    """Both levels of JTDS on a new model; SGD above."""
    model, scheduler = Net(), drawn(MonoJoint(0, small.K, small.D))
    upper = torch.optim.SGD(scheduler.parameters(), lr=0.1, momentum=0.9)
    return Bilevel(model, scheduler, lower(model), upper, **options)


# --------------------------------------------------------------------------------------------------
# Lower steps
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [adam, momentum])
@pytest.mark.parametrize(("masked", "aux_weight"), [(False, 1.0), (True, 0.3), (True, 0.0)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_five_lower_steps_are_those_written_out(name, masked, aux_weight, optimizer):
    model, scheduler = Net(), drawn(SCHEDULERS[name]())
    mine = copy.deepcopy((model, scheduler))
    learned = name == "uncertainty"  # by the lower level, on the same loss
    bilevel = Bilevel(
        *mine, optimizer(mine[0], mine[1] if learned else None), aux_weight=aux_weight
    )
    lower = optimizer(model, scheduler if learned else None)
    phi = dict(scheduler.named_parameters())
    for _ in range(5):
        data = batch(masked=masked)
        found = bilevel.lower_step(data)

        outputs = model(data)
        odds = small.odds(scheduler)
        loss = small.by_hand(name, phi, outputs, aux_weight, odds)
        weights = small.weights_by_hand(name, phi, outputs, aux_weight, odds)
        lower.zero_grad()
        loss.backward()
        stepped = [p for group in lower.param_groups for p in group["params"]]
        norm = torch.cat([p.grad.flatten() for p in stepped if p.grad is not None]).norm()
        lower.step()

        close(found.loss, loss.detach())
        close(found.gradient_norm, norm)
        close(found.weights, weights)
        close(found.outputs.losses, outputs.losses.detach())  # raw
        assert not any(
            t.requires_grad
            for t in (found.loss, found.gradient_norm, found.weights, *found.outputs[:2])
        )
    close(mine[0].state_dict(), model.state_dict())  # batch norm's statistics included
    close(mine[1].state_dict(), scheduler.state_dict())
    assert learned or all(p.grad is None for p in mine[1].parameters())
    assert all(p.requires_grad for p in mine[1].parameters())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_weights_of_a_step_are_those_that_schedule_weights_tells(name, masked):
    model, scheduler, data = Net(), drawn(SCHEDULERS[name]()), batch(masked=masked)
    step = Bilevel(model, scheduler, momentum(model), aux_weight=0.3).lower_step(data)
    close(step.weights, sample_weights(scheduler, step.outputs, aux_weight=0.3))


def test_half_batches_accumulate_to_the_mean_of_their_gradients():
    bilevel, halves = joint(aux_weight=0.3), [batch(), batch()]
    hand, phi = copy.deepcopy(bilevel.model), dict(bilevel.scheduler.named_parameters())
    for half in halves:
        (bilevel.lower_loss(half) / 2).backward()
    losses = [small.by_hand("joint", phi, hand(half), 0.3) for half in halves]
    theta = list(hand.parameters())
    expected = torch.autograd.grad(sum(losses) / 2, theta)
    for parameter, gradient in zip(bilevel.model.parameters(), expected, strict=True):
        close(parameter.grad, gradient)
    assert all(p.grad is None and p.requires_grad for p in bilevel.scheduler.parameters())
    close(bilevel.model.state_dict(), hand.state_dict())  # a pass for each half, and no step


def test_half_batches_are_the_whole_one_where_samples_do_not_meet():
    """N-JTDS on a model without batch norm: the mean over samples is all that joins them."""
    model, scheduler, whole = Net(), drawn(SCHEDULERS["naive"]()), batch()
    model.norm = nn.Identity()
    bilevel = Bilevel(model, scheduler, momentum(model))
    for rows in (slice(0, 4), slice(4, 8)):
        half = small.Small(whole.x[rows], whole.labels[rows], whole.ids[rows], None)
        (bilevel.lower_loss(half) / 2).backward()
    accumulated = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    bilevel.lower_loss(whole).backward()
    for parameter, gradient in zip(model.parameters(), accumulated, strict=True):
        close(gradient, parameter.grad)


def test_a_scheduler_of_the_lower_level_gets_its_gradient_from_lower_loss():
    model, scheduler = Net(), drawn(SCHEDULERS["uncertainty"]())
    hand, data = copy.deepcopy(model), batch()
    Bilevel(model, scheduler, adam(model, scheduler)).lower_loss(data).backward()
    means = hand(data).losses.mean(dim=0).detach()
    expected = -torch.exp(-scheduler.log_variance.detach()) * means + 0.5
    close(scheduler.log_variance.grad, expected)


def test_gradients_that_the_caller_left_do_not_count():
    bilevel, data = joint(), batch()
    other = copy.deepcopy(bilevel)
    bilevel.lower_loss(batch()).backward()
    bilevel.model.load_state_dict(other.model.state_dict())  # its pass moved batch norm's
    assert bilevel.lower_step(data).loss == other.lower_step(data).loss
    assert same_bits(bilevel.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("optimizer", [adam, momentum])
def test_frozen_parameters_keep_their_values_and_their_momentum(optimizer):
    bilevel = joint(optimizer)
    bilevel.lower_step(batch())
    frozen = bilevel.model.body.weight.requires_grad_(False)
    value, state = frozen.clone(), copy.deepcopy(bilevel.lower.state[frozen])
    free = bilevel.model.heads.weight.clone()
    for _ in range(2):
        bilevel.lower_step(batch())
        bilevel.upper_step([batch()], [batch()])
    assert torch.equal(frozen, value)
    assert bilevel.lower.state[frozen].keys() == state.keys()
    for name, entry in state.items():
        assert torch.equal(bilevel.lower.state[frozen][name], entry), name
    assert not torch.equal(bilevel.model.heads.weight, free)


def test_the_average_over_processes_is_what_is_stepped_along():
    """And is asked for the gradients of a batch, with that batch."""
    asked = []

    def average(tensors, batches):
        asked.append(batches)
        return [3 * t for t in tensors]

    bilevel, data = joint(average=average), batch()
    model, scheduler = copy.deepcopy((bilevel.model, bilevel.scheduler))
    alone = Bilevel(model, scheduler, torch.optim.SGD(model.parameters(), lr=0.1))
    bilevel.lower = torch.optim.SGD(bilevel.model.parameters(), lr=0.1)
    start = {name: p.detach().clone() for name, p in alone.model.named_parameters()}
    norms = [one.lower_step(data).gradient_norm for one in (bilevel, alone)]
    assert len(asked) == 1 and asked[0][0] is data
    close(norms[0], 3 * norms[1])
    tripled = dict(bilevel.model.named_parameters())
    for name, p in alone.model.named_parameters():
        close(tripled[name].detach() - start[name], 3 * (p.detach() - start[name]))


# --------------------------------------------------------------------------------------------------
# The model's mode
# --------------------------------------------------------------------------------------------------


def steps_of(bilevel):
    return {
        "lower_step": lambda: bilevel.lower_step(batch()),
        "lower_loss": lambda: bilevel.lower_loss(batch()),
        "upper_step": lambda: bilevel.upper_step([batch()], [batch()]),
        "hypergradient": lambda: bilevel.hypergradient([batch()], [batch()]),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:the model is in evaluation mode")
def test_no_step_changes_a_mode(training):
    bilevel = joint()
    bilevel.model.train(training)
    bilevel.model.dropout.train(not training)  # of a part alone
    bilevel.scheduler.train(training)
    modules = [*bilevel.model.modules(), *bilevel.scheduler.modules()]
    before = [module.training for module in modules]
    statistics = bilevel.model.norm.running_mean.clone()
    for step in steps_of(bilevel).values():
        step()
        assert [module.training for module in modules] == before
    assert torch.equal(bilevel.model.norm.running_mean, statistics) == (not training)


@pytest.mark.parametrize("first", ["lower_step", "lower_loss", "upper_step", "hypergradient"])
def test_training_in_evaluation_mode_is_said_once(first):
    bilevel = joint()
    bilevel.model.eval()
    steps = steps_of(bilevel)
    with pytest.warns(UserWarning, match=r"evaluation mode.*call model\.train\(\)") as caught:
        steps[first]()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in steps.values():
            step()


def test_in_training_mode_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in steps_of(joint()).values():
            step()


# --------------------------------------------------------------------------------------------------
# Schedulers that look at development batches, and the state
# --------------------------------------------------------------------------------------------------


class Inner(HyperNet):
    """Weights per task that an optimiser of the scheduler's own learns ahead of lower steps."""

    needs_dev = True

    def __init__(self):
        super().__init__(0, small.K)
        self.logits = nn.Parameter(torch.zeros(small.K))
        self.inner = torch.optim.Adam([self.logits], lr=0.3)
        self.asked = []

    def before_lower_step(self, model, batch, dev_batches, average):
        self.asked.append((model, batch, dev_batches, average))
        with torch.no_grad():
            means = torch.stack([model(dev).losses.mean(dim=0) for dev in dev_batches])
        self.logits.grad = means.mean(dim=0) - 1
        self.inner.step()

    def scheduled_loss(self, losses, seen):
        return (torch.softmax(self.logits, dim=0) * losses).mean(dim=0).sum()

    def get_extra_state(self):
        return self.inner.state_dict()

    def set_extra_state(self, state):
        self.inner.load_state_dict(state)


def with_inner():
    torch.manual_seed(3)
    model = Net()
    return Bilevel(model, Inner(), momentum(model))


def test_a_scheduler_that_needs_development_batches_gets_them_ahead_of_the_step():
    bilevel, data, dev = with_inner(), batch(), [batch(), batch(3)]
    model, logits = copy.deepcopy(bilevel.model), torch.zeros(small.K)
    bilevel.lower_step(data, dev)
    ((given, *rest),) = bilevel.scheduler.asked
    assert given is bilevel.model and rest == [data, dev, bilevel.average]
    # The step uses what has been learned from them: a first step of Adam is its rate, by sign.
    with torch.no_grad():
        gradient = torch.stack([model(one).losses.mean(dim=0) for one in dev]).mean(dim=0) - 1
    logits -= 0.3 * gradient / (gradient.abs() + 1e-8)
    loss = (torch.softmax(logits, dim=0) * model(data).losses).mean(dim=0).sum()
    lower = momentum(model)
    loss.backward()
    lower.step()
    close(bilevel.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("missing", [(), (None,), ([],)])
def test_without_them_it_is_refused_before_anything_moves(missing):
    bilevel = with_inner()
    before = copy.deepcopy(bilevel.state_dict())
    with pytest.raises(ValueError, match=r"Inner needs development batches.*lower_step\(batch, "):
        bilevel.lower_step(batch(), *missing)
    assert same_bits(bilevel.model.state_dict(), before["model"])
    assert not bilevel.scheduler.asked


def saved(state):
    """What a file keeps of it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", ["inner optimiser", "two levels"])
def test_it_goes_on_to_the_same_bits(kind):
    def new():
        torch.manual_seed(3)
        return with_inner() if kind == "inner optimiser" else joint(adam, max_norm=1.0)

    def go_on(bilevel, data):
        for one in data:
            bilevel.lower_step(one, [one])
            if bilevel.upper:
                bilevel.upper_step([one], [one])

    data = [batch() for _ in range(6)]
    whole, first, second = new(), new(), new()
    go_on(whole, data)
    go_on(first, data[:3])
    go_on(second, [batch(), batch()])  # it has been elsewhere
    second.load_state_dict(saved(first.state_dict()))
    go_on(second, data[3:])
    assert same_bits(second.model.state_dict(), whole.model.state_dict())
    ours, theirs = (dict(one.scheduler.named_parameters()) for one in (second, whole))
    assert same_bits(ours, theirs)
    assert set(first.state_dict()) == {"model", "scheduler", "lower", "upper"}
    if kind == "two levels":  # and the momentum above
        (phi, *_), (other, *_) = second.upper.state, whole.upper.state
        ours, theirs = (one.upper.state[p] for one, p in ((second, phi), (whole, other)))
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


# --------------------------------------------------------------------------------------------------
# Upper steps
# --------------------------------------------------------------------------------------------------


def hypergradient_by_hand(name, model, scheduler, train, dev, alpha, aux_weight):
    """A flat vector; the model's statistics are put back."""
    before = copy.deepcopy(model.state_dict())
    phi, odds = dict(scheduler.named_parameters()), small.odds(scheduler)
    losses = [small.by_hand(name, phi, model(one), aux_weight, odds) for one in train]
    dev_losses = [small.column_means(o.losses, o.mask)[0] for o in map(model, dev)]
    theta = list(model.parameters())
    found = small.double_backward(losses, dev_losses, theta, list(phi.values()), alpha, terms=3)
    model.load_state_dict(before)
    mean = sum(loss.item() for loss in dev_losses) / len(dev_losses)
    return torch.cat([t.flatten() for t in found]), mean


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(("masked", "aux_weight"), [(False, 0.3), (True, 2.5)])
@pytest.mark.parametrize("name", UPPER)
def test_upper_steps_are_double_backward_clip_and_sgd(name, masked, aux_weight, clipped):
    """Two steps from two training and three development batches; clamp() follows each."""
    model, scheduler = Net(), drawn(SCHEDULERS[name]())
    lower = momentum(model)
    rate = {"linear": 3.0, "task": 0.5}.get(name, 0.1)  # so that clamp() has something to do
    upper = torch.optim.SGD(scheduler.parameters(), lr=rate, momentum=0.9, weight_decay=1e-2)
    max_norm = 1e-3 if clipped else None
    bilevel = Bilevel(model, scheduler, lower, upper, max_norm=max_norm, aux_weight=aux_weight)
    by_hand = reference.MomentumSGD(rate, 0.9, 1e-2)
    bounded = torch.cat(
        [
            torch.full((p.numel(),), name in ("linear", "task") and not key.endswith("bias"))
            for key, p in scheduler.named_parameters()
        ]
    )
    phi, bites = reference.flat(scheduler.parameters()), 0
    for _ in range(2):
        train, dev = [batch(masked=masked), batch(6)], [batch(), batch(5, masked), batch(4)]
        expected, dev_loss = hypergradient_by_hand(
            name, model, scheduler, train, dev, LOWER_LR, aux_weight
        )
        found = bilevel.upper_step(train, dev)
        assert found.dev_loss == pytest.approx(dev_loss, rel=1e-12)
        assert found.hypergradient_norm == pytest.approx(expected.norm().item(), rel=1e-9)
        assert found.hypergradient_norm > 1e-3  # there is something to clip
        assert found.solution.products == 3
        if clipped:  # PyTorch guards the division by 1e-6
            expected = expected * 1e-3 / (expected.norm() + 1e-6)
        phi = by_hand.step(phi, expected)
        bites += int((bounded & (phi < 0)).sum())
        phi = torch.where(bounded, phi.clamp(min=0), phi)
        close(reference.flat(scheduler.parameters()), phi, 1e-9)
    assert bites > 0 or clipped or not bounded.any()


def test_max_norm_clips_nothing_below():
    data = [batch() for _ in range(3)]
    one = joint(max_norm=1e-9)
    other = copy.deepcopy(one)
    other.max_norm = None
    for bilevel in (one, other):
        for d in data:
            bilevel.lower_step(d)
    assert same_bits(one.model.state_dict(), other.model.state_dict())


def test_clamp_follows_the_step_and_nothing_else():
    class Clamped(MonoJoint):
        def clamp(self):
            seen.append(reference.flat(self.parameters()))

    seen = []
    model, scheduler = Net(), drawn(Clamped(0, small.K, small.D))
    upper = torch.optim.SGD(scheduler.parameters(), lr=0.1)
    bilevel = Bilevel(model, scheduler, momentum(model), upper)
    before = reference.flat(scheduler.parameters())
    bilevel.lower_step(batch())
    gradient, *_ = bilevel.hypergradient([data := batch()], [dev := batch()])
    assert not seen
    bilevel.upper_step([data], [dev])
    assert len(seen) == 1
    close(seen[0], before - 0.1 * reference.flat(gradient))


def test_by_default_alpha_is_the_present_lower_learning_rate():
    bilevel = joint()
    decay = torch.optim.lr_scheduler.ExponentialLR(bilevel.lower, gamma=0.5)
    for rate in (LOWER_LR, LOWER_LR / 2, LOWER_LR / 4):
        train, dev = [batch()], [batch()]
        found, solution, _ = bilevel.hypergradient(train, dev)
        expected, _ = hypergradient_by_hand(
            "joint", bilevel.model, bilevel.scheduler, train, dev, rate, 1.0
        )
        close(reference.flat(found), expected, 1e-10)
        assert solution.products == 3
        explicit = Bilevel(bilevel.model, bilevel.scheduler, bilevel.lower, solver=neumann(rate, 3))
        same, *_ = explicit.hypergradient(train, dev)
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
        bilevel.lower_step(train[0])
        decay.step()


@pytest.mark.parametrize("where", ["train", "dev"])
def test_a_hypergradient_that_is_not_finite_moves_nothing(where):
    bilevel, good = joint(max_norm=1.0), batch()
    bilevel.upper_step([good], [good])  # so that there is momentum
    phi = reference.flat(bilevel.scheduler.parameters())
    state = copy.deepcopy(bilevel.upper.state_dict())
    bad = good._replace(x=good.x * torch.inf)
    batches = {"train": ([bad], [good]), "dev": ([good], [bad])}[where]
    result = bilevel.upper_step(*batches)
    assert result.hypergradient_norm is None
    assert torch.equal(reference.flat(bilevel.scheduler.parameters()), phi)
    for one, other in zip(
        bilevel.upper.state_dict()["state"].values(), state["state"].values(), strict=True
    ):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    assert bilevel.upper_step([good], [good]).hypergradient_norm is not None


@pytest.mark.parametrize("name", UPPER)
def test_an_upper_step_leaves_the_model_and_its_gradients_as_they_are(name):
    model, scheduler = Net(dropout=0.3), drawn(SCHEDULERS[name]())
    upper = torch.optim.SGD(scheduler.parameters(), lr=0.1)
    bilevel = Bilevel(model, scheduler, momentum(model), upper)
    bilevel.lower_step(batch())
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(bilevel.lower.state_dict()["state"])
    phi = reference.flat(scheduler.parameters())
    bilevel.upper_step([batch(), batch()], [batch()])
    assert same_bits(model.state_dict(), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    for number, entry in bilevel.lower.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], state[number]["momentum_buffer"])
    assert not torch.equal(reference.flat(scheduler.parameters()), phi)


class RunningMean(HyperNet):
    """W_ik = exp(t_k m_k), m a running mean of the losses, half of it this batch's."""

    def __init__(self, keeps):
        super().__init__(0, small.K)
        self.keeps = keeps
        self.t = nn.Parameter(torch.linspace(-1, 1, small.K))
        self.register_buffer("mean", torch.linspace(0, 1, small.K))

    def scheduled_loss(self, losses, seen):
        mean = (self.mean + seen.losses.mean(dim=0)) / 2
        if self.keeps:
            self.mean.copy_(mean)
        return (torch.exp(self.t * mean) * losses.mean(dim=0)).sum()


def test_a_schedulers_buffers_do_not_move_in_an_upper_step():
    """Every product sees them as they were: as with a scheduler that does not keep its mean."""
    model, train, dev = Net(), batch(), batch()
    found = []
    for keeps in (True, False):
        scheduler = RunningMean(keeps)
        upper = torch.optim.SGD(scheduler.parameters(), lr=0.1)
        bilevel = Bilevel(model, scheduler, momentum(model), upper, solver=neumann(0.1, 3))
        found.append(bilevel.hypergradient([train, dev], [dev])[0][0])
        bilevel.upper_step([train], [dev])
        assert torch.equal(scheduler.mean, torch.linspace(0, 1, small.K))
    assert found[0].norm() > 1e-3
    close(*found)
    scheduler = RunningMean(keeps=True)
    Bilevel(model, scheduler, momentum(model)).lower_step(train)
    assert not torch.equal(scheduler.mean, torch.linspace(0, 1, small.K))  # there they do


def test_what_an_upper_step_needs():
    bilevel = joint(solver=identity())
    for batches, name in ((([], [batch()]), "train_batches"), (([batch()], []), "dev_batches")):
        with pytest.raises(ValueError, match=f"{name} is empty: an upper step needs"):
            bilevel.upper_step(*batches)
    bilevel.upper = None
    with pytest.raises(ValueError, match="without an upper optimiser: give one as upper="):
        bilevel.upper_step([batch()], [batch()])


# --------------------------------------------------------------------------------------------------
# Optimisers that hold a part of the parameters
# --------------------------------------------------------------------------------------------------


def by_double_backward(bilevel, train, dev, theta, phi, alpha, terms):
    """The hypergradient in ``phi`` through the response of ``theta`` alone, one flat tensor."""
    outputs = bilevel.model(train)
    named = dict(bilevel.scheduler.named_parameters())
    losses = [small.by_hand("joint", named, outputs)]
    dev_losses = [bilevel.model(dev).losses[:, 0].mean()]
    return reference.flat(small.double_backward(losses, dev_losses, theta, phi, alpha, terms))


def test_what_the_lower_optimiser_does_not_hold_is_a_constant_to_the_hypergradient():
    bilevel, train, dev = joint(solver=neumann(0.02, 2)), batch(), batch()
    heads, phi = list(bilevel.model.heads.parameters()), list(bilevel.scheduler.parameters())
    bilevel.lower = torch.optim.SGD(heads, lr=LOWER_LR)
    found, *_ = bilevel.hypergradient([train], [dev])
    expected = by_double_backward(bilevel, train, dev, heads, phi, 0.02, 2)
    close(reference.flat(found), expected, 1e-10)

    for p in (*bilevel.model.body.parameters(), *bilevel.model.norm.parameters()):
        p.requires_grad_(False)
    same, *_ = bilevel.hypergradient([train], [dev])
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def test_adam_may_hold_a_part_of_the_model_in_another_order():
    """The response is that of its own second step: with both gradients G the moment is G^2 after
    it, of which .999 / 1.999 are the first one's."""
    bilevel, train, dev = joint(), batch(), batch()
    heads, phi = bilevel.model.heads, list(bilevel.scheduler.parameters())
    theta = [heads.weight, heads.bias]  # the model's order
    bilevel.lower = torch.optim.Adam([heads.bias, heads.weight], lr=LOWER_LR)
    bilevel.solver = preconditioned(identity(), lambda: adam_scale(bilevel.lower, theta))
    bilevel.lower_step(train)
    found, *_ = bilevel.hypergradient([train], [dev])
    v = torch.autograd.grad(bilevel.model(dev).losses[:, 0].mean(), theta)
    outputs = bilevel.model(train)
    loss = small.by_hand("joint", dict(bilevel.scheduler.named_parameters()), outputs)
    g = torch.autograd.grad(loss, theta, create_graph=True)
    sizes = [p.grad.abs() for p in theta]
    slopes = [(0.999 / 1.999 * size + 1e-8) / (size + 1e-8) ** 2 for size in sizes]
    inner = sum((a * b * slope).sum() for a, b, slope in zip(g, v, slopes, strict=True))
    close(reference.flat(found), -reference.flat(torch.autograd.grad(inner, phi)), 1e-10)

    everything = list(bilevel.model.parameters())
    bilevel.solver = preconditioned(identity(), lambda: [p.square() + 1 for p in everything])
    with pytest.raises(ValueError, match="a tensor for each parameter that the lower optimiser"):
        bilevel.upper_step([train], [dev])


def test_an_upper_optimiser_of_a_part_of_the_scheduler_is_clipped_by_that_part():
    bilevel, train, dev = joint(max_norm=1e-3, solver=neumann(0.02, 1)), batch(), batch()
    held = bilevel.scheduler.task_prior
    bilevel.upper = torch.optim.SGD([held], lr=0.1)
    theta = list(bilevel.model.parameters())
    expected = by_double_backward(bilevel, train, dev, theta, [held], 0.02, 1)
    before = {name: p.clone() for name, p in bilevel.scheduler.named_parameters()}
    result = bilevel.upper_step([train], [dev])
    assert result.hypergradient_norm == pytest.approx(expected.norm().item(), rel=1e-9)
    close(held, before["task_prior"] - 0.1 * 1e-3 * expected / expected.norm(), 1e-8)
    for name, p in bilevel.scheduler.named_parameters():
        assert name == "task_prior" or torch.equal(p, before[name])
