"""A cache of a split's decoded and resized images: one memory-mapped file.

DIRECTORY/images-SIDE-KEY.cache holds the images of all sets, in the order of their paths:

    index    a .npy array, a row per image: height, width, and the modification time and digest of
             the file it was decoded from
    pixels   uint8 (height, width, 3), one image after another, without gaps

KEY is a hash of the images' paths and byte sizes and of the decoder's versions, so a cache holds
exactly the pixels that decoding gives now. Opening a cache also compares modification times: an
image with another time is read again and compared by its digest. If any image has changed, the
cache is rebuilt.

A builder holds DIRECTORY/.lock, writes aside and renames at the end. A second builder waits for it.
The leftovers of a killed builder are never used; the next builder removes them. A cache may be
deleted at any time: a run that has it open keeps it, the next run rebuilds it.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import numpy as np
import PIL
import torch
import torchvision
from PIL import features
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from auxilearn.data.cub import hash_file
from auxilearn.data.dataset import (
    DecodedImages,
    load_resized,
    opened,
    resized_side,
    shape_to_load,
)
from auxilearn.errors import UserError
from auxilearn.files import locked, write_aside

LAYOUT = 1  # raise it with every change of the file format
INDEX = np.dtype([("height", "<i4"), ("width", "<i4"), ("mtime_ns", "<i8"), ("digest", "<u8")])
FILLED = 0.9  # largest share of the free space: the runs need some too


class CacheError(UserError):
    """No cache can be kept here. The images themselves may be fine."""


def open_images(split, image_size, directory, workers, build=True):
    """The loader of a split's images, resized for crops of ``image_size`` pixels.

    Args:
        directory: of the ``ImageCache``, created if needed; "none" decodes every time. If no cache
            can be kept, images are decoded, with a warning.
        workers: processes that build a missing cache.
        build: False uses an existing cache or decodes, and writes nothing.

    Raises UserError: an image that cannot be read.
    """
    if directory != "none":
        try:
            images = open_cache(split, image_size, directory, workers, build)
            if images is not None:
                return images
        except CacheError as error:
            print(
                f"warning: {error}; without a cache the images are decoded every time, as with "
                "--cache_dir none",
                file=sys.stderr,
                flush=True,
            )
    return DecodedImages(split, image_size)


def open_cache(split, image_size, directory, workers, build=True):
    """The ``ImageCache`` of a split's images in ``directory``, built by ``workers`` if need be.

    None if it does not exist and ``build`` is False.

    Raises UserError for an image that cannot be read, CacheError if no cache can be kept.
    """
    files = ImageFiles(split, resized_side(image_size))
    path = Path(directory) / f"images-{files.side}-{files.key()}.cache"
    content = _read_current(path, files)
    if content is None:
        if not build:
            return None
        with _alone_in(path.parent):
            content = _read_current(path, files)  # another process may have built it meanwhile
            if content is None:
                _build(path, files, workers)
                content = _read_current(path, files)
    if content is None:
        raise UserError(f"the images in {split.data_root} change while they are being read")
    return ImageCache(path, files.rows, *content)


class ImageCache:
    """The images of a split, decoded and resized before: ``DecodedImages`` without the work.

    The pixels stay in the file, mapped into memory that all processes share.

    Args:
        path: of the cache.
        rows: {position in the split: row of the index}.
        index, pixels: its content.
    """

    def __init__(self, path, rows, index, pixels):
        self.path = path
        self.rows = rows
        self.index = index
        self.pixels = pixels
        self.shapes = list(zip(index["height"].tolist(), index["width"].tolist(), strict=True))
        self.ends = np.cumsum(_byte_counts(index)).tolist()

    def __reduce__(self):
        # For workers that are not forked: they map the file themselves.
        return _reopen, (self.path, self.rows, self.index)

    def load(self, position):
        """The image at ``position`` in the split: uint8 (3, H, W), to be read only."""
        row = self.rows[int(position)]
        height, width = self.shapes[row]
        end = self.ends[row]
        image = self.pixels[end - 3 * height * width : end].view(height, width, 3)
        return image.permute(2, 0, 1)


def _reopen(path, rows, index):
    content = _read(path, len(index))
    if content is None or not np.array_equal(content[0], index):
        raise UserError(f"{path} was replaced or removed while a run used it; start the run again")
    return ImageCache(path, rows, *content)


# --------------------------------------------------------------------------------------------------
# The files of a cache
# --------------------------------------------------------------------------------------------------


class ImageFiles:
    """The image files of all sets of a split as they are now: n, in the order of their paths.

    Raises UserError for a missing file.
    """

    def __init__(self, split, side):
        positions = np.unique(np.concatenate(list(split.indices.values()))).tolist()
        self.side = side
        self.names = sorted({split.paths[position] for position in positions})
        self.paths = [split.data_root / "images" / name for name in self.names]
        row = {name: i for i, name in enumerate(self.names)}
        self.rows = {position: row[split.paths[position]] for position in positions}
        status = [self._status(path) for path in self.paths]
        self.byte_sizes = [s.st_size for s in status]
        self.mtimes = np.array([s.st_mtime_ns for s in status])  # (n,)

    @staticmethod
    def _status(path):
        try:
            return path.stat()
        except OSError as error:
            raise UserError(f"{path}: the image cannot be read ({error.strerror})") from None

    def key(self):
        """A hash of the images' identities and of the versions that decode them."""
        parts = [LAYOUT, _decoder_versions(), self.names, self.byte_sizes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def differ_from(self, index):
        """Whether any file is no longer the one that ``index`` was written from."""
        suspects = np.flatnonzero(index["mtime_ns"] != self.mtimes)
        return any(_digest(self.paths[i]) != index["digest"][i] for i in suspects)


def _decoder_versions():
    codecs = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "webp")}
    resizer = torchvision.__version__.split("+")[0]  # builds for CPU and GPU resize alike
    return {"pillow": PIL.__version__, "torchvision": resizer, **codecs}


