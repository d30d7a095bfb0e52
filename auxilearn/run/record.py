"""What a run leaves on disk: configuration, metrics, log, best checkpoint, summary."""

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import filelock
import numpy as np
import torch

from auxilearn.errors import RunError, UserError
from auxilearn.files import is_locked, locked, read_json, write_aside, write_json
from auxilearn.run.config import FIELDS, NEUTRAL

CONFIG_FILE, METRICS_FILE, LOG_FILE = "config.json", "metrics.jsonl", "log.txt"
SCHEDULE_FILE, MARGINS_FILE = "schedule.jsonl", "margins.npy"
BEST_FILE, SUMMARY_FILE = "best.pt", "summary.json"
START_FILE = "fine_tuning_start.pt"
LOCK_FILE = ".lock"
CHECKPOINTS_KEPT = 2
LOCK_PATIENCE = 6  # seconds: a run whose sweep was killed ends after its step


class RunRecord:
    """A run's directory. Files are written aside and renamed, or appended a whole line at a time.

    Args:
        directory: created here; UserError if it is there already, unless ``overwrite``.
        description: JSON-able mapping of everything that determines the run.
        resume: goes on with the run that is there, whose configuration must be the same.
    """

    def __init__(self, directory, description, overwrite=False, resume=False):
        self.directory = Path(directory)
        if overwrite:
            self._remove_run()
        self._make_directory(resume)
        self._lock = locked(self.directory / LOCK_FILE, wait=LOCK_PATIENCE)
        try:
            self._acquire()
            for pattern in (".*.pt.*", ".*.json.*", ".*.npy.*"):
                for leftover in self.directory.glob(pattern):  # of ``write_aside``, killed in it
                    leftover.unlink()
            if resume and (self.directory / CONFIG_FILE).exists():
                self._check_same_run(description)
            else:
                write_json(self.directory / CONFIG_FILE, description)
            self._log = self._opened(LOG_FILE)
            self._metrics = self._opened(METRICS_FILE)
        except OSError as error:
            raise self._refused("written", error) from None

    def _make_directory(self, resume):
        try:
            # A run that was killed at its very start leaves a folder without configuration.
            self.directory.mkdir(parents=True, exist_ok=resume)
        except FileExistsError:
            if not self.directory.is_dir():
                raise UserError(
                    f"{self.directory} is a file, but should be the folder of the run: move it "
                    "away, or give another --exp_name"
                ) from None
            raise UserError(
                f"{self.directory} holds a run already: continue it with --resume 1, replace it "
                "with --overwrite 1, give another --exp_name, or leave --exp_name out for a new one"
            ) from None
        except OSError as error:
            raise self._refused("created", error) from None

    def _refused(self, what, error):
        return UserError(
            f"{self.directory} cannot be {what} ({error.strerror}); give a folder that can be "
            "written as --record_dir"
        )

    def _acquire(self):
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{self.directory} is being written by another process: wait for its end, or "
                "give another --exp_name"
            ) from None

    def _opened(self, name):
        return open(self.directory / name, "a", encoding="utf-8", errors="backslashreplace")

    def _check_same_run(self, description):
        differences = differences_of_run(self.directory, description)
        if differences:
            raise UserError(
                f"{self.directory} cannot be continued with another configuration: "
                f"{'; '.join(differences)}; give the settings that it had, or another --exp_name"
            )

    def _remove_run(self):
        if not self.directory.exists():
            return
        if not (self.directory / CONFIG_FILE).exists():
            raise UserError(
                f"{self.directory} holds no run ({CONFIG_FILE} is missing), so --overwrite leaves "
                "it alone: remove it by hand or give another --exp_name"
            )
        if is_locked(self.directory / LOCK_FILE):
            raise UserError(f"{self.directory} is being written by another process")
        try:
            shutil.rmtree(self.directory)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be removed ({error})") from None

    def metrics(self, kind, **values):
        """Append one row to metrics.jsonl; ``kind`` is step, upper or epoch.

        JSON knows no infinity: what is not finite is null.
        """
        row = {"kind": kind, **{name: _finite(value) for name, value in values.items()}}
        print(json.dumps(row, allow_nan=False), file=self._metrics, flush=True)

    def log(self, text):
        """Append a line to log.txt."""
        print(text, file=self._log, flush=True)

    def save_best(self, checkpoint):
        """Keep the best checkpoint. Returns the hash of its file."""
        content = _saved(checkpoint)
        write_aside(self.directory / BEST_FILE, lambda file: file.write(content))
        return _hash(content)

    def load_best(self, expected, keep_as=None):
        """The best checkpoint, whose file must have the hash that ``save_best`` gave.

        ``keep_as``: also save a copy under this name, and prefer the copy on resume, because
        ``best.pt`` may have been overwritten since.
        """
        path = self.directory / BEST_FILE
        kept = self.directory / keep_as if keep_as else path
        for candidate in dict.fromkeys((kept, path)):
            with contextlib.suppress(FileNotFoundError):
                content = candidate.read_bytes()
                if _hash(content) == expected:
                    if candidate != kept:
                        write_aside(kept, lambda file, content=content: file.write(content))
                    return _loaded(content)
        raise RunError(
            f"{path} is not the checkpoint that this run wrote, so there is nothing to test: "
            "put it back, or start the run again with --overwrite 1"
        )

    def save_checkpoint(self, step, state):
        """Keep ``state`` to continue from, in a file whose name ends in the hash of its content."""
        for file in self._appended_files():  # on disk before a checkpoint counts on them
            if file.name != LOG_FILE:
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        sizes = {file.name: file.stat().st_size for file in self._appended_files()}
        content = _saved({"state": state, "sizes": sizes})
        path = self.directory / f"step-{step:08d}.{_hash(content)}.pt"
        write_aside(path, lambda file: file.write(content))
        # Of later steps there is only what was not used, as damaged: it takes no good one's place.
        found = self._checkpoints()
        earlier = [old for old in found if old.name < f"step-{step:08d}"]
        for old in set(found) - {path, *earlier[: CHECKPOINTS_KEPT - 1]}:
            old.unlink()

    def save_margins(self, margins):
        """Keep the training samples' mean margins, an array (n,)."""
        write_aside(self.directory / MARGINS_FILE, lambda file: np.save(file, margins))

    def load_checkpoint(self):
        """The newest undamaged state, or None; metrics and log are cut back to what they were then.

        A damaged file is named in a warning, and the one before it is used.
        """
        for path in self._checkpoints():
            content = path.read_bytes()
            problem = "is damaged"
            if _hash(content) == path.name.split(".")[1]:
                saved = _loaded(content)
                sizes = saved["sizes"]
                current = {file.name: file.stat().st_size for file in self._appended_files()}
                lost = [
                    name
                    for name, size in sizes.items()
                    if name != LOG_FILE and current.get(name, 0) < size
                ]
                if not lost:
                    for name, size in current.items():
                        os.truncate(self.directory / name, min(size, sizes.get(name, 0)))
                    return saved["state"]
                problem = f"counts on more than is left of {', '.join(lost)}"
            print(f"warning: {path} {problem}, and is not used", file=sys.stderr, flush=True)
        for file in self._appended_files():
            os.truncate(file, 0)
        return None

    def _checkpoints(self):
        """Newest first."""
        return sorted(self.directory.glob("step-*.*.pt"), reverse=True)

    def _appended_files(self):
        paths = (self.directory / name for name in (METRICS_FILE, SCHEDULE_FILE, LOG_FILE))
        return [path for path in paths if path.exists()]

    def finished(self):
        """The summary, if the run has come to its end; else None."""
        path = self.directory / SUMMARY_FILE
        return read_json(path) if path.exists() else None

    def summarise(self, summary):
        write_json(self.directory / SUMMARY_FILE, summary)

    def close(self):
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError):  # a line that a full disk refused before
                file.close()
        self._lock.release()


