"""From a split to batches: the samples of a set, and the streams that deliver them.

A run does not depend on the number of workers: the order of a pass is a function of (seed, stream,
pass), the augmentation of an image a function of (seed, stream, pass, sample).
"""

import math
import sys
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels

from auxilearn.data.cub import IMAGE_FORMATS, in_rgb
from auxilearn.errors import UserError
from auxilearn.models import Batch
from auxilearn.randomness import derived_generator, derived_seed, random_state_kept

RESIZE_RATIO = 256 / 224  # Resize(256) goes before every crop of 224

# --------------------------------------------------------------------------------------------------
# Samples and their labels
# --------------------------------------------------------------------------------------------------


class SampleSet(NamedTuple):
    """The samples of one set of the split, in its order, with n samples and K tasks.

    positions (n,): places in the split's arrays. targets (n,) int64: target labels to train on.
    attributes (n, K - 1) uint8. labeled (n,) bool: True if the target label may be used; None: all
    may.
    """

    positions: np.ndarray
    targets: torch.Tensor
    attributes: torch.Tensor
    labeled: torch.Tensor | None = None

    def __len__(self):
        return len(self.positions)

    def batch(self, places, images, device):
        """The ``Batch`` of the samples at ``places`` (B,) with their ``images``, on ``device``."""
        labels = torch.cat([self.targets[places, None], self.attributes[places].long()], dim=1)
        mask = None
        if self.labeled is not None:
            mask = torch.ones(labels.shape, dtype=torch.bool)
            mask[:, 0] = self.labeled[places]
            # The label behind the mask is not even read.
            labels[:, 0].masked_fill_(~mask[:, 0], 0)
            mask = mask.to(device, non_blocking=True)
        return Batch(
            images.to(device, non_blocking=True, memory_format=torch.channels_last),
            labels.to(device, non_blocking=True),
            places.to(device, non_blocking=True),
            mask,
        )


def sample_set(split, name, tasks):
    """The set ``name`` of the split with its own labels and its first ``tasks`` - 1 attributes."""
    positions = split.indices[name]
    return SampleSet(
        positions,
        torch.from_numpy(split.labels[positions]),
        torch.from_numpy(split.attributes[positions][:, : tasks - 1]),
    )


def training_set(split, name, tasks, seed, corrupted_rate=0.0, labeled_per_class=0):
    """The training set ``name`` (full_train or rest_train) under one of the paper's settings.

    Corrupted labels (``corrupted_rate`` r > 0): each label is redrawn from (1 - r) I + r / C.
    Semi-supervised (``labeled_per_class`` N > 0): N samples per class keep their target label. Both
    draws are over the training images outside the development set, so they are the same whether a
    method trains on rest_train or on full_train. The development images' labels are clean and known
    to every method: in full_train they stay as they are.

    Raises UserError: a class has fewer than N such images.
    """
    samples = sample_set(split, name, tasks)
    rest = split.indices["rest_train"]
    in_rest = np.isin(samples.positions, rest)
    if corrupted_rate:
        classes = len(split.class_names)
        labels = split.labels.copy()
        labels[rest] = corrupt(
            labels[rest], corrupted_rate, classes, derived_generator(seed, "corruption")
        )
        targets = torch.from_numpy(labels[samples.positions])
        # _replace() counts a named tuple's fields with len(), which here counts samples.
        samples = SampleSet(samples.positions, targets, samples.attributes)
    if labeled_per_class:
        generator = derived_generator(seed, "labeled")
        chosen = choose_labeled(split, rest, labeled_per_class, generator)
        labeled = np.isin(samples.positions, chosen) | ~in_rest
        samples = SampleSet(*samples[:3], torch.from_numpy(labeled))
    return samples


def corrupt(labels, rate, classes, generator):
    """``labels`` (n,) redrawn from (1 - rate) I + rate / classes: with probability ``rate`` a label
    becomes uniform over all classes, the true one included."""
    redrawn = generator.random(len(labels)) < rate
    return np.where(redrawn, generator.integers(classes, size=len(labels)), labels)


def choose_labeled(split, positions, per_class, generator):
    """``per_class`` randomly chosen entries of ``positions`` for every class.

    The classes are those at preprocessing, so later edits of masked labels do not change the
    choice.
    """
    labels = split.preprocessed_labels[positions]
    chosen = []
    for number, name in enumerate(split.class_names):
        members = positions[labels == number]
        if len(members) < per_class:
            raise UserError(
                f"--labeled_per_class {per_class} is more than class {name} has: "
                f"{len(members)} training images outside the development set"
            )
        chosen.append(generator.choice(members, per_class, replace=False))
    return np.concatenate(chosen)


# --------------------------------------------------------------------------------------------------
# Images
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
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=IMAGE_FORMATS)
        with image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: the image is missing") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{path}: not a readable image ({error})") from None


def load_resized(path, side):
    """The image at ``path`` in RGB, its shorter side ``side`` pixels: a uint8 tensor (3, H, W).

    Raises UserError naming a file that cannot be read.
    """
    with opened(path) as image:
        shape = shape_to_load(image, side)
        return pixels.pil_to_tensor(pixels.resize(in_rgb(image), shape))


class DecodedImages:
    """The images of a split, read and resized on every request.

    ``auxilearn.data.cache.ImageCache`` delivers the same without the work.
    """

    def __init__(self, split, image_size):
        self.split = split
        self.side = resized_side(image_size)

    def load(self, position):
        """The image at ``position`` in the split: uint8 (3, H, W). UserError if unreadable."""
        return load_resized(self.split.image_path(position), self.side)


