"""Where pixels come from: files, the cache, a device. Always the same pixels, whatever happens."""

import errno
import json
import os
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

from auxilearn.data import cache, cub, pixels
from auxilearn.data.cache import open_images
from auxilearn.data.dataset import Stream, in_order, sample_set, shuffled
from auxilearn.data.pixels import (
    DecodedImages,
    PackedImages,
    ResidentImages,
    Wanted,
    load_resized,
    near,
    resized_shape,
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


def cache_path(directory):
    (path,) = directory.glob("*.cache")
    return path


def open_cache(split, directory, image_size=IMAGE_SIZE, workers=0):
    """The images, which must come from a cache."""
    images = open_images(split, image_size, directory, workers)
    assert isinstance(images, PackedImages)
    return images


def assert_same_images(images, split):
    assert len(images.shapes) == len(split.paths)
    for position in range(len(split.paths)):
        expected, found = load_resized(split.image_path(position), 32), images.load(position)
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected)
        assert found.shape == (*images.shapes[position], 3)


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
    images = open_cache(split, directory, workers=workers)
    assert_same_images(images, split)
    assert images.load(3).shape == (32, 960, 3)
    decoded = open_images(split, IMAGE_SIZE, "none", workers)
    assert isinstance(decoded, DecodedImages)
    assert_same_images(decoded, split)


def sources(split, directory):
    cached = open_cache(split, directory)
    return {
        "cache": cached,
        "device": ResidentImages(cached, torch.device("cpu")),
        "decoded": open_images(split, IMAGE_SIZE, "none", 0),
        "threads": open_images(split, IMAGE_SIZE, "none", 2),
    }


def test_windows_hold_the_boxes_whichever_the_source(split, directory):
    rng = np.random.default_rng(0)
    for name, images in sources(split, directory).items():
        requests = []
        for size in (3, 1, 7):
            positions = rng.integers(len(split.paths), size=size)
            shapes = images.shapes[positions]
            sides = 1 + (rng.random((size, 2)) * shapes).astype(int)
            corners = (rng.random((size, 2)) * (shapes - sides + 1)).astype(int)
            flips = np.zeros((size, 1), int)
            wanted = Wanted(np.arange(size), positions, np.hstack([corners, sides, flips]))
            requests.append((wanted, wanted.on(torch.device("cpu"))))
        found = list(images.windows(iter(requests)))
        assert [here for here, _, _ in found] == [here for here, _ in requests]
        for here, _, windows in found:
            assert windows.shape == (len(here.places), *here.boxes[:, 2:4].max(axis=0), 3)
            rows = zip(windows.numpy(), here.positions, here.boxes, strict=True)
            for window, position, (top, left, height, width, _) in rows:
                image = load_resized(split.image_path(position), 32)
                expected = image[top : top + height, left : left + width]
                assert np.array_equal(window[:height, :width], expected), name


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_batches_do_not_depend_on_the_source(split, directory, augment, products, monkeypatch):
    if not products:
        monkeypatch.setattr("auxilearn.data.dataset.PRODUCTS_UP_TO", 0)
    samples = sample_set(split, "full_train", split.tasks[:4])

    def batches(images):
        order = shuffled(len(samples), 6, 5, "lower")
        options = {"augment": augment, "seed": 5, "name": "lower"}
        stream = Stream(images, samples, order, IMAGE_SIZE, torch.device("cpu"), **options)
        iterator = iter(stream)
        return [next(iterator) for _ in range(8)]  # two passes

    found = {name: batches(images) for name, images in sources(split, directory).items()}
    for name, others in found.items():
        for one, other in zip(found["cache"], others, strict=True):
            assert other.inputs.dtype == torch.uint8
            assert torch.equal(one.inputs, other.inputs), name
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.sample_id, other.sample_id)
            assert other.inputs.is_contiguous(memory_format=torch.channels_last)


def test_threads_decode_one_batch_ahead(split):
    images = open_images(split, IMAGE_SIZE, "none", 2)
    loaded, decode = [], images.load
    images.load = lambda position: loaded.append(position) or decode(position)
    samples = sample_set(split, "full_train", split.tasks[:1])
    order = in_order(len(samples), 4)
    options = {"augment": False, "seed": 5, "name": "report"}
    stream = iter(Stream(images, samples, order, IMAGE_SIZE, torch.device("cpu"), **options))
    for ahead in (8, 12):
        next(stream)
        deadline = time.monotonic() + 60
        while len(loaded) < ahead:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(loaded) == ahead


def test_pixels_move_to_a_gpu_only_where_they_take_little_of_it(split, directory, monkeypatch):
    images = open_cache(split, directory)
    size = images.pixels.nbytes
    monkeypatch.setattr(pixels, "ResidentImages", lambda *args: args)
    gpu = torch.device("cuda", 0)
    for free, moved in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 8 * size))
        assert near(images, gpu) == ((images, gpu) if moved else images)
    assert near(images, torch.device("cpu")) is images
    decoded = open_images(split, IMAGE_SIZE, "none", 0)
    assert near(decoded, gpu) is decoded


# --------------------------------------------------------------------------------------------------
# Built once, and again when it must be
# --------------------------------------------------------------------------------------------------


