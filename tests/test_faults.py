"""What a machine does to a run: each fault ends in one line, and the run can go on from it."""

import errno
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data_preprocess
import train_bilevel
from auxilearn.data import cub
from auxilearn.data.pixels import load_resized
from auxilearn.data.split import load_split, write_split
from auxilearn.errors import Interrupted, RunError, UserError
from auxilearn.files import locked
from auxilearn.implicit_diff import neumann
from auxilearn.run.config import Config
from auxilearn.run.history import ScheduleHistory
from auxilearn.run.state import State
from auxilearn.solvers import conjugate_gradient, stable_alpha
from tests.conftest import (
    ROOT,
    TINY,
    Run,
    assert_one_error_line,
    assert_same_run,
    prepare,
    tiny_flags,
)

FLAGS = {"method": "joint", "exp_name": "run"}  # 2 epochs of 3 steps
FULL = os.strerror(errno.ENOSPC)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, FULL)


@pytest.fixture
def own_split(tmp_path):
    """The folder of a split whose data may be damaged."""
    shape = {"classes": 4, "train_per_class": 5, "attributes": 4, "image_size": (24, 20)}
    return prepare(tmp_path / "data", tmp_path / "split", **shape)


@pytest.fixture
def attempt(tmp_path, command, tiny_split):
    """``attempt(folder, **changes)``: (exit code, stderr, ``Run``) of a run as its script does."""

    def run(folder, **changes):
        places = {"split_dir": tiny_split, "record_dir": tmp_path / folder}
        flags = tiny_flags(**{**FLAGS, **places, **changes})
        code, _, err = command(train_bilevel.main, *flags)
        return code, err, Run(tmp_path / folder / "full" / "run")

    return run


@pytest.fixture(scope="module")
def undisturbed(tiny_split, tmp_path_factory):
    """``undisturbed(method)``: the ``Run`` that nothing happened to; trained once."""
    runs = {}

    def of(method):
        if method not in runs:
            folder = tmp_path_factory.mktemp("undisturbed")
            places = {"split_dir": str(tiny_split), "record_dir": str(folder), "method": method}
            train_bilevel.train(Config(**{**TINY, **FLAGS, **places}))
            runs[method] = Run(folder / "full/run")
        return runs[method]

    return of


@pytest.fixture
def assert_goes_on(attempt, undisturbed):
    """The run in "faulty" continues, and ends like an undisturbed one."""

    def check(**changes):
        code, err, faulty = attempt("faulty", resume=1, **changes)
        assert (code, err) == (0, "")
        assert_same_run(faulty, undisturbed(changes.get("method", "joint")))

    return check


def checkpoints(run):
    return sorted(int(path.name[5:13]) for path in run.directory.glob("step-*.pt"))


def at_step(monkeypatch, number, action):
    """Before lower step ``number`` of a run, ``action(its record)`` is done."""
    original = train_bilevel.lower_step

    def step(run, state, now, *args):
        if now == number:
            action(state.record)
        return original(run, state, now, *args)

    monkeypatch.setattr(train_bilevel, "lower_step", step)


# --------------------------------------------------------------------------------------------------
# A full disk
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["_metrics", "_log"])
def test_disk_full_while_writing_lines(attempt, monkeypatch, file, assert_goes_on):
    def fill(record):  # the device that refuses every byte, as a full disk does
        setattr(record, file, open("/dev/full", "w"))  # noqa: SIM115

    with monkeypatch.context() as patch:
        at_step(patch, 5, fill)
        code, err, run = attempt("faulty")
    assert code == 1
    assert_one_error_line(err, FULL, "--exp_name run --resume 1")
    assert checkpoints(run) == [3]
    assert_goes_on()


def test_disk_full_while_writing_the_schedule(attempt, monkeypatch, assert_goes_on):
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda _: patch.setattr(ScheduleHistory, "_append", no_space))
        code, err, run = attempt("faulty")
    assert code == 1
    assert_one_error_line(err, FULL, "--resume 1")
    assert checkpoints(run) == [3]
    assert_goes_on()


@pytest.mark.parametrize("call", [2, 4, 6])
def test_disk_full_while_syncing_checkpoints(attempt, monkeypatch, call, assert_goes_on):
    """config.json, best.pt, checkpoints and summary are all synced: each time another one fails."""
    original, calls = os.fsync, itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda n: no_space() if next(calls) >= call else original(n))
        code, err, run = attempt("faulty")
    assert code == 1
    assert_one_error_line(err, FULL, "--resume 1")
    assert [path.name for path in run.directory.glob(".*")] == [".lock"]
    for path in run.directory.glob("*.pt"):
        torch.load(path, weights_only=True)
    assert_goes_on()


