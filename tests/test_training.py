"""Training end to end: what a run leaves, reproducibility, the steps themselves, failing."""

import copy
import hashlib
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_bilevel
from auxilearn.backbones import IMAGENET_MEAN, IMAGENET_STD
from auxilearn.bilevel import Bilevel
from auxilearn.data.split import load_split
from auxilearn.errors import DivergenceError, UserError
from auxilearn.methods import METHODS
from auxilearn.run.build import build
from auxilearn.run.config import Config, resolve
from auxilearn.run.record import RunRecord, description, processor
from auxilearn.run.state import State
from auxilearn.stable import TargetTask
from tests.conftest import ROOT, Run, assert_one_error_line, assert_same_run, prepare, tiny_flags

BILEVEL = [name for name, method in METHODS.items() if method.bilevel]
FILES = {"config.json", "metrics.jsonl", "log.txt", "best.pt", "summary.json"}


def files_of(run):
    """Which of ``FILES`` a run has; others, such as what it would be resumed from, are its own."""
    return FILES & {path.name for path in run.directory.iterdir()}


def built(config):
    """The ``Run`` of a configuration, ready to train."""
    split = load_split(config.split_dir, config.data_root)
    return build(resolve(config, split), split)


def fit(run, directory):
    """Train what ``built`` built, record in ``directory``, return what it left."""
    record = RunRecord(directory, description(run))
    try:
        train_bilevel.fit(run, record)
    finally:
        record.close()
    return Run(directory)


# --------------------------------------------------------------------------------------------------
# What a run leaves
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves(method, tiny_run, capfd, log_every):
    log_every(2)
    run = tiny_run(method=method, exp_name="mine", seed=3)
    assert run.directory.parts[-2:] == ("full", "mine")
    assert files_of(run) == FILES

    summary = run.summary
    said = capfd.readouterr()
    *_, look, last_line = said.out.splitlines()
    assert look.startswith("look at the schedule: python ")
    assert look.endswith(f"inspect_schedule.py {run.directory}")
    assert last_line == f"test accuracy: {summary['test_accuracy']:.4f}"
    assert said.err == ""
    assert summary["method"] == method
    assert summary["setting"] == "full"
    assert summary["corrupted_rate"] == 0
    assert summary["seed"] == 3
    assert 0 < summary["seconds"] < 60

    epochs = run.rows_of("epoch")
    accuracies = [row["valid_accuracy"] for row in epochs]
    fine_tuned = METHODS[method].fine_tuned
    phases = [("training", 1), ("training", 2), *([("fine-tuning", 1)] if fine_tuned else [])]
    assert [(row["phase"], row["epoch"]) for row in epochs] == phases
    assert summary["valid_accuracy"] == max(accuracies)
    best = phases[accuracies.index(max(accuracies))]
    assert (summary["best_phase"], summary["best_epoch"]) == best
    assert (run.checkpoint["phase"], run.checkpoint["epoch"]) == best

    held_out = METHODS[method].looks_at_dev and method != "joint_stable"
    steps_per_epoch = 3 if held_out else 4  # 16 or 20 images, 6 at a time
    main = 2 * steps_per_epoch
    last = main + (2 if fine_tuned else 0)  # 4 development images, 3 at a time
    steps = run.rows_of("step")
    assert [row["step"] for row in steps] == [1, *range(2, last + 1, 2)]
    for row in steps:
        phase = ("training", math.ceil(row["step"] / steps_per_epoch))
        if row["step"] > main:
            phase = ("fine-tuning", 1)
        assert (row["phase"], row["epoch"]) == phase
        assert 0 < row["loss"] < 100
        assert row["target_loss"] > 0
        assert (row["aux_loss"] > 0) == (method != "single")
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["data_seconds"] < 10
        assert 0 < row["lower_seconds"] < 10

    uppers = run.rows_of("upper")
    upper_steps = range(2, main + 1, 2) if METHODS[method].bilevel else []
    assert [row["step"] for row in uppers] == list(upper_steps)
    for row in uppers:
        assert row["dev_loss"] > 0
        assert row["hypergradient_norm"] > 0
        assert row["residual"] > 0
        assert 0 < row["upper_seconds"] < 60
    assert {row["kind"] for row in run.rows} <= {"step", "upper", "epoch"}

    log = (run.directory / "log.txt").read_text().splitlines()
    assert log == said.out.splitlines()
    assert sum("fine-tuning" in line for line in log) >= (2 if fine_tuned else 0)


