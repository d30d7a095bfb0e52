"""The decoded-image cache: the same pixels, built once, whatever happens while it is built.

Also the views that training takes of the images, which must not depend on the cache.
"""

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from auxilearn.data import cache, cub
from auxilearn.data.cache import ImageCache, open_cache, open_images
from auxilearn.data.dataset import (
    DecodedImages,
    EndlessBatches,
    OrderedBatches,
    Stream,
    load_resized,
    random_view,
    resized_shape,
    sample_set,
)
from auxilearn.data.split import load_split, write_split
from auxilearn.errors import UserError
from tests.cub_shape import write_cub_shape

IMAGE_SIZE = 28  # resized to 32


@pytest.fixture
def split(tmp_path):
    root = write_cub_shape(tmp_path / "data")
    write_split(tmp_path / "split", cub.read_annotations(root))
    return load_split(tmp_path / "split")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "cache"


def cache_files(directory):
    """Everything in the cache's folder, with what tells one file from its replacement."""
    found = [path for path in directory.iterdir() if path.name != ".lock"]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def used(split):
    return np.unique(np.concatenate(list(split.indices.values())))


def assert_same_images(images, split):
    decoded = DecodedImages(split, IMAGE_SIZE)
    for position in used(split):
        expected, found = decoded.load(position), images.load(position)
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


# --------------------------------------------------------------------------------------------------
# The same pixels
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_those_of_decoding(split, directory, workers):
    # Beside the colour and grey JPEGs of all shapes: palette, transparency, a wide panorama.
    rng = np.random.default_rng(0)
    first = Image.open(split.image_path(0))
    first.quantize(16).save(split.image_path(1), "PNG")
    rgba = rng.integers(0, 256, (50, 33, 4), dtype=np.uint8)
    Image.fromarray(rgba, "RGBA").save(split.image_path(2), "PNG")
    first.resize((600, 20)).save(split.image_path(3), "JPEG")
    images = open_cache(split, IMAGE_SIZE, directory, workers)
    assert isinstance(images, ImageCache)
    assert_same_images(images, split)
    assert images.load(3).shape == (3, 32, 960)


