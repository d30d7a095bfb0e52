"""Where the pixels of a split's images come from: files, memory, or a GPU's memory.

All three sources have

    shapes                      (N, 2) heights and widths of the resized images, by position in the
                                split
    load(position)              one resized image, an array (height, width, 3) of uint8
    windows(requests, pinned)   yields (here, there, windows) for every pair of ``Wanted``: the same
                                one in host memory and on the device. windows (B, h, w, 3) uint8 are
                                as large as the largest box and hold each box at the top left; what
                                lies beside it is not defined. They are in the source's memory,
                                which is page-locked if ``pinned``.
"""

import math
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from auxilearn.data.image_files import IMAGE_FORMATS, in_rgb
from auxilearn.errors import UserError

RESIZE_RATIO = 256 / 224  # Resize(256) goes before every crop of 224
RESIDENT_SHARE = 0.25  # of a GPU's free memory that pixels may take


class Wanted(NamedTuple):
    """Samples and the boxes of their images: B places in the set, positions in the split, and boxes
    (B, 5) as in ``auxilearn.data.views``. Arrays, or tensors on a device."""

    places: np.ndarray | torch.Tensor
    positions: np.ndarray | torch.Tensor
    boxes: np.ndarray | torch.Tensor

    def part(self, start, stop):
        return Wanted(*(column[start:stop] for column in self))

    def on(self, device):
        """The same as tensors on ``device``."""
        return Wanted(*(on_device(torch.from_numpy(column), device) for column in self))


def on_device(tensor, device):
    """``tensor``, of host memory, on ``device``; the host does not wait for a GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------


def resized_side(image_size):
    """The shorter side of an image before crops of ``image_size`` are taken."""
    return round(image_size * RESIZE_RATIO)


def resized_shape(height, width, side):
    """(height, width) of an image whose shorter side becomes ``side``, aspect ratio kept."""
    if width <= height:
        return side * height // width, side
    return side, side * width // height


def shape_to_load(image, side):
    """``resized_shape`` of a Pillow image. ValueError: more pixels than Pillow would open."""
    shape = resized_shape(image.height, image.width, side)
    if math.prod(shape) > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, too long and thin to be resized")
    return shape


@contextmanager
def opened(path):
    """The image file at ``path``, opened by Pillow; UserError names it if it cannot be read."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: the image is missing") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{path}: not a readable image ({error})") from None


