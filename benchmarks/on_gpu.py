"""Training at CUB's size on a GPU: speed, memory, and how busy the device is.

  sh benchmarks/on_gpu.sh > benchmarks/gpu.md   the tests for a GPU, then this
  python benchmarks/on_gpu.py --device cpu --image_size 32 --images 200 --tasks 5 --steps 3
                                                the script itself, in a minute, without a GPU

Random JPEGs of CUB's number and size stand in for CUB: 11,788 names for 64 pictures, each of which
is decoded and cached by its own name. The package has the models, optimisers, streams and settings
of a run of the tables; plain is benchmarks/plain.py. Every time is a mean over steps in a row
between two synchronisations. Progress goes to stderr, Markdown to stdout.
"""

import argparse
import dataclasses
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_bilevel  # noqa: E402
from auxilearn.run.build import build  # noqa: E402
from auxilearn.run.config import Config, resolve  # noqa: E402
from auxilearn.run.record import environment  # noqa: E402
from auxilearn.tables.estimate import Speed  # noqa: E402
from auxilearn.tables.protocol import (  # noqa: E402
    DATASETS,
    ROW_SETTINGS,
    SETTINGS,
    TABLES,
    rows,
    usual_rows,
)
from benchmarks.input_pipeline import as_split, random_labels, write_images  # noqa: E402
from benchmarks.side_by_side import say, table  # noqa: E402
from benchmarks.sides import TERMS, Package, Plain, Workload  # noqa: E402
from reproduce_tables import SEEDS  # noqa: E402

PRECISIONS = ("tf32", "fp32", "bf16")
CUB_IMAGES, CUB_TRAIN, CLASSES = 11_788, 5_994, 200
DISTINCT = 64  # pictures
WARM_UP = 10  # steps that are not timed

GIB = 2**30