def random_view(image, size, seed):
    """A random resized crop of ``image`` (3, H, W), flipped in half of all cases: (3, size, size).

    Equal to ``v2.RandomResizedCrop(size)`` and ``v2.RandomHorizontalFlip()`` after
    ``torch.manual_seed(seed)``, but the global generator does not change.
    """
    with random_state_kept(seed=seed):
        crop = v2.RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        flip = torch.rand(1).item() < 0.5
    # torch resizes uint8 twice as fast where the three channels of a pixel lie side by side.
    view = pixels.crop(image, *crop)[None].contiguous(memory_format=torch.channels_last)
    view = pixels.resize(view, [size, size], antialias=True)[0]
    return pixels.horizontal_flip(view) if flip else view


class ImageDataset(Dataset):
    """Views of some images of a split. An item's key is (place, number of the pass).

    Training views (``augment``) are random resized crops and flips, evaluation views are centre
    crops, both of ``image_size`` pixels a side.

    Args:
        images: ``DecodedImages`` or ``ImageCache``.
        positions: (n,) where in the split the image at each place is.
    """

    def __init__(self, images, positions, image_size, augment, seed, stream):
        self.images = images
        self.positions = positions
        self.image_size = image_size
        self.augment = augment
        self.seed = seed
        self.stream = stream

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, key):
        """(place, uint8 image (3, S, S)), or the UserError that explains the failure."""
        place, number = key
        try:
            image = self.images.load(self.positions[place])
        except UserError as error:
            return error  # raised in a worker, it would reach the person as a traceback
        if not self.augment:
            return place, pixels.center_crop(image, [self.image_size])
        seed = derived_seed(self.seed, self.stream, number, place)
        return place, random_view(image, self.image_size, seed)


def collate(items):
    """(places (B,), channels-last images (B, 3, S, S)), or the first UserError among the items."""
    for item in items:
        if isinstance(item, UserError):
            return item
    places, images = zip(*items, strict=True)
    # torch's own collating writes straight into the memory that a worker shares.
    stacked = default_collate([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3)
    return torch.tensor(places), stacked.permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------
# Streams of batches
# --------------------------------------------------------------------------------------------------


class EndlessBatches:
    """Keys of batch after batch, pass after pass, each pass in a fresh random order.

    ``skip`` is the number of batches that an interrupted run has taken already.
    """

    def __init__(self, samples, batch_size, seed, stream):
        self.samples, self.batch_size, self.seed, self.stream = samples, batch_size, seed, stream
        self.skip = 0

    def __iter__(self):
        number, taken = divmod(self.skip, math.ceil(self.samples / self.batch_size))
        while True:
            order = derived_generator(self.seed, f"{self.stream} order", number)
            places = order.permutation(self.samples).tolist()
            for start in range(taken * self.batch_size, self.samples, self.batch_size):
                yield [(place, number) for place in places[start : start + self.batch_size]]
            number, taken = number + 1, 0


class FirstBatch:
    """The keys of the first batch in file order, for ever: what the released code does."""

    def __init__(self, samples, batch_size):
        self.size = min(samples, batch_size)
        self.skip = 0  # as in EndlessBatches; every batch is the same

    def __iter__(self):
        while True:
            yield [(place, 0) for place in range(self.size)]


class OrderedBatches:
    """One pass in file order; of several ranks, each takes every ``size``-th batch."""

    def __init__(self, samples, batch_size, rank=0, size=1):
        self.samples, self.batch_size = samples, batch_size
        self.rank, self.size = rank, size

    def __iter__(self):
        step = self.batch_size * self.size
        for start in range(self.rank * self.batch_size, self.samples, step):
            end = min(start + self.batch_size, self.samples)
            yield [(place, 0) for place in range(start, end)]


class Shard:
    """One rank's share of batches: every ``size``-th key, starting with the ``rank``-th.

    If a batch has fewer keys than ranks, every rank takes all of them.
    """

    def __init__(self, batches, rank, size):
        self.batches, self.rank, self.size = batches, rank, size

    @property
    def skip(self):
        return self.batches.skip

    @skip.setter
    def skip(self, batches):
        self.batches.skip = batches

    def __iter__(self):
        for keys in self.batches:
            yield keys[self.rank :: self.size] if len(keys) >= self.size else keys


def leave_reports_to_main(_number):
    """In a worker: no traceback if the main process stops while it fetches a batch.

    The main process stops if another worker died, and reports that in one line.
    """
    usual = sys.excepthook

    def report(kind, error, traceback):
        if not issubclass(kind, (ConnectionError, EOFError)):
            usual(kind, error, traceback)

    sys.excepthook = report


class Stream:
    """Iterates over the ``Batch``es of a sample set, loaded and augmented in ``workers``.

    Args:
        images: of the split: ``DecodedImages`` or ``ImageCache``.

    Raises UserError while iterating: an image that cannot be read.
    """

    def __init__(
        self, images, samples, batches, image_size, device, *, augment, seed, name, workers
    ):
        self.samples = samples
        self.batches = batches
        self.device = device
        self.loader = DataLoader(
            ImageDataset(images, samples.positions, image_size, augment, seed, name),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=leave_reports_to_main,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # so that it draws nothing from the global one
        )

    def after(self, batches):
        """An iterator that leaves out the first ``batches`` batches, without loading them."""
        self.batches.skip = batches
        return iter(self)

    def __iter__(self):
        for item in self.loader:
            if isinstance(item, UserError):
                raise UserError(str(item))  # item itself would hold this frame, and so the loader
            yield self.samples.batch(*item, self.device)
