"""The report's charts: each answers one question about a run. Importing this imports matplotlib.

A drawing function takes ``Findings`` and returns a ``Figure``, or None if there is nothing to show.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from auxilearn.report.findings import WORDS
from auxilearn.report.names import readable, shortened
from auxilearn.report.run import REFERENCE
from auxilearn.report.style import (
    COLOURS,
    MARKERS,
    SERIES,
    SIZE,
    STYLE,
    for_page,
    legend_below,
    logarithmic,
    new_axes,
    printed,
    thin,
)
from auxilearn.run.build import FINE_TUNING
from auxilearn.run.history import QUANTILES

TALL = (SIZE[0], 4.1)
BARS = 45  # most bars of a ranking
POINTS = 1200  # most points of a scatter plot
PERCENT = PercentFormatter(1, decimals=0)


class Chart(NamedTuple):
    name: str  # of the files
    title: str
    draw: Callable


def draw_charts(findings, directory):
    """Draw every chart that ``findings`` have something for into ``directory``, NAME.png and
    NAME.svg, in place of earlier ones. Returns {name: SVG for a page}."""
    directory.mkdir(exist_ok=True)
    drawn = {}
    with mpl.rc_context(STYLE):
        for chart in CHARTS:
            files = [directory / f"{chart.name}.{suffix}" for suffix in ("png", "svg")]
            for file in files:
                file.unlink(missing_ok=True)
            figure = chart.draw(findings)
            if figure is None:
                continue
            png, svg = printed(figure, chart.title)
            files[0].write_bytes(png)
            files[1].write_text(svg, encoding="utf-8")
            drawn[chart.name] = for_page(svg, chart.name, chart.title)
    return drawn


def _column(rows, *names):
    """The steps of ``rows`` and their values of ``names``, as float arrays; None becomes NaN."""
    return [np.array([row[key] for row in rows], dtype=float) for key in ("step", *names)]


def _groups(labels):
    """[(name, rows, colour, marker)]: right and wrong labels, or all samples as one group."""
    if "wrong" not in labels:
        return [("all samples", labels, "blue", "o")]
    return [
        ("label right", labels[~labels.wrong], "blue", "o"),
        ("label wrong", labels[labels.wrong], "orange", "s"),
    ]


def _kinds(findings):
    """{role: numbers of its tasks}; without roles a few tasks stand for themselves, by name."""
    order = findings.order
    if findings.roles or len(order) > len(SERIES):
        return findings.roles
    return {shortened(readable(findings.tasks.name[k]), 20): np.array([k]) for k in order}


def _styles(findings):
    """{kind: (colour, marker)}."""
    looks = zip(SERIES, MARKERS, strict=True)
    return {kind: next(looks, ("muted", "o")) for kind in _kinds(findings)}


def _task_colours(findings):
    """A colour for every task, by its kind; the target is black."""
    colours, styles = np.full(len(findings.tasks), "blue", dtype=object), _styles(findings)
    for kind, members in _kinds(findings).items():
        colours[members] = styles[kind][0]
    colours[0] = "ink"
    return [COLOURS[colour] for colour in colours]


# --------------------------------------------------------------------------------------------------
# Did it train? Is the hypergradient trustworthy?
# --------------------------------------------------------------------------------------------------


def _losses(findings):
    steps, upper = findings.run.training_steps, findings.run.rows["upper"]
    if not steps:
        return None
    figure, axes = new_axes("lower step", "mean loss")
    step, target, other = _column(steps, "target_loss", "aux_loss")
    axes.plot(*thin(step, target), color=COLOURS["blue"], label="target, training")
    if np.any(other > 0):
        style = {"color": COLOURS["green"], "ls": ":"}
        axes.plot(*thin(step, other), label="auxiliary tasks, training", **style)
    if upper:
        style = {"color": COLOURS["orange"], "ls": "--"}
        axes.plot(*thin(*_column(upper, "dev_loss"), 100), label="target, development", **style)
    axes.set_ylim(bottom=0)
    legend_below(figure, axes)
    return figure


def _metric(name, findings):
    """The metric over training, if it is the one called ``name``."""
    run, metric = findings.run, findings.run.metric
    steps, epochs = run.training_steps, run.rows["epoch"]
    if not steps or metric.name != name:
        return None
    figure, axes = new_axes("lower step", f"{metric.words}, target task")
    style = {"color": COLOURS["blue"]}
    axes.plot(*thin(*_column(steps, name), 100), label="training batches", **style)
    if epochs:
        step, values = _column(epochs, f"valid_{name}")
        best = run.best_epoch
        style = {"color": COLOURS["orange"]}
        axes.plot(step, values, ls="--", label="validation set", **style)
        axes.plot(step[best], values[best], "o", label="best checkpoint", **style)
        if any(row["phase"] == FINE_TUNING for row in epochs):
            start = max(row["step"] for row in epochs if row["phase"] != FINE_TUNING)
            style = {"color": COLOURS["faint"], "zorder": 0}
            axes.axvspan(start, step[-1], label="fine-tuning", **style)
    if run.reference is not None:
        style = {"color": COLOURS["muted"], "ls": ":"}
        label = f"{REFERENCE}, validation set"
        axes.axhline(run.reference.valid, label=label, **style)
    if name == "accuracy":
        axes.yaxis.set_major_formatter(PERCENT)
    axes.set_ylim(bottom=0)
    legend_below(figure, axes)
    return figure


def _hypergradient(findings):
    """The norm; and the residual of solvers that use curvature."""
    rows = findings.run.rows["upper"]
    if not rows:
        return None
    step, norm, residual, products = _column(rows, "hypergradient_norm", "residual", "products")
    panels = 1 + bool(np.any(products > 0))
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 1.4 * (panels - 1)), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    bound = findings.run.config.max_grad_norm or np.inf
    clipped = norm > bound
    style = {"ls": "", "ms": 4, "markeredgewidth": 0}
    axes[0].plot(step[~clipped], norm[~clipped], "o", color=COLOURS["blue"], label="norm", **style)
    if clipped.any():
        label = f"norm, clipped ({clipped.mean():.0%})"
        style |= {"color": COLOURS["orange"], "label": label}
        axes[0].plot(step[clipped], norm[clipped], "s", **style)
    if np.isfinite(bound):
        style = {"color": COLOURS["muted"], "ls": "--", "lw": 1}
        axes[0].axhline(bound, label=f"bound {bound:g}", **style)
    axes[0].set_ylabel("norm")
    if panels == 2:
        style = {"color": COLOURS["purple"], "ms": 4, "markeredgewidth": 0}
        axes[1].plot(step, residual, "^", **style)
        axes[1].axhline(1, color=COLOURS["muted"], ls="--", lw=1)
        axes[1].set_ylabel("solver's residual")
    for one, values in zip(axes, (norm, residual), strict=False):
        if not logarithmic(one.yaxis, values):
            one.set_ylim(bottom=0)
    axes[-1].set_xlabel("lower step")
    legend_below(figure, axes[0], columns=3)
    return figure


# --------------------------------------------------------------------------------------------------
# Which tasks count?
# --------------------------------------------------------------------------------------------------


def _tasks_ranked(findings):
    """A bar for each task; with many tasks, for each family of them (all bill shapes)."""
    tasks = findings.tasks
    if tasks is None or len(tasks) < 2:
        return None
    colours = np.array(_task_colours(findings), dtype=object)
    order = np.append(0, findings.order)
    bars = tasks.loc[order].assign(label=[readable(name) for name in tasks.name[order]])
    if families := len(tasks) - 1 > BARS:
        groups = tasks.loc[findings.order].groupby("family").mean_weight
        bars = groups.agg(mean_weight="mean", low="min", high="max", count="size").reset_index()
        bars["label"] = [
            f"{readable(f)} ({n})" for f, n in zip(bars.family, bars["count"], strict=True)
        ]
        bars = bars.sort_values("mean_weight", ascending=False).iloc[:BARS]
        bars = pd.concat([tasks.iloc[:1], bars])
    figure, axes = new_axes("mean weight", "", (SIZE[0], 1.1 + 0.175 * len(bars)))
    y = np.arange(len(bars))
    colours = [COLOURS["ink"]] + [COLOURS["blue"]] * (len(y) - 1) if families else colours[order]
    axes.barh(y, bars.mean_weight, color=colours, height=0.72)
    if "low" in bars:
        axes.hlines(y, bars.low, bars.high, color=COLOURS["muted"], lw=1)
    axes.set_yticks(y, ["target task", *(shortened(label, 27) for label in bars.label[1:])])
    handles = [
        Line2D([], [], color=COLOURS[colour], marker=marker, ls="", label=role)
        for role, (colour, marker) in _styles(findings).items()
        if findings.roles and not families
    ]
    if findings.run.schedule and len(tasks) > 2:
        start = np.nanmean(np.array(findings.run.schedule[0]["mean_weight"][1:], float))
        label = "auxiliary mean at the start"
        handles.append(axes.axvline(start, color=COLOURS["ink"], ls="--", lw=1, label=label))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def _tasks_history(findings):
    rows = findings.run.schedule
    if len(rows) < 2:
        return None
    step = np.array([row["step"] for row in rows])
    weights = np.array([row["mean_weight"] for row in rows], float)  # (T, K), NaN without labels
    figure, axes = new_axes("lower step", "mean weight of a task")
    colours = _task_colours(findings)
    for k in range(1, weights.shape[1]):
        axes.plot(*thin(step, weights[:, k], 60), color=colours[k], lw=0.6, alpha=0.45)
    for kind, (colour, marker) in _styles(findings).items():
        x, y = thin(step, weights[:, _kinds(findings)[kind]].mean(axis=1), 60)
        style = {"color": COLOURS[colour], "marker": marker, "markevery": max(1, len(x) // 6)}
        label = f"{kind}, mean" if findings.roles else kind
        axes.plot(x, y, lw=2.2 if findings.roles else 1.2, label=label, **style)
    axes.plot(*thin(step, weights[:, 0], 60), color=COLOURS["ink"], lw=2.2, label="target task")
    logarithmic(axes.yaxis, weights, ratio=8)
    legend_below(figure, axes)
    return figure


def _information(findings):
    tasks = findings.tasks
    if tasks is None or "class_information" not in tasks or len(tasks) < 4:
        return None
    if tasks.class_information.isna().all():
        return None
    x_label = f"the task's information on the {findings.aim} (bits)"
    figure, axes = new_axes(x_label, "mean weight")
    styles = _styles(findings) or {None: ("blue", "o")}
    for kind, (colour, marker) in styles.items():
        some = tasks.loc[_kinds(findings).get(kind, tasks.index[1:])]
        style = {"color": COLOURS[colour], "ms": 5, "alpha": 0.75, "ls": "", "label": kind}
        axes.plot(some.class_information, some.mean_weight, marker, **style)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    logarithmic(axes.yaxis, tasks.mean_weight[1:], ratio=8)
    legend_below(figure, axes, columns=4)
    return figure


# --------------------------------------------------------------------------------------------------
# Which samples count?
# --------------------------------------------------------------------------------------------------


def _target_losses(findings):
    """The distribution of target losses, where there are no weights to set against them."""
    labels = findings.labels
    if labels is None or findings.weighted or np.ptp(labels.loss) == 0:
        return None
    figure, axes = new_axes(_target_loss(findings), "samples")
    _histogram(axes, labels, "loss", np.linspace(labels.loss.min(), labels.loss.max(), 41))
    legend_below(figure, axes)
    return figure


def _target_loss(findings):
    """What a target loss is, for an axis."""
    unit = "squared, standardised" if findings.ranking.numbers else "nats"
    return f"target loss ({unit})"


def _samples(findings):
    """Target weight against target loss, with both distributions at the edges."""
    labels = findings.labels
    if not findings.weighted:
        return None
    figure = Figure(figsize=TALL, layout="constrained")
    parts = figure.subplot_mosaic(
        [["loss", "."], ["both", "weight"]], width_ratios=(3.4, 1), height_ratios=(1, 3)
    )
    parts["loss"].sharex(parts["both"])
    parts["weight"].sharey(parts["both"])
    shown = labels.sample(min(POINTS, len(labels)), random_state=0)
    for name, some, colour, marker in _groups(shown):
        style = {"ms": 3.2, "alpha": 0.55, "markeredgewidth": 0, "ls": ""}
        style |= {"color": COLOURS[colour], "label": f"{name}, {len(some):,} shown"}
        parts["both"].plot(some.loss, some.weight, marker, **style)
    log = logarithmic(parts["both"].yaxis, labels.weight)
    for name, spaced, turn in (
        ("loss", np.linspace, "vertical"),
        ("weight", np.geomspace if log else np.linspace, "horizontal"),
    ):
        edges = spaced(labels[name].min(), labels[name].max(), 41)
        _histogram(parts[name], labels, name, edges, turn)
        parts[name].grid(visible=False)
        parts[name].tick_params(labelbottom=False, labelleft=False, length=0, which="both")
    parts["both"].set_xlabel(_target_loss(findings))
    parts["both"].set_ylabel("target weight")
    legend_below(figure, parts["both"])
    return figure


def _histogram(axes, labels, column, edges, orientation="vertical"):
    for name, some, colour, _ in _groups(labels):
        style = {"bins": edges, "color": COLOURS[colour], "orientation": orientation}
        label = f"{name} ({len(some):,})"
        axes.hist(some[column], histtype="stepfilled", alpha=0.35, label=label, **style)
        axes.hist(some[column], histtype="step", lw=1.2, **style)


def _target_history(findings):
    rows = [row for row in findings.run.schedule if row["target_weight"]]
    if len(rows) < 2:
        return None
    figure, axes = new_axes("lower step", "target weight")
    groups = {"clean": ("label right", "blue", "-"), "corrupted": ("label wrong", "orange", "--")}
    if not any("corrupted" in row["target_weight"] for row in rows):
        groups = {"all": ("all samples", "blue", "-")}
    everything = []
    for key, (name, colour, line) in groups.items():
        some = [row for row in rows if key in row["target_weight"]]
        step = np.array([row["step"] for row in some])
        quantiles = np.array([row["target_weight"][key] for row in some]).T
        x = thin(step, step, 80)[0]
        low, middle, high = (thin(step, quantiles[i], 80)[1] for i in (0, 2, -1))
        axes.fill_between(x, low, high, color=COLOURS[colour], alpha=0.18, lw=0)
        axes.plot(x, middle, color=COLOURS[colour], ls=line, label=f"{name}: median")
        everything += [low, high]
    span = f"band: {QUANTILES[0]:.0%} to {QUANTILES[-1]:.0%}"
    axes.plot([], [], color=COLOURS["muted"], lw=6, alpha=0.3, label=span)
    logarithmic(axes.yaxis, np.concatenate(everything))
    legend_below(figure, axes)
    return figure


# --------------------------------------------------------------------------------------------------
# Which labels are wrong?
# --------------------------------------------------------------------------------------------------


def _wrong_labels(findings):
    """The share of wrong labels found by checking the most suspicious labels first."""
    labels = findings.labels
    if not findings.truth:
        return None
    figure, axes = new_axes("share of all labels checked", "share of wrong labels found", TALL)
    checked = np.linspace(0, 1, len(labels) + 1)
    looks = (("blue", "-"), ("orange", "--"), ("green", (0, (6, 1, 1, 1))), ("purple", "-"))
    looks = dict(zip(WORDS.values(), looks, strict=True))
    for name, (area, _) in findings.truth.items():
        order = np.argsort(-findings.scores[name].to_numpy(), kind="stable")
        found = np.append(0, np.cumsum(labels.wrong.to_numpy()[order])) / labels.wrong.sum()
        keep = np.unique(np.linspace(0, len(labels), 300).astype(int))
        colour, line = looks[name]
        label = f"by {name} (ROC area {area:.3f})"
        axes.plot(checked[keep], found[keep], color=COLOURS[colour], ls=line, label=label)
    style = {"color": COLOURS["muted"], "lw": 1}
    axes.plot([0, labels.wrong.mean(), 1], [0, 1, 1], label="perfect", ls="-.", **style)
    axes.plot([0, 1], [0, 1], label="chance", ls=":", **style)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(0, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)
    legend_below(figure, axes, columns=1)
    return figure


CHARTS = (
    Chart("losses", "Losses over training", _losses),
    Chart("accuracy", "Accuracy over training", partial(_metric, "accuracy")),
    Chart("rmse", "RMSE over training", partial(_metric, "rmse")),
    Chart("hypergradient", "The hypergradient", _hypergradient),
    Chart("tasks_ranked", "Tasks by mean weight", _tasks_ranked),
    Chart("tasks_history", "Mean weights of the tasks over training", _tasks_history),
    Chart("information", "Weights against information on the target", _information),
    Chart("samples", "Target weight and target loss of the samples", _samples),
    Chart("target_losses", "Target losses of the samples", _target_losses),
    Chart("target_history", "Target weights over training", _target_history),
    Chart("wrong_labels", "Finding wrong labels, the most suspicious first", _wrong_labels),
)
