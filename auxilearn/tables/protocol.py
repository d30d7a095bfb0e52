"""The parts of the paper's tables: rows, settings, data sets. Nothing here runs anything.

A cell of a table is a *row* (a method), under a *setting* (how labels are given), on a *data set*,
averaged over *seeds*. Each of the three is a dict of settings of ``Config``; a run is their union.
"""

from typing import NamedTuple

from auxilearn.data.corruption import KINDS as CORRUPTIONS
from auxilearn.data.corruption import UNIFORM
from auxilearn.methods import METHODS

KINDS = TARGET_ONLY, BASELINE, SCHEDULE, ABLATION = (
    *("target task only", "baseline", "schedule", "ablation"),
)


class Row(NamedTuple):
    """A method as a row. ``kind``: one of ``KINDS``; schedules are compared with baselines."""

    title: str
    kind: str
    settings: dict
    full: str | None = None  # of an ablation: the row of the whole method

    @property
    def method(self):
        return METHODS[self.settings["method"]]


# Rows beside the methods.
_EXTRA = {"common_tuned": Row("Equal weights, aux_weight tuned", BASELINE, {"method": "common"})}
for _factors in ("task", "feature", "loss", "feature loss", "feature task", "loss task"):
    _EXTRA["joint_" + _factors.replace(" ", "_")] = Row(
        f"JTDS, {_factors.replace(' ', ' and ')} factor alone",
        ABLATION,
        {"method": "joint", "options": {"factors": tuple(_factors.split())}},
        "joint",
    )
# Each undoes or changes one thing that docs/stability.md describes; the first undoes the schedule.
for _name, _title, _settings in (
    (
        "equal",
        "schedule held at equal weights",
        {"warmup_epochs": 1000000, "options": {"target_share": "equal"}},
    ),
    ("equal_share", "target's share 1 / K", {"options": {"target_share": "equal"}}),
    ("start_share", "target's share held at its start", {"options": {"target_share": "start"}}),
    ("tasks_only", "weights of tasks alone", {"options": {"factors": ("task",)}}),
    ("gradient", "response of gradient descent", {"precondition": "none"}),
    ("neumann", "Neumann series of three terms", {"solver": "neumann"}),
    (
        "sgd",
        "SGD on the upper level, at 0.01, clipped at 10",  # Adam's rate means something else
        {"upper_optimizer": "sgd", "max_grad_norm": 10.0, "upper_lr": 0.01},
    ),
    ("untempered", "weights of samples at full strength", {"options": {"tempered": False}}),
    ("one_batch", "one training batch per upper step", {"n_meta_train_loss_accum": 1}),
    ("held_out", "development set held out", {"hold_out_dev": True}),
    ("no_fine_tuning", "no fine-tuning", {"dev_epochs": 0}),
    # A factor of 10 in each of its two main hyper-parameters, by default 0.03 and 5.
    ("slow_upper", "upper learning rate 0.01", {"upper_lr": 0.01}),
    ("fast_upper", "upper learning rate 0.1", {"upper_lr": 0.1}),
    ("often", "an upper step every 2 steps", {"hyperstep": 2}),
    ("rarely", "an upper step every 20 steps", {"hyperstep": 20}),
):
    _EXTRA["stable_" + _name] = Row(
        f"Stable form, {_title}",
        ABLATION,
        {"method": "joint_stable", **_settings},
        "joint_stable",
    )
# Within its kind, a row stands where it does here; others follow in the order of METHODS.
_ORDER = (
    *("common", "common_tuned", "common_dev", "uncertainty", "dwa", "gcs", "pcgrad_target"),
    *("autolambda", "l2rw", "mwn", "slgrad", "linear", "task"),
    *("naive", "joint", "joint_stable"),
)


def rows():
    """{name: ``Row``} of the extra rows and all registered methods, in the order of a table."""
    found = {name: Row(m.title, _kind(m), {"method": name}) for name, m in METHODS.items()}

    def place(item):
        name, row = item
        return KINDS.index(row.kind), _ORDER.index(name) if name in _ORDER else len(_ORDER)

    return dict(sorted((found | _EXTRA).items(), key=place))


def _kind(method):
    if not method.auxiliary:
        return TARGET_ONLY
    return BASELINE if method.baseline else SCHEDULE


def usual_rows():
    """The rows of a table unless others are asked for: all but ablations of the stable form."""
    return [name for name, row in rows().items() if row.full != "joint_stable"]


class Setting(NamedTuple):
    """How the target task is labelled. ``rate``: share of corrupted labels; None: no such axis."""

    title: str
    settings: dict
    rate: float | None


