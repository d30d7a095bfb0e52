"""How many hours the runs of a sweep will take, for --dry_run.

The speed of a run is read from what it has recorded: from finished runs of the same kind in the
sweep's folder, or else from a short training here, in a temporary folder. Two runs are of one kind
if their steps take equally long. The ``Plan`` of each run says how many steps it has.
"""

import dataclasses
import heapq
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from auxilearn.errors import UserError
from auxilearn.files import read_json, read_rows
from auxilearn.methods import METHODS
from auxilearn.run.build import Plan
from auxilearn.run.config import (
    FIELDS,
    NEUTRAL,
    from_record,
    resolve,
    slow_device,
    training_set_name,
)
from auxilearn.run.record import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE

# Of a measurement, which also validates after every epoch and tests once.
LOWER_STEPS, HYPERSTEP = 30, 10
# Settings on which the duration of a step does not depend: numbers in the arithmetic, the choice of
# images and labels, and what the plan counts. Options of a method are taken to be of this sort.
OF_ONE_KIND = (
    *("seed", "exp_name", "device", "options", "backbone_pretrain", "backbone_weights"),
    *("main_lr", "w_decay", "aux_weight", "upper_optimizer", "upper_lr", "upper_decay"),
    *("neumann_alpha", "max_grad_norm", "corrupted", "corrupted_rate", "corruption", "dev_batches"),
    *("epochs", "max_steps", "hyperstep", "warmup_epochs", "dev_epochs", "hold_out_dev"),
)


class Speed(NamedTuple):
    """The seconds that parts of a run take. A step of fine-tuning counts as a lower step."""

    lower: float  # a lower step and its data
    upper: float  # 0 without an upper level
    epoch: float  # the end of an epoch: validation, checkpoints and what else is not a step
    test: float

    @classmethod
    def of_run(cls, directory):
        """The speed of a finished run. Its first lower and upper step, which warm up, are left out
        of the means. None: rows are missing, of upper steps because it took none."""
        summary = read_json(directory / SUMMARY_FILE)
        rows = read_rows(directory / METRICS_FILE)
        of_steps = [row for row in rows if row["kind"] == "step"]
        ends = [0, *(row["step"] for row in of_steps)]
        steps = [end - start for start, end in pairwise(ends)]  # a row is of all since the last one
        lower = [row["data_seconds"] + row["lower_seconds"] for row in of_steps]
        upper = [row["upper_seconds"] for row in rows if row["kind"] == "upper"]
        valid = [row["valid_seconds"] for row in rows if row["kind"] == "epoch"]
        if not (lower and valid) or (METHODS[summary["method"]].bilevel and not upper):
            return None
        test = fmean(valid)  # the usual split has as many samples for the test as for validation
        spent = float(np.dot(steps, lower)) + sum(upper)
        return cls(
            lower=float(np.average(lower[1:] or lower, weights=steps[1:] or steps)),
            upper=fmean(upper[1:] or upper or [0.0]),
            epoch=(summary["seconds"] - spent - test) / len(valid),
            test=test,
        )

    def seconds(self, plan):
        """How long a run with this ``Plan`` takes, from its first step to its result."""
        ends = plan.epoch(plan.main_steps) + plan.passes
        upper = plan.upper_steps(plan.main_steps) * self.upper
        return plan.total_steps * self.lower + upper + ends * self.epoch + self.test


class Estimate(NamedTuple):
    """What is known of the duration of jobs."""

    seconds: list[float]  # of the jobs whose speed is known, in their order
    measured: int  # how many of them go by a measurement; the others by finished runs
    kinds: int  # how many measurements there were
    unknown: dict[str, int]  # {reason: number of jobs whose speed is not known}

    def wall_clock(self, count):
        """The seconds until the last job ends if ``count`` run at a time, one after the other."""
        ends = [0.0] * count
        for seconds in self.seconds:
            heapq.heapreplace(ends, ends[0] + seconds)
        return max(ends)

    def lines(self, count):
        """What it says, for a person. ``count``: jobs at a time, or None if nobody knows."""
        if self.seconds:
            sources = {
                "by the speed of finished runs": len(self.seconds) - self.measured,
                f"by a short training of each of {self.kinds} kinds here": self.measured,
            }
            said = ", ".join(f"{number} {source}" for source, number in sources.items() if number)
            yield f"{_hours(sum(self.seconds))} hours of training in all ({said})"
            if count is not None:
                yield f"{_hours(self.wall_clock(count))} hours with {count} runs at a time"
        for reason, number in self.unknown.items():
            yield f"not counted, for want of a speed: {number} runs ({reason})"


