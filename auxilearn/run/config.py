"""Every setting of a run: its default, its bounds, its meaning, its command-line flag.

``Config`` is the single source: ``command_line`` makes flags of its fields, and it is recorded in
full with every run. ``resolve`` settles what depends on the data and on the method.
"""

import dataclasses
import glob
import os
from dataclasses import dataclass
from typing import get_args, get_type_hints

import torch

from auxilearn.backbones import feature_width, find_backbone
from auxilearn.data.corruption import KINDS as CORRUPTIONS
from auxilearn.data.pixels import typical_side
from auxilearn.errors import UserError
from auxilearn.methods import METHODS, Option

SMALL_IMAGE = 96  # pixels of the shorter side
LOG_EVERY = 10  # lower steps between two rows of metrics.jsonl

# The groups of --help, each from this setting on.
GROUPS = {
    "method": "the flags that matter most",
    "plugin": "task model",
    "split_dir": "data",
    "main_optimizer": "lower level: the task model, on scheduled training losses",
    "upper_optimizer": "upper level: the scheduler, on the development set",
    "record_dir": "run",
}


def _setting(default, text="", **more):
    """A field of ``Config``.

    ``more``: metavar; choices; low, high and above (bounds; above is exclusive); aliases; hidden
    (accepted, but not in --help); neutral (no result depends on it: a run may be continued with
    another value); by_method (None is left to the method; this is what most methods take).
    """
    known = dict.fromkeys(("choices", "low", "high", "above", "by_method", "metavar"))
    known |= {"aliases": (), "hidden": not text, "neutral": False}
    metadata = {"help": text, **known, **more}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """The settings of one run. ``None`` is resolved by ``resolve``."""

    method: str = _setting("joint", "how losses become one; see the list below")
    corrupted: bool = _setting(
        False,
        "corrupt the training labels of the target task, once, by the seed (the paper's Table 4)",
        aliases=("corupted",),
    )
    corrupted_rate: float = _setting(
        0.2,
        "with --corrupted: probability that a label is corrupted; a share of a target that is a "
        "real number is permuted",
        aliases=("corupted_rate",),
        low=0,
        high=1,
    )
    corruption: str = _setting(
        "uniform",
        "with --corrupted: uniform: redrawn over all classes, as in the paper; pair: the next "
        "class; instance: another class, by a random projection of the input (Xia et al. 2020)",
        choices=CORRUPTIONS,
    )
    labeled_per_class: int = _setting(
        0,
        "semi-supervised (Table 3): this many random samples per class (of a real number: in all) "
        "keep their target label, the others train the auxiliary tasks only; 0 is supervised",
        low=0,
    )
    epochs: int = _setting(20, "passes over the training set", low=1)
    train_batch_size: int = _setting(32, "samples per lower step", low=1)
    main_lr: float | None = _setting(
        None,
        "learning rate of the task model (default: 1e-4; 1e-3 if the backbone starts from random "
        "weights)",
        above=0,
    )
    aux_weight: float = _setting(1.0, "factor on the losses of all auxiliary tasks", low=0)
    hyperstep: int | None = _setting(
        None, "lower steps between two upper steps", by_method=20, low=1
    )
    upper_lr: float | None = _setting(
        None, "learning rate of the scheduler", by_method=1e-3, aliases=("aux_lr",), above=0
    )
    seed: int = _setting(
        5, "determines initial weights, order, augmentation, corruption and labelled choice", low=0
    )
    exp_name: str | None = _setting(
        None,
        "name of the run; a name that is taken is refused (default: made from method and seed, "
        "numbered so that it is new)",
    )
    resume: bool = _setting(
        False,
        "continue the run EXP_NAME after its last checkpoint, to the same numbers as without the "
        "interruption; start it if it is not there",
        neutral=True,
    )

    plugin: str | None = _setting(
        None,
        "Python file that registers methods or backbones of your own, see docs/methods.md",
        metavar="FILE",
        neutral=True,  # its content is compared
    )
    options: dict = _setting({}, "the method's own settings, NAME=VALUE ...; see below")
    backbone: str | None = _setting(
        None,
        "any classification network of torchvision, such as resnet50 or vit_b_16; convnet for "
        "small images; mlp or autoint for rows (default: mlp for rows, convnet for images of up to "
        f"{SMALL_IMAGE} pixels, resnet18 for others)",
    )
    feature_dim: int | None = _setting(
        None,
        "feature width d (default: the torchvision network's own, 512 for others)",
        aliases=("in_dim",),
        low=1,
    )
    backbone_pretrain: bool | None = _setting(
        None,
        "start from torchvision's ImageNet weights, 0: from random ones (default: 1 for "
        "torchvision's networks without --backbone_weights)",
    )
    backbone_weights: str | None = _setting(
        None,
        "file to start the backbone from: a torchvision state dict, or best.pt of another run",
        metavar="FILE",
    )

    split_dir: str = _setting(
        "preprocess_data", "where data_preprocess.py wrote the split", neutral=True, metavar="DIR"
    )
    data_root: str | None = _setting(
        None,
        "where the images are, if they were moved: the folder that holds images/, or, of own "
        "images, what --images named (default: the one that was preprocessed)",
        metavar="DIR",
        neutral=True,
    )
    task_num: int | None = _setting(
        None,
        "number of tasks K: the target and the first K - 1 auxiliary ones (default: all)",
        low=1,
    )
    whether_aux: bool | None = _setting(None)
    image_size: int | None = _setting(
        None,
        "side of the training crop in pixels; images are resized to 256/224 of it first (default: "
        "224; the images' own size if they are smaller and the backbone is not torchvision's)",
        low=8,
    )
    num_workers: int = _setting(
        min(4, os.cpu_count() or 1),
        "threads that decode images where there is no cache, or build it (default here: "
        "%(default)s); 0: the main thread",
        low=0,
        neutral=True,
    )
    cache_dir: str | None = _setting(
        None,
        "folder for a file of the decoded and resized images, built once (CUB at 224 pixels: 3 "
        "GB); none: decode every time (default: cache in --split_dir)",
        metavar="DIR",
        neutral=True,
    )

    main_optimizer: str = _setting(
        "adam", "optimiser; sgd has momentum 0.9", choices=("adam", "sgd")
    )
    w_decay: float = _setting(5e-4, "weight decay", low=0)
    max_steps: int | None = _setting(
        None,
        "end training after this many lower steps; fine-tuning and the test follow as usual "
        "(default: no limit)",
        low=1,
    )
    dev_epochs: int = _setting(
        20,
        "joint_stable, common_dev: passes over the development set after --epochs, from the best "
        "checkpoint so far",
        low=0,
    )
    test_batch_size: int = _setting(128, low=1)

    upper_optimizer: str | None = _setting(
        None,
        "optimiser of the scheduler; sgd has momentum 0.9; adam moves every parameter by about "
        "--upper_lr, whatever the size of the hypergradient",
        choices=("sgd", "adam"),
        by_method="sgd",
    )
    upper_decay: float = _setting(1e-5, "weight decay", aliases=("auxw_decay",), low=0)
    warmup_epochs: int | None = _setting(
        None,
        "epochs before the first upper step",
        by_method=0,
        low=0,
    )
    dev_batch_size: int = _setting(
        50,
        "samples in a development batch, fine-tuning included",
        aliases=("aux_batch_size",),
        low=1,
    )
    dev_batches: str = _setting(
        "random",
        "random: development batches in a fresh random order; first: the first one in file order "
        "every time, as the released code does (in class order, a quarter of CUB's classes)",
        choices=("random", "first"),
    )
    n_meta_loss_accum: int = _setting(1, low=1)
    n_meta_train_loss_accum: int | None = _setting(
        None, "training batches per upper step", by_method=1, low=1
    )
    hold_out_dev: bool | None = _setting(
        None,
        "keep the development samples out of the lower level; 0: train on them as well, as methods "
        "that do not learn from them do",
        by_method=True,
    )
    solver: str | None = _setting(
        None,
        "approximation of the inverse Hessian: neumann: truncated series; identity: none",
        choices=("neumann", "identity"),
        by_method="neumann",
    )
    neumann_alpha: float | None = _setting(
        None, "step alpha of the series (default: --main_lr)", above=0
    )
    neumann_terms: int = _setting(3, "Hessian-vector products of the series", low=0)
    precondition: str | None = _setting(
        None,
        "which optimiser the hypergradient assumes for the lower level: none: gradient descent; "
        "adam: Adam",
        choices=("none", "adam"),
        by_method="none",
    )
    max_grad_norm: float | None = _setting(
        None, "the hypergradient is clipped to this norm; 0: no clip", by_method=10.0, low=0
    )

    record_dir: str = _setting(
        "bird_record",
        "runs are kept in RECORD_DIR/<full|semi|noisy>/EXP_NAME",
        neutral=True,
        metavar="DIR",
    )
    save_every: int = _setting(
        0,
        "lower steps between checkpoints to continue from; 0: one at every epoch's end",
        low=0,
        neutral=True,
    )
    overwrite: bool = _setting(False, "replace an earlier run of the same name", neutral=True)
    device: str | None = _setting(
        None,
        "cpu, cuda or cuda:N (default: the first GPU that CUDA_VISIBLE_DEVICES shows, else cpu)",
    )
    threads: int | None = _setting(
        None,
        "threads of PyTorch on the CPU (default: PyTorch's choice); results depend on it in the "
        "last digits, and small networks are fastest with 1",
        low=1,
    )
    precision: str = _setting(
        "tf32",
        "tf32: GPUs may round the inputs of convolutions to TF32, as PyTorch does by default, and "
        "the rest is float32; fp32: all is float32 (on the CPU the same as tf32); bf16: the "
        "backbone computes in bfloat16, in both levels",
        choices=("tf32", "fp32", "bf16"),
    )

    @property
    def setting(self):
        """full, semi or noisy: the folder of the run, after the paper's three tables."""
        if self.labeled_per_class:
            return "semi"
        return "noisy" if self.corrupted else "full"

    @property
    def effective_corrupted_rate(self):
        return self.corrupted_rate if self.corrupted else 0.0


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
# {name: int, float, str, bool or dict}, None aside
KINDS = {
    name: next(kind for kind in (*get_args(hint), hint) if kind is not type(None))
    for name, hint in get_type_hints(Config).items()
}
UPPER = [*FIELDS][[*FIELDS].index("upper_optimizer") : [*FIELDS].index("record_dir")]
NEUTRAL = tuple(name for name, field in FIELDS.items() if field.metadata["neutral"])


