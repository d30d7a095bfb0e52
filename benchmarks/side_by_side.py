"""The package beside a plain implementation of the same mathematics: exactness, time, memory.

  python benchmarks/side_by_side.py                                       the paper's workload
  python benchmarks/side_by_side.py --only exactness,lower,upper          some parts of it
  python benchmarks/side_by_side.py --image_size 64 --batch 8 --tasks 9   a quick look

plain    benchmarks/plain.py: a module per head, a loss call per task, double backward, contiguous
         tensors, every image decoded when it is asked for
package  the models, solvers and streams that a run of train_bilevel.py trains with, images from
         the cache; without the training loop's bookkeeping, which plain does not have either

Both start from the same random weights of a ResNet-18 and the same images: JPEGs of CUB's size with
random labels, written to a temporary folder. Each lives in a process of its own, under the process
settings that this script was started with (or its own, with --own_settings), and they take turns:
plain, package, plain, package ...
Every quantity has fresh processes, so that their peak memory is that quantity's. One untimed turn
comes first. Progress goes to stderr, Markdown tables to stdout.
"""

import argparse
import dataclasses
import functools
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from auxilearn.errors import UserError  # noqa: E402
from auxilearn.run.command_line import given_settings  # noqa: E402
from auxilearn.run.config import FIELDS, choices_of  # noqa: E402
from auxilearn.run.record import environment  # noqa: E402
from benchmarks.sides import (  # noqa: E402
    ALPHA,
    FORMATS,
    SOLVERS,
    TERMS,
    Convolutions,
    Package,
    Plain,
    Workload,
    run_script_settings,
    running,
)

# {part: the quantities that it needs}; --only takes one solver instead of upper as well
PARTS = {
    "exactness": (),
    "data": ("data",),
    "lower": ("lower",),
    "upper": SOLVERS,
    "memory": ("lower", *SOLVERS),
    "tasks": (),
    "floor": (),
}
CHOICES = PARTS | {solver: (solver,) for solver in SOLVERS}
TIMED = ("data", "lower", "upper", *SOLVERS)
SIDES = ("plain", "package")
HYPERSTEP = 20
CUB_IMAGES = 5_794  # of a bilevel method's epoch: 5,994 without the development set
TITLES = {
    "data": "data, one batch",
    "lower": "lower step",
    "neumann": f"upper step, neumann, J = {TERMS['neumann']}",
    "identity": "upper step, identity",
    "cg": "upper step, cg",
}
# Relative errors in float32 that rounding explains: of the loss, and of hypergradients, where an
# activation that is zero but for rounding counts with its whole derivative or not at all.
TOLERANCE = {"loss": 1e-5, "neumann": 5e-2, "identity": 5e-2}
# Environment variables that decide how fast a process is.
PROCESS_SETTINGS = (
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "GOMP_", "KMP_", "MKL_"),
    *("TORCH_", "PYTORCH_", "ATEN_", "ONEDNN_", "DNNL_", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_"),
)
GIB = 2**30


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """Of one quantity, for each side: seconds turn by turn, and bytes of memory."""

    seconds: dict[str, list[float]]
    peak: dict[str, int]
    start: dict[str, int]  # the peak before the first turn
    products: int | None = None  # of the package's upper step

    def median(self, side):
        return statistics.median(self.seconds[side])

    def ratio(self):
        """Plain over package: the median over neighbouring turns."""
        pairs = zip(self.seconds["plain"], self.seconds["package"], strict=True)
        return statistics.median(one / other for one, other in pairs)


def alternate(turns, repeats, what):
    """{name: [seconds, turn by turn]} of functions {name: turn} that return seconds."""
    for turn in turns.values():
        turn()
    seconds = {name: [] for name in turns}
    for number in range(repeats):
        for name, turn in turns.items():
            seconds[name].append(turn())
        last = ", ".join(f"{name} {_number(values[-1])} s" for name, values in seconds.items())
        say(f"{what}, {number + 1} of {repeats}: {last}")
    return seconds