def test_what_a_run_says_of_its_fine_tuning(tiny_run, tmp_path):
    """It starts from the best checkpoint, a fifth as fast, and counts passes of its own."""
    run = tiny_run(method="common_dev", dev_epochs=2)
    log = (run.directory / "log.txt").read_text().splitlines()
    accuracies = [row["valid_accuracy"] for row in run.rows_of("epoch")]
    best = 1 + accuracies.index(max(accuracies[:2]))
    start = f"fine-tuning on the development set: 2 passes, from the checkpoint of epoch {best}"
    place = log.index(start)
    assert log[place - 1] == f"epoch 2, step 8: validation accuracy {accuracies[1]:.4f}"
    for number in (1, 2):  # of two steps each
        accuracy = f"validation accuracy {accuracies[1 + number]:.4f}"
        assert log[place + number] == (
            f"fine-tuning pass {number} of 2, step {8 + 2 * number}: {accuracy}"
        )
    phases = {(row["step"] > 8, row["phase"]) for row in run.rows}
    assert phases == {(False, "training"), (True, "fine-tuning")}
    kept = torch.load(run.directory / "fine_tuning_start.pt", weights_only=True)
    assert (kept["phase"], kept["epoch"]) == ("training", best)


def test_fine_tuning_is_five_times_as_slow(tiny_config):
    run = built(tiny_config(method="joint_stable", main_lr=0.01))
    assert [group["lr"] for group in run.fine_tuning.lower.param_groups] == [pytest.approx(0.002)]
    assert isinstance(run.fine_tuning.scheduler, TargetTask)
    assert built(tiny_config(method="joint_stable", dev_epochs=0)).fine_tuning is None


def test_the_first_row_comes_at_once_however_rare_the_others_are(tiny_run):
    run = tiny_run(method="common", max_steps=6, epochs=5)
    assert [row["step"] for row in run.rows_of("step")] == [1, 6]  # usually every tenth


def test_losses_and_accuracy_of_a_row_are_means_since_the_last_row(tiny_run, log_every):
    log_every(1)
    every = tiny_run(method="joint").rows_of("step")
    log_every(3)
    some = tiny_run(method="joint").rows_of("step")
    assert [row["step"] for row in some] == [1, 3, 6]
    for name in ("loss", "target_loss", "aux_loss"):
        for row, first in zip(some, (0, 1, 3), strict=True):
            window = [step[name] for step in every[first : row["step"]]]
            assert row[name] == pytest.approx(sum(window) / len(window))


def test_config_json_determines_the_run(tiny_run):
    options = {"factors": ("loss", "task")}
    run = tiny_run(
        method="joint", exp_name="first", upper_lr=0.5, corrupted=True, seed=11, options=options
    )
    recorded = run.read("config.json")
    settings = recorded["config"]
    assert settings.keys() == {field.name for field in fields(Config)}
    assert settings["task_num"] == 5  # what was left open is filled in
    assert settings["whether_aux"] is True
    assert settings["device"] == "cpu"
    assert settings["neumann_alpha"] == settings["main_lr"]
    assert settings["options"] == {"factors": ["loss", "task"]}
    assert recorded["setting"] == "noisy"
    assert recorded["plugin"] is None
    assert recorded["data"]["fingerprint"] == run.summary["fingerprint"]
    assert recorded["data"]["split_seed"] == 5
    assert recorded["data"]["trained_on"] == "rest_train"
    assert torch.__version__.startswith(recorded["environment"]["packages"]["torch"])
    assert recorded["environment"]["processor"] == processor() != ""
    again = tiny_run(**{**settings, "exp_name": "second"})
    assert_same_run(run, again)
    assert tiny_run(method="task").read("config.json")["config"]["options"] == {
        "hidden_sizes": [10, 10, 10, 10]
    }