# --------------------------------------------------------------------------------------------------
# Defaults and checks
# --------------------------------------------------------------------------------------------------


def choices_of(field):
    """The values a field may take, or None; methods may have come with a plugin."""
    return tuple(METHODS) if field.name == "method" else field.metadata["choices"]


def default_of(field):
    """The default of a field of ``Config``; of one left to the method, what most methods take."""
    if field.name == "options":
        return {}
    by_method = field.metadata["by_method"]
    return field.default if by_method is None else by_method


def defaults():
    """{name: default} of all settings, as ``default_of`` says."""
    return {name: default_of(field) for name, field in FIELDS.items()}


def with_method_defaults(config):
    """A copy in which the method has said what was left to it."""
    method = METHODS[config.method]
    own = dict(method.defaults)
    open_ones = [n for n, field in FIELDS.items() if field.metadata["by_method"] is not None]
    if odd := own.keys() - open_ones:
        raise UserError(
            f"--method {config.method}: its defaults may not say {', '.join(sorted(odd))}; these "
            f"are left to methods: {', '.join(open_ones)}"
        )
    if config.main_optimizer == "sgd":
        own["precondition"] = "none"
    left = {
        name: own.get(name, default_of(FIELDS[name]))
        for name in open_ones
        if getattr(config, name) is None
    }
    options = {name: option.default for name, option in method.options.items()} | config.options
    return dataclasses.replace(config, options=options, **left)


