"""Tables of own data: any preprocessed split, and a target that is a real number."""

import csv
import json
import math
import statistics

import numpy as np
import pytest

import data_preprocess
import reproduce_tables
import train_bilevel
from auxilearn.data.columns import Columns, Feature, write_columns
from auxilearn.data.contract import Task
from auxilearn.data.split import load_split
from auxilearn.errors import UserError
from auxilearn.metrics import ACCURACY, RMSE
from auxilearn.run.config import Config, resolve
from auxilearn.tables import chart, local, render
from auxilearn.tables.local import Outcome
from auxilearn.tables.protocol import rows
from auxilearn.tables.render import Sheet
from auxilearn.tables.statistics import evaluate
from auxilearn.tables.sweep import Result, RunFlags
from auxilearn.tables.tuning import Hyperparameters
from tests.conftest import Run, assert_one_error_line, tiny_flags

ROWS = rows()
SEEDS = (1, 2, 3, 4)
# RMSEs of which the lowest is the best: joint's is far lower than every baseline, naive's far
# higher, and linear equals common but for the order of the seeds.
VALUES = {
    "single": (60.0, 61.5, 58.5, 60.4),
    "common": (50.0, 51.0, 49.0, 50.5),
    "linear": (50.5, 49.0, 51.0, 50.0),
    "naive": (70.0, 71.2, 69.1, 70.4),
    "joint": (40.0, 41.2, 38.9, 40.4),
    "joint_stable": (40.4, 38.9, 41.2, 40.0),
}
FLAGS = " ".join(
    tiny_flags(backbone="mlp", image_size=224, epochs=1, threads=1, train_batch_size=16)
)


def results(values, setting="supervised"):
    how = "id", "runs/x", "python train_bilevel.py"
    return [
        Result(row, setting, seed, "done", value, value + 1, *how)
        for row, of_row in values.items()
        for seed, value in zip(SEEDS, of_row, strict=True)
    ]


def sheet(found):
    return Sheet(found, "houses-1a2b3c4d", "houses")


def line_of(text, title):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return next([f.strip() for f in line] for line in lines if line[0].strip() == title)


# --------------------------------------------------------------------------------------------------
# Lower is better
# --------------------------------------------------------------------------------------------------


def test_the_lowest_mean_is_best_and_worse_is_higher():
    found = evaluate("table2", results(VALUES), SEEDS, RMSE())
    means = {row: statistics.fmean(of_row) for row, of_row in VALUES.items()}
    best = {row for row in means if math.isclose(means[row], min(means.values()))}
    assert best == {"joint", "joint_stable"}  # a tie
    assert {row for row in found.rows if found.cells.best[row, "supervised"]} == best
    marked = [row for row in found.rows if found.cells.baseline[row, "supervised"]]
    assert marked == ["common"]  # the first of the tied baselines; ``single`` has the highest mean
    verdicts = {test.row: test.verdict for test in found.tests}
    assert verdicts == {"naive": -1, "joint": 1, "joint_stable": 1}
    for test in found.tests:
        assert test.other == "common"
        assert test.difference == pytest.approx(means[test.row] - means["common"])
    # The same numbers taken for accuracies: everything is the other way round.
    other = evaluate("table2", results(VALUES), SEEDS, ACCURACY)
    assert {t.row: t.verdict for t in other.tests} != verdicts
    assert [r for r in other.rows if other.cells.best[r, "supervised"]] == ["naive"]


@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e9])
def test_marks_do_not_depend_on_the_unit(unit):
    scaled = {row: tuple(unit * v for v in of_row) for row, of_row in VALUES.items()}
    scaled["task"] = tuple(v - 3 * unit for v in scaled["common"])  # a constant difference
    scaled["naive"] = tuple(v + 2 * unit for v in scaled["task"])
    found = evaluate("table2", results(scaled), SEEDS, RMSE())
    assert [r for r in found.rows if found.cells.best[r, "supervised"]] == ["joint", "joint_stable"]
    assert [r for r in found.rows if found.cells.baseline[r, "supervised"]] == ["task"]
    tests = {test.row: test for test in found.tests}
    assert (tests["naive"].p, tests["naive"].low) == (2 / 16, None)  # by sign flips
    assert tests["joint"].verdict == 1


