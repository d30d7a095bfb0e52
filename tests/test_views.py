"""Views: their distribution, and their pixels against torchvision's, bit-identical in any batch."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2

from auxilearn.data.views import (
    Resizer,
    _triangles,
    central_views,
    draw_views,
    largest_side,
)
from tests.conftest import ROOT

# --------------------------------------------------------------------------------------------------
# Which boxes
# --------------------------------------------------------------------------------------------------


def drawn(height, width, number=0, count=20_000):
    return draw_views(5, "lower", number, np.tile([height, width], (count, 1))).T


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 341), (300, 32), (18, 18)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    """Every property of a box is, by the two-sample Kolmogorov-Smirnov test (chance: 1e-4)."""
    top, left, box_height, box_width, _ = drawn(height, width)
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array(
        [
            v2.RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
            for _ in range(4000)
        ]
    ).T
    for ours, other in zip((top, left, box_height, box_width), theirs, strict=True):
        assert stats.ks_2samp(ours, other).pvalue > 1e-4
    area, their_area = box_height * box_width, theirs[2] * theirs[3]
    assert stats.ks_2samp(area, their_area).pvalue > 1e-4
    error = area.std() / math.sqrt(4000)
    assert abs(area.mean() - their_area.mean()) < 4 * error


def test_areas_ratios_and_places_are_those_of_the_definition():
    """On a large square image nearly nothing is rounded or refused but too long boxes."""
    side = 10_000
    top, left, height, width, flip = drawn(side, side)
    share, ratio = height * width / side**2, width / height
    assert share.min() > 0.0799 and share.max() <= 1
    assert ratio.min() > 0.7499 and ratio.max() < 1.3335
    inside = share < 0.7  # refused are only boxes of which a side is over 1: sqrt(a 4/3) > 1
    position = (share[inside] - 0.08) / (0.7 - 0.08)
    assert stats.kstest(position, "uniform").pvalue > 1e-4
    position = np.log(ratio[inside]) / np.log(4 / 3) / 2 + 0.5
    assert stats.kstest(position, "uniform").pvalue > 1e-4
    for corner, length in ((top, height), (left, width)):
        free = side - length
        assert (corner >= 0).all() and (corner <= free).all()
        wide = free > 1000
        assert stats.kstest(corner[wide] / free[wide], "uniform").pvalue > 1e-4
    assert set(flip) == {0, 1}
    assert stats.binomtest(int(flip.sum()), len(flip)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2000, 10), [(2000 - 13) // 2, 0, 13, 10]),
        ((10, 2000), [0, (2000 - 13) // 2, 10, 13]),
        ((1, 1), [0, 0, 1, 1]),
    ],
)
def test_boxes_of_images_that_no_try_fits(shape, expected):
    torch.manual_seed(0)
    params = v2.RandomResizedCrop.get_params(torch.empty(3, *shape), [0.08, 1.0], [3 / 4, 4 / 3])
    assert list(params) == expected
    assert (drawn(*shape, count=50)[:4] == np.array(expected)[:, None]).all()


def test_a_view_depends_on_seed_stream_pass_and_sample_alone():
    shapes = np.array([[20, 30], [40, 20], [18, 18]] * 10)
    boxes = draw_views(5, "lower", 1, shapes)
    assert np.array_equal(boxes, draw_views(5, "lower", 1, shapes))
    assert len({tuple(box) for box in boxes}) == 30
    for other in ((6, "lower", 1), (5, "upper", 1), (5, "lower", 2)):
        assert (draw_views(*other, shapes) != boxes).any(axis=1).mean() > 0.8


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), number=st.integers(0, 99))
def test_no_box_is_larger_than_announced(height, width, number):
    _, _, box_height, box_width, _ = drawn(height, width, number, count=200)
    limit = largest_side(np.array([[height, width]]))
    assert max(box_height.max(), box_width.max()) <= limit <= max(height, width)


@given(extra=st.tuples(st.integers(0, 50), st.integers(0, 50)), size=st.integers(1, 40))
def test_central_views_are_torchvisions(extra, size):
    height, width = size + extra[0], size + extra[1]
    image = torch.arange(height * width).reshape(1, height, width)
    ((top, left, *rest),) = central_views(np.array([[height, width]]), size)
    assert rest == [size, size, 0]
    expected = v2.functional.center_crop(image, [size, size])
    assert torch.equal(image[:, top : top + size, left : left + size], expected)


# --------------------------------------------------------------------------------------------------
# Their pixels
# --------------------------------------------------------------------------------------------------


def windows_of(boxes, pad=(0, 0), smooth=False):
    """Windows of random pixels for ``boxes`` (B, 5); garbage beside each box."""
    height, width = boxes[:, 2:4].max(axis=0) + pad
    generator = torch.Generator().manual_seed(0)
    if smooth:
        coarse = torch.rand(len(boxes), 3, 5, 5, generator=generator) * 255
        fine = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
        return fine.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    shape = (len(boxes), height, width, 3)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def by_torchvision(windows, boxes, size):
    views = []
    for window, (_, _, height, width, flip) in zip(windows, boxes.tolist(), strict=True):
        view = window[:height, :width].permute(2, 0, 1)
        view = v2.functional.resize(view, [size, size], antialias=True)
        views.append(v2.functional.horizontal_flip(view) if flip else view)
    return torch.stack(views)


def boxes_of(*sides, flips=(0, 1)):
    return np.array([[0, 0, *side, flip] for side in sides for flip in flips])


RAGGED = {
    8: [(9, 9), (3, 4), (12, 9), (1, 1), (2, 11), (8, 8)],
    16: [(18, 18), (5, 7), (16, 16), (24, 18), (17, 13), (1, 20)],
    32: [(37, 37), (49, 37), (10, 13), (33, 31)],
    61: [(70, 70), (93, 70), (20, 15), (122, 9)],
    96: [(110, 110), (146, 110), (33, 40)],
    224: [(256, 256), (341, 256), (80, 100), (224, 225)],
}


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", RAGGED)
def test_views_are_torchvisions_within_one_grey_level(size, smooth):
    boxes = boxes_of(*RAGGED[size])
    windows = windows_of(boxes, smooth=smooth)
    expected = by_torchvision(windows, boxes, size)
    resizer = Resizer(size, boxes[:, 2:4].max(), "cpu")
    products = resizer.products(windows, torch.from_numpy(boxes))
    one_by_one = resizer.one_by_one(windows, boxes)
    assert torch.equal(one_by_one, expected)
    for views in (products, one_by_one):
        assert views.dtype == torch.uint8 and views.shape == (len(boxes), 3, size, size)
        assert views.is_contiguous(memory_format=torch.channels_last)
    difference = (products.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.25  # torchvision rounds in between, to whole grey levels


SIDES = st.tuples(st.integers(1, 60), st.integers(1, 60))


@settings(max_examples=50, deadline=None)
@given(sides=st.lists(SIDES, min_size=1, max_size=5), size=st.integers(6, 40))
def test_products_are_exact(sides, size):
    """They equal products of whole numbers, which no order of summation can change."""
    boxes = boxes_of(*sides)
    windows = windows_of(boxes)
    views = Resizer(size, boxes[:, 2:4].max(), "cpu").products(windows, torch.from_numpy(boxes))
    for view, window, (_, _, height, width, flip) in zip(
        views.numpy(), windows.numpy(), boxes, strict=True
    ):
        rows = np.rint(shares(height, size) * 2**16).astype(np.int64)
        columns = np.rint(shares(width, size) * 2**12).astype(np.int64)
        box = window[:height, :width].astype(np.int64)
        between = halves_to_even(np.einsum("ij,jkc->ikc", rows, box), 2**12)
        expected = halves_to_even(np.einsum("ij,kjc->cki", columns, between), 2**16)
        expected = np.minimum(expected, 255)
        assert np.array_equal(view, expected[:, :, ::-1] if flip else expected)


def shares(side, size):
    """(size, side): by the definition, a triangle around each pixel's centre, in float64."""
    scale = side / size
    centres = (np.arange(size)[:, None] + 0.5) * scale
    triangle = 1 - np.abs(np.arange(side) + 0.5 - centres) / max(scale, 1)
    triangle = np.where(triangle > 1e-12, triangle, 0)
    return triangle / triangle.sum(axis=1, keepdims=True)


