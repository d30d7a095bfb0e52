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
import fcntl
import io
import os
import shlex
import sys
from pathlib import Path

import data_preprocess
from auxilearn.data.split import load_split
from auxilearn.errors import RunError, UserError, run_script
from auxilearn.files import append_regular, named
from auxilearn.tables import local, slurm, sweep
from auxilearn.tables.notes import notes
from auxilearn.tables.protocol import DATASETS, ROWS, SETTINGS, TABLES, USUAL_ROWS
from auxilearn.tables.render import markdown, read_paper, write_table
from auxilearn.tables.tuning import Hyperparameters, check_file, trials, write_choice

RESULTS = Path(__file__).resolve().parent / "results"
CUB_CLASSES_AND_IMAGES = 200, 11_788
SEEDS, TUNING_SEEDS = (1, 2, 3, 4, 5), (101, 102)


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
        default=USUAL_ROWS,
        metavar="ROW",
        help=f"rows, of {', '.join(ROWS)} (default: all but the ablations stable_...)",
    )
    add(
        "--tables",
        nargs="+",
        choices=tuple(TABLES),
        help="with all and tune (default: all three)",
    )
    add(
        "--settings",
        nargs="+",
        choices=tuple(SETTINGS),
        metavar="SETTING",
        help=f"columns of the tables, of {', '.join(SETTINGS)} (default: all)",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help=f"(default: {' '.join(map(str, SEEDS))}; to tune: {' '.join(map(str, TUNING_SEEDS))})",
    )
    add("--epochs", type=_positive, metavar="N", help="of every run (default: the data set's)")
    add(
        "--run_flags",
        default="",
        metavar="FLAGS",
        help="further flags of train_bilevel.py for every run, in one word: "
        "--run_flags='--backbone convnet --image_size 64'",
    )
    add(
        "--hyperparameters",
        type=named,
        metavar="FILE",
        help="what tune writes and tables use; 'none' uses the data set's settings for every row "
        f"(default: {_shown(RESULTS / 'hyperparameters.json')})",
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
        type=named,
        default=Path("sweeps"),
        metavar="DIR",
        help="data, runs and logs are kept in DIR/DATASET (default: %(default)s)",
    )
    add(
        "--out_dir",
        type=named,
        metavar="DIR",
        help="where tables go (default: SWEEP_DIR/DATASET/tables)",
    )
    add(
        "--data_root",
        type=named,
        metavar="DIR",
        help="folder in CUB layout (default: CUB_200_2011; of mini and digits, made in SWEEP_DIR)",
    )
    add(
        "--split_dir",
        type=named,
        metavar="DIR",
        help="its split, made if need be (default: in SWEEP_DIR)",
    )
    add(
        "--paper",
        type=named,
        metavar="FILE",
        help="the paper's numbers, to be filled in by hand (default: "
        f"{_shown(RESULTS / 'paper_numbers.csv')})",
    )
    add = parser.add_argument_group("how it is run").add_argument
    add("--launcher", choices=("local", "slurm"), default="local", help="(default: %(default)s)")
    add(
        "--jobs",
        type=_positive,
        metavar="N",
        help="runs at the same time (default: one per GPU; without GPUs, one per core where a run "
        "has one thread, else one; on Slurm, 256)",
    )
    add(
        "--gpus",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="GPUs to use, counted from 0 within CUDA_VISIBLE_DEVICES (default: all)",
    )
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
    add(
        "--sbatch",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="Slurm: further options, such as account=vision",
    )
    args = parser.parse_args(argv)
    if args.seeds is None:
        args.seeds = list(TUNING_SEEDS if args.what == "tune" else SEEDS)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error("--seeds: expected different integers from 0 up")
    if any("=" not in option for option in args.sbatch):
        parser.error("--sbatch: expected OPTION=VALUE")
    args.methods = [row for row in ROWS if row in args.methods]
    if args.tables and args.what in TABLES:
        parser.error("--tables goes with all and tune")
    wanted = args.tables or TABLES if args.what in ("all", "tune") else [args.what]
    args.tables = [table for table in TABLES if table in wanted]
    if args.settings and args.what == "tune":
        parser.error("--settings goes with tables: each is tuned on one setting of its own")
    args.settings = args.settings or list(SETTINGS)
    args.tables = [t for t in args.tables if set(TABLES[t].settings) & set(args.settings)]
    if not args.tables:
        parser.error(f"--settings: {args.what} has no column {' or '.join(args.settings)}")
    args.flags = _split(args.run_flags)
    if args.epochs:
        if any(word.partition("=")[0] == "--epochs" for word in args.flags):
            parser.error("--epochs: given twice, in --run_flags as well")
        args.flags = ["--epochs", str(args.epochs), *args.flags]
    args.main_lr = sweep.learning_rate(args.dataset, args.flags)
    if args.hyperparameters is None:
        args.hyperparameters = Path(_shown(RESULTS / "hyperparameters.json"))
    elif args.hyperparameters == Path("none"):
        args.hyperparameters = None
    elif args.what != "tune" and not args.hyperparameters.exists():
        raise UserError(
            f"--hyperparameters {args.hyperparameters} does not exist: tune writes such a file; "
            "none uses the data set's settings"
        )
    args.out_dir = args.out_dir or args.sweep_dir / args.dataset / "tables"
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


