"""Reading a training run back: its settings, its metrics, and its checkpoint on its data."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from auxilearn.data.cache import open_images
from auxilearn.data.dataset import OrderedBatches, SampleSet, Stream, training_set_of
from auxilearn.data.split import Split, load_split
from auxilearn.errors import UserError
from auxilearn.files import is_text
from auxilearn.methods import METHODS, Method, Problem
from auxilearn.models import TaskModel, build_backbone, load_file, load_matching
from auxilearn.run.config import Config, choose_device, from_record
from auxilearn.run.history import QUANTILES, SCHEDULE_FILE, read_rows
from auxilearn.run.record import (
    BEST_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    START_FILE,
    SUMMARY_FILE,
    read_json,
)
from auxilearn.weights import ScheduleTable, schedule_weights

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, finished or not. Rows of one kind are in the order of steps."""

    directory: Path
    config: Config
    recorded: dict  # the content of config.json
    rows: dict[str, list[dict]]  # of metrics.jsonl: step, upper and epoch
    task_names: list[str] | None  # as in schedule.jsonl
    schedule: list[dict]  # rows of schedule.jsonl
    summary: dict | None  # None while it runs

    @property
    def method(self) -> Method:
        return METHODS[self.config.method]


def read_run(directory):
    """The ``Run`` in ``directory``. UserError where there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is no folder; expected RECORD_DIR/<full|semi|noisy>/NAME")
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} holds no run: {CONFIG_FILE} is missing{_runs_below(directory)}"
        )
    recorded = _read_object(path)
    config = _config(path, recorded)
    metrics, history = directory / METRICS_FILE, directory / SCHEDULE_FILE
    rows = {kind: _in_order(metrics, kind, METRICS[kind]) for kind in METRICS}
    names = [row["names"] for row in _rows(history, "tasks", {"names": _are_names})]
    tasks = len(names[-1]) if names else None
    if names and tasks != (config.task_num or tasks):
        raise UserError(f"{history} is of {tasks} tasks, and {path} of {config.task_num}")
    summary = directory / SUMMARY_FILE
    return Run(
        directory=directory,
        config=config,
        recorded=recorded,
        rows=rows,
        task_names=names[-1] if names else None,
        schedule=_in_order(
            history,
            "schedule",
            {"mean_weight": lambda value: _are_numbers(value, tasks), "target_weight": _are_groups},
        ),
        summary=_summary(summary) if summary.exists() else None,
    )


def _runs_below(directory):
    """A hint where ``directory`` is a folder of runs, not a run."""
    found = sorted(directory.glob(f"*/{CONFIG_FILE}")) + sorted(
        directory.glob(f"*/*/{CONFIG_FILE}")
    )
    return f"; did you mean {found[0].parent}?" if found else ""


def _read_object(path):
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _config(path, recorded):
    """The ``Config`` in config.json; settings this version does not know are left out."""
    settings, data = recorded.get("config"), recorded.get("data")
    if not isinstance(settings, dict) or settings.get("method") not in tuple(METHODS):
        raise UserError(f"{path} is not what train_bilevel.py writes: it names no known method")
    sizes = data.get("sets") if isinstance(data, dict) else None
    if not (
        isinstance(sizes, dict)
        and all(map(_is_count, [*sizes.values(), data.get("classes")]))
        and isinstance(data.get("fingerprint"), str)
        and isinstance(data.get("trained_on"), str)
    ):
        raise UserError(f"{path} is not what train_bilevel.py writes: it describes no data")
    try:
        return from_record(settings)
    except UserError as error:
        raise UserError(f"{path} is not what train_bilevel.py writes: {error}") from None


def _summary(path):
    summary = _read_object(path)
    if not _is_number(summary.get("test_accuracy")):
        raise UserError(f"{path} is not what train_bilevel.py writes: it has no test accuracy")
    return summary


# --------------------------------------------------------------------------------------------------
# Rows, and what charts and sentences rely on in them
# --------------------------------------------------------------------------------------------------


def _is_number(value):
    """As float32 holds them: a longer one is no run's, and no chart's axis."""
    return type(value) in (int, float) and abs(value) <= FLOAT32_MAX


def _is_number_or_null(value):
    return value is None or _is_number(value)


def _is_count(value):
    return type(value) is int and 0 <= value < 1 << 53


def _are_numbers(value, count):
    """Whether these are ``count`` numbers (None: any one)."""
    return isinstance(value, list) and len(value) == (count or -1) and all(map(_is_number, value))


def _are_groups(value):
    known = ("all", "clean", "corrupted")
    return isinstance(value, dict) and all(
        name in known and _are_numbers(values, len(QUANTILES)) for name, values in value.items()
    )


def _are_names(value):
    return isinstance(value, list) and value and all(map(is_text, value))


METRICS = {  # {kind of row: {field: what it must be}}; null is a number that was not finite
    "step": dict.fromkeys(("loss", "target_loss", "aux_loss", "accuracy"), _is_number_or_null),
    "upper": {
        **dict.fromkeys(("dev_loss", "hypergradient_norm", "residual"), _is_number_or_null),
        "clipped": lambda value: isinstance(value, bool),
    },
    "epoch": {"epoch": _is_count, "valid_accuracy": _is_number},
}


def _rows(path, kind, fields):
    """The rows of a ``kind``. UserError: one that no run writes."""
    rows = [row for row in read_rows(path) if row.get("kind") == kind]
    for row in rows:
        for name, fits in fields.items():
            if not fits(row.get(name)):
                raise UserError(
                    f"{path} is not what train_bilevel.py writes: in a row of kind {kind}, {name} "
                    f"is {ascii(row.get(name))[:60]}"
                )
    return rows


def _in_order(path, kind, fields):
    """Rows of ``kind`` by step; of several with the same step, the last."""
    by_step = {row["step"]: row for row in _rows(path, kind, {"step": _is_count, **fields})}
    return [by_step[step] for step in sorted(by_step)]


# --------------------------------------------------------------------------------------------------
# The checkpoint on its training data
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint on the run's training set of n samples, all in the set's order."""

    split: Split
    samples: SampleSet  # with the labels that were trained on
    table: ScheduleTable
    images: object  # ``images.load(position)`` gives a uint8 image (3, H, W)
    epoch: int  # of the checkpoint
    before_fine_tuning: bool = False

    @property
    def true_labels(self):
        """The data's own labels (n,)."""
        return self.split.labels[self.samples.positions]

    @property
    def given_labels(self):
        """The labels trained on (n,)."""
        return self.samples.targets.numpy()


