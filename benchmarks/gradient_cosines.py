"""Gradient cosines of all tasks: a backward pass per task, beside one forward-mode pass for all.

  python benchmarks/gradient_cosines.py --tasks 313 --batch 16 --image_size 64

Both take the same model and batch in alternation, and must agree on every sign.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from auxilearn.baselines.gradient_cosine import GradientCosine  # noqa: E402
from auxilearn.models import Batch, TaskModel, build_backbone  # noqa: E402


def plain_products(model, batch):
    """<G_k, G_0> of every task, as a careful researcher would first write it."""
    losses = model(batch).losses.mean(dim=0)
    shared = list(model.backbone.parameters())
    target, products = None, []
    for loss in losses:
        gradient = torch.autograd.grad(loss, shared, retain_graph=True)
        target = target or gradient
        products.append(sum((g * t).sum() for g, t in zip(gradient, target, strict=True)))
    return torch.stack(products)


def package_weights(model, batch, tasks):
    scheduler = GradientCosine(0, tasks)
    scheduler.before_lower_step(model, batch, None, lambda tensors, _: tensors)
    return scheduler.weights


def timed(function, *arguments):
    start = time.perf_counter()
    value = function(*arguments)
    return value, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("convnet", "resnet18"), default="resnet18")
    parser.add_argument("--tasks", type=int, default=313)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone = build_backbone(args.backbone, 512)
    counts = [200] + [2] * (args.tasks - 1)
    model = TaskModel(backbone, 512, counts).to(memory_format=torch.channels_last).train()
    size = (args.batch, 3, args.image_size, args.image_size)
    labels = torch.stack([torch.randint(c, (args.batch,)) for c in counts], dim=1)
    batch = Batch(
        torch.randint(256, size, dtype=torch.uint8), labels, torch.arange(args.batch), None
    )
    seconds = {"plain": [], "package": []}
    for _ in range(args.repeats):
        products, taken = timed(plain_products, model, batch)
        seconds["plain"].append(taken)
        weights, taken = timed(package_weights, model, batch, args.tasks)
        seconds["package"].append(taken)
        scale = products.abs().max()
        clear = products.abs() > 1e-4 * scale  # float32 does not decide the others
        if not torch.equal((products >= 0)[clear], (weights > 0)[clear]):
            raise SystemExit("the signs differ")
    plain, package = (statistics.median(seconds[name]) for name in ("plain", "package"))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.backbone}, "
        f"{args.tasks} tasks, batch {args.batch}, {args.image_size} px, {args.repeats} repeats; "
        f"{int(clear.sum())} of {args.tasks} signs compared"
    )
    print(f"a backward pass per task  {plain:8.3f} s")
    print(f"one forward-mode pass     {package:8.3f} s   {plain / package:.1f} times faster")


if __name__ == "__main__":
    main()
