"""Reading files that may be anything."""

import errno
import os
import stat
import zipfile


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


def append_regular(path):
    """A text file opened to append to, made if need be. OSError as from ``open_regular``."""
    file = open(  # noqa: SIM115
        path,
        "a",
        encoding="utf-8",
        errors="backslashreplace",
        opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666),
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def is_text(value):
    """Whether ``value`` is a string that can be written; JSON may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def refuse_inflating(file):
    """ValueError for a zip archive, open as ``file``, that holds more than its own size.

    ``torch.save`` packs nothing, but ``torch.load`` would unpack what others have packed.
    """
    if zipfile.is_zipfile(file):
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > size:
                raise ValueError("its members are larger than the file")
    file.seek(0)
