"""Broken and malicious files: one of the project's own errors, no other, and nothing written.

Every file that is read is overwritten with random bytes, cut, changed in one place or replaced by
valid content of another meaning. The only outcomes are that it is fine all the same, a
``UserError`` or a ``RunError``.
"""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from auxilearn.trainer import Trainer, train
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from auxilearn.data import cub
from auxilearn.data.cache import INDEX, open_cache
from auxilearn.data.split import INFO_FILE, SPLIT_FILES, load_split, write_split
from auxilearn.errors import RunError, UserError
from auxilearn.models import build_backbone
from auxilearn.report import write
from auxilearn.report.run import evaluate_run, read_run
from auxilearn.run import record as record_module
from auxilearn.run.config import Config, resolve
from auxilearn.tables.render import read_paper
from tests.conftest import TINY, prepare

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


@pytest.mark.parametrize("name", [*cub.REQUIRED_FILES, cub.ATTRIBUTES])
@few
@given(change=damage())
@example(change=lambda data: data.replace(b" ", b"\0", 1))
@example(change=lambda data: b"9" * 18 + b" " + data)
def test_annotation_files(sound, damaged, name, change):
    damaged(sound / "data" / name, change, lambda: cub.read_annotations(sound / "data"))


@few
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


@pytest.mark.parametrize("name", [INFO_FILE, *SPLIT_FILES])
@few
@given(change=damage())
@example(change=lambda data: DEEP)
@example(change=lambda data: LONG_NUMBER)
@example(change=lambda data: data.replace(b"images", b"im\\u0000ges"))
@example(change=lambda data: data.replace(b"Bird", b"\\ud800"))
def test_split_files(sound, damaged, name, change):
    def use():
        split = load_split(sound / "split")
        Trainer(resolve(config(sound), split), split).description()

    damaged(sound / "split" / name, change, use)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@few
@given(change=damage())
@example(change=lambda data: DEEP)
@example(change=lambda data: LONG_NUMBER)
@example(change=lambda data: b'{"config": [1], "data": {"fingerprint": 1}}')
@example(change=lambda data: b'{"test_accuracy": "high"}')
def test_files_of_a_run_that_is_resumed(sound, damaged, name, change):
    path = sound / "record/full/run" / name
    damaged(path, change, lambda: train(config(sound, resume=True)))


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


def continue_with(run_copy, content):
    """Continue a run whose newest checkpoint has ``content``, under the right hash."""
    run, go_on = run_copy()
    (run / f"step-00000099.{record_module._hash(content)}.pt").write_bytes(content)
    before = listing(run)
    try:
        go_on()
    except (UserError, RunError) as error:
        assert str(error).strip()
        assert listing(run) == before


@few
@given(change=damage())
@example(change=lambda data: data[:-1])
def test_checkpoints_of_any_bytes(run_copy, change):
    run, go_on = run_copy()
    newest = max(run.glob("step-*.pt"))
    original = newest.read_bytes()
    newest.write_bytes(change(original))
    go_on()  # from the one before it
    assert (run / "summary.json").exists()
    continue_with(run_copy, change(original))


@few
@given(state=STATES)
@example(state={"state": {"step": 1}, "sizes": {"metrics.jsonl": 10**15}})
@example(state={"state": {"step": 1}, "sizes": {"metrics.jsonl": -1}})
@example(state={"state": {"step": 1}, "sizes": {"../config.json": 0}})
@example(state={"state": {}, "sizes": {}})
def test_checkpoints_of_other_content(run_copy, state):
    continue_with(run_copy, record_module._saved(state))


@few
@given(change=damage())
def test_weights_files(sound, tmp_path_factory, change):
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    path.write_bytes(change((sound / "record/full/run/best.pt").read_bytes()))
    try:
        build_backbone("convnet", 8, weights_path=str(path))
    except UserError as error:
        assert str(path) in str(error)


@few
@given(state=STATES)
@example(state={"model": {"backbone.layers.0.0.weight": 3}})
@example(state={1: torch.ones(1)})
def test_weights_files_of_other_content(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=str(path)):
        build_backbone("convnet", 8, weights_path=str(path))


