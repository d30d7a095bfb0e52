"""Damaged files: fine all the same, or one of the project's own errors, and nothing written.

Files are cut, changed in one place, or overwritten with random bytes; those that people may edit
get other entries.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from auxilearn.backbones import build_backbone
from auxilearn.data import cub
from auxilearn.data.split import INFO_FILE, SPLIT_FILES, load_split, write_split
from auxilearn.errors import RunError, UserError
from auxilearn.report import write
from auxilearn.run.build import build
from auxilearn.run.config import Config, resolve
from auxilearn.run.record import description
from auxilearn.tables.render import read_paper
from tests.conftest import TINY, prepare
from train_bilevel import train


def trying(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@st.composite
def damage(draw, kinds=("random", "cut", "change", "insert")):
    """A function from a file's bytes to other bytes."""
    kind = draw(st.sampled_from(kinds))
    if kind == "random":
        content = draw(st.binary(max_size=60))
        return lambda data: content
    where = draw(st.floats(0, 0.999))
    if kind == "cut":
        return lambda data: data[: int(where * len(data))]
    if kind == "edit":
        value = draw(JSON)
        return lambda data: with_entry(data, where, value)
    piece = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\n", b"0", b"-"]))
    skip = len(piece) if kind == "change" else 0

    def change(data):
        place = int(where * len(data))
        return data[:place] + piece + data[place + skip :]

    return change


def with_entry(data, where, value):
    """A JSON file with one of its entries replaced."""
    content = json.loads(data)
    places = list(content) if isinstance(content, dict) else range(len(content))
    content[places[int(where * len(places))]] = value
    return json.dumps(content).encode()


