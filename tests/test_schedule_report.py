"""The schedule report: its numbers against definitions, its files, its page, bad input."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, mutual_info_score, roc_auc_score
from torch import nn

import inspect_schedule
from auxilearn.baselines.combiners import LinearHyperNet, MonoNonlinearHyperNet
from auxilearn.bilevel import Bilevel
from auxilearn.data import cub
from auxilearn.data.dataset import in_order, training_set
from auxilearn.data.split import load_split, write_split
from auxilearn.files import read_rows
from auxilearn.hypernet import MonoJoint, Naive_hyper, TaskLosses, scheduled_loss
from auxilearn.report import statistics, write
from auxilearn.report.brief import CHANCE, statements
from auxilearn.report.findings import Findings, find, rank_labels
from auxilearn.report.run import Reference, evaluate_run, read_run
from auxilearn.run.build import build
from auxilearn.run.config import Config, from_record
from auxilearn.run.history import QUANTILES, ScheduleHistory
from auxilearn.weights import sample_weights, schedule_weights
from tests import small
from tests.conftest import TINY, assert_one_error_line, assert_same_run
from tests.cub_shape import write_cub_shape
from train_bilevel import train

SAMPLES, TASKS, FEATURES = 12, 3, 5

# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------


def test_correlation():
    values = np.array([1.0, 5.0, 2.0, 9.0])
    assert statistics.correlation(values, np.exp(values)) == pytest.approx(1)
    assert statistics.correlation(values, -values) == pytest.approx(-1)
    assert np.isnan(statistics.correlation(values, np.ones(4)))


def test_information_is_mutual_information_less_its_bias():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, size=4000)
    attributes = np.stack([labels == 1, rng.random(4000) < 0.3, np.ones(4000)], axis=1).astype(int)
    information = [statistics.information(labels, attribute) for attribute in attributes.T]
    share = np.mean(labels == 1)
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    bias = 3 / (2 * 4000 * np.log(2))
    assert information[0] == pytest.approx(entropy - bias, abs=1e-9)
    expected = mutual_info_score(labels, attributes[:, 1]) / np.log(2) - bias
    assert information[1] == pytest.approx(expected, abs=1e-9)
    assert abs(information[1]) < 1e-3  # a coin says nothing
    assert information[2] == 0


def test_spread_shares_sum_to_one_and_find_the_factor_that_varies():
    rng = np.random.default_rng(1)
    one, other = np.exp(rng.normal(size=(2, 500)))
    shares = statistics.spread_shares({"one": one, "other": other, "constant": np.full(500, 3.0)})
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["constant"] == pytest.approx(0)
    against = statistics.spread_shares({"one": one, "other": one**-0.5})
    assert against == pytest.approx({"one": 2, "other": -1})
    assert statistics.spread_shares({"one": np.ones(5)}) == {}


# --------------------------------------------------------------------------------------------------
# The library: model, scheduler, data -> weights
# --------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    """A model outside this project: a batch is (inputs, targets, places, mask)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, FEATURES), nn.Tanh(), nn.Dropout(0.5))
        self.heads = nn.Linear(FEATURES, TASKS)

    def forward(self, batch):
        inputs, targets, places, mask = batch
        features = self.body(inputs)
        losses = (self.heads(features) - targets).square()
        return TaskLosses(losses, features, places, mask)


def schedulers():
    torch.manual_seed(0)
    network = MonoNonlinearHyperNet(0, TASKS, [4, 4], weight_normalization=False, dropout_rate=0.5)
    return {
        "joint": MonoJoint(0, TASKS, FEATURES),
        "naive": Naive_hyper(SAMPLES, TASKS),
        "linear": LinearHyperNet(0, TASKS, skip_connection=True, init_value=0.7),
        "task": network,
    }


def regression_batches(masked, size=5, order=None):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 4, generator=generator)
    targets = torch.randn(SAMPLES, TASKS, generator=generator)
    mask = torch.ones(SAMPLES, TASKS, dtype=torch.bool)
    mask[:, 0] = torch.arange(SAMPLES) % 3 > 0
    places = torch.arange(SAMPLES) if order is None else order
    return [
        (inputs[p], targets[p], p, mask[p] if masked else None) for p in torch.split(places, size)
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["joint", "naive", "linear", "task"])
def test_weights_make_the_gradient_of_the_training_step(name, masked):
    """sum_ik W_ik / N_k dL_ik/dtheta is the gradient of the scheduled loss, for every scheduler."""
    model, scheduler = Regression().eval(), schedulers()[name].eval()
    (batch,) = regression_batches(masked, size=SAMPLES)
    table = schedule_weights(model, scheduler, [batch])
    theta = list(model.parameters())
    expected = torch.autograd.grad(scheduled_loss(scheduler, model(batch)), theta)
    losses, mask = model(batch).losses, batch[3]
    count = torch.full((TASKS,), SAMPLES) if mask is None else mask.sum(dim=0)
    weights = torch.nan_to_num(torch.from_numpy(table.weights))
    gradient = torch.autograd.grad(torch.sum(weights / count * losses), theta)
    for one, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, other)
    outside = np.zeros((SAMPLES, TASKS), dtype=bool) if mask is None else ~mask.numpy()
    assert np.array_equal(np.isnan(table.weights), outside)
    assert np.array_equal(np.isnan(table.losses), outside)


def test_joint_weights_are_the_schedule_over_all_samples():
    model, scheduler = Regression().eval(), schedulers()["joint"]
    table = schedule_weights(model, scheduler, regression_batches(masked=False))
    outputs = model(regression_batches(masked=False, size=SAMPLES)[0])
    schedule = scheduler.schedule(outputs.features, outputs.losses).detach()
    np.testing.assert_allclose(table.weights, schedule, rtol=1e-5)
    made = table.factors["feature"] * table.factors["loss"] * table.factors["task"]
    np.testing.assert_allclose(made, table.weights, rtol=1e-5)


def test_weights_do_not_depend_on_batches_and_order():
    model, scheduler = Regression(), schedulers()["joint"]
    table = schedule_weights(model, scheduler, regression_batches(masked=True))
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3))
    other = schedule_weights(model, scheduler, regression_batches(True, size=4, order=order))
    assert np.array_equal(other.sample_id, order.numpy())
    np.testing.assert_allclose(other.weights, table.weights[order.numpy()], rtol=1e-5)


