"""The closed-form second order of batch norm against PyTorch's own double backward, in float64."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from auxilearn.second_order import batch_norm
from auxilearn.second_order.batch_norm import fast_batch_norm
from auxilearn.second_order.operators import Operators

pytestmark = pytest.mark.usefixtures("float64")


LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(3), (9, 3)),
    "1d sequence": (lambda: nn.BatchNorm1d(3), (5, 3, 4)),
    "2d": (lambda: nn.BatchNorm2d(3), (5, 3, 4, 2)),
    "3d": (lambda: nn.BatchNorm3d(3, eps=0.1), (3, 3, 2, 2, 2)),
    "2d without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 2)),
}


def layer_and_arguments(name, zero_weight=False):
    make, shape = LAYERS[name]
    layer = make()
    parameters = {"weight": torch.randn(3), "bias": torch.randn(3)}
    if zero_weight:  # as residual blocks are often initialised
        parameters["weight"][1] = 0.0
    arguments = {"x": torch.randn(shape), **parameters}
    return layer, arguments, {key: torch.randn_like(value) for key, value in arguments.items()}


def objective(layer, arguments):
    x, parameters = arguments["x"], {k: arguments[k] for k in ("weight", "bias")}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    y = functional_call(layer, parameters | buffers, (x,))
    return (y.sin() * torch.linspace(0.5, 2.0, y.numel()).reshape(y.shape)).sum()


def products(layer, arguments, direction):
    """Gradient and Hessian-vector product by double backward."""
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}
    inputs = list(leaves.values())
    g = torch.autograd.grad(objective(layer, leaves), inputs, create_graph=True)
    return g, torch.autograd.grad(g, inputs, list(direction.values()))


def slope(layer, arguments, direction, smallest=0):
    """The objective's derivative in forward mode with the mode on."""
    with Operators(fast_batch_norm(smallest)), forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(v, direction[k]) for k, v in arguments.items()}
        return forward_ad.unpack_dual(objective(layer, duals)).tangent


def fast_products(layer, arguments, direction):
    """Gradient and Hessian-vector product with the mode on."""
    with Operators(fast_batch_norm()):
        return products(layer, arguments, direction)


@pytest.mark.parametrize("zero_weight", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_order_equal_double_backward(name, zero_weight):
    layer, arguments, direction = layer_and_arguments(name, zero_weight)
    plain = products(layer, arguments, direction)
    expected = sum((a * b).sum() for a, b in zip(plain[0], direction.values(), strict=True))
    found = slope(layer, arguments, direction)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    fast = fast_products(layer, arguments, direction)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.fixture
def calls(counted):
    """Counts the batch norms that take the fast path."""
    return counted(batch_norm._BatchNorm)


def test_the_mode_is_what_computes(calls):
    layer, arguments, direction = layer_and_arguments("2d")
    fast_products(layer, arguments, direction)
    assert calls
    calls.clear()
    layer(arguments["x"])
    assert not calls


@pytest.mark.parametrize("name", LAYERS)
def test_smaller_activations_are_left_to_pytorch(name, calls):
    layer, arguments, direction = layer_and_arguments(name)
    size = arguments["x"].numel()
    ours = slope(layer, arguments, direction, smallest=size)
    assert len(calls) == 1
    theirs = slope(layer, arguments, direction, smallest=size + 1)
    assert len(calls) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(3).eval(),
        lambda: nn.BatchNorm2d(3, affine=False),
        lambda: nn.InstanceNorm2d(3),
    ],
)
def test_what_the_mode_does_not_know_is_left_to_pytorch(make, calls):
    layer, x = make(), torch.randn(5, 3, 4, 4)
    expected = layer(x)
    with Operators(fast_batch_norm()):
        assert torch.equal(layer(x), expected)
    assert not calls


def test_in_bfloat16_products_are_as_exact_as_double_backward():
    """With weights in float32 and means that dwarf deviations: against float64."""
    layer, arguments, direction = layer_and_arguments("2d without statistics")
    arguments["x"] = arguments["x"] + 3.0
    for tensors in (arguments, direction):
        tensors |= {"x": tensors["x"].bfloat16(), "weight": tensors["weight"].float()}
        tensors["bias"] = tensors["bias"].float()
    exact = products(
        layer, *({k: v.double() for k, v in t.items()} for t in (arguments, direction))
    )

    def error(found):
        found, expected = (
            torch.cat([t.flatten() for t in ts[1]]).double() for ts in (found, exact)
        )
        return ((found - expected).norm() / expected.norm()).item()

    plain = error(products(layer, arguments, direction))
    with Operators(fast_batch_norm()):
        assert error(products(layer, arguments, direction)) < 1.5 * plain
    assert 1e-4 < plain < 0.02
