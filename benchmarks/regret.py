"""What it costs not to tune: a schedule at aux_weight 1 beside equal weights with the best factor.

  python data_preprocess.py --generate digits --data_root digits/data --out_dir digits/split
  python benchmarks/regret.py --split_dir digits/split --seeds 1 2 3 > regret.md

For every budget (--epochs, --rates times the data's usual learning rate) and setting, equal weights
are trained with every factor in --aux_weights, with and without the development set (common_dev,
common). The best of them by mean validation over the seeds is what tuning by hand finds. The regret
of a method is its mean test accuracy below that one's (of a real-valued target: its RMSE above).
Finished runs in --sweep_dir are not run again.

A second table follows the target's share of all weight through the runs of every schedule, and
gives the median time of an upper step.
"""

import contextlib
import itertools
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_bilevel  # noqa: E402
from auxilearn.data.split import load_split  # noqa: E402
from auxilearn.errors import Parser, RunError, run_script  # noqa: E402
from auxilearn.files import read_rows  # noqa: E402
from auxilearn.metrics import metric_of  # noqa: E402
from auxilearn.run.config import Config, resolve  # noqa: E402
from auxilearn.run.record import METRICS_FILE, SCHEDULE_FILE  # noqa: E402
from auxilearn.tables import local, sweep  # noqa: E402
from auxilearn.tables.protocol import (  # noqa: E402
    ABLATION,
    SCHEDULE,
    SETTINGS,
    in_place_of,
    rows,
)

EQUAL = ("common", "common_dev")


class Cell(NamedTuple):
    """A budget and a setting."""

    epochs: int
    rate: float  # times the usual learning rate
    setting: str


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--split_dir", type=Path, required=True, metavar="DIR")
    add("--epochs", type=int, nargs="+", default=[5, 20, 60], metavar="N")
    add("--rates", type=float, nargs="+", default=[1 / 3, 1.0, 3.0], metavar="X")
    add(
        "--settings",
        nargs="+",
        choices=tuple(SETTINGS),
        default=["supervised", "corrupted_0.4", "corrupted_0.6", "semi"],
    )
    add("--aux_weights", type=float, nargs="+", default=[0, 0.03, 0.1, 0.3, 1, 3, 10], metavar="X")
    add("--methods", nargs="+", choices=tuple(rows()), default=["joint", "joint_stable"])
    add("--seeds", type=int, nargs="+", default=[1, 2], metavar="N")
    add("--run_flags", default="", metavar="FLAGS", help="for every run, as of reproduce_tables.py")
    add("--sweep_dir", type=Path, default=Path("regret"), metavar="DIR")
    add("--jobs", type=int, default=local.usable_cores(), metavar="N")
    return parser.parse_args()


def variants(args):
    """(row, aux_weight) of equal weights with every factor, and of the methods at 1."""
    tuned = list(itertools.product(EQUAL, args.aux_weights))
    return tuned, [(method, 1.0) for method in args.methods]


def runs_of(args, split, main_lr):
    """{(``Cell``, row, aux_weight): a ``Run`` per seed}."""
    flags = sweep.RunFlags.read(shlex.split(args.run_flags))
    home = args.sweep_dir
    places = sweep.Places(args.split_dir, None, home / "bird_record", home / "logs")
    numbers = split.target.classes is None
    cells = [Cell(*parts) for parts in itertools.product(args.epochs, args.rates, args.settings)]
    found = {}
    for cell, (row, weight) in itertools.product(cells, itertools.chain(*variants(args))):
        setting = in_place_of(cell.setting, numbers)
        chosen = {
            "aux_weight": weight,
            "epochs": cell.epochs,
            "main_lr": float(f"{cell.rate * main_lr:.3g}"),
        }
        found[cell, row, weight] = [
            sweep.Run(
                *("regret", row, setting, chosen),
                sweep.make_job(places, "own", row, setting, seed, chosen, flags),
            )
            for seed in args.seeds
        ]
    return found


def regrets(args, cell, results, metric):
    """A line of the table: the best equal weights, then (value, regret) of every method.

    ``results``: {(cell, row, aux_weight): ``Result`` per seed}.
    """
    tuned, untuned = variants(args)

    def mean(variant, of):
        return statistics.fmean(getattr(r, f"{of}_accuracy") for r in results[(cell, *variant)])

    best = max(tuned, key=lambda variant: metric.sign * mean(variant, "valid"))
    reached = mean(best, "test")
    values = [mean(variant, "test") for variant in untuned]
    return best, reached, [(value, metric.sign * (reached - value)) for value in values]