def test_other_schedules_are_what_they_hold():
    model, nets = Regression(), schedulers()
    table = schedule_weights(model, nets["naive"], regression_batches(masked=False))
    expected = nets["naive"].schedule(torch.arange(SAMPLES)).detach()
    np.testing.assert_allclose(table.weights, expected, rtol=1e-5)
    assert table.factors == {}
    table = schedule_weights(model, nets["linear"], regression_batches(masked=True))
    expected = nets["linear"].get_weights().detach().numpy() + [1, 0, 0]  # the skip connection
    known = ~np.isnan(table.weights)
    everywhere = np.broadcast_to(expected, table.weights.shape)
    np.testing.assert_allclose(table.weights[known], everywhere[known], rtol=1e-5)


def test_a_scheduler_may_call_something_else_factors():
    class PerTask(LinearHyperNet):
        def factors(self):
            return self.get_weights()

    table = schedule_weights(Regression(), PerTask(0, TASKS), regression_batches(masked=False))
    assert table.weights.shape == (SAMPLES, TASKS) and table.factors == {}


def test_weights_leave_model_and_scheduler_as_they_were():
    model, scheduler = Regression().train(), schedulers()["task"].train()
    model.heads.eval()
    before = [m.training for m in (*model.modules(), *scheduler.modules())]
    schedule_weights(model, scheduler, regression_batches(masked=False))
    assert [m.training for m in (*model.modules(), *scheduler.modules())] == before
    assert all(p.grad is None for p in (*model.parameters(), *scheduler.parameters()))


def test_predictions_and_missing_parts():
    class LossesOnly(Regression):
        def forward(self, batch):
            return TaskLosses(super().forward(batch).losses)

    batches = regression_batches(masked=False)
    predict = lambda batch, outputs: outputs.losses.argmin(dim=1)  # noqa: E731
    table = schedule_weights(LossesOnly(), schedulers()["linear"], batches, predict)
    assert np.array_equal(table.prediction, table.losses.argmin(axis=1))
    assert np.array_equal(table.sample_id, np.arange(SAMPLES))
    with pytest.raises(ValueError, match="batches is empty"):
        schedule_weights(Regression(), schedulers()["joint"], [])


# --------------------------------------------------------------------------------------------------
# History
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_history_holds_the_weights_of_the_training_steps(tmp_path, masked):
    model, scheduler = Regression().eval(), schedulers()["joint"]
    wrong = np.arange(SAMPLES) % 2 == 0
    history = ScheduleHistory(tmp_path / "schedule.jsonl", ["target", "a", "b"], wrong)
    batches = regression_batches(masked)
    expected = []
    bilevel = Bilevel(model, scheduler, torch.optim.SGD(model.parameters(), lr=0.1))
    model.train()
    model.body[2].p = 0.0  # the same outputs twice
    for batch in batches:
        expected.append(sample_weights(scheduler, model(batch)))
        history.add(bilevel.lower_step(batch))
    for weights, _, labeled in history.state()["target"]:  # of the target alone, in a checkpoint
        held = [t for t in (weights, labeled) if t is not None]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in held)
    means = history.write(3, [t.double().numpy() for t in history.waiting()])
    assert history.waiting() == []
    names, row = read_rows(tmp_path / "schedule.jsonl")
    assert names == {"kind": "tasks", "names": ["target", "a", "b"]}
    mask = torch.cat([b[3] for b in batches]) if masked else torch.ones(SAMPLES, TASKS).bool()
    weights = torch.cat(expected)
    mean = weights.sum(dim=0) / mask.sum(dim=0)
    assert row["mean_weight"] == pytest.approx(mean.tolist(), rel=1e-4)
    assert row["mean_weight"] == pytest.approx(means, rel=1e-4)
    assert (row["kind"], row["step"], row["samples"]) == ("schedule", 3, SAMPLES)
    known = mask[:, 0].numpy()
    groups = {"all": known, "clean": known & ~wrong, "corrupted": known & wrong}
    for name, members in groups.items():
        quantiles = np.quantile(weights[:, 0].numpy()[members], QUANTILES)
        assert row["target_weight"][name] == pytest.approx(quantiles.tolist(), rel=1e-4)


def test_a_history_goes_on_where_the_weights_are(tmp_path):
    """A checkpoint is read into main memory; the weights to come may be a GPU's."""
    history = ScheduleHistory(tmp_path / "schedule.jsonl", ["target", "a", "b"])
    entry = (torch.ones(4), torch.arange(4), None)
    history.restore({"total": torch.ones(3), "count": 4, "target": [entry]}, torch.device("meta"))
    assert history.total.is_meta and history.count == 4
    assert [value and value.device.type for value in history.target[0][2:]] == [None]
    assert all(value.is_meta for value in history.target[0][:2])


def test_history_changes_nothing_in_a_run(tiny_run, monkeypatch):
    watched = tiny_run(exp_name="watched", corrupted=True)
    monkeypatch.setattr(ScheduleHistory, "of_run", lambda *args: None)
    unwatched = tiny_run(exp_name="unwatched", corrupted=True)
    assert (watched.directory / "schedule.jsonl").exists()
    assert not (unwatched.directory / "schedule.jsonl").exists()
    assert_same_run(watched, unwatched)


def test_rows_that_a_crash_cut_off_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"ste')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    assert read_rows(tmp_path / "none.jsonl") == []


# --------------------------------------------------------------------------------------------------
# Reports of runs
# --------------------------------------------------------------------------------------------------

