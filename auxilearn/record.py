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
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from auxilearn.errors import UserError

CONFIG_FILE, METRICS_FILE, LOG_FILE = "config.json", "metrics.jsonl", "log.txt"
BEST_FILE, SUMMARY_FILE = "best.pt", "summary.json"
CHECKPOINTS_KEPT = 2


class RunRecord:
    """A run's directory. Files are written aside and renamed, or appended a whole line at a time.

    Args:
        directory: created here; UserError if it is there already, unless ``overwrite``.
        description: JSON-able mapping of everything that determines the run.
        resume: goes on with the run that is there, whose configuration must be the same; with
            ``neutral``, the settings that may differ because no result depends on them.
    """

    def __init__(self, directory, description, overwrite=False, resume=False, neutral=()):
        self.directory = Path(directory)
        if overwrite:
            self._remove_run()
        if resume and (self.directory / CONFIG_FILE).exists():
            self._check_same_run(description, neutral)
        else:
            self._create(description, resume)
        self._metrics = open(self.directory / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._log = open(self.directory / LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115

    def _create(self, description, resume):
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
        write_json(self.directory / CONFIG_FILE, description)

    def _check_same_run(self, description, neutral):
        recorded = read_json(self.directory / CONFIG_FILE)
        try:
            settings, data = recorded["config"], recorded["data"]["fingerprint"]
        except (KeyError, TypeError):
            raise UserError(f"{self.directory / CONFIG_FILE}: not written by a run") from None
        differences = [
            f"{name} was {settings.get(name)!r} and is {value!r}"
            for name, value in description["config"].items()
            if name not in neutral and settings.get(name) != value
        ]
        if data != description["data"]["fingerprint"]:
            differences.append("the data or its split have changed")
        if differences:
            raise UserError(
                f"{self.directory} cannot be continued with another configuration: "
                f"{'; '.join(differences)}"
            )

    def _remove_run(self):
        if not self.directory.exists():
            return
        if not (self.directory / CONFIG_FILE).exists():
            raise UserError(
                f"{self.directory} holds no run ({CONFIG_FILE} is missing), so --overwrite leaves "
                "it alone: remove it by hand or give another --exp_name"
            )
        shutil.rmtree(self.directory)

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
        write_aside(self.directory / BEST_FILE, lambda file: torch.save(checkpoint, file))

    def load_best(self):
        return torch.load(self.directory / BEST_FILE, map_location="cpu", weights_only=True)

    def save_checkpoint(self, step, state):
        """Keep ``state`` to continue from, in a file whose name ends in the hash of its content."""
        buffer = io.BytesIO()
        files = self._appended_files()
        torch.save({"state": state, "sizes": {f.name: f.stat().st_size for f in files}}, buffer)
        content = buffer.getvalue()
        path = self.directory / f"step-{step:08d}.{_hash(content)}.pt"
        write_aside(path, lambda file: file.write(content))
        for old in self._checkpoints()[CHECKPOINTS_KEPT:]:
            old.unlink()

    def load_checkpoint(self):
        """The newest undamaged state, or None; metrics and log are cut back to what they were then.

        A damaged file is named in a warning, and the one before it is used.
        """
        for path in self._checkpoints():
            content = path.read_bytes()
            if _hash(content) == path.name.split(".")[1]:
                saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                for file in self._appended_files():
                    os.truncate(file, saved["sizes"].get(file.name, 0))
                return saved["state"]
            print(f"warning: {path} is damaged, and not used", file=sys.stderr, flush=True)
        for file in self._appended_files():
            os.truncate(file, 0)
        return None

    def _checkpoints(self):
        """Newest first."""
        return sorted(self.directory.glob("step-*.*.pt"), reverse=True)

    def _appended_files(self):
        return sorted([*self.directory.glob("*.jsonl"), self.directory / LOG_FILE])

    def finished(self):
        """The summary, if the run has come to its end; else None."""
        path = self.directory / SUMMARY_FILE
        return read_json(path) if path.exists() else None

    def summarise(self, summary):
        write_json(self.directory / SUMMARY_FILE, summary)

    def close(self):
        self._metrics.close()
        self._log.close()


class NoRecord:
    """Stands in for ``RunRecord`` where nothing is to be written."""

    directory = None

    def finished(self):
        """Never."""

    load_checkpoint = finished

    def ignore(self, *args, **kwargs):
        """Does nothing."""

    metrics = log = save_best = save_checkpoint = summarise = close = ignore


def free_name(directory, name):
    """``name``, or the first of name_2, name_3, ... that ``directory`` does not hold yet."""
    candidate, number = name, 1
    while (Path(directory) / candidate).exists():
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(path):
    """The content of a JSON file; UserError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


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
