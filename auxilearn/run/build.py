"""What a configuration is made into: the plan of its steps, models, optimisers, batches."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from auxilearn.backbones import build_backbone
from auxilearn.bilevel import Bilevel
from auxilearn.data.cache import open_images
from auxilearn.data.contract import Split, Task
from auxilearn.data.corruption import inputs_of
from auxilearn.data.dataset import (
    RowStream,
    SampleSet,
    Stream,
    first_batch,
    fitted,
    in_order,
    sample_set,
    shuffled,
    training_set,
)
from auxilearn.data.pixels import near, on_device
from auxilearn.errors import UserError
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.methods import LOWER, METHODS, Method, Problem, load_plugin
from auxilearn.metrics import metric_of
from auxilearn.models import TaskModel
from auxilearn.optim import adam_scale, upper_adam
from auxilearn.randomness import derived_seed
from auxilearn.run.config import Config, fine_tunes, training_set_name
from auxilearn.run.processes import Ranks
from auxilearn.stable import FINE_TUNING_DIVISOR, TargetTask

TRAINING, FINE_TUNING = "training", "fine-tuning"


@dataclass(frozen=True)
class Plan:
    """Which steps a run takes, counted from 1: lower steps with upper steps among them, then those
    of fine-tuning."""

    steps_per_epoch: int
    main_steps: int
    steps_per_pass: int  # of fine-tuning
    passes: int
    hyperstep: int
    warmup_epochs: int
    bilevel: bool

    @classmethod
    def of(cls, config, samples, dev_samples):
        """The plan of a resolved ``Config`` on sets of these sizes."""
        per_epoch = math.ceil(samples / config.train_batch_size)
        main = config.epochs * per_epoch
        return cls(
            steps_per_epoch=per_epoch,
            main_steps=min(main, config.max_steps or main),
            steps_per_pass=math.ceil(dev_samples / config.dev_batch_size),
            passes=config.dev_epochs if fine_tunes(config) else 0,
            hyperstep=config.hyperstep,
            warmup_epochs=config.warmup_epochs,
            bilevel=METHODS[config.method].bilevel,
        )

    @property
    def total_steps(self):
        return self.main_steps + self.passes * self.steps_per_pass

    def phase(self, step):
        return TRAINING if step <= self.main_steps else FINE_TUNING

    def epoch(self, step):
        """The pass that a step belongs to, from 1 in each phase."""
        if step <= self.main_steps:
            return (step - 1) // self.steps_per_epoch + 1
        return (step - self.main_steps - 1) // self.steps_per_pass + 1

    def epoch_ends(self, step):
        last = step in (self.main_steps, self.total_steps)
        return last or self.epoch(step + 1) > self.epoch(step)

    def upper_steps(self, step):
        """How many upper steps there are up to the end of lower step ``step``."""
        if not self.bilevel:
            return 0
        before = self.warmup_epochs * self.steps_per_epoch // self.hyperstep
        return max(0, min(step, self.main_steps) // self.hyperstep - before)

    def upper_step_follows(self, step):
        return self.upper_steps(step) > self.upper_steps(step - 1)


@dataclass
class Run:
    """One run, built. ``fine_tuning`` trains the same model on the target task alone."""

    config: Config  # resolved
    split: Split
    tasks: list[Task]  # the K that are trained, fitted
    ranks: Ranks
    method: Method
    plan: Plan
    train_set: SampleSet
    bilevel: Bilevel
    fine_tuning: Bilevel | None
    inputs: Any  # a source of images, or rows, for ``stream``

    @property
    def device(self):
        return torch.device(self.config.device)

    @property
    def metric(self):
        """The metric of the target task."""
        return metric_of(self.tasks[0])

    @property
    def trained_on(self):
        """The name of the set that the lower level trains on."""
        return training_set_name(self.config)

    @property
    def plugin(self):
        """The hash of --plugin's content, or None."""
        return load_plugin(self.config.plugin) if self.config.plugin else None

    def lower_batches(self, after):
        """Training batches, then those of fine-tuning, after the first ``after`` steps."""
        config, main = self.config, self.plan.main_steps
        if after < main:
            stream = self._shuffled(self.train_set, config.train_batch_size, "lower", augment=True)
            stream = stream.after(after)
            for _ in range(after, main):
                yield next(stream)
        if self.plan.passes:
            size = config.dev_batch_size
            stream = self._shuffled(self._set("dev"), size, "fine-tuning", augment=True)
            yield from stream.after(max(0, after - main))

    def dev_batches_of_lower_steps(self, after):
        """Lists of development batches, for a scheduler that looks at them in every lower step."""
        if not self.bilevel.scheduler.needs_dev:
            while True:
                yield None
        count = self.config.n_meta_loss_accum
        stream = self._dev_stream("lower dev").after(after * count)
        while True:
            yield [next(stream) for _ in range(count)]

    def upper_batches(self, after):
        """(training batches, development batches) of every upper step after the first ``after``."""
        config = self.config
        train = self._shuffled(self.train_set, config.train_batch_size, "upper", augment=True)
        train = train.after(after * config.n_meta_train_loss_accum)
        dev = self._dev_stream("dev").after(after * config.n_meta_loss_accum)
        while True:
            yield (
                [next(train) for _ in range(config.n_meta_train_loss_accum)],
                [next(dev) for _ in range(config.n_meta_loss_accum)],
            )

    def evaluation_batches(self, name):
        """All of a set once, without augmentation, this rank's share of every batch."""
        samples, size = self._set(name), self.config.test_batch_size
        order = in_order(len(samples), size, self.ranks.rank, self.ranks.size)
        return self._stream(samples, order, name, augment=False)

    def _set(self, name):
        return sample_set(self.split, name, self.tasks)

    def _dev_stream(self, name):
        dev, size = self._set("dev"), self.config.dev_batch_size
        if self.config.dev_batches == "first":
            order = first_batch(len(dev), size, self.ranks.rank, self.ranks.size)
            return self._stream(dev, order, name, augment=False)
        return self._shuffled(dev, size, name, augment=False)

    def _shuffled(self, samples, size, name, *, augment):
        share = self.ranks.rank, self.ranks.size
        order = shuffled(len(samples), size, self.config.seed, name, *share)
        return self._stream(samples, order, name, augment=augment)

    def _stream(self, samples, order, name, *, augment):
        return stream(self.config, self.inputs, samples, order, name, augment=augment)


