"""Views of images: drawn for a whole pass, made for a whole batch.

A view is a box of an image, resized to a square and perhaps flipped. Boxes are rows of int64:
top, left, height, width, flip (0 or 1).
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

from auxilearn.randomness import derived_generator

AREA = (0.08, 1.0)  # share of the image, uniform
RATIO = (3 / 4, 4 / 3)  # width / height, uniform in the logarithm
TRIES = 10
PRODUCTS_UP_TO = 32  # pixels; on the CPU, larger views are made faster one by one

# --------------------------------------------------------------------------------------------------
# Which boxes
# --------------------------------------------------------------------------------------------------


def draw_views(seed, stream, number, shapes):
    """Random boxes (n, 5) of n images for pass ``number`` of a stream.

    They are distributed as torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip`` draw
    them. The i-th box depends on the arguments alone, in whatever order the images are taken.

    Args: ``shapes`` (n, 2): heights and widths of the images.
    """
    generator = derived_generator(seed, f"{stream} views", number)
    shapes = np.asarray(shapes)
    tries = len(shapes), TRIES
    area = shapes.prod(axis=1)[:, None] * generator.uniform(*AREA, tries)
    ratio = np.exp(generator.uniform(*np.log(RATIO), tries))
    sides = np.rint(np.sqrt([area / ratio, area * ratio])).astype(np.int64)  # (2, n, TRIES)
    fits = ((sides > 0) & (sides <= shapes.T[:, :, None])).all(axis=0)
    first = fits.argmax(axis=1)
    found = fits.any(axis=1)[:, None]
    drawn = sides[:, np.arange(len(shapes)), first].T
    boxes = np.where(found, drawn, _widest(shapes))
    free = shapes - boxes
    corners = np.floor(generator.random(shapes.shape) * (free + 1)).astype(np.int64)
    corners = np.where(found, corners, free // 2)
    flips = generator.random((len(shapes), 1)) < 0.5
    return np.hstack([corners, boxes, flips])


def _widest(shapes):
    """The largest boxes (n, 2) whose ratio is allowed: for images on which all tries fail."""
    height, width = shapes.T
    return np.stack(
        [
            np.minimum(height, np.rint(width / RATIO[0])),
            np.minimum(width, np.rint(height * RATIO[1])),
        ],
        axis=1,
    ).astype(np.int64)


def largest_side(shapes):
    """The longest side a box of ``draw_views`` may have, over images of these ``shapes`` (n, 2)."""
    limit = np.rint(shapes.min(axis=1) * RATIO[1]) + 1  # both sides of a box were rounded
    return int(np.minimum(shapes.max(axis=1), limit).max())


def central_views(shapes, size):
    """The boxes (n, 5) of torchvision's ``CenterCrop(size)``; no image may be smaller."""
    boxes = np.full((len(shapes), 5), size)
    boxes[:, :2] = np.rint((shapes - size) / 2)
    boxes[:, 4] = 0
    return boxes


# --------------------------------------------------------------------------------------------------
# From boxes to views
# --------------------------------------------------------------------------------------------------


