"""A run that is killed and continued ends as one that was left alone: the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from auxilearn import trainer as trainer_module
from auxilearn.config import Config
from auxilearn.errors import Interrupted, UserError
from auxilearn.methods import METHODS
from auxilearn.record import RunRecord
from auxilearn.signals import EXIT_CODES, StopRequest
from auxilearn.trainer import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def split_dir(tmp_path_factory):
    from auxilearn.data import cub
    from tests.cub_shape import write_cub_shape

    folder = tmp_path_factory.mktemp("resume")
    root = write_cub_shape(folder / "data", classes=3, train_per_class=6, test_per_class=4)
    cub.write_split(folder / "split", cub.read_annotations(root))
    return folder / "split"


def config(split_dir, record_dir, **changes):
    settings = {
        "split_dir": str(split_dir),
        "record_dir": str(record_dir),
        "exp_name": "run",
        "backbone": "convnet",
        "in_dim": 8,
        "image_size": 16,
        "train_batch_size": 4,
        "aux_batch_size": 2,
        "hyperstep": 2,
        "warmup_epochs": 0,
        "dev_epochs": 2,
        "epochs": 3,
        "log_every": 3,
        "num_workers": 0,
        "cache": "off",
    }
    return Config(**(settings | changes))


def rows(run, name="metrics.jsonl"):
    """The rows of a file without what only a clock determines."""
    lines = (run / name).read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines
    ]


def assert_same_run(run, other):
    assert rows(run) == rows(other)
    if (run / "schedule.jsonl").exists():
        assert rows(run, "schedule.jsonl") == rows(other, "schedule.jsonl")
    ours, theirs = (json.loads((r / "summary.json").read_text()) for r in (run, other))
    assert {k: v for k, v in ours.items() if k != "seconds"} == {
        k: v for k, v in theirs.items() if k != "seconds"
    }
    ours, theirs = (torch.load(r / "best.pt", weights_only=True) for r in (run, other))
    for part in ("model", "scheduler"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items())


class Killed(BaseException):
    """What SIGKILL is to the code it hits: nothing below it runs on."""


def kill_at(monkeypatch, owner, name, call):
    """``owner.name`` dies at its ``call``-th call, half-way through."""
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("save_every", [0, 1])
def test_killed_and_resumed_equals_undisturbed(
    split_dir, tmp_path, monkeypatch, method, save_every
):
    changes = {"method": method, "save_every": save_every, "labeled_per_class": 2}
    train(config(split_dir, tmp_path / "undisturbed", **changes))
    deaths = [
        (trainer_module.Trainer, "_lower_step", 5),
        (trainer_module.Trainer, "_finish_epoch", 1),
        (os, "replace", 3),  # inside the writing of a checkpoint
        (trainer_module.Trainer, "_finish", 1),
    ]
    if METHODS[method].bilevel:
        deaths.insert(1, (trainer_module, "apply_hypergradient", 1))
    for death in deaths:
        with monkeypatch.context() as patch:
            kill_at(patch, *death)
            with pytest.raises(Killed):
                train(config(split_dir, tmp_path / "killed", resume=True, **changes))
    train(config(split_dir, tmp_path / "killed", resume=True, **changes))
    assert_same_run(tmp_path / "killed/semi/run", tmp_path / "undisturbed/semi/run")


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_storm(split_dir, tmp_path, workers):
    """Real SIGKILLs at random moments of a real process."""
    flags = {"epochs": 4, "save_every": 1, "num_workers": workers}
    train(config(split_dir, tmp_path / "undisturbed", **flags))
    command = [sys.executable, str(ROOT / "train_bilevel.py"), "--resume", "1"]
    settings = vars(config(split_dir, tmp_path / "killed", **flags))
    given = vars(Config())
    for name, value in settings.items():
        if value != given[name]:
            command += [f"--{name}", str(value)]
    generator = random.Random(workers)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "killed/full/run"
    for _ in range(3):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        before = len((run / "metrics.jsonl").read_text().splitlines())
        target = before + generator.randint(1, 4)
        while process.poll() is None and time.monotonic() < deadline:
            if len((run / "metrics.jsonl").read_text().splitlines()) >= target:
                break
            time.sleep(0.005)
        time.sleep(generator.random() * 0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert_same_run(run, tmp_path / "undisturbed/full/run")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
)
def test_a_signal_ends_after_the_step_with_a_checkpoint(
    split_dir, tmp_path, monkeypatch, number, code
):
    original = trainer_module.Trainer._lower_step

    def signalled(self, step, *args):
        if step == 3:
            os.kill(os.getpid(), number)
        original(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_lower_step", signalled)
        with pytest.raises(Interrupted, match="stopped after step 3 of 12.*--resume 1") as caught:
            train(config(split_dir, tmp_path))
    assert caught.value.code == code
    (checkpoint,) = (tmp_path / "full/run").glob("step-*.pt")
    assert checkpoint.name.startswith("step-00000003.")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_handlers_are_put_back_though_that_of_another_signal_raises(monkeypatch):
    """A dead worker's SIGCHLD may come when the run has ended, and be raised by signal.signal."""
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    original, raised = signal.signal, []

    def interrupted(number, handler):
        if number == signal.SIGTERM and not raised:
            raised.append(number)
            raise RuntimeError("a worker is killed")
        return original(number, handler)

    with pytest.raises(RuntimeError, match="a worker is killed"), StopRequest():
        assert all(signal.getsignal(number) != before[number] for number in before)
        monkeypatch.setattr(signal, "signal", interrupted)
    assert {number: signal.getsignal(number) for number in EXIT_CODES} == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(split_dir, tmp_path, capsys):
    flags = {"save_every": 1, "max_steps": 6}
    train(config(split_dir, tmp_path / "undisturbed", **flags))
    train(config(split_dir, tmp_path / "damaged", **flags))
    run = tmp_path / "damaged/full/run"
    older, newer = sorted(run.glob("step-*.pt"))
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    (run / "summary.json").unlink()
    capsys.readouterr()
    train(config(split_dir, tmp_path / "damaged", resume=True, **flags))
    output = capsys.readouterr()
    assert f"{newer} is damaged" in output.err
    assert "continuing after step 5" in output.out
    assert_same_run(run, tmp_path / "undisturbed/full/run")