def test_size_is_announced_and_the_cache_is_built_once(split, directory, capsys):
    open_cache(split, directory)
    line = capsys.readouterr().out
    (name,) = cache_files(directory)
    size = (directory / name).stat().st_size / 1e6
    assert re.search(rf"40 images, .*32 pixels, {size:.1f} MB, to {directory} ", line)
    before = cache_files(directory)
    assert_same_images(open_cache(split, directory), split)
    assert capsys.readouterr().out == ""
    assert cache_files(directory) == before


def test_another_division_of_the_same_images_shares_the_cache(split, directory, tmp_path):
    open_cache(split, directory)
    before = cache_files(directory)
    annotations = cub.read_annotations(tmp_path / "data")
    write_split(tmp_path / "other", annotations, aux_shot=2, split_seed=9)
    dictionary = tmp_path / "other/image_dictionary.json"  # the order of ids is of no account
    rows = json.loads(dictionary.read_text())
    dictionary.write_text(json.dumps(dict(reversed(rows.items()))))
    other = load_split(tmp_path / "other")
    assert other.paths == split.paths[::-1]
    assert other.fingerprint != split.fingerprint
    assert_same_images(open_cache(other, directory), other)
    assert cache_files(directory) == before


@pytest.mark.parametrize("what", ["size", "pillow", "image"])
def test_what_pixels_depend_on_has_a_cache_of_its_own(split, directory, monkeypatch, what):
    open_cache(split, directory)
    image_size = IMAGE_SIZE
    if what == "size":
        image_size = 2 * IMAGE_SIZE
    elif what == "pillow":
        monkeypatch.setattr(cache.PIL, "__version__", "0.0")
    else:
        Image.new("RGB", (30, 30)).save(split.image_path(0))
    second = open_cache(split, directory, image_size)
    assert len(cache_files(directory)) == 2
    if what != "size":
        assert_same_images(second, split)


@pytest.mark.parametrize("content", ["nothing", "garbage", "half", "one byte more", "other shapes"])
def test_a_damaged_file_is_not_taken_for_a_cache(split, directory, content):
    open_cache(split, directory)
    path = cache_path(directory)
    whole = path.read_bytes()
    if content == "other shapes":
        path.write_bytes(whole[:320].replace(b"\x20", b"\x21") + whole[320:])
    else:
        damaged = {
            "nothing": b"",
            "garbage": b"not a cache" * 100,
            "half": whole[: len(whole) // 2],
            "one byte more": whole + b"x",
        }
        path.write_bytes(damaged[content])
    assert_same_images(open_cache(split, directory), split)
    assert path.read_bytes() == whole


def test_an_open_cache_outlives_its_deletion(split, directory):
    images = open_cache(split, directory)
    shutil.rmtree(directory)
    assert_same_images(images, split)


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
        open_cache(split, directory)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shape", [(110, 100), (2000, 2)])
def test_an_image_too_large_for_pillow_is_named(split, directory, monkeypatch, workers, shape):
    """The second one only once its shorter side is resized to 32 pixels."""
    path = split.image_path(5)
    Image.new("RGB", shape).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for place in (directory, "none"):
        with pytest.raises(UserError, match=re.escape(f"{path}: not a readable image (")):
            open_images(split, IMAGE_SIZE, place, workers)


def test_an_image_that_changes_during_a_run_is_named(split):
    images = open_images(split, IMAGE_SIZE, "none", 0)
    path = split.image_path(5)
    Image.new("RGB", (300, 20)).save(path)
    with pytest.raises(UserError, match=re.escape(f"{path}: the image has changed")):
        images.load(5)


def no_disk_space(directory, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    return directory, r"takes 0\.2 MB, but .* has 0\.1 MB free"


def full_disk(directory, monkeypatch):
    def write(self, file):
        file.write(bytes(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.Cache, "_write", write)
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
    open_cache(split, directory)
    monkeypatch.setattr(cache, "_alone_in", None)  # nothing is locked, made or cleared
    assert_same_images(open_cache(split, directory), split)


# --------------------------------------------------------------------------------------------------
# Several builders, killed builders
# --------------------------------------------------------------------------------------------------


def test_of_two_builders_at_once_one_builds_and_the_other_waits(
    split, directory, monkeypatch, capsys
):
    decode, decoded, gate = load_resized, [], threading.Event()

    def slow(*args):
        decoded.append(args)
        assert gate.wait(60)
        return decode(*args)

    def build():
        return open_cache(split, directory)

    def wait_for(what):
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(pixels, "load_resized", slow)
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

    monkeypatch.setattr(pixels, "load_resized", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_cache(split, directory)
    assert cache_files(directory) == {}


BUILDER = """
import sys, time
from auxilearn.data import cache, pixels
from auxilearn.data.split import load_split

decode = pixels.load_resized
def slow(*args):
    time.sleep(0.2)
    return decode(*args)
pixels.load_resized = slow
cache.open_images(load_split(sys.argv[1]), 28, sys.argv[2], 2)
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
    images = open_cache(split, directory)
    assert_same_images(images, split)
    assert list(cache_files(directory)) == [cache_path(directory).name]


# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), side=st.integers(1, 300))
def test_resized_shape_is_torchvisions(height, width, side):
    tensor = torch.empty(0, height, width)
    assert resized_shape(height, width, side) == v2.functional.resize(tensor, side).shape[1:]


def test_images_are_resized_as_torchvision_does(split):
    path = split.image_path(0)
    expected = v2.functional.resize(Image.open(path).convert("RGB"), 32)
    assert np.array_equal(load_resized(path, 32), np.asarray(expected))
