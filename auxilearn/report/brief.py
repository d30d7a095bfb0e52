"""The report in a few sentences, each with a verdict: good, note or caution."""

from typing import NamedTuple

import numpy as np

from auxilearn.report.findings import WORDS
from auxilearn.report.names import readable
from auxilearn.report.run import REFERENCE
from auxilearn.run.build import FINE_TUNING

EQUAL = 0.01  # areas under ROC curves that differ by less are called equal
CHANCE = 0.05  # and within this of one half, next to chance
DIVERGES = 1.01  # residual of a solver from which it diverges, as training reports it
ALIKE = 1.1  # ratio of the largest and the smallest mean weight of tasks that are called alike


class Statement(NamedTuple):
    """verdict: good, note or caution. topic: a word or two. text: a few sentences."""

    verdict: str
    topic: str
    text: str


def statements(findings):
    """The ``Statement``s that ``findings`` support, in the order of the page."""
    makers = (_training, _reference, _upper_level, _tasks, _roles, _samples, _labels)
    return [made for maker in makers if (made := maker(findings)) is not None]


def _training(findings):
    run = findings.run
    epochs, summary, metric = run.rows["epoch"], run.summary, run.metric
    if not epochs:
        return Statement("caution", "Training", "No epoch has been completed yet.")
    best, key = run.best_epoch, f"valid_{metric.name}"
    text = (
        f"Validation {metric.words} went from {metric.short(epochs[0][key])} to "
        f"{metric.short(epochs[best][key])}, its best, in {_when(run, epochs[best])}"
    )
    if summary is None:
        text += f"; the run is not finished: it has completed {_when(run, epochs[-1])}."
        return Statement("note", "Training", text)
    text += f". Test {metric.words} {metric.short(summary[f'test_{metric.name}'])}."
    if best == 0 and len(epochs) > 1:
        text += " Validation has not improved since the first epoch."
        return Statement("caution", "Training", text)
    if best == len(epochs) - 1 and len(epochs) > 1:
        text += " Validation was still improving: train longer."
        return Statement("note", "Training", text)
    return Statement("good", "Training", text)


def _when(run, row):
    """epoch 3 of 20 of fine-tuning."""
    if row["phase"] == FINE_TUNING:
        return f"epoch {row['epoch']} of {run.config.dev_epochs} of fine-tuning"
    return f"epoch {row['epoch']} of {run.config.epochs}"


def _reference(findings):
    run, other = findings.run, findings.run.reference
    if run.config.method == REFERENCE or run.summary is None:
        return None
    if other is None:
        text = f"No finished run of {REFERENCE} (all weights 1) in this setting lies beside it."
        return Statement("note", "Baseline", text)
    metric, samples = run.metric, _tested(findings)
    own = run.summary[f"test_{metric.name}"]
    if metric.name == "accuracy":
        variance = sum(p * (1 - p) for p in (own, other.test)) / samples
        reached, gap = metric.short(other.test), f"{100 * abs(own - other.test):.1f} points "
        gap += "behind" if own < other.test else "ahead"
    else:  # of the root of the mean square of so many normal errors
        variance = sum(value**2 for value in (own, other.test)) / (2 * samples)
        reached, gap = f"RMSE {metric.short(other.test)}", f"{abs(own / other.test - 1):.1%} "
        gap += "above it, which is worse" if own > other.test else "below it, which is better"
    text = (
        f"{REFERENCE} (all weights 1, run {other.name}) reaches {reached} on the test set: this "
        f"run is {gap}."
    )
    if others := [name for name in other.differs if name != "seed"]:
        text += f" Its settings differ: {', '.join(others)}."
    elif other.differs:
        text += " Its seed differs."
    if abs(own - other.test) < 1.96 * np.sqrt(variance):
        text += f" With {samples:,} test {findings.inputs} and one run each, that is within chance."
        return Statement("note", "Baseline", text)
    better = metric.better(own, other.test)
    return Statement("good" if better else "caution", "Baseline", text)


def _tested(findings):
    """The number of test samples, where that is known of those with a target label."""
    if findings.evaluation is None:
        return findings.run.data["sets"]["test"]
    split = findings.evaluation.split
    return int(split.has_target[split.indices["test"]].sum())


