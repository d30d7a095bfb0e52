"""Margins over training: against plain PyTorch, masked, over ranks; and in the report."""

import re
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import inspect_schedule
from auxilearn.bilevel import Bilevel
from auxilearn.hypernet import TaskLosses
from auxilearn.report import write
from auxilearn.report.run import read_run
from auxilearn.run.margins import Margins, mean_margins
from tests.conftest import assert_one_error_line
from tests.test_schedule_report import read_csv

N, CLASSES = 9, 4


def outputs_of(places, labels, mask=None):
    """``TaskLosses`` of a batch, and its target logits."""
    places = torch.as_tensor(places)
    size = len(places)
    labels = torch.stack([torch.as_tensor(labels), torch.zeros(size, dtype=torch.int64)], dim=1)
    if mask is not None:
        mask = torch.stack([mask, torch.ones(size, dtype=torch.bool)], dim=1)
    outputs = TaskLosses(torch.zeros(size, 2), torch.zeros(size, 1), places, mask, labels)
    return outputs, torch.randn(size, CLASSES)


def batches(masked):
    """Three passes over N samples in batches of 4, 4 and 1; the last sample is in no batch."""
    torch.manual_seed(0)
    made = []
    for _ in range(3):
        for places in torch.randperm(N - 1).split(3):
            mask = places % 3 > 0 if masked else None
            made.append(outputs_of(places, torch.randint(CLASSES, (len(places),)), mask))
    return made


@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_margin_by_its_definition(masked):
    margins, found = Margins(N, "cpu"), {place: [] for place in range(N)}
    for outputs, logits in batches(masked):
        margins.add(outputs, logits)
        for row, (place, label) in enumerate(
            zip(outputs.sample_id.tolist(), outputs.labels[:, 0].tolist(), strict=True)
        ):
            z = logits[row].tolist()
            if outputs.mask is None or outputs.mask[row, 0]:
                found[place].append(z[label] - max(z[:label] + z[label + 1 :]))
    expected = [np.mean(found[place]) if found[place] else np.nan for place in range(N)]
    assert np.isnan(expected).sum() == (1 + 3 if masked else 1)
    means = mean_margins([margins.state()])
    assert means.dtype == np.float64
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)  # of float32 logits


def test_the_shares_of_two_ranks_are_one_whole():
    one, ranks = Margins(N, "cpu"), [Margins(N, "cpu"), Margins(N, "cpu")]
    for outputs, logits in batches(masked=True):
        one.add(outputs, logits)
        for rank, margins in enumerate(ranks):
            share = [None if part is None else part[rank::2] for part in outputs]
            margins.add(TaskLosses(*share), logits[rank::2])
    together = mean_margins([margins.state() for margins in ranks])
    np.testing.assert_allclose(together, mean_margins([one.state()]), rtol=1e-12)


def test_they_go_on_to_the_same_bits():
    one, stopped = Margins(N, "cpu"), Margins(N, "cpu")
    for step, (outputs, logits) in enumerate(batches(masked=False)):
        one.add(outputs, logits)
        if step == 4:  # the other one counts all steps at once
            state = {name: tensor.clone() for name, tensor in stopped.state().items()}
            stopped = Margins(N, "cpu")
            stopped.restore(state)
        stopped.add(outputs, logits)
    assert all(torch.equal(one.state()[name], stopped.state()[name]) for name in state)


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("common", {"corrupted": True, "corrupted_rate": 0.5}),
        ("joint_stable", {"labeled_per_class": 2, "dev_epochs": 2}),
    ],
)
def test_margins_of_a_run_against_its_recorded_steps(tiny_run, monkeypatch, method, changes):
    """Of the training phase alone, on the labels that were trained on, where there is one."""
    steps, original = [], Bilevel.lower_step

    def recorded(self, batch, dev_batches=None):
        result = original(self, batch, dev_batches)
        linear = self.model.heads.linear
        weight, bias = linear.weight[:4].detach().clone(), linear.bias[:4].detach().clone()
        steps.append((self, batch, result.outputs.features, weight, bias))
        return result

    monkeypatch.setattr(Bilevel, "lower_step", recorded)
    run = tiny_run(method=method, **changes)
    margins = np.load(run.directory / "margins.npy")
    found = [[] for _ in margins]
    training = steps[0][0]
    assert any(one is not training for one, *_ in steps) == (method == "joint_stable")
    for one, batch, features, weight, bias in steps:
        if one is not training:
            continue
        logits = features @ weight.T + bias
        for row, place in enumerate(batch.sample_id.tolist()):
            if batch.mask is None or batch.mask[row, 0]:
                label = batch.labels[row, 0].item()
                others = [z.item() for c, z in enumerate(logits[row]) if c != label]
                found[place].append(logits[row, label].item() - max(others))
    expected = [np.mean(values) if values else np.nan for values in found]
    assert np.isnan(expected).any() == (method == "joint_stable")
    assert {len(values) for values in found} <= {0, 2}
    np.testing.assert_allclose(margins, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_charts(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("auxilearn.report.figures.CHARTS", ())


def label_table(page):
    return re.search(r'<table id="label-table">.*?</table>', page.read_text(), re.DOTALL).group()


def test_the_report_shows_them_beside_weight_and_loss(tiny_run, no_charts, command):
    run = tiny_run(method="joint", corrupted=True, corrupted_rate=0.5, seed=1)
    margins = np.load(run.directory / "margins.npy")
    page, said = write.write_report(run.directory, rank_by="margin")
    rows = read_csv(page.parent / "samples.csv")
    assert [float(row["margin"]) for row in rows] == pytest.approx(margins.tolist(), rel=1e-8)
    listed = read_csv(page.parent / "clean_labels.csv")
    assert list(listed[0])[-1] == "margin"
    assert [float(row["margin"]) for row in listed] == pytest.approx(np.sort(margins).tolist())
    wrong = [row["label"] != row["given_label"] for row in rows]
    area = roc_auc_score(wrong, -margins)
    precision = average_precision_score(wrong, -margins)
    text = re.sub(r"<[^>]*>", " ", page.read_text())
    text = " ".join(text.split())
    assert f"low mean margin {area:.3f} {precision:.3f}" in text
    assert f"{area:.3f} by low mean margin" in text
    losses = np.array([float(row["loss"]) for row in rows])
    area = roc_auc_score(wrong, losses.argsort().argsort() + (-margins).argsort().argsort())
    assert f"loss and margin together {area:.3f}" in text
    brief = next(s.text for s in said if s.topic == "Wrong labels")
    assert "Ranked by margin, as --rank_by asks." in brief
    assert "All labels, by margin" in text and "Lowest margin" in text
    table = label_table(page)
    assert ">margin</button>" in table
    assert f'data-value="{margins.min():.9g}"' in table

    # An earlier run's folder has none; a file that is not the run's is named.
    (run.directory / "margins.npy").rename(page.parent / "kept")
    page, said = write.write_report(run.directory, rank_by="margin")
    assert "margin" not in page.read_text().split('id="labels"')[1].split("<script>")[0].replace(
        "no margins", ""
    )
    assert "margin" not in read_csv(page.parent / "samples.csv")[0]
    assert any("Ranked by loss: the run has no margins" in s.text for s in said)
    for content in (b"", (page.parent / "kept").read_bytes()[:-8]):
        (run.directory / "margins.npy").write_bytes(content)
        shutil.rmtree(page.parent, ignore_errors=True)
        code, _, err = command(inspect_schedule.main, run.directory)
        assert code == 2
        assert_one_error_line(err, run.directory / "margins.npy", "16 training samples")
    assert read_run(run.directory).summary