def test_a_table_of_rmse_by_hand(tmp_path):
    found = evaluate("table2", results(VALUES), SEEDS, RMSE())
    files = render.write_table(sheet(found), tmp_path)
    text, cells, latex, runs = (path.read_text() for path in files)
    assert text.startswith("## Table 2: Supervised, houses\n")
    sd = statistics.stdev(VALUES["common"])
    assert line_of(text, ROWS["common"].title)[1] == f"50.1 ± {sd:.1f} †"
    assert line_of(text, ROWS["joint"].title)[1].startswith("**40.1 ± ")
    assert line_of(text, ROWS["joint"].title)[1].endswith("▲")
    assert line_of(text, ROWS["naive"].title)[1].endswith("▼")
    assert "Test RMSE in the target's own unit, as mean" in text
    assert "the lowest mean of a column" in text and "difference in RMSE (negative" in text
    assert "| −10.00 |".replace(" ", "") in text.replace(" ", "")
    for written in (text, latex, cells, runs):
        assert "ccuracy" not in written and "CUB" not in written and "per cent" not in written
    lines = {line["row"]: line for line in csv.DictReader(cells.splitlines())}
    assert lines["joint"]["metric"] == "rmse"
    assert float(lines["joint"]["mean"]) == pytest.approx(statistics.fmean(VALUES["joint"]))
    assert float(lines["joint"]["diff"]) == pytest.approx(-10)
    (first, *_) = csv.DictReader(runs.splitlines())
    assert (float(first["test_rmse"]), float(first["valid_rmse"])) == (60, 61)


@pytest.mark.parametrize(
    ("values", "decimals"),
    [([54.2, 55.0, 1e9], 1), ([0.00523], 5), ([48213.7], 0), ([999.6], 0), ([0.0], 1), ([], 1)],
)
def test_decimals(values, decimals):
    assert RMSE().decimals(values) == decimals


def test_the_charts_show_rmse_in_its_own_unit():
    found = evaluate("table2", results(VALUES), SEEDS, RMSE())
    (axes,) = chart.table_figure(sheet(found)).axes
    assert axes.get_xlabel() == "test RMSE (lower is better)"
    drawn = {artist.get_gid(): artist for artist in axes.get_children() if artist.get_gid()}
    mean = statistics.fmean(VALUES["joint"])
    assert drawn["mean:joint"].get_xdata()[0] == pytest.approx(mean)
    assert drawn["baseline"].get_xdata()[0] == pytest.approx(statistics.fmean(VALUES["common"]))
    settings = ("corrupted_0.2", "corrupted_0.6")
    many = [result for setting in settings for result in results(VALUES, setting)]
    (axes,) = chart.table_figure(sheet(evaluate("table4", many, SEEDS, RMSE()))).axes
    assert axes.get_ylabel() == "test RMSE (lower is better)"
    drawn = {artist.get_gid(): artist for artist in axes.get_children() if artist.get_gid()}
    assert list(drawn["mean:joint"].get_ydata()) == pytest.approx([mean] * 2)