JOINT = {"method": "joint", "corrupted": True, "corrupted_rate": 0.5, "upper_lr": 0.5}
WORDS = ("useful", "scenery", "<chance>")  # roles are the data's words


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny data set with roles, its split, and a class whose name is awkward in HTML."""
    folder = tmp_path_factory.mktemp("report")
    shape = {"classes": 4, "train_per_class": 9, "attributes": 6, "image_size": (24, 20)}
    root = write_cub_shape(folder / "data", **shape)
    awkward = "001.Bird_<b>&_\"one'"
    (root / "classes.txt").write_text(
        (root / "classes.txt").read_text().replace("001.Bird_1", awkward)
    )
    names = [line.split()[1] for line in (root / "attributes.txt").read_text().splitlines()]
    roles = {name: WORDS[i % len(WORDS)] for i, name in enumerate(names)}
    (root / cub.ROLES).write_text(json.dumps({"roles": roles}))
    write_split(folder / "split", cub.read_annotations(root))
    return folder


@pytest.fixture(scope="module")
def make_run(data):
    """``make_run(**changes)``: the folder of a finished tiny run; the same one every time."""
    made = {}

    def make(**changes):
        name = "-".join(f"{k}{v}" for k, v in changes.items())
        if name not in made:
            places = {"split_dir": str(data / "split"), "record_dir": str(data / "record")}
            config = Config(**{**TINY, **places, "exp_name": name, **changes})
            train(config)
            made[name] = data / "record" / config.setting / name
        return made[name]

    return make


def copied(run, tmp_path):
    """A run's folder to be changed, without a report."""
    skipped = shutil.ignore_patterns("report", "elsewhere")
    return Path(shutil.copytree(run, tmp_path / "run", ignore=skipped))


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """The page's text, ids, links and tags, and whether its tags are balanced."""

    VOID = {"meta", "link", "img", "br", "input", "hr"}

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.ids, self.attributes, self.words = [], [], [], []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.attributes += [(tag, name, value) for name, value in attributes.items()]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["script"] and self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def sheets(self):
        """{task number: numbers of the samples on its contact sheet, in order}."""
        parts = re.split(r'data-sheet="(\d+)"', self.source.split('<h2 id="labels-title')[0])[1:]
        pictures = [re.findall(r'class="picture t(\d+)"', part) for part in parts[1::2]]
        return dict(zip(map(int, parts[::2]), pictures, strict=True))


@pytest.fixture(scope="module")
def full_report(make_run):
    """The report, charts and all, of a JTDS run with corrupted labels."""
    pytest.importorskip("matplotlib")
    run = make_run(**JOINT)
    page, statements = write.write_report(run, rank_by="weight")
    return run, page.parent, Page(page), statements


def test_report_has_all_files(full_report):
    _, report, page, _ = full_report
    assert {path.name for path in report.iterdir()} == {
        "index.html",
        "samples.csv",
        "tasks.csv",
        "clean_labels.csv",
        "classes.csv",
        "weights.npz",
        "figures",
    }
    pictures = {path.stem for path in (report / "figures").glob("*.png")}
    assert pictures == {path.stem for path in (report / "figures").glob("*.svg")}
    assert {i.removeprefix("chart-") for i in page.ids if i.startswith("chart-")} == pictures
    assert pictures == {
        "losses",
        "accuracy",
        "hypergradient",
        "tasks_ranked",
        "tasks_history",
        "information",
        "samples",
        "target_history",
        "wrong_labels",
    }


def test_samples_csv_has_both_labels_and_what_the_checkpoint_makes_of_them(full_report, data):
    run, report, *_ = full_report
    config = from_record(json.loads((run / "config.json").read_text())["config"])
    split = load_split(data / "split")
    samples = training_set(
        split, "rest_train", split.tasks[: config.task_num], config.seed, corrupted_rate=0.5
    )
    rows = read_csv(report / "samples.csv")
    columns = ["id", "path", "label", "given_label", "weight", "loss", "prediction", "margin"]
    assert list(rows[0]) == columns
    assert [float(row["margin"]) for row in rows] == pytest.approx(np.load(run / "margins.npy"))
    positions = samples.positions.tolist()
    assert [row["id"] for row in rows] == [split.ids[p] for p in positions]
    assert [row["path"] for row in rows] == [split.paths[p] for p in positions]
    assert [int(row["label"]) for row in rows] == [split.labels[p, 0] for p in positions]
    assert [int(row["given_label"]) for row in rows] == samples.labels[:, 0].tolist()
    assert any(row["label"] != row["given_label"] for row in rows)

    built = build(config, split)
    model, scheduler = built.bilevel.model.eval(), built.bilevel.scheduler
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    order = in_order(len(samples), len(samples))
    (batch,) = built._stream(samples, order, "view", augment=False)
    with torch.no_grad():
        outputs = model(batch)
        weights = scheduler.schedule(outputs.features, outputs.losses)
        predicted = model.predict(batch.inputs).argmax(dim=1)
    column = lambda name: [float(row[name]) for row in rows]  # noqa: E731
    assert column("weight") == pytest.approx(weights[:, 0].tolist(), rel=1e-4)
    assert column("loss") == pytest.approx(outputs.losses[:, 0].tolist(), rel=1e-4)
    assert column("prediction") == predicted.tolist()

    table = np.load(report / "weights.npz")
    np.testing.assert_allclose(table["weights"], weights, rtol=1e-4)
    made = table["feature_factor"] * table["loss_factor"] * table["task_factor"]
    np.testing.assert_allclose(made, weights, rtol=1e-4)
    assert table["ids"].tolist() == [row["id"] for row in rows]
    tasks = read_csv(report / "tasks.csv")
    assert list(tasks[0])[:4] == ["name", "mean_weight", "spread", "task_factor"]
    assert [row["name"] for row in tasks] == [task.name for task in split.tasks]
    assert table["task_names"].tolist() == [row["name"] for row in tasks]
    mean = [float(row["mean_weight"]) for row in tasks]
    assert mean == pytest.approx(weights.mean(dim=0).tolist(), rel=1e-4)
    assert sum(float(row["share_of_loss"]) for row in tasks) == pytest.approx(1, abs=1e-4)


def test_clean_labels_are_ranked_by_weight(full_report):
    _, report, *_ = full_report
    samples = {row["id"]: row for row in read_csv(report / "samples.csv")}
    labels = read_csv(report / "clean_labels.csv")
    assert len(labels) == len(samples)
    weights = [float(samples[row["id"]]["weight"]) for row in labels]
    assert weights == sorted(weights)
    quality = [float(row["label_quality"]) for row in labels]
    assert quality == sorted(quality)
    assert 0 < quality[0] < quality[-1] == 1
    for row in labels:
        assert row["given_label"] == samples[row["id"]]["given_label"]
        assert row["predicted_label"] == samples[row["id"]]["prediction"]
        if row["is_label_issue"] == "True":
            assert row["given_label"] != row["predicted_label"]


