"""Reproduce the paper's tables, one command each.

  python reproduce_tables.py table4 --dataset mini       run what is missing, then print the table
  python reproduce_tables.py all --dataset digits        tables 2 to 4
  python reproduce_tables.py all --split_dir DIR         the same of any preprocessed data
  python reproduce_tables.py tune --dataset digits       choose the hyper-parameters, on validation
  python reproduce_tables.py table2 --dry_run            print the commands and how long they take

table2 is supervised, table3 semi-supervised (5 labels per class), table4 has corrupted labels (20,
40 and 60 %). If the target is a number, table3 has 50 labels in all, table4 permutes labels, and
tables show the RMSE. A finished run is never run again: interrupt this at any moment and type it
again. One failing run does not stop the others. Written to --out_dir: TABLE.md, TABLE.csv,
TABLE.tex, TABLE.png, TABLE.svg, and TABLE_runs.csv, which leads from every cell to the folders and
commands of its runs.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import filelock

import data_preprocess
import train_bilevel
from auxilearn.data.columns import is_columns
from auxilearn.data.corruption import KINDS as CORRUPTIONS
from auxilearn.data.corruption import UNIFORM, check_kind
from auxilearn.data.split import load_split
from auxilearn.errors import Parser, RunError, UserError, disk_errors, integer_from, run_script
from auxilearn.files import locked
from auxilearn.metrics import ACCURACY, metric_of
from auxilearn.run.command_line import load_given_plugin
from auxilearn.run.config import Config, choose_device, resolve
from auxilearn.run.record import processor
from auxilearn.tables import local, sweep
from auxilearn.tables.estimate import estimate
from auxilearn.tables.protocol import DATASETS, SETTINGS, TABLES, in_place_of, rows, usual_rows
from auxilearn.tables.render import Sheet, markdown, notes_on, read_paper, write_table
from auxilearn.tables.statistics import evaluate, need_packages
from auxilearn.tables.tuning import Hyperparameters, trials

RESULTS = Path(__file__).resolve().parent / "results"
CUB_CLASSES_AND_IMAGES = 200, 11_788
COLUMNS = [setting for table in TABLES.values() for setting in table.settings]
SEEDS, TUNING_SEEDS = (1, 2, 3, 4, 5), (101, 102)


def parse_arguments(argv=None):
    plugin = load_given_plugin(argv)
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=(*TABLES, "all", "tune"))
    add = parser.add_argument_group("what is run").add_argument
    add(
        "--dataset",
        choices=tuple(DATASETS),
        help="the data set (default: the data in --split_dir; without it, cub)",
    )
    add(
        "--methods",
        nargs="+",
        choices=tuple(rows()),
        default=usual_rows(),
        metavar="ROW",
        help=f"rows, of {', '.join(rows())} (default: all but the ablations stable_...)",
    )
    add(
        "--plugin",
        metavar="FILE",
        help="Python file that registers methods or backbones of your own; each method is a row",
    )
    add(
        "--tables",
        nargs="+",
        choices=tuple(TABLES),
        help="with all and tune: the tables meant (default: all three)",
    )
    add(
        "--settings",
        nargs="+",
        choices=COLUMNS,
        metavar="SETTING",
        help=f"columns of the tables, of {', '.join(COLUMNS)} (default: all)",
    )
    add(
        "--corruption",
        choices=CORRUPTIONS,
        default=UNIFORM,
        help="how labels of table4 are wrong, see train_bilevel.py (default: %(default)s)",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="a run for each, of every row and column (default: "
        f"{' '.join(map(str, SEEDS))}; to tune: {' '.join(map(str, TUNING_SEEDS))})",
    )
    add(
        "--epochs",
        type=integer_from(1),
        metavar="N",
        help="of every run (default: the data set's; of own data 20)",
    )
    add(
        "--run_flags",
        default="",
        metavar="FLAGS",
        help="further flags of train_bilevel.py for every run, in one word: "
        "--run_flags='--backbone convnet --image_size 64'; --option NAME=VALUE goes to the methods "
        "that have the option",
    )
    add(
        "--hyperparameters",
        metavar="FILE",
        help="tune writes it and tables use it; 'none': the data set's settings for every row "
        f"(default: {_shown(RESULTS / 'hyperparameters.json')}; for --split_dir alone, "
        "SWEEP_DIR/NAME/hyperparameters.json, if tune has written it)",
    )
    add(
        "--dry_run",
        action="store_true",
        help="print the commands and the hours of what is not done; short trainings measure "
        "the speed of methods of which no run is done",
    )
    add("--collect_only", action="store_true", help="run nothing, print the table of finished runs")
    add = parser.add_argument_group("places").add_argument
    add(
        "--sweep_dir",
        type=Path,
        default=Path("sweeps"),
        metavar="DIR",
        help="data, runs and logs are kept in DIR/NAME, NAME being the data set (default: "
        "%(default)s)",
    )
    add(
        "--out_dir",
        type=Path,
        metavar="DIR",
        help="of tables (default: SWEEP_DIR/NAME/tables). Finished runs in its TABLE_runs.csv, of "
        "the same data and kind of processor, are not run again, even if their folders are gone",
    )
    add(
        "--data_root",
        type=Path,
        metavar="DIR",
        help="folder in CUB layout (default: CUB_200_2011; of mini and digits, made in SWEEP_DIR); "
        "with --split_dir of own images, where they are now",
    )
    add(
        "--split_dir",
        type=Path,
        metavar="DIR",
        help="alone: data of any kind that data_preprocess.py wrote to DIR, trained with the "
        "defaults of train_bilevel.py; NAME is the folder's name and the beginning of the data's "
        "fingerprint. With --dataset: where its split is made (default: in SWEEP_DIR)",
    )
    add(
        "--paper",
        type=Path,
        metavar="FILE",
        help="the paper's numbers, to be filled in by hand (default: "
        f"{_shown(RESULTS / 'paper_numbers.csv')})",
    )
    add = parser.add_argument_group("how it is run").add_argument
    add(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="local: runs on this machine; slurm: a job array (default: %(default)s)",
    )
    add(
        "--jobs",
        type=integer_from(1),
        metavar="N",
        help="runs at the same time (default: one per GPU; without GPUs, one per core if a run has "
        "one thread, else one; on Slurm, 256)",
    )
    add(
        "--gpus",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="GPUs to use, counted from 0 within CUDA_VISIBLE_DEVICES (default: all)",
    )
    add(
        "--sbatch",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="Slurm: options of sbatch, such as partition=gpu gpus-per-node=1 cpus-per-task=4",
    )
    add(
        "--timeout_min",
        type=integer_from(1),
        default=24 * 60,
        metavar="N",
        help="Slurm: time limit in minutes, after which a run is queued again and goes on "
        "(default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.plugin = plugin
    if args.seeds is None:
        args.seeds = list(TUNING_SEEDS if args.what == "tune" else SEEDS)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error("--seeds: expected different integers from 0 up")
    if any("=" not in option for option in args.sbatch):
        parser.error("--sbatch: expected OPTION=VALUE")
    args.methods = [row for row in rows() if row in args.methods]
    if args.tables and args.what in TABLES:
        parser.error("--tables goes with all and tune")
    if args.settings and args.what == "tune":
        parser.error("--settings goes with tables: each is tuned on one setting of its own")
    if args.corruption != UNIFORM and args.what not in ("table4", "all"):
        parser.error("--corruption goes with table4 and all; all is tuned on uniform")
    args.settings = args.settings or COLUMNS
    wanted = args.tables or TABLES if args.what in ("all", "tune") else [args.what]
    args.tables = [t for t in TABLES if t in wanted and {*TABLES[t].settings} & {*args.settings}]
    if not args.tables:
        parser.error(f"--settings: {args.what} has no column {' or '.join(args.settings)}")
    try:
        words = shlex.split(args.run_flags)
    except ValueError as error:
        raise UserError(f"--run_flags {args.run_flags!r}: {error}") from None
    words += ["--epochs", str(args.epochs)] if args.epochs else []
    args.flags = sweep.RunFlags.read(words)
    if args.what == "tune" and args.hyperparameters == "none":
        raise UserError("tune writes --hyperparameters: give it a file")
    if (
        args.what != "tune"
        and args.hyperparameters not in (None, "none")
        and not Path(args.hyperparameters).exists()
    ):
        raise UserError(
            f"--hyperparameters {args.hyperparameters} does not exist: tune writes such a file; "
            "none uses the data set's settings"
        )
    find_data(args)
    return args


def find_data(args):
    """Settle which data are meant, and the places that follow from it.

    ``args.own``: the ``Split`` that --split_dir alone names, or None; ``args.dataset``: its name.
    """
    args.own, root = None, args.data_root
    if args.split_dir and not args.dataset and (root is None or is_columns(args.split_dir)):
        args.own = load_split(str(args.split_dir), root and str(root))
        if root and args.own.rows:
            raise UserError(f"--data_root: {args.split_dir} holds rows, not images: leave it out")
        if args.paper:
            raise UserError("--paper goes with --dataset: the paper has no numbers of other data")
        check_kind(args.corruption, args.own.target)
        name = re.sub(r"[^\w.-]", "_", args.split_dir.resolve().name)
        args.dataset = f"{name}-{args.own.fingerprint[:8]}"
    args.dataset = args.dataset or "cub"
    args.metric = metric_of(args.own.target) if args.own else ACCURACY
    home = args.sweep_dir / args.dataset
    usual = home if args.own else RESULTS
    file = args.hyperparameters or _shown(usual / "hyperparameters.json")
    args.hyperparameters = None if file == "none" else file
    args.continued = args.out_dir is not None
    args.out_dir = args.out_dir or home / "tables"


def _shown(path):
    """``path`` from the current folder, if it lies within."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def places_of(args):
    """``Places`` and the flags of data_preprocess.py that fill them; [] of own data."""
    home = args.sweep_dir / args.dataset
    kept = home / "bird_record", home / "logs"
    if args.own:
        return sweep.Places(args.split_dir, args.data_root, *kept), []
    generate = DATASETS[args.dataset].generate
    root = args.data_root or (home / "data" if generate else Path("CUB_200_2011"))
    split = args.split_dir or home / "preprocess_data"
    flags = ["--data_root", str(root), "--out_dir", str(split)]
    if generate and args.data_root is None:
        flags = ["--generate", generate, *flags]
    return sweep.Places(split, root, *kept), flags


