"""Reports of data beside CUB's: tasks of any kind, missing labels, real-valued targets, rows."""

import csv
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score

import inspect_schedule
import train_bilevel
from auxilearn.data.columns import Columns, Feature, write_columns
from auxilearn.data.contract import Task
from auxilearn.data.dataset import training_set
from auxilearn.data.split import load_split
from auxilearn.models import TaskHeads
from auxilearn.report import statistics, write
from auxilearn.report.brief import statements
from auxilearn.report.findings import Findings, Ranking, find, rank_labels
from auxilearn.report.names import readable, worded
from auxilearn.report.run import Reference, evaluate_run, read_run
from auxilearn.run.build import build_model, build_scheduler, tasks_of
from auxilearn.run.config import Config, from_record
from auxilearn.run.history import ScheduleHistory
from tests.conftest import TINY

N, TRAIN = 84, 60  # samples; those that are trained on, of which the first 9 are for development
KINDS, TONES = ("1.5", "disc", "<b>square"), ("cold", "mild", "warm", "hot")
REST = np.arange(9, TRAIN)


def columns_of(folder, target, images):
    """A data set of five tasks, and its labels by task with NaN where missing."""
    rng = np.random.default_rng(1)
    size, hue = rng.uniform(10, 50, N).round(2), rng.normal(size=N)
    kind = ((size > 22).astype(np.int32) + (size > 36)).astype(np.int32)
    tone = rng.integers(4, size=N).astype(np.int32)
    bit = (hue > 0).astype(np.int32)
    never = np.where(np.arange(N) < TRAIN, np.nan, hue)
    labels = {"kind": kind, "size": size, "tone": tone, "bit": bit, "never": never}
    labels["size"] = np.where(np.arange(N) % 5 == 4, np.nan, size)
    for name, step in (("kind", 7), ("tone", 3)):
        labels[name][6::step] = -1
    target_column = labels[target]
    target_column[:9] = (kind if target == "kind" else size)[:9]  # known in development
    target_column[:9] = np.where(target_column[:9] < 0, 0, target_column[:9])
    target_column[TRAIN:] = np.abs(np.nan_to_num(target_column[TRAIN:], nan=30.0))
    classes = {"kind": KINDS, "tone": TONES, "bit": ("no", "yes")}
    names = [target, *(name for name in labels if name != target)]
    tasks = [Task(n, len(classes[n]), classes[n]) if n in classes else Task(n, None) for n in names]
    place, more = np.arange(N), {}
    if images:
        for i in place:
            pixels = np.full((16, 16, 3), 30, np.uint8)
            pixels[: int(size[i] / 4), : int(size[i] / 4)] = 200
            Image.fromarray(pixels).save(folder / f"{i}.png")
        more["paths"] = [f"{i}.png" for i in place]
    else:
        colour = rng.integers(-1, 3, N).astype(np.int32)
        x = np.where(place % 11 == 10, np.nan, size + rng.normal(size=N))
        names_of_colours = ("red", "green", "blue")
        more["features"] = [Feature("colour", colour, names_of_colours), Feature("x_0", x)]
        more["features"] += [Feature(f"x_{k}", rng.normal(size=N)) for k in range(1, 8)]
    sets = {"full_train": place[:TRAIN], "dev": place[:9], "rest_train": REST}
    sets |= {"valid": place[TRAIN:72], "test": place[72:]}
    columns = Columns(tasks, [labels[n] for n in names], sets, folder.absolute(), **more)
    write_columns(folder / "split", columns, split_seed=5, aux_shot=None)
    numbers = {n: np.where(v < 0, np.nan, v) if n in classes else v for n, v in labels.items()}
    return columns, numbers


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """``make(target, images, **changes)``: (folder of a run, its columns, its labels)."""
    made = {}

    def make(target, images, **changes):
        key = (target, images, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("kinds")
            columns, labels = columns_of(folder, target, images)
            places = {"split_dir": str(folder / "split"), "record_dir": str(folder / "record")}
            backbone = "convnet" if images else "mlp"
            settings = {"method": "joint", "upper_lr": 0.5, "main_lr": 0.05, "exp_name": "run"}
            config = Config(**{**TINY, **places, "backbone": backbone, **settings, **changes})
            train_bilevel.train(config)
            made[key] = folder / "record" / config.setting / "run", columns, labels
        return made[key]

    return make


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def text_of(page):
    """The words of a page."""
    source = re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", source).split())


def recomputed(run):
    """(samples, features (n, d), outputs per task, losses (n, K), weights (n, K)) of a run's best
    checkpoint by plain PyTorch; NaN where there is no label."""
    config = from_record(json.loads((run / "config.json").read_text())["config"])
    split = load_split(config.split_dir)
    tasks = tasks_of(config, split)
    rate = config.effective_corrupted_rate
    samples = training_set(split, "rest_train", tasks, config.seed, rate, config.labeled_per_class)
    model = build_model(config, split, pretrained=False).eval()
    scheduler = build_scheduler(config, split, samples)
    state = torch.load(run / "best.pt", weights_only=True)
    model.load_state_dict(state["model"])
    scheduler.load_state_dict(state["scheduler"])
    if split.rows:
        inputs = tuple(torch.from_numpy(column[samples.positions]) for column in split.rows[:2])
    else:
        images = [np.array(Image.open(split.image_path(p))) for p in samples.positions]
        assert config.image_size == 16
        resized = [Image.fromarray(i).resize((18, 18), Image.Resampling.BILINEAR) for i in images]
        cropped = np.stack([np.array(i)[1:17, 1:17] for i in resized])
        inputs = torch.from_numpy(cropped).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = model.features(inputs)
        outputs = features @ model.heads.linear.weight.T + model.heads.linear.bias
        outputs = outputs.split([task.classes or 1 for task in tasks], dim=1)
        labels = samples.labels
        losses = torch.stack(
            [
                F.cross_entropy(out, labels[:, k].long(), reduction="none")
                if task.classes
                else (out[:, 0] - labels[:, k]) ** 2
                for k, (task, out) in enumerate(zip(tasks, outputs, strict=True))
            ],
            dim=1,
        )
        weights = scheduler.schedule(features, losses, samples.mask)
    losses[~samples.mask] = weights[~samples.mask] = torch.nan
    return samples, tasks, outputs, losses.numpy(), weights.numpy()


# --------------------------------------------------------------------------------------------------
# Statistics and words
# --------------------------------------------------------------------------------------------------


def test_information_of_classes_by_its_definition():
    counts = np.array([[10, 0, 5], [2, 8, 5]])  # of a task of two classes and one of three
    pairs = [(a, b) for (a, b), n in np.ndenumerate(counts) for _ in range(n)]
    a, b = np.array(pairs).T
    p = counts / counts.sum()
    expected = p * np.log2(
        p / (p.sum(axis=1, keepdims=True) * p.sum(axis=0)), where=p > 0, out=p * 0
    )
    bias = 1 * 2 / (2 * 30 * math.log(2))
    assert statistics.information(a, b) == pytest.approx(expected.sum() - bias, abs=1e-12)
    assert statistics.information(b, a) == pytest.approx(expected.sum() - bias, abs=1e-12)
    assert statistics.information(a, np.zeros(30, int)) == 0
    # 5 samples of 5 classes each: 16 cells could be filled by chance.
    assert np.isnan(statistics.information(np.arange(5), np.arange(5)))
    assert np.isnan(statistics.information(np.array([], int), np.array([], int)))


def test_fifths_of_a_number():
    values = np.array([7.0, -1.0, 3.0, 100.0, 4.0, 5.0, 0.0, 6.0, 8.0, 2.0])
    assert statistics.fifths(values).tolist() == [3, 0, 1, 4, 2, 2, 0, 3, 4, 1]
    assert set(statistics.fifths(np.array([0.0] * 9 + [5.0]))) == {0, 4}  # of ties, fewer


def test_correlation_leaves_out_pairs_that_miss_one():
    a, b = np.array([1.0, np.nan, 2.0, 3.0]), np.array([3.0, 9.0, 5.0, np.nan])
    assert statistics.correlation(a, b) == pytest.approx(1)
    assert np.isnan(statistics.correlation(a * np.nan, b))


def test_labels_in_words():
    assert readable("001.Black_footed") == "Black footed"
    assert readable("1.5") == "1.5"  # the class of a table, not a number of CUB's
    assert worded(Task("kind", 3, KINDS), 0.0) == "1.5"
    for std, words in ((0.0031, "1234.56789"), (7.0, "1234.57"), (77.0, "1234.6"), (2e4, "1235")):
        assert worded(Task("price", None, (), 0.0, std), 1234.567891) == words


def test_predictions_of_every_kind_of_task():
    torch.manual_seed(0)
    heads = TaskHeads(4, [3, None, 2, 2, None])
    features = torch.randn(9, 4)
    outputs = heads.linear(features)
    expected = [outputs[:, :3].argmax(1), outputs[:, 3], outputs[:, 4:6].argmax(1)]
    expected += [outputs[:, 6:8].argmax(1), outputs[:, 8]]
    torch.testing.assert_close(heads.predictions(features), torch.stack(expected, 1).float())


# --------------------------------------------------------------------------------------------------
# The audit of a real-valued target
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rmse", "suspected"), [(1.0, 8), (1.9, 4), (3.4, 0)])
def test_numbers_are_suspected_far_from_their_prediction(rmse, suspected):
    """400 residuals, of which four are 10, four are 5 and the others at most 2."""
    error = np.linspace(-2, 2, 400)
    error[[3, 50, 200, 390]], error[[7, 9, 300, 311]] = 10, -5
    table = pd.DataFrame({"label": 30.0, "given_label": 30 + error, "prediction": 30.0})
    table = table.assign(weight=np.nan, loss=error**2)
    labels, ranking = rank_labels(table, rmse, numbers=True)
    assert (ranking.contradicted, ranking.expected) == (suspected, 1)  # 0.27 % of 400
    assert labels.suspected.tolist() == [True] * suspected + [False] * (400 - suspected)
    assert ranking.suspicious == (suspected > 0)
    said = f"{suspected} labels" + (" that" if suspected else "")
    assert f"{said} are more than 3 validation RMSEs from the prediction" in ranking.verdict
    assert "normal errors of that size would explain 1." in ranking.verdict


@pytest.mark.parametrize(("rmse", "weak"), [(18.1, True), (17.9, False)])
def test_a_model_that_predicts_the_mean_is_weak(rmse, weak):
    task = Task("price", None, (), 100.0, 20.0)
    ranking = Ranking("loss", "", 0, 0, False, numbers=True)
    findings = Findings(None, SimpleNamespace(valid=rmse, tasks=[task]), ranking=ranking)
    assert (findings.weakness is not None) == weak
    if weak:
        assert "RMSE on the validation set is 0.91 standard deviations" in findings.weakness


# --------------------------------------------------------------------------------------------------
# Reports
# --------------------------------------------------------------------------------------------------

NOISE = {"corrupted": True, "corrupted_rate": 0.6}


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("target", ["kind", "size"])
def test_tables_against_plain_pytorch(make, no_charts, target, images):
    run, _, truth = make(target, images, **NOISE)
    page, _ = write.write_report(run)
    samples, tasks, outputs, losses, weights = recomputed(run)
    # Samples and labels: the data's own numbers, to the last digit.
    rows = read_csv(page.parent / "samples.csv")
    columns = ["id", "path", "label", "given_label", "weight", "loss", "prediction"]
    columns = columns if images else [columns[0], *columns[2:]]
    assert list(rows[0]) == columns + ["margin"] * (target == "kind")
    assert [row["id"] for row in rows] == [f"{p}.png" if images else str(p + 1) for p in REST]
    number = lambda name: np.array([float(r[name] or "nan") for r in rows])  # noqa: E731
    np.testing.assert_array_equal(number("label"), truth[target][REST])
    known = ~np.isnan(truth[target][REST])
    assert 0 < known.sum() < len(rows)
    given, scale = number("given_label"), tasks[0]
    trained = samples.labels[:, 0].double().numpy() * scale.std + scale.mean
    np.testing.assert_allclose(given[known], trained[known], rtol=1e-5)
    assert np.isin(given[known], truth[target][REST]).all()
    assert np.isnan(given[~known]).all()
    for name, values in (("loss", losses), ("weight", weights)):
        np.testing.assert_allclose(number(name), values[:, 0], rtol=2e-3, atol=1e-5)
    predicted = outputs[0].argmax(1).double() if scale.classes else outputs[0][:, 0].double()
    predicted = predicted.numpy() * scale.std + scale.mean
    np.testing.assert_allclose(number("prediction"), predicted, rtol=1e-3)
    assert (page.parent / "classes.csv").exists() == (target == "kind")
    # The audit: labelled samples alone; wrong is what was changed.
    wrong = (given != number("label"))[known]
    assert 0 < wrong.sum() < known.sum()
    area = roc_auc_score(wrong, number("loss")[known])
    assert f"{wrong.sum()} of {known.sum()} labels ({wrong.mean():.0%}) are wrong" in text_of(page)
    assert f"high target loss {area:.3f}" in text_of(page)
    listed = read_csv(page.parent / "clean_labels.csv")
    assert ("path" in listed[0]) == images
    by_id = {row["id"]: row for row in rows}
    assert len(listed) == known.sum()
    assert all(row["given_label"] == by_id[row["id"]]["given_label"] for row in listed)
    # Tasks: means over the samples that have a label.
    tasks_csv = {row["name"]: row for row in read_csv(page.parent / "tasks.csv")}
    part = {}
    for k, task in enumerate(tasks):
        row, has = tasks_csv[task.name], ~np.isnan(weights[:, k])
        if task.name == "never":
            assert not has.any()
            assert {row[c] for c in ("mean_weight", "mean_loss", "share_of_loss")} == {""}
            continue
        assert task.name == "bit" or not has.all()
        expected = weights[has, k].mean(), weights[has, k].std(), losses[has, k].mean()
        found = [float(row[name]) for name in ("mean_weight", "spread", "mean_loss")]
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-5)
        part[task.name] = (weights[has, k] * losses[has, k]).mean()
    for name, value in part.items():
        share = float(tasks_csv[name]["share_of_loss"])
        assert share == pytest.approx(value / sum(part.values()), rel=5e-3)
    # Information: over the samples that have both labels, of true target labels.
    for task in tasks[1:]:
        a, b = truth[target][REST], truth[task.name][REST]
        both = ~np.isnan(a) & ~np.isnan(b)
        if task.name == "never":
            assert tasks_csv["never"]["class_information"] == ""
            continue
        expected = by_definition(a[both], b[both], target == "size", task.classes is None)
        information = float(tasks_csv[task.name]["class_information"])
        assert information == pytest.approx(expected, abs=1e-7)
    saved = np.load(page.parent / "weights.npz")
    np.testing.assert_array_equal(np.isnan(saved["weights"]), np.isnan(weights))