def test_page_tells_the_truth_about_both_rankings(full_report):
    _, report, page, statements = full_report
    rows = read_csv(report / "samples.csv")
    wrong = [row["label"] != row["given_label"] for row in rows]
    by_weight = roc_auc_score(wrong, [-float(row["weight"]) for row in rows])
    by_loss = roc_auc_score(wrong, [float(row["loss"]) for row in rows])
    assert f"{by_weight:.3f} by low target weight, {by_loss:.3f} by high target loss" in page.text
    precision = average_precision_score(wrong, [-float(row["weight"]) for row in rows])
    assert f"low target weight {by_weight:.3f} {precision:.3f}" in page.text
    curve = re.search(
        r'<figure id="chart-wrong_labels">.*?</figure>', page.source, re.DOTALL
    ).group()
    assert f"by high target loss (ROC area {by_loss:.3f})" in curve
    text = next(s.text for s in statements if s.topic == "Wrong labels")
    assert text in page.text
    guessed = max(abs(by_weight - 0.5), abs(by_loss - 0.5)) < CHANCE
    worse = by_weight < max(by_loss, 0.5) - 0.01
    assert ("worse" in text) == (worse and not guessed)
    assert ("much better than chance" in text) == guessed


def test_page_names_roles_in_order_of_what_they_say_about_the_class(full_report):
    _, report, page, _ = full_report
    tasks = read_csv(report / "tasks.csv")[1:]
    information = {
        word: np.mean([float(t["class_information"]) for t in tasks if t["role"] == word])
        for word in WORDS
    }
    first = max(information, key=information.get)
    assert f"Attributes that are {first} outweigh the others" in page.text
    mine = [float(t["mean_weight"]) for t in tasks if t["role"] == first]
    others = [float(t["mean_weight"]) for t in tasks if t["role"] != first]
    share = np.mean([a > b for a, b in product(mine, others)])
    lower = np.mean(
        [
            float(a["mean_loss"]) < float(b["mean_loss"])
            for a, b in product(tasks, tasks)
            if a["role"] == first != b["role"]
        ]
    )
    row = f"{first} {len(mine)} {np.mean(mine):.3f} {share:.0%} {lower:.0%}"
    assert row in page.text


def test_page_needs_nothing_beside_itself(full_report):
    *_, page, _ = full_report
    assert len(page.ids) == len(set(page.ids))
    for _, name, value in page.attributes:
        if name in ("href", "xlink:href") and value.startswith("#"):
            assert value[1:] in page.ids, value
        elif name in ("src", "href", "xlink:href"):
            assert value.startswith("data:"), value
        if name in ("aria-labelledby", "for"):
            assert value in page.ids
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert not re.search(r"https?:|@import|url\((?!#|data:)", bare)
    assert "<b>&_" not in page.source  # the awkward class name, escaped wherever it stands
    assert "<chance>" not in page.source
    assert "Bird <b>& \"one'" in page.text


def test_charts_take_on_the_colours_of_the_page(full_report):
    from auxilearn.report.style import COLOURS

    _, report, page, _ = full_report
    charts = re.findall(r'<figure id="chart-\w+"><svg.*?</svg>', page.source, re.DOTALL)
    assert len(charts) == 9
    for chart in charts:
        assert 'role="img" aria-label="' in chart
        colours = set(re.findall(r"(?:fill|stroke): (#\w+)", chart))
        assert not colours, colours
    for name, code in COLOURS.items():  # charts on paper and in the light page are alike
        assert re.search(rf"--{name}: light-dark\({code}, #\w+\);", page.source)
    assert any("var(--orange)" in chart for chart in charts)
    texts = [re.search(r"area (0\.\d+)", svg) for svg in charts]
    assert any(t and len(t.group(1)) == 5 for t in texts)  # labels are not cut to two digits


def test_legends_lie_outside_the_axes(full_report):
    from auxilearn.report import figures, style

    run, *_ = full_report
    run = read_run(run)
    findings = find(run, evaluate_run(run))
    with figures.mpl.rc_context(style.STYLE):
        drawn = [figure for chart in figures.CHARTS if (figure := chart.draw(findings))]
        legends = 0
        for figure in drawn:
            figure.draw_without_rendering()
            for axes in figure.axes:
                assert axes.get_legend() is None
                for legend in figure.legends:
                    box = legend.get_window_extent()
                    assert not box.overlaps(axes.get_window_extent())
                    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
                    legends += 1
    assert legends >= 9


def test_every_task_has_a_contact_sheet(full_report):
    _, report, page, _ = full_report
    assert set(page.sheets) == set(range(7))
    weights = np.load(report / "weights.npz")["weights"]
    highest = np.argsort(-weights[:, 3], kind="stable")
    assert int(page.sheets[3][0]) == highest[0]
    assert len(set(page.sheets[3])) == len(page.sheets[3]) == 24
    for place in page.sheets[3]:
        assert f".t{place} {{ background-image: url(data:image/jpeg;base64," in page.source


@pytest.mark.parametrize("method", ["naive", "task", "linear"])
def test_every_bilevel_method_has_a_report(make_run, no_charts, command, method):
    run = make_run(method=method, corrupted=True)
    code, out, _ = command(inspect_schedule.main, run)
    assert code == 0
    assert f"written to {run}/report/index.html" in out
    table = np.load(run / "report" / "weights.npz")
    assert set(table.files) == {"weights", "ids", "task_names"}
    spread = np.ptp(table["weights"].astype(float), axis=0)
    assert (spread[0] == 0) == (method == "linear")
    if method == "linear":
        assert "does not tell them apart" in out


def test_unlabelled_samples_have_no_target_weight(make_run, no_charts):
    run = make_run(method="joint", labeled_per_class=3)
    page, _ = write.write_report(run)
    rows = read_csv(run / "report" / "samples.csv")
    known = [row for row in rows if row["given_label"]]
    assert len(known) == 12
    assert all(row["weight"] == row["loss"] == "" for row in rows if not row["given_label"])
    assert all(row["given_label"] == row["label"] and row["weight"] for row in known)
    assert len(read_csv(run / "report" / "clean_labels.csv")) == 12
    weights = np.load(run / "report" / "weights.npz")["weights"]
    assert np.isnan(weights[:, 0]).sum() == len(rows) - 12
    assert not np.isnan(weights[:, 1:]).any()
    assert "Ranking wrong labels" not in Page(page).text


@pytest.mark.parametrize("settings", [JOINT, {"method": "common"}], ids=("joint", "common"))
def test_a_wrong_flag_leaves_an_earlier_report(settings, make_run, no_charts, command, tmp_path):
    run = copied(make_run(**settings), tmp_path)
    command(inspect_schedule.main, run)
    before = {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()}
    assert run / "report" / "samples.csv" in before
    for flags in (["--device", "nonsense"], ["--split_dir", tmp_path]):
        code, _, err = command(inspect_schedule.main, run, *flags)
        assert code == 2
        assert_one_error_line(err, flags[1], "stays as it was")
    assert {path: path.read_bytes() for path in before} == before


