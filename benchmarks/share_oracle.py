"""How much better than joint_stable could an oracle set the target's share?

  python data_preprocess.py --generate digits --data_root digits/data --out_dir digits/split
  python benchmarks/share_oracle.py --split_dir digits/split --epochs 20 --seeds 11 12 > oracle.md

Every pair of --shares is trained: the target has the first of them of all weight in the first half
of the lower steps, the second in the other half. All auxiliary tasks and all samples count alike;
all else is as of joint_stable. Mean test accuracies over the seeds of the best pair by test (the
oracle), the best constant share by test, the pair that validation chooses, and joint_stable. For
every seed the choice is made on the other seeds, so that luck does not count as knowledge.
"""

import itertools
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from auxilearn.data.split import load_split  # noqa: E402
from auxilearn.errors import Parser, run_script  # noqa: E402
from auxilearn.methods import load_plugin  # noqa: E402
from auxilearn.metrics import metric_of  # noqa: E402
from auxilearn.tables import local, sweep  # noqa: E402
from auxilearn.tables.protocol import SETTINGS, in_place_of  # noqa: E402
from benchmarks import regret  # noqa: E402

PLUGIN = Path(__file__).with_name("two_shares.py")


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--split_dir", type=Path, required=True, metavar="DIR")
    add("--epochs", type=int, nargs="+", default=[20], metavar="N")
    settings = ["supervised", "corrupted_0.4", "semi"]
    add("--settings", nargs="+", choices=tuple(SETTINGS), default=settings)
    add("--shares", type=float, nargs="+", default=[0.04, 0.15, 0.5, 0.9], metavar="X")
    add("--seeds", type=int, nargs="+", default=[1, 2], metavar="N")
    add("--run_flags", default="", metavar="FLAGS", help="for every run, as of reproduce_tables.py")
    add("--sweep_dir", type=Path, default=Path("oracle"), metavar="DIR")
    add("--jobs", type=int, default=local.usable_cores(), metavar="N")
    return regret.with_enough_seeds(parser)


def runs_of(args, split):
    """{(epochs, setting, pair of shares, or None for joint_stable): a ``Run`` per seed}."""
    plugin = str(PLUGIN), load_plugin(PLUGIN)
    flags = sweep.RunFlags.read(shlex.split(args.run_flags))
    home = args.sweep_dir
    places = sweep.Places(args.split_dir, None, home / "bird_record", home / "logs")
    pairs = [*itertools.product(args.shares, repeat=2), None]
    found = {}
    for epochs, setting, pair in itertools.product(args.epochs, args.settings, pairs):
        row, chosen = "joint_stable", {"epochs": epochs}
        if pair:
            row = "two_shares"
            chosen |= {"first": pair[0], "second": pair[1], "switch": epochs / 2}
        here = in_place_of(setting, split.target.classes is None)
        found[epochs, setting, pair] = [
            sweep.Run(
                *("oracle", row, here, chosen),
                sweep.make_job(places, "own", row, here, seed, chosen, flags, plugin),
            )
            for seed in args.seeds
        ]
    return found


def compared(results, metric):
    """[(pair or None, accuracy)]: the oracle, the best constant share, validation's choice,
    joint_stable. The pair is the choice on all seeds. ``results``: {pair or None: ``Result``s}.
    """
    pairs = [pair for pair in results if pair]
    constant = [(first, second) for first, second in pairs if first == second]
    found = [
        (
            regret.best_of(results, candidates, metric, by),
            statistics.fmean(regret.of_choices(results, candidates, metric, by)),
        )
        for candidates, by in ((pairs, "test"), (constant, "test"), (pairs, "valid"))
    ]
    return [*found, (None, statistics.fmean(r.test_accuracy for r in results[None]))]


def main():
    args = parse_arguments()
    split = load_split(str(args.split_dir))
    metric = metric_of(split.target)
    wanted = runs_of(args, split)
    results = regret.finished(args, split, metric, wanted)
    head = ["epochs", "setting", "oracle", "best constant share", "chosen by validation"]
    print(regret.table_head([*head, "joint_stable"]))
    for epochs, setting in itertools.product(args.epochs, args.settings):
        of_cell = {key[2]: found for key, found in results.items() if key[:2] == (epochs, setting)}
        words = [
            regret.shown_as(metric, value) + (f" ({pair[0]:g}, {pair[1]:g})" if pair else "")
            for pair, value in compared(of_cell, metric)
        ]
        print(f"| {' | '.join([str(epochs), setting, *words])} |", flush=True)
    print(
        f"\nMeans of n = {len(args.seeds)} seeds, each with the choice of the others; in brackets "
        "the shares of the two halves that are best on all of them."
    )


if __name__ == "__main__":
    run_script(main)
