"""What the paper's tables consist of: data sets, settings, methods. Nothing here runs anything.

A cell of a table is a *row* (a method), under a *setting* (how labels are given), on a *data set*,
averaged over *seeds*. All three are written as flags of train_bilevel.py, so a cell is a command.
"""

from typing import NamedTuple

TARGET_ONLY, BASELINE, SCHEDULE, ABLATION = "target task only", "baseline", "schedule", "ablation"


class Row(NamedTuple):
    """A method as a row. ``kind``: one of the four above; a baseline is what is to be beaten."""

    title: str
    kind: str
    flags: tuple
    full: str | None = None  # of an ablation: the row of the whole method


ROWS = {
    "single": Row("Single task", TARGET_ONLY, ("--method", "single")),
    "common": Row("Equal weights", BASELINE, ("--method", "common")),
    "common_tuned": Row("Equal weights, aux_weight tuned", BASELINE, ("--method", "common")),
    "common_dev": Row("Equal weights, development set", BASELINE, ("--method", "common_dev")),
    "uncertainty": Row("Uncertainty", BASELINE, ("--method", "uncertainty")),
    "gcs": Row("Gradient cosine", BASELINE, ("--method", "gcs")),
    "linear": Row("AuxiLearn, linear", BASELINE, ("--method", "linear")),
    "task": Row("AuxiLearn, network", BASELINE, ("--method", "task")),
    "naive": Row("N-JTDS", SCHEDULE, ("--method", "naive")),
    "joint": Row("JTDS", SCHEDULE, ("--method", "joint")),
    "joint_stable": Row("JTDS, stable form", SCHEDULE, ("--method", "joint_stable")),
}
for _factors in ("task", "feature", "loss", "feature loss", "feature task", "loss task"):
    ROWS["joint_" + _factors.replace(" ", "_")] = Row(
        f"JTDS, {_factors.replace(' ', ' and ')} factor alone",
        ABLATION,
        ("--method", "joint", "--factors", *_factors.split()),
        "joint",
    )
# What docs/stability.md calls remedies, each taken back, and all of the schedule.
for _name, _title, _flags in (
    ("equal", "schedule held at equal weights", "--warmup_epochs 1000000"),
    ("free_scale", "scale left free", "--target_share free"),
    ("fixed_share", "the target's share fixed", "--target_share fixed"),
    ("gradient", "plain gradient descent's response", "--precondition none"),
    ("neumann", "Neumann series of three terms", "--solver neumann"),
    (
        "sgd",
        "SGD above, at 0.01, clipped at 10",  # Adam's learning rate means something else
        "--upper_optimizer sgd --max_grad_norm 10 --aux_lr 0.01",
    ),
    ("no_warmup", "no warm-up", "--warmup_epochs 0"),
    ("one_batch", "one training batch per upper step", "--n_meta_train_loss_accum 1"),
    ("held_out", "development set held out", "--hold_out_dev 1"),
    ("no_fine_tuning", "no fine-tuning", "--dev_epochs 0"),
):
    ROWS["stable_" + _name] = Row(
        f"Stable form, {_title}",
        ABLATION,
        ("--method", "joint_stable", *_flags.split()),
        "joint_stable",
    )
# The rows of a table unless others are asked for.
USUAL_ROWS = tuple(row for row in ROWS if ROWS[row].full != "joint_stable")


class Setting(NamedTuple):
    """How the target task is labelled. ``rate``: share of corrupted labels; None: no such axis."""

    title: str
    flags: tuple
    rate: float | None


SETTINGS = {
    "supervised": Setting("supervised", (), 0.0),
    "semi": Setting("5 labels per class", ("--labeled_per_class", "5"), None),
}
for _rate in (0.2, 0.4, 0.6):
    SETTINGS[f"corrupted_{_rate}"] = Setting(
        f"{_rate:.0%} corrupted", ("--corrupted", "1", "--corrupted_rate", str(_rate)), _rate
    )


class Table(NamedTuple):
    """A table of the paper; ``settings`` are its columns."""

    title: str
    settings: tuple


