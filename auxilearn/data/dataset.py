"""From a split to batches: the samples of a set, and the streams that deliver them.

The order of a pass is a function of (seed, stream, pass), and so is the view of every sample in it:
nothing depends on threads, on the cache, or on where a run was interrupted.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from auxilearn.data.contract import scale_of
from auxilearn.data.corruption import UNIFORM, corrupted_targets
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

    positions (n,): places in the split's arrays. labels (n, K): what to train on, int64, or float32
    where a task is a real number (which is standardised). mask (n, K) bool: True where a label may
    be used, None: everywhere. Labels outside the mask are 0.
    """

    positions: np.ndarray
    labels: torch.Tensor
    mask: torch.Tensor | None = None

    def __len__(self):
        return len(self.positions)


def sample_set(split, name, tasks):
    """The set ``name`` of the split with its own labels under its first tasks.

    Args: ``tasks``: the first of ``split.tasks``, ``fitted`` if one of them is a real number.
    """
    positions = split.indices[name]
    mask = None if split.mask is None else split.mask[positions, : len(tasks)]
    return _samples(positions, split.labels[positions, : len(tasks)], mask, tasks)


def _samples(positions, labels, mask, tasks):
    """The ``SampleSet`` of labels (n, K) in their own units."""
    if any(task.classes is None for task in tasks):
        mean = np.array([task.mean for task in tasks])
        std = np.array([task.std for task in tasks])
        labels = ((labels - mean) / std).astype(np.float32)  # classes: less 0, by 1
    else:
        labels = labels.astype(np.int64, copy=False)
    if mask is not None:
        labels = np.where(mask, labels, np.zeros((), labels.dtype))
        mask = torch.from_numpy(mask)
    return SampleSet(positions, torch.from_numpy(labels), mask)


def fitted(split, count, seed=0, labeled_per_class=0):
    """The first ``count`` tasks, with the mean and std of each real number.

    They are those of the labels in full_train that a run may see: in the semi-supervised setting,
    of the target labels that are kept. (Permuting labels, which corrupts them, changes neither.)
    """
    train = split.indices["full_train"]
    tasks = []
    for k, task in enumerate(split.tasks[:count]):
        if task.classes is None:
            seen = np.ones(len(train), bool) if split.mask is None else split.mask[train, k]
            if k == 0 and labeled_per_class:
                seen = seen & _labeled(split, seed, labeled_per_class)[train]
            values = split.labels[train[seen], k]
            mean, std = scale_of(values)
            task = dataclasses.replace(task, mean=mean, std=std)
        tasks.append(task)
    return tasks


def training_set(
    split,
    name,
    tasks,
    seed,
    corrupted_rate=0.0,
    labeled_per_class=0,
    corruption=UNIFORM,
    inputs=None,
):
    """The training set ``name`` (full_train or rest_train) under one of the paper's settings.

    Corrupted labels (``corrupted_rate`` > 0): see ``corrupted_targets``, which takes ``corruption``
    and ``inputs``. Semi-supervised (``labeled_per_class`` N > 0): N samples per class keep their
    target label, or N in all of a target that is a real number. Both draws are over the training
    samples outside the development set, so they are the same whether a method trains on rest_train
    or on full_train. The development samples' labels are clean and known to every method: in
    full_train they stay as they are.

    Raises UserError: there are fewer than N such samples; ``corruption`` is not for such a target.
    """
    positions, count = split.indices[name], len(tasks)
    labels = split.labels[positions, :count]
    mask = None if split.mask is None else split.mask[positions, :count]
    if corrupted_rate:
        targets = corrupted_targets(split, corruption, corrupted_rate, seed, inputs)
        labels[:, 0] = targets[positions]
    if labeled_per_class:
        mask = np.ones(labels.shape, bool) if mask is None else mask
        mask[:, 0] &= _labeled(split, seed, labeled_per_class)[positions]
    return _samples(positions, labels, mask, tasks)


