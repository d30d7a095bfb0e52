"""Reading a training run back: its settings, its metrics, and its checkpoint on its data."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from auxilearn.config import Config, choose_device
from auxilearn.data.cache import open_images
from auxilearn.data.cub import Split, load_split
from auxilearn.data.dataset import OrderedBatches, SampleSet, Stream, training_set_of
from auxilearn.errors import UserError
from auxilearn.methods import METHODS, Method, Problem
from auxilearn.models import TaskModel, build_backbone, load_file, load_matching
from auxilearn.record import BEST_FILE, CONFIG_FILE, METRICS_FILE, START_FILE, SUMMARY_FILE
from auxilearn.report.history import SCHEDULE_FILE, read_rows
from auxilearn.report.weights import ScheduleTable, schedule_weights


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
        raise UserError(f"{directory}: no such folder; expected RECORD_DIR/<full|semi|noisy>/NAME")
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} holds no run: {CONFIG_FILE} is missing{_runs_below(directory)}"
        )
    recorded = _read_json(path)
    config = _config(path, recorded)
    metrics = read_rows(directory / METRICS_FILE)
    history = read_rows(directory / SCHEDULE_FILE)
    names = [row["names"] for row in history if row.get("kind") == "tasks"]
    summary = directory / SUMMARY_FILE
    return Run(
        directory=directory,
        config=config,
        recorded=recorded,
        rows={kind: _in_order(metrics, kind) for kind in ("step", "upper", "epoch")},
        task_names=names[-1] if names else None,
        schedule=_in_order(history, "schedule"),
        summary=_read_json(summary) if summary.is_file() else None,
    )


def _runs_below(directory):
    """A hint where ``directory`` is a folder of runs, not a run."""
    found = sorted(directory.glob(f"*/{CONFIG_FILE}")) + sorted(
        directory.glob(f"*/*/{CONFIG_FILE}")
    )
    return f"; did you mean {found[0].parent}?" if found else ""


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _config(path, recorded):
    """The ``Config`` in config.json; settings this version does not know are left out."""
    settings = recorded.get("config")
    if not isinstance(settings, dict) or settings.get("method") not in METHODS:
        raise UserError(f"{path} is not what train_bilevel.py writes: it names no known method")
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in settings.items() if name in known})


def _in_order(rows, kind):
    """Rows of ``kind`` by step; of several with the same step, the last."""
    by_step = {
        row["step"]: row
        for row in rows
        if row.get("kind") == kind and isinstance(row.get("step"), int)
    }
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
    fine_tuned = run.method.bilevel and (run.directory / START_FILE).is_file()
    if fine_tuned:
        checkpoint = run.directory / START_FILE
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} is missing: no epoch of the run was completed so far")
    split = _the_split_of(run, split_dir, data_root)
    samples = training_set_of(config, split)
    device = choose_device(device)
    model, scheduler, epoch = _load(checkpoint, run, split, len(samples), device)
    workers = config.num_workers if num_workers is None else num_workers
    workers = min(workers, os.cpu_count() or 1)
    cache_dir = config.cache_dir if split_dir is None else f"{split_dir}/cache"
    images = open_images(split, config.image_size, config.cache, cache_dir, workers)
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
    fingerprint = run.recorded.get("data", {}).get("fingerprint")
    if split.fingerprint != fingerprint:
        raise UserError(
            f"{split_dir} is not the split this run was trained on (fingerprint "
            f"{split.fingerprint[:12]}, the run's is {str(fingerprint)[:12]}): give the run's own "
            "with --split_dir"
        )
    return split


def _load(checkpoint, run, split, samples, device):
    """(model, scheduler, epoch) of a checkpoint."""
    config = run.config
    state = load_file(checkpoint)
    if not isinstance(state, dict) or not {"model", "scheduler", "epoch"} <= state.keys():
        raise UserError(f"{checkpoint} is not a checkpoint of train_bilevel.py")
    class_counts = [len(split.class_names)] + [2] * (config.task_num - 1)
    backbone = build_backbone(config.backbone, config.in_dim)
    model = TaskModel(backbone, config.in_dim, class_counts, config.aux_weight)
    scheduler = run.method.build(Problem.of(config, samples))
    for module, part in ((model, "model"), (scheduler, "scheduler")):
        load_matching(module, state[part], f"{checkpoint}: the {part} does not fit {CONFIG_FILE}")
    return model.to(device, memory_format=torch.channels_last), scheduler.to(device), state["epoch"]