def test_weights_that_grow_when_they_are_read(sound, tmp_path):
    """A zip archive whose members are packed: torch.save writes none, torch.load unpacks them."""
    path = tmp_path / "weights.pt"
    best = sound / "record/full/run/best.pt"
    with zipfile.ZipFile(best) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name) + bytes(1 << 20))
    with pytest.raises(UserError, match=f"{path}: not a weights file .*compressed"):
        build_backbone("convnet", 8, weights_path=str(path))
    with pytest.raises(UserError, match="its members are larger than the file"):
        record_module._loaded(path, path.read_bytes())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weight: weight.fill_(torch.nan), "has values that are not finite"),
        (lambda weight: weight.to_sparse(), "is no plain tensor"),
        (lambda weight: weight.to("meta"), "is no plain tensor"),
        (
            lambda weight: weight.to(torch.complex64),
            "is of type torch.complex64, expected torch.fl",
        ),
    ],
)
def test_weights_that_cannot_be_copied(sound, tmp_path, change, problem):
    path = tmp_path / "weights.pt"
    state = torch.load(sound / "record/full/run/best.pt", weights_only=True)
    name = next(iter(state["model"]))
    state["model"][name] = change(state["model"][name])
    torch.save(state, path)
    with pytest.raises(UserError, match=f"{name.removeprefix('backbone.')} {problem}"):
        build_backbone("convnet", 8, weights_path=str(path))


def entry(name, value):
    return lambda state: state.update({name: value})


def in_entry(name, **values):
    return lambda state: state[name].update(values)


FORGED = {
    "step of a word": entry("step", "3"),
    "step beyond": entry("step", 10**9),
    "step below": entry("step", -1),
    "half a step": entry("step", 2.0),
    "no best": entry("best", {}),
    "best of a word": in_entry("best", valid_accuracy="high"),
    "best above 1": in_entry("best", valid_accuracy=7.0),
    "best without hash": lambda state: state["best"].pop("hash"),
    "window of words": in_entry("window", loss="low"),
    "window to come": in_entry("window", start=99),
    "window without a sum": lambda state: state["window"].pop("hits"),
    "other tasks": in_entry("history", total=torch.zeros(9)),
    "history of words": in_entry("history", count="many"),
    "skipped word": entry("skipped", "none"),
    "reported number": entry("reported", 5),
    "seconds": entry("seconds", "long"),
    "random state": entry("random", []),
    "another rate": lambda state: state["lower_optimizer"]["param_groups"][0].update(lr=9.0),
    "other moments": lambda state: state["lower_optimizer"]["state"][0].update(
        exp_avg=torch.zeros(3)
    ),
    "no moments": lambda state: state["upper_optimizer"]["state"][0].clear(),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_checkpoint_is_refused_and_nothing_is_cut(sound, run_copy, case):
    """Its hash is right, and it is not what the run wrote."""
    run, go_on = run_copy()
    newest = max(run.glob("step-*.pt"))
    saved = torch.load(newest, weights_only=True)
    FORGED[case](saved["state"])
    newest.unlink()
    content = record_module._saved(saved)
    (run / f"step-00000099.{record_module._hash(content)}.pt").write_bytes(content)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match="its last checkpoint does not fit the run"):
        go_on()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


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
        ("config.json", b'{"config": {"method": "none"}}', "config.json: --method none is unknown"),
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
        content["config"] |= {"cache": "on", "cache_dir": str(tmp_path / "elsewhere")}
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


# --------------------------------------------------------------------------------------------------
# The cache of images
# --------------------------------------------------------------------------------------------------


def header(shape, dtype=None):
    """The start of a .npy file of ``shape``, whatever it then holds."""
    file = io.BytesIO()
    described = np.lib.format.dtype_to_descr(INDEX) if dtype is None else dtype
    content = {"descr": described, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, content)
    return file.getvalue()


def with_sizes(height, width):
    """A change of the index: the size of its first image."""

    def change(data):
        start = len(header((24,)))
        return data[:start] + np.array([height, width], "<i4").tobytes() + data[start + 8 :]

    return change