def test_the_tested_checkpoint_is_the_one_of_best_validation(tiny_config, tmp_path):
    run = built(tiny_config(method="common", epochs=6, main_lr=0.01, train_batch_size=20))
    left = fit(run, tmp_path / "run")
    summary = left.summary
    accuracies = [row["valid_accuracy"] for row in left.rows_of("epoch")]
    assert summary["best_epoch"] < 6, "this test needs a run that is not best at its end"
    assert summary["valid_accuracy"] == max(accuracies) == accuracies[summary["best_epoch"] - 1]
    for name, tensor in run.bilevel.model.state_dict().items():
        assert torch.equal(tensor, left.checkpoint["model"][name])


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------


def contents(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def test_a_taken_name_is_refused_with_the_way_out(tiny_run, tiny_split, tmp_path, command):
    run = tiny_run(method="common", exp_name="mine", max_steps=1)
    before = contents(run.directory)
    flags = tiny_flags(split_dir=tiny_split, record_dir=tmp_path / "record", method="common")
    flags += ["--exp_name", "mine", "--max_steps", "2"]
    code, out, err = command(train_bilevel.main, *flags)
    assert code == 2
    assert out == ""
    assert_one_error_line(err, run.directory, "--exp_name", "--overwrite")
    assert contents(run.directory) == before

    code, out, err = command(train_bilevel.main, *flags, "--overwrite", "1")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"test accuracy: {run.summary['test_accuracy']:.4f}"
    assert run.summary["steps"] == 2
    assert files_of(run) == FILES
    assert [row["step"] for row in run.rows_of("step")] == [1, 2]  # nothing of the first run


@pytest.mark.parametrize("more", [{}, {"resume": True}])
def test_a_file_in_the_place_of_a_run_is_named(more, tiny_run, tiny_config):
    file = Path(tiny_config().record_dir) / "full" / "mine"
    file.parent.mkdir(parents=True)
    file.write_text("notes")
    with pytest.raises(UserError, match="full/mine is a file, .* move it away, or .*--exp_name"):
        tiny_run(method="common", exp_name="mine", max_steps=1, **more)
    assert file.read_text() == "notes"


def test_overwrite_spares_what_is_not_a_run(tiny_run, tiny_config):
    folder = Path(tiny_config().record_dir) / "full" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="mine"):
        tiny_run(method="common", exp_name="mine", max_steps=1, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_overwrite_keeps_the_earlier_run_where_the_new_one_cannot_start(tiny_run):
    run = tiny_run(method="common", exp_name="mine", max_steps=1)
    before = contents(run.directory)
    with pytest.raises(UserError):
        tiny_run(method="common", exp_name="mine", overwrite=True, backbone_weights="nowhere.pt")
    assert contents(run.directory) == before


def test_without_a_name_every_run_gets_a_new_one(tiny_run):
    runs = [tiny_run(method="common", max_steps=1, overwrite=True) for _ in range(3)]
    names = [run.directory.name for run in runs]
    assert names == ["train_common_seed5", "train_common_seed5_2", "train_common_seed5_3"]
    for run in runs:
        assert run.summary["exp_name"] == run.directory.name
        assert run.read("config.json")["config"]["exp_name"] == run.directory.name


@pytest.mark.parametrize("name", [".", "..", "a/b"])
def test_a_name_that_is_a_path_is_refused(name, tiny_run, tiny_config):
    with pytest.raises(UserError, match="--exp_name"):
        tiny_run(method="common", max_steps=1, exp_name=name)
    assert not Path(tiny_config().record_dir).exists()


# --------------------------------------------------------------------------------------------------
# Reproducibility
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["joint", "joint_stable", "uncertainty", "gcs"])
def test_the_same_settings_give_the_same_run_bit_for_bit(method, tiny_run):
    first = tiny_run(method=method, upper_lr=0.1)
    torch.manual_seed(99)  # the state of the global generator is no setting
    assert_same_run(first, tiny_run(method=method, upper_lr=0.1))


def test_the_number_of_threads_that_decode_changes_nothing(tiny_run):
    settings = {"method": "joint", "upper_lr": 0.1, "n_meta_train_loss_accum": 2}
    assert_same_run(tiny_run(**settings), tiny_run(**settings, num_workers=2))