class Resizer:
    """Makes views of ``size`` pixels a side from boxes of at most ``largest`` pixels a side.

        views = resizer.products(windows, boxes)    # on any device
        views = resizer.one_by_one(windows, boxes)  # on the CPU

    ``windows`` (B, h, w, 3) uint8 hold the pixels of each box at the top left; what lies beside
    them changes nothing. Views are uint8 (B, 3, size, size), channels-last. The two ways differ by
    one grey level at most. Raises ValueError: boxes may be over 12 times as large as the views.
    """

    def __init__(self, size, largest, device):
        self.size, self.sides = size, largest + 1
        index, shares = _triangles(size, largest)
        # Products of float32 are exact here, so that views do not depend on the batch, on the
        # threads or on the device: weights are multiples of 2^-16 in the first and of 2^-12 in the
        # second product, what is between them is rounded to sixteenths. All terms are positive and
        # their sum is below 256, so every partial sum is a multiple of 2^-16 below 2^8: 24 bits,
        # which is what a float32 has. (The factors 16 make sixteenths the unit in between. With 24
        # taps at most, what rounding the weights adds stays under a grey level.)
        down = np.rint(shares * 2**16) / 2**16 * 16
        across = np.rint(shares * 2**12) / 2**12 / 16
        across = np.concatenate([across, across[:, ::-1]])  # then those of flipped boxes
        self.down_index = torch.from_numpy(index).to(device)
        self.down = torch.from_numpy(down).float().to(device)
        self.across_index = torch.from_numpy(np.concatenate([index, index[:, ::-1]])).to(device)
        self.across = torch.from_numpy(across).float().to(device)

    def products(self, windows, boxes):
        """By two products of matrices a window. ``boxes`` (B, 5): a tensor beside ``windows``."""
        count, height, width, _ = windows.shape
        down = self._matrices(self.down_index, self.down, boxes[:, 2], height)
        columns = boxes[:, 3] + self.sides * boxes[:, 4]
        across = self._matrices(self.across_index, self.across, columns, width)
        with float32_products():
            rows = torch.bmm(down, windows.float().view(count, height, width * 3)).round_()
            rows = rows.view(count, self.size, width, 3).transpose(2, 3)
            rows = rows.reshape(count, self.size * 3, width)
            views = torch.bmm(rows, across.transpose(1, 2)).round_().clamp_(0, 255)
        views = views.to(torch.uint8).view(count, self.size, 3, self.size)
        return views.transpose(2, 3).contiguous().permute(0, 3, 1, 2)

    def _matrices(self, index, weights, rows, length):
        """(B, size, length): the weights of every pixel of a window's side in every view pixel."""
        matrices = weights.new_zeros(len(rows), self.size, length)
        return matrices.scatter_add_(2, index.index_select(0, rows), weights.index_select(0, rows))

    def one_by_one(self, windows, boxes):
        """By torch's own resize, box by box. ``boxes`` (B, 5): an array."""
        views = torch.empty(len(windows), self.size, self.size, 3, dtype=torch.uint8)
        for view, window, box in zip(views, windows, boxes.tolist(), strict=True):
            _, _, height, width, flip = box
            # torch resizes uint8 twice as fast where a pixel's channels lie side by side.
            pixels = window[:height, :width].contiguous()[None].permute(0, 3, 1, 2)
            sides = self.size, self.size
            resized = F.interpolate(pixels, sides, mode="bilinear", antialias=True)[0]
            view.copy_((resized.flip(2) if flip else resized).permute(1, 2, 0))
        return views.permute(0, 3, 1, 2)


def _triangles(size, largest):
    """Antialiased bilinear interpolation of sides of 0 to ``largest`` pixels to ``size`` pixels.

    Returns (index, shares), both (largest + 1, size, taps): the pixels that a pixel of the view is
    made of, and their shares, which add up to 1. Where there are fewer pixels than taps, the first
    or last one is repeated, with share 0. The row of side 0 is not meant to be used.
    """
    taps = -(-2 * max(largest, size) // size)
    if taps > 24:
        raise ValueError(f"boxes of {largest} pixels are too large for views of {size}")
    side = np.maximum(np.arange(largest + 1), 1)[:, None, None]
    # Twice the size is the unit of length, so that all is whole numbers: pixel j has its centre at
    # (2 j + 1) size, pixel i of the view at (2 i + 1) side, and a triangle reaches twice as far as
    # the larger of the two.
    centre = (2 * np.arange(size)[:, None] + 1) * side
    reach = 2 * np.maximum(side, size)
    index = (centre - reach - size) // (2 * size) + 1 + np.arange(taps)
    height = np.maximum(reach - np.abs((2 * index + 1) * size - centre), 0)
    height[(index < 0) | (index >= side)] = 0
    return index.clip(0, side - 1), height / height.sum(axis=2, keepdims=True)


@contextlib.contextmanager
def float32_products():
    """Matrix products of float32 are not rounded to fewer bits in the block, as TF32 would."""
    # The older of PyTorch's two switches cannot be read once somebody has used the newer one.
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # from PyTorch 2.9 on
        switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, precision in zip(switches, before, strict=True):
                switch.fp32_precision = precision
    else:
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)
