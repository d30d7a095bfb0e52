"""The package's batch norm beside PyTorch's, by size: forward mode, and a Hessian-vector product.

  python benchmarks/batch_norm.py

``second_order.batch_norm.SMALLEST_IN_FORWARD_MODE`` comes from this table. One thread, CPU time,
channels-last; the product is that of a gradient whose graph is there.
"""

import contextlib
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.autograd import forward_ad, grad
from torch.nn.functional import batch_norm

sys.path.insert(0, str(Path(__file__).parents[1]))

from auxilearn.second_order.batch_norm import fast_batch_norm  # noqa: E402
from auxilearn.second_order.operators import Operators  # noqa: E402

SHAPES = (  # (images, channels, side, side): of convnet at 16 to 64 px, ResNet-18 at 224 px
    (10, 128, 2, 2),
    (32, 128, 2, 2),
    (32, 64, 4, 4),
    (32, 32, 8, 8),
    (64, 32, 8, 8),
    (32, 32, 16, 16),
    (64, 32, 16, 16),
    (32, 32, 32, 32),
    (64, 512, 7, 7),
    (64, 128, 28, 28),
)
WAYS = {"PyTorch": contextlib.nullcontext, "package": lambda: Operators(fast_batch_norm())}


def forward_mode(way, tensors, tangents):
    """A function that makes the tangent of a batch norm."""

    def run():
        with torch.no_grad(), way(), forward_ad.dual_level():
            x, weight, bias = map(forward_ad.make_dual, tensors, tangents)
            y = batch_norm(x, None, None, weight, bias, training=True)
            return forward_ad.unpack_dual(y).tangent

    return run


def product(way, tensors, tangents):
    """A function that differentiates the gradient of a batch norm along ``tangents``."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output_gradient = torch.randn_like(tensors[0]).requires_grad_()
    with way():
        y = batch_norm(leaves[0], None, None, *leaves[1:], training=True)
        g = grad(y, leaves, output_gradient, create_graph=True)
    return lambda: grad(g, [*leaves[:2], output_gradient], tangents, retain_graph=True)


def milliseconds(functions, rounds=9, enough=0.05):
    """The median CPU time of each, in turns; short ones are repeated to fill ``enough`` seconds."""
    repeats = []
    for function in functions:
        function()
        repeats.append(max(1, round(enough / timed(function, 1))))
    times = [[timed(f, n) for f, n in zip(functions, repeats, strict=True)] for _ in range(rounds)]
    return [1e3 * statistics.median(column) for column in zip(*times, strict=True)]


def timed(function, repeats):
    start = time.process_time()
    for _ in range(repeats):
        function()
    return max(time.process_time() - start, 1e-6) / repeats


def main():
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # PyTorch's own, on the first use of forward mode
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, milliseconds\n")
    print("| shape | elements | forward mode: PyTorch | package | product: PyTorch | package |")
    print("|---|--:|--:|--:|--:|--:|")
    for shape in SHAPES:
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        tensors = x, torch.rand(shape[1]), torch.randn(shape[1])
        tangents = [torch.randn_like(t) for t in tensors]
        found = []
        for kind in (forward_mode, product):
            found += milliseconds([kind(way, tensors, tangents) for way in WAYS.values()])
        cells = " | ".join(f"{value:.3f}" for value in found)
        print(f"| {' x '.join(map(str, shape))} | {x.numel():,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