def prepare(args, places, preprocess_flags):
    """Make sure that the data and their split are there. Returns the ``Split``.

    With --collect_only nothing is made.
    """
    if not args.collect_only:
        home = args.sweep_dir / args.dataset
        with sweep.disk_errors(home):
            home.mkdir(parents=True, exist_ok=True)
            # Two sweeps that start at once would both generate the data.
            with append_regular(home / ".lock") as lock, contextlib.redirect_stdout(io.StringIO()):
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.lockf(lock, fcntl.LOCK_EX)
                data_preprocess.main(preprocess_flags)
    return load_split(str(places.split_dir), str(places.data_root))


def launcher(args, places, jobs):
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
            extra=dict(option.split("=", 1) for option in args.sbatch),
            **({"array_parallelism": args.jobs} if args.jobs else {}),
        )
    gpus = local.chosen_gpus(args.gpus)
    cores = local.usable_cores()
    threads = max(job.config.threads or cores for job in jobs)
    count = args.jobs or len(gpus) or (cores if threads == 1 else 1)

    def launch(jobs):
        at_once = min(count, len(jobs))
        if not gpus and at_once > 1 and threads > 1 and at_once * threads > cores:
            # Threads that wait for one another keep their core busy all the while.
            print(
                f"note: {at_once} runs at the same time, of {threads} threads each on {cores} "
                "cores, slow one another down; --run_flags='--threads 1' avoids that",
                file=sys.stderr,
            )
        return local.launch(jobs, count, gpus)

    return launch


def main(argv=None):
    args = parse_arguments(argv)
    places, preprocess_flags = places_of(args)
    tuned = Hyperparameters(args.hyperparameters, args.dataset)
    if args.what == "tune":
        wanted = [
            (table, row, setting, seed, candidate)
            for table, row, setting, candidate in trials(args.tables, args.methods, args.main_lr)
            for seed in args.seeds
        ]
    else:
        tuned.check(args.seeds)
        wanted = wanted_runs(args, tuned, args.tables, args.settings)
    jobs = [make_job(args, places, *run) for run in wanted]
    if args.dry_run:
        print(shlex.join([*sweep.script("data_preprocess.py"), *preprocess_flags]))
        print("\n".join(dict.fromkeys(job.command for job in jobs)))
        return
    if paper := paper_file(args):
        read_paper(paper)  # what is wrong with it should not be found after days of training
    with sweep.disk_errors(args.out_dir):
        args.out_dir.mkdir(parents=True, exist_ok=True)
    split = prepare(args, places, preprocess_flags)
    fingerprint = split.fingerprint
    if args.what == "tune":
        check_file(args.hyperparameters, args.dataset, args.seeds, args.flags, fingerprint)
    elif any(chosen for *_, chosen in wanted) and tuned.entry["fingerprint"] != fingerprint:
        print(
            f"note: the hyper-parameters in {tuned.file} were chosen on other data or split",
            file=sys.stderr,
        )
    failed = []
    if not args.collect_only:
        elsewhere = args.launcher == "local"
        launch = launcher(args, places, jobs)
        failed = sweep.run(jobs, launch, fingerprint, elsewhere=elsewhere)
    results = [
        sweep.result_of(job, row, setting, fingerprint)
        for job, (_, row, setting, _, _) in zip(jobs, wanted, strict=True)
    ]
    if args.what == "tune":
        choose(args, wanted, results, fingerprint)
    else:
        for table in args.tables:
            of_table = [r for r, run in zip(results, wanted, strict=True) if run[0] == table]
            show(args, places, table, of_table, tuned, split)
    if failed:
        job, reason = failed[0]
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs ended without a result (the first: {job.name}, "
            f"{reason}); the same command tries them again"
        )