def test_the_cache_of_images_changes_nothing(tiny_run, tmp_path):
    cached = tiny_run(method="joint", cache_dir=str(tmp_path / "cache"))
    assert_same_run(tiny_run(method="joint"), cached)
    assert list((tmp_path / "cache").glob("*.cache"))


@pytest.mark.parametrize("method", ["joint", "single"])
def test_another_seed_gives_another_run(method, tiny_run):
    one, other = (tiny_run(method=method, seed=seed, exp_name=str(seed)) for seed in (5, 6))
    assert one.timeless_rows != other.timeless_rows
    weight = "heads.linear.weight"
    assert not torch.equal(one.checkpoint["model"][weight], other.checkpoint["model"][weight])


@pytest.mark.parametrize(
    "change",
    [
        {"n_meta_train_loss_accum": 3},
        {"n_meta_loss_accum": 2},
        {"dev_batch_size": 2},
        {"dev_batches": "first"},
        {"hyperstep": 3},
        {"solver": "identity"},
        {"method": "linear"},
    ],
)
def test_settings_of_the_upper_level_do_not_move_the_lower_levels_data(change, tiny_config):
    """One purpose's randomness never moves another's: initial weights, order and augmentation."""
    base, changed = built(tiny_config()), built(tiny_config(**change))
    pairs = zip(base.bilevel.model.parameters(), changed.bilevel.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    pairs = zip(base.lower_batches(0), changed.lower_batches(0), strict=False)
    for _, (one, other) in zip(range(5), pairs, strict=False):
        assert torch.equal(one.sample_id, other.sample_id)
        assert torch.equal(one.inputs, other.inputs)


def test_augmentation_differs_between_passes_and_between_the_levels(tiny_config):
    run = built(tiny_config(train_batch_size=16))  # a pass is a batch

    def images_in_order(batch):
        return batch.inputs[batch.sample_id.argsort()]

    lower, (upper, _) = run.lower_batches(0), next(run.upper_batches(0))
    first, second = images_in_order(next(lower)), images_in_order(next(lower))
    for one, other in ((first, second), (first, images_in_order(upper[0]))):
        assert not (one == other).flatten(1).all(dim=1).any()


def test_streams_go_on_where_an_interrupted_run_stopped(tiny_config):
    run = built(tiny_config(method="common_dev", n_meta_loss_accum=2, epochs=2))

    def ids(batches, count):
        return [batch.sample_id.tolist() for batch, _ in zip(batches, range(count), strict=False)]

    total = run.plan.total_steps
    assert total == run.plan.main_steps + 2
    everything = ids(run.lower_batches(0), total)
    for after in (0, 1, run.plan.main_steps - 1, run.plan.main_steps, total - 1):
        assert ids(run.lower_batches(after), total - after) == everything[after:]
    upper = [next(run.upper_batches(after)) for after in (0, 1, 2)]
    stream = run.upper_batches(0)
    for train, dev in upper:
        again_train, again_dev = next(stream)
        assert ids(again_train, 9) == ids(train, 9)
        assert ids(again_dev, 9) == ids(dev, 9) and len(dev) == 2


# --------------------------------------------------------------------------------------------------
# The steps themselves
# --------------------------------------------------------------------------------------------------


class PlainTraining:
    """The method of the paper in plain autograd, float64, from the formulas alone."""

    def __init__(self, run):
        self.config = run.config
        model, scheduler = run.bilevel.model, run.bilevel.scheduler
        self.backbone = copy.deepcopy(model.backbone).train()
        self.head = copy.deepcopy(model.heads.linear)
        self.theta = [*self.backbone.parameters(), *self.head.parameters()]
        self.phi = {n: p.detach().clone() for n, p in scheduler.named_parameters()}
        self.classes = run.split.target.classes
        mask = run.train_set.mask
        self.labeled = None if mask is None else mask[:, 0].clone()
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.theta]
        self.momentum = dict.fromkeys(self.phi, 0.0)
        self.steps = 0

    def losses(self, batch):
        """Features (B, d) and losses (B, K), one cross entropy at a time."""
        mean, std = (
            (255 * torch.tensor(v)).double().reshape(1, 3, 1, 1)
            for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        features = self.backbone((batch.inputs.double() - mean) / std)
        logits = self.head(features)
        columns = []
        for task in range(batch.labels.shape[1]):
            start = 0 if task == 0 else self.classes + 2 * (task - 1)
            width = self.classes if task == 0 else 2
            own = logits[:, start : start + width]
            true = own.gather(1, batch.labels[:, task : task + 1]).squeeze(1)
            columns.append(own.logsumexp(dim=1) - true)
        return features, torch.stack(columns, dim=1)

    def scheduled(self, batch, phi):
        features, losses = self.losses(batch)
        keep = torch.ones_like(losses, dtype=torch.bool)
        if self.labeled is not None:
            keep[:, 0] = self.labeled[batch.sample_id]
        total = 0.0
        for task in range(losses.shape[1]):
            rows = keep[:, task].nonzero().flatten()
            own, constant = losses[rows, task], losses[rows, task].detach()
            if len(rows) == 0:
                continue
            z = torch.zeros_like(own)
            if len(rows) > 1:
                z = (constant - constant.mean()) / (constant.std() + 1e-6)
            prototype, bias = phi["feature_sel.weight"][task], phi["feature_sel.bias"][task]
            weights = F.softplus(features[rows].detach() @ prototype + bias)
            weights = weights * torch.sigmoid(phi["loss_w"][task] * z + phi["loss_b"][task])
            weights = weights * F.softplus(phi["task_prior"][task])
            factor = 1.0 if task == 0 else self.config.aux_weight
            total = total + factor * (weights * own).mean()
        return total

    def lower_step(self, batch):
        loss = self.scheduled(batch, self.phi)
        gradients = torch.autograd.grad(loss, self.theta)
        self.steps += 1
        config = self.config
        with torch.no_grad():
            for p, g, (m, v) in zip(self.theta, gradients, self.moments, strict=True):
                g = g + config.w_decay * p
                if config.main_optimizer == "sgd":
                    p.sub_(config.main_lr * m.mul_(0.9).add_(g))
                    continue
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                m_hat, v_hat = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
                p.sub_(config.main_lr * m_hat / (v_hat.sqrt() + 1e-8))
        return loss.item()

    def upper_step(self, train_batches, dev_batches):
        statistics = {name: b.clone() for name, b in self.backbone.named_buffers()}
        phi = {name: value.clone().requires_grad_() for name, value in self.phi.items()}
        train_loss = sum(self.scheduled(b, phi) for b in train_batches) / len(train_batches)
        dev_loss = sum(self.losses(b)[1][:, 0].mean() for b in dev_batches) / len(dev_batches)
        v = torch.autograd.grad(dev_loss, self.theta)
        g = torch.autograd.grad(train_loss, self.theta, create_graph=True)
        p, length = v, norm(v)
        for _ in range(self.config.neumann_terms):
            inner = sum((a * b).sum() for a, b in zip(g, v, strict=True))
            hessian_product = torch.autograd.grad(inner, self.theta, retain_graph=True)
            alpha = self.config.neumann_alpha
            v = [a - alpha * h for a, h in zip(v, hessian_product, strict=True)]
            p = [a + b for a, b in zip(p, v, strict=True)]
        inner = sum((a * b).sum() for a, b in zip(g, p, strict=True))
        hypergradient = [-h for h in torch.autograd.grad(inner, list(phi.values()))]
        size = norm(hypergradient)
        shrink = min(1.0, self.config.max_grad_norm / (size + 1e-6))
        for (name, value), h in zip(self.phi.items(), hypergradient, strict=True):
            step = h * shrink + self.config.upper_decay * value
            self.momentum[name] = 0.9 * self.momentum[name] + step
            self.phi[name] = value - self.config.upper_lr * self.momentum[name]
        for name, buffer in self.backbone.named_buffers():
            buffer.copy_(statistics[name])
        return {
            "dev_loss": dev_loss.item(),
            "hypergradient_norm": size,
            "residual": norm(v) / length,
            "clipped": size > self.config.max_grad_norm,
        }


def norm(vector):
    return math.sqrt(sum((t * t).sum().item() for t in vector))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"labeled_per_class": 2},
        {"labeled_per_class": 1, "train_batch_size": 2},  # batches without a labelled sample
        {"n_meta_train_loss_accum": 2, "n_meta_loss_accum": 2, "aux_weight": 0.25},
        {"max_grad_norm": 1e-3, "main_lr": 1e-3, "neumann_alpha": 0.1, "neumann_terms": 1},
        {"main_optimizer": "sgd"},
    ],
    ids=["supervised", "semi-supervised", "hardly any labels", "accumulation", "clipped", "sgd"],
)
def test_training_equals_a_plain_computation_in_float64(change, tiny_config, tmp_path, log_every):
    log_every(1)
    settings = {"main_lr": 0.01, "upper_lr": 0.1, "hyperstep": 1, "max_steps": 2}
    settings["neumann_terms"] = 3
    run = built(tiny_config(method="joint", **{**settings, **change}))
    model, scheduler = run.bilevel.model.double(), run.bilevel.scheduler.double()
    plain = PlainTraining(run)
    lower, upper = run.lower_batches(0), run.upper_batches(0)  # training starts them afresh
    losses, uppers = [], []
    for _ in range(2):
        losses.append(plain.lower_step(next(lower)))
        uppers.append(plain.upper_step(*next(upper)))

    left = fit(run, tmp_path / "run")
    assert left.summary["best_step"] == 2  # a single validation, so that the last weights are back
    assert [row["loss"] for row in left.rows_of("step")] == pytest.approx(losses, rel=1e-9)
    for row, expected in zip(left.rows_of("upper"), uppers, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-8)
    ours = [*model.backbone.state_dict().values(), *model.heads.parameters()]
    plains = [*plain.backbone.state_dict().values(), *plain.head.parameters()]
    for one, other in zip(ours, plains, strict=True):
        # Adam makes steps of up to 1e-7 out of gradients that are rounding errors of zero.
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-7)
    for name, value in scheduler.named_parameters():
        torch.testing.assert_close(value.detach(), plain.phi[name], rtol=1e-8, atol=1e-10)