def test_disk_full_at_the_start(attempt, monkeypatch, assert_goes_on):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        code, err, run = attempt("faulty")
    assert code == 2
    assert_one_error_line(err, FULL, run.directory)
    assert_goes_on()


def test_disk_full_while_building_the_cache(attempt, monkeypatch, own_split, undisturbed):
    """The run goes on without it, with a warning."""
    original = os.fsync

    def fsync(number):
        if "cache" in os.readlink(f"/proc/self/fd/{number}"):
            no_space()
        original(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        code, err, run = attempt("faulty", cache_dir=own_split / "cache")
    assert code == 0
    assert re.fullmatch(rf"warning: the image cache cannot be .*\({FULL}\).*\n", err)
    assert [path.name for path in (own_split / "cache").iterdir()] == [".lock"]
    assert_same_run(run, undisturbed("joint"))


def test_disk_full_while_preprocessing(own_split, command, monkeypatch):
    before = {path.name: path.read_bytes() for path in own_split.iterdir()}
    flags = ["--data_root", own_split.parent / "data", "--out_dir", own_split, "--split_seed", "9"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        code, _, err = command(data_preprocess.main, *flags)
    assert code == 2
    assert_one_error_line(err, FULL)
    assert {path.name: path.read_bytes() for path in own_split.iterdir()} == before


def test_a_metrics_file_that_lost_rows_is_not_continued(attempt, capfd, undisturbed):
    """As after a power cut: the checkpoint is there, the rows it counts on are not."""
    code, _, run = attempt("faulty")
    assert code == 0
    (run.directory / "summary.json").unlink()
    os.truncate(run.directory / "metrics.jsonl", 10)
    code, err, _ = attempt("faulty", resume=1)
    assert code == 0
    assert "counts on more than is left of metrics.jsonl" in err
    assert_same_run(run, undisturbed("joint"))


def test_a_damaged_best_checkpoint_gives_no_accuracy(attempt, monkeypatch):
    def damage(self, fine_tuning=False):
        path = self.record.directory / "best.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return original(self, fine_tuning)

    original = State.load_best
    monkeypatch.setattr(State, "load_best", damage)
    code, err, run = attempt("faulty")
    assert code == 1
    assert_one_error_line(err, run.directory / "best.pt", "--overwrite 1")
    assert not (run.directory / "summary.json").exists()


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_becomes_unreadable_in_epoch_2(
    attempt, monkeypatch, own_split, workers, assert_goes_on
):
    flags = {"method": "common", "num_workers": workers, "split_dir": own_split}
    split = load_split(own_split)
    path = split.image_path(split.indices["valid"][0])
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda _: path.write_bytes(b"?" * len(content)))
        code, err, run = attempt("faulty", **flags)
    assert code == 2
    assert_one_error_line(err, path, "not a readable image")
    assert checkpoints(run) == [4]
    path.write_bytes(content)
    assert_goes_on(**flags)


def test_nothing_is_written_into_the_data_root(attempt, own_split):
    """Its folder is the same afterwards."""
    data = own_split.parent / "data"
    before = sorted((p, p.stat().st_mtime_ns) for p in data.rglob("*"))
    code, _, _ = attempt("run", split_dir=own_split, cache_dir=own_split / "cache")
    assert code == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in data.rglob("*")) == before


# --------------------------------------------------------------------------------------------------
# Read-only places
# --------------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# File modes do not stop root, a mount does; it is this process's alone, and ends with it.
MOUNTED = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 77; shift; exec "$@"'