def split_of(args, places):
    """The ``Split`` in ``places``."""
    return args.own or load_split(str(places.split_dir), str(places.data_root))


def main(argv=None):
    args = parse_arguments(argv)
    places, preprocess_flags = places_of(args)
    tuned = Hyperparameters(args.hyperparameters, args.dataset, args.metric)
    if args.what == "tune":
        if args.own:
            main_lr = resolve(Config(**args.flags.settings), args.own).main_lr
        else:
            main_lr = {**DATASETS[args.dataset].settings, **args.flags.settings}["main_lr"]
        cells = trials(args.tables, args.methods, main_lr)
    else:
        tuned.check_seeds(args.seeds)
        cells = [cell for table in args.tables for cell in cells_of(args, tuned, table)]
    runs = runs_of(args, places, cells)
    jobs = [run.job for run in runs]
    if args.dry_run:
        if preprocess_flags:
            print(shlex.join([*sweep.script("data_preprocess.py"), *preprocess_flags]))
        print("\n".join(dict.fromkeys(job.command for job in jobs)))
        for line in duration(args, places, cells):
            print(f"# {line}", flush=True)  # the commands and these lines are a shell script
        return
    figures = {}
    if args.what != "tune":  # find errors now, not after days of training
        need_packages()
        paper = args.paper or RESULTS / "paper_numbers.csv"
        figures = read_paper(paper) if args.paper or paper.exists() else {}
    if args.collect_only and not places.split_dir.exists():
        raise UserError(
            f"{places.split_dir}: is missing, so nothing of this sweep has been run here; run the "
            "command without --collect_only"
        )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    failed, home = [], places.runs.parent
    with (
        disk_errors(home, "finished runs are kept, the same command goes on"),
        contextlib.nullcontext() if args.collect_only else only_sweep(home),
    ):
        if preprocess_flags and not args.collect_only:
            with contextlib.redirect_stdout(io.StringIO()):
                data_preprocess.main(preprocess_flags)
        split = split_of(args, places)
        if args.what == "tune":
            tuned.check_origin(args.seeds, args.flags, split.fingerprint)
        elif any(run.chosen for run in runs) and tuned.entry["fingerprint"] != split.fingerprint:
            print(
                f"note: the hyper-parameters in {tuned.file} were chosen on other data or split",
                file=sys.stderr,
            )
        recorded = recorded_runs(args, split)
        if not args.collect_only:
            launch = launcher(args, places, jobs)
            failed = sweep.run(jobs, launch, split.fingerprint, args.metric, recorded)
        found = split.fingerprint, args.metric, recorded
        results = [sweep.result_of(run, *found) for run in runs]
        if args.what == "tune":
            choose(args, runs, results, split.fingerprint)
        else:
            show(args, places, tuned, split, runs, results, figures, recorded)
    if failed:
        job, reason = failed[0]
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs ended without a result (the first: {job.name}, "
            f"{reason}); the same command tries them again"
        )


