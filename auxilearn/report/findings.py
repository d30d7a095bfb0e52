"""What the report says about a run, in numbers; figures, tables and page only show it."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from auxilearn.report.run import Evaluation, Run
from auxilearn.report.statistics import (
    auroc,
    average_precision,
    class_information,
    correlation,
    family,
    ranks,
    spread_shares,
    two_groups,
)

APART = 2  # separation of two groups of samples from which one is suspected
FALLING = -0.5  # rank correlation of weight and loss from which weights are about labels
ALIKE = 1.1  # ratio of the largest and the smallest weight up to which they say nothing


@dataclass(frozen=True)
class Tasks:
    """The K tasks, the target first. Arrays are (K,), or None where they are not known.

    ``low`` and ``high`` are the 5 and 95 % quantiles of a task's weights over the samples,
    ``spread`` is their standard deviation. ``information`` is what an attribute says about the
    class, in bits (NaN for the target).
    """

    names: list[str]
    mean: np.ndarray
    spread: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    factor: np.ndarray | None = None  # the schedule's task factor
    loss: np.ndarray | None = None  # mean loss
    share: np.ndarray | None = None  # of the scheduled loss
    information: np.ndarray | None = None
    roles: list[str] | None = None  # of the attributes, K - 1 words

    @property
    def families(self):
        return [family(name) for name in self.names]

    @property
    def order(self):
        """Auxiliary tasks, numbers 1 .. K - 1, from the highest mean weight to the lowest."""
        return 1 + np.argsort(-self.mean[1:], kind="stable")

    @property
    def role_order(self):
        """The words for roles, the one whose attributes say most about the class first."""
        members = self.members_by_role
        return sorted(members, key=lambda role: -np.mean(self.information[members[role]]))

    @property
    def members_by_role(self):
        return {
            role: np.array([k for k, word in enumerate(self.roles, start=1) if word == role])
            for role in sorted(set(self.roles or []))
        }


@dataclass(frozen=True)
class Target:
    """The m samples that have a target label. Arrays are (m,).

    ``place`` in the training set; ``weight`` is None without a schedule; ``wrong`` (given label is
    not the data's) is None where no label was corrupted.
    """

    place: np.ndarray
    weight: np.ndarray | None
    loss: np.ndarray
    label: np.ndarray
    given: np.ndarray
    prediction: np.ndarray
    wrong: np.ndarray | None
    factors: dict[str, np.ndarray] = field(default_factory=dict)  # feature, loss

    @cached_property
    def suspicion(self):
        """{what samples are ranked by: (m,) scores, the most suspicious highest}."""
        scores = {} if self.weight is None else {"weight": -self.weight}
        return scores | {"loss": self.loss}

    @property
    def tells_samples_apart(self):
        """Whether the schedule gives different samples different weights."""
        return self.weight is not None and np.ptp(self.weight) > 1e-6 * np.abs(self.weight).max()

    @property
    def are_alike(self):
        """Whether all target weights lie within 10 % of each other."""
        return self.weight.max() <= ALIKE * self.weight.min()

    @cached_property
    def falls_with_loss(self):
        """Rank correlation of target weight and target loss; NaN without either's spread."""
        return np.nan if self.weight is None else correlation(self.weight, self.loss)

    def quality(self, by):
        """A label's quality (m,) in (0, 1]: its rank, the most suspicious lowest."""
        return ranks(-self.suspicion[by]) / len(self.place)

    @cached_property
    def groups(self):
        """{what samples are ranked by: (separation, chances)} of ``two_groups`` of the scores."""
        scores = {"loss": self.loss}
        if self.weight is not None:
            scores["weight"] = -np.log(np.maximum(self.weight, 1e-30))
        return {by: two_groups(score) for by, score in scores.items()}

    def suspected(self, by):
        """Which labels (m,) are suspected: the model predicts another class, and the samples fall
        into two groups, of which this one belongs to the more suspicious. None otherwise."""
        separation, chance = self.groups[by]
        apart = separation > APART
        return apart & (chance > 0.5) & (self.prediction != self.given)

    def order(self, by):
        """Samples from the most to the least suspicious; equally suspicious ones by loss."""
        return np.lexsort((-self.loss, -self.suspicion[by]))


@dataclass(frozen=True)
class Findings:
    """All numbers of a report. Parts are None where the run or its data do not give them."""

    run: Run
    evaluation: Evaluation | None
    tasks: Tasks | None
    target: Target | None
    missing: list[str] = field(default_factory=list)  # what the report lacks and why, sentences
    rank_by: str = "auto"  # what labels are ranked by: auto, weight or loss

    @property
    def ranking(self):
        """What labels are ranked by: weight or loss.

        With ``auto``, by weight where the target weights differ and clearly fall with the loss. A
        schedule that does not distrust what the model cannot explain is about pictures, not about
        labels. The truth, where it is known, has no say.
        """
        if self.target is None or self.target.weight is None:
            return "loss"
        if self.rank_by != "auto":
            return self.rank_by
        target = self.target
        return "loss" if target.are_alike or not target.falls_with_loss < FALLING else "weight"

    @property
    def truth(self):
        """{ranking: (area under ROC, average precision)} of wrong labels; {} if none is known."""
        target = self.target
        if target is None or target.wrong is None or not 0 < target.wrong.sum() < len(target.wrong):
            return {}
        scores = {}
        if target.weight is not None:
            scores["target weight, lowest first"] = -target.weight
            for name, factor in target.factors.items():
                scores[f"its {name} factor, lowest first"] = -factor
        scores["target loss, highest first"] = target.loss
        return {
            name: (auroc(score, target.wrong), average_precision(score, target.wrong))
            for name, score in scores.items()
        }

    @property
    def role_pairs(self):
        """[(role, other, share by weight, share by loss)]: the share of pairs in which a task of
        the first role, which says more about the class, has the higher mean weight (the lower mean
        loss) of the two."""
        tasks = self.tasks
        if tasks is None or tasks.roles is None or tasks.loss is None:
            return []
        members = tasks.members_by_role
        order = tasks.role_order
        rows = []
        for i, role in enumerate(order):
            for other in order[i + 1 :]:
                both = np.append(members[role], members[other])
                first = np.arange(len(both)) < len(members[role])
                by_weight = auroc(tasks.mean[both], first)
                rows.append((role, other, by_weight, auroc(-tasks.loss[both], first)))
        return rows

    @property
    def role_separation(self):
        """(role, share by weight, share by loss): as in ``role_pairs``, of the role whose
        attributes say most about the class against all others together; None without roles."""
        if not self.role_pairs:
            return None
        tasks = self.tasks
        role = tasks.role_order[0]
        first = np.array(tasks.roles) == role
        return role, auroc(tasks.mean[1:], first), auroc(-tasks.loss[1:], first)

    @property
    def information_correlation(self):
        """Rank correlations of the attributes' information on the class with (mean weight, low
        loss); None where they are not known."""
        tasks = self.tasks
        if tasks is None or tasks.information is None or len(tasks.names) < 4:
            return None
        information = tasks.information[1:]
        return correlation(tasks.mean[1:], information), correlation(-tasks.loss[1:], information)

    @property
    def spread_of_samples(self):
        """What makes target weights differ from sample to sample: {factor: share}."""
        return spread_shares(self.target.factors) if self.target and self.target.factors else {}

    @property
    def spread_of_tasks(self):
        """What makes the weights of auxiliary tasks differ: {factor: share}."""
        if self.evaluation is None or not self.evaluation.table.factors or len(self.tasks.mean) < 3:
            return {}
        factors = self.mean_factors
        if np.allclose(self.tasks.mean, factors["task"], rtol=1e-3):
            factors = {"task": factors["task"]}  # the others are divided by their means
        return spread_shares({k: v[1:] for k, v in factors.items()})

    @property
    def mean_factors(self):
        """Geometric means over the samples of the factors, task by task: {factor: (K,)}."""
        factors = self.evaluation.table.factors
        return {
            name: values
            if values.ndim == 1
            else np.exp(np.nanmean(np.log(np.maximum(values, 1e-30)), axis=0))
            for name, values in factors.items()
        }

    @property
    def settledness(self):
        """Rank correlations of the auxiliary tasks' mean weights at the end with (those at the
        start, those at half time); None where too little is known."""
        # joint_stable's weights are equal at first, and say nothing.
        rows = [row for row in self.run.schedule if np.ptp(row["mean_weight"][1:] or [0]) > 0]
        if len(rows) < 4 or len(rows[0]["mean_weight"]) < 4:
            return None
        start, half, end = (
            np.array(rows[i]["mean_weight"][1:]) for i in (0, len(rows) // 2, len(rows) - 1)
        )
        return correlation(start, end), correlation(half, end)


def find(run, evaluation, missing=(), rank_by="auto"):
    """The ``Findings`` of a ``Run`` and of its ``Evaluation``, or of the former alone (None)."""
    if evaluation is None:
        return Findings(run, None, _tasks_from_history(run), None, list(missing), rank_by)
    scheduled = run.method.bilevel
    tasks = _tasks(evaluation) if scheduled else None
    target = _target(run, evaluation, scheduled)
    return Findings(run, evaluation, tasks, target, list(missing), rank_by)


def _tasks_from_history(run):
    """What schedule.jsonl alone tells of the tasks."""
    if not run.schedule or run.task_names is None:
        return None
    return Tasks(run.task_names, np.array(run.schedule[-1]["mean_weight"]))


def _tasks(evaluation):
    table, split = evaluation.table, evaluation.split
    attributes = evaluation.samples.attributes.numpy()
    names = split.attribute_names[: attributes.shape[1]]
    roles = split.attribute_roles
    low, high = np.nanquantile(table.weights, (0.05, 0.95), axis=0)
    part = np.nanmean(table.weights * table.losses, axis=0)
    information = class_information(attributes, evaluation.true_labels, len(split.class_names))
    return Tasks(
        names=["target", *names],
        mean=np.nanmean(table.weights, axis=0),
        spread=np.nanstd(table.weights, axis=0),
        low=low,
        high=high,
        factor=table.factors.get("task"),
        loss=np.nanmean(table.losses, axis=0),
        share=part / max(part.sum(), 1e-30),
        information=np.append(np.nan, information),
        roles=None if roles is None else [roles[name] for name in names],
    )


def _target(run, evaluation, scheduled):
    table = evaluation.table
    loss = table.losses[:, 0]
    place = np.flatnonzero(~np.isnan(loss))
    label, given = evaluation.true_labels[place], evaluation.given_labels[place]
    factors = {name: v[place, 0] for name, v in table.factors.items() if v.ndim == 2}
    return Target(
        place=place,
        weight=table.weights[place, 0] if scheduled else None,
        loss=loss[place],
        label=label,
        given=given,
        prediction=table.prediction[place],
        wrong=given != label if run.config.effective_corrupted_rate else None,
        factors=factors if scheduled else {},
    )