def halves_to_even(numbers, unit):
    quotient, rest = np.divmod(numbers, unit)
    return quotient + ((2 * rest > unit) | ((2 * rest == unit) & (quotient % 2 == 1)))


@pytest.mark.parametrize("size", [16, 61])
def test_views_do_not_depend_on_batch_padding_and_threads(size):
    boxes = np.repeat(boxes_of(*RAGGED[size]), 3, axis=0)
    windows, on_device = windows_of(boxes), torch.from_numpy(boxes)
    resizer = Resizer(size, boxes[:, 2:4].max(), "cpu")
    views = resizer.products(windows, on_device)
    for parts in (1, 5):
        pieces = zip(windows.split(parts), on_device.split(parts), strict=True)
        assert torch.equal(torch.cat([resizer.products(*piece) for piece in pieces]), views)
    padded = F.pad(windows, (0, 0, 0, 29, 0, 7), value=255)
    assert torch.equal(resizer.products(padded, on_device), views)
    larger = Resizer(size, boxes[:, 2:4].max() + 100, "cpu")
    assert torch.equal(larger.products(windows, on_device), views)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(resizer.products(windows, on_device), views)
    finally:
        torch.set_num_threads(threads)


SWITCHES = {
    "nothing": "",
    "old": "torch.set_float32_matmul_precision('medium')",
    "new": "torch.backends.cuda.matmul.fp32_precision = 'tf32'; "
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_precision_of_products_is_full_and_put_back(switch):
    """In a process of its own: PyTorch does not let anybody go back from the new switch."""
    if switch == "new" and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("PyTorch before 2.9")
    program = f"""
import numpy as np, torch
from auxilearn.data.views import Resizer, float32_products
windows = torch.randint(256, (4, 40, 40, 3), dtype=torch.uint8)
boxes = torch.tensor([[0, 0, 40, 30, 1]] * 4)
resizer = Resizer(32, 40, "cpu")
expected = resizer.products(windows, boxes)
{SWITCHES[switch]}
a = torch.randn(64, 64)
rounded = a @ a
with float32_products():
    full = a @ a
assert torch.allclose(full.double(), a.double() @ a.double(), atol=1e-4)
assert torch.equal(a @ a, rounded)
assert torch.equal(resizer.products(windows, boxes), expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("colour", [0, 1, 127, 254, 255])
def test_a_plain_box_gives_a_plain_view(colour):
    boxes = boxes_of((18, 18), (3, 24), (24, 5))
    windows = torch.full((6, 24, 24, 3), colour, dtype=torch.uint8)
    views = Resizer(16, 24, "cpu").products(windows, torch.from_numpy(boxes))
    assert (views == colour).all()


def test_boxes_for_which_products_would_not_be_exact_are_refused():
    assert _triangles(8, 96)[0].shape[-1] == 24
    with pytest.raises(ValueError, match="boxes of 97 pixels are too large for views of 8"):
        Resizer(8, 97, "cpu")
