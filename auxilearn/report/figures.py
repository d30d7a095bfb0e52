"""The report's charts: what each shows of a run's findings.

Importing this module imports matplotlib.
"""

import io
from collections.abc import Callable
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from auxilearn.report.statistics import (
    auroc,
    average_precision,
    precision_recall,
    roc_curve,
)
from auxilearn.report.style import (
    COLOURS,
    MARKERS,
    SERIES,
    SIZE,
    STYLE,
    column,
    curve,
    for_page,
    logarithmic,
    new_axes,
    sample,
    thin,
    unit_axes,
)
from auxilearn.report.wording import readable, shortened
from auxilearn.run.history import QUANTILES

DPI = 144  # of the PNG files
BARS = 40  # most bars of a ranking


class Chart(NamedTuple):
    """name: of the files. title: what it shows. draw: findings -> Figure, or None where there is
    nothing to show."""

    name: str
    title: str
    draw: Callable


def draw_charts(findings, directory):
    """Draw every chart that ``findings`` have something for into ``directory``, NAME.png and
    NAME.svg. Returns {name: (title, SVG for a page)}."""
    directory.mkdir(exist_ok=True)
    drawn = {}
    with mpl.rc_context(STYLE):
        for chart in CHARTS:
            figure = chart.draw(findings)
            for suffix in ("png", "svg"):
                (directory / f"{chart.name}.{suffix}").unlink(missing_ok=True)
            if figure is None:
                continue
            figure.suptitle(chart.title, x=0.01, ha="left", fontsize=10, fontweight="bold")
            figure.dpi = DPI
            # Printed by their canvases: savefig would draw everything twice.
            FigureCanvasAgg(figure).print_png(directory / f"{chart.name}.png")
            figure.set_layout_engine("none")  # it has done its work: once is enough
            text = io.StringIO()
            described = {"Date": None, "Title": chart.title}
            FigureCanvasSVG(figure).print_svg(text, metadata=described)
            (directory / f"{chart.name}.svg").write_text(text.getvalue(), encoding="utf-8")
            drawn[chart.name] = (chart.title, for_page(text.getvalue(), chart.name, chart.title))
    return drawn


# --------------------------------------------------------------------------------------------------
# Pieces
# --------------------------------------------------------------------------------------------------


def _groups(target):
    """[(name, mask, colour, marker)]: clean and wrong labels, or all samples as one."""
    if target.wrong is None:
        return [("all samples", np.ones(len(target.place), dtype=bool), "blue", "o")]
    return [
        ("label right", ~target.wrong, "blue", "o"),
        ("label wrong", target.wrong, "orange", "s"),
    ]


def _role_colours(tasks):
    """{role: (colour, marker)}, {} where there are no roles."""
    if tasks.roles is None or tasks.information is None:
        return {}
    styles = zip(SERIES, MARKERS, strict=True)
    return dict(zip(tasks.role_order, styles, strict=False))


def _task_colours(tasks):
    """A colour for every task, the target ink."""
    roles = _role_colours(tasks)
    if not roles:
        return ["ink"] + ["blue"] * (len(tasks.names) - 1)
    return ["ink"] + [roles.get(role, ("muted", "o"))[0] for role in tasks.roles]


def _role_legend(axes, tasks, **options):
    """A legend of the roles and of whatever else was drawn with a label."""
    handles = [
        mpl.lines.Line2D([], [], color=COLOURS[colour], marker=marker, ls="", label=role)
        for role, (colour, marker) in _role_colours(tasks).items()
    ]
    handles += axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(handles=handles, **options)


# --------------------------------------------------------------------------------------------------
# Did it train
# --------------------------------------------------------------------------------------------------


def _scheduled_steps(run):
    """Rows of the lower steps before fine-tuning, whose losses are of other images and one task."""
    rows, last = run.rows["step"], run.config.epochs
    return [r for r in rows if not isinstance(r.get("epoch"), int) or r["epoch"] <= last]