def build(config, split, ranks=None):
    """The ``Run`` of a resolved ``Config``. Raises UserError: weights or images cannot be read."""
    ranks = ranks or Ranks()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    method = METHODS[config.method]
    tasks = tasks_of(config, split)
    train_set = training_set_of(config, split)
    plan = Plan.of(config, len(train_set), len(split.indices["dev"]))
    model = build_model(config, split)
    scheduler = build_scheduler(config, split, train_set)
    # A backbone of a plugin may have frozen parameters; the rest is what the levels differentiate.
    theta = [p for p in model.parameters() if p.requires_grad]
    phi = list(scheduler.parameters())
    if method.learned and not phi:
        raise UserError(
            f"--method {config.method} is registered as learned on the {method.learned} level, but "
            "its scheduler has no parameters"
        )
    lower = lower_optimizer(config, theta, config.main_lr)
    if method.learned == LOWER:
        lower.add_param_group({"params": phi, "weight_decay": 0.0})

    def average(tensors, batches):
        return ranks.average(tensors, sum(len(batch.sample_id) for batch in batches))

    bilevel = Bilevel(
        model,
        scheduler,
        lower,
        upper_optimizer(config, phi) if method.bilevel else None,
        solver=solver_of(config, lower, theta),
        max_norm=config.max_grad_norm or None,
        aux_weight=config.aux_weight,
        average=average,
    )
    fine_tuning = None
    if plan.passes:
        fresh = lower_optimizer(config, theta, config.main_lr / FINE_TUNING_DIVISOR)
        fine_tuning = Bilevel(model, TargetTask(0, config.task_num), fresh, average=average)
    inputs = open_inputs(config, split)
    return Run(config, split, tasks, ranks, method, plan, train_set, bilevel, fine_tuning, inputs)


def open_inputs(config, split):
    """The inputs of all samples, for ``stream``: a source of images, or rows on the device."""
    device = torch.device(config.device)
    if split.rows:
        columns = split.rows.numbers, split.rows.codes
        return tuple(on_device(torch.from_numpy(column), device) for column in columns)
    images = open_images(split, config.image_size, config.cache_dir, config.num_workers)
    return near(images, device)


