"""joint_stable: its schedule by loops, its hypergradient by double backward, what it predicts."""

import argparse
import copy
import json
import math

import numpy as np
import pytest
import torch

import train_bilevel
from auxilearn import balance, bilevel
from auxilearn.data.split import load_split
from auxilearn.hypernet import Identity, TaskLosses, masked_column_means, scheduled_loss
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.run.build import build
from auxilearn.run.config import resolve
from auxilearn.run.record import open_record
from auxilearn.solvers import conjugate_gradient, exact
from auxilearn.stable import (
    FINE_TUNING_DIVISOR,
    RECIPE,
    TARGET_SHARES,
    UPPER_DECAY,
    StableJoint,
    fit_stable,
)
from benchmarks import hypergradient_accuracy as accuracy
from tests import reference, small
from tests.conftest import Run, assert_same_run

B, K, D = 7, 4, 5


pytestmark = pytest.mark.usefixtures("float64")


def scheduler(size=1.0, **options):
    """A scheduler with random parameters and odds."""
    return small.drawn(StableJoint(0, K, D, **options), size)


def batch():
    return torch.randn(B, D), torch.randn(B, K).exp()


def some_mask():
    """Column 0 partly masked, column 1 with one entry, column 2 with none."""
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[::2, 0] = False
    mask[:, 1] = False
    mask[3, 1] = True
    mask[:, 2] = False
    return mask


# ------------------------------------------------------------------ the schedule


def schedule_loops(net, features, losses, mask):
    a, u, t = (
        parameter.detach().numpy()
        for parameter in (net.feature_sel.weight, net.loss_w, net.task_prior)
    )
    rest = net.labelled / (1 + odds_of(net)) if net.tempered else 1.0
    features = features.numpy()
    z = reference.standardise_loops(losses.numpy(), mask)
    centre = [math.fsum(features[:, j]) / B for j in range(D)]
    weights = np.zeros((B, K))
    for k in range(K):
        inside = [i for i in range(B) if mask is None or mask[i][k]]
        for i in range(B):
            centred = [features[i, j] - centre[j] for j in range(D)]
            length = math.sqrt(math.fsum(c * c for c in centred)) * math.sqrt(D)
            score = math.fsum(a[k, j] * centred[j] / length for j in range(D))
            weights[i, k] = reference.sigmoid(rest * score)
            weights[i, k] *= reference.sigmoid(rest * u[k] * z[i, k])
        if inside:
            weights[:, k] /= math.fsum(weights[i, k] for i in inside) / len(inside)
        weights[:, k] *= task_factors(net)[k]
    return weights


def odds_of(net):
    """w_T / w_A."""
    return {"learned": small.odds(net), "start": LABELLED, "equal": 1 / (K - 1)}[net.target_share]


def task_factors(net):
    """s_k by its definition; the target is task 0."""
    s = [reference.sigmoid(x) for x in net.task_prior.tolist()]
    target, others = small.halves(odds_of(net), K)
    return [target] + [others * x / math.fsum(s[1:]) for x in s[1:]]


LABELLED = 0.3
held = pytest.mark.parametrize("target_share", TARGET_SHARES)


@held
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tempered", [False, True])
def test_formula(masked, target_share, tempered):
    net = scheduler(target_share=target_share, labelled=LABELLED, tempered=tempered)
    assert net.labelled == LABELLED and scheduler(labelled=7.0).labelled == 1
    features, losses = batch()
    mask = some_mask() if masked else None
    expected = schedule_loops(net, features, losses, None if mask is None else mask.numpy())
    found = net.schedule(features, losses, mask).detach().numpy()
    inside = np.ones((B, K), dtype=bool) if mask is None else mask.numpy()
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-12)
    factors = net.factors(features, losses, mask)
    expected_task = task_factors(net)
    np.testing.assert_allclose(factors[2].detach(), expected_task, rtol=1e-12)
    product = (factors[0] * factors[1]).detach().numpy()
    for k in range(K):  # up to a number per task, the schedule is the product of its factors
        rows = inside[:, k]
        if rows.any():
            np.testing.assert_allclose(
                product[rows, k] / product[rows, k].mean() * expected_task[k],
                expected[rows, k],
                rtol=1e-10,
            )


