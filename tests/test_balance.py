"""The target's weight in closed form: its terms, its odds, how upper steps teach it; float64."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from auxilearn import balance as constants
from auxilearn.balance import FASTEST, LATE, LIMIT, START, Balance
from auxilearn.bilevel import Bilevel
from auxilearn.data.split import load_split
from auxilearn.hypernet import TaskLosses
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.optim import adam_scale
from auxilearn.run.build import build, label_ratio
from auxilearn.run.config import resolve
from auxilearn.second_order.products import Derivatives
from auxilearn.stable import StableJoint
from tests import reference, small
from tests.small import D, K, Net, batch, drawn

pytestmark = pytest.mark.usefixtures("float64")

CONSTANTS = {"prior": START, "late": LATE, "fastest": FASTEST, "limit": LIMIT}


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=tolerance, atol=tolerance
    )


# --------------------------------------------------------------------------------------------------
# c and N
# --------------------------------------------------------------------------------------------------


def levels(aux_weight=1.0, adam=False, **options):
    """Both levels of the stable form, away from its start, after two lower steps."""
    model, scheduler = Net(), drawn(StableJoint(0, K, D))
    theta = list(model.parameters())
    kind = torch.optim.Adam if adam else torch.optim.SGD
    lower = kind(theta, lr=0.01)
    solver = identity()
    if adam:
        solver = preconditioned(solver, lambda: adam_scale(lower, model.parameters()))
    upper = torch.optim.SGD(scheduler.parameters(), lr=0.1)
    options = {"solver": solver, "aux_weight": aux_weight, **options}
    bilevel = Bilevel(model, scheduler, lower, upper, **options)
    for _ in range(2):
        bilevel.lower_step(batch())
    return bilevel


def terms_of(bilevel, train, dev):
    """c / |v| and N as an upper step makes them."""
    *_, seen = bilevel._hypergradient(train, dev, balanced=True)
    return seen


def expected_terms(bilevel, train, dev, scale):
    """By plain autograd; the model's statistics are put back."""
    model, scheduler = bilevel.model, bilevel.scheduler
    before, theta = copy.deepcopy(model.state_dict()), list(bilevel.model.parameters())
    losses = [small.column_means(o.losses, o.mask)[0] for o in map(model, dev)]
    v = torch.autograd.grad(
        sum(losses) / len(losses), theta, allow_unused=True, materialize_grads=True
    )
    phi = {name: p.detach() for name, p in scheduler.named_parameters()}
    odds = small.odds(scheduler)
    found = small.target_and_rest(phi, model(train), odds, theta, v, scale)
    model.load_state_dict(before)
    return found


@pytest.mark.parametrize("adam", [False, True], ids=["D = 1", "D of Adam"])
@pytest.mark.parametrize(("masked", "aux_weight"), [(False, 1.0), (True, 1.0), (True, 0.3)])
def test_c_and_n_are_those_of_the_two_halves_of_the_loss(masked, aux_weight, adam):
    """Of the first training batch; the factor on auxiliary losses is none of their weight."""
    bilevel = levels(aux_weight, adam)
    train, dev = [batch(masked=masked), batch()], [batch(5), batch(7, masked)]
    theta = list(bilevel.model.parameters())
    scale = [torch.ones_like(p) for p in theta]
    if adam:
        scale = adam_scale(bilevel.lower, theta)
        assert min(d.min() for d in scale) < 0.1  # it is not 1
    slopes, gram = terms_of(bilevel, train, dev)
    expected = expected_terms(bilevel, train[0], dev, scale)
    close(slopes, expected[0])
    close(gram, expected[1])
    assert np.abs(expected[0]).min() > 1e-4 and np.abs(expected[1]).min() > 1e-6


class Several(nn.Module):
    """Real-numbered tasks on one layer; a mask may be given, and what it leaves out is NaN."""

    def __init__(self, tasks):
        super().__init__()
        self.body, self.heads = nn.Linear(4, D), nn.Linear(D, tasks)

    def forward(self, batch):
        x, y, mask = batch
        features = torch.tanh(self.body(x))
        losses = (self.heads(features) - y).square()
        if mask is not None:
            losses = losses.masked_fill(~mask, torch.nan)
        return TaskLosses(losses, features, mask=mask)