def _losses(findings):
    rows, steps = findings.run.rows, _scheduled_steps(findings.run)
    if not steps:
        return None
    figure, axes = new_axes("lower step", "mean cross entropy (nats)")
    step, target, other = column(steps, "target_loss", "aux_loss")
    axes.plot(*thin(step, target), color=COLOURS["blue"], label="target task, training")
    if np.any(other > 0):
        label = "auxiliary tasks, training"
        axes.plot(*thin(step, other), color=COLOURS["green"], ls=":", label=label)
    if rows["upper"]:
        step, dev = column(rows["upper"], "dev_loss")
        label = "target task, development set"
        axes.plot(*thin(step, dev, 150), color=COLOURS["orange"], ls="--", label=label)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _accuracy(findings):
    rows, steps = findings.run.rows, _scheduled_steps(findings.run)
    if not steps:
        return None
    figure, axes = new_axes("lower step", "accuracy, target task")
    step, accuracy = column(steps, "accuracy")
    axes.plot(*thin(step, accuracy, 100), color=COLOURS["blue"], label="training batches")
    if rows["epoch"]:
        step, accuracy = column(rows["epoch"], "valid_accuracy")
        label = "validation set"
        axes.plot(step, accuracy, color=COLOURS["orange"], ls="--", label=label)
        best = int(np.nanargmax(accuracy))
        axes.plot(step[best], accuracy[best], "o", color=COLOURS["orange"], label="best checkpoint")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _scheduled_loss(findings):
    steps = _scheduled_steps(findings.run)
    if not steps or not findings.run.method.bilevel:
        return None
    step, loss = column(steps, "loss")
    figure, axes = new_axes("lower step", "scheduled loss")
    axes.plot(*thin(step, loss), color=COLOURS["blue"])
    logarithmic(axes.yaxis, loss)
    return figure


def _hypergradient(findings):
    rows = findings.run.rows["upper"]
    if not rows:
        return None
    step, norm = column(rows, "hypergradient_norm")
    bound = findings.run.config.max_grad_norm or np.inf
    figure, axes = new_axes("lower step", "norm of the hypergradient")
    clipped = norm > bound
    points = {"ls": "", "ms": 4, "markeredgewidth": 0}
    step_kept, norm_kept = step[~clipped], norm[~clipped]
    axes.plot(step_kept, norm_kept, "o", color=COLOURS["blue"], label="as it is", **points)
    if clipped.any():
        label = f"clipped ({clipped.mean():.0%})"
        axes.plot(step[clipped], norm[clipped], "s", color=COLOURS["orange"], label=label, **points)
    if np.isfinite(bound):
        axes.axhline(bound, color=COLOURS["muted"], ls="--", lw=1, label=f"bound {bound:g}")
    logarithmic(axes.yaxis, norm)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _residual(findings):
    rows = findings.run.rows["upper"]
    step, residual = column(rows, "residual")
    if not np.isfinite(residual).any():
        return None
    figure, axes = new_axes("lower step", "relative residual of the solver")
    axes.plot(step, residual, "o", ms=4, markeredgewidth=0, color=COLOURS["blue"])
    axes.axhline(1, color=COLOURS["muted"], ls="--", lw=1)
    logarithmic(axes.yaxis, residual)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    return figure


# --------------------------------------------------------------------------------------------------
# Which tasks count
# --------------------------------------------------------------------------------------------------