def _digest(path):
    return int(hash_file(path)[:16], 16)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def _read(path, rows):
    """(index (rows,), pixels) of the cache at ``path``, or None if there is no complete one."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            index = _read_index(file, rows, size)
            start = file.tell()
            if index is None or size != start + _byte_counts(index).sum():
                return None
            pixels = np.memmap(file, np.uint8, "r", offset=start)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"the image cache {path} cannot be read ({error.strerror})") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return index, torch.from_numpy(pixels)


def _read_index(file, rows, size):
    """The index (rows,) at the start of a file of ``size`` bytes, or None if it is not an index.

    Its header is known, so it is compared, not parsed.
    """
    expected = io.BytesIO()
    array = np.lib.format.header_data_from_array_1_0(np.empty(rows, INDEX))
    np.lib.format.write_array_header_1_0(expected, array)
    length = rows * INDEX.itemsize
    if file.read(expected.tell()) != expected.getvalue() or file.tell() + length > size:
        return None
    index = np.frombuffer(file.read(length), INDEX).copy()
    counts = _byte_counts(index)
    sound = (index["height"] > 0) & (index["width"] > 0) & (counts > 0) & (counts <= size)
    return index if sound.all() else None


def _read_current(path, files):
    """(index, pixels) of the cache at ``path`` if it holds ``files`` as they are now, else None."""
    content = _read(path, len(files.paths))
    if content is None or files.differ_from(content[0]):
        return None
    return content


def _byte_counts(index):
    return 3 * index["height"].astype(np.int64) * index["width"]


# --------------------------------------------------------------------------------------------------
# Building
# --------------------------------------------------------------------------------------------------


@contextmanager
def _alone_in(directory):
    """Hold the lock of a cache directory. Create the directory, remove leftovers."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = locked(directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(
                f"waiting for another process, which builds an image cache in {directory}",
                flush=True,
            )
            lock.acquire()
    except OSError as error:
        raise CacheError(
            f"no image cache can be written to {directory} ({error.strerror})"
        ) from None
    with lock:
        for leftover in directory.glob(".images-*.cache.*"):
            with suppress(OSError):
                leftover.unlink()
        yield


def _build(path, files, workers):
    """Decode ``files`` into a new cache at ``path``, after saying how large it will be."""
    index = np.zeros(len(files.paths), INDEX)
    index["mtime_ns"] = files.mtimes
    for row, image_path in enumerate(_progress(files.paths, "measuring images")):
        with opened(image_path) as image:
            shape = shape_to_load(image, files.side)
        index["height"][row], index["width"][row] = shape
    size = INDEX.itemsize * len(index) + int(_byte_counts(index).sum())
    free = shutil.disk_usage(path.parent).free
    if size > FILLED * free:
        raise CacheError(
            f"the image cache takes {_readable(size)}, but {path.parent} has {_readable(free)} free"
        )
    print(
        f"image cache: writing {len(index):,} images, shorter side {files.side} pixels, "
        f"{_readable(size)}, to {path.parent} (once; --cache_dir none decodes instead)",
        flush=True,
    )
    try:
        write_aside(path, lambda file: _write(file, index, files, workers))
    except OSError as error:
        raise CacheError(
            f"the image cache cannot be written to {path.parent} ({error.strerror})"
        ) from None


def _write(file, index, files, workers):
    np.lib.format.write_array(file, index)  # to be overwritten: it lacks the digests
    decoded = DataLoader(
        _FilesToDecode(files),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        generator=torch.Generator(),  # so that it draws nothing from the global one
    )
    for row, item in enumerate(_progress(decoded, "decoding images")):
        if isinstance(item, UserError):
            raise item
        index["digest"][row], image = item
        if image.shape[1:] != (index["height"][row], index["width"][row]):
            raise UserError(f"{files.paths[row]}: the image changed while it was read")
        file.write(image.permute(1, 2, 0).contiguous().numpy())
    file.seek(0)
    np.lib.format.write_array(file, index)


class _FilesToDecode(Dataset):
    def __init__(self, files):
        self.paths, self.side = files.paths, files.side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        """(digest, image (3, H, W)), or the UserError that explains the failure."""
        try:
            # In this order a file that is replaced in between leaves a digest that is not its own.
            return _digest(self.paths[row]), load_resized(self.paths[row], self.side)
        except UserError as error:
            return error


def _progress(items, what):
    return tqdm(items, what, unit="image", dynamic_ncols=True, disable=None, leave=False)


def _readable(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
