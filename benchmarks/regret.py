"""What it costs not to tune: a schedule at aux_weight 1 beside equal weights with the best factor.

  python data_preprocess.py --generate digits --data_root digits/data --out_dir digits/split
  python benchmarks/regret.py --split_dir digits/split --seeds 1 2 3 > regret.md

For every budget (--epochs, --rates times the data's usual learning rate) and setting, equal weights
are trained with every factor in --aux_weights, with and without the development set (common_dev,
common). What tuning by hand finds is the best of them by mean validation. The regret of a method is
its test accuracy below that one's (of a real-valued target: its RMSE above).

Many of these weightings are about equally good. Where they are chosen and tested on the same seeds,
the luckiest wins, and the regret can come out too large. So for every seed the best on the other
seeds is chosen. The table has the mean of these regrets with its standard error, and beside it the
regret of choosing on the same seeds. Finished runs in --sweep_dir are not run again.

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
    return with_enough_seeds(parser)


def with_enough_seeds(parser):
    """The arguments, whose ``--seeds`` leave others to choose on for each."""
    args = parser.parse_args()
    if len(set(args.seeds)) < max(2, len(args.seeds)):
        parser.error("--seeds: give two seeds or more, all different: the others choose for each")
    return args


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


class Regret(NamedTuple):
    """Of a method, in a cell."""

    value: float  # mean of the method over the seeds, by test
    by_seed: list[float]  # against the equal weights that are best on the other seeds
    same_seeds: float  # against those that are best on the same seeds


def best_of(results, candidates, metric, by="valid", seeds=None):
    """The candidate that is best in the mean over ``seeds`` (places in the lists; default: all).

    ``results``: {candidate: ``Result`` per seed}.
    """

    def mean(candidate):
        found = results[candidate]
        chosen = found if seeds is None else [found[seed] for seed in seeds]
        return statistics.fmean(getattr(result, f"{by}_accuracy") for result in chosen)

    return max(candidates, key=lambda candidate: metric.sign * mean(candidate))


def of_choices(results, candidates, metric, by="valid"):
    """By test, for every seed, the candidate that is best on the other seeds."""
    seeds = range(len(results[candidates[0]]))
    chosen = [
        best_of(results, candidates, metric, by, [s for s in seeds if s != seed]) for seed in seeds
    ]
    return [results[candidate][seed].test_accuracy for seed, candidate in enumerate(chosen)]


def regrets(args, results, metric):
    """A line of the table: the best equal weights, their mean by test, a ``Regret`` per method.

    ``results``: {(row, aux_weight): ``Result`` per seed} of a cell.
    """
    tuned, untuned = variants(args)
    best = best_of(results, tuned, metric)
    reached = statistics.fmean(result.test_accuracy for result in results[best])
    by_hand = of_choices(results, tuned, metric)
    found = []
    for variant in untuned:
        values = [result.test_accuracy for result in results[variant]]
        value = statistics.fmean(values)
        differences = [metric.sign * (a - b) for a, b in zip(by_hand, values, strict=True)]
        found.append(Regret(value, differences, metric.sign * (reached - value)))
    return best, reached, found


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
    for method in args.methods:
        head += [method, f"regret of {method}", f"{method}, same seeds"]
    print(table_head(head))
    every = []
    for cell in dict.fromkeys(key[0] for key in wanted):
        of_cell = {key[1:]: found for key, found in results.items() if key[0] == cell}
        (row, weight), reached, found = regrets(args, of_cell, metric)
        words = [cell.epochs, f"{cell.rate:.2g}", cell.setting, f"{row}, {weight:g}"]
        words.append(shown_as(metric, reached))
        for regret in found:
            words += [shown_as(metric, regret.value), with_error(metric, regret.by_seed)]
            words.append(shown_as(metric, regret.same_seeds))
        print(f"| {' | '.join(map(str, words))} |", flush=True)
        every.append(found)
    print_means(args, every, metric)
    print_shares(args, wanted)


def print_means(args, every, metric):
    """Means over the cells. ``every``: a ``Regret`` per method, for every cell."""
    head = ["method", "cells", "mean regret", "largest", "mean, same seeds", "largest, same seeds"]
    print("\n" + table_head(head))
    for method, of_method in zip(args.methods, zip(*every, strict=True), strict=True):
        # The cells share their seeds: a seed's mean over the cells is one observation.
        by_seed = map(statistics.fmean, zip(*(r.by_seed for r in of_method), strict=True))
        worst = max(statistics.fmean(r.by_seed) for r in of_method)
        same = [r.same_seeds for r in of_method]
        words = [method, len(of_method), with_error(metric, list(by_seed))]
        words += [shown_as(metric, x) for x in (worst, statistics.fmean(same), max(same))]
        print(f"| {' | '.join(map(str, words))} |")
    print(f"\nn = {len(args.seeds)} seeds a cell; ± is the standard error over them.")


def print_shares(args, wanted):
    """Means over the seeds, from schedule.jsonl and metrics.jsonl of the runs.

    Methods whose runs are too short for an upper step are left out.
    """
    methods = [name for name in args.methods if rows()[name].kind in (SCHEDULE, ABLATION)]
    moments = ["first", "1/4", "1/2", "3/4", "last"]
    head = ["epochs", "rate", "setting", "target's share of", *moments, "upper step, ms"]
    print("\n" + table_head(head))
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


def table_head(titles):
    """The two lines above the rows of a table in Markdown."""
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"


def with_error(metric, values):
    """The mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{shown_as(metric, statistics.fmean(values))} ± {shown_as(metric, error)}"


def shown_as(metric, value):
    """A value of the metric, or a difference, as tables have it."""
    return f"{metric.factor * value:.1f}" if metric.factor == 100 else f"{value:.4g}"


if __name__ == "__main__":
    run_script(main)
