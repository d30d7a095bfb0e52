"""What a run leaves on disk: configuration, metrics, log, best checkpoint, summary."""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import torch

from auxilearn.errors import RunError, UserError
from auxilearn.files import append_regular, open_regular, read_regular

CONFIG_FILE, METRICS_FILE, LOG_FILE = "config.json", "metrics.jsonl", "log.txt"
SCHEDULE_FILE = "schedule.jsonl"
BEST_FILE, SUMMARY_FILE = "best.pt", "summary.json"
START_FILE = "fine_tuning_start.pt"
CHECKPOINTS_KEPT = 2
LOCK_TRIES = 5


class RunRecord:
    """A run's directory. Files are written aside and renamed, or appended a whole line at a time.

    Args:
        directory: created here; UserError if it is there already, unless ``overwrite``.
        description: JSON-able mapping of everything that determines the run.
        resume: goes on with the run that is there, whose configuration must be the same; with
            ``neutral``, the settings that may differ because no result depends on them, and
        ``defaults``, {name: value} of settings that an older version may not have recorded.
    """

    def __init__(
        self, directory, description, overwrite=False, resume=False, neutral=(), defaults=None
    ):
        self.directory = Path(directory)
        if overwrite:
            self._remove_run()
        self._make_directory(resume)
        try:
            self._log = self._locked_log()
            for pattern in (".*.pt.*", ".*.json.*"):
                for leftover in self.directory.glob(pattern):  # of ``write_aside``, killed in it
                    leftover.unlink()
            self.events = None  # a ``report.tensorboard.Events`` that gets the rows as well
            self._metrics = append_regular(self.directory / METRICS_FILE)
            if resume and (self.directory / CONFIG_FILE).exists():
                self._check_same_run(description, neutral, defaults)
            else:
                write_json(self.directory / CONFIG_FILE, description)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be written ({error.strerror})") from None

    def _make_directory(self, resume):
        try:
            # A run that was killed at its very start leaves a folder without configuration.
            self.directory.mkdir(parents=True, exist_ok=resume)
        except FileExistsError:
            raise UserError(
                f"{self.directory} holds a run already: continue it with --resume 1, replace it "
                "with --overwrite 1, give another --exp_name, or leave --exp_name out for a new one"
            ) from None
        except OSError as error:
            raise UserError(f"{self.directory} cannot be created ({error.strerror})") from None

    def _locked_log(self):
        """log.txt, held by this process alone for as long as it lives."""
        log = append_regular(self.directory / LOG_FILE)
        for attempt in range(LOCK_TRIES):
            try:
                # Unlike flock, not shared with worker processes, which outlive a killed run a
                # little; but lost as soon as this process closes any handle of the file.
                fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if attempt < LOCK_TRIES - 1:  # who looks whether it is locked locks it for a moment
                    time.sleep(0.1)
                    continue
                log.close()
                raise UserError(
                    f"{self.directory} is being written by another process: wait for its end, or "
                    "give another --exp_name"
                ) from None
            except OSError:
                break  # a file system without locks
        return log

    def _check_same_run(self, description, neutral, defaults):
        settings = {k: v for k, v in description["config"].items() if k not in neutral}
        differences = differences_of_run(
            self.directory, settings, description["data"]["fingerprint"], defaults
        )
        if differences:
            raise UserError(
                f"{self.directory} cannot be continued with another configuration: "
                f"{'; '.join(differences)}"
            )

    def _remove_run(self):
        if not os.path.exists(self.directory):  # or may not be looked at: see _make_directory
            return
        if not os.path.exists(self.directory / CONFIG_FILE):
            raise UserError(
                f"{self.directory} holds no run ({CONFIG_FILE} is missing), so --overwrite leaves "
                "it alone: remove it by hand or give another --exp_name"
            )
        try:
            with self._locked_log():
                shutil.rmtree(self.directory)
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot be removed ({error.strerror or error})"
            ) from None

    def metrics(self, kind, **values):
        """Append one row to metrics.jsonl; ``kind`` is step, upper or epoch.

        JSON knows no infinity: what is not finite is null.
        """
        row = {"kind": kind, **{name: _finite(value) for name, value in values.items()}}
        print(json.dumps(row, allow_nan=False), file=self._metrics, flush=True)
        if self.events is not None:
            self.events.metrics(row)

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

        ``keep_as``: name of a file to keep it in, and to take it from where it is kept: a run that
        is killed later, and goes on from here, finds a better one in its place.
        """
        path = self.directory / BEST_FILE
        if keep_as:
            kept = self.directory / keep_as
            if kept.exists() and _hash(read_regular(kept)) == expected:
                path = kept
        try:
            content = read_regular(path)
        except OSError:
            content = b""
        if keep_as and path != kept and _hash(content) == expected:
            write_aside(kept, lambda file: file.write(content))
        if _hash(content) != expected:
            raise RunError(
                f"{path} is not the checkpoint that this run wrote, so there is nothing to test: "
                "put it back, or start the run again with --overwrite 1"
            )
        return _loaded(path, content)

    def save_checkpoint(self, step, state):
        """Keep ``state`` to continue from, in a file whose name ends in the hash of its content."""
        for path in self._appended_files():  # on disk before a checkpoint counts on them
            if path.name != LOG_FILE:
                with open_regular(path) as file:
                    os.fsync(file.fileno())
        sizes = {file.name: file.stat().st_size for file in self._appended_files()}
        content = _saved({"state": state, "sizes": sizes})
        path = self.directory / f"step-{step:08d}.{_hash(content)}.pt"
        write_aside(path, lambda file: file.write(content))
        # Of later steps there is only what was not used, as damaged: it takes no good one's place.
        found = self._checkpoints()
        earlier = [old for old in found if old.name < f"step-{step:08d}"]
        for old in set(found) - {path, *earlier[: CHECKPOINTS_KEPT - 1]}:
            old.unlink()

    def load_checkpoint(self, check=lambda state: None):
        """The newest undamaged state, or None; metrics and log are cut back to what they were then.

        A damaged file is named in a warning, and the one before it is used. ``check(state)`` raises
        what is wrong with a state, before anything is cut.
        """
        for path in self._checkpoints():
            try:
                content = read_regular(path)
                problem = None if _hash(content) == path.name.split(".")[1] else "is damaged"
            except OSError as error:
                problem = f"cannot be read ({error.strerror})"
            if not problem:
                state, sizes = _checkpoint_parts(path, _loaded(path, content))
                current = {file.name: file.stat().st_size for file in self._appended_files()}
                lost = [
                    name
                    for name, size in sizes.items()
                    if name != LOG_FILE and current.get(name, 0) < size
                ]
                if not lost:
                    check(state)
                    for name, size in current.items():
                        os.truncate(self.directory / name, min(size, sizes.get(name, 0)))
                    return state
                problem = f"counts on more than is left of {', '.join(lost)}"
            print(f"warning: {path} {problem}, and is not used", file=sys.stderr, flush=True)
        for file in self._appended_files():
            os.truncate(file, 0)
        return None

    def _checkpoints(self):
        """Newest first."""
        found = sorted(self.directory.glob("step-*.*.pt"), reverse=True)
        return [path for path in found if not path.is_dir()]

    def _appended_files(self):
        paths = (self.directory / name for name in (METRICS_FILE, SCHEDULE_FILE, LOG_FILE))
        return [path for path in paths if path.exists()]

    def finished(self):
        """The summary, if the run has come to its end; else None."""
        path = self.directory / SUMMARY_FILE
        if not path.exists():
            return None
        summary = read_json(path)
        if not isinstance(summary, dict) or not isinstance(summary.get("test_accuracy"), float):
            raise UserError(f"{path}: not written by a run; remove it to end the run again")
        return summary

    def summarise(self, summary):
        write_json(self.directory / SUMMARY_FILE, summary)

    def close(self):
        if self.events is not None:
            self.events.close()
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError):  # a line that a full disk refused before
                file.close()


class NoRecord:
    """Stands in for ``RunRecord`` where nothing is to be written."""

    directory = None

    def finished(self, *_):
        """Never."""

    load_checkpoint = finished

    def ignore(self, *args, **kwargs):
        """Does nothing."""

    metrics = log = save_best = save_checkpoint = summarise = close = ignore


def is_locked(log):
    """Whether another process holds the lock on ``log``, an open file."""
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(log, fcntl.LOCK_UN)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # a file system without locks
        return False
    return False


def differences_of_run(directory, settings, fingerprint, defaults=None):
    """What the run recorded in ``directory`` does otherwise, a list of phrases.

    Args: ``settings`` {name: value} that it should have, ``fingerprint`` of its data, ``defaults``
    {name: value} of settings that its record may be too old to hold. Raises UserError: there is
    no record of a run.
    """
    path = Path(directory) / CONFIG_FILE
    recorded = read_json(path)
    try:
        found, data = (defaults or {}) | recorded["config"], recorded["data"]["fingerprint"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not written by a run") from None
    differences = [
        f"{name} was {found.get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    if data != fingerprint:
        differences.append("the data or its split have changed")
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


def load_tensors(file):
    """What ``torch.save`` wrote to ``file``, open to read bytes, on the CPU. Runs no code from it.

    Raises many kinds on what is not its own, and ValueError for an archive that holds more than its
    own size: ``torch.save`` packs nothing, but ``torch.load`` would unpack what others have packed.
    """
    if zipfile.is_zipfile(file):
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > size:
                raise ValueError("its members are larger than the file")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _loaded(path, content):
    """What ``_saved`` was given; no code in ``content`` is executed. UserError names ``path``."""
    try:
        return load_tensors(io.BytesIO(content))
    except Exception as error:  # of many kinds, on what is not torch's
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: not a checkpoint that can be read safely ({first_line})"
        ) from None


def _checkpoint_parts(path, saved):
    """(state, {file name: size}) of a checkpoint's content. UserError if it is something else."""
    match saved:
        case {"state": dict(state), "sizes": dict(sizes)} if all(
            isinstance(size, int) and size >= 0 for size in sizes.values()
        ):
            return state, sizes
    raise UserError(f"{path}: not a checkpoint of a run")


def _hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(path):
    """The content of a JSON file; UserError if it cannot be read."""
    try:
        return json.loads(read_regular(path).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def write_json(path, content):
    text = json.dumps(content, indent=2) + "\n"
    write_aside(path, lambda file: file.write(text.encode()))


def write_aside(path, write):
    """Call ``write(binary file)`` on a temporary neighbour of ``path``, sync it, and rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def environment():
    """Versions, git revision and machine: what a run depends on beside its configuration."""
    packages = ("torch", "torchvision", "numpy", "pillow", "tqdm")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "git_revision": _git_revision(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _git_revision():
    """The revision of this code, with -dirty if it was changed since; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
