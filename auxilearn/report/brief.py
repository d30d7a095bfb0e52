"""The report in a few sentences, each with what to make of it: good, note or caution."""

from typing import NamedTuple

import numpy as np

from auxilearn.report.findings import ALIKE
from auxilearn.report.wording import readable
from auxilearn.run.config import fine_tunes

EQUAL = 0.01  # areas under ROC curves that differ by less are called equal
CHANCE = 0.05  # and within this of one half, next to chance


class Statement(NamedTuple):
    """verdict: good, note or caution. topic: a word or two. text: plain, a few sentences."""

    verdict: str
    topic: str
    text: str


def statements(findings):
    """The ``Statement``s that ``findings`` support, in the order of the page."""
    makers = (_training, _upper_level, _tasks, _roles, _samples, _wrong_labels)
    return [made for maker in makers for made in [maker(findings)] if made is not None]


def _training(findings):
    epochs, summary = findings.run.rows["epoch"], findings.run.summary
    if not epochs:
        return Statement("caution", "Training", "No epoch has been completed yet.")
    accuracy = [row["valid_accuracy"] for row in epochs]
    best = int(np.argmax(accuracy))
    text = (
        f"Validation accuracy went from {accuracy[0]:.1%} to {accuracy[best]:.1%}, its best, in "
        f"epoch {epochs[best]['epoch']} of {findings.run.config.epochs}"
    )
    if fine_tunes(findings.run.config):
        text += f" and {findings.run.config.dev_epochs} of fine-tuning"
    if summary is None:
        done = epochs[-1]["epoch"]
        return Statement("note", "Training", f"{text}; the run is at epoch {done}, not finished.")
    text += f"; test accuracy {summary['test_accuracy']:.1%}."
    if best == len(accuracy) - 1 and len(accuracy) > 1:
        return Statement("note", "Training", f"{text} It was still rising: train longer.")
    return Statement("good", "Training", text)