def test_wanted_sheets_and_ranking_by_loss(make_run, no_charts, command, monkeypatch):
    run = make_run(**JOINT)
    monkeypatch.setattr("auxilearn.report.page.BUDGET", 0)
    out = run / "elsewhere"
    wanted = "has_part_2::kind_1"
    flags = ("--out", out, "--rank_by", "loss", "--sheets", wanted)
    assert command(inspect_schedule.main, run, *flags)[0] == 0
    assert set(Page(out / "index.html").sheets) == {0, 4}
    losses = {row["id"]: float(row["loss"]) for row in read_csv(out / "samples.csv")}
    order = [losses[row["id"]] for row in read_csv(out / "clean_labels.csv")]
    assert order == sorted(order, reverse=True)
    code, _, err = command(inspect_schedule.main, run, "--sheets", "has_part")
    assert code == 2
    assert_one_error_line(err, "has_part: no such task", "has_part_2::kind_3")


def table_of(weight, loss, prediction=0):
    """A table of samples that all have label 0."""
    columns = {"given_label": 0, "label": 0, "prediction": prediction}
    return pd.DataFrame({"weight": weight, "loss": loss} | columns)


def test_what_labels_are_ranked_by():
    rng = np.random.default_rng(0)
    loss, weight, margin = rng.exponential(size=60), rng.random(60), rng.normal(size=60)
    bare = table_of(weight, loss)
    table = bare.assign(margin=margin)
    places = np.arange(60)
    ranks = [np.argsort(np.argsort(values)) for values in (loss, -margin)]
    together = ("auto", "loss and margin", ranks[0] + ranks[1])
    for samples, accuracy, rank_by, by, score in (
        (table, 0.59, *together),
        (table, 0.6, "auto", "loss", loss),
        (table, 0.9, "margin", "margin", -margin),
        (table, 0.5, "weight", "weight", -weight),
        (table, 0.5, "loss", "loss", loss),
        (bare, 0.5, "auto", "loss", loss),
        (bare, 0.5, "margin", "loss", loss),
        (table.assign(margin=np.where(places == 7, np.nan, margin)), 0.5, "auto", "loss", loss),
        (table.assign(weight=np.nan), 0.5, "weight", "loss", loss),
    ):
        labels, ranking = rank_labels(samples, accuracy, rank_by)
        assert ranking.by == by
        assert ranking.reason.startswith(f"Ranked by {by}")
        assert labels.index.tolist() == sorted(places, key=lambda i: (-score[i], -loss[i]))


def test_suspected_labels_are_more_than_the_model_s_errors():
    """100 of 400 labels are contradicted. The error rate in validation says how many may be."""
    loss = np.linspace(0, 4, 400)
    samples = table_of(np.exp(-loss), loss, (np.arange(400) >= 300).astype(int))
    labels, ranking = rank_labels(samples, valid=0.9)
    assert (ranking.contradicted, ranking.expected) == (100, 40)
    assert labels.suspected.tolist() == [True] * 100 + [False] * 300
    assert labels.quality.tolist() == [(i + 1) / 400 for i in range(400)]
    assert ranking.verdict.startswith("Suspected are the 100 labels")
    assert "explains 40 of them" in ranking.verdict
    labels, ranking = rank_labels(samples, valid=0.8)
    assert not labels.suspected.any()
    assert ranking.verdict.startswith("None is suspected: the model contradicts 100 labels")


@pytest.mark.parametrize(
    ("accuracy", "contradicted", "words"),
    [
        (0.43, 119, "too weak for this list: it is right on 43% of the validation set"),
        (0.9, 221, "predicts only 0% of the labels it was trained on"),
        (0.9, 20, None),
    ],
)
def test_a_weak_model_is_named(accuracy, contradicted, words):
    loss = np.linspace(0, 4, 221)
    prediction = (np.arange(221) < contradicted).astype(int)
    samples = table_of(np.full(221, np.nan), loss, prediction)
    labels, ranking = rank_labels(samples, accuracy)
    evaluation = SimpleNamespace(valid=accuracy)
    findings = Findings(None, evaluation, None, samples, labels, ranking)
    assert (findings.weakness is None) == (words is None)
    if words:
        assert words in findings.weakness
    if contradicted == 119:  # of 126 that a model so weak would contradict were all labels right
        assert not labels.suspected.any()


def test_one_ranking_for_brief_list_and_table(full_report, make_run, no_charts, tmp_path):
    for rank_by in ("auto", "loss", "weight", "margin"):
        page, said = write.write_report(make_run(**JOINT), tmp_path, rank_by=rank_by)
        rows = {row["id"]: row for row in read_csv(tmp_path / "samples.csv")}
        listed = [row["id"] for row in read_csv(tmp_path / "clean_labels.csv")]
        text = Page(page).text
        (by,) = re.findall(r"All labels, by (loss and margin|\w+) Ranked", text)
        assert by == ("loss and margin" if rank_by == "auto" else rank_by)
        brief = next(s.text for s in said if s.topic == "Wrong labels")
        assert f"Ranked by {by}" in brief
        assert "Go by" not in text
        if rank_by != "auto":
            sign = -1 if by == "loss" else 1
            assert listed == sorted(listed, key=lambda i: sign * float(rows[i][by]))
        table = re.search(r'<table id="label-table">.*?</table>', page.read_text(), re.DOTALL)
        assert re.findall(r"<td title=[^>]*>([^<]*)</td>", table.group()) == listed


# --------------------------------------------------------------------------------------------------
# Bad input, and what can still be shown
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["common", "single"])
def test_a_run_without_a_schedule_shows_its_losses(make_run, no_charts, command, method):
    run = make_run(method=method, corrupted=True)
    code, _, err = command(inspect_schedule.main, run)
    assert code == 2
    assert_one_error_line(err, run, f"--method {method}", "learns none", "report/index.html")
    rows = read_csv(run / "report" / "samples.csv")
    assert all(row["weight"] == "" and row["loss"] for row in rows)
    assert not (run / "report" / "tasks.csv").exists()
    text = Page(run / "report" / "index.html").text
    assert f"A schedule: method {method}" in text
    assert "Highest target loss" in text
    assert "Lowest target weight" not in text


