"""Reading a training run back: its settings, its rows, and its checkpoint on its training data."""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from auxilearn.backbones import load_file, load_matching
from auxilearn.data.cache import open_images
from auxilearn.data.contract import Split, Task
from auxilearn.data.dataset import SampleSet, in_order
from auxilearn.data.split import load_split
from auxilearn.errors import UserError
from auxilearn.files import read_json, read_rows
from auxilearn.methods import METHODS, Method
from auxilearn.metrics import metric_of
from auxilearn.run.build import (
    TRAINING,
    build_model,
    build_scheduler,
    open_inputs,
    stream,
    tasks_of,
    training_set_of,
)
from auxilearn.run.config import Config, choose_device, from_record
from auxilearn.run.record import (
    BEST_FILE,
    CONFIG_FILE,
    MARGINS_FILE,
    METRICS_FILE,
    SCHEDULE_FILE,
    START_FILE,
    SUMMARY_FILE,
)
from auxilearn.weights import ScheduleTable, schedule_weights

REFERENCE = "common"  # the method that a run is compared with
SETTING = ("corrupted", "corrupted_rate", "corruption", "labeled_per_class")
ALIKE = ("backbone", "image_size", "epochs", "main_lr", "train_batch_size", "task_num", "seed")


@dataclass(frozen=True)
class Reference:
    """A finished run of ``common`` on the same data in the same setting."""

    name: str
    test: float  # of the metric
    valid: float
    differs: list[str]  # settings of ``ALIKE`` that have other values there


@dataclass(frozen=True)
class Run:
    """The content of a run's folder, finished or not."""

    directory: Path
    config: Config
    data: dict  # fingerprint, classes, sets {name: size}, trained_on
    rows: dict[str, list[dict]]  # of metrics.jsonl by kind: step, upper, epoch
    task_names: list[str]  # as in schedule.jsonl; [] without that file
    schedule: list[dict]  # rows of schedule.jsonl
    summary: dict | None  # None while it runs
    reference: Reference | None

    @property
    def method(self) -> Method:
        return METHODS[self.config.method]

    @property
    def metric(self):
        """The metric of the target task, without its scale: its name, and what is better."""
        return metric_of(Task("target", self.data["classes"]))

    @property
    def training_steps(self):
        """Rows of the lower steps before fine-tuning, which has other images and one task."""
        return [row for row in self.rows["step"] if row["phase"] == TRAINING]

    @property
    def best_epoch(self):
        """The place among the epochs' rows of the best in validation, the first of equals."""
        values, best = [row[f"valid_{self.metric.name}"] for row in self.rows["epoch"]], 0
        for place, value in enumerate(values):
            best = place if self.metric.better(value, values[best]) else best
        return best

    @property
    def loss_factors(self):
        """a (K,), by which the scheduled loss multiplies the raw losses: 1 for the target."""
        return np.array([1.0] + [self.config.aux_weight] * (self.config.task_num - 1))


def read_run(directory):
    """The ``Run`` in ``directory``. UserError if there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is no folder; expected RECORD_DIR/<full|semi|noisy>/NAME")
    path = directory / CONFIG_FILE
    if not path.is_file():
        found = sorted([*directory.glob(f"*/{CONFIG_FILE}"), *directory.glob(f"*/*/{CONFIG_FILE}")])
        hint = f"; did you mean {found[0].parent}?" if found else ""
        raise UserError(f"{directory} holds no run: {CONFIG_FILE} is missing{hint}")
    recorded = read_json(path)
    try:
        config, data = from_record(recorded["config"]), recorded["data"]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a configuration that train_bilevel.py writes") from None
    summary = directory / SUMMARY_FILE
    rows = defaultdict(list)
    for row in read_rows(directory / METRICS_FILE):
        rows[row["kind"]].append(row)
    history = read_rows(directory / SCHEDULE_FILE)
    return Run(
        directory=directory,
        config=config,
        data=data,
        rows=rows,
        task_names=next((row["names"] for row in history if row["kind"] == "tasks"), []),
        schedule=[row for row in history if row["kind"] == "schedule"],
        summary=read_json(summary) if summary.exists() else None,
        reference=None if config.method == REFERENCE else _reference(directory, recorded),
    )


def _reference(directory, recorded):
    """The run of ``common`` beside this one whose settings are most alike, or None."""
    own, found = recorded["config"], []
    metric = metric_of(Task("target", recorded["data"]["classes"])).name
    for path in sorted(directory.resolve().parent.glob(f"*/{SUMMARY_FILE}")):
        try:
            summary, other = read_json(path), read_json(path.with_name(CONFIG_FILE))["config"]
            values = summary[f"test_{metric}"], summary[f"valid_{metric}"]
            alike = (
                summary["method"] == REFERENCE
                and summary["fingerprint"] == recorded["data"]["fingerprint"]
                and all(own[name] == other[name] for name in SETTING)
            )
        except (UserError, KeyError, TypeError):
            continue  # a damaged neighbour is no reason to show nothing
        if alike:
            differs = [name for name in ALIKE if own.get(name) != other.get(name)]
            found.append(Reference(path.parent.name, *values, differs))
    # A run that differs in its seed alone comes before one that differs in another setting.
    return min(found, key=lambda r: (len({*r.differs} - {"seed"}), len(r.differs)), default=None)


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint on the run's training set of n samples, in the set's order."""

    split: Split
    tasks: list[Task]  # the K that were trained, fitted
    samples: SampleSet  # with the labels that were trained on
    table: ScheduleTable  # its predictions are (n, K), as of ``TaskHeads``
    images: object  # ``images.load(position)`` gives a uint8 image (height, width, 3); None: rows
    epoch: int  # of the checkpoint, from 1 in its phase
    phase: str
    valid: float  # of the metric, of the checkpoint
    before_fine_tuning: bool = False
    margins: np.ndarray | None = None  # (n,) means over training; None: not recorded

    # Labels and predictions are classes, or numbers in their own unit; NaN where missing.

    def labels(self, task):
        """(n,) the data's labels under the task of this number."""
        places = self.samples.positions
        labels, mask = self.split.labels[places, task].astype(float), self.split.mask
        return labels if mask is None else np.where(mask[places, task], labels, np.nan)

    def given(self):
        """(n,) the target labels that were trained on."""
        given, mask, target = self.samples.labels[:, 0].numpy(), self.samples.mask, self.tasks[0]
        known = np.ones(len(given), bool) if mask is None else mask[:, 0].numpy()
        result = np.full(len(given), np.nan)
        result[known] = given[known]
        if target.classes is None:  # exactly: every label, permuted or not, is one of the data's
            own = self.labels(0)
            own = np.sort(own[~np.isnan(own)])
            standardised = ((own - target.mean) / target.std).astype(given.dtype)
            result[known] = own[np.searchsorted(standardised, given[known])]
        return result

    def predicted(self, task):
        """(n,) what the model predicts under the task of this number."""
        scale = self.tasks[task]
        return self.table.prediction[:, task].astype(float) * scale.std + scale.mean