def measure(workload, quantity, repeats, what):
    """``Measured`` by fresh processes of the sides that have the quantity."""
    say(f"{what}: starting")
    sides = {"plain": (Plain, {}), "package": (Package, {})}
    if quantity == "cg":
        del sides["plain"]
    if quantity == "data":
        sides["package"] = (Package, {"cache_dir": str(workload.root / "cache")})
    with running(workload, **sides) as workers:
        start = {side: worker.call("peak") for side, worker in workers.items()}
        turns = {
            side: functools.partial(worker.call, "measure", quantity)
            for side, worker in workers.items()
        }
        seconds = alternate(turns, repeats, what)
        peak = {side: worker.call("peak") for side, worker in workers.items()}
        products = workers["package"].call("products") if quantity in SOLVERS else None
    return Measured(seconds, peak, start, products)


def check_exactness(workload, float64):
    """{title: ``compare_numbers``} of the package and plain.

    With ``float64`` also of each with plain in float64, and for a control of plain in float32 with
    its tensors channels-last, which rounds otherwise.
    """
    double = {"dtype": torch.float64}
    kinds = {"plain": (Plain, {}), "package": (Package, {})}
    if float64:
        kinds["plain, channels-last"] = Plain, {"memory_format": "channels-last"}
        kinds["plain in float64"] = Plain, double
    numbers = {}
    for name, kind in kinds.items():  # one at a time: each may need all the memory there is
        say(f"exactness: {name}")
        with running(workload, it=kind) as workers:
            numbers[name] = workers["it"].call("numbers")
    pairs = [("package", "plain")]
    if float64:
        names = ("package", "plain", "plain, channels-last")
        pairs += [(name, "plain in float64") for name in names]
    return {f"{a} against {b}": compare_numbers(numbers[a], numbers[b]) for a, b in pairs}


def compare_numbers(one, other):
    """{quantity: (cosine or None, relative error)} of two results of ``numbers``."""
    result = {"loss": (None, abs(one["loss"] - other["loss"]) / abs(other["loss"]))}
    for solver in TERMS:
        a, b = (
            np.concatenate([numbers[solver][name].ravel() for name in sorted(other[solver])])
            for numbers in (one, other)
        )
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        result[solver] = cosine, np.linalg.norm(a - b) / np.linalg.norm(b)
    return result


def measure_convolutions(workload, repeats):
    """{(images, memory format): median seconds of the forward convolutions}."""
    with running(workload, it=(Convolutions, {})) as workers:
        turns = {
            quantity: functools.partial(workers["it"].call, "measure", quantity)
            for quantity in Convolutions.quantities(workload)
        }
        seconds = alternate(turns, repeats, "forward convolutions")
    return {quantity: statistics.median(values) for quantity, values in seconds.items()}


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def say(text):
    print(text, file=sys.stderr, flush=True)