def evaluate_run(run, *, split_dir=None, data_root=None, device=None, num_workers=None):
    """The ``Evaluation`` of a ``Run``: one pass over its training set, with a progress bar.

    A schedule is judged with the model that it trained: the checkpoint from which fine-tuning
    began, where there was any.

    Args: where the split and the data are now, if not where they were; ``device`` and
    ``num_workers`` as for training. Raises UserError: data or checkpoint are not (or no longer)
    what the run was trained on.
    """
    config = run.config
    checkpoint = run.directory / BEST_FILE
    fine_tuned = run.method.bilevel and (run.directory / START_FILE).exists()
    if fine_tuned:
        checkpoint = run.directory / START_FILE
    if not checkpoint.exists():
        raise UserError(f"{checkpoint} is missing: no epoch of the run was completed so far")
    split = _the_split_of(run, split_dir, data_root)
    samples = training_set_of(config, split)
    device = choose_device(device)
    model, scheduler, epoch = _load(checkpoint, run, split, len(samples), device)
    workers = config.num_workers if num_workers is None else num_workers
    if workers < 0:
        raise UserError(f"--num_workers must be at least 0, not {workers}")
    workers = min(workers, os.cpu_count() or 1)
    cache_dir = config.cache_dir if split_dir is None else f"{split_dir}/cache"
    # The folder is what config.json says: it is read, and nothing is written to it.
    images = open_images(split, config.image_size, config.cache, cache_dir, workers, build=False)
    batches = Stream(
        images,
        samples,
        OrderedBatches(len(samples), config.test_batch_size),
        config.image_size,
        device,
        augment=False,
        seed=config.seed,
        name="report",
        workers=workers,
    )
    table = schedule_weights(
        model,
        scheduler,
        tqdm(
            batches,
            total=-(-len(samples) // config.test_batch_size),
            desc="weights of the training set",
            unit="batch",
            dynamic_ncols=True,
            disable=None,
        ),
        predict=lambda batch, outputs: model.heads.target_logits(outputs.features).argmax(dim=1),
    )
    return Evaluation(split, samples, table, images, epoch, fine_tuned)


def _the_split_of(run, split_dir, data_root):
    """The split the run was trained on, checked by its fingerprint."""
    config = run.config
    hint = "" if split_dir and data_root else "; if moved, give --split_dir and --data_root"
    split_dir = split_dir or config.split_dir
    try:
        split = load_split(split_dir, data_root or config.data_root)
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    fingerprint = run.recorded["data"]["fingerprint"]
    if split.fingerprint != fingerprint:
        raise UserError(
            f"{split_dir} is not the split this run was trained on (fingerprint "
            f"{split.fingerprint[:12]}, the run's is {fingerprint[:12]}): give the run's own "
            "with --split_dir"
        )
    return split


def _load(checkpoint, run, split, samples, device):
    """(model, scheduler, epoch) of a checkpoint."""
    config = run.config
    state = load_file(checkpoint)
    if not (
        isinstance(state, dict)
        and {"model", "scheduler", "epoch"} <= state.keys()
        and _is_count(state["epoch"])
    ):
        raise UserError(f"{checkpoint} is not a checkpoint of train_bilevel.py")
    class_counts = [len(split.class_names)] + [2] * (config.task_num - 1)
    backbone = build_backbone(config.backbone, config.in_dim)
    model = TaskModel(backbone, config.in_dim, class_counts, config.aux_weight)
    scheduler = run.method.build(Problem.of(config, samples))
    for module, part in ((model, "model"), (scheduler, "scheduler")):
        load_matching(module, state[part], f"{checkpoint}: the {part} does not fit {CONFIG_FILE}")
    return model.to(device, memory_format=torch.channels_last), scheduler.to(device), state["epoch"]