def by_definition(a, b, *numbers):
    """Mutual information in bits less its bias, of classes or of the fifths of numbers."""
    codes = []
    for values, number in zip((a, b), numbers, strict=True):
        edges = np.quantile(values, [0.2, 0.4, 0.6, 0.8]) if number else ()
        codes.append([sum(v > e for e in edges) if number else v for v in values])
    total, n = 0.0, len(a)
    pairs = list(zip(*codes, strict=True))
    for one, other in set(pairs):
        p = pairs.count((one, other)) / n
        total += p * math.log2(p / (codes[0].count(one) / n * codes[1].count(other) / n))
    freedom = (len(set(codes[0])) - 1) * (len(set(codes[1])) - 1)
    return total - freedom / (2 * n * math.log(2))


def test_cards_say_given_and_predicted_labels_of_every_task(make, no_charts):
    run, _, truth = make("kind", True, **NOISE)
    page, _ = write.write_report(run, sheets=["tone", "size"])
    _, tasks, outputs, _, weights = recomputed(run)
    source = page.read_text()
    for name in ("tone", "size"):
        k = [task.name for task in tasks].index(name)
        sheet = re.search(rf'data-sheet="{k}".*?</div>', source, re.DOTALL).group()
        card = re.compile(r'picture t(\d+)"></i>\s*<p><b>(.*?)</b><br>predicted: (.*?)<br>')
        cards = card.findall(sheet)
        assert len(cards) == 24
        for place, given, predicted in cards:
            label, output = truth[name][REST][int(place)], outputs[k][int(place)]
            assert not np.isnan(label)
            if name == "tone":
                words = TONES[int(label)], TONES[int(output.argmax())]
                assert (given, predicted) == words
            else:
                assert float(given) == pytest.approx(label, abs=0.051)
                expected = output.item() * tasks[k].std + tasks[k].mean
                assert float(predicted) == pytest.approx(expected, rel=5e-3)
        heaviest = np.nanargmax(weights[:, k])
        assert int(cards[0][0]) == heaviest
    assert "<b>square" not in source and "&lt;b&gt;square" in source


