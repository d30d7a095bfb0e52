"""Runs as Slurm jobs, on a real Slurm where there is one: requeued, preempted, failing, left."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import reproduce_tables
from auxilearn.errors import Interrupted, UserError
from auxilearn.files import read_json, write_json
from auxilearn.run.config import Config
from auxilearn.tables import slurm
from auxilearn.tables.slurm import Outcome, TrainingRun, launch
from tests.conftest import TINY, Run, assert_same_run, tiny_flags
from train_bilevel import train

SCRIPT = Path(__file__).parent / "slurm/start_slurm.sh"


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def job(folder, name, *argv, **changes):
    flags = tiny_flags(exp_name=name, record_dir=folder / "record", resume=1, **changes)
    return SimpleNamespace(name=name, argv=[*flags, *argv], log=folder / f"{name}.log")


# --- on a real Slurm --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started_slurm(tmp_path_factory):
    """Folder of a Slurm that runs while this module's tests do."""
    pytest.importorskip("submitit", reason="needs submitit: pip install -r requirements-tables.txt")
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if not shutil.which(program, path=path):
            pytest.skip(f"needs Slurm ({program}): apt-get install slurm-wlm munge")
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this machine has a Slurm of its own (/etc/slurm/slurm.conf): not to be used")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run(["sh", SCRIPT, "start", folder], check=True)
        yield folder
    finally:
        subprocess.run(["sh", SCRIPT, "stop", folder], check=True)


