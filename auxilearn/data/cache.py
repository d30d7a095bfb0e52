"""A cache of a split's decoded and resized images: one file, mapped into memory.

DIRECTORY/images-SIDE-KEY.cache holds all images of the split in the order of their paths:

    shapes   two int32 per image: height, width
    pixels   uint8 (height, width, 3), one image after another, without gaps

KEY is a hash of the images' paths and byte sizes and of the decoder's versions. An image that was
replaced by another one of the same byte size goes unnoticed: remove the cache by hand then.

A builder holds DIRECTORY/.lock, writes aside and renames at the end; a second builder waits for it
and takes what it built. The leftovers of a killed builder are never used, and the next builder
removes them. A cache may be deleted at any time: a run that has it open keeps it.
"""

import hashlib
import json
import shutil
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import numpy as np
import PIL
from PIL import features

from auxilearn.data.pixels import DecodedImages, PackedImages
from auxilearn.errors import UserError
from auxilearn.files import locked, write_aside

LAYOUT = 2  # raise it with every change of the file format
FILLED = 0.9  # largest share of the free space: the runs need some too


class CacheError(UserError):
    """No cache can be kept here. The images themselves may be fine."""


def open_images(split, image_size, directory, workers, build=True):
    """A split's images, resized for crops of ``image_size`` pixels: from a cache, or decoded.

    Args:
        directory: of the cache, created if needed; "none" decodes every time. If no cache can be
            kept, images are decoded, with a warning.
        workers: threads that decode.
        build: False uses an existing cache or decodes, and writes nothing.

    Raises UserError: an image that cannot be read.
    """
    decoded = DecodedImages(split, image_size, workers)
    if directory != "none":
        cache = Cache(split, decoded, Path(directory))
        try:
            images = cache.read() or (cache.build() if build else None)
            if images:
                return images
        except CacheError as error:
            print(
                f"warning: {error}; without a cache the images are decoded every time, as with "
                "--cache_dir none",
                file=sys.stderr,
                flush=True,
            )
    decoded.measure()
    return decoded


class Cache:
    """The cache in ``directory`` of a split's images as their files are now.

    Args: ``decoded``: the ``DecodedImages`` to build it from. Raises UserError: a file is missing.
    """

    def __init__(self, split, decoded, directory):
        self.decoded = decoded
        self.order = sorted(range(len(split.paths)), key=split.paths.__getitem__)
        names = [split.paths[position] for position in self.order]
        files = [_version(decoded.paths[position]) for position in self.order]
        codecs = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "webp")}
        parts = [LAYOUT, PIL.__version__, codecs, names, files]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        self.path = directory / f"images-{decoded.side}-{key}.cache"

    def read(self):
        """``PackedImages``, or None if there is no complete file."""
        count = len(self.order)
        try:
            with open(self.path, "rb") as file:
                numbers = np.fromfile(file, "<i4", 2 * count).astype(np.int64)
                start, size = file.tell(), file.seek(0, 2)
                areas = numbers[::2] * numbers[1::2]
                complete = len(numbers) == 2 * count and size == start + 3 * areas.sum()
                if not complete or (numbers <= 0).any():
                    return None
                pixels = np.memmap(file, np.uint8, "r", offset=start).reshape(-1, 3)
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror
            raise CacheError(f"the image cache {self.path} cannot be read ({reason})") from None
        rows = np.argsort(self.order)  # by position
        starts = np.cumsum(areas) - areas
        return PackedImages(np.asarray(pixels), numbers.reshape(-1, 2)[rows], starts[rows])

    def build(self):
        """``PackedImages`` of a new file, unless another process has built it meanwhile.

        Raises UserError for an image that cannot be read, CacheError if no cache can be kept.
        """
        with _alone_in(self.path.parent):
            images = self.read()
            if images:
                return images
            self._make_room()
            try:
                write_aside(self.path, self._write)
            except OSError as error:
                raise CacheError(
                    f"the image cache cannot be written to {self.path.parent} ({error.strerror})"
                ) from None
            return self.read()

    def _make_room(self):
        """Say what will be written. CacheError: it does not fit."""
        self.decoded.measure()
        folder, shapes = self.path.parent, self.decoded.shapes
        size = 8 * len(shapes) + 3 * int(shapes.prod(axis=1).sum())
        free = shutil.disk_usage(folder).free
        if size > FILLED * free:
            raise CacheError(
                f"the image cache takes {_readable(size)}, but {folder} has {_readable(free)} free"
            )
        print(
            f"image cache: writing {len(shapes):,} images, shorter side {self.decoded.side} "
            f"pixels, {_readable(size)}, to {folder} (once; --cache_dir none decodes instead)",
            flush=True,
        )

    def _write(self, file):
        shapes = self.decoded.shapes[self.order]
        file.write(shapes.astype("<i4").tobytes())
        lengths = 3 * shapes.prod(axis=1)
        starts = file.tell() + np.cumsum(lengths) - lengths
        turn = threading.Lock()

        def write(row):
            image = self.decoded.load(self.order[row])
            with turn:
                file.seek(starts[row])
                file.write(image)

        for _ in self.decoded.map(write, "decoding images", range(len(shapes))):
            pass


def _version(path):
    """What changes with a file's content: some formats have one size whatever they show."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns


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
    try:
        for leftover in directory.glob(".images-*.cache.*"):
            with suppress(OSError):
                leftover.unlink()
        yield
    finally:
        lock.release()


def _readable(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