def _upper_level(findings):
    rows = [row for row in findings.run.rows["upper"] if row["dev_loss"] is not None]
    if not rows:
        return None
    part = max(1, len(rows) // 10)
    first, last = (np.mean([row["dev_loss"] for row in r]) for r in (rows[:part], rows[-part:]))
    clipped = np.mean([row["clipped"] for row in rows])
    residual = [row["residual"] for row in rows if row["products"] and row["residual"] is not None]
    typical = np.median(residual) if residual else 0.0
    verdict = "good" if last < first else "caution"
    text = (
        f"The development loss went from {first:.2f} to {last:.2f} in {len(rows)} upper steps; "
        f"{clipped:.0%} of the hypergradients were clipped."
    )
    if clipped > 0.5:
        verdict = "caution"
        text += " Mostly the direction alone counts: a smaller --upper_lr may be steadier."
    if not any(row["products"] for row in rows):
        text += " The solver uses no curvature, so it has no residual."
    elif typical > DIVERGES:
        verdict = "caution"
        text += (
            f" The solver's residual is {typical:.2g}: it diverges. A smaller "
            "--neumann_alpha or --solver identity is safer."
        )
    elif typical > 0.9:
        text += (
            f" The solver's residual stays at {typical:.2f}: the hypergradients carry "
            "almost no curvature; --solver identity would point the same way."
        )
    return Statement(verdict, "Hypergradient", text)


def _tasks(findings):
    tasks = findings.tasks
    if tasks is None or len(tasks) < 2:
        return None
    order, weights = findings.order, tasks.mean_weight

    def listed(some):
        return ", ".join(f"{readable(tasks.name[k])} ({weights[k]:.2f})" for k in some)

    text = f"Most weight: {listed(order[:3])}."
    if len(order) > 5:
        text += f" Least: {listed(order[-3:])}."
    share = f", {tasks.share_of_loss[0]:.0%} of the scheduled loss" if "low" in tasks else ""
    text += f" The target task has {weights[0]:.2f}{share}."
    if _alike(findings):
        text += " The auxiliary tasks are within 10 % of each other, too close to be ranked."
        return Statement("caution", "Tasks", text)
    if findings.settledness is None:
        return Statement("note", "Tasks", text)
    start, half = findings.settledness
    if start > 0.9:
        text += (
            f" The ranking is still that of the untrained schedule (rank correlation {start:.2f}): "
            "it says nothing about the tasks yet."
        )
        return Statement("caution", "Tasks", text)
    state = "settled" if half > 0.9 else "still moving" if half < 0.7 else "mostly settled"
    text += f" Rank correlation with half time: {half:.2f} ({state})."
    return Statement("note", "Tasks", text)


def _alike(findings):
    """Whether the auxiliary tasks' mean weights are too close to be ranked."""
    weights = findings.tasks.mean_weight[findings.order]
    return len(weights) > 2 and weights.max() < ALIKE * weights.min()


def _roles(findings):
    """How well the weights tell the kinds of tasks apart, beside ranking tasks by their loss."""
    if findings.tasks is not None and _alike(findings):
        return None
    if findings.role_table:
        role, _, _, weight, loss = findings.role_table[0]
        text = (
            f"Attributes that are {role} outweigh the others in {weight:.0%} of all pairs, and "
            f"have the lower loss in {loss:.0%} (chance 50%)."
        )
        verdict, end = _compare(weight, loss)
        return Statement(verdict, "Kinds of task", f"{text} At telling them apart, {end}")
    if findings.information_correlation is None or np.isnan(findings.information_correlation[0]):
        return None
    weight, loss = findings.information_correlation
    text = (
        f"The rank correlation of a task's weight with its information on the {findings.aim} is "
        f"{weight:.2f} (of its low loss: {loss:.2f})."
    )
    return Statement("note", "Kinds of task", text)


def _compare(weight, loss, chance=0.5):
    """Verdict and end of a sentence on a ranking by weight beside one by loss."""
    if abs(weight - chance) < CHANCE and abs(loss - chance) < CHANCE:
        return "caution", "neither the schedule nor the plain loss is much better than chance."
    if weight < chance - EQUAL:
        return "caution", "the schedule is worse than chance: it has them the wrong way round."
    if weight < loss - EQUAL:
        return "caution", "the schedule is worse than the plain loss."
    if weight < loss + EQUAL:
        return "note", "the schedule is as good as the plain loss."
    return "good", "the schedule is better than the plain loss."


def _samples(findings):
    if findings.labels is None or findings.labels.weight.isna().all():
        return None
    if not findings.weighted:
        text = "All samples have the same target weight: this schedule does not tell them apart."
        return Statement("note", "Samples", text)
    low, high = np.quantile(findings.labels.weight, (0.05, 0.95))
    text = f"Nine in ten target weights lie between {low:.2f} and {high:.2f}"
    text += f", a factor of {high / low:.3g}." if low > 0 else "."
    if shares := findings.spread_of_samples:
        text += (
            f" {shares['loss']:.0%} of their spread comes from the loss factor, the only one that "
            "sees the label."
        )
    return Statement("note", "Samples", text)


def _labels(findings):
    """What the list of labels is worth. It goes by ``findings.ranking``, as the list itself."""
    labels, ranking = findings.labels, findings.ranking
    if labels is None:
        return None
    verdict, known = "note", ""
    if findings.truth:
        wrong, area = labels.wrong.sum(), {name: a for name, (a, _) in findings.truth.items()}
        known = f"{wrong:,} of {len(labels):,} labels ({wrong / len(labels):.0%}) are wrong. "
        areas = ", ".join(f"{a:.3f} by {name}" for name, a in area.items())
        known += f"Area under the ROC curve for finding them: {areas}. "
        weight, loss, margin = (area.get(WORDS[by]) for by in ("weight", "loss", "margin"))
        if weight is not None:
            verdict, end = _compare(weight, loss)
            known += f"At that, {end} "
            if verdict == "good" and margin is not None and margin > weight + EQUAL:
                verdict, known = "note", f"{known}The mean margin is better still. "
    if findings.weakness:
        verdict, known = "caution", f"{findings.weakness} {known}"
    elif not findings.truth:
        known = "None is known to be wrong here. "
    return Statement(verdict, "Wrong labels", f"{known}{ranking.reason} {ranking.verdict}")