def test_all_checkpoints_damaged_starts_over(split_dir, tmp_path):
    flags = {"max_steps": 6}
    train(config(split_dir, tmp_path / "undisturbed", **flags))
    train(config(split_dir, tmp_path / "damaged", **flags))
    run = tmp_path / "damaged/full/run"
    for path in run.glob("step-*.pt"):
        path.write_bytes(b"")
    (run / "summary.json").unlink()
    train(config(split_dir, tmp_path / "damaged", resume=True, **flags))
    assert_same_run(run, tmp_path / "undisturbed/full/run")


def test_two_checkpoints_are_kept(split_dir, tmp_path):
    train(config(split_dir, tmp_path, save_every=1))
    names = sorted(p.name.split(".")[0] for p in (tmp_path / "full/run").glob("step-*.pt"))
    assert names == ["step-00000011", "step-00000012"]


def test_another_configuration_is_refused_with_the_differences(split_dir, tmp_path):
    train(config(split_dir, tmp_path))
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "full/run").iterdir())
    with pytest.raises(UserError, match="main_lr was 0.0001 and is 0.1; .*hyperstep was 2 and"):
        train(config(split_dir, tmp_path, resume=True, main_lr=0.1, hyperstep=3))
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "full/run").iterdir())


def test_a_finished_run_is_not_trained_again(split_dir, tmp_path, capsys):
    summary = train(config(split_dir, tmp_path))
    capsys.readouterr()
    assert train(config(split_dir, tmp_path, resume=True)) == summary
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"test accuracy: {summary['test_accuracy']:.4f}"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_name": None, "resume": True}, "--resume 1 needs the --exp_name"),
        ({"overwrite": True, "resume": True}, "choose one"),
        ({"save_every": -1}, "--save_every must be at least 0"),
    ],
)
def test_bad_settings(split_dir, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(config(split_dir, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_never_executes_code(split_dir, tmp_path):
    """A pickle that would run a command is refused, although its checksum is right."""
    train(config(split_dir, tmp_path, max_steps=2))
    run = tmp_path / "full/run"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    record = RunRecord.__new__(RunRecord)
    record.directory = run
    for path in run.glob("step-*.pt"):
        path.unlink()
    record.save_checkpoint(9, Evil())
    (run / "summary.json").unlink()
    with pytest.raises(Exception, match="(?i)weights.only"):
        train(config(split_dir, tmp_path, max_steps=2, resume=True))
    assert not (tmp_path / "executed").exists()
