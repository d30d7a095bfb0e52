"""A sweep: the training runs of the tables, and the state of each on disk.

A job is a configuration. The hash of all settings that determine the run names the run's folder. A
sweep has no other state: after any interruption, the same command finds the finished runs and
continues with the rest.
"""

import csv
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tqdm import tqdm

from auxilearn.backbones import backbone_names
from auxilearn.errors import Parser, UserError
from auxilearn.files import is_locked, read_json
from auxilearn.methods import METHODS
from auxilearn.metrics import ACCURACY
from auxilearn.run.command_line import flags_of, given_settings, parse_options
from auxilearn.run.config import FIELDS, NEUTRAL, Config, check, defaults, with_method_defaults
from auxilearn.run.record import CONFIG_FILE, LOCK_FILE, SUMMARY_FILE, differences_of_run
from auxilearn.tables.local import ROOT
from auxilearn.tables.protocol import DATASETS, ROW_SETTINGS, SETTINGS, rows, tuned_as

STOPPED = (130, 143, -2, -15)  # exit codes of a run that somebody asked to end
RECORDED = "taken from *_runs.csv of --out_dir"  # the state of a run whose folder is not here
NO_RUNS = MappingProxyType({})
# Settings that the table itself sets; --run_flags may not override them.
OWNED = (
    *("method", "whether_aux", "corrupted", "corrupted_rate", "corruption", "labeled_per_class"),
    *("seed", "exp_name", "record_dir", "split_dir", "data_root", "resume", "overwrite", "plugin"),
)
# The methods and backbones that a run finds without --plugin.
_BUILT_IN = frozenset((*METHODS, *backbone_names()))


class RunFlags(NamedTuple):
    """Flags for every run: the words, the settings of ``Config`` they give, words for --option.

    An option goes to the methods that have it.
    """

    words: list
    settings: dict
    options: list

    @classmethod
    def read(cls, words):
        """UserError: a flag is unknown, unreadable or set by the table itself."""
        parser = Parser(add_help=False)
        parser.add_argument("--option", nargs="+", action="extend", default=[])
        if {"-h", "--help"} & set(words):
            raise UserError("--run_flags: python train_bilevel.py --help lists the flags")
        own, rest = parser.parse_known_args(words)
        try:
            settings = given_settings(rest)
        except UserError as error:
            raise UserError(f"--run_flags: {error}") from None
        if any(word.partition("=")[0] == "--preset" for word in rest):
            raise UserError("--run_flags: instead of --preset, give its settings themselves")
        for name in OWNED:
            if name in settings:
                raise UserError(f"--run_flags: the table itself sets --{name}")
        for name in (word.partition("=")[0] for word in own.option):
            if not any(name in method.options for method in METHODS.values()):
                raise UserError(f"--run_flags: no method has the option {name}")
        return cls(words, settings, own.option)

    def same(self, other):
        """Whether ``other`` gives the same, in whatever words."""
        return self[1:] == other[1:]

    def for_method(self, method):
        """The settings for runs of ``method``, its options among them."""
        words = [word for word in self.options if word.partition("=")[0] in method.options]
        return {**self.settings, "options": parse_options(method, words)}


class Places(NamedTuple):
    """The folders of the split, the data (None: as preprocessed), the runs and their logs."""

    split_dir: Path
    data_root: Path | None
    runs: Path
    logs: Path


class Job(NamedTuple):
    """A wanted run. Its name ends in ``identity``, the hash of all that determines the run.

    ``plugin`` is the hash of the plugin's content, None without one.
    """

    config: Config
    identity: str
    plugin: str | None
    logs: Path

    @property
    def name(self):
        return self.config.exp_name

    @property
    def argv(self):
        """Flags of train_bilevel.py."""
        return flags_of(self.config)

    @property
    def command(self):
        """The run as a line of shell, from the current folder."""
        return shlex.join([*script("train_bilevel.py"), *self.argv])

    @property
    def directory(self):
        return Path(self.config.record_dir) / self.config.setting / self.name

    @property
    def log(self):
        return self.logs / f"{self.name}.log"

    @property
    def failure(self):
        """A file that exists if the last attempt failed; it holds the reason."""
        return self.logs / f"{self.name}.failed"


class Run(NamedTuple):
    """A job as part of a table or of tuning; ``chosen``: {setting or option: value} of the row."""

    table: str
    row: str
    setting: str
    chosen: dict
    job: Job