def test_an_unfinished_run_shows_its_curves(make_run, command, tmp_path):
    pytest.importorskip("matplotlib")
    run = copied(make_run(**JOINT), tmp_path)
    for name in ("summary.json", "best.pt"):
        (run / name).unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in rows if '"kind": "epoch"' not in row]
    (run / "metrics.jsonl").write_text("\n".join([*rows, '{"kind": "step", "st']))
    report = run / "report"
    report.mkdir()
    (report / "samples.csv").write_text("of an earlier report")
    (report / "mine.txt").write_text("not ours")
    code, out, _ = command(inspect_schedule.main, run)
    assert code == 0
    assert "No epoch has been completed yet" in out
    assert sorted(p.name for p in report.iterdir()) == [
        "figures",
        "index.html",
        "mine.txt",
        "tasks.csv",
    ]
    page = Page(report / "index.html")
    assert "no epoch is completed yet" in page.text
    charts = {i.removeprefix("chart-") for i in page.ids if i.startswith("chart-")}
    assert "wrong_labels" not in charts
    assert {"losses", "hypergradient", "tasks_ranked", "tasks_history", "target_history"} <= charts
    last = read_rows(run / "schedule.jsonl")[-1]["mean_weight"]
    mean = [float(row["mean_weight"]) for row in read_csv(report / "tasks.csv")]
    assert mean == pytest.approx(last)


def test_a_run_that_goes_on_has_a_report_of_its_best_checkpoint(make_run, no_charts, tmp_path):
    run = copied(make_run(**JOINT), tmp_path)
    (run / "summary.json").unlink()
    page, statements = write.write_report(run)
    assert "not finished" in statements[0].text
    assert (page.parent / "weights.npz").exists()


def test_moved_data_are_found_by_flags(make_run, data, no_charts, command, tmp_path):
    run = make_run(**JOINT)
    shutil.copytree(data / "data", tmp_path / "data")
    shutil.copytree(data / "split", tmp_path / "split")
    run = copied(run, tmp_path)
    recorded = json.loads((run / "config.json").read_text())
    recorded["config"]["split_dir"] = recorded["config"]["data_root"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(recorded))
    code, _, err = command(inspect_schedule.main, run)
    assert code == 2
    assert_one_error_line(err, tmp_path / "gone", "if moved, give --split_dir and --data_root")
    text = Page(run / "report" / "index.html").text
    assert "Not in this report" in text
    assert "gone" in text
    assert (run / "report" / "tasks.csv").exists()  # the history alone tells the mean weights
    flags = ("--split_dir", tmp_path / "split", "--data_root", tmp_path / "data")
    assert command(inspect_schedule.main, run, *flags)[0] == 0
    assert (run / "report" / "weights.npz").exists()


def test_another_data_set_is_refused(make_run, tiny_split, no_charts, command, tmp_path):
    run = copied(make_run(**JOINT), tmp_path)
    flags = ("--split_dir", tiny_split, "--data_root", tiny_split.parent / "data")
    code, _, err = command(inspect_schedule.main, run, *flags)
    assert code == 2
    assert_one_error_line(err, tiny_split, "is not the split this run was trained on")


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_images_that_cannot_be_read(make_run, data, no_charts, command, tmp_path, damage):
    run = copied(make_run(**JOINT), tmp_path)
    shutil.copytree(data / "data", tmp_path / "data")
    image_id = json.loads((data / "split" / "rest_train_set.json").read_text())[3]
    path = json.loads((data / "split" / "image_dictionary.json").read_text())[image_id][0]
    image = tmp_path / "data" / "images" / path
    size = image.stat().st_size
    image.unlink()
    if damage == "broken":
        image.write_bytes(b"\0" * size)
    flags = ("--split_dir", data / "split", "--data_root", tmp_path / "data")
    code, _, err = command(inspect_schedule.main, run, *flags)
    assert code == 2
    assert_one_error_line(err, image if damage == "broken" else "image", "what can still be shown")
    assert (run / "report" / "index.html").exists()
    assert not (run / "report" / "samples.csv").exists()


def test_a_checkpoint_that_does_not_fit(make_run, no_charts, command, tmp_path):
    run = copied(make_run(**JOINT), tmp_path)
    state = torch.load(run / "best.pt", weights_only=True)
    del state["scheduler"]["loss_w"]
    torch.save(state, run / "best.pt")
    code, _, err = command(inspect_schedule.main, run)
    assert code == 2
    assert_one_error_line(err, "best.pt: the scheduler does not fit", "loss_w")
    (run / "best.pt").write_bytes(b"no weights")
    code, _, err = command(inspect_schedule.main, run)
    assert code == 2
    assert_one_error_line(err, "best.pt", "not a weights file")


def test_folders_that_are_no_run(make_run, command, tmp_path):
    run = make_run(**JOINT)
    for folder, parts in (
        (tmp_path / "none", ["is no folder"]),
        (tmp_path, ["holds no run", "config.json is missing"]),
        (run.parent, ["holds no run", "did you mean"]),
    ):
        code, _, err = command(inspect_schedule.main, folder)
        assert code == 2
        assert_one_error_line(err, folder, *parts)
    for content, part in (("{", "not valid JSON"), ("[]", "is not"), ("{}", "is not")):
        (tmp_path / "config.json").write_text(content)
        code, _, err = command(inspect_schedule.main, tmp_path)
        assert code == 2
        assert_one_error_line(err, tmp_path / "config.json", part)
    assert not (tmp_path / "report").exists()


def test_processes_that_there_cannot_be(make_run, no_charts, command, tmp_path):
    code, _, err = command(
        inspect_schedule.main, make_run(**JOINT), "--out", tmp_path, "--num_workers", -1
    )
    assert code == 2
    assert_one_error_line(err, "--num_workers: '-1': expected an integer from 0 up")


def test_a_report_that_cannot_be_written(make_run, no_charts, command, tmp_path):
    run = make_run(**JOINT)
    (tmp_path / "file").write_text("")
    code, _, err = command(inspect_schedule.main, run, "--out", tmp_path / "file" / "report")
    assert code == 2
    assert_one_error_line(err, "cannot be written", "--out")