def check(config):
    """Check what can be checked without the data. Raises UserError naming the flag."""
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if value is not None and name != "options":
            _check_value(field, value)
    for name, value in config.options.items():
        try:
            METHODS[config.method].option(name).check(value)
        except ValueError as error:
            raise UserError(f"--option {name} {error}") from None
    backbone = config.backbone and find_backbone(config.backbone)
    if config.corrupted and config.labeled_per_class:
        raise UserError(
            "--corrupted 1 and --labeled_per_class are two settings of the paper: choose one"
        )
    if config.resume and config.overwrite:
        raise UserError("--resume 1 continues a run and --overwrite 1 replaces it: choose one")
    name = config.exp_name
    if config.resume and name is None:
        raise UserError("--resume 1 needs the --exp_name of the run to continue")
    if name is not None and (name in (".", "..") or "/" in name or not name.isprintable()):
        raise UserError(f"--exp_name {name!r} must be a plain name without slashes")
    if (
        METHODS[config.method].bilevel
        and config.precondition == "adam"
        and config.main_optimizer != "adam"
    ):
        raise UserError(
            f"--precondition adam is for --main_optimizer adam, not {config.main_optimizer}: take "
            "--precondition none, which answers for the steps of sgd"
        )
    if config.backbone_pretrain and backbone and not backbone.pretrained:
        raise UserError(
            f"--backbone_pretrain 1: there are no ImageNet weights for {config.backbone}"
        )
    if config.backbone_weights and config.backbone_pretrain:
        raise UserError("--backbone_weights and --backbone_pretrain 1 exclude each other")