@held
@pytest.mark.parametrize("masked", [False, True])
def test_at_the_start_the_target_counts_by_its_labels(masked, target_share):
    """Samples count alike, and so do auxiliary tasks."""
    net = StableJoint(0, K, D, target_share=target_share, labelled=LABELLED)
    features, losses = batch()
    mask = some_mask() if masked else None
    means = masked_column_means(losses, mask)
    target, others = small.halves(1 / (K - 1) if target_share == "equal" else LABELLED, K)
    expected = target * means[0] + others * means[1:].mean()
    found = scheduled_loss(net, TaskLosses(losses, features, mask=mask))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert sum(p.numel() for p in net.parameters()) == K * (D + 2)


def test_equal_shares_are_the_equal_weights_of_the_baseline():
    net, (features, losses) = StableJoint(0, K, D, target_share="equal"), batch()
    outputs = TaskLosses(losses, features)
    equal = scheduled_loss(Identity(0, K), outputs)
    torch.testing.assert_close(scheduled_loss(net, outputs), equal, rtol=1e-15, atol=0)


def test_where_all_have_all_labels_the_target_starts_with_half_of_the_weight():
    net, (features, losses) = StableJoint(2, K, D), batch()
    weights = net.schedule(features, losses).mean(dim=0)
    expected = [1 / 2 if k == 2 else 1 / 2 / (K - 1) for k in range(K)]
    torch.testing.assert_close(weights / weights.sum(), torch.tensor(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("odds", [1 / 50, 1 / (K - 1), 1.0, 50.0])
def test_the_gradient_stays_as_long_as_under_equal_weights(odds):
    """Were the tasks' gradients equally long and at right angles, as those of K logits' sum are."""
    net = StableJoint(0, K, D, target_share="start", labelled=odds)
    theta = torch.zeros(K, requires_grad=True)
    losses = theta.expand(B, K) + torch.rand(B, 1)
    scheduled_loss(net, TaskLosses(losses, torch.randn(B, D))).backward()
    assert theta.grad.norm().item() == pytest.approx(math.sqrt(K), rel=1e-12)
    assert theta.grad[0] / theta.grad[1:].sum() == pytest.approx(odds, rel=1e-12)


@held
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_no_parameter_moves_the_weight_of_a_half(size, target_share):
    """The directions along which JTDS's weights drift are not there any more."""
    net = scheduler(size, target_share=target_share, labelled=LABELLED)
    features, losses = batch()
    weights = net.schedule(features, losses)
    assert torch.isfinite(weights).all()
    tasks = weights.mean(dim=0)
    halves = tasks[0], tasks[1:].sum()
    assert [half.item() for half in halves] == pytest.approx(small.halves(odds_of(net), K))
    for half in halves:
        slopes = torch.autograd.grad(half, list(net.parameters()), retain_graph=True)
        assert max(slope.abs().max().item() for slope in slopes) < 1e-12


@held
def test_a_masked_task_has_its_weight_over_the_samples_that_have_a_loss(target_share):
    net, (features, losses) = scheduler(target_share=target_share, labelled=LABELLED), batch()
    mask = some_mask()
    weights = net.schedule(features, losses, mask)
    for k in (0, 1, 3):  # task 2 has none
        assert weights[mask[:, k], k].mean().item() == pytest.approx(
            task_factors(net)[k], rel=1e-12
        )


@held
def test_a_single_task_keeps_its_weight(target_share):
    net = StableJoint(0, 1, D, target_share=target_share)
    torch.nn.init.normal_(net.task_prior)
    losses = torch.rand(B, 1)
    assert net.balance is None
    weights = net.schedule(torch.randn(B, D), losses)
    torch.testing.assert_close(weights, torch.ones(B, 1))
    (slope,) = torch.autograd.grad((weights * losses).mean(), [net.task_prior])
    assert slope.item() == pytest.approx(0, abs=1e-15)


@held
@pytest.mark.parametrize("t", [-150.0, 150.0])
def test_far_from_its_start_it_is_finite_in_float32(t, target_share):
    net = StableJoint(0, K, D, target_share=target_share).float()
    torch.nn.init.constant_(net.task_prior, t)
    weights = net.schedule(torch.rand(B, D).float(), torch.rand(B, K).float())
    gradients = torch.autograd.grad((weights * torch.rand(B, K).float()).sum(), net.parameters())
    assert all(torch.isfinite(tensor).all() for tensor in (weights, *gradients))


def test_an_unknown_share_of_the_target_is_refused():
    with pytest.raises(ValueError, match="target_share must be one of"):
        StableJoint(0, K, D, target_share="all")


@pytest.mark.parametrize(
    ("options", "odds"),
    [
        ({"target_share": "start"}, LABELLED),
        ({"target_share": "equal"}, 1 / (K - 1)),
        ({"factors": ["feature", "loss"]}, LABELLED),
    ],
)
def test_a_share_that_is_not_learned_has_no_balance(options, odds):
    net = StableJoint(0, K, D, labelled=LABELLED, **options)
    assert net.balance is None and net.odds == odds
    assert not any("balance" in name for name in net.state_dict())


def test_shift_and_scale_of_features_and_losses_change_nothing():
    net, (features, losses) = scheduler(), batch()
    weights = net.schedule(features, losses)
    moved = net.schedule(3 * features + torch.randn(D), 5 * losses + 2)
    torch.testing.assert_close(moved, weights, rtol=1e-5, atol=0)  # std + 1e-6 has a scale


def test_masked_losses_and_equal_samples_are_no_numbers_to_it():
    net, (features, losses) = scheduler(), batch()
    mask = some_mask()
    junk = torch.where(mask, losses, torch.nan)
    values = [
        torch.autograd.grad(
            scheduled_loss(net, TaskLosses(x, features, mask=mask)), list(net.parameters())
        )
        for x in (losses, junk)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))
    same = net.schedule(features[:1].expand(B, D), losses[:1].expand(B, K))
    torch.testing.assert_close(same[:, 0], torch.full((B,), task_factors(net)[0]))


def test_a_factor_left_out_has_no_parameters():
    assert [n for n, _ in StableJoint(0, K, D, factors=["loss"]).named_parameters()] == ["loss_w"]
    with pytest.raises(ValueError, match="factors must be"):
        StableJoint(0, K, D, factors=["colour"])


# ------------------------------------------------------------------ preconditioned solvers


def test_preconditioned_solvers_against_dense_algebra():
    size = 6
    root = torch.randn(size, size)
    hessian, scale, v = root @ root.T, torch.rand(size) + 0.1, torch.randn(size)
    inverse = torch.diag(1 / scale)

    def solved(solver):
        def hvp(u):
            return [hessian @ u[0]]

        return preconditioned(solver, lambda: [scale])(hvp, [v]).vector[0]

    def equals(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    equals(solved(identity()), v / scale)
    alpha = 0.01
    step = torch.eye(size) - alpha * inverse @ hessian
    powers = sum(torch.linalg.matrix_power(step, j) for j in range(5))
    equals(solved(neumann(alpha, 4)), powers @ inverse @ v)
    damped = hessian + 0.3 * torch.diag(scale)
    equals(solved(conjugate_gradient(0.3, 50)), torch.linalg.solve(damped, v))
    equals(solved(exact(0.3)), torch.linalg.solve(damped, v))
    equals(solved(exact()), torch.linalg.solve(hessian, v))  # the limit does not depend on it


def stable_run(tiny_config, **changes):
    config = tiny_config(method="joint_stable", **changes)
    split = load_split(config.split_dir, config.data_root)
    return build(resolve(config, split), split)


def adams_next_scale(optimizer, parameter, steps, decay):
    """1 / (d/dg of Adam's step without momentum) after so many steps, by autograd."""
    moment, last = optimizer.state[parameter]["exp_avg_sq"], parameter.grad
    typical = last[last != 0].square().mean().sqrt() if last.any() else 0.0
    guess = torch.where(last == 0, typical, last) + decay * parameter.detach()
    guess.requires_grad_()
    after = (0.999 * moment + 0.001 * guess**2) / (1 - 0.999 ** (steps + 1))
    (slope,) = torch.autograd.grad((guess / (after.sqrt() + 1e-8)).sum(), guess)
    return 1 / slope


def test_the_hypergradient_of_a_run_against_double_backward(tiny_config):
    """- d/dphi <g, D^-1 v>, D that of Adam's third step, after two lower steps."""
    run = stable_run(tiny_config, aux_weight=0.3)
    levels = run.bilevel
    model, net = levels.model.double(), levels.scheduler.double()
    theta = list(model.parameters())
    batches = run.lower_batches(0)
    for _ in range(2):
        levels.lower_step(next(batches))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    (train, *_), (dev, *_) = next(run.upper_batches(0))
    found, solution, _ = levels.hypergradient([train], [dev])
    assert solution.products == 0

    scale = [adams_next_scale(levels.lower, parameter, 2, 5e-4) for parameter in theta]
    v = torch.autograd.grad(
        model(dev).losses[:, 0].mean(), theta, materialize_grads=True, allow_unused=True
    )
    outputs = model(train)
    schedule = net.schedule(outputs.features, outputs.losses)
    factors = torch.tensor([1.0] + [0.3] * (schedule.shape[1] - 1))
    loss = (schedule * factors * outputs.losses).mean(dim=0).sum()
    g = torch.autograd.grad(loss, theta, create_graph=True)
    inner = sum((a * b / d).sum() for a, b, d in zip(g, v, scale, strict=True))
    expected = torch.autograd.grad(-inner, list(net.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_under_adam_the_preconditioned_hypergradient_predicts_best(seed):
    """What docs/stability.md recommends, on a problem of seconds: real steps of the real Adam."""
    args = argparse.Namespace(
        optimizer="adam", lr=2e-3, width=8, batch=50, corrupted_rate=0.4, after=[10, 50],
        directions=24, horizons=[4], no_exact=True,
    )  # fmt: skip
    found = accuracy.correlations(args, "joint_stable", steps=60, seed=seed)
    plain, better = found["identity"], found["identity, preconditioned"]
    assert better[0] > 0.9
    assert all(b > p for b, p in zip(better, plain, strict=True))


# ------------------------------------------------------------------ training


def test_upper_steps_begin_after_the_warm_up_and_end_before_fine_tuning(tiny_run):
    # 20 images, 6 at a time: epochs of 4 steps; 2 steps over the 4 development images.
    run = tiny_run(method="joint_stable", epochs=4, warmup_epochs=1, dev_epochs=2, hyperstep=3)
    assert [row["step"] for row in run.rows_of("upper")] == [6, 9, 12, 15]
    assert [row["step"] for row in run.rows_of("epoch")] == [4, 8, 12, 16, 18, 20]
    assert not any(row["clipped"] for row in run.rows_of("upper"))


def test_no_fine_tuning(tiny_run):
    run = tiny_run(method="joint_stable", dev_epochs=0)
    assert [row["step"] for row in run.rows_of("epoch")] == [4, 8]


def test_a_run_that_ends_before_its_first_upper_step_says_so(tiny_run, capfd):
    tiny_run(method="joint_stable", warmup_epochs=2)
    assert (
        "warning: 8 lower steps end before the first upper step (--warmup_epochs 2 --hyperstep 2)"
        in capfd.readouterr().out
    )


@held
def test_adam_above_moves_every_auxiliary_task_by_its_rate(tiny_run, target_share):
    """Some up and some down, for their mean is held. The target's share is the balance's."""
    run = tiny_run(
        method="joint_stable",
        upper_lr=0.25,
        max_steps=2,
        upper_decay=0.0,
        dev_epochs=0,
        options={"target_share": target_share},
    )
    state = run.checkpoint["scheduler"]
    moved = state["task_prior"][1:]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.25), rtol=1e-3, atol=0)
    assert (moved > 0).any() and (moved < 0).any()
    assert state["task_prior"][0] == 0
    assert ("balance.odds" in state) == (target_share == "learned")
    if target_share == "learned":
        assert state["balance.steps"] == 1 and state["balance.odds"] != 1


def test_a_killed_run_goes_on_after_its_warm_up(tiny_config, tmp_path, monkeypatch):
    """At the point where the upper steps have begun, but fewer than without a warm-up."""
    changes = {"warmup_epochs": 1, "epochs": 3, "dev_epochs": 2, "hyperstep": 2, "save_every": 1}
    fresh = {**changes, "exp_name": "fresh", "method": "joint_stable"}
    train_bilevel.train(tiny_config(**fresh))
    stopped = {**changes, "exp_name": "stopped", "method": "joint_stable", "resume": True}
    original = train_bilevel.lower_step
    for dies_at in (2, 7, 10):

        def dying(run, state, step, *args, dies_at=dies_at):
            if step == dies_at:
                raise KeyboardInterrupt
            return original(run, state, step, *args)

        monkeypatch.setattr(train_bilevel, "lower_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train_bilevel.train(tiny_config(**stopped))
    monkeypatch.setattr(train_bilevel, "lower_step", original)
    train_bilevel.train(tiny_config(**stopped))
    folder = tmp_path / "record" / "full"
    assert_same_run(Run(folder / "fresh"), Run(folder / "stopped"))
    histories = [(folder / name / "schedule.jsonl").read_text() for name in ("fresh", "stopped")]
    assert histories[0] == histories[1]
    rows = map(json.loads, histories[0].splitlines())
    weights = [row["mean_weight"][0] for row in rows if row["kind"] == "schedule"]
    assert len(set(weights)) > 2  # the target's, which its odds alone move


def test_fine_tuning_starts_with_the_schedule_of_the_best_checkpoint(tiny_config):
    run = stable_run(tiny_config, epochs=3, upper_lr=0.3, dev_epochs=1)
    record = open_record(run)
    train_bilevel.fit(run, record)
    record.close()
    start = torch.load(record.directory / "fine_tuning_start.pt", weights_only=True)
    for name, value in run.bilevel.scheduler.state_dict().items():
        assert torch.equal(value, start["scheduler"][name])
    assert start["step"] in (4, 8, 12)


# ------------------------------------------------------------------ the recipe as one function


def reference_constants():
    """Of ``reference.Odds``."""
    return {
        "prior": balance.START,
        "late": balance.LATE,
        "fastest": balance.FASTEST,
        "limit": balance.LIMIT,
    }


def fit_by_hand(model, train, dev, *, lr, epochs, fine_tuning_epochs, values, aux_weight):
    """The recipe from its docstring, with plain autograd. Returns the scheduler's parameters, its
    odds and the number of upper steps.

    ``values``: what validation says after every pass, or None.
    """
    theta = list(model.parameters())
    phi = {
        "feature_sel.weight": torch.zeros(small.K, small.D, requires_grad=True),
        "loss_w": torch.zeros(small.K, requires_grad=True),
        "task_prior": torch.zeros(small.K, requires_grad=True),
    }
    lower = torch.optim.Adam(theta, lr=lr, weight_decay=1e-2)
    every, accumulated = RECIPE["hyperstep"], RECIPE["n_meta_train_loss_accum"]
    betas = (0.9, 0.99)
    upper = torch.optim.AdamW(
        phi.values(), lr=RECIPE["upper_lr"], betas=betas, weight_decay=UPPER_DECAY
    )
    step = upper_steps = 0
    odds = reference.Odds(LABELLED, **reference_constants())
    best, passes = (-math.inf, None), iter(values or ())

    def scheduled(seen):
        return small.by_hand("joint_stable", phi, seen, aux_weight, odds.odds, LABELLED)

    def consider(best):
        if values is None:
            return best
        value = next(passes)
        return (value, copy.deepcopy(model.state_dict())) if value > best[0] else best

    def lower_step(loss):
        gradients = torch.autograd.grad(loss, theta)
        for parameter, gradient in zip(theta, gradients, strict=True):
            parameter.grad = gradient

    for _ in range(epochs):
        for one in train:
            lower_step(scheduled(model(one)))
            lower.step()
            step += 1
            if step % every:
                continue
            statistics = copy.deepcopy(model.state_dict())
            first = accumulated * upper_steps
            taken = [train[(first + j) % len(train)] for j in range(accumulated)]
            seen = [model(t) for t in taken]
            losses = [scheduled(s) for s in seen]
            dev_loss = model(dev[upper_steps % len(dev)]).losses[:, 0].mean()
            upper_steps += 1
            g = torch.autograd.grad(sum(losses) / accumulated, theta, create_graph=True)
            v = torch.autograd.grad(dev_loss, theta)
            scale = [adams_next_scale(lower, parameter, step, 1e-2) for parameter in theta]
            inner = 0.0
            for gradient, direction, d in zip(g, v, scale, strict=True):
                inner = inner + (gradient * direction / d).sum()
            terms = small.target_and_rest(phi, seen[0], odds.odds, theta, v, scale, LABELLED)
            slopes = torch.autograd.grad(inner, list(phi.values()))
            for parameter, slope in zip(phi.values(), slopes, strict=True):
                parameter.grad = -slope
            upper.step()
            odds.observe(*terms)
            model.load_state_dict(statistics)
        best = consider(best)
    if best[1]:
        model.load_state_dict(best[1])
    fresh = torch.optim.Adam(theta, lr=lr / FINE_TUNING_DIVISOR, weight_decay=1e-2)
    for _ in range(fine_tuning_epochs):
        for one in dev:
            lower_step(model(one).losses[:, 0].mean())
            fresh.step()
        best = consider(best)
    if best[1]:
        model.load_state_dict(best[1])
    return {name: parameter.detach() for name, parameter in phi.items()}, odds.odds, upper_steps


@pytest.mark.parametrize(
    ("epochs", "values"),
    [
        (6, None),
        (6, [0.1, 0.2, 0.3, 0.5, 0.4, 0.3, 0.4, 0.6, 0.6]),  # best in fine-tuning, the earlier
        (6, [0.1, 0.2, 0.3, 0.7, 0.4, 0.3, 0.4, 0.6, 0.7]),  # best in training
        (1, None),
    ],
)
def test_fit_stable_is_the_recipe_step_for_step(epochs, values):
    model = small.Net()
    hand = copy.deepcopy(model)
    train, dev = [small.batch(6) for _ in range(7)], [small.batch(5) for _ in range(2)]
    lower = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-2)
    left = iter(values or ())

    def validate():
        model.eval()  # as validation does
        return next(left)

    learned = fit_stable(
        model,
        lower,
        train,
        dev,
        tasks=small.K,
        feature_dim=small.D,
        epochs=epochs,
        fine_tuning_epochs=3,
        validate=validate if values else None,
        aux_weight=0.4,
        labelled=LABELLED,
    )
    expected, odds, steps = fit_by_hand(
        hand,
        train,
        dev,
        lr=0.01,
        epochs=epochs,
        fine_tuning_epochs=3,
        values=values,
        aux_weight=0.4,
    )
    assert steps > 0
    assert next(left, None) is None  # after every pass of both kinds
    found = {name: parameter.detach() for name, parameter in learned.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert small.odds(learned) == pytest.approx(odds, rel=1e-8) and odds != LABELLED
    torch.testing.assert_close(model.state_dict(), hand.state_dict(), rtol=1e-8, atol=1e-10)
    assert all(p.abs().max() > 0.01 for p in expected.values())
    assert model.training


def test_fit_stable_under_sgd_responds_as_gradient_descent_does(monkeypatch):
    """No Adam below: - d/dphi <g, v>, the identity solver's."""
    model = small.Net()
    train, dev = [small.batch(6)], [small.batch(5)]
    taken = []
    apply = bilevel.apply_hypergradient

    def watched(upper, phi, gradient, max_norm):
        taken.append((copy.deepcopy(model), [p.detach().clone() for p in phi], gradient, max_norm))
        return apply(upper, phi, gradient, max_norm)

    monkeypatch.setattr(bilevel, "apply_hypergradient", watched)
    fit_stable(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        train,
        dev,
        tasks=small.K,
        feature_dim=small.D,
        epochs=2 * RECIPE["hyperstep"],
        fine_tuning_epochs=0,
    )
    then, _, found, max_norm = taken[0]
    assert not max_norm
    phi = dict(StableJoint(0, small.K, small.D).named_parameters())
    loss = small.by_hand("joint_stable", phi, then(train[0]))
    expected = small.double_backward(
        [loss],
        [then(dev[0]).losses[:, 0].mean()],
        list(then.parameters()),
        list(phi.values()),
        0,
        0,
    )
    for name, one, other in zip(phi, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["train", "dev"])
def test_fit_stable_needs_batches_in_every_pass(name):
    """An iterator would leave later passes without a step; without a batch it would not end."""

    def fit(batches):
        model = small.Net()
        sets = {"train": [small.batch()] * 5, "dev": [small.batch()], name: batches}
        lower = torch.optim.Adam(model.parameters())
        return fit_stable(model, lower, **sets, tasks=small.K, feature_dim=small.D, epochs=1)

    with pytest.raises(ValueError, match=f"{name} must give its batches in every pass anew"):
        fit(iter([small.batch()]))
    if name == "dev":
        with pytest.raises(ValueError, match="at least one batch"):
            fit([])