def listing(folder):
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("*"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with ``data``, its ``split`` and a finished run in ``record``."""
    folder = tmp_path_factory.mktemp("sound")
    shape = {"classes": 3, "train_per_class": 4, "attributes": 3, "image_size": (24, 20)}
    prepare(folder / "data", folder / "split", **shape)
    train(config(folder))
    return folder


def config(folder, **changes):
    places = {"split_dir": str(folder / "split"), "record_dir": str(folder / "record")}
    names = {"exp_name": "run", "epochs": 1, "save_every": 2}
    return Config(**{**TINY, **places, **names, **changes})


@pytest.fixture
def damaged(sound):
    """``damaged(path, change, use)``: ``use`` while the file at ``path`` is changed."""

    def attempt(path, change, use):
        original, before = path.read_bytes(), listing(sound)
        path.write_bytes(change(original))
        try:
            use()
        except (UserError, RunError) as error:
            assert str(error).strip()
        finally:
            path.write_bytes(original)
        assert listing(sound) == before

    return attempt


@pytest.mark.parametrize("name", [*cub.REQUIRED_FILES, cub.ATTRIBUTES])
@trying(12)
@given(change=damage())
@example(change=lambda data: data.replace(b" ", b"\0", 1))
@example(change=lambda data: data.replace(b"/", b"\0", 1))
@example(change=lambda data: b"9" * 18 + b" " + data)
def test_annotation_files(sound, damaged, name, change):
    damaged(sound / "data" / name, change, lambda: cub.read_annotations(sound / "data"))


@trying(10)
@given(roles=JSON)
@example(roles={"roles": []})
def test_attribute_roles(sound, tmp_path_factory, roles):
    annotations = cub.read_annotations(sound / "data")
    path = sound / "data" / cub.ROLES
    path.write_text(json.dumps(roles))
    folder = tmp_path_factory.mktemp("out")
    try:
        write_split(folder, annotations)
    except UserError:
        assert not listing(folder)
    finally:
        path.unlink()


@pytest.mark.parametrize("name", SPLIT_FILES)
@trying(12)
@given(change=damage(("random", "cut", "change", "edit")))
@example(change=lambda data: data.replace(b"images", b"im\\u0000ges"))
def test_split_files(sound, damaged, name, change):
    def use():
        split = load_split(sound / "split")
        description(build(resolve(config(sound), split), split))

    damaged(sound / "split" / name, change, use)


@trying(8)
@given(change=damage(("random", "cut")))
def test_split_info(sound, damaged, change):
    damaged(sound / "split" / INFO_FILE, change, lambda: load_split(sound / "split"))


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@trying(8)
@given(change=damage(("random", "cut")))
def test_files_of_a_run_that_is_resumed(sound, damaged, name, change):
    path = sound / "record/full/run" / name
    damaged(path, change, lambda: train(config(sound, resume=True)))


@pytest.fixture
def run_copy(sound, tmp_path_factory):
    """``run_copy()``: the folder of an unfinished copy of the run, and the way to continue it."""

    def make():
        folder = tmp_path_factory.mktemp("copy")
        run = folder / "full/run"
        shutil.copytree(sound / "record/full/run", run)
        (run / "summary.json").unlink()
        return run, lambda: train(config(sound, record_dir=str(folder), resume=True))

    return make


@trying(4)
@given(change=damage())
@example(change=lambda data: data[:-1])
def test_checkpoints(run_copy, change):
    run, go_on = run_copy()
    newest = max(run.glob("step-*.pt"))
    newest.write_bytes(change(newest.read_bytes()))
    go_on()  # from the one before it
    assert (run / "summary.json").exists()


def test_a_best_checkpoint_that_is_gone(run_copy):
    run, go_on = run_copy()
    (run / "best.pt").unlink()
    with pytest.raises(RunError, match="best.pt is not the checkpoint that this run wrote.*put it"):
        go_on()


@trying(12)
@given(change=damage())
def test_weights_files(sound, tmp_path_factory, change):
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    path.write_bytes(change((sound / "record/full/run/best.pt").read_bytes()))
    try:
        build_backbone("convnet", 8, weights_path=str(path))
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model": {"backbone.layers.0.0.weight": torch.ones(1)}}, "not weights of --backbone"),
        ([torch.ones(1)], "expected a state dict"),
        (3, "expected a state dict"),
    ],
)
def test_files_that_hold_something_else_than_weights(tmp_path, content, problem):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=f"weights.pt: {problem}"):
        build_backbone("convnet", 8, weights_path=str(tmp_path / "weights.pt"))


def test_weights_that_are_not_finite(sound, tmp_path):
    state = torch.load(sound / "record/full/run/best.pt", weights_only=True)
    next(iter(state["model"].values())).fill_(torch.nan)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="weights.pt: .*values that are not finite"):
        build_backbone("convnet", 8, weights_path=str(tmp_path / "weights.pt"))


@pytest.fixture
def report(monkeypatch, tmp_path):
    """``report(run)`` writes one without charts, which take seconds, outside the run's folder."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("auxilearn.report.figures.CHARTS", ())
    return lambda run: write.write_report(run, out=tmp_path / "report")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json is not valid JSON"),
        ("config.json", b"[]", "config.json is not a configuration"),
        (
            "config.json",
            b'{"config": {"method": "none"}}',
            "config.json: recorded by another version",
        ),
        ("summary.json", b"\xff", "summary.json is not valid JSON"),
        ("metrics.jsonl", b"\xff", "metrics.jsonl is not what a run writes"),
        ("best.pt", b"no weights", "best.pt: not a weights file"),
    ],
)
def test_damaged_files_of_a_run_are_one_line(sound, report, tmp_path, name, content, message):
    run = Path(shutil.copytree(sound / "record/full/run", tmp_path / "run"))
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        report(run)


def test_a_report_writes_nowhere_that_a_configuration_names(sound, damaged, report, tmp_path):
    run = sound / "record/full/run"

    def elsewhere(data):
        content = json.loads(data)
        content["config"] |= {"cache_dir": str(tmp_path / "elsewhere")}
        return json.dumps(content).encode()

    damaged(run / "config.json", elsewhere, lambda: report(run))
    assert (tmp_path / "report/index.html").exists()
    assert not (tmp_path / "elsewhere").exists()


@trying(12)
@given(change=damage())
@example(change=lambda data: b"[" * 200_000)
@example(change=lambda data: data + b"cub,table2,joint,supervised," + b"9" * 200_000)
@example(change=lambda data: data + b"cub,table2,joint,supervised,1e400\n")
@example(change=lambda data: data + b'"' + b"x" * 200_000)
@example(change=lambda data: data.replace(b"\n", b"\r\n"))
def test_paper_numbers(tmp_path_factory, change):
    path = tmp_path_factory.mktemp("paper") / "paper.csv"
    path.write_bytes(
        change(b"dataset,table,row,setting,accuracy\ncub,table2,single,supervised,50\n")
    )
    try:
        read_paper(path)
    except UserError as error:
        assert str(path) in str(error)
