"""Shared by all tests."""

import json
from pathlib import Path

import pytest
import torch

import train_bilevel
from auxilearn import methods
from auxilearn.backbones import BACKBONES
from auxilearn.data import cub
from auxilearn.data.split import write_split
from auxilearn.errors import run_script
from auxilearn.methods import METHODS
from auxilearn.run.config import Config
from tests.cub_shape import write_cub_shape

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")

# Tiny tensors: a second thread costs more than it brings, and far more on a busy machine.
torch.set_num_threads(1)

# A run of a second: 4 classes with 4 training images beside the development image, 4 attributes.
TINY = {
    "backbone": "convnet",
    "feature_dim": 8,
    "image_size": 16,
    "epochs": 2,
    "train_batch_size": 6,
    "dev_batch_size": 3,
    "dev_epochs": 1,
    "hyperstep": 2,
    "warmup_epochs": 0,
    "neumann_terms": 1,
    "num_workers": 0,
    "cache_dir": "none",
    "device": "cpu",
}


class Run:
    """What a training run left in its folder."""

    def __init__(self, directory):
        self.directory = Path(directory)

    def read(self, name):
        return json.loads((self.directory / name).read_text(), parse_constant=_refuse)

    @property
    def summary(self):
        return self.read("summary.json")

    @property
    def rows(self):
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line, parse_constant=_refuse) for line in lines]

    def rows_of(self, kind):
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def timeless_rows(self):
        """The rows without what depends on how busy the machine is."""
        return [
            {name: value for name, value in row.items() if not name.endswith("seconds")}
            for row in self.rows
        ]

    @property
    def checkpoint(self):
        return torch.load(self.directory / "best.pt", weights_only=True)


def _refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def assert_same_run(one, other):
    """Bit for bit the same metrics and the same best checkpoint."""
    assert one.timeless_rows == other.timeless_rows
    for part in ("model", "scheduler"):
        first, second = one.checkpoint[part], other.checkpoint[part]
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert same_bits(value, second[name]), name
    for name in ("epoch", "step", "valid_accuracy"):
        assert one.checkpoint[name] == other.checkpoint[name]
    assert one.summary["test_accuracy"] == other.summary["test_accuracy"]


def same_bits(one, other):
    """Whether tensors, numbers, and dictionaries and lists of them are the same bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[n], other[n]) for n in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return one == other


def prepare(root, split_dir, **shape):
    """Write a CUB-shaped folder and divide it. Returns the split's folder."""
    write_cub_shape(root, **shape)
    write_split(split_dir, cub.read_annotations(root))
    return split_dir


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Where no --device is given, it is the CPU on every machine: there runs repeat to the bit."""
    if gpu.mark not in request.node.iter_markers():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def tiny_split(tmp_path_factory):
    """Folder of the split of a tiny data set, ``data`` beside it. Shared: not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    shape = {"classes": 4, "train_per_class": 5, "attributes": 4, "image_size": (24, 20)}
    return prepare(folder / "data", folder / "split", **shape)


@pytest.fixture
def counted(monkeypatch):
    """``counted(function)``: a list that grows with every use of an autograd Function."""

    def count(function):
        calls, original = [], function.apply
        monkeypatch.setattr(function, "apply", lambda *args: calls.append(1) or original(*args))
        return calls

    return count


@pytest.fixture
def float64():
    """Double precision by default, and the global generator seeded."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny_config(tiny_split, tmp_path):
    """``tiny_config(**changes)``: the configuration of a run of a second."""

    def make(**changes):
        places = {"split_dir": str(tiny_split), "record_dir": str(tmp_path / "record")}
        return Config(**{**TINY, **places, **changes})

    return make


@pytest.fixture
def tiny_run(tiny_config):
    """``tiny_run(**changes)`` trains and returns the ``Run``."""

    def run(**changes):
        config = tiny_config(**changes)
        summary = train_bilevel.train(config)
        return Run(Path(config.record_dir) / config.setting / summary["exp_name"])

    return run


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """``plugin(text)``: the path of a file of this text, for --plugin.

    What an earlier text registered is forgotten, as in a new process; so it is after the test.
    """
    before = [(table, dict(table)) for table in (METHODS, BACKBONES)]
    path = tmp_path / "plugin.py"

    def write(text):
        monkeypatch.setattr(methods, "_loaded", set())
        for table, entries in before:
            table.clear()
            table.update(entries)
        path.write_text(text)
        return path

    yield write
    write("")


@pytest.fixture
def log_every(monkeypatch):
    """``log_every(n)``: from then on runs write the row of a step after every ``n`` steps."""
    return lambda steps: monkeypatch.setattr(train_bilevel, "LOG_EVERY", steps)


@pytest.fixture
def command(monkeypatch, capfd):
    """``command(main, *arguments)`` runs a script's ``main`` as the script does, in this process.

    Returns (exit code, stdout, stderr).
    """

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["script.py", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            run_script(main)
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def no_charts(monkeypatch):
    """Charts of reports take seconds; most tests are not about them."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("auxilearn.report.figures.CHARTS", ())


def tiny_flags(**changes):
    """The settings of a tiny run as flags of train_bilevel.py."""
    settings = {**TINY, **changes}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def assert_one_error_line(stderr, *parts):
    """One line, starting with 'error:', that has all ``parts``."""
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    for part in parts:
        assert str(part) in stderr
