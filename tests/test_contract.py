"""The data contract: tasks of classes and of real numbers, missing labels, rows; RMSE."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_bilevel
from auxilearn.backbones import BACKBONES, register_backbone
from auxilearn.data.columns import Columns, Feature, write_columns
from auxilearn.data.contract import Split, Task
from auxilearn.data.corruption import permute
from auxilearn.data.dataset import (
    RowStream,
    fitted,
    in_order,
    sample_set,
    shuffled,
    training_set,
)
from auxilearn.data.split import load_split
from auxilearn.errors import UserError
from auxilearn.methods import METHODS
from auxilearn.metrics import RMSE, metric_of
from auxilearn.models import Batch, TaskHeads, TaskModel
from auxilearn.run.build import build_model
from auxilearn.run.config import Config, resolve
from auxilearn.run.processes import Ranks
from auxilearn.run.state import State
from tests.conftest import TINY, Run, assert_same_run


class RowNet(nn.Module):
    """A layer of numbers and embeddings."""

    def __init__(self, feature_dim, shape):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(codes, 3) for codes in shape.categories)
        width = shape.numbers + 3 * len(shape.categories)
        self.layers = nn.Sequential(nn.Linear(width, feature_dim), nn.Tanh())

    def forward(self, numbers, codes):
        embedded = [table(codes[:, k]) for k, table in enumerate(self.tables)]
        return self.layers(torch.cat([numbers, *embedded], dim=1))


@pytest.fixture
def row_net():
    register_backbone("row_net", rows=True)(RowNet)
    yield
    del BACKBONES["row_net"]


# --------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------


def test_losses_of_classes_and_of_real_numbers():
    torch.manual_seed(0)
    heads = TaskHeads(7, [3, None, None, 2, None]).double()
    assert heads.linear.out_features == 8
    features = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.stack(
        [
            torch.randint(3, (6,)).double(),
            torch.randn(6).double(),
            torch.randn(6).double(),
            torch.randint(2, (6,)).double(),
            torch.randn(6).double(),
        ],
        dim=1,
    )
    losses = heads(features, labels.float().double())
    outputs = features @ heads.linear.weight.T + heads.linear.bias
    labels = labels.float().double()
    expected = torch.stack(
        [
            F.cross_entropy(outputs[:, :3], labels[:, 0].long(), reduction="none"),
            (outputs[:, 3] - labels[:, 1]) ** 2,
            (outputs[:, 4] - labels[:, 2]) ** 2,
            F.cross_entropy(outputs[:, 5:7], labels[:, 3].long(), reduction="none"),
            (outputs[:, 7] - labels[:, 4]) ** 2,
        ],
        dim=1,
    )
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(losses.sum(), heads.linear.weight)
    plain = torch.autograd.grad(expected.sum(), heads.linear.weight)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_target_that_is_a_real_number_has_one_output():
    heads = TaskHeads(4, [None, 5])
    features = torch.randn(3, 4)
    expected = heads.linear(features)[:, :1]
    torch.testing.assert_close(heads.target_logits(features), expected)


# --------------------------------------------------------------------------------------------------
# Labels of a set
# --------------------------------------------------------------------------------------------------

NAN = math.nan
# Of twelve samples, 0 to 7 are trained on, 0 and 1 of them for development.
PRICE = [10.0, 20.0, 30.0, NAN, 50.0, 60.0, 70.0, 80.0, 1000.0, 2000.0, 3000.0, 4000.0]
KIND = [0, 1, 2, 0, 1, -1, 0, 1, 2, 0, 1, 2]
SETS = {
    "full_train": np.arange(8),
    "dev": np.arange(2),
    "rest_train": np.arange(2, 8),
    "valid": np.arange(8, 10),
    "test": np.arange(10, 12),
}


def split_of(*columns):
    """A ``Split`` of (task, labels) pairs, as ``load_columns`` makes it."""
    tasks, values = zip(*columns, strict=True)
    values = [np.array(v) for v in values]
    mask = np.column_stack([v >= 0 if v.dtype.kind == "i" else ~np.isnan(v) for v in values])
    labels = np.column_stack(values)
    labels[~mask] = 0
    indices = {name: np.array(places) for name, places in SETS.items()}
    ids = [str(number) for number in range(len(labels))]
    mask = None if mask.all() else mask
    return Split(list(tasks), labels, mask, indices, ids, Path("."), {}, "")


PRICED = Task("price", None)
KINDS = Task("kind", 3, ("a", "b", "c"))


def test_numbers_are_standardised_by_the_training_labels_that_are_there():
    split = split_of((KINDS, KIND), (PRICED, PRICE))
    kinds, price = fitted(split, 2)
    assert kinds == KINDS
    seen = [10.0, 20.0, 30.0, 50.0, 60.0, 70.0, 80.0]
    mean = sum(seen) / 7
    std = math.sqrt(sum((value - mean) ** 2 for value in seen) / 7)
    assert (price.mean, price.std) == pytest.approx((mean, std), rel=1e-12)
    samples = training_set(split, "rest_train", [kinds, price], seed=5)
    assert samples.labels.dtype == torch.float32
    assert samples.mask.tolist() == [
        [True, True],
        [True, False],
        [True, True],
        [False, True],
        [True, True],
        [True, True],
    ]
    expected = [(value - mean) / std for value in (30.0, 50.0, 60.0, 70.0, 80.0)]
    expected.insert(1, 0.0)  # the missing one
    assert samples.labels[:, 1].tolist() == pytest.approx(expected, rel=1e-6)
    assert samples.labels[:, 0].tolist() == [2, 0, 1, 0, 0, 1]  # the fourth is missing
    valid = sample_set(split, "valid", [kinds, price])
    assert valid.labels[:, 1].tolist() == pytest.approx([(1000 - mean) / std, (2000 - mean) / std])


def test_labels_of_classes_alone_are_whole_numbers():
    split = split_of((KINDS, KIND))
    mixed = split_of((KINDS, KIND), (PRICED, PRICE))  # of which the first task alone is trained
    assert sample_set(mixed, "valid", fitted(mixed, 1)).labels.dtype == torch.int64
    samples = training_set(split, "rest_train", fitted(split, 1), seed=5)
    assert samples.labels.dtype == torch.int64
    assert samples.labels[:, 0].tolist() == [2, 0, 1, 0, 0, 1]
    assert samples.mask[:, 0].tolist() == [True, True, True, False, True, True]


def test_a_number_without_a_training_label_or_spread_stays_finite():
    nothing = [NAN] * 8 + [1.0] * 4
    split = split_of((KINDS, KIND), (PRICED, nothing), (PRICED, [0.1] * 12))
    _, empty, constant = fitted(split, 3)
    assert (empty.mean, empty.std) == (0, 1)
    assert (constant.mean, constant.std) == (pytest.approx(0.1), 1)


def test_few_labels_of_a_real_number_are_so_many_in_all():
    split = split_of((PRICED, PRICE), (KINDS, KIND))
    tasks = fitted(split, 2, seed=5, labeled_per_class=3)
    samples = training_set(split, "full_train", tasks, seed=5, labeled_per_class=3)
    kept = samples.mask[:, 0].numpy()
    assert kept[:2].all()  # development samples keep theirs
    assert kept[2:].sum() == 3 and not kept[3]
    # What standardises the labels are those that are kept, and no other.
    seen = np.array(PRICE)[:8][kept]
    assert tasks[0].mean == pytest.approx(seen.mean(), rel=1e-12)
    assert tasks[0].std == pytest.approx(seen.std(), rel=1e-12)
    assert (samples.labels[:, 0].numpy()[~kept] == 0).all()
    assert samples.mask[:, 1].tolist() == [kind >= 0 for kind in KIND[:8]]
    with pytest.raises(UserError, match="6 is more than the data has: 5 labelled"):
        training_set(split, "full_train", tasks, seed=5, labeled_per_class=6)


def test_labels_that_are_not_kept_do_not_move_the_scale():
    split = split_of((PRICED, PRICE), (KINDS, KIND))
    tasks = fitted(split, 2, seed=5, labeled_per_class=3)
    hidden = ~training_set(split, "full_train", tasks, 5, labeled_per_class=3).mask[:, 0].numpy()
    other = dataclasses.replace(split, labels=split.labels.copy())
    other.labels[:8, 0][hidden] = 12345.0
    assert fitted(other, 2, seed=5, labeled_per_class=3) == tasks


def test_corruption_permutes_a_share_of_the_numbers():
    values = np.arange(10_000.0)
    permuted = permute(values, 0.4, np.random.default_rng(0))
    assert sorted(permuted) == sorted(values)
    assert (permuted != values).mean() == pytest.approx(0.4, abs=0.02)
    assert np.array_equal(values, np.arange(10_000.0))
    assert np.array_equal(permute(values, 0.0, np.random.default_rng(0)), values)


def test_corrupted_numbers_are_those_of_labelled_training_samples():
    split = split_of((PRICED, PRICE), (KINDS, KIND))
    tasks = [Task("price", None), KINDS]  # mean 0, std 1: labels in their own unit
    clean = training_set(split, "full_train", tasks, seed=2)
    samples = training_set(split, "full_train", tasks, seed=2, corrupted_rate=1.0)
    assert samples.labels[:2].tolist() == clean.labels[:2].tolist()  # development
    assert torch.equal(samples.labels[:, 1], clean.labels[:, 1])
    assert samples.labels[3, 0] == 0 and not samples.mask[3, 0]
    found = samples.labels[[2, 4, 5, 6, 7], 0].tolist()
    assert sorted(found) == [30, 50, 60, 70, 80] != found
    assert fitted(split, 1)[0].mean == pytest.approx(np.nanmean(PRICE[:8]))
    assert split.labels[:8, 0].tolist() == [0 if v != v else v for v in PRICE[:8]]  # as before


def test_corrupted_classes_leave_missing_ones_missing():
    split = split_of((KINDS, KIND))
    samples = training_set(split, "full_train", [KINDS], seed=1, corrupted_rate=1.0)
    assert samples.mask[:, 0].tolist() == [kind >= 0 for kind in KIND[:8]]
    assert samples.labels[5, 0] == 0


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------


class Given:
    """A model whose predictions are the inputs of its batches."""

    def eval(self):
        pass

    train = eval

    def predict(self, inputs):
        return inputs


def batch_of(outputs, labels, known=None):
    mask = None if known is None else torch.tensor(known)[:, None]
    return Batch(torch.tensor(outputs), torch.tensor(labels)[:, None], torch.arange(2), mask)


def test_rmse_is_in_the_labels_own_unit_and_of_labelled_samples_alone():
    metric = metric_of(Task("price", None, mean=100.0, std=20.0))
    one = batch_of([[1.0], [0.5]], [0.0, 0.0], [True, False])
    two = batch_of([[-1.0], [2.0]], [1.0, 1.0])
    found = train_bilevel.evaluate(Given(), [one, two], metric, Ranks())
    assert found == pytest.approx(20 * math.sqrt((1 + 4 + 1) / 3), rel=1e-7)
    assert metric.better(1.0, 2.0) and not metric.better(2.0, 2.0)
    broken = batch_of([[math.inf], [0.5]], [0.0, 0.0], [True, True])
    assert math.isnan(train_bilevel.evaluate(Given(), [two, broken], metric, Ranks()))


def test_accuracy_is_of_labelled_samples_alone():
    metric = metric_of(KINDS)
    one = batch_of([[2.0, 1.0], [0.0, 3.0]], [0, 0], [True, False])
    two = batch_of([[2.0, 1.0], [0.0, 3.0]], [1.0, 1.0])  # float labels, of mixed tasks
    assert train_bilevel.evaluate(Given(), [one, two], metric, Ranks()) == 2 / 3
    assert metric.better(2.0, 1.0) and not metric.better(2.0, 2.0)


def test_no_scale_overflows():
    assert RMSE(1e30).value(4.0, 1) == 2e30


# --------------------------------------------------------------------------------------------------
# Rows, from the file to the result
# --------------------------------------------------------------------------------------------------

N = 60


def write_rows(folder, target="price", scale=1.0):
    """Rows whose price is linear in x, with missing entries of all kinds. Returns the columns."""
    rng = np.random.default_rng(0)
    x, place = rng.normal(size=(N, 2)), np.arange(N)
    colour = rng.integers(3, size=N).astype(np.int32)
    price = scale * (5 + 2 * x[:, 0] + colour)
    kind = (x[:, 0] > 0).astype(np.int32)
    half = np.where(place % 2 == 0, np.nan, x[:, 1])
    kind[3::7] = -1
    x[4, 1] = np.nan
    colour[5] = -1
    sets = {
        "full_train": place[:40],
        "dev": place[:10],
        "rest_train": place[10:40],
        "valid": place[40:50],
        "test": place[50:],
    }
    kind[:10] = kind[:10].clip(0)  # development samples have the target's label
    tasks = {
        "price": (Task("price", None), price),
        "kind": (Task("kind", 2, ("low", "high")), kind),
    }
    names = [target, *({"price", "kind"} - {target})]
    tasks = [*(tasks[name] for name in names), (Task("half", None), half)]
    features = [
        Feature("x0", x[:, 0]),
        Feature("x1", x[:, 1]),
        Feature("colour", colour, ("red", "green", "blue")),
    ]
    columns = Columns(
        [task for task, _ in tasks],
        [values for _, values in tasks],
        sets,
        folder.absolute(),
        features=features,
    )
    write_columns(folder / "split", columns, split_seed=5, aux_shot=None)
    return columns


def test_rows_as_they_reach_the_model(tmp_path):
    columns = write_rows(tmp_path)
    split = load_split(tmp_path / "split")
    assert split.paths is None and split.rows.shape == (2, [4])
    x = columns.features[1].values
    train = np.delete(x[:40], 4)
    expected = (x - train.mean()) / train.std()
    expected[4] = 0
    np.testing.assert_allclose(split.rows.numbers[:, 1], expected, rtol=1e-5, atol=1e-6)
    codes = columns.features[2].values + 1  # 0 for the missing one
    assert split.rows.codes[:, 0].tolist() == codes.tolist() and codes[5] == 0
    rows = tuple(torch.from_numpy(column) for column in split.rows[:2])
    samples = sample_set(split, "valid", fitted(split, 3))
    first, second = RowStream(rows, samples, in_order(10, 6), torch.device("cpu"))
    assert first.sample_id.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(second.inputs[0], rows[0][46:50])
    assert torch.equal(second.inputs[1], rows[1][46:50])
    assert second.inputs[0].dtype == torch.float32 and second.inputs[1].dtype == torch.int64
    assert torch.equal(second.labels, samples.labels[6:])
    assert torch.equal(second.mask, samples.mask[6:])


def test_categories_of_no_training_row_are_missing(tmp_path):
    columns = write_rows(tmp_path)
    columns.features[2].values[:] = 2
    columns.features[2].values[45] = 0
    write_columns(tmp_path / "split", columns, split_seed=5, aux_shot=None)
    rows = load_split(tmp_path / "split").rows
    assert rows.shape.categories == [2]
    assert rows.features[2] == {"name": "colour", "values": ["blue"]}
    assert rows.codes[[0, 45, 46], 0].tolist() == [1, 0, 1]


def test_a_resumed_stream_of_rows_goes_on_with_the_same_batches(tmp_path):
    write_rows(tmp_path)
    split = load_split(tmp_path / "split")
    rows = tuple(torch.from_numpy(column) for column in split.rows[:2])
    samples = sample_set(split, "full_train", fitted(split, 3))
    stream = RowStream(rows, samples, shuffled(40, 12, 5, "lower"), torch.device("cpu"))
    whole = [batch for batch, _ in zip(stream, range(9), strict=False)]
    for batch, again in zip(whole[5:], stream.after(5), strict=False):
        assert torch.equal(batch.sample_id, again.sample_id)
        assert torch.equal(batch.inputs[0], again.inputs[0])


def test_no_step_on_rows_reads_from_the_device(tmp_path):
    """A meta tensor has no values: whatever asked for one would fail."""
    write_rows(tmp_path)
    split, meta = load_split(tmp_path / "split"), torch.device("meta")
    rows = tuple(torch.from_numpy(column).to(meta) for column in split.rows[:2])
    samples = sample_set(split, "full_train", fitted(split, 3))
    batch = next(iter(RowStream(rows, samples, shuffled(40, 12, 5, "lower"), meta)))
    assert batch.inputs[0].shape == (12, 2) and batch.inputs[1].shape == (12, 1)
    assert {t.device for t in (*batch.inputs, batch.labels, batch.mask)} == {meta}


@pytest.fixture
def row_run(tmp_path, row_net):
    """``row_run(folder, **changes)`` trains on the rows in a folder and returns the ``Run``."""

    def run(folder, **changes):
        settings = {**TINY, "backbone": "row_net", "epochs": 4, "main_lr": 0.05, **changes}
        places = {"split_dir": str(folder / "split"), "record_dir": str(tmp_path / "record")}
        config = Config(**settings, **places)
        summary = train_bilevel.train(config)
        return Run(Path(config.record_dir) / config.setting / summary["exp_name"])

    return run


def test_a_run_with_a_real_target_keeps_and_tests_the_lowest_rmse(tmp_path, row_run, capsys):
    columns = write_rows(tmp_path, scale=1000.0)
    run = row_run(tmp_path, method="joint")
    epochs = [row["valid_rmse"] for row in run.rows_of("epoch")]
    summary = run.summary
    assert summary["valid_rmse"] == min(epochs) and "valid_accuracy" not in summary
    assert epochs[summary["best_epoch"] - 1] == min(epochs) < 0.8 * epochs[0]
    assert all(row["rmse"] > 0 for row in run.rows_of("step"))
    # The checkpoint's own predictions, in the unit of the file.
    split = load_split(tmp_path / "split")
    state = run.checkpoint
    model = TaskModel(RowNet(8, split.rows.shape), 8, [None, 2, None])
    model.load_state_dict(state["model"])
    rows = tuple(torch.from_numpy(column[50:]) for column in split.rows[:2])
    with torch.no_grad():
        outputs = model.eval().predict(rows)[:, 0].double().numpy()
    price = state["tasks"][0]
    truth = columns.labels[0]
    assert price["mean"] == pytest.approx(truth[:40].mean())
    error = price["mean"] + price["std"] * outputs - truth[50:]
    assert summary["test_rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert f"test RMSE: {summary['test_rmse']:.6g}" in capsys.readouterr().out
    tasks = json.loads((run.directory / "schedule.jsonl").read_text().split("\n")[0])
    assert tasks["names"] == ["price", "kind", "half"]


def test_the_unit_of_a_target_changes_the_result_alone(tmp_path, row_run):
    """Grams for kilograms: the same training, and a thousand times the RMSE."""
    runs = []
    for name, scale in (("one", 1.0), ("other", 1024.0)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, scale=scale)
        runs.append(row_run(tmp_path / name, method="joint"))
    one, other = ([row["loss"] for row in run.rows_of("step")] for run in runs)
    assert one == pytest.approx(other, rel=1e-6)
    ratio = runs[1].summary["test_rmse"] / runs[0].summary["test_rmse"]
    assert ratio == pytest.approx(1024, rel=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith(("common", "single"))])
@pytest.mark.parametrize("target", ["price", "kind"])
def test_every_kind_of_method_trains_on_rows(method, target, tmp_path, row_run):
    write_rows(tmp_path, target)
    run = row_run(tmp_path, method=method)
    metric = "rmse" if target == "price" else "accuracy"
    assert math.isfinite(run.summary[f"test_{metric}"])
    assert all(math.isfinite(row["loss"]) for row in run.rows_of("step"))


def test_a_task_that_no_training_sample_has_changes_nothing(tmp_path, row_run):
    """Not even the other tasks: its loss, its gradient and its weight are 0."""
    columns = write_rows(tmp_path)
    columns.labels[2][:40] = np.nan
    write_columns(tmp_path / "split", columns, split_seed=5, aux_shot=None)
    run = row_run(tmp_path, method="common", w_decay=0.0)
    state = run.checkpoint["model"]
    torch.manual_seed(0)
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").open()]
    assert all(math.isfinite(row["loss"]) for row in rows if row["kind"] == "step")
    half = row_run(tmp_path, method="common", w_decay=0.0, main_lr=1e-30).checkpoint["model"]
    for name in ("heads.linear.weight", "heads.linear.bias"):
        assert torch.equal(state[name][-1], half[name][-1])  # as it started
        assert not torch.equal(state[name][0], half[name][0])


@pytest.mark.parametrize("target", ["price", "kind"])
@pytest.mark.parametrize(
    "setting", [{"labeled_per_class": 3}, {"corrupted": True, "corrupted_rate": 0.6}]
)
def test_settings_of_the_paper_on_rows(setting, target, tmp_path, row_run):
    write_rows(tmp_path, target)
    plain = row_run(tmp_path, method="common")
    run = row_run(tmp_path, method="common", **setting)
    assert run.directory.parent.name == ("semi" if "labeled_per_class" in setting else "noisy")
    assert run.timeless_rows != plain.timeless_rows


def test_masked_targets_of_rows_influence_nothing(tmp_path, row_run):
    columns = write_rows(tmp_path)
    split = load_split(tmp_path / "split")
    one = row_run(tmp_path, method="joint", labeled_per_class=4)
    tasks = fitted(split, 3, seed=5, labeled_per_class=4)
    samples = training_set(split, "full_train", tasks, 5, labeled_per_class=4)
    columns.labels[0][:40][~samples.mask[:, 0].numpy()] += 1000.0
    write_columns(tmp_path / "split", columns, split_seed=5, aux_shot=None)
    assert_same_rows(one, row_run(tmp_path, method="joint", labeled_per_class=4))


def assert_same_rows(one, other):
    assert one.timeless_rows == other.timeless_rows
    assert one.summary["test_rmse"] == other.summary["test_rmse"]


def test_a_run_on_rows_goes_on_to_the_same_bits(tmp_path, row_run, monkeypatch):
    write_rows(tmp_path, "kind")
    whole = row_run(tmp_path, method="joint", exp_name="whole")
    save = State.save_and_stop

    def stop(state, step, request):
        save(state, step, request)
        if step == 11:
            state.save(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "save_and_stop", stop)
    with pytest.raises(KeyboardInterrupt):
        row_run(tmp_path, method="joint", exp_name="cut")
    monkeypatch.setattr(State, "save_and_stop", save)
    assert_same_run(whole, row_run(tmp_path, method="joint", exp_name="cut", resume=True))


def test_a_backbone_for_images_refuses_rows(tmp_path, row_net, tiny_split):
    write_rows(tmp_path)
    split = load_split(tmp_path / "split")
    with pytest.raises(UserError, match="resnet18 takes images, but .* are rows .*row_net"):
        build_model(resolve(Config(device="cpu", backbone="resnet18"), split), split)
    assert resolve(Config(device="cpu"), split).backbone == "mlp"
    split = load_split(tiny_split)
    with pytest.raises(UserError, match="row_net takes rows of columns, but .* are images: .*conv"):
        build_model(resolve(Config(device="cpu", backbone="row_net"), split), split)