def _hours(seconds):
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 9.5 else f"{hours:.2g}"


def estimate(jobs, places, split, launch):
    """The ``Estimate`` of ``jobs`` on ``split``, by finished runs in ``places``, or measured here.

    A run of each kind of which none is finished is trained for ``LOWER_STEPS`` steps by ``launch``,
    which is as for ``sweep.run`` and should run one at a time. Nothing is left of it. A run that
    was interrupted counts in full.
    """
    plans, kinds, refused = {}, {}, {}
    for job in jobs:
        try:
            config = resolve(job.config, split)
        except UserError as error:
            refused[job.name] = str(error)
            continue
        sizes = (len(split.indices[name]) for name in (training_set_name(config), "dev"))
        plans[job.name] = Plan.of(config, *sizes)
        kinds[job.name] = kind_of(config)
    wanted = {kinds[job.name]: job for job in jobs if job.name in kinds}
    finished = finished_speeds(places.runs, wanted)
    missing = [job for kind, job in wanted.items() if kind not in finished]
    found = measure(missing, split, launch) if missing else {}
    measured = {kinds[name]: result for name, result in found.items()}
    seconds, unknown, by_measurement = [], {}, 0
    speeds = finished | measured
    for job in jobs:
        result = refused.get(job.name) or speeds[kinds[job.name]]
        if isinstance(result, Speed):
            seconds.append(result.seconds(plans[job.name]))
            by_measurement += kinds[job.name] in measured
        else:
            unknown[result] = unknown.get(result, 0) + 1
    count = sum(isinstance(result, Speed) for result in measured.values())
    return Estimate(seconds, by_measurement, count, unknown)


def kind_of(config):
    """The settings of a resolved ``Config`` on which the duration of its steps depends."""
    return tuple(getattr(config, n) for n in FIELDS if n not in (*NEUTRAL, *OF_ONE_KIND))


def finished_speeds(folder, wanted):
    """{kind: mean ``Speed`` of the finished runs in ``folder``}, of the kinds ``wanted``."""
    found = {}
    for summary in sorted(Path(folder).glob(f"*/*/{SUMMARY_FILE}")):
        try:
            config = from_record(read_json(summary.parent / CONFIG_FILE)["config"])
        except (UserError, KeyError):
            continue  # of another version or of a plugin that is not given: nothing to compare
        kind = kind_of(config)
        if kind in wanted and (speed := Speed.of_run(summary.parent)):
            found.setdefault(kind, []).append(speed)
    return {kind: Speed(*map(fmean, zip(*speeds, strict=True))) for kind, speeds in found.items()}


def measure(jobs, split, launch):
    """{job's name: its ``Speed``, or the reason why there is none}, by short trainings."""
    found, short = {}, {}
    with tempfile.TemporaryDirectory(prefix="estimate_") as folder:
        for job in jobs:
            config = resolve(job.config, split)
            if slow := slow_device(config):
                found[job.name] = slow
                continue
            cached = config.cache_dir == "none" or Path(config.cache_dir).exists()
            short[job.name] = job._replace(
                config=dataclasses.replace(
                    job.config,
                    record_dir=folder,
                    cache_dir=config.cache_dir if cached else f"{folder}/cache",
                    epochs=LOWER_STEPS,
                    max_steps=LOWER_STEPS,
                    hyperstep=HYPERSTEP,
                    warmup_epochs=0,
                    dev_epochs=0,
                    save_every=0,
                    resume=False,
                ),
                logs=Path(folder),
            )
        how = {"total": len(short), "unit": "kind", "dynamic_ncols": True, "disable": None}
        for job, outcome in tqdm(launch([*short.values()]), "measuring", **how):
            if outcome.code:
                said = job.log.read_text(errors="replace").splitlines() if job.log.exists() else []
                found[job.name] = ": ".join([str(outcome), *said[-1:]])
            else:
                found[job.name] = Speed.of_run(job.directory)
            shutil.rmtree(job.directory, ignore_errors=True)  # checkpoints of large networks
    return found