def table(*rows):
    """Print a Markdown table; the first row is its head."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    for row in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def _number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(values):
    text = _number(statistics.median(values))
    return f"{text} ({_number(min(values))} to {_number(max(values))})" if len(values) > 1 else text


def _cells(values, text):
    """A cell for each side: ``text(value)``, empty for a side without a value."""
    return [text(values[side]) if side in values else "" for side in SIDES]


def _title(quantity, measured):
    counted = f", products: {measured.products}" if quantity == "cg" else ""
    return TITLES[quantity] + counted


def print_head(workload):
    """The conditions of the measurement."""
    facts = environment()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    machine = f"{facts['processor']}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
    if workload.device != "cpu":
        machine += f", {torch.cuda.get_device_name(workload.device)}"
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    threads = workload.threads or torch.get_num_threads()
    variables = {n: v for n, v in os.environ.items() if n.startswith(PROCESS_SETTINGS)}
    shown = f"of both: {threads} threads; {_variables(variables)}"
    if workload.own_settings:
        added = run_script_settings()
        plain = {n: v for n, v in variables.items() if n not in added}
        shown = (
            f"of each its own: {threads} threads; package {_variables(variables | added)}, "
            f"plain {_variables(plain)}"
        )
    print("## Side by side\n")
    print(f"- machine: {machine}; load average at the start {os.getloadavg()[0]:.1f}")
    print(f"- versions: Python {facts['python']}, {packages}; revision {facts['git_revision']}")
    print(f"- command: `{shlex.join(['python', *facts['command']])}`")
    print(f"- process settings, {shown}")
    print(
        f"- workload: ResNet-18 from random weights, batch {workload.batch} + "
        f"{workload.dev_batch} for development, {workload.image_size} pixels, {workload.tasks} "
        f"tasks, {workload.classes} classes, alpha {ALPHA:g}, {workload.precision} on "
        f"{workload.device}"
    )
    if workload.package_flags:
        print(f"- the package alone with `{shlex.join(workload.package_flags)}`")
    print(flush=True)


def _variables(values):
    text = " ".join(f"{name}={value}" for name, value in sorted(values.items()))
    return f"`{text or 'no variables'}`"


def print_exactness(result):
    print("### Exactness: same weights, same images\n")
    rows = [["compared", "scheduled training loss", *(f"hypergradient, {s}" for s in TERMS)]]
    for title, compared in result.items():
        cells = [
            ("" if cosine is None else f"cosine {cosine:.8f}, ") + f"relative error {error:.1e}"
            for cosine, error in compared.values()
        ]
        rows.append([title, *cells])
    table(*rows)


def print_verdict(compared):
    """Whether the two agree. Returns the exit code."""
    off = [
        quantity for quantity, (_, error) in compared.items() if not error <= TOLERANCE[quantity]
    ]
    if off:
        print(f"**The two disagree** beyond rounding: {', '.join(off)}.\n", flush=True)
        return 1
    print("The two agree up to rounding.\n", flush=True)
    return 0


def print_times(results, workload):
    """The timed quantities, and values computed from their medians."""
    print("### Time: seconds, median (lowest to highest)\n")
    rows = [["", *SIDES, "plain / package"]]
    for quantity, measured in results.items():
        ratio = f"{measured.ratio():.2f}" if "plain" in measured.seconds else ""
        rows.append([_title(quantity, measured), *_cells(measured.seconds, _spread), ratio])
    cases = {
        solver: dict.fromkeys(results[solver].seconds, solver)
        for solver in SOLVERS
        if solver in results
    }
    if "neumann" in results and "identity" in results:
        cases["neumann; identity"] = {"plain": "neumann", "package": "identity"}
    for case, solvers in cases.items():
        for title, seconds in _computed(results, solvers, workload):
            ratio = f"{seconds['plain'] / seconds['package']:.2f}" if "plain" in seconds else ""
            rows.append([f"{title} ({case}), computed", *_cells(seconds, _number), ratio])
    table(*rows)
    print(
        "Ratios of what was timed are medians over neighbouring turns; computed rows follow from "
        "the medians;\nin rows (neumann; identity) plain has the one solver, the package the "
        "other. Data is loaded in the main\nthread; steps are timed without "
        "it, an epoch is the sum of both.\n"
    )


def _computed(results, solvers, workload):
    """(title, {side: seconds}) of what a run with the ``solvers`` {side: solver} repeats."""
    upper = {side: results[solver].median(side) for side, solver in solvers.items()}
    if len(set(solvers.values())) > 1:
        yield "upper step", upper
    if "lower" not in results:
        return
    cycle = {side: HYPERSTEP * results["lower"].median(side) + upper[side] for side in solvers}
    yield f"{HYPERSTEP} lower + 1 upper", cycle
    if "data" in results:
        # An upper step loads a training batch and a development batch of its own.
        batches = HYPERSTEP + 1 + workload.dev_batch / workload.batch
        cycles = CUB_IMAGES / workload.batch / HYPERSTEP
        yield (
            f"epoch of {CUB_IMAGES:,} images",
            {s: cycles * (t + batches * results["data"].median(s)) for s, t in cycle.items()},
        )


def print_memory(results, device):
    kind = "resident memory of a process" if device == "cpu" else "memory of tensors on the GPU"
    print(f"### Memory: peak {kind} that did this alone, GiB\n")
    rows = [["", *SIDES, "package / plain"]]
    start = results["lower"].start
    rows.append(["before the first step", *_cells(start, lambda size: f"{size / GIB:.2f}"), ""])
    for quantity, measured in results.items():
        peak = measured.peak
        ratio = f"{peak['package'] / peak['plain']:.2f}" if "plain" in peak else ""
        cells = _cells(peak, lambda size: f"{size / GIB:.2f}")
        rows.append([_title(quantity, measured), *cells, ratio])
    table(*rows)


def print_tasks(by_tasks):
    print("### Lower step against the number of tasks: seconds, median (lowest to highest)\n")
    fewest = by_tasks[min(by_tasks)]
    growth = [f"{side}, times that of {min(by_tasks):,}" for side in SIDES]
    rows = [["tasks", *SIDES, "plain / package", *growth]]
    for tasks, measured in by_tasks.items():
        growth = [f"{measured.median(side) / fewest.median(side):.2f}" for side in SIDES]
        cells = _cells(measured.seconds, _spread)
        rows.append([f"{tasks:,}", *cells, f"{measured.ratio():.2f}", *growth])
    table(*rows)


def print_floor(convolutions, results, workload):
    """Every step against the time of its convolutions alone."""
    print("### Arithmetic floor: convolutions alone, seconds\n")
    rows = [["forward convolutions", *FORMATS]]
    for images in dict.fromkeys((workload.batch, workload.dev_batch)):
        rows.append([f"{images} images", *(_number(convolutions[images, f]) for f in FORMATS)])
    table(*rows)
    unit = convolutions[workload.batch, "channels-last"]
    dev_unit = convolutions[workload.dev_batch, "channels-last"]
    rows = [["", "units counted", "floor", "plain / floor", "package / floor"]]
    rows.append(["lower step", "forward 1 + backward 2", 3 * unit])
    products = dict(TERMS)
    if "cg" in results:
        products["cg"] = results["cg"].products
    for solver, count in products.items():
        # Products need the training loss's gradients in activations; nobody reads those in weights.
        backward = f" + backward 1 + products {count} x 6" if count else ""
        units = f"development: forward 1 + backward 2; training: forward 1{backward} + derivative 2"
        floor = 3 * dev_unit + (1 + (1 + 6 * count if count else 0) + 2) * unit
        rows.append([TITLES[solver], units, floor])
    for row, quantity in zip(rows[1:], ("lower", *products), strict=True):
        floor = row[-1]
        times = {}
        if quantity in results:
            times = {side: results[quantity].median(side) for side in results[quantity].seconds}
        row[-1:] = [_number(floor), *_cells(times, lambda s, floor=floor: f"{s / floor:.2f}")]
    table(*rows)
    print(
        "A unit is the forward convolutions of the step's images, channels-last, for both sides. "
        "A product is counted\nwithout the training batch's own forward and backward pass, which "
        "are counted once.\n"
    )


# --------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("batch", 64, "images of a training batch"),
        ("dev_batch", 50, "images of a development batch"),
        ("image_size", 224, "side of an image in pixels"),
        ("tasks", 313, "tasks, the target included"),
        ("classes", 200, "classes of the target"),
        ("repeats", 5, "timed turns of each side"),
    ):
        text += "; default: %(default)s"
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument(
        "--task_counts",
        type=int,
        nargs="+",
        default=[1, 10, 100, 313, 1000, 2000],
        help="numbers of tasks of the part tasks; default: 1 10 100 313 1000 2000",
    )
    parser.add_argument("--threads", type=int, help="of each side; default: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision",
        choices=choices_of(FIELDS["precision"]),
        default="tf32",
        help="of both sides, as for train_bilevel.py; plain's bf16 is torch.autocast; default: "
        "%(default)s, which on the CPU is fp32",
    )
    parser.add_argument(
        "--own_settings",
        action="store_true",
        help="each side as its users run it: the package with the process settings of "
        "run_bilevel.sh, plain without them; default: both with those of this process",
    )
    parser.add_argument(
        "--package_flags",
        default="",
        help="any flags of train_bilevel.py, for the package: --package_flags='--aux_weight 0.5'",
    )
    parser.add_argument(
        "--float64",
        action="store_true",
        help="compare the hypergradients with plain's in float64 too: twice plain's memory",
    )
    parser.add_argument(
        "--only",
        default=",".join(PARTS),
        help="parts to run, separated by commas; default: %(default)s; in place of upper, one "
        f"solver: {', '.join(SOLVERS)}",
    )
    args = parser.parse_args(argv)
    args.parts = args.only.split(",")
    if unknown := set(args.parts) - set(CHOICES):
        parser.error(f"--only: there is no part {min(unknown)!r}, but {', '.join(CHOICES)}")
    if min(args.batch, args.dev_batch, args.classes) < 2:
        parser.error("--batch, --dev_batch and --classes must be at least 2")
    if min(args.tasks, args.repeats, *args.task_counts) < 1:
        parser.error("--tasks, --task_counts and --repeats must be at least 1")
    args.package_flags = shlex.split(args.package_flags)
    try:
        given_settings(args.package_flags)
    except UserError as error:
        parser.error(f"--package_flags: {error}")
    return args


def main():
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("Skipped: --device cuda, but there is no CUDA device here. Nothing was measured.")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        names = {field.name for field in dataclasses.fields(Workload)} - {"root", "package_flags"}
        workload = Workload(
            root=Path(folder),
            package_flags=tuple(args.package_flags),
            **{name: getattr(args, name) for name in names},
        )
        print_head(workload)
        say("writing images")
        workload.write()
        return run_parts(workload, args)


def run_parts(workload, args):
    """Measure and print the parts asked for. Returns the exit code: 1 if the two disagree."""
    code = 0
    if "exactness" in args.parts:
        result = check_exactness(workload, args.float64)
        print_exactness(result)
        in_float32 = args.precision == "fp32" or (args.precision, args.device) == ("tf32", "cpu")
        if in_float32 and not args.package_flags:  # which may change what is computed
            code = print_verdict(result["package against plain"])
    wanted = {quantity for part in args.parts for quantity in CHOICES[part]}
    timed = {quantity for part in args.parts if part in TIMED for quantity in CHOICES[part]}
    results = {}
    for quantity in TITLES:
        if quantity in wanted:
            repeats = args.repeats if quantity in timed else 0
            results[quantity] = measure(workload, quantity, repeats, TITLES[quantity])
    times = {quantity: measured for quantity, measured in results.items() if quantity in timed}
    if times:
        print_times(times, workload)
    if "memory" in args.parts:
        print_memory({q: m for q, m in results.items() if q != "data"}, workload.device)
    if "tasks" in args.parts:
        by_tasks = {}
        for tasks in args.task_counts:
            changed = dataclasses.replace(workload, tasks=tasks)
            what = f"lower step, tasks: {tasks}"
            by_tasks[tasks] = measure(changed, "lower", args.repeats, what)
        print_tasks(by_tasks)
    if "floor" in args.parts:
        print_floor(measure_convolutions(workload, args.repeats), times, workload)
    return code


if __name__ == "__main__":
    sys.exit(main())