def test_tuning_takes_the_lowest_rmse(tmp_path):
    a, b, c, d = ({"main_lr": rate} for rate in (0.1, 0.2, 0.3, 0.4))
    tried = [(a, [5.0, 7.0]), (b, [3.0, None]), (c, [4.0, 5.0]), (d, [5.0, 4.0])]
    how = "command", [7, 8], RunFlags.read([]), "print"
    tuned = Hyperparameters(tmp_path / "h.json", "houses-1", RMSE())
    chosen = tuned.write_choice({("table2", "single"): tried}, *how)
    assert chosen == {("table2", "single"): c}  # b has a failed run, d is no better
    entry = json.loads((tmp_path / "h.json").read_text())["houses-1"]["tables"]["table2"]
    assert [t["valid_rmse"] for t in entry["rows"]["single"]["candidates"]] == [6, None, 4.5, 4.5]
    found = Hyperparameters(tmp_path / "h.json", "houses-1", RMSE())
    said = found.notes("table2", ["single", "joint"], RunFlags.read([]), "print")
    assert "by validation RMSE" in said[0] and "defaults of training" in said[1]


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------


def write_rows(folder, seed, number=True, samples=120):
    """A split of rows: a target that is a number (or of two classes), and an auxiliary task."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, 3))
    price = 100 + 20 * x[:, 0] + rng.normal(size=samples)
    kind = (x[:, 1] > 0).astype(np.int64)
    tasks, labels = [Task("price", None), Task("kind", 2, ("a", "b"))], [price, kind]
    if not number:
        tasks, labels = tasks[::-1], labels[::-1]
    order = np.arange(samples)
    sets = {"full_train": order[:80], "dev": order[:10], "rest_train": order[10:80]}
    sets |= {"valid": order[80:100], "test": order[100:]}
    features = [Feature(f"x{k}", x[:, k]) for k in range(3)]
    columns = Columns(tasks, labels, sets, folder, features=features)
    write_columns(folder, columns, split_seed=5, aux_shot=None)
    return folder


@pytest.fixture
def here(monkeypatch):
    """Runs are trained in this process, and nothing is preprocessed."""

    def launch(jobs, *_):
        for job in jobs:
            try:
                train_bilevel.train(job.config)
            except UserError as error:
                job.log.write_text(f"error: {error}\n")
                yield job, Outcome(2)
            else:
                yield job, Outcome(0)

    monkeypatch.setattr(local, "launch", launch)
    monkeypatch.setattr(data_preprocess, "main", None)


@pytest.fixture
def table(here, command, tmp_path):
    """``table(what, split_dir, *flags)``: (exit code, stdout, stderr) of a sweep of short runs."""

    def make(what, split_dir, *flags):
        where = ["--split_dir", split_dir, "--sweep_dir", tmp_path / "sweeps"]
        words = [what, *where, "--run_flags", FLAGS, "--methods", "single", "--seeds", "1", *flags]
        return command(reproduce_tables.main, *words)

    return make


def test_two_folders_of_one_name_do_not_mix(table, tmp_path):
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        split_dir = write_rows(tmp_path / name / "houses", seed=number)
        code, out, err = table("table2", split_dir)
        assert code == 0, err
        assert out.startswith("1 runs: 1 to do\n")
        fingerprint = load_split(str(split_dir)).fingerprint
        home = tmp_path / "sweeps" / f"houses-{fingerprint[:8]}"
        (run,) = home.glob("bird_record/full/*")
        value = Run(run).summary["test_rmse"]
        assert f"test RMSE {value:.6g}" in out
        with open(home / "tables/table2_runs.csv", newline="") as file:
            (line,) = csv.DictReader(file)
        assert float(line["test_rmse"]) == value
        assert "## Table 2: Supervised, houses\n" in out
        assert f"`{split_dir}`: 120 rows; 80 for training, 10 of them for development" in out
        assert "Target: price, a number; 1 auxiliary tasks." in out
        assert "CUB" not in out and "accuracy" not in out and "paper" not in out
    assert len(list((tmp_path / "sweeps").iterdir())) == 2
    assert table("table2", split_dir)[1].startswith("1 runs: 1 done\n")


@pytest.mark.parametrize("number", [True, False])
def test_table_3_keeps_labels_per_class_or_in_all(number, table, tmp_path, monkeypatch):
    split_dir = write_rows(tmp_path / "rows", 0, number)
    monkeypatch.setattr(reproduce_tables, "duration", lambda *args: [])
    code, out, _ = table("table3", split_dir, "--dry_run")
    assert (code, len(out.splitlines())) == (0, 1)  # nothing is preprocessed
    assert f"--labeled_per_class {50 if number else 5} " in out
    code, out, err = table("table3", split_dir, "--settings", "semi")
    assert code == 0, err
    assert ("50 labels in all" if number else "5 labels per class") in out


def test_a_dry_run_measures_rows(table, tmp_path):
    split_dir = write_rows(tmp_path / "rows", 0)
    code, out, err = table("table4", split_dir, "--dry_run")
    assert code == 0, err
    assert "hours of training in all (3 by a short training of each of 1 kinds here)" in out
    assert not (tmp_path / "sweeps").exists()


def test_tuning_of_own_data_is_kept_beside_its_runs(table, tmp_path):
    split_dir = write_rows(tmp_path / "rows", 0)
    code, out, err = table("tune", split_dir, "--tables", "table2")
    assert code == 0, err
    (home,) = (tmp_path / "sweeps").iterdir()
    of_row = json.loads((home / "hyperparameters.json").read_text())[home.name]["tables"]["table2"]
    tried = of_row["rows"]["single"]["candidates"]
    lowest = min(tried, key=lambda candidate: candidate["valid_rmse"])
    assert of_row["rows"]["single"]["chosen"] == {"main_lr": lowest["main_lr"]}
    # The unit of learning rates is what training alone would take.
    unit = resolve(Config(backbone="mlp"), load_split(str(split_dir))).main_lr
    assert unit in [candidate["main_lr"] for candidate in tried]
    code, out, err = table("table2", split_dir, "--seeds", "2")
    assert code == 0, err
    assert "the best of 6 candidates by validation RMSE" in out
    (run,) = [Run(path) for path in home.glob("bird_record/full/single_seed2_*")]
    assert run.read("config.json")["config"]["main_lr"] == lowest["main_lr"]


def test_images_of_cubs_layout_are_own_data_too(tiny_split, here, command, tmp_path):
    where = ["--split_dir", tiny_split, "--sweep_dir", tmp_path / "sweeps"]
    flags = " ".join(tiny_flags(epochs=1, threads=1, image_size=21))
    words = ["table2", *where, "--run_flags", flags, "--methods", "single", "--seeds", "1"]
    code, out, _ = command(reproduce_tables.main, *words, "--dry_run")
    assert code == 0 and "by a short training of each of 1 kinds" in out
    code, out, err = command(reproduce_tables.main, *words)
    assert code == 0, err
    assert "## Table 2: Supervised, split\n" in out and "CUB" not in out and "paper" not in out
    assert "images; 20 for training, 4 of them for development" in out
    assert "Target: target, 4 classes; 4 auxiliary tasks." in out


def test_wrong_use_is_one_line(table, command, tmp_path):
    split_dir = write_rows(tmp_path / "rows", 0)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for folder, flags, part in (
        (tmp_path / "nothing", [], "nothing/split_info.json: is missing"),
        (tmp_path / "empty", [], "empty/split_info.json: is missing"),
        (tmp_path / "file", [], "file/split_info.json: "),
        (split_dir, ["--data_root", tmp_path], "holds rows, not images: leave it out"),
        (split_dir, ["--paper", tmp_path / "file"], "--paper goes with --dataset"),
    ):
        code, _, err = table("table2", folder, *flags)
        assert code == 2
        assert_one_error_line(err, part)
    assert not (tmp_path / "sweeps").exists()


def test_names_of_folders_are_plain(tmp_path):
    split_dir = write_rows(tmp_path / "my data & more", 0)
    words = ["table2", "--split_dir", str(split_dir), "--methods", "single"]
    args = reproduce_tables.parse_arguments(words)
    assert args.dataset == f"my_data___more-{args.own.fingerprint[:8]}"
    assert args.out_dir.parent.name == args.dataset