def test_a_page_of_rows(make, no_charts, command):
    run, columns, truth = make("size", False, **NOISE)
    code, out, _ = command(inspect_schedule.main, run)
    assert code == 0
    page = run / "report" / "index.html"
    source, text = page.read_text(), text_of(page)
    for word in ("image", "accuracy", "jpeg", "picture t", "error rate"):
        assert word not in re.sub(r"<(style|script)>.*?</\1>", "", source, flags=re.DOTALL), word
    summary = json.loads((run / "summary.json").read_text())
    assert f"Test RMSE {summary['test_rmse']:.4g}." in out
    assert "60% of the training labels permuted" in text
    assert "51 training rows; a target that is a real number, 4 auxiliary tasks" in text
    # The first features of the row of highest target weight, in their own unit.
    weights = np.load(run / "report" / "weights.npz")["weights"][:, 0]
    position = REST[np.nanargmax(weights)]
    values = []
    for feature in columns.features[:5]:
        value = feature.values[position]
        if feature.names:
            values.append("" if value < 0 else feature.names[value])
        else:
            values.append("" if np.isnan(value) else f"{value:.4g}")
    first = re.search(r"<h3>Highest weight</h3>.*?<tbody>\s*(<tr.*?</tr>)", source, re.DOTALL)
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td.*?</td>", first.group(1))]
    assert cells[0] == str(position + 1)
    assert float(cells[1]) == pytest.approx(
        float(read_csv(run / "report" / "samples.csv")[position - 9]["given_label"]), abs=0.05
    )
    assert cells[-5:] == values
    assert not list((run / "report").glob("classes.csv"))