def evaluate_run(run, *, split_dir=None, data_root=None, device=None, num_workers=None):
    """The ``Evaluation`` of a ``Run``: one pass over its training set, with a progress bar.

    A schedule is judged with the model that it trained: the checkpoint from which fine-tuning
    began, if there was any.

    Args: where the split and the data are now, if they were moved; ``device`` and ``num_workers``
    as for training. Raises UserError: data or checkpoint are not those of the run.
    """
    config = run.config
    start = run.directory / START_FILE
    fine_tuned = run.method.bilevel and start.exists()
    checkpoint = start if fine_tuned else run.directory / BEST_FILE
    if not checkpoint.exists():
        raise UserError(f"{checkpoint} is missing: no epoch of the run was completed so far")
    workers = config.num_workers if num_workers is None else num_workers
    split = _split_of(run, split_dir, data_root)
    config = replace(config, device=str(choose_device(device)))
    if split_dir is not None and config.cache_dir != "none":
        config = replace(config, cache_dir=f"{split_dir}/cache")
    # The folder is what config.json says: it is read, and nothing is written to it.
    samples = training_set_of(config, split, build=False)
    model, scheduler, state = _load(checkpoint, config, split, samples)
    images = None
    if not split.rows:
        images = open_images(split, config.image_size, config.cache_dir, workers, build=False)
    inputs = images or open_inputs(config, split)
    order = in_order(len(samples), config.test_batch_size)
    batches = tqdm(
        stream(config, inputs, samples, order, "report", augment=False),
        total=-(-len(samples) // config.test_batch_size),
        desc="weights of the training set",
        unit="batch",
        dynamic_ncols=True,
        disable=None,
    )
    table = schedule_weights(
        model,
        scheduler,
        batches,
        predict=lambda batch, outputs: model.heads.predictions(outputs.features),
        aux_weight=config.aux_weight,
    )
    margins = _margins(run.directory / MARGINS_FILE, len(samples))
    progress = state["epoch"], state["phase"], state[f"valid_{run.metric.name}"]
    tasks = tasks_of(config, split)
    return Evaluation(split, tasks, samples, table, images, *progress, fine_tuned, margins)


def _margins(path, samples):
    """The (n,) mean margins in ``path``; None without such a file."""
    if not path.exists():
        return None
    try:
        margins = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError):
        margins = np.empty(0)
    if margins.shape != (samples,) or margins.dtype != np.float64:
        raise UserError(
            f"{path} does not hold the margins of the {samples:,} training samples: without the "
            "file, the report leaves them out"
        )
    return margins


def _split_of(run, split_dir, data_root):
    """The split the run was trained on, checked by its fingerprint."""
    hint = "" if split_dir and data_root else "; if moved, give --split_dir and --data_root"
    split_dir = split_dir or run.config.split_dir
    try:
        split = load_split(split_dir, data_root or run.config.data_root)
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    expected = run.data["fingerprint"]
    if split.fingerprint != expected:
        raise UserError(
            f"{split_dir} is not the split this run was trained on (fingerprint "
            f"{split.fingerprint[:12]}, the run's is {expected[:12]}): give the run's own with "
            "--split_dir"
        )
    return split


def _load(checkpoint, config, split, samples):
    """(model, scheduler, state) of a checkpoint; the state has phase, epoch, valid_accuracy (or
    valid_rmse)."""
    state = load_file(checkpoint)
    if not (isinstance(state, dict) and {"model", "scheduler", "epoch"} <= state.keys()):
        raise UserError(f"{checkpoint} is not a checkpoint of train_bilevel.py")
    model = build_model(config, split, pretrained=False)
    scheduler = build_scheduler(config, split, samples)
    for module, part in ((model, "model"), (scheduler, "scheduler")):
        load_matching(module, state[part], f"{checkpoint}: the {part} does not fit {CONFIG_FILE}")
    return model, scheduler, state
