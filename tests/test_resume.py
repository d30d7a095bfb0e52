"""A run that is killed and continued ends as one that was left alone: the same bits."""

import io
import os
import signal

import pytest
import torch
from auxilearn.run.signals import EXIT_CODES, StopRequest
from auxilearn.trainer import train

from auxilearn import trainer as trainer_module
from auxilearn.errors import Interrupted, UserError
from auxilearn.methods import METHODS
from auxilearn.run import record as record_module
from auxilearn.run.config import Config
from auxilearn.run.record import RunRecord
from tests import kill_storm


@pytest.fixture(scope="module")
def split_dir(tmp_path_factory):
    from auxilearn.data import cub
    from auxilearn.data.split import write_split
    from tests.cub_shape import write_cub_shape

    folder = tmp_path_factory.mktemp("resume")
    root = write_cub_shape(folder / "data", classes=3, train_per_class=6, test_per_class=4)
    write_split(folder / "split", cub.read_annotations(root))
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


def assert_same_run(run, other):
    assert not kill_storm.differences(run, other)


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


@pytest.mark.parametrize(
    ("method", "save_every", "optimizer"),
    [(m, save_every, "adam") for m in METHODS for save_every in (0, 1)]
    + [("joint_stable", 1, "sgd")],
)
def test_killed_and_resumed_equals_undisturbed(
    split_dir, tmp_path, monkeypatch, method, save_every, optimizer
):
    changes = {"method": method, "save_every": save_every, "labeled_per_class": 2}
    changes["main_optimizer"] = optimizer
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
def test_kill_storm(tmp_path, workers):
    """Real SIGKILLs at random moments of a real process."""
    kill_storm.prepare(tmp_path)
    where, found = kill_storm.storm(
        tmp_path, "joint", 3, workers, epochs=20, seed=workers, margin=60
    )
    assert sum(where.values()) == 3
    assert not found


def with_another_weight(content):
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    next(iter(checkpoint["model"].values())).add_(1)
    return record_module._saved(checkpoint)


def test_the_comparison_after_a_kill_storm_sees_every_difference(split_dir, tmp_path):
    for name in ("one", "other"):
        train(config(split_dir, tmp_path / name))
    one, other = (tmp_path / name / "full/run" for name in ("one", "other"))
    assert kill_storm.differences(one, other) == []
    for name, changed, part in [
        ("metrics.jsonl", lambda c: c.replace(b'"step": 2,', b'"step": 3,'), "metrics.jsonl: "),
        ("schedule.jsonl", lambda c: c[: c.rindex(b"\n", 0, -1) + 1], "another number of rows"),
        ("summary.json", lambda c: c.replace(b'"best_epoch"', b'"worst_epoch"'), "summary.json: "),
        ("best.pt", with_another_weight, "best.pt: "),
    ]:
        original = (one / name).read_bytes()
        (one / name).write_bytes(changed(original))
        assert any(part in said for said in kill_storm.differences(one, other)), name
        (one / name).write_bytes(original)
    for path in sorted(one.glob("step-*.pt"))[1:]:
        path.unlink()
    assert "the last checkpoint: step" in kill_storm.differences(one, other)


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
    assert len(list(run.glob("step-*.pt"))) == 2
    assert_same_run(run, tmp_path / "undisturbed/full/run")


def test_a_checkpoint_that_is_not_used_takes_no_place_of_a_good_one(tmp_path):
    """A run that had to start over, and is killed again, goes on from its own checkpoints."""
    for step in (6, 7):
        (tmp_path / f"step-{step:08d}.0123456789abcdef.pt").write_bytes(b"damaged")
    record = RunRecord(tmp_path, {"config": {}, "data": {"fingerprint": ""}}, resume=True)
    assert record.load_checkpoint() is None
    for step in (1, 2, 3):
        record.save_checkpoint(step, {"step": step})
    assert record.load_checkpoint() == {"step": 3}
    assert [path.name[:13] for path in sorted(tmp_path.glob("step-*.pt"))] == [
        "step-00000002",
        "step-00000003",
    ]
    record.close()


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