def finished(args, split, metric, wanted):
    """Run what has not been run. {key: a ``Result`` per run} of ``wanted``, {key: runs}.

    Raises RunError: a run ended without a result.
    """
    jobs = [run.job for runs in wanted.values() for run in runs]
    with contextlib.redirect_stdout(sys.stderr):
        failed = sweep.run(
            jobs,
            lambda left: local.launch(left, args.jobs, train_bilevel.main, local.chosen_gpus([])),
            split.fingerprint,
            metric,
        )
    if failed:
        job, reason = failed[0]
        raise RunError(
            f"{len(failed)} runs ended without a result (the first: {job.name}, {reason})"
        )
    return {
        key: [sweep.result_of(run, split.fingerprint, metric) for run in runs]
        for key, runs in wanted.items()
    }


def main():
    args = parse_arguments()
    split = load_split(str(args.split_dir))
    metric = metric_of(split.target)
    settings = sweep.RunFlags.read(shlex.split(args.run_flags)).settings
    wanted = runs_of(args, split, resolve(Config(**settings), split).main_lr)
    results = finished(args, split, metric, wanted)
    head = ["epochs", "rate", "setting", "best equal weights", metric.words]
    head += [word for method in args.methods for word in (method, f"regret of {method}")]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    every = []
    for cell in dict.fromkeys(key[0] for key in wanted):
        (row, weight), reached, found = regrets(args, cell, results, metric)
        shown = [shown_as(metric, number) for pair in found for number in pair]
        words = [cell.epochs, f"{cell.rate:.2g}", cell.setting, f"{row}, {weight:g}"]
        print(
            f"| {' | '.join(map(str, [*words, shown_as(metric, reached), *shown]))} |", flush=True
        )
        every.append([regret for _, regret in found])
    for method, of_method in zip(args.methods, zip(*every, strict=True), strict=True):
        print(
            f"\n{method}: regret {shown_as(metric, statistics.fmean(of_method))} in the mean over "
            f"{len(of_method)} cells, {shown_as(metric, max(of_method))} at most, n = "
            f"{len(args.seeds)} seeds a cell."
        )
    print_shares(args, wanted)


def print_shares(args, wanted):
    """Means over the seeds, from schedule.jsonl and metrics.jsonl of the runs.

    Methods whose runs are too short for an upper step are left out.
    """
    methods = [name for name in args.methods if rows()[name].kind in (SCHEDULE, ABLATION)]
    moments = ["first", "1/4", "1/2", "3/4", "last"]
    head = ["epochs", "rate", "setting", "target's share of", *moments, "upper step, ms"]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for (cell, row, _), runs in wanted.items():
        if row not in methods:
            continue
        took = [seconds for run in runs for seconds in upper_seconds(run.job.directory)]
        if not took:
            continue
        shares = [shares_of(run.job.directory) for run in runs]
        means = [f"{statistics.fmean(of_moment):.2f}" for of_moment in zip(*shares, strict=True)]
        words = [cell.epochs, f"{cell.rate:.2g}", cell.setting, row, *means]
        print(f"| {' | '.join(map(str, words))} | {1000 * statistics.median(took):.0f} |")


def shares_of(directory):
    """The target's share at the first upper step, after a quarter, ... and at the last."""
    weights = [r["mean_weight"] for r in read_rows(directory / SCHEDULE_FILE) if "step" in r]
    weights = [[w or 0.0 for w in of_step] for of_step in weights]  # null: no sample had a label
    shares = [of_step[0] / sum(of_step) for of_step in weights]
    return [shares[(len(shares) * quarter) // 4] for quarter in range(4)] + [shares[-1]]


def upper_seconds(directory):
    return [r["upper_seconds"] for r in read_rows(directory / METRICS_FILE) if r["kind"] == "upper"]


def shown_as(metric, value):
    """A value of the metric, or a difference, as tables have it."""
    return f"{metric.factor * value:.1f}" if metric.factor == 100 else f"{value:.4g}"


if __name__ == "__main__":
    run_script(main)
