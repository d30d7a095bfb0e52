"""Reproduce the paper's tables, one command each.

  python reproduce_tables.py table4 --dataset mini       run what is missing, then print the table
  python reproduce_tables.py all --dataset digits        tables 2 to 4
  python reproduce_tables.py tune --dataset digits       choose the hyper-parameters, on validation
  python reproduce_tables.py table2 --dry_run            print the commands, run nothing

table2 is supervised, table3 semi-supervised (5 labels per class), table4 has corrupted labels (20,
40 and 60 %). A run that is finished is never run again: interrupt this at any moment and type it
again. One failing run does not stop the others. Written to --out_dir: TABLE.md, TABLE.csv,
TABLE.tex, TABLE.png, TABLE.svg, and TABLE_runs.csv, which leads from every cell to the folders and
commands of its runs.
"""

import argparse
import contextlib
import io
import os
import shlex
import sys
from pathlib import Path

import data_preprocess
from auxilearn.data.cub import load_split
from auxilearn.errors import RunError, UserError, run_script
from auxilearn.tables import local, slurm, sweep
from auxilearn.tables.notes import notes
from auxilearn.tables.protocol import DATASETS, ROWS, TABLES
from auxilearn.tables.render import markdown, write_table
from auxilearn.tables.tuning import Hyperparameters, trials, write_choice

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS, TUNING_SEEDS = (1, 2, 3, 4, 5), (101,)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=(*TABLES, "all", "tune"))
    add = parser.add_argument_group("what is run").add_argument
    add("--dataset", choices=tuple(DATASETS), default="cub", help="(default: %(default)s)")
    add(
        "--methods",
        nargs="+",
        choices=tuple(ROWS),
        default=list(ROWS),
        metavar="ROW",
        help=f"rows, of {', '.join(ROWS)} (default: all)",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help=f"(default: {' '.join(map(str, SEEDS))}; to tune: {' '.join(map(str, TUNING_SEEDS))})",
    )
    add("--epochs", type=int, metavar="N", help="of every run (default: the data set's)")
    add(
        "--run_flags",
        default="",
        metavar="FLAGS",
        help="further flags of train_bilevel.py for every run, in one word: "
        "--run_flags='--backbone convnet --image_size 64'",
    )
    add(
        "--hyperparameters",
        metavar="FILE",
        default=_shown(RESULTS / "hyperparameters.json"),
        help="what tune writes and tables use; 'none' uses the data set's settings for every row "
        "(default: %(default)s)",
    )
    add("--dry_run", action="store_true", help="print the commands, run nothing")
    add(
        "--collect_only",
        action="store_true",
        help="run nothing, print the table of what is finished",
    )
    add = parser.add_argument_group("places").add_argument
    add(
        "--sweep_dir",
        type=Path,
        default=Path("sweeps"),
        metavar="DIR",
        help="data, runs and logs are kept in DIR/DATASET (default: %(default)s)",
    )
    add(
        "--out_dir",
        type=Path,
        metavar="DIR",
        help="where tables go (default: SWEEP_DIR/DATASET/tables)",
    )
    add(
        "--data_root",
        type=Path,
        metavar="DIR",
        help="folder in CUB layout (default: CUB_200_2011; of mini and digits, made in SWEEP_DIR)",
    )
    add(
        "--split_dir",
        type=Path,
        metavar="DIR",
        help="its split, made if need be (default: in SWEEP_DIR)",
    )
    add(
        "--paper",
        type=Path,
        default=Path(_shown(RESULTS / "paper_numbers.csv")),
        metavar="FILE",
        help="the paper's numbers, to be filled in by hand (default: %(default)s)",
    )
    add = parser.add_argument_group("how it is run").add_argument
    add("--launcher", choices=("local", "slurm"), default="local", help="(default: %(default)s)")
    add(
        "--jobs",
        type=_positive,
        metavar="N",
        help="runs at the same time (default: one per GPU of --gpus, else one per core; on Slurm, "
        "256)",
    )
    add("--gpus", type=int, nargs="+", default=[], metavar="N", help="GPUs to use, by number")
    add("--partition", metavar="NAME", help="of Slurm")
    add("--gpus_per_job", type=int, default=0, metavar="N", help="Slurm: (default: %(default)s)")
    add(
        "--cpus_per_job",
        type=_positive,
        default=1,
        metavar="N",
        help="Slurm: (default: %(default)s)",
    )
    add("--mem_gb", type=_positive, metavar="N", help="Slurm: memory of a run in GB")
    add(
        "--timeout_min",
        type=_positive,
        default=24 * 60,
        metavar="N",
        help="Slurm: time limit of a run in minutes; it is queued again and goes on where it "
        "reaches it (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.seeds is None:
        args.seeds = list(TUNING_SEEDS if args.what == "tune" else SEEDS)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error("--seeds: expected different integers from 0 up")
    args.methods = [row for row in ROWS if row in args.methods]
    args.tables = list(TABLES) if args.what in ("all", "tune") else [args.what]
    args.flags = [*(["--epochs", str(args.epochs)] if args.epochs else []), *_split(args.run_flags)]
    return args


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from 1 up")
    return int(text)


def _split(text):
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--run_flags {text!r}: {error}") from None


def _shown(path):
    """``path`` from the current folder, if it lies within."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def places_of(args):
    """``Places`` and the flags of data_preprocess.py that fill them."""
    home = args.sweep_dir / args.dataset
    generate = DATASETS[args.dataset].generate
    root = args.data_root or (home / "data" if generate else Path("CUB_200_2011"))
    split = args.split_dir or home / "preprocess_data"
    flags = ["--data_root", str(root), "--out_dir", str(split)]
    if generate and args.data_root is None:
        flags = ["--generate", generate, *flags]
    return sweep.Places(split, root, home / "bird_record", home / "logs"), flags


def prepare(preprocess_flags, places):
    """Make sure that the data and their split are there. Returns their fingerprint."""
    with contextlib.redirect_stdout(io.StringIO()):
        data_preprocess.main(preprocess_flags)
    return load_split(str(places.split_dir), str(places.data_root)).fingerprint


def launcher(args, places):
    """Callable (jobs) -> iterator of (job, Outcome)."""
    if args.launcher == "slurm":
        return lambda jobs: slurm.launch(
            jobs,
            places.logs,
            partition=args.partition,
            gpus_per_job=args.gpus_per_job,
            cpus_per_job=args.cpus_per_job,
            mem_gb=args.mem_gb,
            timeout_min=args.timeout_min,
            **({"array_parallelism": args.jobs} if args.jobs else {}),
        )
    local.check_gpus(args.gpus)
    count = args.jobs or len(args.gpus) or local.usable_cores()
    return lambda jobs: local.launch(jobs, count, args.gpus)


def main(argv=None):
    args = parse_arguments(argv)
    places, preprocess_flags = places_of(args)
    if args.what == "tune":
        wanted = [
            (table, row, setting, seed, candidate)
            for table, row, setting, candidate in trials(args.tables, args.methods)
            for seed in args.seeds
        ]
    else:
        hyperparameters = Hyperparameters(
            None if args.hyperparameters == "none" else args.hyperparameters, args.dataset
        )
        wanted = [
            (table, row, setting, seed, hyperparameters.of(table, row))
            for row in args.methods
            for table in args.tables
            for setting in TABLES[table].settings
            for seed in args.seeds
        ]
    jobs = [
        sweep.make_job(places, args.dataset, row, setting, seed, chosen, args.flags)
        for _, row, setting, seed, chosen in wanted
    ]
    if args.dry_run:
        print(shlex.join([*sweep.script("data_preprocess.py"), *preprocess_flags]))
        print("\n".join(dict.fromkeys(job.command for job in jobs)))
        return
    fingerprint = prepare(preprocess_flags, places)
    failed = []
    if not args.collect_only:
        elsewhere = args.launcher == "local"
        failed = sweep.run(jobs, launcher(args, places), fingerprint, elsewhere=elsewhere)
    results = [
        sweep.result_of(job, row, setting, fingerprint)
        for job, (_, row, setting, _, _) in zip(jobs, wanted, strict=True)
    ]
    if args.what == "tune":
        choose(args, wanted, results, fingerprint)
    else:
        show(args, places, wanted, results, hyperparameters)
    if failed:
        job, reason = failed[0]
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed (the first: {job.name}, {reason}); the same "
            "command tries them again"
        )


def choose(args, wanted, results, fingerprint):
    """Write the best candidates to --hyperparameters, and print them."""
    if args.hyperparameters == "none":
        raise UserError("tune writes --hyperparameters: give it a file")
    outcomes = {}
    for (table, row, _, _, candidate), result in zip(wanted, results, strict=True):
        candidates = outcomes.setdefault((table, row), [])
        if not candidates or candidates[-1][0] is not candidate:
            candidates.append((candidate, []))
        candidates[-1][1].append(result.valid_accuracy)
    chosen = write_choice(
        args.hyperparameters,
        args.dataset,
        outcomes,
        shlex.join(["python", "reproduce_tables.py", *sys.argv[1:]]),
        args.seeds,
        args.flags,
        fingerprint,
    )
    for (table, row), flags in chosen.items():
        print(f"{table} {row}: {', '.join(f'{k} {v:g}' for k, v in flags.items())}")
    print(f"written to {args.hyperparameters}")


def show(args, places, wanted, results, hyperparameters):
    """Print the tables, and write them with their charts."""
    out = args.out_dir or args.sweep_dir / args.dataset / "tables"
    paper = args.paper if args.paper.exists() or args.paper.parent != RESULTS else None
    command = shlex.join(["python", "reproduce_tables.py", *sys.argv[1:]])
    problem = None
    for table in args.tables:
        of_table = [r for r, w in zip(results, wanted, strict=True) if w[0] == table]
        below = notes(of_table, command, hyperparameters.note(table))
        print(markdown(table, args.dataset, of_table, args.seeds, paper, below))
        written = write_table(table, args.dataset, of_table, args.seeds, out, paper, below)
        # The chart over the rates starts at 0, which is table 2's column.
        supervised = [r for r, w in zip(results, wanted, strict=True) if w[0] == "table2"]
        drawn = of_table + (supervised if table == "table4" else [])
        try:
            from auxilearn.tables.chart import draw_table

            written += draw_table(table, drawn, args.dataset, out)
        except UserError as error:  # matplotlib is missing: the numbers are there all the same
            problem = error
        print("written: " + ", ".join(map(str, written)))
    if problem:
        raise problem


if __name__ == "__main__":
    run_script(main)