SETTINGS = {
    "supervised": Setting("supervised", {}, 0.0),
    "semi": Setting("5 labels per class", {"labeled_per_class": 5}, None),
    "semi_50": Setting("50 labels in all", {"labeled_per_class": 50}, None),
}
for _rate in (0.2, 0.4, 0.6):
    _given = {"corrupted": True, "corrupted_rate": _rate}
    SETTINGS[f"corrupted_{_rate}"] = Setting(f"{_rate:.0%} corrupted", _given, _rate)
    for _noise, _words in (("pair", "to the next class"), ("instance", "by instance")):
        SETTINGS[f"{_noise}_{_rate}"] = Setting(
            f"{_rate:.0%} corrupted {_words}", {**_given, "corruption": _noise}, _rate
        )


def in_place_of(setting, numbers=False, corruption=UNIFORM):
    """The setting that stands in place of a table's ``setting``.

    Args: ``numbers``: the target is a real number, which has no classes; ``corruption``: the kind
    of the wrong labels.
    """
    if numbers and setting == "semi":
        return "semi_50"
    return setting.replace("corrupted_", f"{corruption}_") if corruption != UNIFORM else setting


class Table(NamedTuple):
    """A table of the paper; ``settings`` are its columns, ``tuned_on`` is one of them."""

    title: str
    settings: tuple
    tuned_on: str

    @property
    def all_settings(self):
        """Its columns and those that may stand in their place, in order."""
        kinds = [(True, UNIFORM), *((False, corruption) for corruption in CORRUPTIONS)]
        found = {in_place_of(setting, *kind) for setting in self.settings for kind in kinds}
        return [setting for setting in SETTINGS if setting in found]


TABLES = {
    "table2": Table("Supervised", ("supervised",), "supervised"),
    "table3": Table("Semi-supervised", ("semi",), "semi"),
    "table4": Table(
        "Corrupted labels", ("corrupted_0.2", "corrupted_0.4", "corrupted_0.6"), "corrupted_0.4"
    ),
}


class DataSet(NamedTuple):
    """``generate``: the word for data_preprocess.py --generate, or None for data on disk.

    ``settings``: of all its runs. Rows without tuned hyper-parameters train with these alone.
    """

    title: str
    generate: str | None
    settings: dict


_SMALL = {"backbone": "convnet", "feature_dim": 128, "threads": 1}
_SMALL |= {"main_lr": 2e-3, "dev_epochs": 10}
DATASETS = {
    "cub": DataSet(
        "CUB-200-2011",
        None,
        {"epochs": 100, "train_batch_size": 64, "main_lr": 1e-4}
        | {"upper_lr": 1e-2, "upper_decay": 5e-5},
    ),
    "mini": DataSet(
        "embedded miniature",
        "mini",
        {**_SMALL, "image_size": 32, "epochs": 12, "hyperstep": 10, "dev_batch_size": 20},
    ),
    "digits": DataSet(
        "scanned digits",
        "digits",
        {**_SMALL, "image_size": 16, "epochs": 40, "hyperstep": 5, "dev_batch_size": 10},
    ),
}
# Rows with settings of their own: naive has the paper's; joint_stable's upper optimiser is Adam.
ROW_SETTINGS = {
    ("cub", "naive"): {"aux_weight": 0.1, "upper_decay": 5e-3},
    ("cub", "joint_stable"): {"upper_lr": 3e-2, "upper_decay": 1e-5},
}

# --------------------------------------------------------------------------------------------------
# Tuning: on validation, the same number of candidates for every row
# --------------------------------------------------------------------------------------------------

# Factors on the auxiliary losses to try beside 1. If few images have a target label, most of the
# training signal comes from the auxiliary tasks, and a larger factor helps.
AUX_WEIGHTS = {"table2": (0.3, 0.1), "table3": (3.0, 10.0), "table4": (0.3, 0.1)}


def candidates(table, row, unit):
    """The candidates of a row that is tuned, each {setting or option of the method: value}.

    Learning rates of the task model are multiples of ``unit``. Each is combined with each entry of
    the method's ``tune``. A method without ``tune`` tries two rates of the scheduler, or two
    factors on the auxiliary losses if it has no upper level.
    """
    near, far = AUX_WEIGHTS[table]
    method = rows()[row].method
    others = [{n: near if v == "near" else v for n, v in entry.items()} for entry in method.tune]
    if row == "common_tuned":
        others = [{"aux_weight": near}, {"aux_weight": far}]
    elif not others and not method.auxiliary:
        others = [{}]
    elif not others and method.bilevel:
        others = [{"upper_lr": 1e-2}, {"upper_lr": 3e-3}]
    elif not others:
        others = [{"aux_weight": 1.0}, {"aux_weight": near}]
    factors = (0.25, 0.5, 1, 1.5, 2.5, 5) if others == [{}] else (1, 2.5, 5)
    rates = [float(f"{factor * unit:.3g}") for factor in factors]
    return [{"main_lr": rate, **other} for rate in rates for other in others]


def tuned_as(row):
    """The row whose hyper-parameters ``row`` takes: for an ablation, the whole method's."""
    return rows()[row].full or row