def stream(config, inputs, samples, order, name, *, augment):
    """The ``Batch``es of a ``SampleSet`` in this order; ``augment`` and ``name`` as ``Stream``."""
    device = torch.device(config.device)
    if isinstance(inputs, tuple):
        return RowStream(inputs, samples, order, device)
    options = {"augment": augment, "seed": config.seed, "name": name}
    return Stream(inputs, samples, order, config.image_size, device, **options)


def build_model(config, split, pretrained=True):
    """The task model of a resolved ``Config``, on its device, and the process's precision.

    ``pretrained=False`` leaves its weights random, to be loaded from a checkpoint.
    """
    set_precision(config.precision)
    torch.manual_seed(derived_seed(config.seed, "task model"))
    weights = (config.backbone_pretrain, config.backbone_weights) if pretrained else (False, None)
    backbone = build_backbone(
        config.backbone,
        config.feature_dim,
        *weights,
        image_size=config.image_size,
        rows=split.rows and split.rows.shape,
    )
    model = TaskModel(
        backbone, config.feature_dim, class_counts(config, split), bf16=config.precision == "bf16"
    )
    return model.to(config.device, memory_format=torch.channels_last)


def set_precision(precision):
    """Set how this process computes in float32, in full: nothing is left of an earlier run.

    Only ``tf32`` allows TF32, and in CUDA's convolutions alone. Matrix products are always float32,
    on the CPU too, which PyTorch's "high" would reach.
    """
    # The newer fp32_precision needs PyTorch 2.9, and makes torch.backends.cudnn.flags() raise.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("highest")


def build_scheduler(config, split, train_set):
    """The scheduler of a resolved ``Config`` for a training ``SampleSet``, on its device."""
    torch.manual_seed(derived_seed(config.seed, "scheduler"))
    problem = Problem(
        tasks=config.task_num,
        feature_dim=config.feature_dim,
        samples=len(train_set),
        labelled=label_ratio(train_set.mask),
        classes=tuple(class_counts(config, split)),
        lower_lr=config.main_lr,
        aux_weight=config.aux_weight,
    )
    return METHODS[config.method].build(problem, **config.options).to(config.device)


def label_ratio(mask):
    """The target's labels over the mean number of an auxiliary task's; ``mask`` (n, K) or None."""
    if mask is None or mask.shape[1] == 1:
        return 1.0
    target, *others = mask.sum(dim=0).tolist()
    return target * len(others) / max(1, sum(others))


def class_counts(config, split):
    """The number of classes of every task; None: a real number."""
    return [task.classes for task in split.tasks[: config.task_num]]


def tasks_of(config, split):
    """The tasks of a resolved ``Config``, fitted to the labels that its run may see."""
    return fitted(split, config.task_num, config.seed, config.labeled_per_class)


def training_set_of(config, split, build=True):
    """What a run with a resolved ``Config`` trains on: a ``SampleSet``.

    ``build``: whether a cache of small images, on which noise depends, may be written.
    """
    return training_set(
        split,
        training_set_name(config),
        tasks_of(config, split),
        config.seed,
        corrupted_rate=config.effective_corrupted_rate,
        labeled_per_class=config.labeled_per_class,
        corruption=config.corruption,
        inputs=lambda: inputs_of(split, config.cache_dir, config.num_workers, build),
    )


def lower_optimizer(config, theta, lr):
    """The optimiser of the task model; one kernel steps all of it."""
    settings = {"lr": lr, "weight_decay": config.w_decay, "fused": True}
    if config.main_optimizer == "adam":
        return torch.optim.Adam(theta, **settings)
    return torch.optim.SGD(theta, momentum=0.9, **settings)


def upper_optimizer(config, phi):
    """The optimiser of the scheduler."""
    if config.upper_optimizer == "adam":
        return upper_adam(phi, config.upper_lr, config.upper_decay)
    decay = config.upper_decay
    return torch.optim.SGD(phi, config.upper_lr, momentum=0.9, weight_decay=decay, fused=True)


def solver_of(config, lower, theta):
    """The solver that a resolved ``Config`` names, for the lower level's optimiser."""
    if config.solver == "neumann":
        solver = neumann(config.neumann_alpha, config.neumann_terms)
    else:
        solver = identity()
    if config.precondition == "adam":
        return preconditioned(solver, lambda: adam_scale(lower, theta))
    return solver