def cub_shaped(root, images, tasks):
    """A split of CUB's proportions with random labels, and its images under root/images."""
    pictures = write_images(root, min(DISTINCT, images))
    names = [f"{number:05d}_again.jpg" for number in range(images)]
    for number, name in enumerate(names):
        os.link(root / "images" / pictures[number % len(pictures)], root / "images" / name)
    train = images * CUB_TRAIN // CUB_IMAGES
    classes = min(CLASSES, train // 4)
    places, rng = np.arange(images), np.random.default_rng(0)
    full, (valid, test) = places[:train], np.array_split(places[train:], 2)
    dev, rest = full[:classes], full[classes:]
    data = random_labels(rng, images, classes, tasks - 1)
    data["labels"][:, 0] = places % classes
    return dataclasses.replace(
        as_split(root, names),
        **data,
        indices={"full_train": full, "dev": dev, "rest_train": rest, "valid": valid, "test": test},
    )


# --------------------------------------------------------------------------------------------------
# The clock, the memory, the profiler
# --------------------------------------------------------------------------------------------------


class Meter:
    """Measures actions on a device; memory and business are None on the CPU."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, action, count, warm_up=WARM_UP):
        """Mean seconds of ``count`` calls in a row."""
        for _ in range(warm_up):
            action()
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            action()
        self.wait()
        return (time.perf_counter() - start) / count

    def peak(self, action):
        """The most bytes that tensors on the GPU take during a call."""
        if not self.on_gpu:
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        action()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device)

    def busy(self, action, count):
        """The share of ``count`` calls during which the GPU works."""
        if not self.on_gpu:
            return None
        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            for _ in range(count):
                action()
            self.wait()
        return covered(
            (event.time_range.start, event.time_range.end)
            for event in found.events()
            if event.device_type == DeviceType.CUDA
        )


def covered(spans):
    """The share of the time from the first to the last that intervals (start, end) cover."""
    spans = sorted(spans)
    first, until = spans[0][0], spans[0][0]
    worked = 0.0
    for start, end in spans:
        worked += max(0.0, end - max(start, until))
        until = max(until, end)
    return worked / (until - first)


# --------------------------------------------------------------------------------------------------
# Fixed batches, beside plain
# --------------------------------------------------------------------------------------------------


def measure_steps(meter, side, steps):
    """{quantity: (seconds, peak bytes)} of a ``Side`` on its fixed batches."""
    found = {}
    for quantity, count in (("lower", steps), *((solver, max(2, steps // 10)) for solver in TERMS)):
        action = side.actions[quantity]
        found[quantity] = meter.seconds(action, count, min(WARM_UP, count)), meter.peak(action)
    return found


def print_steps(meter, workload, steps):
    """Times and memory of both sides in every precision."""
    print("### Steps on fixed batches: milliseconds, and GiB of tensors\n")
    head = ["", "lower", *(f"upper, {solver}" for solver in TERMS), "neumann / lower"]
    body = [[*head, "memory: lower", *(solver for solver in TERMS)]]
    for precision in PRECISIONS:
        found = {}
        for kind in (Plain, Package):
            say(f"{precision}: {kind.__name__.lower()}")
            side = kind(dataclasses.replace(workload, precision=precision))
            found[kind] = measure_steps(meter, side, steps)
            del side
            gc.collect()
            times = [seconds for seconds, _ in found[kind].values()]
            cells = [f"{1e3 * seconds:.1f}" for seconds in times]
            memory = ["" if p is None else f"{p / GIB:.2f}" for _, p in found[kind].values()]
            share = f"{found[kind]['neumann'][0] / found[kind]['lower'][0]:.1f}"
            body.append([f"{kind.__name__.lower()}, {precision}", *cells, share, *memory])
        gains = [found[Plain][q][0] / found[Package][q][0] for q in found[Plain]]
        body.append([f"plain / package, {precision}", *(f"{gain:.1f}" for gain in gains)])
    width = len(body[0])
    table(*(row + [""] * (width - len(row)) for row in body))


# --------------------------------------------------------------------------------------------------
# Whole runs
# --------------------------------------------------------------------------------------------------


class Runs:
    """Runs on the CUB-shaped split, by the settings that the tables have for CUB."""

    def __init__(self, args, root):
        self.args = args
        self.split = cub_shaped(root, args.images, args.tasks)
        self.cache_dir = str(root / "cache")

    def build(self, row, **changes):
        given = {
            **DATASETS["cub"].settings,
            **ROW_SETTINGS.get(("cub", row), {}),
            **rows()[row].settings,
            "image_size": self.args.image_size,
            "cache_dir": self.cache_dir,
            "backbone_pretrain": False,
            "device": self.args.device,
            **changes,
        }
        return build(resolve(Config(**given), self.split), self.split)


def actions_of(run):
    """{what training repeats: action} of a ``Run``, each with its data."""
    lower, dev = run.lower_batches(0), run.dev_batches_of_lower_steps(0)
    upper, model = run.upper_batches(0), run.bilevel.model
    model.train()
    return {
        "lower": lambda: run.bilevel.lower_step(next(lower), next(dev)),
        "upper": lambda: run.bilevel.upper_step(*next(upper)),
        "epoch": lambda: train_bilevel.evaluate(
            model, run.evaluation_batches("valid"), run.metric, run.ranks
        ),
    }


def speed_of(meter, run, steps):
    """The ``Speed`` of a ``Run``: a test takes as long as a validation."""
    actions = actions_of(run)
    lower = meter.seconds(actions["lower"], steps)
    few = max(2, steps // 10)
    upper = meter.seconds(actions["upper"], few, 2) if run.method.bilevel else 0.0
    epoch = meter.seconds(actions["epoch"], 1, 1)
    return Speed(lower, upper, epoch, epoch)


def print_training(meter, runs, steps):
    """Training with its data, in every precision."""
    print("### Training with its data: JTDS, an upper step (Neumann, three products) every 20\n")
    measured = {}
    for precision in PRECISIONS:
        say(f"{precision}: training")
        run = runs.build("joint", precision=precision)
        speed = speed_of(meter, run, steps)
        busy = meter.busy(actions_of(run)["lower"], min(20, steps))
        measured[precision] = (
            f"{run.config.train_batch_size / speed.lower:,.0f}",
            "" if busy is None else f"{busy:.0%}",
            f"{1e3 * speed.lower:.2f}",
            f"{1e3 * speed.upper:.1f}",
            f"{len(run.split.indices['valid']) / speed.epoch:,.0f}",
            f"{speed.seconds(run.plan) / 60:.1f}",
        )
        del run
    titles = (
        "images a second in lower steps",
        "device busy in lower steps",
        "lower step, ms",
        "upper step, ms",
        "images a second in validation",
        "a run of 100 epochs, minutes (projected)",
    )
    columns = zip(*measured.values(), strict=True)
    table(
        ["", *PRECISIONS], *([title, *cells] for title, cells in zip(titles, columns, strict=True))
    )


def print_table4(meter, runs, steps):
    """The hours of the paper's Table 4 as ``reproduce_tables.py table4`` makes it."""
    settings = [SETTINGS[name] for name in TABLES["table4"].settings]
    each = len(settings) * len(SEEDS)
    print(f"### Table 4: {each} runs of every row, in tf32 (projected)\n")
    body, total = [["row", "lower step, ms", "upper step, ms", "a run, minutes"]], 0.0
    speeds = {}
    for name in usual_rows():
        run = runs.build(name, **settings[0].settings)
        method = run.config.method
        if method not in speeds:
            say(f"table4: {method}")
            speeds[method] = speed_of(meter, run, max(2, steps // 2))
        speed = speeds[method]
        seconds = speed.seconds(run.plan)
        total += seconds * each
        upper = f"{1e3 * speed.upper:.1f}" if speed.upper else ""
        body.append([name, f"{1e3 * speed.lower:.2f}", upper, f"{seconds / 60:.1f}"])
        del run
    table(*body)
    print(
        f"{each * (len(body) - 1)} runs take {total / 3600:.1f} hours of this device.\n", flush=True
    )


def print_head(args):
    facts = environment()
    name = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "CPU"
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    print(f"## {name}\n")
    print(f"- Python {facts['python']}, {packages}; revision {facts['git_revision']}")
    print(
        f"- {args.images:,} images, {args.image_size} pixels, ResNet-18 from random weights, "
        f"{args.tasks} tasks, batch {args.batch}; means over {args.steps} steps\n",
        flush=True,
    )


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    for name, default, help in (
        ("images", CUB_IMAGES, "of the data set"),
        ("image_size", 224, "pixels"),
        ("tasks", 313, "the target included"),
        ("batch", 64, "images of a lower step on fixed batches"),
        ("steps", 100, "lower steps of a measurement"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{help} (default: %(default)s)"
        )
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: nothing was measured")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    meter = Meter(args.device)
    print_head(args)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "steps").mkdir()
        workload = Workload(
            root / "steps",
            batch=args.batch,
            image_size=args.image_size,
            tasks=args.tasks,
            device=args.device,
        )
        workload.write()
        print_steps(meter, workload, args.steps)
        start = time.perf_counter()
        runs = Runs(args, root)
        say(f"{args.images} images written in {time.perf_counter() - start:.0f} s")
        print_training(meter, runs, args.steps)
        print_table4(meter, runs, args.steps)


if __name__ == "__main__":
    main()
