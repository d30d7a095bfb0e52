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
from auxilearn.trainer import train

from auxilearn.errors import Interrupted, UserError
from auxilearn.run.config import Config
from auxilearn.run.record import read_json, write_json
from auxilearn.tables import slurm
from auxilearn.tables.slurm import Outcome, TrainingRun, launch
from tests.conftest import TINY, Run, assert_same_run, tiny_flags

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


def test_an_array_of_runs_is_that_of_runs_without_slurm(cluster, tiny_split, tmp_path):
    seeds = {"seed 1": {"seed": 1}, "seed 2": {"seed": 2, "corrupted": 1}}
    jobs = [job(tmp_path, name, split_dir=tiny_split, **changes) for name, changes in seeds.items()]
    jobs.insert(1, job(tmp_path, "bad", method="nonsense"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    jobs[2].cwd = elsewhere
    jobs[2].argv[jobs[2].argv.index("--record_dir") + 1] = "here"
    outcomes = {j.name: outcome for j, outcome in launch(jobs, tmp_path / "a sweep", poll_s=1)}
    assert outcomes == {
        "seed 1": Outcome(0, "COMPLETED"),
        "bad": Outcome(2, "COMPLETED"),
        "seed 2": Outcome(0, "COMPLETED"),
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


LONG = {"epochs": 50, "log_every": 1, "save_every": 10_000}  # 150 steps, a few seconds


@pytest.fixture(scope="module")
def long_run(tiny_split, tmp_path_factory):
    return undisturbed(tiny_split, tmp_path_factory.mktemp("long"), **LONG)


def in_the_middle(run):
    """Whether the run has begun, and is far from its end."""
    path = run.directory / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) > 3


def ending(tmp_path, jobs, **options):
    """Submit; returns a function that waits and returns the outcomes by name."""
    outcomes = launch(jobs, tmp_path / "sweep", poll_s=1, **options)
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
    assert outcomes() == dict.fromkeys(("requeued", "warned"), Outcome(0, "COMPLETED"))
    for j, run in zip(jobs, runs, strict=True):
        assert_resumed(j.log)
        assert_same_run(run, long_run)


def test_preempted(cluster, tiny_split, tmp_path, long_run):
    """Slurm sends two SIGTERMs at once; or one 20 seconds ahead, after which there is room soon."""
    jobs = [job(tmp_path, name, split_dir=tiny_split, **LONG) for name in ("low", "grace")]
    runs = [Run(tmp_path / "record/full" / j.name) for j in jobs]
    waits = [ending(tmp_path / j.name, [j], partition=j.name) for j in jobs]
    wait_until(lambda: all(in_the_middle(run) for run in runs))
    began = time.monotonic()
    urgent = ["sbatch", "--parsable", "--partition=high", "--ntasks=2", "--output=/dev/null"]
    urgent = cluster(*urgent, "--wrap=true")
    finished = ["squeue", "--noheader", "--states=COMPLETED", "--format=%i"]
    wait_until(lambda: urgent in cluster(*finished).split())
    assert time.monotonic() - began < 15
    for wait, j, run in zip(waits, jobs, runs, strict=True):
        assert wait() == {j.name: Outcome(0, "COMPLETED")}
        assert_resumed(j.log)
        assert_same_run(run, long_run)


def test_a_controller_that_starts_again_submits_nothing_twice(
    cluster, tiny_split, tmp_path, monkeypatch
):
    jobs = [job(tmp_path, "runs", split_dir=tiny_split)]
    jobs.append(job(tmp_path, "cancelled", split_dir=tiny_split, **LONG))
    jobs.append(job(tmp_path, "cancelled in the queue", split_dir=tiny_split))
    with monkeypatch.context() as patch:
        patch.setattr(slurm.time, "sleep", _interrupt)
        with pytest.raises(Interrupted, match="3 jobs stay with Slurm") as caught:
            list(launch(jobs, tmp_path / "sweep", poll_s=1, array_parallelism=2))
    assert caught.value.code == 130
    running, pending = task_of(cluster, 1), task_of(cluster, 2)
    new = job(tmp_path, "new", method="nonsense")
    again = launch([*jobs, new], tmp_path / "sweep", poll_s=1)
    cluster("scancel", pending)
    wait_until(lambda: in_the_middle(Run(tmp_path / "record/full/cancelled")))
    cluster("scancel", running)
    outcomes = {j.name: outcome for j, outcome in again}
    # Slurm forgets at once what is cancelled before it begins; a fast node may have begun.
    forgotten = outcomes.pop("cancelled in the queue")
    assert forgotten in (Outcome(None, slurm.GONE), Outcome(None, "CANCELLED"))
    assert outcomes == {
        "runs": Outcome(0, "COMPLETED"),
        "cancelled": Outcome(None, "CANCELLED"),
        "new": Outcome(2, "COMPLETED"),
    }
    assert jobs[0].log.exists() and jobs[1].log.exists()
    submitted = cluster("squeue", "--noheader", "--array", "--states=all", "--format=%j").split()
    arrays = read_json(tmp_path / "sweep/slurm/submissions.json")
    known = 2 if forgotten.state == slurm.GONE else 3
    assert sorted(submitted.count(name) for name in arrays) == [1, known]
    for j in jobs[:2]:
        assert j.log.read_text().count("recording in") == 1
    assert "as asked; continue with" in jobs[1].log.read_text()


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
    with pytest.raises(UserError, match="Slurm is not on this machine.*--launcher local"):
        launch([], tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_without_submitit(tmp_path, programs, monkeypatch):
    programs("sbatch", "exit 1")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install -r requirements-tables.txt"):
        launch([], tmp_path / "sweep")


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
        launch(jobs, tmp_path / "sweep", partition="nope")
    assert str(caught.value) == (
        "sbatch refused the jobs: invalid partition specified: nope; "
        "Batch job submission failed: Invalid partition name"
    )


def test_what_is_asked_of_sbatch(tmp_path, programs):
    pytest.importorskip("submitit")
    programs("srun", "")
    programs("sbatch", f"cp $1 {tmp_path}/script; echo Submitted batch job 7")
    options = {"partition": "gpu", "gpus_per_job": 1, "cpus_per_job": 4, "mem_gb": 16}
    options |= {"timeout_min": 90, "array_parallelism": 2, "grace_s": 50}
    launch(
        [job(tmp_path, name) for name in "abc"],
        tmp_path / "sweep",
        extra={"account": "vision"},
        **options,
    )
    script = (tmp_path / "script").read_text().splitlines()
    (name,) = read_json(tmp_path / "sweep/slurm/submissions.json")
    for line in (
        *("--account=vision", "--array=0-2%2", "--cpus-per-task=4", "--gpus-per-node=1"),
        *(f"--job-name={name}", "--mem=16GB", "--partition=gpu", "--requeue"),
        *("--signal=USR2@50", "--time=90", "--open-mode=append"),
    ):
        assert f"#SBATCH {line}" in script
    assert f"export PYTHONPATH={slurm.ROOT}${{PYTHONPATH:+:$PYTHONPATH}}" in script
    assert "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}" in script
    assert "--cpus-per-task=4" in script[-1]


@pytest.mark.parametrize(
    "outcome, text",
    [
        (Outcome(0, "COMPLETED"), "exit code 0"),
        (Outcome(2, "COMPLETED"), "exit code 2"),
        (Outcome(-9, "COMPLETED"), "killed by SIGKILL, as happens where memory runs out"),
        (Outcome(-11, "COMPLETED"), "killed by SIGSEGV"),
        (Outcome(None, "NODE_FAIL"), "Slurm: NODE_FAIL"),
    ],
)
def test_outcomes(outcome, text):
    assert str(outcome) == text
    assert outcome.finished == (outcome.code == 0)


def test_jobs_that_slurm_ended(tmp_path, programs, monkeypatch):
    """Each state twice in squeue before it counts; a job that left squeue is looked up in sacct."""
    pytest.importorskip("submitit")
    programs("srun", "")
    programs("sbatch", "echo Submitted batch job 7")
    programs("scancel", "")
    programs("sacct", "echo 'NODE_FAIL'")
    jobs = [job(tmp_path, name) for name in ("memory", "gone", "back", "written")]
    outcomes = launch(jobs, tmp_path / "sweep", poll_s=0.2)
    folder = tmp_path / "sweep/slurm"
    (name,) = read_json(folder / "submissions.json")
    looks = tmp_path / "looks"
    programs(
        "squeue",
        f"echo >> {looks}\n"
        f"echo '{name}|7_0|OUT_OF_MEMORY'; echo '{name}|7_3|RUNNING'\n"
        # A job that is being queued again may look ended for a moment.
        f"[ $(wc -l < {looks}) -eq 1 ] && echo '{name}|7_2|PREEMPTED' || "
        f"echo '{name}|7_2|PENDING'",
    )
    assert {j.name: outcome for j, outcome in (next(outcomes), next(outcomes))} == {
        "memory": Outcome(None, "OUT_OF_MEMORY"),
        "gone": Outcome(None, "NODE_FAIL"),
    }
    import cloudpickle

    for task, content in (("7_2", ("success", 0)), ("7_3", ("error", "Traceback\nTypeError: x"))):
        (folder / f"{task}_0_result.pkl").write_bytes(cloudpickle.dumps(content))
    assert {j.name: outcome for j, outcome in outcomes} == {
        "back": Outcome(0, "COMPLETED"),
        "written": Outcome(None, "FAILED (TypeError: x)"),
    }


def test_a_squeue_that_fails_for_a_while(tmp_path, programs, capsys):
    pytest.importorskip("submitit")
    programs("srun", "")
    programs("sbatch", "echo Submitted batch job 7")
    outcomes = launch([job(tmp_path, "a")], tmp_path / "sweep", poll_s=0.05)
    (name,) = read_json(tmp_path / "sweep/slurm/submissions.json")
    looks = tmp_path / "looks"
    programs(
        "squeue",
        f"echo >> {looks}\n[ $(wc -l < {looks}) -gt 4 ] || {{ echo down >&2; exit 1; }}\n"
        f"echo '{name}|7|CANCELLED'",
    )
    assert [outcome for _, outcome in outcomes] == [Outcome(None, "CANCELLED")]
    warning = "warning: squeue does not tell what is in the queue: down; waiting\n"
    assert capsys.readouterr().err == warning
    programs("squeue", "echo down >&2; exit 1")
    with pytest.raises(UserError, match="squeue does not tell what is in the queue: down"):
        launch([job(tmp_path, "a")], tmp_path / "sweep")


def test_killed_between_sbatch_and_handing_over(tmp_path, programs):
    """Slurm has an array that the nodes would wait for in vain: cancelled, and submitted again."""
    pytest.importorskip("submitit")
    programs("srun", "")
    programs("sbatch", "echo Submitted batch job 8")
    programs("scancel", f"echo $1 >> {tmp_path}/cancelled")
    programs("squeue", "echo 'old|7_0|RUNNING'; echo 'old|7_1|PENDING'; echo 'old|7_2|FAILED'")
    folder = tmp_path / "sweep/slurm"
    folder.mkdir(parents=True)
    write_json(folder / "submissions.json", {"old": ["a", "b", "c"]})
    (folder / "7_0_submitted.pkl").touch()
    (folder / "7_2_submitted.pkl").touch()
    launch([job(tmp_path, name) for name in "abc"], tmp_path / "sweep")
    assert (tmp_path / "cancelled").read_text() == "7_1\n"
    submissions = read_json(folder / "submissions.json")
    assert submissions.pop("old") == ["a", "b", "c"]
    assert list(submissions.values()) == [["b", "c"]]


def test_two_controllers_of_one_sweep(tmp_path, programs):
    pytest.importorskip("submitit")
    programs("sbatch", "")
    lock = tmp_path / "sweep/slurm/lock"
    lock.parent.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print('held', flush=True); sys.stdin.read()", lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process waits for the jobs of"):
            launch([], tmp_path / "sweep")
        other.stdin.close()


@pytest.mark.parametrize("content", ["[]", "{", '{"name": 1}', '{"name": [1]}'])
def test_a_record_that_is_not_one(tmp_path, programs, content):
    pytest.importorskip("submitit")
    programs("sbatch", "")
    file = tmp_path / "sweep/slurm/submissions.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(UserError, match="submissions.json"):
        launch([job(tmp_path, "a")], tmp_path / "sweep")


class Requeued(Exception):
    """What submitit's requeue is to the code that it interrupts."""


@pytest.fixture
def training(tmp_path, monkeypatch):
    """``training(program, patience)``: a TrainingRun whose train_bilevel.py is that program."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    before = {number: signal.getsignal(number) for number in (slurm.WARNING, signal.SIGTERM)}

    def make(text, patience=20):
        (tmp_path / "train_bilevel.py").write_text(text)
        run = TrainingRun(["--flag"], tmp_path / "logs/run.log", tmp_path, patience)

        def requeue(*_):
            run.again = run.checkpoint()
            raise Requeued

        signal.signal(slurm.WARNING, requeue)
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
        ([signal.SIGTERM, signal.SIGTERM], SystemExit),
        ([signal.SIGTERM, signal.SIGUSR2], Requeued),
        ([signal.SIGUSR2, signal.SIGTERM], Requeued),
    ],
)
def test_signals_of_slurm_reach_the_training_once(
    training, tmp_path, programs, monkeypatch, signals, end
):
    """Slurm sends each to all processes; the training would end at once at a second one."""
    monkeypatch.setenv("STEP", "0.6")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    programs("squeue", "echo COMPLETING")
    run, log = training(COUNTING), tmp_path / "logs/run.log"

    def send():
        pid = run._pid  # other tests may have left helpers of multiprocessing behind
        for number in signals:
            os.kill(pid, number)
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    thread = when_ready(log, send)
    with pytest.raises(end):
        run()
    thread.join()
    assert log.read_text().split() == ["ready", "--flag", "SIGUSR1", "checkpoint"]
    if end is Requeued:
        again = run.again.function
        assert (again.argv, again.log, again.cwd) == (run.argv, run.log, run.cwd)
        assert (again._pid, again._asked) == (None, False)


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


@pytest.mark.parametrize("state, requeued", [("RUNNING", True), ("COMPLETING", False)])
def test_a_training_that_slurm_stopped(training, tmp_path, programs, monkeypatch, state, requeued):
    """Preemption with grace time: queued again at once. Cancelled: left as it is. No result."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    programs("squeue", f"[ $3 = 7 ] && echo {state}")
    run = training("raise SystemExit(143)")
    with pytest.raises(Requeued if requeued else SystemExit):
        run()


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_exit_codes_come_back(training, tmp_path, code):
    assert training(f"raise SystemExit({code})")() == code