def with_read_only(folder, *words):
    """(exit code, stderr) of a script that finds ``folder`` on a read-only file system."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "-r", "--mount"]
    for command in (["true"], [sys.executable, *words]):
        result = subprocess.run(
            [*map(str, [*namespace, "sh", "-c", MOUNTED, "sh", folder, *command])],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        if command == ["true"] and result.returncode:
            pytest.skip(f"nothing can be mounted here: {result.stderr.strip()}")
    return result.returncode, result.stderr


def test_read_only_data_and_split(tmp_path, own_split):
    """Training warns that it cannot keep a cache beside the split, and trains."""
    places = {"split_dir": own_split, "record_dir": tmp_path / "record", "cache_dir": "none"}
    flags = tiny_flags(**{**FLAGS, **places})
    flags[flags.index("--cache_dir") : flags.index("--cache_dir") + 2] = []
    code, err = with_read_only(own_split, "train_bilevel.py", *flags)
    assert code == 0
    assert re.fullmatch(rf"warning: .*{own_split}.*Read-only.*--cache_dir none\n", err)
    data = own_split.parent / "data"
    flags = ["--data_root", data, "--out_dir", tmp_path / "other"]
    assert with_read_only(data, "data_preprocess.py", *flags) == (0, "")


def test_read_only_places_for_results(tmp_path, own_split, monkeypatch, attempt, command):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        code, err, _ = attempt("record")
    assert code == 2
    assert_one_error_line(err, tmp_path / "record", "Read-only", "--record_dir")
    flags = ["--data_root", own_split.parent / "data", "--out_dir", own_split]
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert command(data_preprocess.main, *flags)[::2] == (0, "")  # there is nothing to change
    code, _, err = command(data_preprocess.main, *flags, "--split_seed", 9)
    assert code == 2
    assert_one_error_line(err, own_split, "Read-only", "--out_dir")


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def test_a_closed_output_pipe_is_no_traceback():
    """As ``| head -1`` leaves one."""
    program = "from auxilearn.errors import run_script; run_script(lambda: print('x'))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_exit_codes_and_lines_of_scripts(command):
    def raising(error):
        def main():
            raise error

        return main

    assert command(raising(UserError("no\n  such"))) == (2, "", "error: no such\n")
    assert command(raising(RunError("no"))) == (1, "", "error: no\n")
    assert command(raising(Interrupted("stopped", 143))) == (143, "", "error: stopped\n")
    assert command(raising(KeyboardInterrupt())) == (130, "", "error: interrupted\n")
    code, _, err = command(lambda: Path("x" * 5000).stat())
    assert (code, err) == (2, f"error: {'x' * 5000}: File name too long\n")
    with pytest.raises(ZeroDivisionError):  # a defect shows where it is
        command(lambda: 1 / 0)


def test_a_folder_whose_name_is_no_text(attempt):
    """Linux takes any bytes for a name; they reach Python as characters that cannot be encoded."""
    code, err, run = attempt("\udcff")
    assert (code, err) == (0, "")
    assert "recording in" in (run.directory / "log.txt").read_text()


# --------------------------------------------------------------------------------------------------
# Two at once
# --------------------------------------------------------------------------------------------------


def test_two_runs_under_one_name(attempt, monkeypatch):
    monkeypatch.setattr("auxilearn.run.record.LOCK_PATIENCE", 0.1)
    assert attempt("faulty")[0] == 0
    directory = attempt("faulty")[2].directory

    def content():
        paths = (path for path in directory.iterdir() if path.name != ".lock")
        return sorted((path, path.stat().st_mtime_ns) for path in paths)

    before = content()
    with locked(directory / ".lock"):
        for flag in ({}, {"resume": 1}, {"overwrite": 1}):
            code, err, _ = attempt("faulty", **flag)
            assert code == 2
            assert_one_error_line(err, directory, "another process" if flag else "--exp_name")
            assert content() == before
    assert attempt("faulty", overwrite=1)[0] == 0


def test_two_preprocessing_runs_at_once(own_split, tmp_path):
    """The files are all of one of them, whichever that is."""
    data, out = own_split.parent / "data", tmp_path / "shared"
    alone = {}
    for seed in (1, 2):
        write_split(tmp_path / str(seed), cub.read_annotations(data), split_seed=seed)
        folder = tmp_path / str(seed)
        alone[seed] = {path.name: path.read_bytes() for path in folder.iterdir()}
    writer = (
        "import sys\nfrom auxilearn.data import cub\n"
        "from auxilearn.data.split import load_split, write_split\n"
        "annotations = cub.read_annotations(sys.argv[1])\n"
        "for _ in range(10):\n    for seed in sys.argv[3:]:\n"
        "        write_split(sys.argv[2], annotations, split_seed=int(seed))\n"
        "        load_split(sys.argv[2])\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", writer, data, out, *seeds],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seeds in (("1", "2"), ("2", "1"))
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
    assert {path.name: path.read_bytes() for path in out.iterdir()} in alone.values()


# --------------------------------------------------------------------------------------------------
# Numbers that go wrong
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [30.0, 400.0])
def test_the_stable_alpha_of_a_quadratic_with_known_spectrum(top):
    spectrum = torch.tensor([0.5, 3.0, top], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    hessian = basis @ torch.diag(spectrum) @ basis.T
    v = [basis.sum(dim=1)]

    def hvp(u):
        return [hessian @ u[0]]

    alpha = 0.1
    solution = neumann(alpha, terms=20)(hvp, v)
    assert solution.diverging
    stable = stable_alpha(alpha, solution.growth)
    assert stable == pytest.approx(2 / top, rel=1e-6)
    assert not neumann(0.99 * stable, terms=500)(hvp, v).diverging
    assert neumann(1.01 * stable, terms=500)(hvp, v).diverging
    early = neumann(alpha, terms=3)(hvp, v)  # never too small
    assert stable_alpha(alpha, early.growth) >= 2 / top


@pytest.mark.parametrize("solver", [neumann(0.1, terms=2), conjugate_gradient()])
def test_a_gradient_that_is_not_a_number_is_no_solution(solver):
    """A development gradient of 0 is solved by 0; of NaN nothing is known."""
    zero, nan = (solver(lambda u: u, [torch.full((3,), x)]) for x in (0.0, math.nan))
    assert zero.residual == 0 and not zero.diverging
    assert math.isnan(nan.residual) and nan.diverging


def test_no_alpha_is_stable_along_negative_curvature():
    solution = neumann(0.1, terms=5)(lambda u: [-u[0]], [torch.ones(3)])
    assert solution.diverging
    assert solution.growth == pytest.approx(1.1)
    assert stable_alpha(0.1, solution.growth) is None


def test_a_diverging_series_is_reported_once(tiny_run, capfd):
    run = tiny_run(method="joint", neumann_alpha=50.0, neumann_terms=3, epochs=3)
    rows = run.rows_of("upper")
    assert sum(row["diverging"] for row in rows) > 1
    assert all(row["residual"] > 1 for row in rows if row["diverging"])
    assert all(row["stable_alpha"] is None for row in rows if not row["diverging"])
    log = (run.directory / "log.txt").read_text()
    (line,) = re.findall("warning: .*diverges.*", log)
    assert "at alpha 50" in line
    assert "no alpha is stable" in line or "the largest stable --neumann_alpha is about" in line
    assert line in capfd.readouterr().out


def test_a_calm_series_is_not_reported(tiny_run):
    run = tiny_run(method="joint", neumann_alpha=1e-6)
    assert not any(row["diverging"] for row in run.rows_of("upper"))
    assert "diverges" not in (run.directory / "log.txt").read_text()


@pytest.mark.parametrize(
    ("task_relation", "message"),
    [([-30.0] * 5, "collapsed to zero"), ([5.0, -30, -30, -30, -30], "collapsed to task 0")],
)
def test_a_collapsed_schedule_is_reported_once(tiny_run, monkeypatch, task_relation, message):
    original = train_bilevel.build

    def build(*args):
        run = original(*args)
        with torch.no_grad():
            prior = run.bilevel.scheduler.task_prior
            prior.copy_(torch.tensor(task_relation).reshape(prior.shape))
        return run

    monkeypatch.setattr(train_bilevel, "build", build)
    run = tiny_run(method="joint", upper_lr=1e-9)
    log = (run.directory / "log.txt").read_text()
    assert len(re.findall("warning: .*collapsed", log)) == 1
    assert message in log


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["EPS", "16 bits"])
def test_images_that_are_programs_or_would_lose_their_pixels(own_split, kind):
    """Pillow hands EPS to Ghostscript, and makes white of all 16-bit values above 255."""
    split = load_split(own_split)
    path = split.image_path(0)
    if kind == "EPS":
        Image.new("RGB", (20, 20)).save(path, "EPS")
        message = f"{path}: not a readable image .cannot identify"
    else:
        Image.new("I;16", (20, 20), 3000).save(path, "PNG")
        with Image.open(path) as image:  # I;16, in older versions I
            mode = image.mode
        message = f"{path}: not a readable image .more than 8 bits per channel, mode {mode}; expect"
    with pytest.raises(UserError, match=message):
        load_resized(path, 32)
    with pytest.raises(UserError, match="1 of .* images cannot be decoded"):
        cub.check_images(cub.read_annotations(own_split.parent / "data"))
