"""A kill storm: SIGKILLs at random moments over one training run, then the question what it cost.

  python -m tests.kill_storm --method joint --kills 50 --num_workers 0

trains a small data set twice with train_bilevel.py: undisturbed, and killed and continued with
--resume 1 again and again. It prints where the kills fell, and ends with "equal" or, exit code 1,
with what differs in metrics, schedule, weights, the last checkpoint's optimisers and random state,
and summary.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from auxilearn.data import cub
from auxilearn.data.split import write_split
from auxilearn.methods import METHODS
from auxilearn.run.command_line import flags_of
from auxilearn.run.config import Config
from auxilearn.run.record import LOCK_FILE
from tests.cub_shape import write_cub_shape

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
PATIENCE = 300  # seconds without a new checkpoint until a process counts as hanging
MARGIN = 5  # steps at the end that no kill waits for, or the run might be over before it
AT_START = 0.2  # share of the kills that fall into a process's start
BILEVEL = [name for name, method in METHODS.items() if method.bilevel]


def config(folder, method, workers, epochs):
    """Of a run with some 20 ms a step, of which every one is a checkpoint."""
    return Config(
        method=method,
        split_dir=str(folder / "split"),
        record_dir=str(folder / "undisturbed"),
        exp_name="run",
        backbone="convnet",
        feature_dim=8,
        image_size=16,
        train_batch_size=4,
        dev_batch_size=2,
        hyperstep=2,
        warmup_epochs=0,
        epochs=epochs,
        dev_epochs=epochs // 4,
        save_every=1,
        num_workers=workers,
        cache_dir="none" if workers else None,
        device="cpu",
        threads=1,
    )


def prepare(folder):
    """A data set of three classes with 5 training images each, divided."""
    root = write_cub_shape(folder / "data", classes=3, train_per_class=6, test_per_class=4)
    write_split(folder / "split", cub.read_annotations(root))


def storm(folder, method, kills, workers=0, epochs=60, seed=0, margin=MARGIN):
    """Kill a run ``kills`` times. Returns ({where: kills}, what differs from one left alone).

    Args: ``folder`` as ``prepare`` left it; ``epochs`` of the run, of 4 steps each; ``margin``
    steps at its end that no kill waits for: more of them where other processes slow this one down.
    """
    undisturbed = config(folder, method, workers, epochs)
    killed = replace(undisturbed, record_dir=str(folder / "killed"), resume=True)
    start = time.monotonic()
    subprocess.run(_command(undisturbed), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    start_up = time.monotonic() - start
    one, other = (Path(c.record_dir) / c.setting / "run" for c in (killed, undisturbed))
    summary = json.loads((other / "summary.json").read_text())
    start_up -= summary["seconds"]
    # Not the mean, which contains what a first step costs.
    step_seconds = statistics.median(
        row["lower_seconds"] + row["data_seconds"]
        for row in map(json.loads, (other / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == "step"
    )
    generator = random.Random(seed)
    steps = summary["steps"]
    targets = sorted(generator.choices(range(1, steps - margin), k=kills))
    where = Counter()
    for number, target in enumerate(targets, start=1):
        at_start = generator.random() < AT_START
        began = time.time_ns()
        process = subprocess.Popen(_command(killed), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        if at_start:
            time.sleep(generator.uniform(0, start_up))
        else:
            _wait(process, one, began, target)
            time.sleep(generator.uniform(0, 2 * step_seconds))
        if process.poll() is not None:
            raise RuntimeError(f"kill {number}: the run ended before it; more --epochs make room")
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"kill {number}: the process had ended, exit {process.returncode}")
        step, phase = _found(one, began, undisturbed, steps)
        where[phase] += 1
        print(f"kill {number:3} of {kills}: {phase}, step {step} of {steps}", flush=True)
    subprocess.run(_command(killed), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    left = [f"{path.name} is left over" for path in one.glob(".*") if path.name != LOCK_FILE]
    return where, differences(one, other) + left


def _command(config):
    return [sys.executable, str(ROOT / "train_bilevel.py"), *flags_of(config)]


def _wait(process, run, began, target):
    """Until the process has continued the run and the checkpoint of step ``target`` is there."""
    last, deadline = None, time.monotonic() + PATIENCE
    while process.poll() is None:
        step = _checkpoint(run)
        if step != last:
            last, deadline = step, time.monotonic() + PATIENCE
        if step >= target and _trains(run, began):
            return
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"no new checkpoint after step {step} in {PATIENCE} s")
        time.sleep(0.002)


def _checkpoint(run):
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.name[5:13]) for path in run.glob("step-*.pt")), default=0)


def _trains(run, began):
    """Whether a process that began at ``began`` ns has said so in the log."""
    try:
        return (run / "log.txt").stat().st_mtime_ns > began
    except FileNotFoundError:
        return False


def _found(run, began, config, steps):
    """(step, what the process was doing) when it was killed, from what it left on disk.

    An upper step follows every second step, an evaluation every epoch; each leaves a row when it is
    done, and then comes the checkpoint.
    """
    saved = _checkpoint(run)
    if not _trains(run, began):
        return saved, "start-up"
    if any(run.glob(".*.pt.*")):
        return saved + 1, "writing a checkpoint (its temporary file is left)"
    content = (run / "metrics.jsonl").read_text().splitlines()
    later = [row for row in map(json.loads, content) if row["step"] > saved]
    main_steps = config.epochs * 4
    if saved == steps:
        return saved, "after the last step: the test"
    step = saved + 1
    kinds = {row["kind"] for row in later}
    if step > main_steps:
        doing, ends_epoch = "fine-tuning step", step % 2 == 0
    else:
        doing, ends_epoch = "lower step", step % 4 == 0
        if step % config.hyperstep == 0:
            doing = "evaluation" if "upper" in kinds and ends_epoch else "lower or upper step"
    if "epoch" in kinds or ("upper" in kinds and not ends_epoch):
        doing = "between a step and its checkpoint"
    return step, doing


# --------------------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------------------


def differences(run, other):
    """What differs between two finished runs beside what a clock determines, a list of phrases."""
    found = []
    for name in ("metrics.jsonl", "schedule.jsonl"):
        if (run / name).exists() != (other / name).exists():
            found.append(f"only one has {name}")
        elif (run / name).exists():
            pairs = list(zip(rows(run / name), rows(other / name), strict=False))
            found += [f"{name}: {a} is not {b}" for a, b in pairs if a != b][:1]
            if len(rows(run / name)) != len(rows(other / name)):
                found.append(f"{name}: another number of rows")
    ours, theirs = (r / "margins.npy" for r in (run, other))
    if ours.exists() != theirs.exists():
        found.append("only one has margins.npy")
    elif ours.exists() and ours.read_bytes() != theirs.read_bytes():
        found.append("margins.npy")
    ours, theirs = (json.loads((r / "summary.json").read_text()) for r in (run, other))
    found += [
        f"summary.json: {name}"
        for name in ours | theirs
        if name != "seconds" and (name not in ours or ours[name] != theirs.get(name))
    ]
    ours, theirs = (torch.load(r / "best.pt", weights_only=True) for r in (run, other))
    for part in ("model", "scheduler"):
        if ours[part].keys() != theirs[part].keys():
            found.append(f"best.pt: other names in {part}")
            continue
        found += [
            f"best.pt: {part}, {name}"
            for name, value in ours[part].items()
            if not _equal(value, theirs[part][name])
        ]
    ours, theirs = (_last_state(r) for r in (run, other))
    found += [
        f"the last checkpoint: {part}"
        for part in (
            "step",
            "model",
            "scheduler",
            "lower",
            "upper",
            "fine_tuning",
            "random",
            "margins",
        )
        if not _equal(ours[part], theirs[part])
    ]
    return found


def _last_state(run):
    return torch.load(max(run.glob("step-*.pt")), weights_only=True)["state"]


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def rows(path):
    """The rows of a file without what only a clock determines."""
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith("seconds")}
        for line in path.read_text().splitlines()
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=BILEVEL, default="joint")
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument(
        "--num_workers", type=int, default=0, metavar="N", help="0: from a cache; else N threads"
    )
    parser.add_argument("--epochs", type=int, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        where, found = storm(
            folder, args.method, args.kills, args.num_workers, args.epochs, args.seed
        )
    print(f"{args.method}, --num_workers {args.num_workers}: {sum(where.values())} kills:")
    for phase, count in where.most_common():
        print(f"  {count:3} {phase}")
    print(f"{time.monotonic() - start:.0f} s; " + ("; ".join(found) if found else "equal"))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