def test_few_labels_of_a_number(make, no_charts):
    run, _, truth = make("size", False, labeled_per_class=6)
    page, _ = write.write_report(run)
    rows = read_csv(page.parent / "samples.csv")
    known = [row for row in rows if row["given_label"]]
    assert len(known) == 6 == len(read_csv(page.parent / "clean_labels.csv"))
    assert all(row["given_label"] == row["label"] and row["weight"] for row in known)
    assert all(row["weight"] == row["loss"] == "" for row in rows if not row["given_label"])
    np.testing.assert_array_equal([float(r["label"] or "nan") for r in rows], truth["size"][REST])
    assert "6 labelled rows in all" in text_of(page)


@pytest.mark.parametrize("method", ["common", "uncertainty", "joint_stable", "task"])
def test_every_kind_of_method_has_a_page(make, no_charts, command, method):
    run, _, _ = make("size", False, method=method)
    code, _, err = command(inspect_schedule.main, run)
    learns = method in ("joint_stable", "task")
    assert code == (0 if learns else 2), err
    assert ("learns none" in err) != learns
    assert "Traceback" not in err and "Warning" not in err
    assert (run / "report" / "tasks.csv").exists() == learns
    assert "Highest target loss" in text_of(run / "report" / "index.html")


def test_charts_of_a_number(make):
    pytest.importorskip("matplotlib")
    run, _, _ = make("size", False, **NOISE)
    page, _ = write.write_report(run, tensorboard=False)
    drawn = {path.stem for path in (page.parent / "figures").glob("*.png")}
    assert {"losses", "rmse", "information", "samples", "wrong_labels"} <= drawn
    assert "accuracy" not in drawn
    source = page.read_text()
    assert "RMSE, target task" in source and "target loss (squared, standardised)" in source
    assert "nats)" not in source


