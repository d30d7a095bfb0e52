"""Broken and malicious files: one of the project's own errors, no other, and nothing written.

Every file that is read is overwritten with random bytes, cut, changed in one place or replaced by
valid content of another meaning. The only outcomes are that it is fine all the same, a
``UserError`` or a ``RunError``.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from auxilearn import record as record_module
from auxilearn.config import Config, resolve
from auxilearn.data import cub
from auxilearn.errors import RunError, UserError
from auxilearn.models import build_backbone
from auxilearn.trainer import Trainer, train
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
        cub.write_split(folder, annotations)
    except UserError:
        assert not listing(folder)
    finally:
        path.unlink()


@pytest.mark.parametrize("name", [cub.INFO_FILE, *cub.SPLIT_FILES])
@few
@given(change=damage())
@example(change=lambda data: DEEP)
@example(change=lambda data: LONG_NUMBER)
@example(change=lambda data: data.replace(b"images", b"im\\u0000ges"))
@example(change=lambda data: data.replace(b"Bird", b"\\ud800"))
def test_split_files(sound, damaged, name, change):
    def use():
        split = cub.load_split(sound / "split")
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