def test_losses_of_a_row_are_plain_means(tiny_config, tmp_path):
    """``aux_weight`` is in the scheduled loss, and not in the mean of the auxiliary losses."""
    run = built(tiny_config(method="common", aux_weight=0.5, max_steps=1))
    run.bilevel.model.double()
    _, losses = PlainTraining(run).losses(next(run.lower_batches(0)))
    (row,) = fit(run, tmp_path / "run").rows_of("step")
    target, others = losses[:, 0].mean().item(), losses[:, 1:].sum(dim=1).mean().item()
    assert row["loss"] == pytest.approx(target + 0.5 * others)
    assert row["target_loss"] == pytest.approx(target)
    assert row["aux_loss"] == pytest.approx(losses[:, 1:].mean().item())


@pytest.mark.parametrize("method", BILEVEL)
def test_an_upper_step_moves_the_scheduler_alone(method, tiny_config, tmp_path, monkeypatch):
    """The batch-norm policy: running statistics belong to the lower level."""
    run = built(tiny_config(method=method, upper_lr=0.1, n_meta_train_loss_accum=2))
    take, calls = Bilevel.upper_step, []

    def watched(self, *batches):
        before = copy.deepcopy(self.model.state_dict())
        calls.append(copy.deepcopy(self.scheduler.state_dict()))
        result = take(self, *batches)
        after = self.model.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name
        assert self.model.training
        assert all(p.grad is None or not p.grad.requires_grad for p in self.model.parameters())
        return result

    monkeypatch.setattr(Bilevel, "upper_step", watched)
    monkeypatch.setattr(State, "load_best", lambda self, fine_tuning=False: None)
    fit(run, tmp_path / "run")
    assert len(calls) == (4 if method == "joint_stable" else 3)
    learned = [*calls, run.bilevel.scheduler.state_dict()]
    for one, other in zip(learned, learned[1:], strict=False):
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_running_statistics_are_those_of_the_lower_steps_alone(tiny_config, tmp_path):
    """Upper steps whose learning rate is nothing leave exactly the run without upper steps."""
    often = built(tiny_config(method="linear", hyperstep=1, upper_lr=1e-30, upper_decay=0))
    never = built(tiny_config(method="linear", hyperstep=100))
    fit(often, tmp_path / "often")
    fit(never, tmp_path / "never")
    for name, tensor in often.bilevel.model.state_dict().items():
        assert torch.equal(tensor, never.bilevel.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("hyperstep", "max_steps", "upper_steps"),
    [(1, 3, [1, 2, 3]), (4, None, [4]), (3, 5, [3]), (7, None, []), (2, 100, [2, 4, 6])],
)
def test_hyperstep_and_max_steps_count_lower_steps(hyperstep, max_steps, upper_steps, tiny_run):
    run = tiny_run(method="linear", hyperstep=hyperstep, max_steps=max_steps)
    total = min(6, max_steps or 6)
    assert [row["step"] for row in run.rows_of("upper")] == upper_steps
    assert run.rows_of("step")[-1]["step"] == run.summary["steps"] == total
    assert [row["step"] for row in run.rows_of("epoch")] == sorted(
        {3, total} if total >= 3 else {3}
    )