def cells_of(args, tuned, table, settings=None):
    """(table, row, setting, hyper-parameters) of a table, in ``settings`` (default: --settings)."""
    return [
        (table, row, setting, chosen)
        for row in args.methods
        for chosen in [tuned.of(table, row, args.flags)]
        for setting in TABLES[table].settings
        if setting in (settings or args.settings)
    ]


def runs_of(args, places, cells):
    """The ``Run`` of every cell and seed."""
    how = args.flags, args.plugin
    numbers = bool(args.own) and args.own.target.classes is None
    cells = [(t, row, in_place_of(s, numbers, args.corruption), c) for t, row, s, c in cells]
    return [
        sweep.Run(*cell, sweep.make_job(places, args.dataset, row, setting, seed, chosen, *how))
        for cell in cells
        for _, row, setting, chosen in [cell]
        for seed in args.seeds
    ]


def recorded_runs(args, split):
    """The ``sweep.recorded_runs`` of a given --out_dir: of this kind of processor, if any is run.

    Beside the runs themselves, in the usual --out_dir, these alone count.
    """
    if args.what == "tune" or not args.continued:
        return sweep.NO_RUNS
    here = processor(choose_device(args.flags.settings.get("device")))
    only = None if args.collect_only else here
    return sweep.recorded_runs(args.out_dir, split.fingerprint, args.metric, only)


