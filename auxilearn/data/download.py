"""Fetching and unpacking the published archive, safely and without starting over."""

import os
import re
import shutil
import tarfile
import tempfile
import time
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from auxilearn.data.cub import ATTRIBUTES, IMAGES
from auxilearn.errors import UserError
from auxilearn.files import hash_file

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
CUB_FOLDER = "CUB_200_2011"

_BLOCK = 1 << 16
_BYTES = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "disable": None}


def fetch_cub(directory):
    """Put the published data set into ``directory``: ``CUB_200_2011/`` and ``attributes.txt``.

    An archive that already lies there is used if its checksum is right; a finished
    ``CUB_200_2011/`` is left as it is. Returns the path of ``CUB_200_2011/``. Raises ``UserError``
    as ``fetch`` and ``unpack`` do.
    """
    directory = Path(directory)
    root = directory / CUB_FOLDER
    if (root / IMAGES).is_file():
        return root
    _check_vacant(root)
    archive = fetch(CUB_URL, directory / f"{CUB_FOLDER}.tgz", CUB_MD5)
    return unpack(archive, directory)


# ---------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------


def fetch(url, path, md5, *, attempts=4, pause=1.0, timeout=30.0):
    """Download ``url`` to ``path`` and verify its MD5; returns ``path``.

    The bytes gather in ``path`` + ``.part``, which the next attempt or the next run continues. A
    dropped connection is tried again up to ``attempts`` times without a new byte, waiting
    ``pause``, 2 ``pause``, ... seconds. A file that is already at ``path`` is used if its checksum
    is right.

    Raises ``UserError`` when the server can not be reached or refuses, the disk is too small, the
    checksum of what came is wrong (the download is then removed), or a file with another checksum
    lies at ``path`` (it is left alone).
    """
    path = Path(path)
    if path.exists():
        _check_present(path, md5)
        return path
    part = path.with_name(path.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from None
    try:
        with tqdm(desc=path.name, **_BYTES) as bar:
            _download(url, part, bar, attempts, pause, timeout, by_hand=path)
    finally:
        if part.stat().st_size == 0:
            part.unlink()
    found = hash_file(part, "md5")
    if found != md5:
        part.unlink()
        raise UserError(
            f"the file from {url} has MD5 {found}, expected {md5}; the download was removed: "
            f"run again, or put the right file at {path}"
        )
    os.replace(part, path)
    return path


def _check_present(path, md5):
    found = hash_file(path, "md5")
    if found != md5:
        raise UserError(
            f"{path} has MD5 {found}, expected {md5}; it is incomplete or another file: "
            "move it away and run again"
        )


def _download(url, part, bar, attempts, pause, timeout, by_hand):
    """Call ``_continue`` until ``part`` is complete, or ``attempts`` in a row brought nothing."""
    failures, longest = 0, part.stat().st_size
    while True:
        try:
            if _continue(url, part, bar, timeout):
                return
            reason = "the connection was dropped"
        except HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 416, 429):
                failures = attempts  # the server's mind is made up
        except (OSError, HTTPException) as error:  # URLError, timeouts and resets are OSErrors
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        size = part.stat().st_size
        failures = 1 if size > longest else failures + 1
        longest = max(longest, size)
        if failures > attempts:
            raise UserError(
                f"could not download {url} ({reason}); run again to continue, or fetch it on "
                f"another machine and put it at {by_hand}"
            )
        time.sleep(pause * 2 ** (failures - 1))


def _continue(url, part, bar, timeout):
    """One request for the rest of ``part``. True when it is complete, False when cut short."""
    start = part.stat().st_size
    headers = {"User-Agent": "auxilearn"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        # The rest of a complete file is an empty range, which a server refuses with 416.
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code == 416 and whole and int(whole[1]) == start:
            return True
        if error.code == 416:
            os.truncate(part, 0)
        raise
    with response:
        sent_range = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or not sent_range or int(sent_range[1]) != start:
            if response.status == 206:  # some other range than was asked for
                os.truncate(part, 0)
                return False
            start = 0  # the server ignores ranges and sends everything
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        _check_disk(part, total, start)
        bar.total, bar.initial, bar.n = total, start, start
        bar.refresh()
        _append(response, part, start, bar)
    return total is None or part.stat().st_size == total


def _check_disk(part, total, start):
    free = shutil.disk_usage(part.parent).free + part.stat().st_size - start
    if total is not None and total - start > free:
        raise UserError(
            f"{part.parent} has {free / 1e9:.2f} GB free, but {(total - start) / 1e9:.2f} GB are "
            "still to be downloaded; free some space or choose another place with --data_root"
        )


def _append(response, part, start, bar):
    with part.open("r+b") as file:
        file.truncate(start)
        file.seek(start)
        while block := response.read(_BLOCK):
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                raise UserError(f"cannot write {part}: {error.strerror}") from None
            bar.update(len(block))


# ---------------------------------------------------------------------------------------------
# Unpacking
# ---------------------------------------------------------------------------------------------


def unpack(archive, directory):
    """Unpack the archive's ``CUB_200_2011/`` and ``attributes.txt`` into ``directory``.

    Everything is unpacked into a temporary folder first; ``CUB_200_2011/`` appears under its name
    last and complete, or not at all. ``attributes.txt`` goes beside it, as the publishers have it,
    or inside it if a file of this name is already beside it. Returns the path of ``CUB_200_2011/``.

    Raises ``UserError`` for a damaged archive, one without that folder, and if the folder already
    exists.
    """
    archive, directory = Path(archive), Path(directory)
    root = directory / CUB_FOLDER
    _check_vacant(root)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".unpacking-") as aside:
            _extract(archive, Path(aside))
            _move_into_place(Path(aside), root, archive)
    except (tarfile.TarError, EOFError, zlib.error, KeyError) as error:
        raise UserError(
            f"{archive} is damaged ({error}); remove it and run again with --download"
        ) from None
    except OSError as error:
        reason = error.strerror or error  # gzip reports damage as an OSError without a number
        raise UserError(f"cannot unpack {archive} into {directory}: {reason}") from None
    return root


def _check_vacant(root):
    if os.path.lexists(root) and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(
            f"{root} already exists, but is not a complete data set; move it away and run again"
        )


def _extract(archive, aside):
    size = archive.stat().st_size
    safety = {"filter": "data"} if hasattr(tarfile, "data_filter") else {"set_attrs": False}
    with (
        open(archive, "rb") as file,
        tqdm(desc=f"unpacking {archive.name}", total=size, **_BYTES) as bar,
        tarfile.open(fileobj=file, mode="r:*") as tar,
    ):
        for member in tar:
            tar.extract(member, aside, **safety)
            bar.update(file.tell() - bar.n)


def _move_into_place(aside, root, archive):
    unpacked = aside / root.name
    if not (unpacked / IMAGES).is_file():
        raise UserError(f"{archive} has no {root.name}/{IMAGES}; expected the archive of {CUB_URL}")
    names = aside / ATTRIBUTES
    if names.is_file():
        beside = root.parent / ATTRIBUTES
        os.replace(names, unpacked / ATTRIBUTES if beside.exists() else beside)
    os.rename(unpacked, root)
