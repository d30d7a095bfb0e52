"""Streams of batches: which samples, in which order, with which labels; exact after a resume."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from auxilearn.data.cache import open_images
from auxilearn.data.dataset import (
    SampleSet,
    Stream,
    first_batch,
    in_order,
    sample_set,
    shuffled,
)
from auxilearn.data.pixels import PackedImages, ResidentImages
from auxilearn.data.split import load_split

CPU, META = torch.device("cpu"), torch.device("meta")
SIZE = 16


@pytest.fixture(scope="module")
def split(tiny_split):
    return load_split(tiny_split)  # of 20 training images


@pytest.fixture(scope="module")
def images(split, tmp_path_factory):
    return open_images(split, SIZE, tmp_path_factory.mktemp("cache"), 0)


@pytest.fixture
def stream(split, images):
    """``stream(order, ...)`` of the training set."""

    def make(order, augment=True, images=images, device=CPU, name="lower", samples=None):
        samples = samples or sample_set(split, "full_train", split.tasks)
        return Stream(images, samples, order, SIZE, device, augment=augment, seed=5, name=name)

    return make


def partly_labeled(split, labeled):
    """The training set, of which only the samples that are ``labeled`` (n,) have a target."""
    samples = sample_set(split, "full_train", split.tasks)
    mask = torch.ones(samples.labels.shape, dtype=torch.bool)
    mask[:, 0] = labeled
    return SampleSet(samples.positions, samples.labels * mask, mask)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(one, other):
    for left, right in zip(one, other, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


def test_every_pass_is_a_fresh_order_of_all_samples():
    order = shuffled(20, 6, 5, "lower")
    passes = [np.concatenate(order(number)) for number in range(3)]
    assert [len(batch) for batch in order(0)] == [6, 6, 6, 2]
    for places in passes:
        assert sorted(places) == list(range(20))
    assert len({tuple(places) for places in passes}) == 3
    assert np.array_equal(np.concatenate(order(1)), passes[1])
    for other in (shuffled(20, 6, 6, "lower"), shuffled(20, 6, 5, "upper")):
        assert not np.array_equal(np.concatenate(other(0)), passes[0])


def test_ranks_share_every_batch():
    whole = shuffled(20, 6, 5, "lower")(3)
    shares = [shuffled(20, 6, 5, "lower", rank, 3)(3) for rank in range(3)]
    for batch, *parts in zip(whole[:3], *(share[:3] for share in shares), strict=True):
        assert [part.tolist() for part in parts] == [batch[rank::3].tolist() for rank in range(3)]
    for share in shares:  # of two samples, fewer than ranks
        assert share[3].tolist() == whole[3].tolist()
    assert [first_batch(20, 6, rank, 2)(7)[0].tolist() for rank in (0, 1)] == [[0, 2, 4], [1, 3, 5]]


def test_ranks_take_whole_batches_of_an_evaluation():
    batches = [in_order(20, 6, rank, 3)(0) for rank in range(3)]
    places = [[batch.tolist() for batch in share] for share in batches]
    assert places == [
        [[*range(6)], [18, 19]],
        [[*range(6, 12)]],
        [[*range(12, 18)]],
    ]
    assert in_order(20, 6)(1) == []
    assert in_order(5, 6, rank=1, size=2)(0) == []


def test_a_stream_in_order_ends(stream):
    places = torch.cat([batch.sample_id for batch in stream(in_order(20, 6), augment=False)])
    assert places.tolist() == list(range(20))
    assert list(stream(in_order(5, 6, rank=1, size=2), augment=False)) == []


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("done", [1, 3, 4, 9])
def test_a_resumed_stream_goes_on_with_the_same_batches(stream, augment, done):
    """4 batches a pass."""
    batches = take(stream(shuffled(20, 6, 5, "lower"), augment), 12)
    resumed = take(stream(shuffled(20, 6, 5, "lower"), augment).after(done), 12 - done)
    for one, other in zip(batches[done:], resumed, strict=True):
        assert_equal(one, other)


def test_skipped_batches_are_not_loaded(stream, images):
    loaded = Counter()

    class Counted(PackedImages):
        def windows(self, requests, pinned=False):
            for here, there, windows in super().windows(requests, pinned):
                loaded["images"] += len(here.places)
                yield here, there, windows

    counted = Counted(images.pixels, images.shapes, images.starts)
    next(stream(shuffled(20, 6, 5, "lower"), images=counted).after(3))
    assert loaded["images"] == 2


def test_a_view_depends_on_its_sample_and_pass_alone(stream):
    """Not on the batch it is in, nor on how many ranks there are."""

    def views(order, batches):
        found = {}
        for batch in take(iter(stream(order)), batches):
            found |= dict(zip(batch.sample_id.tolist(), batch.inputs, strict=True))
        return found

    whole = views(shuffled(20, 6, 5, "lower"), 4)
    assert len(whole) == 20
    for other in (
        views(shuffled(20, 20, 5, "lower"), 1),
        views(shuffled(20, 3, 9, "other order"), 7),
        *(views(shuffled(20, 6, 5, "lower", rank, 2), 4) for rank in (0, 1)),
    ):
        assert len(other) >= 10
        for place, view in other.items():
            assert torch.equal(view, whole[place])


def test_labels_and_what_is_behind_the_mask(stream, split):
    positions = split.indices["full_train"]
    labels = split.labels[positions]
    for batch in stream(in_order(20, 6), augment=False):
        assert batch.mask is None
        assert batch.labels.tolist() == labels[batch.sample_id].tolist()
    labeled = torch.arange(20) % 3 == 0
    samples = partly_labeled(split, labeled)
    labels[~labeled, 0] = 0
    for batch in stream(in_order(20, 6), augment=False, samples=samples):
        assert batch.labels.tolist() == labels[batch.sample_id].tolist()
        assert torch.equal(batch.mask[:, 0], labeled[batch.sample_id])
        assert batch.mask[:, 1:].all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("resident", [False, True])
def test_nothing_is_read_from_the_device(stream, split, images, masked, augment, resident):
    """A meta tensor has no values: whatever asked for one, or for a size made of them, would fail.
    What is in device memory stays there: a step moves nothing but windows from the host."""
    source = ResidentImages(images, META) if resident else images
    labeled = torch.arange(20) % 3 == 0 if masked else None
    samples = (
        sample_set(split, "full_train", split.tasks)
        if labeled is None
        else (partly_labeled(split, labeled))
    )
    options = {"augment": augment, "images": source, "device": META, "samples": samples}
    iterator = iter(stream(shuffled(20, 6, 5, "lower"), **options))
    next(iterator)
    with Copies() as copies:
        batch = next(iterator)
    assert {tensor.device for tensor in batch if tensor is not None} == {META}
    assert batch.inputs.shape == (6, 3, SIZE, SIZE)
    assert len(copies.sizes) == (0 if resident else 1)


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the sizes of tensors that are copied from one device to another."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        moved = function is torch.ops.aten._to_copy.default
        if moved and result.device != args[0].device:
            self.sizes.append(tuple(result.shape))
        return result