@pytest.mark.parametrize(("solver", "products"), [("neumann", 1), ("identity", 0)])
def test_every_solver_trains(solver, products, tiny_run):
    run = tiny_run(method="joint", solver=solver)
    assert [row["products"] for row in run.rows_of("upper")] == [products] * 3


def test_a_schedule_that_no_upper_step_moves_is_warned_of(tiny_run):
    run = tiny_run(method="joint", hyperstep=7)
    assert "warning: 6 lower steps end before the first" in (run.directory / "log.txt").read_text()


# --------------------------------------------------------------------------------------------------
# Failing
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path):
    """The folder of a split whose data may be damaged."""
    shape = {"classes": 3, "train_per_class": 4, "attributes": 3, "image_size": (24, 20)}
    return prepare(tmp_path / "data", tmp_path / "split", **shape)


def damage(split_dir, name):
    """Overwrite an image of the set ``name``, at the same size. Returns its path."""
    split = load_split(split_dir)
    path = split.image_path(split.indices[name][0])
    path.write_bytes(b"?" * path.stat().st_size)
    return path


@pytest.mark.parametrize("name", ["rest_train", "dev", "valid", "test"])
def test_an_unreadable_image_is_named(name, own_data, tmp_path, command):
    path = damage(own_data, name)
    flags = {"method": "joint", "split_dir": own_data, "record_dir": tmp_path / "record"}
    code, _, err = command(train_bilevel.main, *tiny_flags(**flags, hyperstep=1))
    assert code == 2
    assert_one_error_line(err, path)


