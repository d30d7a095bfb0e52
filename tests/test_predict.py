"""inspect_schedule.py --predict: the predictions are those that the run was tested by."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_preprocess
import inspect_schedule
import train_bilevel
from auxilearn.data.split import load_split
from auxilearn.files import read_json
from examples import write_data
from tests.conftest import assert_one_error_line

ROOT = Path(__file__).resolve().parents[1]

SAMPLES = 60


def write_csv(path, columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def columns():
    generator = np.random.default_rng(0)
    kind = generator.choice(["ash", "oak", "fir"], SAMPLES)
    size = np.where(kind == "oak", 30.0, 10.0) + generator.normal(size=SAMPLES)
    place = generator.choice(["north", "south", ""], SAMPLES)
    return {
        "kind": kind,
        "size": [f"{s:.6f}" for s in size],
        "height": [f"{h:.6f}" for h in 100 * size + generator.normal(size=SAMPLES)],
        "place": place,
    }


@pytest.fixture
def trained(tmp_path, command):
    """``trained(*flags of data_preprocess.py)``: (the run's folder, its split)."""

    def train(*flags):
        split, record = tmp_path / "split", tmp_path / "record"
        code, _, err = command(data_preprocess.main, *flags, "--out_dir", split)
        assert code == 0, err
        flags = ["--split_dir", split, "--record_dir", record, "--exp_name", "run", "--epochs", "4"]
        flags += ["--main_lr", "0.01", "--method", "common", "--feature_dim", "8", "--device"]
        code, _, err = command(train_bilevel.main, *flags, "cpu", "--overwrite", "1")
        assert code == 0, err
        return record / "full" / "run", load_split(split)

    return train


@pytest.mark.parametrize("target", ["kind", "height"])
def test_rows_are_predicted_as_in_the_test(target, columns, tmp_path, trained, command):
    table = write_csv(tmp_path / "t.csv", columns)
    auxiliary = "height" if target == "kind" else "kind"
    run, split = trained("--table", table, "--target", target, "--auxiliary", auxiliary)
    out = tmp_path / "out.csv"
    code, said, _ = command(inspect_schedule.main, run, "--predict", table, "--out", out)
    assert (code, said) == (0, f"written to {out}\n")
    rows = read_csv(out)
    assert [row["sample"] for row in rows] == [str(k) for k in range(1, SAMPLES + 1)]
    extra = ["probability"] if target == "kind" else []
    assert [*rows[0]] == ["sample", *extra, target, auxiliary]
    summary, test = read_json(run / "summary.json"), split.indices["test"]
    if target == "kind":
        right = np.mean([rows[k]["kind"] == columns["kind"][k] for k in test])
        assert right == summary["test_accuracy"]
        assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    else:
        errors = [float(rows[k]["height"]) - float(columns["height"][k]) for k in test]
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(summary["test_rmse"], rel=1e-5)
    # Without labels, in another order of columns, and with a value of no training row.
    features = {"place": ["west", "north"], "size": ["30.5", ""]}
    new = write_csv(tmp_path / "new.csv", features)
    code, _, err = command(inspect_schedule.main, run, "--predict", new)
    assert code == 0 and "column place: 1 values are in no training row" in err
    assert len(read_csv(run / "predictions.csv")) == 2


def test_images_are_predicted_as_in_the_test(columns, tmp_path, trained, command):
    photos = tmp_path / "photos"
    for number, kind in enumerate(columns["kind"]):
        (photos / kind).mkdir(parents=True, exist_ok=True)
        colour = {"ash": (200, 30, 30), "oak": (30, 200, 30), "fir": (30, 30, 200)}[kind]
        shade = tuple(c + number % 50 for c in colour)
        Image.new("RGB", (20, 16 + number % 5), shade).save(photos / kind / f"{number}.png")
    run, split = trained("--images", photos)
    code, _, _ = command(inspect_schedule.main, run, "--predict", photos)
    assert code == 0
    found = {row["sample"]: row["folder"] for row in read_csv(run / "predictions.csv")}
    assert sorted(found) == sorted(split.paths)
    test = [split.paths[k] for k in split.indices["test"]]
    right = np.mean([found[path] == path.split("/")[0] for path in test])
    assert right == read_json(run / "summary.json")["test_accuracy"]
    code, _, err = command(inspect_schedule.main, run, "--predict", write_csv(photos / "t.csv", {}))
    assert code == 2
    assert_one_error_line(err, "t.csv", "expected a folder of images")


def test_wrong_tables_are_one_line(columns, tmp_path, trained, command):
    table = write_csv(tmp_path / "t.csv", columns)
    run, _ = trained("--table", table, "--target", "kind")
    tall = {"size": ["1", "tall"], "height": ["1", "1"], "place": ["north", "south"]}
    wrong = {
        "no column height": {"size": ["1"], "place": ["north"]},
        "line 3, column size: tall is not a finite number": tall,
    }
    for words, content in wrong.items():
        new = write_csv(tmp_path / "new.csv", content)
        code, _, err = command(inspect_schedule.main, run, "--predict", new)
        assert code == 2
        assert_one_error_line(err, words, str(new))
    for source, words in ((tmp_path, "expected a table"), (tmp_path / "no.csv", "no such file")):
        code, _, err = command(inspect_schedule.main, run, "--predict", source)
        assert code == 2
        assert_one_error_line(err, "--predict", words)
    assert not (run / "predictions.csv").exists()
    code, _, err = command(inspect_schedule.main, tmp_path, "--predict", table)
    assert code == 2
    assert_one_error_line(err, "best.pt")


def test_the_commands_of_the_page_prepare_and_predict_own_data(tmp_path, monkeypatch, command):
    """preprocess_data/README.md's commands word for word, but for the length of training."""
    page = (ROOT / "preprocess_data" / "README.md").read_text().replace("\\\n", " ")
    lines = [line.split("#")[0].split() for line in page.splitlines()]
    lines = [line[1:] for line in lines if line[:1] == ["python"] and "own/" in " ".join(line)]
    lines = [["examples/write_data.py", "own"], *lines]
    assert [line[0] for line in lines] == [
        "examples/write_data.py",
        *("data_preprocess.py", "train_bilevel.py") * 2,
        "inspect_schedule.py",
    ]
    monkeypatch.chdir(tmp_path)
    short = ["--max_steps", "1", "--dev_epochs", "0", "--threads", "1"]
    mains = {
        "examples/write_data.py": write_data.main,
        "data_preprocess.py": data_preprocess.main,
        "train_bilevel.py": train_bilevel.main,
        "inspect_schedule.py": inspect_schedule.main,
    }
    for name, *flags in lines:
        code, _, err = command(mains[name], *flags, *(short if name == "train_bilevel.py" else ()))
        assert code == 0, err
    rows = read_csv("own/runs/full/tumours/predictions.csv")
    assert {row["diagnosis"] for row in rows} <= {"benign", "malignant"} and len(rows) == 569