@pytest.mark.parametrize(("augment", "workers"), [(True, 2), (False, 0)])
def test_batches_do_not_depend_on_cache_and_workers(split, directory, augment, workers):
    samples = sample_set(split, "full_train", 4)
    cached = open_cache(split, IMAGE_SIZE, directory, 0)
    decoded = DecodedImages(split, IMAGE_SIZE)

    def batches(images, workers):
        order = EndlessBatches(len(samples), 6, 5, "lower")
        options = {"augment": augment, "seed": 5, "name": "lower", "workers": workers}
        stream = Stream(images, samples, order, IMAGE_SIZE, torch.device("cpu"), **options)
        iterator = iter(stream)
        return [next(iterator) for _ in range(8)]  # two passes

    for one, other in zip(batches(decoded, 0), batches(cached, workers), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert other.images.is_contiguous(memory_format=torch.channels_last)


def test_only_images_of_the_sets_are_kept(split, directory):
    dropped = int(split.indices["test"][0])
    split.indices["test"] = split.indices["test"][1:]
    split.image_path(dropped).unlink()
    images = open_cache(split, IMAGE_SIZE, directory, 0)
    assert len(images.index) == len(split.image_ids) - 1
    assert_same_images(images, split)


# --------------------------------------------------------------------------------------------------
# Built once, and again when it must be
# --------------------------------------------------------------------------------------------------


def test_size_is_announced_and_the_cache_is_built_once(split, directory, capsys):
    open_cache(split, IMAGE_SIZE, directory, 0)
    line = capsys.readouterr().out
    (name,) = cache_files(directory)
    size = (directory / name).stat().st_size / 1e6
    assert re.search(rf"40 images, .*32 pixels, {size:.1f} MB, to {directory} ", line)
    before = cache_files(directory)
    assert_same_images(open_cache(split, IMAGE_SIZE, directory, 0), split)
    assert capsys.readouterr().out == ""
    assert cache_files(directory) == before


def test_another_division_of_the_same_images_shares_the_cache(split, directory, tmp_path):
    open_cache(split, IMAGE_SIZE, directory, 0)
    before = cache_files(directory)
    annotations = cub.read_annotations(tmp_path / "data")
    write_split(tmp_path / "other", annotations, aux_shot=2, split_seed=9)
    other = load_split(tmp_path / "other")
    assert other.fingerprint != split.fingerprint
    assert_same_images(open_cache(other, IMAGE_SIZE, directory, 0), other)
    assert cache_files(directory) == before


@pytest.mark.parametrize("what", ["size", "pillow", "image"])
def test_what_pixels_depend_on_has_a_cache_of_its_own(split, directory, monkeypatch, what):
    first = open_cache(split, IMAGE_SIZE, directory, 0)
    image_size = IMAGE_SIZE
    if what == "size":
        image_size = 2 * IMAGE_SIZE
    elif what == "pillow":
        monkeypatch.setattr(cache.PIL, "__version__", "0.0")
    else:
        Image.new("RGB", (30, 30)).save(split.image_path(0))
    second = open_cache(split, image_size, directory, 0)
    assert first.path != second.path
    assert len(cache_files(directory)) == 2
    if what != "size":
        assert_same_images(second, split)


def test_image_replaced_by_one_of_the_same_byte_size(split, directory):
    for position, colour in ((0, "red"), (1, "lime")):
        Image.new("RGB", (40, 30), colour).save(split.image_path(position), "BMP")
    open_cache(split, IMAGE_SIZE, directory, 0)
    before = cache_files(directory)
    path, later = split.image_path(0), time.time() + 10
    os.utime(path, (later, later))  # another time alone does not matter
    open_cache(split, IMAGE_SIZE, directory, 0)
    assert cache_files(directory) == before
    shutil.copyfile(split.image_path(1), path)
    images = open_cache(split, IMAGE_SIZE, directory, 0)
    assert images.load(0)[:, 0, 0].tolist() == [0, 255, 0]
    after = cache_files(directory)
    assert after.keys() == before.keys()
    assert after != before


@pytest.mark.parametrize("content", ["nothing", "garbage", "half", "one byte more", "other array"])
def test_a_damaged_file_is_not_taken_for_a_cache(split, directory, content):
    images = open_cache(split, IMAGE_SIZE, directory, 0)
    whole = images.path.read_bytes()
    if content == "other array":
        np.save(images.path.open("wb"), np.zeros(3))
    else:
        damaged = {
            "nothing": b"",
            "garbage": b"not a cache" * 100,
            "half": whole[: len(whole) // 2],
            "one byte more": whole + b"x",
        }
        images.path.write_bytes(damaged[content])
    assert_same_images(open_cache(split, IMAGE_SIZE, directory, 0), split)
    assert images.path.read_bytes() == whole


def test_an_open_cache_outlives_its_deletion(split, directory):
    images = open_cache(split, IMAGE_SIZE, directory, 0)
    shutil.rmtree(directory)
    assert_same_images(images, split)


def test_a_worker_that_is_not_forked_maps_the_file_itself(split, directory):
    images = open_cache(split, IMAGE_SIZE, directory, 0)
    pickled = pickle.dumps(images)
    assert len(pickled) < images.path.stat().st_size / 10
    assert_same_images(pickle.loads(pickled), split)
    images.path.unlink()
    with pytest.raises(UserError, match="replaced or removed while a run used it"):
        pickle.loads(pickled)


# --------------------------------------------------------------------------------------------------
# Where there can be no cache
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_and_nothing_is_left(split, directory, workers):
    path = split.image_path(17)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])  # its header is still fine
    with pytest.raises(UserError, match=re.escape(f"{path}: not a readable image")):
        open_images(split, IMAGE_SIZE, directory, workers)
    assert cache_files(directory) == {}
    path.write_bytes(content)
    assert_same_images(open_images(split, IMAGE_SIZE, directory, workers), split)


def test_a_missing_image_is_named(split, directory):
    split.image_path(3).unlink()
    with pytest.raises(UserError, match=re.escape(f"{split.image_path(3)}: ")):
        open_cache(split, IMAGE_SIZE, directory, 0)