class NoRecord:
    """Stands in for ``RunRecord`` where nothing is to be written."""

    directory = None

    def ignore(self, *args, **kwargs):
        """Does nothing."""

    metrics = log = save_best = save_checkpoint = save_margins = summarise = close = ignore
    finished = load_checkpoint = ignore


def open_record(run):
    """The directory of a ``Run``; its name is chosen here where the configuration has none."""
    config = run.config
    parent = Path(config.record_dir) / config.setting
    if config.exp_name is None:
        config.exp_name = free_name(parent, f"train_{config.method}_seed{config.seed}")
    return RunRecord(
        parent / config.exp_name,
        description(run),
        overwrite=config.overwrite,
        resume=config.resume,
    )


def description(run):
    """Everything that determines a ``Run``, for config.json."""
    split, config = run.split, run.config
    return {
        "config": {name: getattr(config, name) for name in FIELDS},
        "setting": config.setting,
        "plugin": run.plugin,
        "data": {
            "fingerprint": split.fingerprint,
            "data_root": str(split.data_root),
            "split_seed": split.info["split_seed"],
            "aux_shot": split.info["aux_shot"],
            "classes": split.target.classes,
            "sets": {name: len(indices) for name, indices in split.indices.items()},
            "trained_on": run.trained_on,
        },
        "environment": environment(config.device),
    }


def differences_of_run(directory, wanted):
    """What the run recorded in ``directory`` does otherwise, a list of phrases.

    Args: ``wanted``: a ``description``, or as much of it as must agree: "config" (settings that are
    missing are not compared), "data" with its fingerprint, "plugin". Raises UserError: there is no
    record of a run.
    """
    path = Path(directory) / CONFIG_FILE
    recorded = read_json(path)
    try:
        found, data = recorded["config"], recorded["data"]["fingerprint"]
        plugin = recorded["plugin"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: not written by a run of this version") from None
    settings = json.loads(json.dumps(wanted["config"]))  # as JSON holds them
    differences = [
        f"{name} was {found.get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if name not in NEUTRAL and found.get(name) != value
    ]
    if data != wanted["data"]["fingerprint"]:
        differences.append("the data or its split have changed")
    if plugin != wanted["plugin"]:
        differences.append("the content of --plugin has changed")
    return differences


def free_name(directory, name):
    """``name``, or the first of name_2, name_3, ... that ``directory`` does not hold yet."""
    candidate, number = name, 1
    while os.path.exists(Path(directory) / candidate):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _saved(value):
    """What ``torch.save`` writes of ``value``, as bytes: its own writing hides why a disk fails."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loaded(content):
    """What ``_saved`` was given. No code in ``content`` is executed."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


def environment(device="cpu"):
    """Versions, git revision and machine: what a run depends on beside its configuration."""
    packages = ("torch", "torchvision", "numpy", "pillow", "tqdm")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "git_revision": _git_revision(),
        "machine": platform.machine(),
        "processor": processor(device),
        "threads": torch.get_num_threads(),
    }


def processor(device="cpu"):
    """The model of the processor that computes on ``device``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = {}
    with contextlib.suppress(OSError):  # a file of Linux
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    # Virtual machines often shorten the name, as to "AMD EPYC": the numbers tell models apart.
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def _git_revision():
    """The revision of this code, with -dirty if it was changed since; None outside git.

    ``results/`` is no code: a sweep that writes there does not make its own runs dirty.
    """
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return None
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)results"
    )
    return revision + "-dirty" if changed else revision


def _git(*arguments):
    """What git prints in the folder of this file; None if it fails."""
    command = ["git", *arguments]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
