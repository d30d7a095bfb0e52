"""A run that is killed and continued ends as one that was left alone: the same bits."""

import io
import os
import signal
from pathlib import Path

import pytest
import torch

import auxilearn.bilevel
import train_bilevel
from auxilearn.errors import Interrupted, UserError
from auxilearn.methods import METHODS
from auxilearn.run import record as record_module
from auxilearn.run.processes import Ranks
from auxilearn.run.progress import Progress
from auxilearn.run.record import RunRecord
from auxilearn.run.state import State
from tests import kill_storm
from tests.conftest import Run, assert_one_error_line, tiny_flags


@pytest.fixture
def run(tiny_config, tmp_path):
    """``run(folder, **changes)``: the folder of the run called "run" that it trains in there."""

    def train(folder, **changes):
        settings = {"exp_name": "run", "dev_epochs": 2, "record_dir": str(tmp_path / folder)}
        config = tiny_config(**settings, **changes)
        train_bilevel.train(config)
        return Path(config.record_dir) / config.setting / "run"

    return train


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
    [
        *((method, 1, "adam") for method in METHODS if method not in ("single", "common")),
        ("joint", 0, "adam"),
        ("joint_stable", 0, "sgd"),
    ],
)
def test_killed_and_resumed_equals_undisturbed(run, monkeypatch, method, save_every, optimizer):
    changes = {"method": method, "save_every": save_every, "labeled_per_class": 2}
    changes["main_optimizer"] = optimizer
    undisturbed = run("undisturbed", **changes)
    deaths = [
        (train_bilevel, "lower_step", 5),
        (train_bilevel, "validate", 1),
        (os, "replace", 2),  # inside the writing of a checkpoint
        (State, "finish", 1),
    ]
    if METHODS[method].bilevel:
        deaths.insert(1, (auxilearn.bilevel, "apply_hypergradient", 1))
    if METHODS[method].fine_tuned:
        deaths[-1:-1] = [(Progress, "start_fine_tuning", 1), (train_bilevel, "lower_step", 2)]
    for death in deaths:
        with monkeypatch.context() as patch:
            kill_at(patch, *death)
            with pytest.raises(Killed):
                run("killed", resume=True, **changes)
    assert_same_run(run("killed", resume=True, **changes), undisturbed)


def test_kill_storm(tmp_path):
    """Real SIGKILLs at random moments of a real process."""
    kill_storm.prepare(tmp_path)
    where, found = kill_storm.storm(tmp_path, "joint", 2, workers=1, epochs=6, margin=16)
    assert sum(where.values()) == 2
    assert not found


def with_another_weight(content):
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    next(iter(checkpoint["model"].values())).add_(1)
    return record_module._saved(checkpoint)


def test_the_comparison_after_a_kill_storm_sees_every_difference(run):
    one, other = run("one", method="joint"), run("other", method="joint")
    assert kill_storm.differences(one, other) == []
    for name, changed, part in [
        ("metrics.jsonl", lambda c: c.replace(b'"step": 2,', b'"step": 3,'), "metrics.jsonl: "),
        ("schedule.jsonl", lambda c: c[: c.rindex(b"\n", 0, -1) + 1], "another number of rows"),
        ("summary.json", lambda c: c.replace(b'"best_epoch"', b'"worst_epoch"'), "summary.json: "),
        ("best.pt", with_another_weight, "best.pt: "),
        ("margins.npy", lambda c: c[:-1] + b"\x7f", "margins.npy"),
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
def test_a_signal_ends_after_the_step_with_a_checkpoint(run, tmp_path, monkeypatch, number, code):
    original = train_bilevel.lower_step

    def signalled(run, state, step, *args):
        if step == 2:
            os.kill(os.getpid(), number)
        original(run, state, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_bilevel, "lower_step", signalled)
        with pytest.raises(Interrupted, match="stopped after step 2 of 6.*--resume 1") as caught:
            run("record")
    assert caught.value.code == code
    (checkpoint,) = (tmp_path / "record/full/run").glob("step-*.pt")
    assert checkpoint.name.startswith("step-00000002.")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run, capsys):
    undisturbed, damaged = run("undisturbed", save_every=1), run("damaged", save_every=1)
    older, newer = sorted(damaged.glob("step-*.pt"))
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    (damaged / "summary.json").unlink()
    capsys.readouterr()
    run("damaged", resume=True, save_every=1)
    output = capsys.readouterr()
    assert f"{newer} is damaged" in output.err
    assert "continuing after step 5" in output.out
    assert_same_run(damaged, undisturbed)


def test_all_checkpoints_damaged_starts_over(run):
    undisturbed, damaged = run("undisturbed"), run("damaged")
    for path in damaged.glob("step-*.pt"):
        path.write_bytes(b"")
    (damaged / "summary.json").unlink()
    run("damaged", resume=True)
    assert len(list(damaged.glob("step-*.pt"))) == 2
    assert_same_run(damaged, undisturbed)


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


def test_two_checkpoints_are_kept(run):
    names = sorted(path.name.split(".")[0] for path in run("run", save_every=1).glob("step-*.pt"))
    assert names == ["step-00000005", "step-00000006"]


def test_another_configuration_is_refused_with_the_differences(run):
    folder = run("run", method="task")
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.iterdir())
    changes = {"main_lr": 0.1, "hyperstep": 3, "options": {"hidden_sizes": (3, 4)}}
    with pytest.raises(
        UserError,
        match=r"main_lr was 0.001 and is 0.1; .*hyperstep was 2 and is 3; .*options was {'hidden"
        ".*; give the settings that it had, or another --exp_name",
    ):
        run("run", method="task", resume=True, **changes)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in folder.iterdir())