def _tasks_ranked(findings):
    tasks = findings.tasks
    if tasks is None or len(tasks.names) < 2:
        return None
    order = tasks.order
    if len(order) > BARS:
        order = np.append(order[: BARS // 2], order[-BARS // 2 :])
    order = np.append(0, order)
    colours = [COLOURS[_task_colours(tasks)[k]] for k in order]
    figure, axes = new_axes("mean weight", "", (4.7, 0.9 + 0.175 * len(order)))
    y = np.arange(len(order))
    axes.barh(y, tasks.mean[order], color=colours, height=0.72)
    if tasks.low is not None:
        axes.hlines(y, tasks.low[order], tasks.high[order], color=COLOURS["muted"], lw=1)
    names = [shortened(readable(tasks.names[k]), 27) for k in order]
    axes.set_yticks(y, ["target task", *names[1:]])
    if len(tasks.names) - 1 > BARS:
        axes.axhline(BARS / 2 + 0.5, color=COLOURS["muted"], ls=":", lw=1.5)
    start = _mean_weights(findings)
    if start is not None:
        label = "mean at the start"
        axes.axvline(start[1][0, 1:].mean(), color=COLOURS["ink"], ls="--", lw=1, label=label)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    _role_legend(axes, tasks, loc="lower right")
    return figure


def _mean_weights(findings):
    """(steps (T,), mean weights (T, K)) over training, or None."""
    rows = findings.run.schedule
    if not rows:
        return None
    step = np.array([row["step"] for row in rows])
    return step, np.array([row["mean_weight"] for row in rows])


def _tasks_history(findings):
    history, tasks = _mean_weights(findings), findings.tasks
    if history is None or tasks is None or len(history[0]) < 2:
        return None
    step, weights = history
    figure, axes = new_axes("lower step", "mean weight of a task")
    colours = _task_colours(tasks)
    for k in tasks.order:
        axes.plot(*thin(step, weights[:, k], 60), color=COLOURS[colours[k]], lw=0.6, alpha=0.45)
    for role, (colour, marker) in _role_colours(tasks).items():
        mean = weights[:, tasks.members_by_role[role]].mean(axis=1)
        x, y = thin(step, mean, 60)
        style = {"color": COLOURS[colour], "marker": marker, "markevery": max(1, len(x) // 6)}
        axes.plot(x, y, lw=2.2, label=f"{role}, mean", **style)
    axes.plot(*thin(step, weights[:, 0], 60), color=COLOURS["ink"], lw=2.2, label="target task")
    logarithmic(axes.yaxis, weights, ratio=8)
    axes.legend(loc="upper left")
    return figure


def _tasks_ranking(findings):
    history, tasks = _mean_weights(findings), findings.tasks
    if history is None or tasks is None or len(history[0]) < 3 or len(tasks.names) < 4:
        return None
    step, weights = history
    keep = np.unique(np.linspace(0, len(step) - 1, 25).astype(int))
    rank = 1 + np.argsort(np.argsort(-weights[keep, 1:], axis=1, kind="stable"), axis=1)
    figure, axes = new_axes("lower step", "rank by mean weight", (4.7, 3.4))
    last = np.argsort(rank[-1])
    shown = [*last[:4], *last[-2:]] if len(last) > 6 else list(last)
    for k in range(rank.shape[1]):
        if k not in shown and rank.shape[1] <= 120:
            axes.plot(step[keep], rank[:, k], color=COLOURS["faint"], lw=1)
    for number, k in enumerate(shown):
        colour = COLOURS[SERIES[number]]
        axes.plot(step[keep], rank[:, k], color=colour, lw=2, marker=MARKERS[number], ms=3.5)
    # Names stand beside the curves' ends, moved apart where these are too close.
    gap = rank.shape[1] / 17
    ends = np.array([rank[-1, k] for k in shown], dtype=float)
    for i in range(1, len(ends)):
        ends[i] = max(ends[i], ends[i - 1] + gap)
    for i in reversed(range(len(ends))):
        limit = rank.shape[1] if i == len(ends) - 1 else ends[i + 1] - gap
        ends[i] = min(ends[i], limit)
    for number, (k, end) in enumerate(zip(shown, ends, strict=True)):
        name = shortened(readable(tasks.names[k + 1]), 22)
        axes.annotate(
            name,
            (1.02, end),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=COLOURS[SERIES[number]],
            annotation_clip=False,
        )
    axes.set_ylim(rank.shape[1] + 0.7, 0.3)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=2))
    return figure


def _tasks_families(findings):
    tasks = findings.tasks
    if tasks is None or len(tasks.names) < 3:
        return None
    members = {}
    for k in tasks.order.tolist():
        members.setdefault(tasks.families[k], []).append(k)
    order = sorted(members, key=lambda name: -tasks.mean[members[name]].mean())
    if len(order) == len(tasks.names) - 1 and len(order) > 1:
        return None  # every family has one member: nothing that the ranking does not show
    if len(order) > BARS:
        order = order[: BARS // 2] + order[-BARS // 2 :]
    figure, axes = new_axes("mean weight", "", (4.7, 0.9 + 0.175 * len(order)))
    styles = _role_colours(tasks)
    for y, name in enumerate(order):
        for k in members[name]:
            colour, marker = (
                styles.get(tasks.roles[k - 1], ("muted", "o")) if styles else ("blue", "o")
            )
            axes.plot(tasks.mean[k], y, marker, color=COLOURS[colour], ms=4.5, alpha=0.8)
        axes.vlines(tasks.mean[members[name]].mean(), y - 0.32, y + 0.32, COLOURS["ink"], lw=2)
    labels = [f"{shortened(readable(name), 25)} ({len(members[name])})" for name in order]
    axes.set_yticks(range(len(order)), labels)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    logarithmic(axes.xaxis, tasks.mean[1:], ratio=8)
    _role_legend(axes, tasks, loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------
# Which samples count
# --------------------------------------------------------------------------------------------------


def _target_weights(findings):
    target = findings.target
    if target is None or not target.tells_samples_apart:
        return None
    return _histogram(target, target.weight, "target weight of a sample")


def _target_losses(findings):
    target = findings.target
    if target is None or np.ptp(target.loss) == 0:
        return None
    return _histogram(target, target.loss, "target loss of a sample (nats)", ratio=np.inf)


def _histogram(target, values, label, ratio=20):
    """Samples by ``values``; logarithmic where positive ones span more than ``ratio``."""
    figure, axes = new_axes(label, "samples")
    wide = values.min() > 0 and values.max() > ratio * values.min()
    edges = (np.geomspace if wide else np.linspace)(values.min(), values.max(), 41)
    for name, mask, colour, _ in _groups(target):
        label = f"{name} ({mask.sum():,})"
        style = {"bins": edges, "color": COLOURS[colour]}
        axes.hist(values[mask], histtype="stepfilled", alpha=0.35, label=label, **style)
        axes.hist(values[mask], histtype="step", lw=1.5, **style)
    if wide:
        logarithmic(axes.xaxis, values)
    axes.legend()
    return figure


def _weight_and_loss(findings):
    target = findings.target
    if target is None or not target.tells_samples_apart:
        return None
    figure, axes = new_axes("target loss (nats)", "target weight")
    chosen = np.zeros(len(target.place), dtype=bool)
    chosen[sample(len(chosen))] = True
    for name, mask, colour, marker in _groups(target):
        mask = mask & chosen
        style = {"ms": 3.2, "alpha": 0.55, "markeredgewidth": 0, "ls": ""}
        colour = COLOURS[colour]
        axes.plot(target.loss[mask], target.weight[mask], marker, color=colour, label=name, **style)
    logarithmic(axes.yaxis, target.weight)
    axes.legend(loc="best")
    return figure


def _target_history(findings):
    rows = [row for row in findings.run.schedule if row.get("target_weight")]
    if len(rows) < 2:
        return None
    figure, axes = new_axes("lower step", "target weight in training batches")
    known = any("corrupted" in row["target_weight"] for row in rows)
    groups = [("all", "all samples", "blue", "-")]
    if known:
        groups = [
            ("clean", "label right", "blue", "-"),
            ("corrupted", "label wrong", "orange", "--"),
        ]
    everything = []
    for key, name, colour, line in groups:
        some = [row for row in rows if key in row["target_weight"]]
        if not some:
            continue
        step = np.array([row["step"] for row in some], dtype=float)
        quantiles = np.array([row["target_weight"][key] for row in some]).T  # (5, T)
        x = thin(step, step, 80)[0]
        low, middle, high = (thin(step, quantiles[i], 80)[1] for i in (0, 2, 4))
        axes.fill_between(x, low, high, color=COLOURS[colour], alpha=0.18, lw=0)
        axes.plot(x, middle, color=COLOURS[colour], ls=line, label=f"{name}: median")
        everything += [low, high]
    span = f"band: {QUANTILES[0]:.0%} to {QUANTILES[-1]:.0%}"
    axes.plot([], [], color=COLOURS["muted"], lw=6, alpha=0.3, label=span)
    logarithmic(axes.yaxis, np.concatenate(everything))
    axes.legend(loc="best")
    return figure


# --------------------------------------------------------------------------------------------------
# Against the truth
# --------------------------------------------------------------------------------------------------


def _rankings(findings):
    """[(name, score, colour, line)] of what wrong labels are ranked by; [] if none is known."""
    target = findings.target
    if not findings.truth:
        return []
    rankings = [("by high target loss", target.loss, "orange", "--")]
    if target.weight is not None:
        rankings.insert(0, ("by low target weight", -target.weight, "blue", "-"))
    return rankings


def _roc(findings):
    rankings = _rankings(findings)
    if not rankings:
        return None
    figure, axes = new_axes("share of right labels taken for wrong", "share of wrong labels found")
    for name, score, colour, line in rankings:
        label = f"{name}: area {auroc(score, findings.target.wrong):.3f}"
        x, y = curve(*roc_curve(score, findings.target.wrong))
        axes.plot(x, y, color=COLOURS[colour], ls=line, label=label)
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], lw=1, ls=":", label="chance: area 0.5")
    unit_axes(axes)
    axes.legend(loc="lower right")
    return figure


def _precision_recall(findings):
    rankings = _rankings(findings)
    if not rankings:
        return None
    wrong = findings.target.wrong
    figure, axes = new_axes("recall: share of wrong labels found", "precision: share found wrong")
    for name, score, colour, line in rankings:
        label = f"{name}: mean {average_precision(score, wrong):.3f}"
        x, y = curve(*precision_recall(score, wrong))
        axes.plot(x, y, color=COLOURS[colour], ls=line, label=label)
    style = {"color": COLOURS["muted"], "lw": 1, "ls": ":"}
    axes.axhline(wrong.mean(), label=f"chance: {wrong.mean():.3f}", **style)
    unit_axes(axes)
    axes.legend(loc="lower left")
    return figure


def _roles(findings):
    tasks = findings.tasks
    if tasks is None or not _role_colours(tasks):
        return None
    styles = _role_colours(tasks)
    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rng = np.random.default_rng(0)
    for axes, values, label in (
        (left, tasks.mean, "mean weight"),
        (right, tasks.loss, "mean loss (nats)"),
    ):
        for y, (role, (colour, marker)) in enumerate(styles.items()):
            members = tasks.members_by_role[role]
            jitter = y + rng.uniform(-0.22, 0.22, len(members))
            style = {"color": COLOURS[colour], "ms": 4.5, "alpha": 0.7, "ls": ""}
            axes.plot(values[members], jitter, marker, **style)
            axes.vlines(np.mean(values[members]), y - 0.36, y + 0.36, COLOURS["ink"], lw=2)
        axes.set_xlabel(label)
        logarithmic(axes.xaxis, values[1:], ratio=8)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    left.set_yticks(range(len(styles)), [shortened(role, 14) for role in styles])
    left.set_ylim(len(styles) - 0.5, -0.5)
    return figure


def _information(findings):
    tasks = findings.tasks
    if tasks is None or tasks.information is None or len(tasks.names) < 4:
        return None
    figure, axes = new_axes("what the attribute says about the class (bits)", "mean weight")
    styles = _role_colours(tasks)
    for role, (colour, marker) in (styles or {"": ("blue", "o")}).items():
        members = tasks.members_by_role[role] if styles else tasks.order
        style = {"color": COLOURS[colour], "ms": 5, "alpha": 0.75, "ls": "", "label": role or None}
        axes.plot(tasks.information[members], tasks.mean[members], marker, **style)
    logarithmic(axes.yaxis, tasks.mean[1:], ratio=8)
    if styles:
        axes.legend(loc="upper left")
    return figure


# --------------------------------------------------------------------------------------------------
# Where the weights come from
# --------------------------------------------------------------------------------------------------

FACTOR_STYLES = {"feature": ("blue", "o"), "loss": ("orange", "s"), "task": ("green", "^")}


def _factors_tasks(findings):
    if findings.evaluation is None or not findings.evaluation.table.factors:
        return None
    tasks, factors = findings.tasks, findings.mean_factors
    order = np.append(0, tasks.order)
    figure, axes = new_axes("tasks, the target first, then by mean weight", "mean over the samples")
    x = np.arange(len(order))
    for name, (colour, marker) in FACTOR_STYLES.items():
        style = {"color": COLOURS[colour], "ms": 3.5, "lw": 0.7, "label": f"{name} factor"}
        axes.plot(x, factors[name][order], marker=marker, **style)
    axes.plot(x, tasks.mean[order], color=COLOURS["ink"], lw=2, label="weight")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    everything = [*factors.values(), tasks.mean]
    logarithmic(axes.yaxis, np.concatenate(everything), ratio=8)
    axes.legend(loc="best")
    return figure


def _factors_spread(findings):
    shares = {
        "between samples\n(target task)": findings.spread_of_samples,
        "between\nauxiliary tasks": findings.spread_of_tasks,
    }
    shares = {name: values for name, values in shares.items() if values}
    if not shares:
        return None
    figure, axes = new_axes("share of the spread of log weights", "")
    ticks = []
    y = 0.0
    for name, values in shares.items():
        for factor, share in values.items():
            axes.barh(y, share, color=COLOURS[FACTOR_STYLES[factor][0]], height=0.8)
            text = f"{factor} factor {share:.0%}"
            inside = share > 0.55
            axes.annotate(
                text,
                (share if share > 0 else 0, y),
                xytext=(-5 if inside else 5, 0),
                textcoords="offset points",
                ha="right" if inside else "left",
                va="center",
                color=COLOURS["paper" if inside else "ink"],
            )
            y += 1
        ticks.append((y - (len(values) + 1) / 2, name))
        y += 0.8
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.invert_yaxis()
    axes.axvline(0, color=COLOURS["muted"], lw=1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def _factors_samples(findings):
    target = findings.target
    if target is None or not {"feature", "loss"} <= target.factors.keys():
        return None
    figure, axes = new_axes("feature factor, target task", "loss factor, target task")
    chosen = np.zeros(len(target.place), dtype=bool)
    chosen[sample(len(chosen))] = True
    feature, loss = target.factors["feature"], target.factors["loss"]
    for name, mask, colour, marker in _groups(target):
        mask = mask & chosen
        style = {"ms": 3.2, "alpha": 0.55, "markeredgewidth": 0, "ls": ""}
        axes.plot(feature[mask], loss[mask], marker, color=COLOURS[colour], label=name, **style)
    axes.legend(loc="best")
    return figure


CHARTS = (
    Chart("losses", "Target and auxiliary losses over training", _losses),
    Chart("accuracy", "Accuracy over training", _accuracy),
    Chart("scheduled_loss", "The loss that the lower level minimises", _scheduled_loss),
    Chart("hypergradient", "Norm of the hypergradient", _hypergradient),
    Chart("residual", "Residual of the inverse Hessian's solver", _residual),
    Chart("tasks_ranked", "Tasks by mean weight", _tasks_ranked),
    Chart("tasks_history", "Mean weights of the tasks over training", _tasks_history),
    Chart("tasks_ranking", "How the ranking of the tasks moved", _tasks_ranking),
    Chart("tasks_families", "Attribute families by mean weight", _tasks_families),
    Chart("target_weights", "Distribution of the target weights", _target_weights),
    Chart("target_losses", "Distribution of the target losses", _target_losses),
    Chart("weight_and_loss", "Weight against loss, target task", _weight_and_loss),
    Chart("target_history", "Target weights over training", _target_history),
    Chart("roc", "Finding wrong labels: ROC", _roc),
    Chart("precision_recall", "Finding wrong labels: precision and recall", _precision_recall),
    Chart("roles", "Roles of the attributes, by weight and by loss", _roles),
    Chart("information", "Weights against what an attribute says about the class", _information),
    Chart("factors_tasks", "The factors of the weights, task by task", _factors_tasks),
    Chart("factors_spread", "What makes weights differ", _factors_spread),
    Chart("factors_samples", "The factors of the target weights", _factors_samples),
)