@pytest.mark.parametrize("package", write.PACKAGES)
def test_without_a_package_one_line_says_what_to_install(make_run, command, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = command(inspect_schedule.main, make_run(**JOINT))
    assert code == 2
    assert_one_error_line(err, f"needs {package}", "pip install -r requirements-report.txt")


def test_a_fine_tuned_run_is_seen_as_its_schedule_left_it(data, tmp_path):
    """The weights are those of the model that was trained with them, whichever is tested."""
    places = {"split_dir": str(data / "split"), "record_dir": str(tmp_path)}
    changes = {"method": "joint_stable", "upper_lr": 0.5, "main_lr": 0.25, "dev_epochs": 4}
    config = Config(**{**TINY, **places, "exp_name": "tuned", "seed": 1, **changes})
    train(config)
    run = read_run(tmp_path / "full" / "tuned")
    found = evaluate_run(run, device="cpu")
    start = torch.load(run.directory / "fine_tuning_start.pt", weights_only=True)
    assert (found.before_fine_tuning, found.epoch) == (True, start["epoch"])
    shutil.copy(run.directory / "fine_tuning_start.pt", run.directory / "best.pt")
    (run.directory / "fine_tuning_start.pt").unlink()
    plain = evaluate_run(run, device="cpu")
    assert not plain.before_fine_tuning
    np.testing.assert_array_equal(found.table.weights, plain.table.weights)
    assert np.ptp(found.table.weights[:, 0]) > 0
    # Between tasks, the mean weights are the task factor and nothing else.
    np.testing.assert_allclose(found.table.weights.mean(0), found.table.factors["task"], rtol=1e-5)
    assert find(run, found).spread_of_tasks == {"task": pytest.approx(1.0, rel=1e-6)}
    phases = [(row["phase"], row["epoch"]) for row in run.rows["epoch"]]
    assert phases == [("training", 1), ("training", 2), *(("fine-tuning", i) for i in range(1, 5))]
    assert {row["epoch"] for row in run.training_steps} == {1, 2}
    rows = run.rows["epoch"]
    for best, words in (
        (rows[1], "in epoch 2 of 2."),
        (rows[4], "in epoch 3 of 4 of fine-tuning."),
    ):
        told = [row | {"valid_accuracy": float(row is best)} for row in rows]
        changed = dataclasses.replace(run, rows=run.rows | {"epoch": told})
        assert words in statements(find(changed))[0].text


@pytest.mark.parametrize("few", [0, 2])
def test_the_target_s_task_factor_is_what_its_odds_give(make_run, few):
    """And the others' together what they leave. The brief tells the target's mean weight."""
    run = read_run(make_run(method="joint_stable", labeled_per_class=few, hyperstep=1))
    evaluation = evaluate_run(run, device="cpu")
    names = "fine_tuning_start.pt", "best.pt"
    path = next(path for name in names if (path := run.directory / name).exists())
    state = torch.load(path, weights_only=True)["scheduler"]
    assert state["balance.steps"] > 0
    odds = state["balance.odds"].item()
    found = find(run, evaluation)
    factors = found.tasks.task_factor
    halves = small.halves(odds, 7)
    assert [factors[0], factors[1:].sum()] == pytest.approx(halves, rel=1e-5)
    assert found.tasks.mean_weight[0] == pytest.approx(factors[0], rel=1e-4)
    said = next(s.text for s in statements(found) if s.topic == "Tasks")
    assert f"The target task has {factors[0]:.2f}, " in said
    # As long as auxiliary tasks are alike, that is all it says of them, wherever the target is.
    low, high = factors[1:].min(), factors[1:].max()
    assert ("auxiliary tasks are within 10 % of each other" in said) == (high < 1.1 * low)


def test_weights_that_are_equal_but_for_rounding_rank_nothing(make_run):
    run = read_run(make_run(**JOINT))
    shape = np.array([3.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6])
    equal = {"mean_weight": (shape * (1 + 1e-9 * np.arange(7))).tolist()}
    ranked = {"mean_weight": (shape + 0.01 * np.arange(7)).tolist()}
    of_three, of_four = ([equal] * 9 + [ranked] * n for n in (3, 4))
    assert find(dataclasses.replace(run, schedule=of_three)).settledness is None
    found = find(dataclasses.replace(run, schedule=of_four)).settledness
    assert found == (pytest.approx(1.0), pytest.approx(1.0))


def test_equal_tasks_have_no_spread_to_explain():
    factors = {"feature": np.full((5, 4), 1.3), "loss": np.full((5, 4), 0.7), "task": np.ones(4)}
    table = SimpleNamespace(factors=factors)
    tasks = pd.DataFrame({"mean_weight": np.ones(4)})
    assert Findings(None, SimpleNamespace(table=table), tasks).spread_of_tasks == {}


@pytest.mark.parametrize("solver", ["identity", "neumann"])
def test_the_residual_of_the_identity_is_not_drawn(make_run, solver):
    from auxilearn.report.figures import CHARTS

    chart = next(chart for chart in CHARTS if chart.name == "hypergradient")
    run = read_run(make_run(method="linear", corrupted=True, solver=solver))
    labels = [axes.get_ylabel() for axes in chart.draw(find(run)).axes]
    assert labels == ["norm"] + ["solver's residual"] * (solver == "neumann")
    said = next(s.text for s in statements(find(run)) if s.topic == "Hypergradient")
    assert ("uses no curvature" in said) == (solver == "identity")


def test_shares_of_the_scheduled_loss(make_run):
    """Raw losses enter it multiplied by a_k: 1 for the target, --aux_weight for the others."""
    run = read_run(make_run(**JOINT))
    evaluation = evaluate_run(run)
    weighted = dataclasses.replace(run, config=dataclasses.replace(run.config, aux_weight=0.1))
    part = (evaluation.table.weights * evaluation.table.losses).mean(axis=0)
    for one, a in ((run, 1.0), (weighted, 0.1)):
        scaled = part * np.array([1] + [a] * 6)
        shares = find(one, evaluation).tasks.share_of_loss
        np.testing.assert_allclose(shares, scaled / scaled.sum(), rtol=1e-5)


def test_the_baseline_beside_a_run(make_run, no_charts, tmp_path):
    """The finished run of common on the same data whose settings are closest."""
    record = tmp_path / "record"
    joint = shutil.copytree(make_run(**JOINT), record / "joint")
    assert read_run(joint).reference is None
    assert any(
        s.text.startswith("No finished run of common") for s in statements(find(read_run(joint)))
    )
    common = {"method": "common", "corrupted": True, "corrupted_rate": 0.5}
    names = ("other_seed", "same", "shorter", "other_rate", "other_data", "unfinished", "damaged")
    for name in names:
        folder = shutil.copytree(make_run(**common), record / name)
        config, summary = (
            json.loads((folder / f).read_text()) for f in ("config.json", "summary.json")
        )
        if name == "other_seed":
            config["config"]["seed"] = 6
        elif name == "shorter":
            config["config"]["epochs"] = 1
        elif name == "other_rate":
            config["config"]["corrupted_rate"] = 0.2
        elif name == "other_data":
            summary["fingerprint"] = "another"
        summary["test_accuracy"] = names.index(name) / 10
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "summary.json").write_text(json.dumps(summary) if name != "damaged" else "{")
    (record / "unfinished" / "summary.json").unlink()
    found = read_run(joint).reference
    assert (found.name, found.test, found.differs) == ("same", 0.1, [])
    page, said = write.write_report(joint)
    text = next(s.text for s in said if s.topic == "Baseline")
    own = json.loads((joint / "summary.json").read_text())["test_accuracy"]
    assert "run same) reaches 10.0% on the test set" in text
    assert f"{100 * abs(own - 0.1):.1f} points {'ahead' if own >= 0.1 else 'behind'}" in text
    assert f"test set {own:.1%} 10.0%" in Page(page).text
    shutil.rmtree(record / "same")
    assert read_run(joint).reference.differs == ["seed"]
    shutil.rmtree(record / "other_seed")
    assert read_run(joint).reference.differs == ["epochs"]


