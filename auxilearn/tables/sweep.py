"""A sweep: the list of training runs that tables are made of, and the state of each on disk.

A job is a configuration; its identity is the hash of all in it that determines the run, and names
the run's folder. So a sweep has no state of its own: whatever was interrupted, and wherever, the
same command finds what is finished and goes on with the rest.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from auxilearn.config import NEUTRAL, Config, check, flags_of, parse
from auxilearn.errors import RunError, UserError
from auxilearn.record import CONFIG_FILE, LOG_FILE, SUMMARY_FILE, read_json
from auxilearn.tables.local import ROOT
from auxilearn.tables.protocol import DATASETS, PAPER_FLAGS, ROWS, SETTINGS
from auxilearn.tables.statistics import Result

POLL = 5  # seconds between looks at runs that another process is busy with


class Places(NamedTuple):
    """Where a sweep reads and writes: the split's folder, the data's (None: as preprocessed), the
    runs' and the logs'."""

    split_dir: Path
    data_root: Path | None
    runs: Path
    logs: Path


class Job(NamedTuple):
    """A run that is wanted. ``name`` ends in ``identity``, the hash of what determines the run."""

    name: str
    identity: str
    config: Config
    logs: Path

    @property
    def argv(self):
        """Flags of train_bilevel.py."""
        return flags_of(self.config)

    @property
    def command(self):
        """The run as a line of shell, from the current folder."""
        return shlex.join([*script("train_bilevel.py"), *self.argv])

    @property
    def directory(self):
        return Path(self.config.record_dir) / self.config.setting / self.name

    @property
    def log(self):
        return self.logs / f"{self.name}.log"

    @property
    def failure(self):
        """A file that is there if the last attempt failed, and says how."""
        return self.logs / f"{self.name}.failed"

    @property
    def cwd(self):
        return Path.cwd()


def script(name):
    """The words that run a script of this project from the current folder."""
    python = sys.executable
    if shutil.which("python") == python:
        python = "python"
    return [python, os.path.relpath(ROOT / name) if _inside(ROOT) else str(ROOT / name)]


def _inside(folder):
    return Path.cwd().resolve().is_relative_to(folder)


def make_job(places, dataset, row, setting, seed, hyperparameters=None, flags=()):
    """The job of a cell and seed.

    Args: keys of DATASETS, ROWS and SETTINGS; ``hyperparameters`` {setting of Config: value} over
    the data set's flags; ``flags`` of train_bilevel.py over all of them. Raises UserError for
    values out of range; argparse exits with code 2 on flags it does not know.
    """
    hyperparameters = hyperparameters or {}
    chosen = [word for name, value in hyperparameters.items() for word in (f"--{name}", str(value))]
    config = parse(
        [
            *DATASETS[dataset].flags,
            *([] if hyperparameters else PAPER_FLAGS.get((dataset, row), ())),
            *chosen,
            *flags,
            *ROWS[row].flags,
            *SETTINGS[setting].flags,
            *("--seed", str(seed)),
        ]
    )
    check(config)
    identity = _identity(config)
    name = f"{config.method}_seed{seed}_{identity}"
    config = dataclasses.replace(
        config,
        split_dir=str(places.split_dir),
        data_root=str(places.data_root) if places.data_root else None,
        record_dir=str(places.runs),
        exp_name=name,
        resume=True,
    )
    return Job(name, identity, config, places.logs)


def _determining(config):
    """{setting: value} of all that determines a run beside its data."""
    values = dataclasses.asdict(config)
    return {k: v for k, v in values.items() if k not in (*NEUTRAL, "exp_name", "device")}


def _identity(config):
    text = json.dumps(_determining(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


# --------------------------------------------------------------------------------------------------
# What is on disk
# --------------------------------------------------------------------------------------------------


def state_of(job, fingerprint=None):
    """(state, summary or None) of a job: to do, incomplete, running, failed or done.

    ``fingerprint`` of the data, None where they are not there yet. Raises UserError: the folder
    holds a run of another configuration or of other data.
    """
    directory = job.directory
    if not directory.is_dir():
        return ("failed" if job.failure.exists() else "to do"), None
    if (directory / CONFIG_FILE).exists():
        _check_configuration(job, fingerprint)
    if (directory / SUMMARY_FILE).exists():
        summary = read_json(directory / SUMMARY_FILE)
        accuracies = ("test_accuracy", "valid_accuracy")
        if not isinstance(summary, dict) or not all(
            isinstance(summary.get(name), float) and 0 <= summary[name] <= 1 for name in accuracies
        ):
            raise UserError(
                f"{directory / SUMMARY_FILE}: not the summary of a run; remove {directory} to "
                "train it again"
            )
        return "done", summary
    if _is_busy(directory):
        return "running", None
    return ("failed" if job.failure.exists() else "incomplete"), None


def _check_configuration(job, fingerprint):
    path = job.directory / CONFIG_FILE
    recorded = read_json(path)
    try:
        settings, data = dict(recorded["config"]), recorded["data"]["fingerprint"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not written by a run; remove {job.directory}") from None
    differences = [
        f"{name} is {settings.get(name)!r} there and {value!r} here"
        for name, value in _determining(job.config).items()
        if value is not None and settings.get(name) != value  # None was resolved from the data
    ]
    if fingerprint is not None and data != fingerprint:
        differences.append("its data or their split are others")
    if differences:
        raise UserError(
            f"{job.directory} holds the run of another configuration: {'; '.join(differences)}; "
            "remove it, or give another --sweep_dir"
        )


def _is_busy(directory):
    """Whether a process is writing the run in ``directory``: it holds a lock on its log."""
    try:
        with open(directory / LOG_FILE, "r+") as log:
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no log yet, or a file system without locks
        return False
    return False


def result_of(job, row, setting, fingerprint=None):
    """The ``Result`` of a job as the run of a cell."""
    state, summary = state_of(job, fingerprint)
    return Result(
        row,
        setting,
        job.config.seed,
        state,
        summary["test_accuracy"] if summary else None,
        summary["valid_accuracy"] if summary else None,
        str(job.directory),
        job.identity,
        job.command,
    )


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def run(jobs, launch, fingerprint=None, *, elsewhere=True):
    """Run what is not done of ``jobs``. Returns the list of (job, how it failed).

    Args:
        launch: callable (list of jobs) -> iterator of (job, Outcome) as they end.
        elsewhere: whether runs that another process is busy with are left to it and waited for;
            ``launch`` gets those too otherwise.

    A failed job does not stop the others; it is tried again by the next call. Raises RunError where
    the disk is full, and what ``launch`` raises.
    """
    jobs = list({job.name: job for job in jobs}.values())
    states = [state_of(job, fingerprint)[0] for job in jobs]
    left = [job for job, state in zip(jobs, states, strict=True) if state != "done"]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    print(f"{len(jobs)} runs: {', '.join(f'{n} {state}' for state, n in counts.items())}")
    failed = []
    start, ended, total = time.monotonic(), 0, len(left)
    with (
        _full_disk(jobs),
        tqdm(total=total, unit="run", dynamic_ncols=True, disable=None) as bar,
    ):
        for job in left:
            job.logs.mkdir(parents=True, exist_ok=True)
        while left:
            ready = [
                job for job in left if not elsewhere or state_of(job, fingerprint)[0] != "running"
            ]
            if not ready:
                time.sleep(POLL)
                continue
            for job in ready:
                job.failure.unlink(missing_ok=True)
            for job, outcome in launch(ready):
                state, summary = state_of(job, fingerprint)
                if elsewhere and state == "running":  # another process was faster
                    continue
                left.remove(job)
                ended += 1
                bar.update()
                if state == "done":
                    said = f"test accuracy {summary['test_accuracy']:.4f}"
                else:
                    said = f"FAILED, {_reason(job, outcome)}"
                    job.failure.write_text(f"{outcome}\n", encoding="utf-8")
                    failed.append((job, _reason(job, outcome)))
                seconds = (time.monotonic() - start) / ended * (total - ended)
                rest = f"about {_duration(seconds)} left" if ended < total else "the last one"
                line = f"{ended} of {total}: {job.name}: {said}; {rest}"
                print(line, flush=True) if bar.disable else bar.write(line)
    return failed


def _reason(job, outcome):
    """How a run ended, in the words of its log."""
    with contextlib.suppress(OSError):
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return f"{outcome}: {errors[-1].removeprefix('error: ')}"
    return f"{outcome}, see {job.log}"


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


@contextlib.contextmanager
def _full_disk(jobs):
    try:
        yield
    except OSError as error:
        place = error.filename or (jobs[0].logs if jobs else "the sweep's folder")
        raise RunError(
            f"{place}: {error.strerror or error}; finished runs are kept, the same command goes on"
        ) from None