def _labeled(split, seed, per_class):
    """(N,) bool: the samples that keep their target label in the semi-supervised setting."""
    rest = split.indices["rest_train"]
    chosen = choose_labeled(split, rest, per_class, derived_generator(seed, "labeled"))
    kept = np.ones(len(split.labels), bool)
    kept[rest] = False
    kept[chosen] = True
    return kept


def choose_labeled(split, positions, per_class, generator):
    """``per_class`` randomly chosen entries of ``positions`` for every class; of a target that is a
    real number, so many in all.

    The classes are those at preprocessing, so later edits of masked labels do not change the
    choice.
    """
    positions = positions[split.has_target[positions]]
    groups = {"": positions}
    if split.target.classes:
        labels = split.preprocessed_targets[positions]
        names = split.target.class_names
        groups = {f"class {name}": positions[labels == k] for k, name in enumerate(names)}
    chosen = []
    for name, members in groups.items():
        if len(members) < per_class:
            raise UserError(
                f"--labeled_per_class {per_class} is more than {name or 'the data'} has: "
                f"{len(members)} labelled training samples outside the development set"
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


def _passes(order, skip):
    """(number, batches) of every pass of an order, without the first ``skip`` batches."""
    number, done = divmod(skip, len(order(0))) if skip else (0, 0)
    while batches := order(number)[done:]:
        yield number, batches
        number, done = number + 1, 0


class _Labels:
    """Labels and mask of a ``SampleSet``, on a device."""

    def __init__(self, samples, device):
        self.labels = on_device(samples.labels, device)
        self.mask = None if samples.mask is None else on_device(samples.mask, device)

    def batch(self, inputs, places):
        """The ``Batch`` of the samples at ``places`` (B,), a tensor on the device."""
        mask = None if self.mask is None else self.mask.index_select(0, places)
        return Batch(inputs, self.labels.index_select(0, places), places, mask)


class RowStream:
    """Iterates over the ``Batch``es of a sample set whose inputs are rows; see ``Stream``.

    Args: ``rows``: (numbers (N, n) float32, codes (N, c) int64) of the split, on ``device``.
    """

    def __init__(self, rows, samples, order, device):
        self.rows, self.order, self.device = rows, order, device
        self.positions = on_device(torch.from_numpy(samples.positions), device)
        self.labels = _Labels(samples, device)

    def __iter__(self):
        return self.after(0)

    def after(self, batches):
        """An iterator that leaves out the first ``batches`` batches."""
        for _, parts in _passes(self.order, batches):
            # The places of the whole pass move at once: a step copies nothing.
            every = on_device(torch.from_numpy(np.concatenate(parts)), self.device)
            for places in every.split([len(part) for part in parts]):
                positions = self.positions.index_select(0, places)
                inputs = tuple(column.index_select(0, positions) for column in self.rows)
                yield self.labels.batch(inputs, places)


class Stream:
    """Iterates over the ``Batch``es of a sample set of images, which are on ``device``.

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
        self.labels = _Labels(samples, device)
        if augment:
            self.resizer = Resizer(image_size, largest_side(self.shapes), device)

    def __iter__(self):
        return self.after(0)

    def after(self, batches):
        """An iterator that leaves out the first ``batches`` batches, without loading them."""
        pinned = self.device.type == "cuda"
        for here, there, windows in self.images.windows(self._wanted(batches), pinned):
            windows = windows.to(self.device, non_blocking=True)
            views = self._views(windows, here.boxes, there.boxes)
            yield self.labels.batch(views, there.places)

    def _wanted(self, skip):
        """Pairs of ``Wanted``, of the host and of the device, for every batch but ``skip``."""
        for number, batches in _passes(self.order, skip):
            places = np.concatenate(batches)
            here = Wanted(places, self.positions[places], self._boxes(number)[places])
            there = here.on(self.device)  # of the whole pass: a step copies nothing
            stop = 0
            for batch in batches:
                start, stop = stop, stop + len(batch)
                yield here.part(start, stop), there.part(start, stop)

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
