"""Every setting of a run: its default, its meaning, its command-line flag.

``Config`` is the single source: the command line and ``--help`` are made from its fields, and it is
recorded in full with every run.
"""

import argparse
import dataclasses
import math
import os
import sys
from dataclasses import dataclass

import torch

from auxilearn.errors import UserError
from auxilearn.hypernet import FACTORS, TARGET_SHARES
from auxilearn.methods import METHODS

SOLVERS = ("neumann", "identity", "cg")
BACKBONES = ("resnet18", "convnet")


def _switch(text):
    """0/1/true/false as the command line's booleans."""
    known = {"1": True, "true": True, "0": False, "false": False}
    try:
        return known[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected 0, 1, true or false, not {text!r}") from None


def _names(bilevel):
    *most, last = [name for name, method in METHODS.items() if method.bilevel == bilevel]
    return f"{', '.join(most)} and {last}"


def _fine_tuned():
    return [name for name, method in METHODS.items() if method.fine_tuned]


def _setting(
    default, group, text, *, kind=None, choices=None, aliases=(), many=False, by_method=None
):
    """A field. ``by_method``: where None is left to the method, what most methods take."""
    metadata = {
        "group": group,
        "help": text,
        "kind": kind or type(default),
        "choices": choices,
        "aliases": aliases,
        "many": many,
        "by_method": by_method,
    }
    if many:
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


DATA = "data"
SETTING = "setting (at most one of corrupted labels and semi-supervised; neither is supervised)"
MODEL = "task model"
LOWER = "lower level: the task model, on scheduled training losses"
UPPER = "upper level: the scheduler, on the development set"
RUN = "run"


@dataclass
class Config:
    """The settings of one run. ``None`` is resolved by ``resolve`` from the data."""

    method: str = _setting(
        "joint",
        "method",
        "how losses become one: "
        + "; ".join(f"{name} = {method.title}" for name, method in METHODS.items())
        + f". {_names(True)} learn it on the development set; {_names(False)} do not",
        choices=tuple(METHODS),
    )

    split_dir: str = _setting(
        "preprocess_data", DATA, "where data_preprocess.py wrote the split (its --out_dir)"
    )
    data_root: str | None = _setting(
        None,
        DATA,
        "folder in CUB layout that holds images/ (default: the one that was preprocessed)",
        kind=str,
    )
    task_num: int | None = _setting(
        None,
        DATA,
        "number of tasks K: the target and the first K - 1 attributes (default: all the data has)",
        kind=int,
    )
    whether_aux: bool | None = _setting(
        None,
        DATA,
        "1 trains the auxiliary tasks too, 0 the target alone, that is --task_num 1 (default: 1, "
        "but 0 for --method single)",
        kind=bool,
    )
    image_size: int = _setting(
        224, DATA, "side of the training crop in pixels; images are resized to 256/224 of it first"
    )
    num_workers: int = _setting(
        min(4, os.cpu_count() or 1),
        DATA,
        "processes that load and augment the training images (default: %(default)s here); 0 does "
        "it in the main process; the results do not depend on it",
    )
    cache: str = _setting(
        "auto",
        DATA,
        "keep the images decoded and resized in a file, which is built once (CUB at 224 pixels: "
        "3 GB) and makes loading several times faster; auto does so where it can and else warns, "
        "on insists, off decodes every time; the results do not depend on it",
        choices=("auto", "on", "off"),
    )
    cache_dir: str | None = _setting(
        None, DATA, "folder of that file (default: cache in --split_dir)", kind=str
    )

    corrupted: bool = _setting(
        False,
        SETTING,
        "1 corrupts the training labels of the target task, once, by the seed",
        aliases=("corupted",),
    )
    corrupted_rate: float = _setting(
        0.2,
        SETTING,
        "with --corrupted 1: probability r that a label is redrawn uniformly over all classes",
        aliases=("corupted_rate",),
    )
    labeled_per_class: int = _setting(
        0,
        SETTING,
        "semi-supervised: this many random images per class keep their target label, the others "
        "train the auxiliary tasks only; 0 is supervised",
    )

    backbone: str = _setting(
        "resnet18", MODEL, "torchvision's ResNet-18, or a small convnet", choices=BACKBONES
    )
    in_dim: int = _setting(512, MODEL, "feature width d of the backbone")
    backbone_pretrain: bool | None = _setting(
        None,
        MODEL,
        "1 starts from torchvision's ImageNet weights (resnet18 only), 0 from random ones "
        "(default: 1 for resnet18 without --backbone_weights)",
        kind=bool,
    )
    backbone_weights: str | None = _setting(
        None,
        MODEL,
        "file to start the backbone from: a torchvision state dict, or best.pt of another run",
        kind=str,
    )

    epochs: int = _setting(20, LOWER, "passes over the training set")
    max_steps: int | None = _setting(
        None,
        LOWER,
        "stop after this many lower steps, then go on as usual at the end: fine-tune, evaluate",
        kind=int,
    )
    train_batch_size: int = _setting(32, LOWER, "images per lower step")
    test_batch_size: int = _setting(128, LOWER, "images per batch of evaluation")
    main_optimizer: str = _setting(
        "adam", LOWER, "of the task model; sgd has momentum 0.9", choices=("adam", "sgd")
    )
    main_lr: float = _setting(1e-4, LOWER, "learning rate of --main_optimizer")
    w_decay: float = _setting(5e-4, LOWER, "weight decay of --main_optimizer")
    aux_weight: float = _setting(1.0, LOWER, "factor on the losses of all auxiliary tasks")
    gcs: str = _setting(
        "unweighted",
        LOWER,
        "with --method gcs: unweighted leaves out the auxiliary tasks with a negative cosine, at "
        "the cost of one backward and one forward-mode pass; weighted multiplies each by its "
        "cosine, at the cost of a backward pass per task",
        choices=("unweighted", "weighted"),
    )
    dev_epochs: int = _setting(
        20,
        LOWER,
        f"with --method {' or '.join(_fine_tuned())}: passes over the development set after "
        "--epochs, from the best checkpoint so far; 0 leaves them out",
    )
    dev_lr: float | None = _setting(
        None, LOWER, "learning rate in these passes (default: --main_lr / 5)", kind=float
    )

    aux_lr: float | None = _setting(
        None, UPPER, "learning rate of --upper_optimizer", kind=float, by_method=1e-3
    )
    auxw_decay: float = _setting(1e-5, UPPER, "weight decay of --upper_optimizer")
    upper_optimizer: str | None = _setting(
        None,
        UPPER,
        "sgd has momentum 0.9; adam (with decoupled weight decay) moves every parameter by about "
        "--aux_lr, whatever the size of the hypergradient",
        kind=str,
        choices=("sgd", "adam"),
        by_method="sgd",
    )
    warmup_epochs: int | None = _setting(
        None,
        UPPER,
        "epochs before the first upper step; unless given, half of --epochs at most",
        kind=int,
        by_method=0,
    )
    hyperstep: int | None = _setting(
        None, UPPER, "lower steps between two upper steps", kind=int, by_method=20
    )
    aux_batch_size: int = _setting(50, UPPER, "images in a development batch, fine-tuning included")
    dev_batches: str = _setting(
        "random",
        UPPER,
        "random draws development batches in a fresh random order; first takes the first one in "
        "file order every time, as the released code does (with ids in class order that is a "
        "quarter of CUB's classes)",
        choices=("random", "first"),
    )
    n_meta_loss_accum: int = _setting(1, UPPER, "development batches per upper step")
    n_meta_train_loss_accum: int | None = _setting(
        None, UPPER, "training batches per upper step", kind=int, by_method=1
    )
    hold_out_dev: bool | None = _setting(
        None,
        UPPER,
        "1 keeps the development images out of the lower level, which trains on rest_train_set; 0 "
        "trains on them as well, on full_train_set, as methods without an upper level do",
        kind=bool,
        by_method=True,
    )
    factors: list[str] = _setting(
        FACTORS,
        UPPER,
        "with --method joint or joint_stable: the factors of the schedule that are learned; one "
        "left out is the constant around which it starts",
        choices=FACTORS,
        kind=str,
        many=True,
    )
    target_share: str | None = _setting(
        None,
        UPPER,
        "with --method joint_stable: the target task's share of all weight, whose mean over the "
        "tasks is held at 1: learned, within bounds; fixed = 1 / K, the default with "
        "--labeled_per_class; free = the scale is not held either, for ablations",
        kind=str,
        choices=(*TARGET_SHARES, "none"),
        by_method="none",
    )
    aux_hidden_dim: list[int] = _setting(
        (10, 10, 10, 10), UPPER, "hidden sizes of --method task", kind=int, many=True
    )
    solver: str | None = _setting(
        None,
        UPPER,
        "how the inverse Hessian is approximated: neumann = truncated series; identity = not at "
        "all; cg = damped conjugate gradients",
        kind=str,
        choices=SOLVERS,
        by_method="neumann",
    )
    precondition: str | None = _setting(
        None,
        UPPER,
        "the step of the lower level to which the hypergradient is the response: none is plain "
        "gradient descent's, and --main_optimizer sgd's; adam the one that Adam really takes",
        kind=str,
        choices=("none", "adam"),
        by_method="none",
    )
    neumann_alpha: float | None = _setting(
        None, UPPER, "step alpha of the Neumann series (default: --main_lr)", kind=float
    )
    neumann_terms: int = _setting(3, UPPER, "Hessian-vector products of the Neumann series")
    neumann_scale: str = _setting(
        "released",
        UPPER,
        "released leaves the series' sum as it is; alpha multiplies it by alpha, so that it tends "
        "to the inverse Hessian's product",
        choices=("released", "alpha"),
    )
    damping: float = _setting(
        1.0,
        UPPER,
        "added to the Hessian by cg; with --precondition adam, times what Adam divides by",
    )
    cg_iterations: int = _setting(10, UPPER, "most Hessian-vector products of cg")
    reduction: str = _setting(
        "exact",
        UPPER,
        "under torchrun: exact averages the development gradient and every Hessian-vector product "
        "over the processes; final averages their finished hypergradients only, which is cheaper",
        choices=("exact", "final"),
    )
    on_nonfinite: str = _setting(
        "stop",
        UPPER,
        "a hypergradient that is not finite ends the run (stop), or that upper step is left out "
        "and counted (skip)",
        choices=("stop", "skip"),
    )
    on_divergence: str = _setting(
        "warn",
        UPPER,
        "a Neumann series whose terms grow is used as it is, as the released code does (warn), or "
        "v_0 is used in its place in that upper step (identity); either way it is reported, with "
        "the largest stable alpha",
        choices=("warn", "identity"),
    )
    max_grad_norm: float | None = _setting(
        None,
        UPPER,
        "the hypergradient is clipped to this norm; 0 is no clipping",
        kind=float,
        by_method=10.0,
    )

    exp_name: str | None = _setting(
        None,
        RUN,
        "name of the run; a name that is taken is refused (default: made from method and seed, "
        "numbered so that it is new)",
        kind=str,
    )
    record_dir: str = _setting(
        "bird_record", RUN, "runs are kept in RECORD_DIR/<full|semi|noisy>/EXP_NAME"
    )
    resume: bool = _setting(
        False,
        RUN,
        "1 continues the run EXP_NAME after its last checkpoint, to the same numbers as without "
        "the interruption; starts it if it is not there",
    )
    save_every: int = _setting(
        0, RUN, "lower steps between checkpoints to continue from; 0 is one at every epoch's end"
    )
    overwrite: bool = _setting(False, RUN, "1 replaces an earlier run of the same name")
    seed: int = _setting(
        5, RUN, "determines initial weights, order, augmentation, corruption and labelled choice"
    )
    device: str | None = _setting(
        None,
        RUN,
        "cpu, cuda or cuda:N (default: the first GPU that CUDA_VISIBLE_DEVICES shows, else cpu)",
        kind=str,
    )
    threads: int | None = _setting(
        None,
        RUN,
        "threads of PyTorch on the CPU (default: PyTorch's choice); results depend on it in the "
        "last digits, and small networks are fastest with 1",
        kind=int,
    )
    amp: str = _setting(
        "off",
        RUN,
        "bf16 runs the backbone in bfloat16, in both levels; losses, schedule and parameters stay "
        "in float32",
        choices=("off", "bf16"),
    )
    compile: bool = _setting(
        False, RUN, "1 compiles the lower level's model with torch.compile; minutes at the start"
    )
    tf32: bool = _setting(False, RUN, "1 lets GPUs round float32 products to TF32")
    tensorboard: bool = _setting(
        False, RUN, "1 writes TensorBoard events to the folder tensorboard of the run as it trains"
    )
    log_every: int = _setting(10, RUN, "lower steps between two rows of metrics.jsonl")

    @property
    def setting(self):
        """full, semi or noisy: the folder of the run, after the paper's three tables."""
        if self.labeled_per_class:
            return "semi"
        return "noisy" if self.corrupted else "full"

    @property
    def effective_corrupted_rate(self):
        return self.corrupted_rate if self.corrupted else 0.0


# Sets of settings by name: --preset makes them the defaults of a command line.
PRESETS = {
    "paper": {
        "method": "joint",
        "epochs": 100,
        "train_batch_size": 64,
        "main_lr": 1e-4,
        "aux_lr": 1e-2,
        "auxw_decay": 5e-5,
        "hyperstep": 20,
        "upper_optimizer": "sgd",
        "warmup_epochs": 0,
        "solver": "neumann",
        "precondition": "none",
        "max_grad_norm": 10.0,
    }
}


def parse(argv=None, description=None):
    """``Config`` from a command line. argparse exits with code 2 on what it cannot read."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="settings to start from; flags beside it win. paper: "
        + " ".join(f"--{name} {value}" for name, value in PRESETS["paper"].items()),
    )
    groups = {}
    for field in dataclasses.fields(Config):
        info = field.metadata
        if info["group"] not in groups:
            groups[info["group"]] = parser.add_argument_group(info["group"])
        kind = _switch if info["kind"] is bool else info["kind"]
        names = [f"--{name}" for name in (field.name, *info["aliases"])]
        options = {"nargs": "+"} if info["many"] else {}
        if info["choices"]:
            options["choices"] = info["choices"]
            if len(info["choices"]) > 5:  # argparse cannot break the line that lists them
                options["metavar"] = "NAME"
        else:
            options["metavar"] = {bool: "0|1", int: "N", float: "X"}.get(info["kind"], "NAME")
        default = _unless_given(field)
        shown = _shown_default(field.name, info, default)
        groups[info["group"]].add_argument(
            *names,
            type=kind,
            default=default,
            help=_help(info, shown),
            dest=field.name,
            **options,
        )
    given = vars(parser.parse_args(argv))
    if given["preset"]:
        parser.set_defaults(**PRESETS[given["preset"]])
        given = vars(parser.parse_args(argv))
    del given["preset"]
    return Config(**given)


def _unless_given(field):
    """What a field of ``Config`` holds where nothing was given."""
    return field.default_factory() if field.metadata["many"] else field.default


def flags_of(config):
    """The flags of train_bilevel.py that make ``config``: method, seed, and what is no default."""
    flags = []
    for field in dataclasses.fields(config):
        value, info = getattr(config, field.name), field.metadata
        if value == _unless_given(field) and field.name not in ("method", "seed"):
            continue
        values = value if info["many"] else [int(value) if info["kind"] is bool else value]
        flags += [f"--{field.name}", *(str(v) for v in values)]
    return flags


def _shown_default(name, info, default):
    """The default as text, or None where the help text says it all."""
    if info["by_method"] is not None:
        own = [
            f"{m} {_as_text(method.defaults[name])}"
            for m, method in METHODS.items()
            if name in method.defaults
        ]
        return "; ".join([_as_text(info["by_method"]), *own])
    if default is None:
        return None
    if info["many"]:
        return " ".join(map(str, default))
    return _as_text(default)


def _as_text(value):
    return str(int(value) if isinstance(value, bool) else value)


def _help(info, default):
    text = info["help"].replace("%(default)s", str(default))
    return text if default is None or "(default" in text else f"{text} (default: {default})"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------

_AT_LEAST = {
    "task_num": 1,
    "image_size": 8,
    "num_workers": 0,
    "labeled_per_class": 0,
    "in_dim": 1,
    "epochs": 1,
    "max_steps": 1,
    "train_batch_size": 1,
    "test_batch_size": 1,
    "w_decay": 0,
    "aux_weight": 0,
    "auxw_decay": 0,
    "dev_epochs": 0,
    "max_grad_norm": 0,
    "warmup_epochs": 0,
    "hyperstep": 1,
    "aux_batch_size": 1,
    "n_meta_loss_accum": 1,
    "n_meta_train_loss_accum": 1,
    "neumann_terms": 0,
    "damping": 0,
    "cg_iterations": 1,
    "seed": 0,
    "threads": 1,
    "log_every": 1,
    "save_every": 0,
}
# Beyond what a machine holds, or the eight digits of a step in a checkpoint's name.
_AT_MOST = {
    "image_size": 4096,
    "in_dim": 1 << 16,
    "num_workers": 1024,
    "threads": 4096,
    "epochs": 10**6,
    "dev_epochs": 10**6,
    "max_steps": 10**8 - 1,
    "seed": 2**63 - 1,
    "n_meta_loss_accum": 10**4,
    "n_meta_train_loss_accum": 10**4,
    "neumann_terms": 10**4,
    "cg_iterations": 10**4,
}
_LARGEST = 1e37  # float32 holds little more
# No result depends on these: a run may be continued with others.
NEUTRAL = (
    "resume",
    "overwrite",
    "save_every",
    "num_workers",
    "cache",
    "cache_dir",
    "split_dir",
    "data_root",
    "record_dir",
    "tensorboard",
)
_ABOVE_ZERO = ("main_lr", "dev_lr", "aux_lr", "neumann_alpha")


def check(config):
    """Check what can be checked without the data. Raises UserError naming the flag."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name} must be a finite number, not {value}")
        if isinstance(value, float) and value > _LARGEST:
            raise UserError(f"--{field.name} must be at most {_LARGEST}, not {value}")
        if value is None:
            continue
        if value == "":
            raise UserError(f"--{field.name} must not be empty")
        if field.name in _AT_LEAST and value < _AT_LEAST[field.name]:
            raise UserError(f"--{field.name} must be at least {_AT_LEAST[field.name]}, not {value}")
        if field.name in _AT_MOST and value > _AT_MOST[field.name]:
            raise UserError(f"--{field.name} must be at most {_AT_MOST[field.name]}, not {value}")
        if field.name in _ABOVE_ZERO and value <= 0:
            raise UserError(f"--{field.name} must be greater than 0, not {value}")
        choices = field.metadata["choices"]
        for one in (value if field.metadata["many"] else [value]) if choices else ():
            if one not in choices:
                known = ", ".join(choices)
                raise UserError(f"--{field.name} {one} is unknown: choose from {known}")
    if min(config.aux_hidden_dim, default=0) < 1:
        raise UserError("--aux_hidden_dim takes one or more sizes of at least 1")
    if max(config.aux_hidden_dim) > 1 << 12:
        raise UserError(f"--aux_hidden_dim takes sizes of at most {1 << 12}")
    if not config.factors:
        raise UserError(f"--factors takes one or more of {', '.join(FACTORS)}")
    if config.method == "joint_stable" and config.target_share == "none":
        raise UserError(
            "--target_share none is what other methods have; a run of joint_stable that was "
            "recorded without it is of an earlier form, which this version does not know"
        )
    if not 0 <= config.corrupted_rate <= 1:
        raise UserError(f"--corrupted_rate must be within [0, 1], not {config.corrupted_rate}")
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
    bilevel = METHODS[config.method].bilevel
    if bilevel and config.precondition == "adam" and config.main_optimizer != "adam":
        raise UserError(
            f"--precondition adam is for --main_optimizer adam, not {config.main_optimizer}: take "
            "--precondition none, which answers for the steps of sgd"
        )
    if config.backbone == "convnet" and config.backbone_pretrain:
        raise UserError("--backbone_pretrain 1: there are no ImageNet weights for the convnet")
    if config.backbone_weights and config.backbone_pretrain:
        raise UserError("--backbone_weights and --backbone_pretrain 1 exclude each other")