def _check_value(field, value):
    if value == "":
        raise UserError(f"--{field.name} must not be empty")
    bounds = {name: field.metadata[name] for name in ("low", "high", "above")}
    try:
        Option(field.default, choices=choices_of(field), **bounds).check(value)
    except ValueError as error:
        raise UserError(f"--{field.name} {error}") from None


def from_record(settings):
    """The ``Config`` of recorded ``settings``, {name: value}. UserError: of another version."""
    if settings.keys() != FIELDS.keys():
        odd = sorted(settings.keys() ^ FIELDS.keys())
        raise UserError(
            f"recorded by another version of this program ({', '.join(odd[:3])} differ): use the "
            "revision that config.json names"
        )
    settings = dict(settings)
    if settings["method"] not in METHODS:
        raise UserError(
            f"--method {settings['method']} is not known: give the file that registers it with "
            "--plugin"
        )
    settings["options"] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings["options"].items()
    }
    config = Config(**settings)
    check(config)
    return config


def for_data(config, split):
    """A copy in which the data have said what was left to them: the backbone, the size of its
    images (None of rows), its initial weights and its learning rate.

    Args: ``split`` from ``auxilearn.data.split.load_split``. Raises UserError.
    """
    name, size = config.backbone, config.image_size
    if split.rows:
        name = name or "mlp"
    elif name is None or size is None:
        side = typical_side(split)
        name = name or ("convnet" if side <= SMALL_IMAGE else "resnet18")
        size = size or (224 if find_backbone(name).pretrained else max(8, min(side, 224)))
    pretrain = config.backbone_pretrain
    if pretrain is None:
        pretrain = find_backbone(name).pretrained and not config.backbone_weights
    return dataclasses.replace(
        config,
        backbone=name,
        image_size=size,
        backbone_pretrain=pretrain,
        main_lr=config.main_lr or (1e-4 if pretrain or config.backbone_weights else 1e-3),
    )


def resolve(config, split):
    """A copy in which nothing is left open; checked against the data.

    Args: ``split`` from ``auxilearn.data.split.load_split``. Raises UserError.
    """
    check(config)
    config = for_data(config, split)
    method = METHODS[config.method]
    available = len(split.tasks)
    whether_aux = method.auxiliary if config.whether_aux is None else config.whether_aux
    if whether_aux and not method.auxiliary:
        raise UserError(f"--method {config.method} trains no auxiliary task: drop --whether_aux 1")
    task_num = config.task_num
    if task_num is None:
        task_num = available if whether_aux else 1
    if task_num > available:
        raise UserError(
            f"--task_num {task_num} is more than the data has: the target and {available - 1} "
            f"auxiliary tasks, so at most {available}"
        )
    if task_num > 1 and not whether_aux:
        reason = "--whether_aux 0" if method.auxiliary else f"--method {config.method}"
        raise UserError(
            f"{reason} trains the target task alone, but --task_num {task_num} asks for "
            f"{task_num - 1} auxiliary tasks: drop one of the two"
        )
    resolved = dataclasses.replace(
        with_method_defaults(config),
        data_root=str(split.data_root),
        task_num=task_num,
        whether_aux=whether_aux,
        feature_dim=config.feature_dim or feature_width(config.backbone),
        cache_dir=config.cache_dir or f"{config.split_dir}/cache",
        neumann_alpha=config.neumann_alpha or config.main_lr,
        device=str(choose_device(config.device)),
    )
    check(resolved)  # a method's own defaults too
    _check_batch_norm(resolved, split)
    return resolved