def test_an_unreadable_image_is_found_at_the_start_by_the_cache(own_data, tiny_run, tiny_config):
    path = damage(own_data, "test")
    with pytest.raises(UserError) as caught:
        tiny_run(method="joint", split_dir=str(own_data), cache_dir=None)
    assert str(path) in str(caught.value)
    assert not Path(tiny_config().record_dir).exists()


def test_divergence_stops_the_run_and_keeps_the_best_checkpoint(tiny_split, tmp_path, command):
    flags = tiny_flags(split_dir=tiny_split, record_dir=tmp_path, method="joint", exp_name="wild")
    flags += ["--upper_lr", "1e37", "--upper_decay", "1e30"]
    flags += ["--hyperstep", "4"]  # an epoch is 3 steps
    code, out, err = command(train_bilevel.main, *flags)
    run = Run(tmp_path / "full" / "wild")
    assert code == 1
    assert_one_error_line(err, "diverged at step 5", "loss", "epoch 1", run.directory)
    assert "test accuracy" not in out
    assert files_of(run) == FILES - {"summary.json"}
    assert run.checkpoint["epoch"] == 1
    assert all(torch.isfinite(t).all() for t in run.checkpoint["model"].values())
    assert "diverged at step 5" in (run.directory / "log.txt").read_text().splitlines()[-1]
    assert run.rows  # all of it JSON


def test_divergence_before_the_first_epoch_says_so(tiny_split, tmp_path, command):
    flags = tiny_flags(split_dir=tiny_split, record_dir=tmp_path, method="common", exp_name="wild")
    code, _, err = command(train_bilevel.main, *flags, "--main_lr", "1e30")
    assert code == 1
    assert_one_error_line(err, "diverged at step 2", "no epoch was completed")
    assert not (tmp_path / "full" / "wild" / "best.pt").exists()