def test_lower_rmse_is_better_than_common(make):
    run, _, _ = make("size", False, **NOISE)
    run = read_run(run)
    epochs = run.rows["epoch"]
    run.rows["epoch"] = [row | {"valid_rmse": v} for row, v in zip(epochs, (5.0, 3.0), strict=True)]
    assert run.best_epoch == 1
    test = {"sets": {"test": 200}}
    for ours, theirs, verdict in ((3.0, 5.0, "good"), (5.0, 3.0, "caution"), (4.0, 4.2, "note")):
        # The standard error of the difference of 4.0 and 4.2 is sqrt((16 + 17.64) / 400) = 0.29.
        values = run.__dict__ | {
            "summary": {"test_rmse": ours},
            "reference": Reference("common", theirs, theirs, []),
            "data": run.data | test,
        }
        said = {s.topic: s for s in statements(find(type(run)(**values)))}
        assert said["Baseline"].verdict == verdict
        assert ("within chance" in said["Baseline"].text) == (verdict == "note")
        change = f"{abs(ours / theirs - 1):.1%} {'below' if ours < theirs else 'above'} it"
        assert f"reaches RMSE {theirs:.4g} on the test set: this run is {change}" in (
            said["Baseline"].text
        )
        assert "went from 5 to 3, its best, in epoch 2 of 2" in said["Training"].text