def test_what_no_result_depends_on_may_change(run, tmp_path):
    one = run("one", save_every=1)
    (one / "summary.json").unlink()
    run("one", resume=True, save_every=2, cache_dir=str(tmp_path / "cache"), num_workers=1)
    assert_same_run(one, run("other"))


def test_a_finished_run_is_not_trained_again(run, capsys):
    folder = run("run")
    before = Run(folder).summary
    capsys.readouterr()
    run("run", resume=True)
    assert Run(folder).summary == before
    assert capsys.readouterr().out.splitlines() == [
        f"{folder} was finished before",
        f"test accuracy: {before['test_accuracy']:.4f}",
    ]


def test_a_checkpoint_never_executes_code(run, tmp_path):
    """A pickle that would run a command is refused, although its checksum is right."""
    folder = run("run", max_steps=2)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    content = record_module._saved({"state": Evil(), "sizes": {}})
    (folder / f"step-00000009.{record_module._hash(content)}.pt").write_bytes(content)
    (folder / "summary.json").unlink()
    with pytest.raises(Exception, match="(?i)weights.only"):
        run("run", max_steps=2, resume=True)
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------------------
# A method of one's own
# --------------------------------------------------------------------------------------------------

PLUGIN = """
import torch
from auxilearn import HyperNet, register

class Drift(HyperNet):
    # A weight per task, moved by what the development images look like.

    needs_dev = True

    def __init__(self, tasks, rate):
        super().__init__(0, tasks)
        self.logits = torch.nn.Parameter(torch.zeros(tasks))
        self.rate, self.seen, self.batches = rate, 0.0, []

    def before_lower_step(self, model, batch, dev_batches, average):
        own = torch.stack([dev.inputs.float().mean() for dev in dev_batches]).mean()
        (own,) = average([own], dev_batches)
        self.seen += self.rate * (own.item() / 255 - self.seen)
        self.batches = [len(dev.inputs) for dev in dev_batches]

    def scheduled_loss(self, losses, seen):
        return (losses * torch.nn.functional.softplus(self.logits + self.seen)).mean(0).sum()

    def get_extra_state(self):
        return {"seen": self.seen, "batches": self.batches}

    def set_extra_state(self, state):
        self.seen, self.batches = state["seen"], state["batches"]

@register("drift", title="Drift", learned="upper", defaults={"upper_lr": 0.1})
def build(problem, rate=0.5):
    return Drift(problem.tasks, rate)
"""


def test_a_method_of_one_s_own(plugin, tiny_split, tmp_path, command, monkeypatch):
    """From the command line: it trains, looks at development batches, and resumes exactly."""
    path = plugin(PLUGIN)

    def run(folder, *flags):
        places = {"split_dir": tiny_split, "record_dir": tmp_path / folder, "method": "drift"}
        flags = [*tiny_flags(**places), *flags, "--plugin", path, "--option", "rate=0.25"]
        flags += ["--exp_name", "run", "--save_every", 1, "--n_meta_loss_accum", 2]
        return command(train_bilevel.main, *flags)

    assert run("undisturbed")[::2] == (0, "")
    undisturbed = Run(tmp_path / "undisturbed/full/run")
    assert undisturbed.read("config.json")["config"]["options"] == {"rate": 0.25}
    assert undisturbed.summary["method"] == "drift"
    assert len(undisturbed.rows_of("upper")) == 3
    assert undisturbed.checkpoint["scheduler"]["logits"].abs().min() > 0
    state = undisturbed.checkpoint["scheduler"]["_extra_state"]
    assert state["seen"] > 0 and len(state["batches"]) == 2

    for death in [(train_bilevel, "lower_step", 3), (train_bilevel, "upper_step", 1)]:
        with monkeypatch.context() as patch:
            kill_at(patch, *death)
            with pytest.raises(Killed):
                run("killed", "--resume")
    killed = tmp_path / "killed/full/run"
    with monkeypatch.context() as patch:
        kill_at(patch, train_bilevel, "lower_step", 2)
        with pytest.raises(Killed):
            run("killed", "--resume")
    plugin(PLUGIN + "# another\n")
    code, _, err = run("killed", "--resume")
    assert code == 2
    assert_one_error_line(err, killed, "the content of --plugin has changed")
    plugin(PLUGIN)
    code, out, err = run("killed", "--resume")
    assert (code, err) == (0, "")
    assert "continuing after step" in out
    assert_same_run(killed, undisturbed.directory)


def test_a_scheduler_gets_the_development_batches_that_it_needs(plugin, tiny_run, tiny_split):
    path = plugin(PLUGIN.replace('learned="upper"', "learned=None"))
    with pytest.raises(UserError, match="method"):
        tiny_run(method="drift")
    train_bilevel.parse(["--plugin", str(path)])
    run = tiny_run(method="drift", dev_batch_size=3, epochs=1, n_meta_loss_accum=2)
    assert run.checkpoint["scheduler"]["_extra_state"]["batches"] == [3, 1]  # of 4 images
    assert run.rows_of("upper") == []


def test_another_number_of_processes_is_refused(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "gathered", lambda self, value: [value, value])  # as of two
        kill_at(patch, train_bilevel, "validate", 2)
        with pytest.raises(Killed):
            run("two", method="common", save_every=1)
    with pytest.raises(UserError, match="by 2 processes, not by 1: .*--nproc_per_node 2"):
        run("two", method="common", save_every=1, resume=True)
