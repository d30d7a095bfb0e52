"""The closed-form second order of convolution against PyTorch's own, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auxilearn.second_order import convolution
from auxilearn.second_order.convolution import FastConvolution
from auxilearn.second_order.operators import Operators

pytestmark = pytest.mark.usefixtures("float64")

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "bias": lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=1, bias=False),
    "dilation": lambda: nn.Conv2d(4, 6, 2, dilation=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
}


def products(layer, x, skip=False):
    """Gradient of a function of the layer's output and its Hessian-vector product, lists."""
    convolution = FastConvolution()
    with Operators({F.conv2d: convolution}):
        y = layer(x)
        value = (y.sin() * torch.linspace(0.5, 2.0, y.numel()).reshape(y.shape)).sum()
        convolution.leaf_gradients = not skip
        inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
        g = torch.autograd.grad(value, inputs, create_graph=True)
    torch.manual_seed(1)
    directions = [torch.randn_like(t) for t in inputs]
    return g, torch.autograd.grad(g, inputs, directions, retain_graph=True)


@pytest.fixture
def plain(monkeypatch):
    """A function that calls another one with convolutions left to PyTorch."""

    def call(function, *args):
        with monkeypatch.context() as context:
            context.setattr(convolution._Convolution, "apply", plain_convolution)
            return function(*args)

    def plain_convolution(x, weight, bias, geometry, mode):
        with torch._C.DisableTorchFunction():
            return F.conv2d(x, weight, bias, *geometry)

    return call


@pytest.fixture
def calls(counted):
    """Counts the convolutions that take the fast path."""
    return counted(convolution._Convolution)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_order_equal_pytorchs(name, memory_format, plain):
    layer = LAYERS[name]().to(memory_format=memory_format)
    x = torch.randn(3, 4, 7, 6).to(memory_format=memory_format).requires_grad_()
    expected = plain(products, layer, x)
    torch.testing.assert_close(products(layer, x), expected, rtol=1e-10, atol=1e-11)
    # Without the values of the gradients of weights, their derivatives are the same.
    _, product = products(layer, x, skip=True)
    torch.testing.assert_close(product, expected[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient(frozen, plain):
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(3, 4, 7, 6, requires_grad=True)
    (x if frozen == "x" else getattr(layer, frozen)).requires_grad_(False)
    expected = plain(products, layer, x)
    torch.testing.assert_close(products(layer, x, skip=True)[1], expected[1])


def test_only_the_weight_gradients_of_leaves_are_left_out():
    x, weight = torch.randn(3, 4, 7, 6), torch.randn(6, 4, 3, 3, requires_grad=True)
    convolution = FastConvolution()
    with Operators({F.conv2d: convolution}):
        of_leaf, of_other = F.conv2d(x, weight).sum(), F.conv2d(x, derived := weight * 1).sum()
        of_cast = F.conv2d(x.bfloat16(), weight.bfloat16()).float().sum()
        convolution.leaf_gradients = False
        (leaf,) = torch.autograd.grad(of_leaf, weight, create_graph=True)
        (cast,) = torch.autograd.grad(of_cast, weight, create_graph=True)
        (other,) = torch.autograd.grad(of_other, derived, create_graph=True)
        (read,) = torch.autograd.grad(F.conv2d(x, weight).sum(), weight)  # nothing will follow
    assert not leaf.any()
    assert not cast.any()
    torch.testing.assert_close(other, read)
    assert read.abs().min() > 0


def test_the_mode_is_what_computes(calls):
    layer, x = LAYERS["plain"](), torch.randn(3, 4, 7, 6)
    with Operators({F.conv2d: FastConvolution()}):
        assert torch.equal(layer(x), nn.Sequential(layer)(x))
    assert len(calls) == 2
    layer(x)
    assert len(calls) == 2


def test_what_the_mode_does_not_know_is_left_to_pytorch(calls):
    x = torch.randn(3, 4, 7, 6)
    layer = nn.Conv2d(4, 6, 3)
    same = nn.Conv2d(4, 6, 3, padding="same")
    transposed = nn.ConvTranspose2d(4, 6, 3)
    expected = same(x), layer(x[0]), transposed(x)
    with Operators({F.conv2d: FastConvolution()}):
        assert all(
            torch.equal(a, b)
            for a, b in zip(expected, (same(x), layer(x[0]), transposed(x)), strict=True)
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x.float()).dtype == torch.bfloat16
    assert not calls