@pytest.mark.parametrize(("tasks", "target"), [(2, 1), (5, 3), (6, 0)])
@pytest.mark.parametrize("left_out", ["none", "some", "target"])
def test_c_and_n_wherever_the_target_stands(tasks, target, left_out):
    """Against halves taken by name; with the target's column left out whole, N is of the rest."""
    model, scheduler = Several(tasks), drawn(StableJoint(target, tasks, D))
    mask = None if left_out == "none" else torch.rand(9, tasks) < 0.7
    if left_out == "target":
        mask[:, target] = False
    train = torch.randn(9, 4), torch.randn(9, tasks), mask
    theta, phi = list(model.parameters()), list(scheduler.parameters())
    p, scale = ([torch.rand_like(t) + 0.1 for t in theta] for _ in range(2))
    problem = Derivatives(model, scheduler, theta, phi, [train], 0.3, lambda tensors, _: tensors)
    with problem:
        slopes, gram = problem.target_and_rest(p, scale)

    inside = torch.ones(9, tasks, dtype=torch.bool) if mask is None else mask
    seen = model(train)
    losses = torch.where(inside, seen.losses, 0.0)
    weights = scheduler.schedule(seen.features, seen.losses, mask).detach()
    weights = torch.where(inside, weights / inside.sum(dim=0).clamp(min=1), 0.0)
    halves = [
        torch.cat([g.flatten() for g in torch.autograd.grad(half, theta, retain_graph=True)])
        for half in (
            (weights * losses)[:, target].sum(),
            (weights * losses)[:, [k for k in range(tasks) if k != target]].sum(),
        )
    ]
    flat_p, flat_d = (torch.cat([t.flatten() for t in vector]) for vector in (p, scale))
    size = (flat_p * flat_p * flat_d).sum().sqrt()
    close(slopes, torch.stack([half @ flat_p for half in halves]) / size)
    close(gram, torch.stack([(a * b / flat_d).sum() for a in halves for b in halves]).view(2, 2))
    assert gram[1, 1] > 1e-3 and (gram[0, 0] > 1e-3) == (left_out != "target")
    assert (slopes[0] != 0) == (left_out != "target")


# --------------------------------------------------------------------------------------------------
# From c and N to the odds
# --------------------------------------------------------------------------------------------------


def random_terms(generator):
    """Terms of about unit size at weights 1/2, 1/2; a slope is negative now and then."""
    root = generator.normal(size=(2, 4))
    return generator.normal(0.5, 1.0, size=2), root @ root.T / 4


def observe(balance, slopes, gram):
    balance.observe(torch.as_tensor(slopes), torch.as_tensor(gram))
    return balance.odds.item()


