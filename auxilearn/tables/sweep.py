"""A sweep: the list of training runs that tables are made of, and the state of each on disk.

A job is a configuration; its identity is the hash of all in it that determines the run, and names
the run's folder. So a sweep has no state of its own: whatever was interrupted, and wherever, the
same command finds what is finished and goes on with the rest.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from auxilearn.errors import RunError, UserError
from auxilearn.run.config import (
    NEUTRAL,
    Config,
    check,
    defaults,
    flags_of,
    parse,
    with_method_defaults,
)
from auxilearn.run.record import (
    CONFIG_FILE,
    LOG_FILE,
    SUMMARY_FILE,
    differences_of_run,
    is_locked,
    read_json,
)
from auxilearn.tables.local import ROOT
from auxilearn.tables.protocol import DATASETS, ROW_FLAGS, ROWS, SETTINGS, tuned_as
from auxilearn.tables.statistics import Result

POLL = 5  # seconds between looks at runs that another process is busy with
STOPPED = (130, 143, -2, -15)  # exit codes of a run that somebody asked to end
# What a table says of a run in words, so that further flags may not change it.
OWNED = (
    *("method", "factors", "whether_aux", "corrupted", "corrupted_rate", "labeled_per_class"),
    *("seed", "exp_name", "record_dir", "split_dir", "data_root", "resume", "overwrite"),
)


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
    python = Path(sys.executable)
    if shutil.which("python") == sys.executable:
        python = Path("python")
    here = Path.cwd()
    words = [python, ROOT / name]
    return [str(w.relative_to(here) if w.is_relative_to(here) else w) for w in words]


def make_job(places, dataset, row, setting, seed, hyperparameters=None, flags=()):
    """The job of a cell and seed.

    Args: keys of DATASETS, ROWS and SETTINGS; ``flags`` of train_bilevel.py over the data set's;
    ``hyperparameters`` {setting of Config: value} over all of them. Raises UserError for flags that
    are unknown, out of range, or not for the user of a table to set.
    """
    if any(flag.split("=")[0] == "--preset" for flag in flags):
        raise UserError("--run_flags: --preset: give its settings themselves, see --help")
    base = [*_base(dataset), *ROW_FLAGS.get((dataset, tuned_as(row)), ())]
    chosen = [
        word
        for name, value in (hyperparameters or {}).items()
        for word in (f"--{name}", str(value))
    ]
    fixed = [*ROWS[row].flags, *SETTINGS[setting].flags, "--seed", str(seed)]
    plain = _parsed([*base, *chosen])
    with_flags = _parsed([*base, *flags, *chosen])
    for name in OWNED:
        if getattr(plain, name) != getattr(with_flags, name):
            raise UserError(f"--run_flags: --{name} is set by the table, by row, setting and seed")
    config = _parsed([*base, *flags, *chosen, *fixed])
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
    check(config)
    return Job(name, identity, config, places.logs)


def learning_rate(dataset, flags):
    """--main_lr of a data set's runs under further ``flags``, before any tuning."""
    return _parsed([*_base(dataset), *flags]).main_lr


def _base(dataset):
    return ["--main_lr", str(DATASETS[dataset].main_lr), *DATASETS[dataset].flags]