def no_disk_space(directory, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    return directory, r"takes 0\.2 MB, but .* has 0\.1 MB free"


def full_disk(directory, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "_write", write)
    return directory, r"cannot be written to .* \(No space left on device\)"


def no_folder(directory, monkeypatch):
    directory.write_text("a file")
    return directory / "inside", r"\(Not a directory\)"


def read_only_folder(directory, monkeypatch):
    directory.mkdir()
    directory.chmod(0o555)
    if os.access(directory, os.W_OK):
        pytest.skip("this user may write everywhere")
    return directory, r"no image cache can be written to .* \(Permission denied\)"


def read_only_file_system(directory, monkeypatch):
    def mkdir(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache.Path, "mkdir", mkdir)
    return directory, r"no image cache can be written to .* \(Read-only file system\)"


@pytest.mark.parametrize(
    "obstacle", [no_disk_space, full_disk, no_folder, read_only_folder, read_only_file_system]
)
def test_without_a_place_for_it(split, directory, monkeypatch, capsys, obstacle):
    place, message = obstacle(directory, monkeypatch)
    images = open_images(split, IMAGE_SIZE, place, 0)
    assert isinstance(images, DecodedImages)
    assert re.search(f"^warning: .*{message}.*--cache_dir none", capsys.readouterr().err)
    assert not directory.is_dir() or cache_files(directory) == {}


def test_without_a_cache(split, directory, capsys):
    assert isinstance(open_images(split, IMAGE_SIZE, "none", 0), DecodedImages)
    assert isinstance(open_images(split, IMAGE_SIZE, directory, 0, build=False), DecodedImages)
    assert not directory.exists() and capsys.readouterr() == ("", "")


def test_a_complete_cache_in_a_read_only_folder_is_used(split, directory, monkeypatch):
    open_cache(split, IMAGE_SIZE, directory, 0)
    monkeypatch.setattr(cache, "_alone_in", None)  # nothing is locked, made or cleared
    assert_same_images(open_cache(split, IMAGE_SIZE, directory, 0), split)


# --------------------------------------------------------------------------------------------------
# Several builders, killed builders
# --------------------------------------------------------------------------------------------------


def test_of_two_builders_at_once_one_builds_and_the_other_waits(
    split, directory, monkeypatch, capsys
):
    decode, decoded, gate = cache.load_resized, [], threading.Event()

    def slow(*args):
        decoded.append(args)
        assert gate.wait(60)
        return decode(*args)

    def build():
        return open_cache(split, IMAGE_SIZE, directory, 0)

    def wait_for(what):
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(cache, "load_resized", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build)
        wait_for(lambda: decoded)
        second = pool.submit(build)
        wait_for(lambda: "waiting for another process" in capsys.readouterr().out)
        gate.set()
    assert len(decoded) == 40
    for builder in (first, second):
        assert_same_images(builder.result(), split)
    assert len(cache_files(directory)) == 1


def test_an_interrupted_builder_leaves_nothing(split, directory, monkeypatch):
    def interrupt(path, side):
        if path == split.image_path(30):
            raise KeyboardInterrupt
        return load_resized(path, side)

    monkeypatch.setattr(cache, "load_resized", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_cache(split, IMAGE_SIZE, directory, 0)
    assert cache_files(directory) == {}


BUILDER = """
import sys, time
from auxilearn.data import cache
from auxilearn.data.split import load_split

decode = cache.load_resized
def slow(*args):
    time.sleep(0.2)
    return decode(*args)
cache.load_resized = slow
cache.open_cache(load_split(sys.argv[1]), 28, sys.argv[2], 2)
"""


def test_what_a_killed_builder_leaves_is_no_cache_and_goes(split, directory, tmp_path):
    command = [sys.executable, "-c", BUILDER, tmp_path / "split", directory]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 4000 for path in directory.glob(".images-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=60)
    (leftover,) = cache_files(directory)
    assert leftover.startswith(".images-")
    images = open_cache(split, IMAGE_SIZE, directory, 0)  # once orphaned workers have ended
    assert_same_images(images, split)
    assert list(cache_files(directory)) == [images.path.name]


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------

SIDES = st.integers(min_value=1, max_value=90)


@given(height=SIDES, width=SIDES, size=st.integers(8, 40), seed=st.integers(0, 2**63 - 1))
def test_random_view_is_torchvisions_and_leaves_the_generator_alone(height, width, size, seed):
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(array).permute(2, 0, 1)
    transform = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    torch.manual_seed(seed)
    expected = transform(image)
    state = torch.get_rng_state()
    view = random_view(image, size, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(view, expected)
    assert torch.equal(random_view(image.contiguous(), size, seed), expected)


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), side=st.integers(1, 300))
def test_resized_shape_is_torchvisions(height, width, side):
    tensor = torch.empty(0, height, width)
    assert resized_shape(height, width, side) == v2.functional.resize(tensor, side).shape[1:]


def test_evaluation_view_is_the_centre(split):
    samples = sample_set(split, "valid", 1)
    order = OrderedBatches(len(samples), 4)
    images = DecodedImages(split, IMAGE_SIZE)
    options = {"augment": False, "seed": 5, "name": "valid", "workers": 0}
    stream = Stream(images, samples, order, IMAGE_SIZE, torch.device("cpu"), **options)
    crop = v2.CenterCrop(IMAGE_SIZE)
    views = torch.cat([batch.images for batch in stream])
    for view, position in zip(views, samples.positions, strict=True):
        assert torch.equal(view, crop(images.load(position)))
