"""Files that may be anything: how they are opened, and their names on a command line."""

import argparse
import errno
import os
import stat
from pathlib import Path


def open_regular(path):
    """A file opened to read bytes. OSError as from ``open``, and for a pipe or a device.

    Those would be waited for, or read, for ever.
    """
    return _regular(open(path, "rb", opener=_open_at_once))


def read_regular(path):
    """The bytes of a file, as ``open_regular`` opens it."""
    with open_regular(path) as file:
        return file.read()


def append_regular(path):
    """A text file opened to append to, made if need be. OSError as from ``open_regular``."""
    return _regular(
        open(path, "a", encoding="utf-8", errors="backslashreplace", opener=_open_at_once)
    )


def named(text):
    """The ``Path`` of a word of a command line; argparse refuses an empty one, as of a variable
    that is not set, which would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, not an empty word")
    return Path(text)


def _open_at_once(name, flags):
    """An ``opener``; opening a pipe waits for its other end otherwise."""
    return os.open(name, flags | os.O_NONBLOCK, 0o666)


def _regular(file):
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(file.name))
    return file


def is_text(value):
    """Whether ``value`` is a string that can be written; JSON may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)