def _parsed(words):
    """``parse``, with argparse's complaint as a UserError in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(words)
    except SystemExit:
        last = said.getvalue().strip().rpartition("\n")[2]
        raise UserError(
            f"flags of train_bilevel.py: {last.partition('error: ')[2] or last}"
        ) from None


def _determining(config):
    """{setting: value} of all that determines a run beside its data."""
    values = dataclasses.asdict(with_method_defaults(config))
    return {k: v for k, v in values.items() if k not in (*NEUTRAL, "exp_name", "device")}


def _identity(config):
    """A hash of what is no default: so that a setting to come does not give old runs new names."""
    usual = defaults()
    special = {k: v for k, v in _determining(config).items() if v != usual[k]}
    text = json.dumps({"method": config.method, **special}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


# --------------------------------------------------------------------------------------------------
# What is on disk
# --------------------------------------------------------------------------------------------------


def state_of(job, fingerprint):
    """(state, summary or None) of a job: to do, incomplete, running, failed or done.

    Raises UserError: its folder holds a run of another configuration or of other data than those
    with this ``fingerprint``, or something else.
    """
    directory = job.directory
    if not directory.is_dir():
        if directory.exists() or directory.is_symlink():
            raise UserError(f"{directory}: expected the folder of a run; remove it")
        return ("failed" if job.failure.exists() else "to do"), None
    has_summary = (directory / SUMMARY_FILE).exists()
    if has_summary or (directory / CONFIG_FILE).exists():
        settings = _determining(job.config)
        differences = differences_of_run(
            directory,
            {name: value for name, value in settings.items() if value is not None},
            fingerprint,
            defaults(),
        )
        if differences:
            raise UserError(
                f"{directory} holds the run of another configuration: {'; '.join(differences)}; "
                "remove it, or give another --sweep_dir"
            )
    if has_summary:
        summary = read_json(directory / SUMMARY_FILE)
        expected = {
            "method": job.config.method,
            "seed": job.config.seed,
            "exp_name": job.name,
            "fingerprint": fingerprint,
        }
        if not _is_summary(summary, expected):
            raise UserError(
                f"{directory / SUMMARY_FILE}: not the summary of this run; remove {directory} to "
                "train it again"
            )
        return "done", summary
    if _is_busy(directory / LOG_FILE):
        return "running", None
    return ("failed" if job.failure.exists() else "incomplete"), None


def _is_summary(summary, expected):
    if not isinstance(summary, dict) or any(summary.get(k) != v for k, v in expected.items()):
        return False
    accuracies = [summary.get(name) for name in ("test_accuracy", "valid_accuracy")]
    return all(isinstance(value, float) and 0 <= value <= 1 for value in accuracies)


def _is_busy(log):
    """Whether a process is writing the run with this log: it holds a lock on it."""
    try:
        with open(log, "r+") as file:
            return is_locked(file)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{log} cannot be opened ({error.strerror})") from None


def result_of(job, row, setting, fingerprint):
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


def run(jobs, launch, fingerprint, *, elsewhere=True):
    """Run what is not done of ``jobs``. Returns the list of (job, how it ended) of those that ended
    without a result.

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
    failed, waited = [], False
    start, ended, total = time.monotonic(), 0, len(left)
    with (
        disk_errors(jobs[0].logs),
        tqdm(total=total, unit="run", dynamic_ncols=True, disable=None) as bar,
    ):
        for job in left:
            job.logs.mkdir(parents=True, exist_ok=True)
        while left:
            ready = [
                job for job in left if not elsewhere or state_of(job, fingerprint)[0] != "running"
            ]
            if not ready:
                if not waited:
                    print(f"waiting for {len(left)} runs of another process", flush=True)
                waited = True
                time.sleep(POLL)
                continue
            logged = {job.name: _size(job.log) for job in ready}
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
                    reason = _reason(job, outcome, logged[job.name])
                    said = f"ended without a result: {reason}"
                    failed.append((job, reason))
                    if outcome.code not in STOPPED:
                        job.failure.write_text(f"{reason}\n", encoding="utf-8")
                seconds = (time.monotonic() - start) / ended * (total - ended)
                rest = f"about {_duration(seconds)} left" if ended < total else "the last one"
                line = f"{ended} of {total}: {job.name}: {said}; {rest}"
                print(line, flush=True) if bar.disable else bar.write(line)
    return failed


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _reason(job, outcome, logged):
    """How a run ended, in the words of its log beyond the first ``logged`` bytes."""
    with contextlib.suppress(OSError):
        lines = job.log.read_bytes()[logged:].decode(errors="replace").splitlines()
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
def disk_errors(place):
    """A full or failing disk, in one line; ``place`` is named where the error names none."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{error.filename or place}: {error.strerror}; expected a folder, or none yet"
        ) from None
    except OSError as error:
        raise RunError(
            f"{error.filename or place}: {error.strerror or error}; finished runs are kept, the "
            "same command goes on"
        ) from None