@pytest.fixture
def cluster(started_slurm, monkeypatch):
    """Runs a command of Slurm and returns its output."""
    monkeypatch.setenv("SLURM_CONF", str(started_slurm / "slurm.conf"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*command):
        command = [str(part) for part in command]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    yield run
    run("scancel", "--user", str(os.getuid()))
    wait_until(lambda: not run("squeue", "--noheader"))


def undisturbed(tiny_split, tmp_path, **changes):
    """The same run without Slurm."""
    places = {"split_dir": str(tiny_split), "record_dir": str(tmp_path / "undisturbed")}
    config = Config(**{**TINY, **places, "exp_name": "run", **changes})
    train(config)
    return Run(tmp_path / "undisturbed" / config.setting / "run")


def task_of(cluster, index):
    """Id of a task of the newest array."""
    tasks = cluster("squeue", "--noheader", "--array", "--format=%i", "--sort=-i").splitlines()
    (task,) = [t for t in tasks if t.endswith(f"_{index}")]
    return task


def test_an_array_of_runs_is_that_of_runs_without_slurm(cluster, tiny_split, tmp_path, monkeypatch):
    seeds = {"seed 1": {"seed": 1}, "seed 2": {"seed": 2, "corrupted": 1}}
    jobs = [job(tmp_path, name, split_dir=tiny_split, **changes) for name, changes in seeds.items()]
    jobs.insert(1, job(tmp_path, "bad", method="nonsense"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # runs take their folder from where the sweep was started
    jobs[2].argv[jobs[2].argv.index("--record_dir") + 1] = "here"
    outcomes = {j.name: outcome for j, outcome in launch(jobs, tmp_path / "a sweep", {}, poll_s=1)}
    assert outcomes == {
        "seed 1": Outcome(0),
        "bad": Outcome(2),
        "seed 2": Outcome(0),
    }
    assert "invalid choice: 'nonsense'" in jobs[1].log.read_text()
    ids = {path.name.split("_")[0] for path in (tmp_path / "a sweep/slurm").glob("*_result.pkl")}
    assert len(ids) == 1, "one array"
    for name, folder, setting in (
        ("seed 1", tmp_path / "record", "full"),
        ("seed 2", elsewhere / "here", "noisy"),
    ):
        changes = {**seeds[name], "exp_name": name}
        changes["corrupted"] = bool(changes.get("corrupted"))
        expected = undisturbed(tiny_split, tmp_path, **{**changes, "exp_name": "run"})
        run = Run(folder / setting / name)
        assert_same_run(run, expected)
        accuracy = f"test accuracy: {expected.summary['test_accuracy']:.4f}"
        assert accuracy in [j for j in jobs if j.name == name][0].log.read_text()


LONG = {"epochs": 50, "save_every": 10_000}  # 150 steps, a few seconds


@pytest.fixture(scope="module")
def long_run(tiny_split, tmp_path_factory):
    return undisturbed(tiny_split, tmp_path_factory.mktemp("long"), **LONG)


def in_the_middle(run):
    """Whether the run has begun, and is far from its end."""
    path = run.directory / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) > 3


def ending(tmp_path, jobs, **options):
    """Submit; returns a function that waits and returns the outcomes by name."""
    outcomes = launch(jobs, tmp_path / "sweep", options, poll_s=1)
    return lambda: {j.name: outcome for j, outcome in outcomes}


def assert_resumed(log, times=1):
    """The run stopped with a checkpoint, after a step that is not its last, and went on."""
    text = log.read_text()
    assert text.count("as asked; continue with") == times, text
    assert text.count("recording in") == times + 1, text


def test_requeued_in_the_middle(cluster, tiny_split, tmp_path, long_run):
    """By Slurm, with SIGTERM; and by submitit, after Slurm's warning of the time limit."""
    jobs = [job(tmp_path, name, split_dir=tiny_split, **LONG) for name in ("requeued", "warned")]
    runs = [Run(tmp_path / "record/full" / j.name) for j in jobs]
    outcomes = ending(tmp_path, jobs)
    wait_until(lambda: in_the_middle(runs[0]))
    cluster("scontrol", "requeue", task_of(cluster, 0))
    wait_until(lambda: in_the_middle(runs[1]))
    cluster("scancel", "--signal=USR2", task_of(cluster, 1))
    assert outcomes() == dict.fromkeys(("requeued", "warned"), Outcome(0))
    for j, run in zip(jobs, runs, strict=True):
        assert_resumed(j.log)
        assert_same_run(run, long_run)


def test_preempted(cluster, tiny_split, tmp_path, long_run):
    """Slurm sends two SIGTERMs at once; or one 20 seconds ahead, at the start of a grace time."""
    jobs = [job(tmp_path, name, split_dir=tiny_split, **LONG) for name in ("low", "grace")]
    runs = [Run(tmp_path / "record/full" / j.name) for j in jobs]
    waits = [ending(tmp_path / j.name, [j], partition=j.name) for j in jobs]
    wait_until(lambda: all(in_the_middle(run) for run in runs))
    urgent = ["sbatch", "--parsable", "--partition=high", "--ntasks=2", "--output=/dev/null"]
    urgent = cluster(*urgent, "--wrap=true")
    finished = ["squeue", "--noheader", "--states=COMPLETED", "--format=%i"]
    wait_until(lambda: urgent in cluster(*finished).split(), 90)
    for wait, j, run in zip(waits, jobs, runs, strict=True):
        assert wait() == {j.name: Outcome(0)}
        assert_resumed(j.log)
        assert_same_run(run, long_run)


def test_a_sweep_that_starts_again_submits_nothing_twice(
    cluster, tiny_split, tmp_path, monkeypatch
):
    monkeypatch.setattr(slurm, "PATIENCE", 3)
    jobs = [job(tmp_path, "runs", split_dir=tiny_split)]
    jobs.append(job(tmp_path, "cancelled", split_dir=tiny_split, **LONG))
    jobs.append(job(tmp_path, "cancelled in the queue", split_dir=tiny_split))
    with monkeypatch.context() as patch:
        patch.setattr(slurm.time, "sleep", _interrupt)
        with pytest.raises(Interrupted, match="3 jobs stay with Slurm") as caught:
            list(launch(jobs, tmp_path / "sweep", {}, poll_s=1, array_parallelism=2))
    assert caught.value.code == 130
    running, pending = task_of(cluster, 1), task_of(cluster, 2)
    numbers = read_json(tmp_path / "sweep/slurm/jobs.json")
    new = job(tmp_path, "new", method="nonsense")
    again = launch([*jobs, new], tmp_path / "sweep", {}, poll_s=1)
    found = read_json(tmp_path / "sweep/slurm/jobs.json")
    assert found.pop("new").partition("_")[0] not in {n.partition("_")[0] for n in found.values()}
    assert found.items() <= numbers.items() and {running, pending} <= set(found.values())
    cluster("scancel", pending)
    wait_until(lambda: in_the_middle(Run(tmp_path / "record/full/cancelled")))
    cluster("scancel", running)
    outcomes = {j.name: outcome for j, outcome in again}
    for name in ("cancelled", "cancelled in the queue"):  # this Slurm keeps no accounts
        assert outcomes.pop(name) == Outcome(None, slurm.GONE)
    assert outcomes == {"runs": Outcome(0), "new": Outcome(2)}
    for j in jobs[:2]:
        assert j.log.read_text().count("recording in") == 1
    assert "as asked; continue with" in jobs[1].log.read_text()


def test_a_table_on_slurm(cluster, tiny_split, tmp_path, command):
    flags = " ".join(tiny_flags(epochs=1, threads=1))
    words = ["table2", "--data_root", tiny_split.parent / "data", "--split_dir", tiny_split]
    words += ["--sweep_dir", tmp_path / "sweeps", "--run_flags", flags, "--methods", "single"]
    words += ["--seeds", "1", "2", "--launcher", "slurm", "--sbatch", "partition=low"]
    code, out, err = command(reproduce_tables.main, *words)
    assert code == 0, err
    assert "2 runs: 2 to do" in out and "of 2: single_seed2" in out
    assert list(tmp_path.glob("sweeps/cub/logs/slurm/*_result.pkl"))


def _interrupt(_):
    raise KeyboardInterrupt


# --- without Slurm ----------------------------------------------------------------------------


def program(folder, name, text):
    """A shell script in ``folder`` under the name of one of Slurm's programs."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs that stand in for Slurm's come first in PATH: ``programs(name, shell text)``."""
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return lambda name, text: program(folder, name, text)


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine: use --launcher local"):
        launch([], tmp_path / "sweep", {})
    assert not (tmp_path / "sweep").exists()


def test_without_submitit(tmp_path, programs, monkeypatch):
    programs("sbatch", "exit 1")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install -r requirements-tables.txt"):
        launch([], tmp_path / "sweep", {})


def test_sbatch_that_refuses(tmp_path, programs):
    pytest.importorskip("submitit")
    programs("srun", "")
    programs("squeue", "")
    programs(
        "sbatch",
        "echo 'sbatch: error: invalid partition specified: nope' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid partition name' >&2\nexit 1",
    )
    jobs = [job(tmp_path, name) for name in "ab"]
    with pytest.raises(UserError) as caught:
        launch(jobs, tmp_path / "sweep", {"partition": "nope"})
    assert str(caught.value) == (
        "sbatch refused the jobs: invalid partition specified: nope; "
        "Batch job submission failed: Invalid partition name"
    )


def test_what_is_asked_of_sbatch(tmp_path, programs):
    pytest.importorskip("submitit")
    programs("srun", "")
    programs("sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 7')
    options = {"partition": "gpu", "gpus-per-node": "1", "cpus-per-task": "4", "mem": "16G"}
    limits = {"timeout_min": 90, "array_parallelism": 2, "grace_s": 50}
    launch([job(tmp_path, name) for name in "abc"], tmp_path / "a sweep", options, **limits)
    script = (tmp_path / "script").read_text().splitlines()
    assert read_json(tmp_path / "a sweep/slurm/jobs.json") == {"a": "7_0", "b": "7_1", "c": "7_2"}
    for line in (
        *("--array=0-2%2", "--cpus-per-task=4", "--gpus-per-node=1"),
        *("--job-name=a_sweep", "--mem=16G", "--partition=gpu", "--requeue"),
        *("--signal=USR2@50", "--time=90", "--open-mode=append"),
    ):
        assert f"#SBATCH {line}" in script
    assert f"export PYTHONPATH={slurm.ROOT}${{PYTHONPATH:+:$PYTHONPATH}}" in script
    assert "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}" in script
    assert "--cpus-per-task=4" in script[-1]


@pytest.mark.parametrize(
    "outcome, text",
    [
        (Outcome(0), "exit code 0"),
        (Outcome(2), "exit code 2"),
        (Outcome(-9), "killed by SIGKILL, perhaps because memory ran out"),
        (Outcome(-11), "killed by SIGSEGV"),
        (Outcome(None, "NODE_FAIL"), "Slurm: NODE_FAIL"),
    ],
)
def test_outcomes(outcome, text):
    assert str(outcome) == text


def test_jobs_that_slurm_ended(tmp_path, programs, monkeypatch):
    """A job counts as ended when it has left the queue for a while; sacct may know how."""
    cloudpickle = pytest.importorskip("cloudpickle")
    pytest.importorskip("submitit")
    monkeypatch.setattr(slurm, "PATIENCE", 0.5)
    programs("srun", "")
    programs("sbatch", "echo Submitted batch job 7")
    programs("sacct", "echo 'JobID|State|NodeList'; echo '7_0|OUT_OF_MEMORY|node'")
    jobs = [job(tmp_path, name) for name in ("memory", "gone", "back", "written")]
    outcomes = launch(jobs, tmp_path / "sweep", {}, poll_s=0.1)
    looks = tmp_path / "looks"
    # A job that is being queued again may be missing for a moment; squeue may fail for a while.
    programs(
        "squeue",
        f"echo >> {looks}\n[ $(wc -l < {looks}) -gt 4 ] || exit 1\n"
        f"[ $(wc -l < {looks}) -eq 6 ] || echo 7_2; echo 7_3",
    )
    assert {j.name: outcome for j, outcome in (next(outcomes), next(outcomes))} == {
        "memory": Outcome(None, "OUT_OF_MEMORY"),
        "gone": Outcome(None, slurm.GONE),
    }
    for task, content in (("7_2", ("success", 0)), ("7_3", ("error", "Traceback\nTypeError: x"))):
        file = tmp_path / f"sweep/slurm/{task}_0_result.pkl"
        file.write_bytes(cloudpickle.dumps(content))
    assert {j.name: outcome for j, outcome in outcomes} == {
        "back": Outcome(0),
        "written": Outcome(None, "failed (TypeError: x)"),
    }


def test_nothing_is_submitted_before_it_is_known_what_is_queued(tmp_path, programs):
    pytest.importorskip("submitit")
    programs("srun", "")
    programs("sbatch", f"touch {tmp_path}/submitted; echo Submitted batch job 8")
    programs("squeue", "echo down >&2; exit 1")
    (tmp_path / "sweep/slurm").mkdir(parents=True)
    write_json(tmp_path / "sweep/slurm/jobs.json", {"a": "7_0", "b": "7_1"})
    jobs = [job(tmp_path, name) for name in "abc"]
    with pytest.raises(UserError, match="squeue does not answer"):
        launch(jobs, tmp_path / "sweep", {})
    assert not (tmp_path / "submitted").exists()
    programs("squeue", "echo 7_1; echo 9")
    launch(jobs, tmp_path / "sweep", {})
    numbers = read_json(tmp_path / "sweep/slurm/jobs.json")
    assert numbers == {"a": "8_0", "b": "7_1", "c": "8_1"}


class Requeued(Exception):
    """What submitit's requeue is to the code that it interrupts."""


class Killed(Exception):
    """Slurm's SIGKILL, in its place an alarm."""


@pytest.fixture
def training(tmp_path, monkeypatch):
    """``training(program, patience)``: a TrainingRun whose train_bilevel.py is that program."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    numbers = (slurm.WARNING, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    (tmp_path / "logs").mkdir()

    def make(text, patience=20):
        (tmp_path / "train_bilevel.py").write_text(text)
        run = TrainingRun(["--flag"], tmp_path / "logs/run.log", tmp_path, patience)

        def requeue(*_):
            run.again = run.checkpoint()
            raise Requeued

        def kill(*_):
            raise Killed

        signal.signal(slurm.WARNING, requeue)
        signal.signal(signal.SIGALRM, kill)
        return run

    yield make
    for number, handler in before.items():
        signal.signal(number, handler)


COUNTING = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: print(signal.Signals(number).name, flush=True))
print("ready", *sys.argv[1:], flush=True)
end = time.monotonic() + float(os.environ["STEP"])
while time.monotonic() < end:
    time.sleep(0.01)
print("checkpoint", flush=True)
sys.exit(143)
"""


def when_ready(log, action):
    """Do it in another thread once the training has begun."""

    def wait():
        wait_until(lambda: log.exists() and "ready" in log.read_text())
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "signals, end",
    [
        ([signal.SIGUSR2], Requeued),
        ([signal.SIGTERM, signal.SIGTERM], Killed),
        ([signal.SIGTERM, signal.SIGUSR2], Requeued),
        ([signal.SIGUSR2, signal.SIGTERM], Requeued),
    ],
)
def test_signals_of_slurm_reach_the_training_once(training, tmp_path, monkeypatch, signals, end):
    """Slurm sends each to all processes; the training would end at once at a second one.

    After SIGTERM alone there is no result: Slurm queues the job again or has cancelled it.
    """
    monkeypatch.setenv("STEP", "0.6")
    run, log = training(COUNTING), tmp_path / "logs/run.log"

    def send():
        pid = run._process.pid
        for number in signals:
            os.kill(pid, number)
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        if end is Killed:
            wait_until(lambda: "checkpoint" in log.read_text())
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGALRM)

    thread = when_ready(log, send)
    with pytest.raises(end):
        run()
    thread.join()
    assert log.read_text().split() == ["ready", "--flag", "SIGUSR1", "checkpoint"]
    if end is Requeued:
        again = run.again.function
        assert (again.argv, again.log, again.cwd) == (run.argv, run.log, run.cwd)
        assert (again._process, again._asked) == (None, False)


def test_a_training_that_does_not_stop_is_killed(training, tmp_path, monkeypatch):
    monkeypatch.setenv("STEP", "60")
    run, log = training(COUNTING, patience=0.3), tmp_path / "logs/run.log"
    began = time.monotonic()
    thread = when_ready(log, lambda: os.kill(os.getpid(), slurm.WARNING))
    with pytest.raises(Requeued):
        run()
    thread.join()
    assert time.monotonic() - began < 10
    assert log.read_text().split() == ["ready", "--flag", "SIGUSR1"]


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_exit_codes_come_back(training, code):
    assert training(f"raise SystemExit({code})")() == code
