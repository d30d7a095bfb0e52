"""What a run leaves on disk: configuration, metrics, log, best checkpoint, summary."""

import contextlib
import json
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


class RunRecord:
    """A run's directory. Files are written aside and renamed, or appended a whole line at a time.

    Args:
        directory: created here; UserError if it is there already, unless ``overwrite``.
        config: JSON-able mapping of everything that determines the run.
    """

    def __init__(self, directory, config, overwrite=False):
        self.directory = Path(directory)
        if overwrite:
            self._remove_run()
        try:
            self.directory.mkdir(parents=True)
        except FileExistsError:
            raise UserError(
                f"{self.directory} holds a run already: give another --exp_name, leave --exp_name "
                "out for a new one, or replace the run with --overwrite 1"
            ) from None
        except OSError as error:
            raise UserError(f"{self.directory} cannot be created ({error.strerror})") from None
        write_json(self.directory / CONFIG_FILE, config)
        self._metrics = open(self.directory / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._log = open(self.directory / LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115

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
        """Append one row to metrics.jsonl; ``kind`` is step, upper or epoch."""
        print(json.dumps({"kind": kind, **values}), file=self._metrics, flush=True)

    def log(self, text):
        """Append a line to log.txt."""
        print(text, file=self._log, flush=True)

    def save_best(self, checkpoint):
        write_aside(self.directory / BEST_FILE, lambda file: torch.save(checkpoint, file))

    def load_best(self):
        return torch.load(self.directory / BEST_FILE, map_location="cpu", weights_only=True)

    def summarise(self, summary):
        write_json(self.directory / SUMMARY_FILE, summary)

    def close(self):
        self._metrics.close()
        self._log.close()


class NoRecord:
    """Stands in for ``RunRecord`` where nothing is to be written."""

    directory = None

    def ignore(self, *args, **kwargs):
        """Does nothing."""

    metrics = log = save_best = summarise = close = ignore


def free_name(directory, name):
    """``name``, or the first of name_2, name_3, ... that ``directory`` does not hold yet."""
    candidate, number = name, 1
    while (Path(directory) / candidate).exists():
        number += 1
        candidate = f"{name}_{number}"
    return candidate


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