def only_sweep(folder):
    """The lock of a sweep's ``folder``, for a ``with`` block. UserError: another sweep holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return locked(folder / ".lock", wait=0).acquire()
    except filelock.Timeout:
        raise UserError(
            f"another sweep is already running in {folder}; wait for it or stop it"
        ) from None


def launcher(args, places, jobs):
    """Callable (jobs) -> iterator of (job, Outcome)."""
    if args.launcher == "slurm":
        from auxilearn.tables import slurm  # Windows lacks its signals

        return lambda jobs: slurm.launch(
            jobs,
            places.logs,
            dict(option.split("=", 1) for option in args.sbatch),
            timeout_min=args.timeout_min,
            array_parallelism=args.jobs or 256,
        )
    gpus, cores = local.chosen_gpus(args.gpus), local.usable_cores()
    threads, count = at_a_time(args, jobs, gpus, cores)
    if not gpus and count > 1 and threads > 1 and min(count, len(jobs)) * threads > cores:
        # Threads that wait for one another keep their core busy all the while.
        print(
            f"note: {count} runs at the same time, of {threads} threads each on {cores} cores, "
            "slow one another down; --run_flags='--threads 1' avoids that",
            file=sys.stderr,
        )
    return lambda jobs: local.launch(jobs, count, train_bilevel.main, gpus)


def at_a_time(args, jobs, gpus, cores):
    """(Threads of a run, number of runs at the same time) of ``jobs`` on this machine."""
    threads = max(job.config.threads or cores for job in jobs)
    return threads, args.jobs or len(gpus) or (cores if threads == 1 else 1)


def duration(args, places, cells):
    """Lines on the number of runs of ``cells`` and the hours of those that are not done."""
    with contextlib.ExitStack() as stack:
        try:
            places = stack.enter_context(with_data(args, places))
            split = split_of(args, places)
        except UserError as error:
            names = {run.job.name for run in runs_of(args, places, cells)}
            yield f"{len(names)} runs; their hours are not known: {error}"
            return
        jobs = [run.job for run in runs_of(args, places, cells)]
        left, said = sweep.unfinished(jobs, split.fingerprint, recorded_runs(args, split))
        yield said
        if not left:
            return
        gpus, count = local.chosen_gpus(args.gpus), None
        if args.launcher == "local":
            _, count = at_a_time(args, left, gpus, local.usable_cores())
        found = estimate(
            *(left, places, split),
            lambda jobs: local.launch(jobs, 1, train_bilevel.main, gpus[:1]),
        )
        yield from found.lines(count)


@contextlib.contextmanager
def with_data(args, places):
    """``places``. If their data set is yet to be generated, with a copy made for the block."""
    given = args.own or args.data_root or args.split_dir
    if given or not DATASETS[args.dataset].generate or places.split_dir.exists():
        yield places
        return
    with tempfile.TemporaryDirectory(prefix="estimate_") as folder:
        there, flags = places_of(argparse.Namespace(**{**vars(args), "sweep_dir": Path(folder)}))
        with contextlib.redirect_stdout(io.StringIO()):
            data_preprocess.main(flags)
        yield places._replace(split_dir=there.split_dir, data_root=there.data_root)


def own_data(dataset, split):
    """The name of data in CUB's layout that are not CUB; None for those of ``dataset``."""
    is_cub = (split.target.classes, len(split.labels)) == CUB_CLASSES_AND_IMAGES
    return None if dataset != "cub" or is_cub else Path(split.data_root).resolve().name


