"""Reading files that may be anything."""

import errno
import os
import stat


def open_regular(path):
    """A file opened to read bytes. OSError as from ``open``, and for a pipe or a device.

    Those would be waited for, or read, for ever.
    """
    # Opening a pipe waits for its writer otherwise.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular(path):
    """The bytes of a file, as ``open_regular`` opens it."""
    with open_regular(path) as file:
        return file.read()