TABLES = {
    "table2": Table("Supervised", ("supervised",)),
    "table3": Table("Semi-supervised", ("semi",)),
    "table4": Table("Corrupted labels", ("corrupted_0.2", "corrupted_0.4", "corrupted_0.6")),
}


class DataSet(NamedTuple):
    """``generate``: what data_preprocess.py is asked to write, or None where data must be there.

    ``flags``: of all its runs; ``main_lr`` as well. Rows without tuned hyper-parameters train with
    these alone.
    """

    title: str
    generate: str | None
    main_lr: float
    flags: tuple


_SMALL = ("--backbone", "convnet", "--in_dim", "128", "--num_workers", "0")
DATASETS = {
    "cub": DataSet(
        "CUB-200-2011",
        None,
        1e-4,
        ("--epochs", "100", "--train_batch_size", "64", "--aux_lr", "1e-2", "--auxw_decay", "5e-5"),
    ),
    "mini": DataSet(
        "embedded miniature",
        "mini",
        2e-3,
        (*_SMALL, "--threads", "1", "--image_size", "32", "--epochs", "12")
        + ("--hyperstep", "10", "--aux_batch_size", "20", "--dev_epochs", "10"),
    ),
    "digits": DataSet(
        "scanned digits",
        "digits",
        2e-3,
        (*_SMALL, "--threads", "1", "--image_size", "16", "--epochs", "40")
        + ("--hyperstep", "5", "--aux_batch_size", "10", "--dev_epochs", "10"),
    ),
}
# Where a row runs with other settings than the rest: naive as in the paper; joint_stable's upper
# level has another optimiser.
ROW_FLAGS = {
    ("cub", "naive"): ("--aux_weight", "0.1", "--auxw_decay", "5e-3"),
    ("cub", "joint_stable"): ("--aux_lr", "3e-2", "--auxw_decay", "1e-5"),
}

# --------------------------------------------------------------------------------------------------
# Tuning: on validation accuracy, the same number of candidates for every row
# --------------------------------------------------------------------------------------------------

BUDGET = 6  # candidates of every row
# Factors on the auxiliary losses that are tried beside 1. Where few images have a target label, the
# auxiliary tasks are most of what there is to learn from, and more of them helps.
AUX_WEIGHTS = {"table2": (0.3, 0.1), "table3": (3.0, 10.0), "table4": (0.3, 0.1)}


def candidates(table, row, unit):
    """The ``BUDGET`` candidates of a row that is tuned, each {setting of Config: value}.

    Learning rates of the task model are multiples of ``unit``.
    """

    def rates(*factors):
        return [float(f"{factor * unit:.3g}") for factor in factors]

    near, far = AUX_WEIGHTS[table]
    if row in ("single", "common"):
        return tuple({"main_lr": rate} for rate in rates(0.25, 0.5, 1, 1.5, 2.5, 5))
    if row == "common_tuned":
        others = ({"aux_weight": near}, {"aux_weight": far})
    elif row in ("common_dev", "joint_stable"):  # alike, so that they differ by the schedule alone
        others = ({"aux_weight": 1.0, "dev_epochs": 30}, {"aux_weight": near, "dev_epochs": 30})
    elif row in ("uncertainty", "gcs"):
        others = ({"aux_weight": 1.0}, {"aux_weight": near})
    elif row == "naive":  # a weight of a single sample moves little in a step
        others = ({"aux_weight": near, "aux_lr": 3e-2}, {"aux_weight": near, "aux_lr": 3e-1})
    else:
        others = ({"aux_lr": 1e-2}, {"aux_lr": 3e-3})
    return tuple({"main_lr": rate, **other} for rate in rates(1, 2.5, 5) for other in others)


TUNED_ON = {"table2": "supervised", "table3": "semi", "table4": "corrupted_0.4"}


def tuned_as(row):
    """The row whose hyper-parameters ``row`` takes: an ablation those of the full schedule."""
    return ROWS[row].full or row
