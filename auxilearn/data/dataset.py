"""From a split to batches: the samples of a set, and the streams that deliver them.

The order of a pass is a function of (seed, stream, pass), and so is the view of every sample in it:
nothing depends on threads, on the cache, or on where a run was interrupted.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from auxilearn.data.pixels import Wanted, on_device
from auxilearn.data.views import (
    PRODUCTS_UP_TO,
    Resizer,
    central_views,
    draw_views,
    largest_side,
)
from auxilearn.errors import UserError
from auxilearn.models import Batch
from auxilearn.randomness import derived_generator

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

    def labels_on(self, device):
        """(labels (n, K) int64, mask (n, K) bool or None) on ``device``.

        A target label that may not be used is 0.
        """
        targets, mask = self.targets, None
        if self.labeled is not None:
            mask = torch.ones(len(self), 1 + self.attributes.shape[1], dtype=torch.bool)
            mask[:, 0] = self.labeled
            targets = targets.masked_fill(~self.labeled, 0)
            mask = on_device(mask, device)
        labels = torch.cat([targets[:, None], self.attributes.long()], dim=1)
        return on_device(labels, device), mask


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
# Streams of batches
# --------------------------------------------------------------------------------------------------

# An order is a function from the number of a pass, 0 for the first, to its batches: arrays of
# places in the set. A pass without batches ends the stream.


def shuffled(samples, batch_size, seed, stream, rank=0, size=1):
    """Pass after pass without end, each in a fresh random order; one rank's share of every batch.

    A rank takes every ``size``-th sample, starting with the ``rank``-th. If a batch has fewer
    samples than there are ranks, every rank takes all of them.
    """
    return partial(_shuffled_pass, samples, batch_size, seed, stream, rank, size)


def _shuffled_pass(samples, batch_size, seed, stream, rank, size, number):
    places = derived_generator(seed, f"{stream} order", number).permutation(samples)
    return [_share(batch, rank, size) for batch in _cut(places, batch_size)]


def first_batch(samples, batch_size, rank=0, size=1):
    """The first batch in file order, for ever: what the released code does."""
    batch = _share(np.arange(min(samples, batch_size)), rank, size)
    return lambda number: [batch]


def in_order(samples, batch_size, rank=0, size=1):
    """One pass in file order; of several ranks, each takes every ``size``-th batch."""
    batches = _cut(np.arange(samples), batch_size)[rank::size]
    return lambda number: batches if number == 0 else []


def _cut(places, batch_size):
    return [places[i : i + batch_size] for i in range(0, len(places), batch_size)]


def _share(batch, rank, size):
    return batch[rank::size] if len(batch) >= size else batch


class Stream:
    """Iterates over the ``Batch``es of a sample set, which are on ``device``.

    Training views (``augment``) are random resized crops and flips, evaluation views are centre
    crops, both of ``image_size`` pixels a side. The device is never waited for.

    Args:
        images: of the split, a source as in ``auxilearn.data.pixels``.
        samples: ``SampleSet``.
        order: which samples make a batch, as ``shuffled``.
        name: of the stream, from which its views are drawn.

    Raises UserError while iterating: an image that cannot be read.
    """

    def __init__(self, images, samples, order, image_size, device, *, augment, seed, name):
        self.images, self.order, self.image_size, self.device = images, order, image_size, device
        self.augment, self.seed, self.name = augment, seed, name
        self.positions = samples.positions
        self.shapes = images.shapes[samples.positions]
        self.labels, self.mask = samples.labels_on(device)
        if augment:
            self.resizer = Resizer(image_size, largest_side(self.shapes), device)

    def __iter__(self):
        return self.after(0)

    def after(self, batches):
        """An iterator that leaves out the first ``batches`` batches, without loading them."""
        pinned = self.device.type == "cuda"
        for here, there, windows in self.images.windows(self._wanted(batches), pinned):
            windows = windows.to(self.device, non_blocking=True)
            yield Batch(
                self._views(windows, here.boxes, there.boxes),
                self.labels.index_select(0, there.places),
                there.places,
                None if self.mask is None else self.mask.index_select(0, there.places),
            )

    def _wanted(self, skip):
        """Pairs of ``Wanted``, of the host and of the device, for every batch but ``skip``."""
        number, done = divmod(skip, len(self.order(0))) if skip else (0, 0)
        while batches := self.order(number)[done:]:
            places = np.concatenate(batches)
            here = Wanted(places, self.positions[places], self._boxes(number)[places])
            there = here.on(self.device)  # of the whole pass: a step copies nothing
            stop = 0
            for batch in batches:
                start, stop = stop, stop + len(batch)
                yield here.part(start, stop), there.part(start, stop)
            number, done = number + 1, 0

    def _boxes(self, number):
        """(n, 5), those of the set's images in a pass."""
        if self.augment:
            return draw_views(self.seed, self.name, number, self.shapes)
        return central_views(self.shapes, self.image_size)

    def _views(self, windows, boxes, boxes_there):
        if not self.augment:
            return windows.permute(0, 3, 1, 2)
        if self.device.type == "cpu" and self.image_size > PRODUCTS_UP_TO:
            return self.resizer.one_by_one(windows, boxes)
        return self.resizer.products(windows, boxes_there)