@pytest.mark.parametrize("start", [1.0, 0.05, 7.0, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_odds_are_those_of_the_loop(start, scale):
    generator = np.random.default_rng(3)
    balance, loop = Balance(start), reference.Odds(start, **CONSTANTS)
    assert balance.odds.item() == pytest.approx(max(start, 1 / LIMIT))
    seen = []
    for step in range(80):
        slopes, gram = random_terms(generator)
        slopes, gram = scale * slopes, scale**2 * gram
        if step % 13 == 5:
            slopes[step % 2] = np.nan
        if step % 17 == 3:
            gram[0, 0] = np.inf
        found, before = observe(balance, slopes, gram), loop.odds
        assert found == pytest.approx(loop.observe(slopes, gram), rel=1e-9)
        assert abs(math.log(found / before)) <= FASTEST * (1 + 1e-12)
        assert 1 / LIMIT * (1 - 1e-12) <= found <= LIMIT * (1 + 1e-12)
        seen.append(found)
    assert balance.steps.item() == len(loop.seen) < 80
    assert max(seen) > (1.2 if start > 1e-6 else 1.01) * min(seen)


def test_what_is_not_finite_changes_no_buffer():
    generator = np.random.default_rng(0)
    balance = Balance(1.0)
    bad = [(np.nan, 0, 0), (np.inf, 0, 1), (0.0, np.nan, 2), (0.0, np.inf, 2), (0.0, 0.0, 0)]
    for good in (False, True):
        if good:  # in the middle of a climb: the solution is further off than a step reaches
            observe(balance, [1.0, 0.01], np.eye(2))
        before = {name: value.clone() for name, value in balance.state_dict().items()}
        for slope, entry, kind in bad:
            slopes, gram = random_terms(generator)
            if kind == 0 and slope == 0:  # no gradient at all: no unit to measure in
                slopes, gram = np.zeros(2), np.zeros((2, 2))
            slopes[0] += slope
            gram[0, 1] += entry
            observe(balance, slopes, gram)
            for name, value in balance.state_dict().items():
                assert torch.equal(value, before[name]), name


def constant(balance, slopes, gram):
    """Observe unit-weight c and N that never change, at the present weights."""
    w = np.array([balance.odds.item(), 1.0]) / (1 + balance.odds.item())
    return observe(balance, w * slopes, np.outer(w, w) * gram)


GRAMS = [np.eye(2), np.array([[2.0, 0.1], [0.1, 0.5]]), np.array([[0.4, -0.1], [-0.1, 1.5]])]


@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("slopes", [(1.0, 0.4), (0.4, 0.9)])
@pytest.mark.parametrize("start", [1.0, 0.3])
def test_the_odds_of_what_stays_are_n_inverse_c_drawn_to_the_start(gram, slopes, start):
    """The mixed c is n / (n + START) of c and the rest of the c of which the start is the best.

    With few labels an upper step counts as ``start`` of one.
    """
    balance, slopes, steps = Balance(start), np.array(slopes), 400
    for _ in range(steps):
        found = constant(balance, slopes, gram)
    of_start = gram @ np.array([start, 1.0])
    of_start *= np.abs(slopes).sum() / np.abs(of_start).sum()
    steps *= start
    mixed = (steps * slopes + START * of_start) / (steps + START)
    w = np.linalg.inv(gram) @ mixed
    assert w.min() > 0
    assert found == pytest.approx(w[0] / w[1], rel=1e-9)
    pure = np.linalg.inv(gram) @ slopes
    assert abs(math.log(found / (pure[0] / pure[1]))) < abs(math.log(start / (pure[0] / pure[1])))


def test_where_the_start_is_the_best_it_stays():
    for start in (0.2, 1.0, 4.0):
        for gram in GRAMS:
            balance = Balance(start)
            for _ in range(5):
                found = constant(balance, 3 * gram @ np.array([start, 1.0]), gram)
                assert found == pytest.approx(start, rel=1e-12)


def test_auxiliary_tasks_that_harm_go_out_and_come_back():
    balance, gram, odds = Balance(1.0), np.eye(2), [1.0]
    while odds[-1] < LIMIT * (1 - 1e-9):
        odds.append(constant(balance, np.array([1.0, -1.0]), gram))
        assert len(odds) < 3 * START + math.log(LIMIT) / FASTEST
    changes = np.diff(np.log(odds))
    assert (changes >= 0).all() and (changes <= FASTEST + 1e-12).all()
    np.testing.assert_allclose(changes[START:-1], FASTEST, rtol=1e-9)
    assert constant(balance, np.array([1.0, -1.0]), gram) == pytest.approx(LIMIT, rel=1e-9)
    harmful = len(odds) + 1
    steps = 0
    while balance.odds.item() > 1.1:
        constant(balance, np.array([1.0, 1.0]), gram)
        steps += 1
        assert steps < 60 * harmful
    balance = Balance(1.0)  # and the target, which may harm itself, likewise
    for _ in range(3 * START + math.ceil(math.log(LIMIT) / FASTEST)):
        constant(balance, np.array([-1.0, 1.0]), gram)
    assert balance.odds.item() == pytest.approx(1 / LIMIT, rel=1e-9)


def test_where_both_harm_nothing_moves():
    """Once what was seen outweighs the start: neither has a weight to compare."""
    balance = Balance(2.0)
    for _ in range(2 * START):
        constant(balance, np.array([-1.0, -1.0]), np.eye(2))
    before = balance.odds.item()
    assert constant(balance, np.array([-1.0, -1.0]), np.eye(2)) == before != 1


def test_the_scale_of_the_losses_changes_nothing():
    """Nor does one that changes from step to step: every step is measured in its own unit."""
    generator = np.random.default_rng(1)
    one, other = Balance(0.5), Balance(0.5)
    for _ in range(30):
        slopes, gram = random_terms(generator)
        factor = math.exp(generator.normal(0, 3))
        found = observe(one, slopes, gram)
        scaled = observe(other, factor * slopes, factor**2 * gram)
        assert scaled == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_losses_of_one_half_in_another_unit_get_the_inverse_odds(factor):
    """Twice the target's loss at half of its weight is the same training."""
    slopes, gram = np.array([0.8, 0.6]), GRAMS[1]
    unit = np.array([factor, 1.0])
    one, other = Balance(1.0), Balance(1.0 / factor)
    for _ in range(700):
        found = constant(one, slopes, gram)
        scaled = constant(other, unit * slopes, np.outer(unit, unit) * gram)
    assert scaled == pytest.approx(found / factor, rel=0.03)  # up to the pull of the starts
    solved = []
    for balance in (one, other):
        balance.steps.fill_(1e12)
        solved.append(balance._solved().item())
    assert solved[1] == pytest.approx(solved[0] / factor, rel=1e-9)


@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("slopes", [(1.0, 0.4), (0.4, 0.9), (0.6, 0.6)])
def test_n_inverse_c_is_the_best_of_a_grid_of_odds(slopes, gram):
    """It makes -(w . c)^2 / (w' N w), the best change of the development loss, least."""
    balance, slopes = Balance(1.0), np.array(slopes)
    balance.slopes.copy_(torch.as_tensor(slopes))
    balance.gram.copy_(torch.as_tensor(gram))
    balance.steps.fill_(1e12)
    found = balance._solved().item()
    grid = np.exp(np.linspace(-math.log(LIMIT), math.log(LIMIT), 20001))
    w = np.stack([grid, np.ones_like(grid)])
    change = -((slopes @ w) ** 2) / np.einsum("an,ab,bn->n", w, gram, w)
    assert 1 / LIMIT < found < LIMIT
    assert found == pytest.approx(grid[change.argmin()], rel=2 * math.log(LIMIT) / 20000)
    # The model behind it: with l = 1, the least over eta of -eta w . c + eta^2 w' N w / 2.
    at = np.array([found, 1.0])
    etas = np.linspace(0, 10, 100001)
    reached = (-etas * (at @ slopes) + etas**2 * (at @ gram @ at) / 2).min()
    assert reached == pytest.approx(change.min() / 2, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Upper steps
# --------------------------------------------------------------------------------------------------


def state_of(bilevel):
    return {name: value.clone() for name, value in bilevel.scheduler.balance.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adam", [False, True])
def test_upper_steps_teach_it_and_hypergradients_do_not(adam):
    bilevel = levels(0.5, adam)
    loop = reference.Odds(1.0, **CONSTANTS)
    loop.odds = small.odds(bilevel.scheduler)  # as drawn
    theta = list(bilevel.model.parameters())
    for step in range(1, 4):
        train, dev = [batch(masked=True), batch()], [batch(5)]
        before = state_of(bilevel)
        bilevel.hypergradient(train, dev)
        assert same(state_of(bilevel), before)
        scale = adam_scale(bilevel.lower, theta) if adam else [torch.ones_like(p) for p in theta]
        terms = expected_terms(bilevel, train[0], dev, scale)
        bilevel.upper_step(train, dev)
        assert bilevel.scheduler.balance.steps == step
        assert small.odds(bilevel.scheduler) == pytest.approx(loop.observe(*terms), rel=1e-9)
        bilevel.lower_step(batch())


def test_the_solver_s_p_stands_for_the_development_gradient():
    """With curvature, c is <g, p> / |p| in the norm of D; with D = 1 that of gradient descent."""
    bilevel = levels(solver=neumann(0.05, 2))
    train, dev = [batch()], [batch(5)]
    _, solution, _ = bilevel.hypergradient(train, dev)
    slopes, gram = terms_of(bilevel, train, dev)
    p, theta = solution.vector, list(bilevel.model.parameters())
    phi = {name: value.detach() for name, value in bilevel.scheduler.named_parameters()}
    ones = [torch.ones_like(value) for value in theta]
    odds = small.odds(bilevel.scheduler)
    expected = small.target_and_rest(phi, bilevel.model(train[0]), odds, theta, p, ones)
    close(slopes, expected[0])
    close(gram, expected[1])


@pytest.mark.parametrize("where", ["first", "second", "dev"])
def test_a_hypergradient_that_is_not_finite_leaves_the_odds(where):
    bilevel, good = levels(adam=True), batch()
    bilevel.upper_step([good], [good])
    before = state_of(bilevel)
    bad = good._replace(x=good.x * torch.inf)
    train, dev = {
        "first": ([bad, good], [good]),
        "second": ([good, bad], [good]),
        "dev": ([good], [bad]),
    }[where]
    assert bilevel.upper_step(train, dev).hypergradient_norm is None
    assert same(state_of(bilevel), before)
    bilevel.upper_step([good], [good])
    assert bilevel.scheduler.balance.steps == 2


def test_a_batch_without_the_target_s_labels_teaches_of_the_rest():
    bilevel, train = levels(), batch(masked=True)
    train.mask[:, 0] = False
    for _ in range(3):
        assert bilevel.upper_step([train], [batch(5)]).hypergradient_norm is not None
    balance = bilevel.scheduler.balance
    assert balance.steps == 3 and torch.isfinite(balance.odds)
    assert balance.gram[0].tolist() == [0.0, 0.0] and balance.gram[1, 1] > 0


def test_its_state_continues_bit_for_bit():
    bilevel = levels(adam=True)
    twin = copy.deepcopy(bilevel)
    data = [batch() for _ in range(8)]

    def go_on(one, some):
        for data in some:
            one.lower_step(data)
            one.upper_step([data], [data])

    # The twin's solver is of the original's optimiser; each has its own.
    twin.solver = preconditioned(
        identity(), lambda: adam_scale(twin.lower, twin.model.parameters())
    )
    go_on(bilevel, data[:4])
    twin.load_state_dict(copy.deepcopy(bilevel.state_dict()))
    assert same(state_of(twin), state_of(bilevel))
    for one in (bilevel, twin):
        go_on(one, data[4:])
    assert same(state_of(twin), state_of(bilevel))
    assert bilevel.scheduler.balance.steps == 8
    assert set(state_of(bilevel)) == {"odds", "slopes", "gram", "steps"}


def test_the_odds_are_no_parameter():
    scheduler = StableJoint(0, K, D)
    assert not any("balance" in name for name, _ in scheduler.named_parameters())
    assert scheduler.balance.odds.dtype == torch.get_default_dtype()


# --------------------------------------------------------------------------------------------------
# Where it starts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, 1.0),
        ([[1, 1, 1], [1, 1, 1]], 1.0),
        ([[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 1]], 1 / 3.5),
        ([[1, 0, 1], [1, 1, 0], [1, 0, 0]], 3.0),
        ([[1], [0]], 1.0),  # a single task
        ([[1, 0], [1, 0]], 2.0),  # no auxiliary label: as if there were one
    ],
)
def test_the_ratio_of_labels_against_a_count_by_hand(mask, expected):
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    assert label_ratio(mask) == pytest.approx(expected, rel=1e-15)


def test_few_labels_set_the_start(tiny_config):
    """Labels of the target are counted in the training set itself, development samples included."""
    found = {}
    for few in (0, 1, 2):
        config = tiny_config(method="joint_stable", labeled_per_class=few)
        split = load_split(config.split_dir, config.data_root)
        config = resolve(config, split)
        net = build(config, split).bilevel.scheduler
        found[few] = small.odds(net), net.balance.start
        classes, dev = len(split.target.class_names), len(split.indices["dev"])
        samples = len(split.indices["full_train"])
        expected = 1.0 if not few else (few * classes + dev) / samples  # attributes are complete
        assert split.mask is None and not config.hold_out_dev
        assert found[few] == pytest.approx((expected, expected), rel=1e-6)
    assert found[1] < found[2] < found[0]


def test_the_constants_make_sense():
    assert START > 0 and FASTEST > 0 and LIMIT > 1 and LATE == int(constants.LATE) >= 0