def from_record(settings):
    """The ``Config`` of recorded ``settings``, {name: value}, any JSON. UserError: it is none.

    Settings that this version does not know are left out; one that was not there yet had the
    default's effect.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    known = {name: value for name, value in settings.items() if name in fields}
    for name, value in known.items():
        if not _is_of_kind(value, fields[name]):
            raise UserError(f"{name} cannot be {ascii(value)[:40]}")
    config = Config(**{**defaults(), **known})
    check(config)
    return config


def _is_of_kind(value, field):
    if field.metadata["many"]:
        kind = (str,) if field.metadata["choices"] else (int,)
        return isinstance(value, list) and all(type(one) in kind for one in value)
    if value is None:
        return field.default is None
    if field.metadata["kind"] is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is field.metadata["kind"]


def default_of(field):
    """The default of a field of ``Config``; of one left to the method, what most methods take."""
    if field.metadata["by_method"] is not None:
        return field.metadata["by_method"]
    return _unless_given(field)


def defaults():
    """{name: default} of all settings, as ``default_of`` says."""
    return {field.name: default_of(field) for field in dataclasses.fields(Config)}


def with_method_defaults(config):
    """A copy in which the method has said what was left to it."""
    own = dict(METHODS[config.method].defaults)
    if "warmup_epochs" in own:  # a short run is to have upper steps as well
        own["warmup_epochs"] = min(own["warmup_epochs"], config.epochs // 2)
    if config.main_optimizer == "sgd":
        own["precondition"] = "none"
    if config.labeled_per_class and "target_share" in own:
        own["target_share"] = "fixed"
    return dataclasses.replace(
        config,
        **{
            field.name: own.get(field.name, default_of(field))
            for field in dataclasses.fields(config)
            if field.metadata["by_method"] is not None and getattr(config, field.name) is None
        },
    )


def resolve(config, split):
    """A copy in which nothing is left open; checked against the data.

    Args: ``split`` from ``auxilearn.data.split.load_split``. Raises UserError.
    """
    check(config)
    method = METHODS[config.method]
    available = 1 + split.attributes.shape[1]
    whether_aux = method.auxiliary if config.whether_aux is None else config.whether_aux
    if whether_aux and not method.auxiliary:
        raise UserError(f"--method {config.method} trains no auxiliary task: drop --whether_aux 1")
    task_num = config.task_num
    if task_num is None:
        task_num = available if whether_aux else 1
    if task_num > available:
        raise UserError(
            f"--task_num {task_num} is more than the data has: the target and {available - 1} "
            f"attributes, so at most {available}"
        )
    if task_num > 1 and not whether_aux:
        reason = "--whether_aux 0" if method.auxiliary else f"--method {config.method}"
        raise UserError(
            f"{reason} trains the target task alone, but --task_num {task_num} asks for "
            f"{task_num - 1} auxiliary tasks: drop one of the two"
        )
    pretrain = config.backbone_pretrain
    if pretrain is None:
        pretrain = config.backbone == "resnet18" and not config.backbone_weights
    resolved = dataclasses.replace(
        with_method_defaults(config),
        data_root=str(split.data_root),
        task_num=task_num,
        whether_aux=whether_aux,
        backbone_pretrain=pretrain,
        cache_dir=config.cache_dir or f"{config.split_dir}/cache",
        dev_lr=config.dev_lr or config.main_lr / 5,
        neumann_alpha=config.neumann_alpha or config.main_lr,
        exp_name=config.exp_name,
        device=str(choose_device(config.device)),
    )
    _check_batch_norm(resolved, split)
    return resolved


def _neumann(config, method):
    return method.bilevel and config.solver == "neumann"


def _conjugate_gradient(config, method):
    return method.bilevel and config.solver == "cg"


def fine_tunes(config):
    """Whether training ends with passes over the development set."""
    return METHODS[config.method].fine_tuned and config.dev_epochs > 0


def _has_auxiliary(config, method):
    return method.auxiliary and config.whether_aux is not False and config.task_num != 1


# When a setting changes something; those of the upper level that are not here, where there is one.
_MATTERS = {
    "corrupted_rate": lambda config, method: config.corrupted,
    "backbone_pretrain": lambda config, method: (
        config.backbone == "resnet18" and not config.backbone_weights
    ),
    "cache_dir": lambda config, method: config.cache != "off",
    "aux_weight": _has_auxiliary,
    "gcs": lambda config, method: config.method == "gcs" and _has_auxiliary(config, method),
    "dev_epochs": lambda config, method: method.fine_tuned,
    "dev_lr": lambda config, method: fine_tunes(config),
    "aux_batch_size": lambda config, method: method.bilevel or fine_tunes(config),
    "factors": lambda config, method: config.method in ("joint", "joint_stable"),
    "target_share": lambda config, method: (
        config.method == "joint_stable"
        and (
            config.target_share == "free"
            or ("task" in config.factors and _has_auxiliary(config, method))
        )
    ),
    "aux_hidden_dim": lambda config, method: config.method == "task",
    "neumann_alpha": lambda config, method: (
        _neumann(config, method) and (config.neumann_terms > 0 or config.neumann_scale == "alpha")
    ),
    "neumann_terms": _neumann,
    "neumann_scale": _neumann,
    "on_divergence": lambda config, method: _neumann(config, method) and config.neumann_terms > 0,
    "damping": _conjugate_gradient,
    "cg_iterations": _conjugate_gradient,
}


def ineffective(config, processes=1):
    """Names of the settings that differ from their defaults and change nothing in a run.

    Args: ``config`` as given, before ``resolve``; ``processes``: how many train together.
    """
    method, full = METHODS[config.method], with_method_defaults(config)
    matters = {"reduction": lambda config, method: method.bilevel and processes > 1, **_MATTERS}
    return [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != _unless_given(field)
        and not (
            matters[field.name](full, method)
            if field.name in matters
            else method.bilevel or field.metadata["group"] != UPPER
        )
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


def _check_batch_norm(config, split):
    """A batch of one image has one value per channel where the backbone has shrunk it to 1 x 1."""
    smallest = {"resnet18": 33, "convnet": 9}[config.backbone]
    if config.image_size >= smallest:
        return
    sizes = {"--train_batch_size": (config.train_batch_size, training_set_name(config))}
    if METHODS[config.method].bilevel or fine_tunes(config):
        sizes["--aux_batch_size"] = (config.aux_batch_size, "dev")
    for flag, (size, name) in sizes.items():
        if len(split.indices[name]) % size == 1 or size == 1:
            raise UserError(
                f"{flag} {size} leaves a batch of one image, which {config.backbone}'s batch norm "
                f"cannot train on at --image_size {config.image_size}: use another batch size or "
                f"at least {smallest} pixels"
            )


def training_set_name(config):
    """The set of the split that the lower level of a resolved ``Config`` trains on."""
    held_out = METHODS[config.method].bilevel and config.hold_out_dev
    return "rest_train" if held_out else "full_train"