@few
@given(change=damage())
@example(change=lambda data: header((10**15,)))
@example(change=lambda data: header((-1,)) + data[128:])
@example(change=lambda data: header(()))
@example(change=lambda data: header((1,), "|O") + b"cos\nsystem\n")
@example(change=lambda data: data.replace(b"'shape': (", b"'shape': ((("))
@example(change=with_sizes(-1, -1))
@example(change=with_sizes(2**31 - 1, 2**31 - 1))
@example(change=with_sizes(0, 7))
def test_image_caches(sound, change):
    split = load_split(sound / "split")
    images = open_cache(split, 16, sound / "cache", 0)
    whole = images.path.read_bytes()
    images.path.write_bytes(change(whole))
    again = open_cache(split, 16, sound / "cache", 0)
    assert again.shapes == images.shapes
    images.path.write_bytes(whole)


# --------------------------------------------------------------------------------------------------
# What is no file
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_refused_at_once(sound, tmp_path, kind):
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    data, split, run = tmp_path / "data", tmp_path / "split", tmp_path / "run"
    shutil.copytree(sound / "data", data)
    shutil.copytree(sound / "split", split)
    shutil.copytree(sound / "record/full/run", run)
    annotations = (*cub.REQUIRED_FILES, cub.ATTRIBUTES)
    reads = [(data / name, lambda: cub.read_annotations(data)) for name in annotations]
    reads += [
        (split / name, lambda: load_split(split, sound / "data"))
        for name in (INFO_FILE, *SPLIT_FILES)
    ]
    reads += [
        (path, lambda: build_backbone("convnet", 8, weights_path=str(path))),
        *((run / name, lambda: read_run(run)) for name in ("config.json", "summary.json")),
        *((run / name, lambda: read_run(run)) for name in ("metrics.jsonl", "schedule.jsonl")),
        (run / "best.pt", lambda: evaluate_run(read_run(run))),
    ]
    for file, read in reads:
        if file != path:
            sound_file = file.rename(tmp_path / "aside")
            file.symlink_to(path)
        with pytest.raises(UserError, match=f"{file.name}"):
            read()
        if file != path:
            sound_file.replace(file)


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "schedule.jsonl"])
def test_a_pipe_in_place_of_what_a_run_appends_to(run_copy, name):
    run, go_on = run_copy()
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(
        (UserError, RunError), match="No such device|not a regular|Invalid argument"
    ):
        go_on()


def test_a_pipe_or_a_link_in_place_of_a_cache_s_lock(sound, tmp_path):
    split = load_split(sound / "split")
    lock = tmp_path / ".lock"
    os.mkfifo(lock)
    with pytest.raises(UserError, match="no image cache can be written to"):
        open_cache(split, 16, tmp_path, 0)
    lock.unlink()
    (tmp_path / "mine").write_text("not the cache's")
    lock.symlink_to("mine")
    open_cache(split, 16, tmp_path, 0)
    assert (tmp_path / "mine").read_text() == "not the cache's"


def test_what_cannot_be_a_checkpoint_is_passed_over(sound, run_copy, capsys):
    run, go_on = run_copy()
    (run / "step-00000098.0123456789abcdef.pt").mkdir()
    (run / "step-00000099.0123456789abcdef.pt").symlink_to("nowhere")
    (run / "notes.jsonl").write_text("not the run's")
    go_on()
    assert "step-00000099.0123456789abcdef.pt cannot be read (No such" in capsys.readouterr().err
    assert (run / "summary.json").exists()
    assert (run / "notes.jsonl").read_text() == "not the run's"


def test_a_best_checkpoint_that_is_gone(run_copy):
    run, go_on = run_copy()
    (run / "best.pt").unlink()
    with pytest.raises(RunError, match="best.pt is not the checkpoint that this run wrote.*put it"):
        go_on()


def test_a_path_that_cannot_be_looked_at_and_signs_that_cannot_be_shown(command):
    def main():
        Path("x" * 5000).stat()

    code, _, err = command(main)
    assert (code, err) == (2, f"error: {'x' * 5000}: File name too long\n")

    def shown():
        raise UserError("image \x1b[31m\u202e.png:\nno")

    code, _, err = command(shown)
    assert (code, err) == (2, "error: image \\x1b[31m\\u202e.png: no\n")