def _upper_level(findings):
    rows = [row for row in findings.run.rows["upper"] if row["dev_loss"] is not None]
    if not rows:
        return None
    part = max(1, len(rows) // 10)
    first, last = (np.mean([row["dev_loss"] for row in r]) for r in (rows[:part], rows[-part:]))
    clipped = np.mean([row["clipped"] for row in rows])
    series = findings.run.config.solver == "neumann"
    residual = [row["residual"] for row in rows if series and row["residual"] is not None]
    text = (
        f"The development loss went from {first:.2f} to {last:.2f} in {len(rows)} upper steps; "
        f"{clipped:.0%} of the hypergradients were clipped."
    )
    verdict = "good" if last < first else "caution"
    if clipped > 0.5:
        verdict = "caution"
        text += " Mostly the direction alone counts: a smaller --aux_lr may be steadier."
    if residual and np.median(residual) > 1:
        verdict = "caution"
        text += (
            f" The solver's residual is {np.median(residual):.2g}: the series diverges; a smaller "
            "--neumann_alpha or --solver identity is safer."
        )
    elif residual and np.median(residual) > 0.9:
        text += (
            f" The solver's residual stays at {np.median(residual):.2f}: the hypergradients carry "
            "next to no curvature, --solver identity would point the same way."
        )
    return Statement(verdict, "Upper level", text)


def _tasks(findings):
    tasks = findings.tasks
    if tasks is None or len(tasks.names) < 2:
        return None
    order = tasks.order.tolist()

    def listed(some):
        return ", ".join(f"{readable(tasks.names[k])} ({tasks.mean[k]:.2f})" for k in some)

    text = f"Most weight: {listed(order[:3])}."
    if len(order) > 5:
        text += f" Least: {listed(order[-3:])}."
    text += f" The target's is {tasks.mean[0]:.2f}"
    text += "." if tasks.share is None else f", {tasks.share[0]:.0%} of the scheduled loss."
    if len(order) > 3 and tasks.mean[1:].max() < ALIKE * tasks.mean[1:].min():
        text += " All are within 10 % of each other: the schedule has hardly left its start."
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
    text += f" The ranking's correlation with that at half time is {half:.2f}"
    text += ": settled." if half > 0.9 else ": still moving." if half < 0.7 else "."
    return Statement("note", "Tasks", text)


def _roles(findings):
    """How well the weights tell the kinds of tasks apart, beside ranking tasks by their loss."""
    if findings.role_separation is not None:
        role, weight, loss = findings.role_separation
        text = (
            f"Attributes that are {role} outweigh the others in {weight:.0%} of all pairs, and "
            f"have the lower loss in {loss:.0%} (chance 50%)."
        )
        verdict, end = _compare(weight, loss, 0.5)
        return Statement(verdict, "Kinds of task", f"{text} Telling them apart, {end}")
    if findings.information_correlation is None or np.isnan(findings.information_correlation[0]):
        return None
    weight, loss = findings.information_correlation
    text = (
        "The rank correlation of a task's weight with what its attribute says about the class is "
        f"{weight:.2f} (of its low loss: {loss:.2f})."
    )
    return Statement("note", "Kinds of task", text)


def _compare(weight, loss, chance):
    """Verdict and end of a sentence on a ranking by weight beside one by loss."""
    if abs(weight - chance) < CHANCE and abs(loss - chance) < CHANCE:
        return "caution", "neither the schedule nor the plain loss is much better than chance."
    if weight < chance - EQUAL:
        return "caution", "the schedule does worse than chance: it has them the wrong way round."
    if weight < loss - EQUAL:
        return "caution", "the schedule does worse than the plain loss."
    if weight < loss + EQUAL:
        return "note", "the schedule does as well as the plain loss."
    return "good", "the schedule does better than the plain loss."


def _samples(findings):
    target = findings.target
    if target is None or target.weight is None:
        return None
    if not target.tells_samples_apart:
        text = "All samples have the same target weight: this schedule does not tell them apart."
        return Statement("note", "Samples", text)
    low, high = np.quantile(target.weight, (0.05, 0.95))
    text = f"Nine in ten target weights lie between {low:.2f} and {high:.2f}"
    text += f", a factor of {high / low:.3g}." if low > 0 else "."
    if shares := findings.spread_of_samples:
        text += (
            f" {shares['loss']:.0%} of their spread comes from the loss factor, the only one that "
            f"sees the label, {max(shares['feature'], 0):.0%} from the features."
        )
    return Statement("note", "Samples", text)


def _wrong_labels(findings):
    target = findings.target
    if target is None:
        return None
    if not findings.truth:
        by = findings.ranking
        if number := int(target.suspected(by).sum()):
            text = f"{number:,} of {len(target.place):,} labels are suspected, going by {by}. "
        else:
            text = f"No label stands out: the first ones by {by} are the best guess. "
        text += "None is known to be wrong here: look at the pictures"
        text += "." if target.weight is None else ", and compare both rankings."
        return Statement("note", "Wrong labels", text)
    share = target.wrong.mean()
    loss = findings.truth["target loss, highest first"][0]
    known = f"{target.wrong.sum():,} of {len(target.wrong):,} labels ({share:.0%}) are wrong."
    if target.weight is None:
        return Statement(
            "note", "Wrong labels", f"{known} High loss finds them with area {loss:.2f}."
        )
    weight = findings.truth["target weight, lowest first"][0]
    text = (
        f"{known} Area under the ROC curve for finding them: {weight:.3f} by low target weight, "
        f"{loss:.3f} by high loss."
    )
    verdict, end = _compare(weight, loss, 0.5)
    text += f" Finding wrong labels, {end}"
    if verdict == "caution" and loss > 0.5 + CHANCE:
        text += " Go by the loss instead."
    return Statement(verdict, "Wrong labels", text)
