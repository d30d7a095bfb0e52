"""What a lower step of l2rw and slgrad costs: times a step with equal weights, by number of tasks.

  python benchmarks/rival_steps.py --tasks 1 10 100 313 1000 2000 --repeats 7

The three take turns on the same model and batch, and so does their derivatives' alternative: a
gradient per sample and task by torch.func.vmap, each multiplied with the development gradient, for
up to --most_by_vmap tasks. vmap has no batch norm in train mode: it computes with running
statistics, in which it must agree with the package. Unless --dev_batch is given, the development
batch is as large as the training batch.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.func import functional_call, grad, vmap

sys.path.insert(0, str(Path(__file__).parents[1]))

from auxilearn.baselines.l2rw import LearningToReweight  # noqa: E402
from auxilearn.baselines.slgrad import SampleLevelGradients  # noqa: E402
from auxilearn.bilevel import Bilevel  # noqa: E402
from auxilearn.hypernet import Identity  # noqa: E402
from auxilearn.models import Batch, TaskModel, build_backbone  # noqa: E402
from auxilearn.second_order.evaluation import ModelFunction  # noqa: E402

STEPS = {"common": Identity, "l2rw": LearningToReweight, "slgrad": SampleLevelGradients}
CLASSES = 200  # of the target


def random_batch(size, pixels, counts):
    labels = torch.stack([torch.randint(c, (size,)) for c in counts], dim=1)
    images = torch.randint(256, (size, 3, pixels, pixels), dtype=torch.uint8)
    return Batch(images, labels, torch.arange(size), None)


def development_gradient(model, dev):
    loss = model(dev).losses[:, 0].mean()
    return torch.autograd.grad(loss, list(model.parameters()))


def by_vmap(model, batch, v):
    """D (B, K) from a gradient per sample and task, in evaluation mode."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image, labels, task):
        one = Batch(image[None], labels[None], torch.zeros(1, dtype=torch.long), None)
        return functional_call(model, parameters, (one,)).losses[0, task]

    columns = []
    for task in range(batch.labels.shape[1]):
        of_samples = vmap(grad(loss), (None, 0, 0, None))
        g = of_samples(parameters, batch.inputs, batch.labels, task)
        columns.append(
            sum(g[n].flatten(1) @ t.flatten() for n, t in zip(parameters, v, strict=True))
        )
    return torch.stack(columns, dim=1)


def check(model, batch, dev, tasks):
    """SystemExit: the package and vmap disagree on D."""
    model.eval()
    v = development_gradient(model, dev)
    scheduler = SampleLevelGradients(0, tasks)
    with ModelFunction(model, list(model.parameters())) as function:
        _, found = scheduler.response(function, v, batch)
    expected = by_vmap(model, batch, v)
    error = ((found - expected).norm() / expected.norm()).item()
    model.train()
    if not error < 1e-3:
        raise SystemExit(f"D differs by {error:.1e} with {tasks} tasks")


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(args, tasks):
    """{name: seconds of every repeat}."""
    torch.manual_seed(0)
    counts = [CLASSES] + [2] * (tasks - 1)
    backbone = build_backbone(args.backbone, 512)
    model = TaskModel(backbone, 512, counts).to(memory_format=torch.channels_last).train()
    sizes = args.batch, args.dev_batch or args.batch
    batch, dev = (random_batch(size, args.image_size, counts) for size in sizes)
    lower = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    steps = {name: Bilevel(model, kind(0, tasks), lower) for name, kind in STEPS.items()}
    work = {name: lambda one=one: one.lower_step(batch, [dev]) for name, one in steps.items()}
    if tasks <= args.most_by_vmap:
        check(model, batch, dev, tasks)

        def per_sample():
            v = development_gradient(model, dev)
            model.eval()
            by_vmap(model, batch, v)
            model.train()
            steps["common"].lower_step(batch)

        work["vmap"] = per_sample
    for function in work.values():  # the first one warms up
        function()
    seconds = {name: [] for name in work}
    for _ in range(args.repeats):
        for name, function in work.items():
            seconds[name].append(timed(function))
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("convnet", "resnet18"), default="resnet18")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100, 313, 1000, 2000])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dev_batch", type=int)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--most_by_vmap", type=int, default=10)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.backbone}, "
        f"batch {args.batch} + {args.dev_batch or args.batch}, {args.image_size} px, "
        f"{args.repeats} repeats\n"
    )
    names = [*list(STEPS)[1:], "vmap"]
    columns = [f"{name} / common, median (least / least)" for name in names]
    print("| tasks | common, s | " + " | ".join(columns) + " |")
    print("|--:" * (2 + len(names)) + "|")
    for tasks in args.tasks:
        seconds = measure(args, tasks)
        common = seconds["common"]
        cells = [f"{tasks}", f"{statistics.median(common):.3f}"]
        for name in names:
            if name not in seconds:
                cells.append("")
                continue
            pairs = zip(seconds[name], common, strict=True)
            middle = statistics.median(one / other for one, other in pairs)
            cells.append(f"{middle:.2f} ({min(seconds[name]) / min(common):.2f})")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