def described(folder, split, table):
    """A sentence or two on own data, for below a table."""
    sizes, target = {name: len(indices) for name, indices in split.indices.items()}, split.target
    permuted = target.classes is None and table == "table4"
    return (
        f"Data: `{folder}`: {len(split.labels):,} {'rows' if split.rows else 'images'}; "
        f"{sizes['full_train']:,} for training, {sizes['dev']:,} of them for development, "
        f"{sizes['valid']:,} for validation, {sizes['test']:,} for the test. Target: "
        f"{target.name}, {target.kind}; {len(split.tasks) - 1} auxiliary tasks."
        + " Corrupted labels are permuted, not redrawn."
        * permuted
    )


def command_line():
    """The command that makes these tables, for the record."""
    words = [word for word in sys.argv[1:] if word != "--collect_only"]
    return shlex.join(["python", "reproduce_tables.py", *words])


def choose(args, runs, results, fingerprint):
    """Write the best candidates to --hyperparameters, and print them."""
    untried = [r for r in results if r.state not in ("done", "failed")]
    if untried:
        raise RunError(
            f"nothing is chosen: {len(untried)} of {len(results)} runs are not done "
            f"(the first: {untried[0].directory}, {untried[0].state})"
        )
    outcomes = {}
    for run, result in zip(runs, results, strict=True):
        tried = outcomes.setdefault((run.table, run.row), [])
        if not tried or tried[-1][0] != run.chosen:
            tried.append((run.chosen, []))
        tried[-1][1].append(result.valid_accuracy)
    # Others may have written since.
    tuned = Hyperparameters(args.hyperparameters, args.dataset, args.metric)
    how = args.seeds, args.flags, fingerprint
    tuned.check_origin(*how)
    chosen = tuned.write_choice(outcomes, command_line(), *how)
    for table, row in outcomes:
        found = chosen.get((table, row))
        said = ", ".join(f"{k} {v}" for k, v in found.items()) if found else "all runs failed"
        print(f"{table} {row}: {said}")
    print(f"written to {args.hyperparameters}")


def show(args, places, tuned, split, runs, results, figures, recorded):
    """Print every table, and write it with its chart. ``figures``: of the paper."""
    data = args.split_dir.resolve().name if args.own else own_data(args.dataset, split)
    other_noise = args.corruption != UNIFORM and any(run.chosen for run in runs)
    found = {}
    for table in args.tables:
        of_table = [r for r, run in zip(results, runs, strict=True) if run.table == table]
        found[table] = evaluate(table, of_table, args.seeds, args.metric)
    clean = found.get("table2")
    if "table4" in found and clean is None:
        runs = runs_of(args, places, cells_of(args, tuned, "table2", SETTINGS))
        clean = [sweep.result_of(r, split.fingerprint, args.metric, recorded) for r in runs]
        clean = evaluate("table2", clean, args.seeds, args.metric)
    for table, numbers in found.items():
        how = [described(args.split_dir, split, table)] if args.own else []
        how += tuned.notes(table, numbers.rows, args.flags, split.fingerprint)
        if other_noise and table == "table4":
            how.append("Hyper-parameters were chosen on labels that are corrupted uniformly.")
        left_out = [SETTINGS[s].title for s in TABLES[table].settings if s not in args.settings]
        if left_out:
            how.append(f"Left out, and not in the count of tests: {', '.join(left_out)}.")
        paper = {k[2:]: v for k, v in figures.items() if k[:2] == (args.dataset, table)}
        if (data and not args.paper) or (args.dataset != "cub" and not paper):
            paper = None  # no column
        below = [f"Command: `{command_line()}`.", *how, *notes_on(numbers.runs)]
        title = data or DATASETS[args.dataset].title
        sheet = Sheet(numbers, args.dataset, title, paper, tuple(below))
        print(markdown(sheet))
        written = write_table(sheet, args.out_dir)
        try:
            from auxilearn.tables.chart import draw_table

            # Curves over corrupted labels begin without corruption if table 2 has been run.
            begin = clean if table == "table4" and clean.complete else None
            written += draw_table(sheet, args.out_dir, begin)
        finally:  # without matplotlib, the numbers are there all the same
            print("written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    run_script(main)