def test_common_beside_a_run_is_found_by_its_rmse(make, tmp_path):
    run, _, _ = make("size", False, **NOISE)
    other = tmp_path / "record" / "other"
    here = tmp_path / "record" / "here"
    for folder, method, rmse in ((here, "joint", 4.0), (other, "common", 7.25)):
        folder.mkdir(parents=True)
        for name in ("config.json", "summary.json"):
            content = json.loads((run / name).read_text())
            if name == "summary.json":
                content |= {"method": method, "test_rmse": rmse, "valid_rmse": rmse + 1}
            (folder / name).write_text(json.dumps(content))
    found = read_run(here).reference
    assert (found.name, found.test, found.valid) == ("other", 7.25, 8.25)


def test_a_task_without_a_label_has_no_mean_weight_in_the_history(tmp_path, make):
    path = Path(tmp_path / "schedule.jsonl")
    history = ScheduleHistory(path, ["target", "a", "b"])
    total, count = np.array([6.0, 0.0, 3.0]), np.array([4.0, 0.0, 2.0])
    rest = np.array([1.5, 2.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0])
    history.write(2, [total, count, *rest])
    assert json.loads(path.read_text().splitlines()[1])["mean_weight"] == [1.5, None, 1.5]
    run, _, _ = make("size", False, **NOISE)
    read = read_run(run)
    last = find(read).tasks.set_index("name").mean_weight
    assert np.isnan(last["never"]) and last.drop("never").notna().all()
    assert evaluate_run(read).labels(1).shape == (len(REST),)
