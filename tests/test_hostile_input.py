"""Broken and malicious files: one of the project's own errors, no other, and nothing written.

Every file that is read is overwritten with random bytes, cut, changed in one place or replaced by
valid content of another meaning. The only outcomes are that it is fine all the same, a
``UserError`` or a ``RunError``.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from auxilearn.errors import RunError, UserError
from auxilearn.report import write
from auxilearn.run.config import Config
from auxilearn.tables.render import read_paper
from tests.conftest import TINY, prepare
from train_bilevel import train

few = settings(
    max_examples=12,
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
DEEP = b"[" * 200_000
LONG_NUMBER = b"1" * 5000


@st.composite
def damage(draw):
    """A function from a file's bytes to other bytes."""
    kind = draw(st.sampled_from(["random", "cut", "change", "insert", "json", "field"]))
    if kind == "random":
        content = draw(st.binary(max_size=60))
        return lambda data: content
    if kind == "json":
        content = json.dumps(draw(JSON)).encode()
        return lambda data: content
    where = draw(st.floats(0, 0.999))
    if kind == "cut":
        return lambda data: data[: int(where * len(data))]
    if kind == "field":
        value = draw(JSON)
        return lambda data: with_field(data, where, value)
    piece = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\n", b"0", b"-", b"../"]))
    skip = len(piece) if kind == "change" else 0

    def change(data):
        place = int(where * len(data))
        return data[:place] + piece + data[place + skip :]

    return change


def with_field(data, where, value):
    """A JSON object with one of its fields replaced; other files are left as they are."""
    try:
        content = json.loads(data)
    except ValueError:
        return data
    if not content:
        return data
    if isinstance(content, dict):
        names = list(content)
        content[names[int(where * len(names))]] = value
    elif isinstance(content, list):
        content[int(where * len(content))] = value
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


def small_tensors():
    return st.sampled_from([torch.zeros(0), torch.ones(2), torch.zeros((), dtype=torch.int64)])


STATES = st.recursive(
    st.none() | st.integers(-2, 9) | small_tensors(),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["state", "sizes", "step", "model", "best"]), inner)
    ),
    max_leaves=5,
)


# --------------------------------------------------------------------------------------------------
# What a report reads
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# What tables read
# --------------------------------------------------------------------------------------------------


@few
@given(change=damage())
@example(change=lambda data: DEEP)
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
