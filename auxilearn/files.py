"""Files: written whole or not at all, read with one clear error, locked by one process."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import filelock

from auxilearn.errors import UserError


def write_aside(path, write):
    """Call ``write(binary file)`` on a temporary neighbour of ``path``, sync it, and rename it."""
    path = Path(path)
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


def replace_together(folder, contents, last):
    """Write ``contents``, {name: bytes}, into ``folder``; no file is ever half-written.

    The old file ``last`` is removed first, and the new one put in place last: where it is there,
    all are.
    """
    names = sorted(contents, key=lambda name: name == last)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
        for name in names:
            with (Path(aside) / name).open("wb") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        (folder / last).unlink(missing_ok=True)
        for name in names:
            os.replace(Path(aside) / name, folder / name)


@contextlib.contextmanager
def new_folder(root):
    """A folder for the block to fill, which becomes ``root`` at its end: complete or not at all.

    UserError: ``root`` is a file, or a folder that is not empty, or it cannot be written.
    """
    root = Path(os.path.abspath(root))
    if os.path.lexists(root) and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(f"{root} is not empty; give a new folder, or move this one away")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as aside:
            draft = Path(aside) / root.name
            draft.mkdir()
            yield draft
            if root.exists():
                root.rmdir()
            os.rename(draft, root)
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror}") from None


@contextlib.contextmanager
def writing_split(split_dir):
    """Turn the OSError of a block that writes ``split_dir`` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {error.filename or split_dir}: {error.strerror}; "
            "give a folder that can be written as --out_dir"
        ) from None


def to_json(value):
    """Compact JSON, a line of bytes."""
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def bytes_or_none(path):
    return path.read_bytes() if path.is_file() else None


def hash_file(path, algorithm="sha256", cure="put it back"):
    """The hex digest of a file. Raises ``UserError`` if it can not be read."""
    digest = hashlib.new(algorithm)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {cure}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def read_json(path):
    """The content of a JSON file. UserError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def write_json(path, content):
    text = json.dumps(content, indent=2) + "\n"
    write_aside(path, lambda file: file.write(text.encode()))


def read_rows(path):
    """The rows of a .jsonl file, one dict each; [] without a file. UserError: it cannot be read.

    A line that is being written, or that a crash cut off, is left out.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not what a run writes ({error})") from None
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def locked(path, wait=-1):
    """A lock on the file ``path``, to be held in a ``with`` block; it ends with the process.

    Waits ``wait`` seconds for another holder (-1: for as long as it takes), then raises
    ``filelock.Timeout``.
    """
    return filelock.FileLock(path, timeout=wait)


def is_locked(path):
    """Whether a process holds the lock file ``path``."""
    if not Path(path).exists():
        return False
    try:
        with locked(path, wait=0):
            return False
    except filelock.Timeout:
        return True