def last_checkpoint(run, directory):
    """The state that a ``Run`` recorded in ``directory`` would continue from."""
    record = RunRecord(directory, description(run), resume=True)
    try:
        return record.load_checkpoint()
    finally:
        record.close()


@pytest.mark.parametrize("method", ["joint", "uncertainty"])
def test_a_gradient_that_is_not_finite_ends_the_run(method, tiny_config, tmp_path):
    """The loss is finite, its derivative is not: what is kept is of the step before."""
    run = built(tiny_config(method=method, save_every=1))
    own, steps = run.bilevel.lower_step, []

    def lower_step(*args):
        steps.append(1)
        return own(*args)

    def ruin(gradient):
        return gradient * math.inf if len(steps) == 4 else gradient

    run.bilevel.lower_step = lower_step
    run.bilevel.model.heads.linear.bias.register_hook(ruin)
    with pytest.raises(DivergenceError, match=r"diverged at step 4: the lower level's gradient"):
        fit(run, tmp_path / "run")
    state = last_checkpoint(run, tmp_path / "run")
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_no_checkpoint_holds_what_an_update_ruined(level, tiny_config, tmp_path):
    """Loss, gradient and predictions are finite; the step leaves a parameter that is not."""
    every = {"lower": 4, "upper": 3}[level]  # an epoch is 3 steps
    run = built(tiny_config(method="joint", save_every=1, hyperstep=every))
    optimizer = getattr(run.bilevel, level)
    own, steps = optimizer.step, []
    heads, scheduler = run.bilevel.model.heads.linear.bias, run.bilevel.scheduler.task_prior
    ruined = {"lower": heads, "upper": scheduler}[level]

    def step():
        own()
        steps.append(1)
        if len(steps) == {"lower": 3, "upper": 1}[level]:
            ruined.data[-1] = math.inf  # of an auxiliary task: no prediction shows it

    optimizer.step = step
    with pytest.raises(DivergenceError, match=r"diverged at step 3: its update left parameters"):
        fit(run, tmp_path / "run")
    assert last_checkpoint(run, tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / "best.pt").exists()


def test_a_hypergradient_that_is_not_finite_is_divergence(tiny_run):
    with pytest.raises(DivergenceError, match="hypergradient.*--neumann_alpha"):
        tiny_run(method="joint", neumann_alpha=1e20, neumann_terms=3)


def test_a_model_that_only_its_last_step_ruined_gets_no_accuracy(tiny_run):
    """After the step the outputs are NaN, of which argmax still makes a prediction."""
    with pytest.raises(DivergenceError):
        tiny_run(method="common", main_lr=1e30, max_steps=1)


# --------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------


def test_the_script_ends_with_the_test_accuracy(tiny_split, tmp_path):
    places = {"split_dir": tiny_split, "record_dir": tmp_path / "with blanks"}
    flags = tiny_flags(method="joint", num_workers=1, exp_name="mine", **places)
    result = subprocess.run(
        [sys.executable, ROOT / "train_bilevel.py", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd="/",  # any folder will do
    )
    assert (result.returncode, result.stderr) == (0, "")
    run = Run(tmp_path / "with blanks" / "full" / "mine")
    accuracy = run.summary["test_accuracy"]
    assert result.stdout.splitlines()[-1] == f"test accuracy: {accuracy:.4f}"
    assert "\r" not in result.stdout


# --------------------------------------------------------------------------------------------------
# A checkpoint is of use
# --------------------------------------------------------------------------------------------------


def test_a_runs_best_checkpoint_starts_another_run(tiny_run, tiny_config):
    first = tiny_run(method="common", max_steps=1)
    settings = {"method": "joint", "backbone_weights": str(first.directory / "best.pt")}
    run = built(tiny_config(**settings))
    for name, tensor in run.bilevel.model.backbone.state_dict().items():
        assert torch.equal(tensor, first.checkpoint["model"][f"backbone.{name}"])
    assert run.config.backbone_pretrain is False
    assert tiny_run(**settings, max_steps=1).summary["steps"] == 1