class Result(NamedTuple):
    """A run and its outcome: a line of TABLE_runs.csv.

    Of a real-valued target, the file's columns are test_rmse and valid_rmse. A sweep continues from
    such a file: ``recorded_runs``.
    """

    row: str
    setting: str
    seed: int
    state: str  # as ``state_of`` says
    test_accuracy: float | None  # in [0, 1], or an RMSE; None unless done
    valid_accuracy: float | None
    identity: str
    directory: str
    command: str  # verbatim shell command
    # Empty unless done, and in files of earlier versions.
    processor: str = ""
    fingerprint: str = ""  # of the data
    environment: str = ""  # versions, device, threads, revision
    seconds: float | None = None


def script(name):
    """The words that run a script of this project from the current folder."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return [python, os.path.relpath(ROOT / name)]


def make_job(places, dataset, row, setting, seed, chosen, flags, plugin=None):
    """The job of a cell and seed.

    Args: names of a data set (own data have no settings), row and setting; ``chosen``
    hyper-parameters, {setting or option: value}, over the ``RunFlags``, over the data set's
    settings; ``plugin``: (path, hash of its content) of a file that the runs need for methods or
    backbones which the package lacks. Raises UserError: a value is out of range.
    """
    of_row = rows()[row]
    layers = (
        DATASETS[dataset].settings if dataset in DATASETS else {},
        ROW_SETTINGS.get((dataset, tuned_as(row)), {}),
        flags.for_method(of_row.method),
        _settings(of_row.method, chosen),
        of_row.settings,
        SETTINGS[setting].settings,
        {"seed": seed},
    )
    options = {n: value for layer in layers for n, value in layer.get("options", {}).items()}
    given = {n: value for layer in layers for n, value in layer.items()} | {"options": options}
    config = Config(**given)
    known = {config.method, config.backbone} - {None} <= _BUILT_IN
    path, digest = (None, None) if known or plugin is None else plugin
    identity = _identity(config, digest)
    config = dataclasses.replace(
        config,
        plugin=path,
        split_dir=str(places.split_dir),
        data_root=str(places.data_root) if places.data_root else None,
        record_dir=str(places.runs),
        exp_name=f"{config.method}_seed{seed}_{identity}",
        resume=True,
    )
    check(config)
    return Job(config, identity, digest, places.logs)


def _settings(method, chosen):
    """``chosen`` as settings of ``Config``, the method's own options apart."""
    settings, options = {}, {}
    for name, value in chosen.items():
        if name in method.options:
            options[name] = tuple(value) if isinstance(value, list) else value
        elif name in FIELDS:
            settings[name] = value
        else:
            raise UserError(f"tuned {name}: neither a setting nor an option of {method.name}")
    return {**settings, "options": options}


def _determining(config):
    """{setting: value} of all that determines a run beside its data and plugin."""
    values = vars(with_method_defaults(config))
    return {k: v for k, v in values.items() if k not in (*NEUTRAL, "exp_name", "device")}


def _identity(config, plugin):
    """A hash of all non-default settings: a setting added later does not rename old runs."""
    usual = defaults() | {"options": None}
    special = {k: v for k, v in _determining(config).items() if v != usual[k]}
    known = METHODS[config.method].options
    special["options"] = {k: v for k, v in special["options"].items() if v != known[k].default}
    special |= {"method": config.method, "plugin": plugin}
    special = {k: v for k, v in special.items() if v not in (None, {})}
    return hashlib.sha256(json.dumps(special, sort_keys=True).encode()).hexdigest()[:10]


# --------------------------------------------------------------------------------------------------
# What is on disk
# --------------------------------------------------------------------------------------------------


def state_of(job, fingerprint):
    """(state, summary or None) of a job: to do, incomplete, running, failed or done.

    Raises UserError: its folder holds a run of another configuration, or of other data than those
    with this ``fingerprint``.
    """
    directory = job.directory
    if (directory / CONFIG_FILE).exists():
        settings = {k: v for k, v in _determining(job.config).items() if v is not None}
        wanted = {"config": settings, "data": {"fingerprint": fingerprint}, "plugin": job.plugin}
        if differences := differences_of_run(directory, wanted):
            raise UserError(
                f"{directory} holds the run of another configuration: {'; '.join(differences)}; "
                "remove it, or give another --sweep_dir"
            )
        if (directory / SUMMARY_FILE).exists():
            return "done", read_json(directory / SUMMARY_FILE)
    if is_locked(directory / LOCK_FILE):
        return "running", None
    if job.failure.exists():
        return "failed", None
    return ("incomplete" if directory.exists() else "to do"), None


def result_of(run, fingerprint, metric=ACCURACY, recorded=NO_RUNS):
    """The ``Result`` of a ``Run``: of its folder, or else of the ``recorded_runs``."""
    job = run.job
    state, summary = state_of(job, fingerprint)
    if state != "done" and job.identity in recorded:
        return recorded[job.identity]._replace(row=run.row, setting=run.setting)
    values = [summary[f"{of}_{metric.name}"] if summary else None for of in ("test", "valid")]
    how = job.identity, str(job.directory), job.command
    about = _about(job.directory, summary) if summary else ()
    return Result(run.row, run.setting, job.config.seed, state, *values, *how, *about)