def test_a_difference_within_chance_is_called_so(make_run):
    run = read_run(make_run(**JOINT))
    run = dataclasses.replace(run, data=run.data | {"sets": {"test": 500}})
    for ours, theirs, verdict in ((0.8, 0.79, "note"), (0.8, 0.7, "good"), (0.7, 0.8, "caution")):
        reference = Reference("common", theirs, theirs, ["seed"])
        one = dataclasses.replace(run, summary={"test_accuracy": ours}, reference=reference)
        said = next(s for s in statements(find(one)) if s.topic == "Baseline")
        assert said.verdict == verdict
        assert ("within chance" in said.text) == (verdict == "note")
        assert "Its seed differs." in said.text


def test_events_for_tensorboard(make_run, no_charts, command, monkeypatch, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = make_run(**JOINT)
    flags = ("--out", tmp_path, "--tensorboard")
    for _ in range(2):  # a second time in place of the first
        assert command(inspect_schedule.main, run, *flags)[0] == 0
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = read_rows(run / "schedule.jsonl")
    weights = [(e.step, e.value) for e in events.Scalars("schedule/target")]
    assert weights == [(r["step"], pytest.approx(r["mean_weight"][0])) for r in rows[1:]]
    assert {"upper/dev_loss", "epoch/valid_accuracy", "step/loss"} <= set(events.Tags()["scalars"])
    assert "target_weight/corrupted_50%" in events.Tags()["scalars"]


# --------------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STEPS = """
window.addEventListener("error", (event) => { document.title = "error: " + event.message; });
setTimeout(() => {
  const byId = (id) => document.getElementById(id);
  const said = {ready: document.documentElement.dataset.ready};
  const table = byId("label-table");
  const first = () => table.tBodies[0].rows[0].cells[2].textContent;
  const header = [...table.querySelectorAll("th button")].find((b) => b.textContent === "loss");
  const controls = (id) => document.querySelector(`[data-table=${id}]`);
  const count = (id) => controls(id).querySelector("[role=status]").textContent;
  const type = (id, value) => {
    const box = controls(id).querySelector("[type=search]");
    box.value = value;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  said.samples = table.tBodies[0].rows.length;
  said.lightest = first();
  header.click();
  said.worst = first();
  said.sort = header.closest("th").getAttribute("aria-sort");
  const wrong = controls("label-table").querySelector("[value=wrong]");
  wrong.click();
  said.wrong = count("label-table");
  wrong.click();
  type("label-table", "no such bird");
  said.none = count("label-table");
  type("task-table", "KIND 1");
  said.tasks = count("task-table");
  byId("task-table").querySelectorAll("th button")[1].click();
  said.firstTask = byId("task-table").tBodies[0].rows[0].cells[1].textContent;
  byId("sheet-task").value = "2";
  byId("sheet-task").dispatchEvent(new Event("change"));
  const sheets = [...document.querySelectorAll("[data-sheet]")].filter((sheet) => !sheet.hidden);
  said.sheets = sheets.map((sheet) => sheet.dataset.sheet);
  said.pictures = [...sheets[0].querySelectorAll(".picture")].every(
    (i) => getComputedStyle(i).backgroundImage.startsWith('url("data:image/jpeg'));
  said.sheet = /predicted: (yes|no)/.test(sheets[0].textContent);
  byId("theme").focus();
  said.focus = document.activeElement.id;
  byId("theme").click();
  said.theme = document.documentElement.dataset.theme;
  said.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  said.cut = [...document.querySelectorAll(".scroll")].filter(
    (box) => innerWidth >= 800 && box.scrollWidth > box.clientWidth).length;
  document.body.innerHTML = "<pre>" + JSON.stringify(said) + "</pre>";
}, 0);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs the chromium browser")
@pytest.mark.parametrize("width", [500, 800, 1280])
def test_page_works_in_a_browser(full_report, tmp_path, width):
    _, report, page, _ = full_report
    before, after = page.source.rsplit("</body>", 1)
    copy = tmp_path / "page.html"
    copy.write_text(f"{before}<script>{STEPS}</script></body>{after}", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [
        f"--window-size={width},900",
        "--virtual-time-budget=3000",
        "--dump-dom",
        copy.as_uri(),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "<title>error" not in dumped
    said = json.loads(re.search(r"<pre>(.*?)</pre>", dumped).group(1))
    rows = read_csv(report / "samples.csv")
    wrong = sum(row["label"] != row["given_label"] for row in rows)
    assert said == {
        "ready": "yes",
        "samples": len(rows),
        "lightest": min(rows, key=lambda row: float(row["weight"]))["id"],
        "worst": max(rows, key=lambda row: float(row["loss"]))["id"],
        "sort": "descending",
        "wrong": f"{wrong} of {len(rows)}",
        "none": f"0 of {len(rows)}",
        "tasks": "4 of 7",
        "firstTask": "part 1: kind 1",
        "sheets": ["2"],
        "pictures": True,
        "sheet": True,
        "focus": "theme",
        "theme": said["theme"],
        "overflow": 0,
        "cut": 0,
    }
    assert said["theme"] in ("light", "dark")