def wanted_runs(args, tuned, tables, settings):
    """(table, row, setting, seed, hyper-parameters) of every run of the tables in ``settings``."""
    return [
        (table, row, setting, seed, tuned.of(table, row, args.flags))
        for row in args.methods
        for table in tables
        for setting in TABLES[table].settings
        if setting in settings
        for seed in args.seeds
    ]


def make_job(args, places, _table, row, setting, seed, chosen):
    return sweep.make_job(places, args.dataset, row, setting, seed, chosen, args.flags)


def own_data(dataset, split):
    """The name of data in CUB's layout that are not CUB; None for those of ``dataset``."""
    is_cub = (len(split.class_names), len(split.labels)) == CUB_CLASSES_AND_IMAGES
    return None if dataset != "cub" or is_cub else Path(split.data_root).resolve().name


def paper_file(args, data=None):
    """--paper; else, but for ``own_data``, the file of the paper's numbers; None without one."""
    usual = RESULTS / "paper_numbers.csv"
    return args.paper or (usual if usual.exists() and not data else None)


def command_line():
    """The command that makes what this one shows, for the record."""
    words = [word for word in sys.argv[1:] if word != "--collect_only"]
    return shlex.join(["python", "reproduce_tables.py", *words])


def choose(args, wanted, results, fingerprint):
    """Write the best candidates to --hyperparameters, and print them."""
    untried = [r for r in results if r.state not in ("done", "failed")]
    if untried:
        raise RunError(
            f"nothing is chosen: {len(untried)} of {len(results)} runs are not done "
            f"(the first: {untried[0].directory}, {untried[0].state})"
        )
    outcomes = {}
    for (table, row, _, _, candidate), result in zip(wanted, results, strict=True):
        tried = outcomes.setdefault((table, row), [])
        if not tried or tried[-1][0] != candidate:
            tried.append((candidate, []))
        tried[-1][1].append(result.valid_accuracy)
    chosen = write_choice(
        args.hyperparameters,
        args.dataset,
        outcomes,
        command_line(),
        args.seeds,
        args.flags,
        fingerprint,
    )
    for table, row in outcomes:
        flags = chosen.get((table, row))
        said = ", ".join(f"{k} {v:g}" for k, v in flags.items()) if flags else "all runs failed"
        print(f"{table} {row}: {said}")
    print(f"written to {args.hyperparameters}")


def show(args, places, table, results, tuned, split):
    """Print a table, and write it with its chart."""
    rows = [row for row in args.methods if any(r.row == row for r in results)]
    how = tuned.notes(table, rows, args.flags, split.fingerprint)
    left_out = [SETTINGS[s].title for s in TABLES[table].settings if s not in args.settings]
    if left_out:
        how.append(f"Left out, and not in the count of tests: {', '.join(left_out)}.")
    below = notes(results, command_line(), how)
    data = own_data(args.dataset, split)
    paper = paper_file(args, data)
    table_of = table, args.dataset, results, args.seeds
    print(markdown(*table_of, paper, below, data))
    written = write_table(*table_of, args.out_dir, paper, below, data)
    try:
        from auxilearn.tables.chart import draw_table

        drawn = results
        if table == "table4":  # its curves begin without corruption where table 2 has been run
            of_table2 = wanted_runs(args, tuned, ["table2"], SETTINGS)
            jobs = [make_job(args, places, *run) for run in of_table2]
            clean = [
                sweep.result_of(job, run[1], run[2], split.fingerprint)
                for job, run in zip(jobs, of_table2, strict=True)
            ]
            if all(r.state == "done" for r in clean):
                drawn = results + clean
        written += draw_table(table, drawn, args.dataset, args.out_dir, data)
    finally:  # without matplotlib, the numbers are there all the same
        print("written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    run_script(main)
