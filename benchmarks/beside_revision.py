"""This tree beside an earlier revision of itself: the same commands in both, in turns.

  python benchmarks/beside_revision.py                       # whole runs on the scanned digits
  python benchmarks/beside_revision.py --image_size 224      # single steps of ResNet-18

The revision is unpacked into a temporary folder. Each tree divides the generated data with its own
data_preprocess.py and trains with its own train_bilevel.py, one process at a time, after an untimed
step that builds its caches. Commands hold only flags that both trees know. The machine should be
idle; CPU time tells more where it is not. A run without its imports is what a run of a table takes:
there a process that has imported PyTorch is forked.
"""

import argparse
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from auxilearn.errors import RunError, UserError, run_script  # noqa: E402
from benchmarks.sides import run_script_settings  # noqa: E402
from tests.cub_shape import write_cub_shape  # noqa: E402

DIGITS = (
    "--backbone convnet --in_dim 128 --image_size 16 --epochs 40 --main_lr 0.002 --dev_epochs 10 "
    "--hyperstep 5 --aux_batch_size 10"
)
RESNET = (
    "--backbone resnet18 --backbone_pretrain 0 --image_size 224 --epochs 1 --warmup_epochs 0 "
    "--hyperstep 3"
)
METHODS = {
    16: {"common": "--method common", "joint_stable": "--method joint_stable"},
    224: {
        "identity": "--method joint --solver identity",
        "neumann": "--method joint --solver neumann --neumann_terms 3",
    },
}


def flags(args, method):
    """The flags of a run, all of them known to both trees."""
    words = f"{METHODS[args.image_size][method]} --threads {args.threads} --num_workers 0"
    if args.image_size == 16:
        return f"{words} --device cpu {DIGITS}".split()
    sizes = f"--train_batch_size {args.batch} --aux_batch_size {args.batch}"
    return f"{words} --device cpu {RESNET} {sizes} --max_steps {args.max_steps}".split()


class Tree:
    """A checkout with its own data. ``seconds``: {(method, quantity): [a number per turn]}."""

    def __init__(self, name, checkout, folder, args):
        self.name, self.checkout, self.folder, self.args = name, checkout, folder, args
        self.seconds = {}
        data, self.split = folder / "data", folder / "split"
        words = ["--data_root", str(data), "--out_dir", str(self.split)]
        if args.image_size == 16:
            words += ["--generate", "digits"]
        else:
            per_class = 1 + math.ceil(args.max_steps * args.batch / 4)  # the development image's
            shape = {"classes": 4, "train_per_class": per_class, "attributes": 22}
            write_cub_shape(data, image_size=(256, 256), **shape)
        self._script("data_preprocess.py", words)

    def turn(self, method, timed=True):
        """Train once, and keep the times; untimed, one step alone."""
        short = [] if timed else ["--max_steps", "1", "--dev_epochs", "0"]
        with tempfile.TemporaryDirectory(dir=self.folder) as record:
            words = ["--split_dir", str(self.split), "--record_dir", record]
            clock, cpu = time.perf_counter(), cpu_seconds()
            self._script("train_bilevel.py", [*flags(self.args, method), *short, *words])
            clock, cpu = time.perf_counter() - clock, cpu_seconds() - cpu
            (metrics,) = Path(record).rglob("metrics.jsonl")
            rows = [json.loads(line) for line in metrics.read_text().splitlines()]
            summary = json.loads((metrics.parent / "summary.json").read_text())
        if not timed:
            return
        if self.args.image_size == 16:
            self._keep(method, "run", summary["seconds"])
            self._keep(method, "run and imports", clock)
            self._keep(method, "run and imports, CPU time", cpu)
        for name in ("data", "lower", "upper"):
            found = [row[f"{name}_seconds"] for row in rows if f"{name}_seconds" in row]
            if found[1:]:  # the first is that of the first step
                self._keep(method, f"{name} step", statistics.median(found[1:]))

    def _keep(self, method, quantity, seconds):
        self.seconds.setdefault((method, quantity), []).append(seconds)

    def _script(self, name, words):
        environment = {**os.environ, **run_script_settings()}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [sys.executable, name, *words],
            cwd=self.checkout,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"{name} of {self.name} failed ({done.returncode}): {last}")


def cpu_seconds():
    """CPU time of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def unpack(revision, folder):
    """The files of a revision in ``folder``; returns its short hash."""

    def git(*words):
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True)
        if done.returncode:
            raise UserError(f"--revision {revision}: {done.stderr.decode().strip()}")
        return done.stdout

    name = git("rev-parse", "--short", "--verify", f"{revision}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", name))) as archive:
        archive.extractall(folder, filter="data")
    return name


def print_table(trees):
    other, mine = trees
    print(f"| seconds | {other.name} | {mine.name} | {other.name} / {mine.name} |")
    print("|---|--:|--:|--:|")
    for key in mine.seconds:
        method, quantity = key
        before, now = (statistics.median(tree.seconds[key]) for tree in trees)
        print(f"| {method}, {quantity} | {before:.4g} | {now:.4g} | {before / now:.2f} |")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--revision", default="258af48", help="(default: %(default)s)")
    parser.add_argument("--image_size", type=int, choices=METHODS, default=16)
    parser.add_argument("--turns", type=int, default=3, help="of each tree (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="at 224 pixels (default: %(default)s)")
    parser.add_argument(
        "--max_steps", type=int, default=10, help="at 224 pixels (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if min(args.turns, args.threads) < 1 or args.batch < 2 or args.max_steps < 6:
        parser.error("--turns and --threads must be at least 1, --batch 2, --max_steps 6")
    return args


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        checkout = folder / "checkout"
        name = unpack(args.revision, checkout)
        trees = [
            Tree(name, checkout, folder / "one", args),
            Tree("this tree", HERE, folder / "other", args),
        ]
        for turn in range(args.turns + 1):
            for method in METHODS[args.image_size]:
                for tree in trees:
                    print(f"turn {turn}: {method}, {tree.name}", file=sys.stderr, flush=True)
                    tree.turn(method, timed=turn > 0)
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.image_size} pixels, medians of "
        f"{args.turns} turns, load average {load:.1f} at the end\n"
    )
    print_table(trees)


if __name__ == "__main__":
    run_script(main)