def _check_batch_norm(config, split):
    """A batch of one image has one value per channel where the backbone has shrunk it to 1 x 1."""
    smallest = find_backbone(config.backbone).smallest
    if split.rows or config.image_size >= smallest:
        return
    sizes = {"--train_batch_size": (config.train_batch_size, training_set_name(config))}
    if METHODS[config.method].looks_at_dev or fine_tunes(config):
        sizes["--dev_batch_size"] = (config.dev_batch_size, "dev")
    for flag, (size, name) in sizes.items():
        if len(split.indices[name]) % size == 1 or size == 1:
            raise UserError(
                f"{flag} {size} leaves a batch of one image, which {config.backbone}'s batch norm "
                f"cannot train on at --image_size {config.image_size}: use another batch size or "
                f"at least {smallest} pixels"
            )


def fine_tunes(config):
    """Whether training ends with passes over the development set."""
    return METHODS[config.method].fine_tuned and config.dev_epochs > 0


def training_set_name(config):
    """The set of the split that the lower level of a resolved ``Config`` trains on."""
    held_out = METHODS[config.method].looks_at_dev and config.hold_out_dev
    return "rest_train" if held_out else "full_train"


# --------------------------------------------------------------------------------------------------
# What a person should know at the start
# --------------------------------------------------------------------------------------------------


def ineffective(config, needs_dev=False, rows=False):
    """Flags that differ from their defaults and change nothing in a run.

    Args: ``config`` as given, before ``resolve``; ``needs_dev``: as of the run's scheduler; whether
    the samples are ``rows``.
    """
    method, full = METHODS[config.method], with_method_defaults(config)
    neumann = method.bilevel and full.solver == "neumann"
    auxiliary = method.auxiliary and config.whether_aux is not False and config.task_num != 1
    matters = {
        "corrupted_rate": config.corrupted,
        "corruption": config.corrupted,
        "backbone_pretrain": not rows
        and (config.backbone is None or find_backbone(config.backbone).pretrained)
        and not config.backbone_weights,
        "image_size": not rows,
        "num_workers": not rows,
        "cache_dir": not rows,
        "data_root": not rows,
        "aux_weight": auxiliary,
        "dev_epochs": method.fine_tuned,
        "dev_batch_size": method.bilevel or needs_dev or fine_tunes(config),
        "dev_batches": method.bilevel or needs_dev,
        "n_meta_loss_accum": method.bilevel or needs_dev,
        "hold_out_dev": method.looks_at_dev,
        "hyperstep": method.bilevel,
        "upper_lr": method.bilevel,
        "neumann_alpha": neumann and full.neumann_terms > 0,
        "neumann_terms": neumann,
    }
    return [
        name
        for name, field in FIELDS.items()
        if name != "options"
        and getattr(config, name) != field.default
        and not matters.get(name, method.bilevel or name not in UPPER)
    ]


def choose_device(name):
    """The torch device called ``name``, or the best there is. UserError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices exist, but hold no numbers
    except Exception as error:  # each backend has its own kinds
        first_line = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--device {name} cannot be used here ({first_line})") from None
    return device


def slow_device(config):
    """A sentence where a resolved ``Config`` trains on the CPU by mistake, most likely; or None."""
    if config.device != "cpu":
        return None
    if glob.glob("/dev/nvidia[0-9]*") and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "this PyTorch cannot use it"
        if visible is not None:
            reason = f"CUDA_VISIBLE_DEVICES={visible} hides it"
        return f"training on the CPU, though this machine has a GPU: {reason}"
    if find_backbone(config.backbone).pretrained and config.image_size >= 224:
        return (
            f"training {config.backbone} at {config.image_size} pixels on the CPU, which takes "
            "days; there is no GPU that PyTorch can use"
        )
    return None