def typical_side(split):
    """The median of the shorter sides, in pixels, of up to 32 training images of a ``Split``.

    Raises UserError naming a file that cannot be read.
    """
    train, sides = split.indices["full_train"], []
    for position in train[:: max(1, len(train) // 32)][:32]:
        with opened(split.image_path(position)) as image:
            sides.append(min(image.size))
    return sorted(sides)[len(sides) // 2]


def load_resized(path, side):
    """The image at ``path`` in RGB, its shorter side ``side`` pixels: a uint8 array (h, w, 3).

    Raises UserError naming a file that cannot be read.
    """
    with opened(path) as image:
        height, width = shape_to_load(image, side)
        return np.asarray(in_rgb(image).resize((width, height), Image.BILINEAR))


class DecodedImages:
    """Images that are read from their files, decoded and resized on every request.

    Args:
        workers: threads that decode, one batch ahead; 0: the main thread.

    ``measure`` must come first. Raises UserError naming a file that cannot be read.
    """

    def __init__(self, split, image_size, workers):
        self.paths = [split.image_path(position) for position in range(len(split.paths))]
        self.side = resized_side(image_size)
        self.shapes = None
        self._pool = ThreadPoolExecutor(workers) if workers else None

    def measure(self):
        """Read the shapes of all images from the headers of their files."""
        if self.shapes is None:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                self.shapes = np.array([*self.map(self._shape, "measuring images", self.paths)])

    def map(self, function, title, items):
        """``map`` in the threads, with a progress bar."""
        results = self._map(function, items)
        return tqdm(
            results, title, len(items), unit="image", dynamic_ncols=True, disable=None, leave=False
        )

    def _map(self, function, items):
        return (self._pool.map if self._pool else map)(function, items)

    def _shape(self, path):
        with opened(path) as image:
            return shape_to_load(image, self.side)

    def load(self, position):
        image = load_resized(self.paths[position], self.side)
        if image.shape[:2] != tuple(self.shapes[position]):
            raise UserError(f"{self.paths[position]}: the image has changed since the start")
        return image

    def windows(self, requests, pinned=False):
        ahead = None
        for here, there in requests:
            begun = here, there, *self._begin(here, pinned)
            if ahead:
                yield _finished(*ahead)
            ahead = begun
        if ahead:
            yield _finished(*ahead)

    def _begin(self, wanted, pinned):
        """(windows, an iterator that ends when they are filled)."""
        windows = _empty_windows(wanted.boxes, pinned)
        targets = windows.numpy()

        def fill(i):
            _put(targets[i], self.load(wanted.positions[i]), *wanted.boxes[i])

        return windows, self._map(fill, range(len(targets)))


def _finished(here, there, windows, filling):
    deque(filling, maxlen=0)
    return here, there, windows


def _empty_windows(boxes, pinned):
    """Uninitialised uint8 (B, h, w, 3), as large as the largest of ``boxes`` (B, 5)."""
    height, width = boxes[:, 2:4].max(axis=0)
    return torch.empty(len(boxes), height, width, 3, dtype=torch.uint8, pin_memory=pinned)


def _put(window, image, top, left, height, width, _flip):
    window[:height, :width] = image[top : top + height, left : left + width]


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


class PackedImages:
    """Images in memory, which may be that of a mapped file.

    Args:
        pixels: (P, 3) uint8 array, image after image, row after row.
        shapes: (N, 2).
        starts: (N,) the row of ``pixels`` at which each image begins.
    """

    def __init__(self, pixels, shapes, starts):
        self.pixels, self.shapes, self.starts = pixels, shapes, starts

    def load(self, position):
        return self._image(self.starts[position], *self.shapes[position])

    def _image(self, start, height, width):
        return self.pixels[start : start + height * width].reshape(height, width, 3)

    def windows(self, requests, pinned=False):
        for here, there in requests:
            windows = _empty_windows(here.boxes, pinned)
            starts, shapes = self.starts[here.positions], self.shapes[here.positions]
            columns = (column.tolist() for column in (starts, shapes, here.boxes))
            for window, start, shape, box in zip(windows.numpy(), *columns, strict=True):
                _put(window, self._image(start, *shape), *box)
            yield here, there, windows


class ResidentImages:
    """``PackedImages`` whose pixels lie on a device: windows are gathered there."""

    def __init__(self, images, device):
        self.shapes, self.load = images.shapes, images.load
        with warnings.catch_warnings():  # a cache is mapped to be read only
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.pixels = torch.from_numpy(images.pixels).to(device)
        self.starts = torch.from_numpy(images.starts).to(device)
        self.widths = torch.from_numpy(images.shapes[:, 1]).to(device)

    def windows(self, requests, pinned=False):
        for here, there in requests:
            yield here, there, self._gathered(there, *here.boxes[:, 2:4].max(axis=0).tolist())

    def _gathered(self, wanted, height, width):
        top, left, box_height, box_width, _ = wanted.boxes[:, :, None].unbind(1)  # (B, 1) each
        stride = self.widths[wanted.positions, None]
        first = self.starts[wanted.positions, None] + top * stride + left
        # Beyond its box a window repeats the last row and column, to stay within the image.
        down, across = (torch.arange(n, device=self.pixels.device) for n in (height, width))
        rows = first + torch.minimum(down, box_height - 1) * stride  # (B, h)
        index = rows[:, :, None] + torch.minimum(across, box_width - 1)[:, None, :]
        return self.pixels.index_select(0, index.view(-1)).view(*index.shape, 3)


def near(images, device):
    """``images``, moved to a GPU ``device`` if their pixels take little of its free memory."""
    if device.type != "cuda" or not isinstance(images, PackedImages):
        return images
    free, _ = torch.cuda.mem_get_info(device)
    if images.pixels.nbytes > RESIDENT_SHARE * free:
        return images
    return ResidentImages(images, device)