def _about(directory, summary):
    """Processor, fingerprint of the data, environment and seconds of a finished run."""
    run = read_json(directory / CONFIG_FILE)
    found, packages = run["environment"], run["environment"]["packages"]
    processor = found.get("processor", "")  # runs of earlier versions did not record it
    environment = (
        f"Python {found['python']}, torch {packages['torch']}, torchvision "
        f"{packages['torchvision']}, {processor or found['machine']}, {run['config']['device']}, "
        f"threads {found['threads']}, revision {found['git_revision']}"
    )
    return processor, run["data"]["fingerprint"], environment, summary["seconds"]


def recorded_runs(folder, fingerprint, metric=ACCURACY, processor=None):
    """{identity: ``Result``} of the finished runs in the files *_runs.csv of ``folder``.

    Only of runs on the data with this ``fingerprint`` and, unless it is None, on this kind of
    ``processor``. Files of earlier versions name neither, so they give no run.
    """
    found = {}
    for path in sorted(Path(folder).glob("*_runs.csv")):
        try:
            with open(path, newline="", encoding="utf-8", errors="backslashreplace") as file:
                for line in csv.DictReader(file):
                    same = line.get("fingerprint") == fingerprint and line["state"] == "done"
                    if same and processor in (None, line["processor"]):
                        names = {n: n.replace(ACCURACY.name, metric.name) for n in Result._fields}
                        result = Result(**{n: line[column] for n, column in names.items()})
                        numbers = ("test_accuracy", "valid_accuracy", "seconds")
                        numbers = {n: float(getattr(result, n)) for n in numbers}
                        result = result._replace(seed=int(result.seed), **numbers)
                        found[result.identity] = result
        except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
            raise UserError(
                f"{path} is not what a table writes ({error}): put it back, or remove it"
            ) from None
    return found


def unfinished(jobs, fingerprint, recorded):
    """(Those of ``jobs`` that are to be run, each once; a line that counts all by their state)."""
    jobs = list({job.name: job for job in jobs}.values())
    states = [state_of(job, fingerprint)[0] for job in jobs]
    states = [
        RECORDED if state != "done" and job.identity in recorded else state
        for job, state in zip(jobs, states, strict=True)
    ]
    left = [j for j, state in zip(jobs, states, strict=True) if state not in ("done", RECORDED)]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    return left, f"{len(jobs)} runs: {', '.join(f'{n} {state}' for state, n in counts.items())}"


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def run(jobs, launch, fingerprint, metric=ACCURACY, recorded=NO_RUNS):
    """Run the unfinished ``jobs``. Returns a list of (job, reason) of those without a result.

    Those of the ``recorded_runs`` are not run.

    ``launch``: callable (list of jobs) -> iterator of (job, Outcome) as they end. A failed job does
    not stop the others; the next call tries it again. Raises what ``launch`` raises.
    """
    left, said = unfinished(jobs, fingerprint, recorded)
    print(said)
    failed, start, logged = [], time.monotonic(), {}
    with tqdm(total=len(left), unit="run", dynamic_ncols=True, disable=None) as bar:
        for job in left:
            job.logs.mkdir(parents=True, exist_ok=True)
            job.failure.unlink(missing_ok=True)
            logged[job.name] = job.log.stat().st_size if job.log.exists() else 0
        for ended, (job, outcome) in enumerate(launch(left) if left else (), start=1):
            bar.update()
            state, summary = state_of(job, fingerprint)
            if state == "done":
                said = f"test {metric.words} {metric.text(summary[f'test_{metric.name}'])}"
            else:
                reason = _reason(job, outcome, logged[job.name])
                said = f"ended without a result: {reason}"
                failed.append((job, reason))
                if outcome.code not in STOPPED:
                    job.failure.write_text(f"{reason}\n", encoding="utf-8")
            rest = (time.monotonic() - start) / ended * (len(left) - ended)
            line = f"{ended} of {len(left)}: {job.name}: {said}; {tqdm.format_interval(rest)} left"
            print(line, flush=True) if bar.disable else bar.write(line)
    return failed


def _reason(job, outcome, logged):
    """How a run ended, with the last error in its log beyond the first ``logged`` bytes."""
    text = job.log.read_bytes()[logged:].decode(errors="replace") if job.log.exists() else ""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    said = f": {errors[-1].removeprefix('error: ')}" if errors else f", see {job.log}"
    return f"{outcome}{said}"
