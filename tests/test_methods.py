"""The baselines' numbers, ablated schedules, fine-tuning, and methods of one's own."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_bilevel
from auxilearn.backbones import ConvNet
from auxilearn.baselines.gradient_cosine import GradientCosine
from auxilearn.baselines.uncertainty import Uncertainty
from auxilearn.bilevel import Bilevel
from auxilearn.data.split import load_split
from auxilearn.hypernet import FACTORS, MonoJoint, TaskLosses, scheduled_loss, standardise
from auxilearn.models import Batch, TaskModel
from auxilearn.run.build import build
from auxilearn.run.config import resolve
from auxilearn.run.record import open_record
from auxilearn.second_order.evaluation import ModelFunction
from tests.small import ReverseOnly


@pytest.fixture(autouse=True)
def in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# --------------------------------------------------------------------------------------------------
# Uncertainty
# --------------------------------------------------------------------------------------------------


def test_uncertainty_is_the_papers_sum():
    scheduler = Uncertainty(0, 3)
    assert scheduler(torch.ones(2, 3)).item() == 3  # at the start: the plain sum of the means
    s = torch.tensor([0.3, -1.2, 0.7])
    scheduler.log_variance.data = s
    losses = torch.rand(5, 3)
    expected = sum(math.exp(-s[k]) * losses[:, k].mean().item() + s[k].item() / 2 for k in range(3))
    assert scheduled_loss(scheduler, TaskLosses(losses)).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_uncertainty_is_least_at_the_noise_that_the_losses_say():
    # d/ds exp(-s) L + s / 2 = 0 at exp(s) = 2 L; of a Gaussian's noise, at the squared error.
    losses = torch.rand(4, 3) + 0.1
    scheduler = Uncertainty(0, 3, real=[1])
    variance = losses.mean(dim=0) * torch.tensor([2, 1, 2])
    scheduler.log_variance.data = variance.log()
    scheduler(losses).backward()
    assert scheduler.log_variance.grad.abs().max() < 1e-14


def test_uncertainty_learns_nothing_from_a_task_without_losses():
    losses, mask = torch.rand(4, 2), torch.tensor([[False, True]]).expand(4, 2)
    losses[:, 0] = math.nan
    scheduler = Uncertainty(0, 2)
    loss = scheduler(losses, mask=mask)
    loss.backward()
    assert loss.item() == pytest.approx(losses[:, 1].mean().item())
    assert scheduler.log_variance.grad[0] == 0
    assert scheduler.log_variance.grad[1] != 0


def test_uncertainty_is_trained_with_the_model_and_does_not_decay(tiny_config):
    torch.set_default_dtype(torch.float32)
    config = tiny_config(method="uncertainty", main_lr=0.1, w_decay=0.5, max_steps=1)
    run = built(config)
    bilevel = run.bilevel
    shrunk, kept = bilevel.lower.param_groups
    assert (shrunk["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    assert [p is bilevel.scheduler.log_variance for p in kept["params"]] == [True]
    means = bilevel.model(next(run.lower_batches(0))).losses.mean(dim=0)
    fit(run)
    # Adam's first step is the learning rate against the gradient's sign, of 1 / 2 - mean loss.
    expected = 0.1 * torch.sign(means - 0.5)
    torch.testing.assert_close(bilevel.scheduler.log_variance.data, expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Gradient cosines
# --------------------------------------------------------------------------------------------------

COUNTS = [4, 2, 2, 3, 2, 2]


def cosine_problem(masked=False, dropout=0.0):
    torch.manual_seed(0)
    backbone = nn.Sequential(ConvNet(6, widths=(4, 5)), nn.Dropout(dropout))
    model = TaskModel(backbone, 6, COUNTS).double().train()
    labels = torch.stack([torch.randint(c, (8,)) for c in COUNTS], dim=1)
    mask = None
    if masked:
        mask = torch.ones(8, len(COUNTS), dtype=torch.bool)
        mask[3:, 0] = False
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    return model, Batch(images, labels, torch.arange(8), mask)


def task_gradients(model, batch):
    """Gradients of every task's mean loss in the backbone, one backward pass each: (K, P)."""
    shared = list(model.backbone.parameters())
    losses = model(batch).losses
    rows = []
    for k in range(losses.shape[1]):
        known = losses[:, k] if batch.mask is None else losses[batch.mask[:, k], k]
        grads = torch.autograd.grad(known.mean(), shared, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def no_average(tensors, _):
    return tensors


def take(scheduler, model, batch):
    """The weights for a lower step on ``batch``."""
    scheduler.before_lower_step(model, batch, None, no_average)
    return scheduler.weights


@pytest.mark.parametrize("masked", (False, True))
def test_the_cosines_are_those_of_separate_backward_passes(masked):
    model, batch = cosine_problem(masked)
    gradients = task_gradients(model, batch)
    cosines = F.cosine_similarity(gradients, gradients[:1])
    assert 0 < (cosines < 0).sum() < len(COUNTS) - 1  # both kinds occur

    weighted = GradientCosine(0, len(COUNTS), weighted=True)
    torch.testing.assert_close(
        take(weighted, model, batch), cosines.clamp(min=0), rtol=1e-10, atol=1e-12
    )

    plain = GradientCosine(0, len(COUNTS))
    assert take(plain, model, batch).tolist() == (cosines >= 0).double().tolist()


def test_the_products_are_exact_in_forward_mode():
    model, batch = cosine_problem()
    gradients = task_gradients(model, batch)
    scheduler = GradientCosine(0, len(COUNTS))
    shared = [p for name, p in model.named_parameters() if scheduler.shared(name)]
    with ModelFunction(model, shared) as function:
        products = scheduler._products(function, batch, no_average)
    torch.testing.assert_close(products, gradients @ gradients[0], rtol=1e-10, atol=1e-13)


def test_the_model_and_its_random_numbers_stay_as_they_are():
    model, batch = cosine_problem(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    gradients = task_gradients(model, batch)  # with the masks that the step itself will draw
    model.load_state_dict(before)
    torch.set_rng_state(state)
    for weighted in (False, True):
        scheduler = GradientCosine(0, len(COUNTS), weighted=weighted)
        take(scheduler, model, batch)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    cosines = F.cosine_similarity(gradients, gradients[:1])
    torch.testing.assert_close(scheduler.weights, cosines.clamp(min=0), rtol=1e-10, atol=1e-12)


def test_a_batch_without_target_labels():
    # The target's gradient is 0 and so is every cosine: nothing speaks against a task, nor for it.
    model, batch = cosine_problem(masked=True)
    batch.mask[:, 0] = False
    for weighted, expected in ((False, 1.0), (True, 0.0)):
        scheduler = GradientCosine(0, len(COUNTS), weighted=weighted)
        assert take(scheduler, model, batch).tolist() == [1.0] + [expected] * (len(COUNTS) - 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_where_all_that_is_shared_is_frozen_every_cosine_is_zero(weighted):
    model, batch = cosine_problem()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("heads."))
    weights = take(GradientCosine(0, len(COUNTS), weighted), model, batch)
    assert weights.tolist() == [1.0] + [0.0 if weighted else 1.0] * (len(COUNTS) - 1)


def test_without_forward_mode_it_takes_a_pass_per_task_and_warns_once(recwarn):
    model, batch = cosine_problem()
    scheduler = GradientCosine(0, len(COUNTS))
    model.backbone = nn.Sequential(*model.backbone, ReverseOnly())
    signs = task_gradients(model, batch) @ task_gradients(model, batch)[0] >= 0
    for _ in range(2):
        assert take(scheduler, model, batch).tolist() == signs.double().tolist()
    assert len([w for w in recwarn if "no forward-mode derivative" in str(w.message)]) == 1


def test_the_weights_weigh_the_means():
    scheduler = GradientCosine(0, 3)
    scheduler.weights.copy_(torch.tensor([1.0, 0.0, 0.5]))
    losses = torch.rand(4, 3)
    expected = losses[:, 0].mean() + 0.5 * losses[:, 2].mean()
    torch.testing.assert_close(scheduled_loss(scheduler, TaskLosses(losses)), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_lower_step_takes_the_weights_of_its_own_batch(weighted):
    model, batch = cosine_problem(masked=True, dropout=0.5)
    hand, state = copy.deepcopy(model), torch.get_rng_state()
    gradients = task_gradients(copy.deepcopy(model), batch)
    cosines = F.cosine_similarity(gradients, gradients[:1])
    weights = cosines.clamp(min=0) if weighted else (cosines >= 0).double()
    torch.set_rng_state(state)
    scheduler = GradientCosine(0, len(COUNTS), weighted=weighted)
    lower = torch.optim.SGD(model.parameters(), lr=0.1)
    step = Bilevel(model, scheduler, lower, aux_weight=0.5).lower_step(batch)

    torch.set_rng_state(state)
    outputs = hand(batch)
    factors = torch.tensor([1.0] + [0.5] * (len(COUNTS) - 1))
    means = outputs.losses.masked_fill(~batch.mask, 0.0).sum(dim=0) / batch.mask.sum(dim=0)
    loss = (weights * factors * means).sum()
    loss.backward()
    torch.optim.SGD(hand.parameters(), lr=0.1).step()
    torch.testing.assert_close(step.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(step.weights, weights * batch.mask, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.state_dict(), hand.state_dict(), rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Ablations of the schedule
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [("task",), ("feature",), ("loss",), ("loss", "feature")])
def test_a_factor_left_out_is_the_constant_it_starts_at(factors):
    torch.manual_seed(0)
    scheduler = MonoJoint(0, 3, 5, factors=factors)
    for p in scheduler.parameters():
        nn.init.normal_(p)
    features, losses = torch.randn(4, 5), torch.rand(4, 3)
    expected = torch.ones(4, 3)
    if "feature" in factors:
        expected *= F.softplus(
            features @ scheduler.feature_sel.weight.T + scheduler.feature_sel.bias
        )
    else:
        expected *= math.log(2)
    if "loss" in factors:
        expected *= torch.sigmoid(scheduler.loss_w * standardise(losses) + scheduler.loss_b)
    else:
        expected *= 0.5
    expected *= F.softplus(scheduler.task_prior) if "task" in factors else math.log(1 + math.e)
    torch.testing.assert_close(scheduler.schedule(features, losses), expected)
    sizes = {"feature": 3 * 6, "loss": 6, "task": 3}
    assert sum(p.numel() for p in scheduler.parameters()) == sum(sizes[f] for f in factors)


@pytest.mark.parametrize("factors", [(), ("losses",)])
def test_unknown_factors_are_refused(factors):
    with pytest.raises(ValueError, match="factors"):
        MonoJoint(0, 3, 5, factors=factors)


def test_all_factors_are_the_default():
    scheduler = MonoJoint(0, 3, 5)
    assert scheduler.learned == FACTORS
    assert sum(p.numel() for p in scheduler.parameters()) == 3 * (5 + 4)


# --------------------------------------------------------------------------------------------------
# Fine-tuning on the development set
# --------------------------------------------------------------------------------------------------


def built(config):
    split = load_split(config.split_dir, config.data_root)
    return build(resolve(config, split), split)


def fit(run):
    record = open_record(run)
    try:
        return train_bilevel.fit(run, record)
    finally:
        record.close()


def test_fine_tuning_is_adam_on_the_target_loss_of_the_development_set(tiny_config):
    torch.set_default_dtype(torch.float32)
    settings = {"method": "common_dev", "epochs": 1, "dev_epochs": 2, "main_lr": 1e-4}
    run = built(tiny_config(**settings, dev_batch_size=4))
    (group,) = run.fine_tuning.lower.param_groups
    assert group["lr"] == pytest.approx(1e-4 / 5)
    group["lr"] = 0.01  # a step that can be told from none
    steps, step_of = [], run.fine_tuning.lower_step

    def watched(batch, dev_batches=None):
        steps.append((batch, {k: v.clone() for k, v in run.bilevel.model.state_dict().items()}))
        return step_of(batch, dev_batches)

    run.fine_tuning.lower_step = watched
    fit(run)
    assert len(steps) == 2  # two passes over a development set of four images in batches of four

    # From the best checkpoint of training, the first step again by hand.
    batch, start = steps[0]
    model = built(tiny_config(**settings, dev_batch_size=4)).bilevel.model
    model.load_state_dict(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    logits = model.train().heads.target_logits(model.features(batch.inputs))
    F.cross_entropy(logits, batch.labels[:, 0]).backward()
    optimizer.step()
    gradients = {name: p.grad + 5e-4 * start[name] for name, p in model.named_parameters()}
    for name, value in steps[1][1].items():
        mine = model.state_dict()[name]
        if name in gradients:  # one that is 0 but for rounding makes a step of Adam of either sign
            rounding = (gradients[name] != 0) & (gradients[name].abs() < 1e-7)
            assert rounding.sum() < 10
            mine, value = mine[~rounding], value[~rounding]
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5)
    clean = run.split.labels[run.split.indices["dev"], 0]
    assert sorted(batch.labels[:, 0].tolist()) == sorted(clean.tolist())


def test_fine_tuning_starts_at_the_best_checkpoint(tiny_config):
    """And what it starts from is kept: the best of training may be overwritten in fine-tuning."""
    torch.set_default_dtype(torch.float32)
    run = built(tiny_config(method="common_dev", epochs=3, dev_epochs=2, exp_name="one"))
    starts, step_of = [], run.fine_tuning.lower_step

    def watched(batch, dev_batches=None):
        starts.append({k: v.clone() for k, v in run.bilevel.model.state_dict().items()})
        return step_of(batch, dev_batches)

    run.fine_tuning.lower_step = watched
    record = open_record(run)
    train_bilevel.fit(run, record)
    record.close()
    kept = torch.load(record.directory / "fine_tuning_start.pt", weights_only=True)
    assert kept["phase"] == "training"
    for name, value in kept["model"].items():
        assert torch.equal(starts[0][name], value), name


def test_killed_while_fine_tuning_it_goes_on_to_the_same_numbers(tiny_config, tmp_path):
    """The best checkpoint has been overwritten since the checkpoint that the run goes on from."""
    torch.set_default_dtype(torch.float32)
    settings = {"method": "common_dev", "epochs": 1, "main_lr": 1e-6, "save_every": 4, "seed": 1}
    settings |= {"dev_epochs": 20, "exp_name": "one", "resume": True}

    def run_and_record(name):
        run = built(tiny_config(**settings, record_dir=str(tmp_path / name)))
        for group in run.fine_tuning.lower.param_groups:
            group["lr"] = 0.02  # fine-tuning is to find something better than training did
        return run, open_record(run)

    run, record = run_and_record("undisturbed")
    expected = train_bilevel.fit(run, record)
    record.close()
    assert expected["best_phase"] == "fine-tuning"

    class Killed(Exception):
        pass

    run, record = run_and_record("killed")
    save = record.save_best

    def save_and_die(checkpoint):
        result = save(checkpoint)
        if checkpoint["phase"] == "fine-tuning":
            raise Killed
        return result

    record.save_best = save_and_die
    with pytest.raises(Killed):
        train_bilevel.fit(run, record)
    record.close()
    run, record = run_and_record("killed")
    # The last checkpoint is that of the last step before fine-tuning.
    assert record.load_checkpoint()["step"] == run.plan.main_steps
    actual = train_bilevel.fit(run, record)
    record.close()
    for name in ("test_accuracy", "valid_accuracy", "best_epoch", "best_step"):
        assert actual[name] == expected[name]
    folders = [tmp_path / name / "full" / "one" for name in ("undisturbed", "killed")]
    rows = [(folder / "metrics.jsonl").read_text() for folder in folders]
    timeless = [re.sub(r'"\w+_seconds": [^,}]+', "", text) for text in rows]
    assert timeless[0] == timeless[1]
