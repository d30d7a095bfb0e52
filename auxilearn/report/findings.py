"""The numbers of a report. Sentences, charts, tables and page only show them."""

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from auxilearn.report.run import Evaluation, Run
from auxilearn.report.statistics import correlation, fifths, information, spread_shares

WEAK = 0.6  # validation accuracy below which a model cannot tell wrong labels from hard samples
POOR = 0.5  # and the share of its training labels that a model predicts which has learned them
EXCESS = 1.5  # contradicted labels per expected error of the model from which they are suspected
# Of a target that is a real number:
FAR = 3  # validation RMSEs from which a label and its prediction contradict each other
NORMAL = 0.0027  # the share of errors that are so large if errors are normal
FLAT = 0.9  # standard deviations of the labels: validation RMSE above which a model is too weak

TOGETHER = "loss and margin"
# What labels are ranked by, in words.
WORDS = {
    "weight": "low target weight",
    "loss": "high target loss",
    "margin": "low mean margin",
    TOGETHER: f"{TOGETHER} together",
}


class Ranking(NamedTuple):
    """The decisions on labels, made once: how they are ranked, and whether some are suspected."""

    by: str  # loss and margin, weight, margin or loss
    reason: str  # a sentence
    contradicted: int  # labels for which the model predicts another class, or a number that is FAR
    expected: int  # of them, if all labels were right: by the model's errors in validation
    suspicious: bool  # whether they are more than its errors explain
    numbers: bool = False  # whether the target is a real number

    @property
    def verdict(self):
        """A sentence on what is suspected."""
        if self.numbers:
            far = (
                f"more than {FAR} validation RMSEs from the prediction; normal errors of that "
                f"size would explain {self.expected:,}."
            )
            if self.suspicious:
                return f"Suspected are the {self.contradicted:,} labels that are {far}"
            return f"None is suspected: {self.contradicted:,} labels are {far}"
        rest = f"its error rate on the validation set explains {self.expected:,} of them."
        if self.suspicious:
            return (
                f"Suspected are the {self.contradicted:,} labels that the model contradicts; {rest}"
            )
        return f"None is suspected: the model contradicts {self.contradicted:,} labels, and {rest}"


@dataclass(frozen=True)
class Findings:
    """All numbers of a report. Parts are None where the run or its data do not give them.

    tasks: a row per task, the target first: name, mean_weight, family and, with an evaluation,
        spread, low and high (5 and 95 % quantiles), task_factor, role, mean_loss, share_of_loss
        and class_information. A mean is over the samples that have a label under the task.
    samples: a row per training sample: id, path of an image, label (the data's), given_label
        (trained on), weight, loss, prediction and, if the run recorded them, margin (its mean over
        training). Without a target label to train on, given_label, weight, loss and margin are
        missing. Labels are numbers of classes, or in their own unit.
    labels: the samples that have a target label, the most suspicious first, with rank, quality
        (1 best), suspected, and wrong (given label is not the data's) if labels were corrupted.

    class_information is the mutual information in bits of a task's labels and the data's target
    labels, over the samples that have both (see ``information``), NaN for the target. Of a real
    number it is that of the fifth of its distribution that a label lies in.
    """

    run: Run
    evaluation: Evaluation | None = None
    tasks: pd.DataFrame | None = None
    samples: pd.DataFrame | None = None
    labels: pd.DataFrame | None = None
    ranking: Ranking | None = None
    missing: list[str] = field(default_factory=list)  # sentences: what the report lacks, and why

    # ----------------------------------------------------------------------------------------------
    # Tasks
    # ----------------------------------------------------------------------------------------------

    @property
    def inputs(self):
        """What the samples are, a word: images, rows or, where that is not known, samples."""
        if self.evaluation is None:
            return "samples"
        return "rows" if self.evaluation.split.rows else "images"

    @property
    def aim(self):
        """What the target task is about, a word."""
        return "class" if self.run.data["classes"] else "target"

    @property
    def order(self):
        """Numbers of the auxiliary tasks that have a label, from the highest mean weight to the
        lowest."""
        weights = self.tasks.mean_weight.iloc[1:].dropna()
        return weights.sort_values(ascending=False, kind="stable").index.to_numpy()

    @cached_property
    def roles(self):
        """{role: numbers of its tasks}, the role that says most about the class first."""
        if self.tasks is None or "role" not in self.tasks:
            return {}
        groups = self.tasks.iloc[1:].groupby("role")
        order = groups.class_information.mean().sort_values(ascending=False).index
        return {role: groups.groups[role].to_numpy() for role in order}

    @cached_property
    def role_table(self):
        """[(role, attributes, mean weight, separation by weight, by loss)] of two roles or more.

        A separation is the share of pairs, one task of the role and one of another, in which the
        former has the higher mean weight (the lower mean loss); 0.5 is chance.
        """
        tasks = self.tasks
        return [
            (
                role,
                len(members),
                tasks.mean_weight[members].mean(),
                roc_auc_score(tasks.role[1:] == role, tasks.mean_weight[1:]),
                roc_auc_score(tasks.role[1:] == role, -tasks.mean_loss[1:]),
            )
            for role, members in self.roles.items()
            if len(self.roles) > 1
        ]

    @property
    def information_correlation(self):
        """Rank correlations of the attributes' class information with (mean weight, low loss)."""
        if self.tasks is None or "class_information" not in self.tasks or len(self.tasks) < 4:
            return None
        tasks = self.tasks.iloc[1:]
        return (
            correlation(tasks.mean_weight, tasks.class_information),
            correlation(-tasks.mean_loss, tasks.class_information),
        )

    @property
    def settledness(self):
        """Rank correlations of the auxiliary tasks' mean weights at the end with (those at the
        start, those at half time); None where too little is known."""
        # The weights of joint_stable are equal at first, but for rounding, and rank nothing.
        rows = [np.array(row["mean_weight"][1:], float) for row in self.run.schedule]
        rows = [weights for weights in rows if _differ(weights[~np.isnan(weights)])]
        if len(rows) < 4 or len(rows[0]) < 3:
            return None
        return correlation(rows[0], rows[-1]), correlation(rows[len(rows) // 2], rows[-1])

    # ----------------------------------------------------------------------------------------------
    # Labels
    # ----------------------------------------------------------------------------------------------

    @property
    def weighted(self):
        """Whether the schedule gives different samples different target weights."""
        return self.labels is not None and _differ(self.labels.weight)

    @property
    def with_margins(self):
        """Whether every label has a mean margin over training."""
        return self.labels is not None and _have_margins(self.labels)

    @cached_property
    def scores(self):
        """{ranking: column of ``labels`` that is highest where labels are most suspicious}."""
        scores = {WORDS[by]: suspicion(self.labels, by) for by in WORDS}
        return {name: score for name, score in scores.items() if score.notna().all()}

    @cached_property
    def truth(self):
        """{ranking: (area under ROC, mean precision)} of wrong labels; {} if none is known."""
        labels = self.labels
        if labels is None or "wrong" not in labels or not 0 < labels.wrong.sum() < len(labels):
            return {}
        return {
            name: (
                roc_auc_score(labels.wrong, score),
                average_precision_score(labels.wrong, score),
            )
            for name, score in self.scores.items()
        }

    @cached_property
    def weakness(self):
        """A sentence on why the list of labels means little; None for a model that is not weak.

        The truth, where it is known, has no say.
        """
        if self.ranking.numbers:
            share = self.evaluation.valid / self.evaluation.tasks[0].std
            if share <= FLAT:
                return None
            return (
                f"The model is too weak for this list: its RMSE on the validation set is "
                f"{share:.2f} standard deviations of the labels (bound: {FLAT}), and to predict "
                "their mean makes about 1."
            )
        accuracy = self.evaluation.valid
        agreement = 1 - self.ranking.contradicted / len(self.labels)
        if accuracy < WEAK:
            return (
                f"The model is too weak for this list: it is right on {accuracy:.0%} of the "
                f"validation set (bound: {WEAK:.0%}) and predicts {agreement:.0%} of the labels it "
                "was trained on."
            )
        if agreement < POOR:
            return (
                f"The model predicts only {agreement:.0%} of the labels it was trained on (bound: "
                f"{POOR:.0%}): very many labels are wrong, or it has not learned the training set."
            )
        return None

    # ----------------------------------------------------------------------------------------------
    # Factors
    # ----------------------------------------------------------------------------------------------

    @cached_property
    def spread_of_samples(self):
        """What makes target weights differ from sample to sample: {factor: share}."""
        if self.evaluation is None:
            return {}
        factors, places = self.evaluation.table.factors, self.labels.index
        return spread_shares({k: v[places, 0] for k, v in factors.items() if v.ndim == 2})

    @cached_property
    def spread_of_tasks(self):
        """What makes the mean weights of auxiliary tasks differ: {factor: share}."""
        if self.evaluation is None or not self.evaluation.table.factors or len(self.tasks) < 3:
            return {}
        known = np.flatnonzero(self.tasks.mean_weight.notna())  # tasks that have a label
        factors = {name: v[..., known] for name, v in self.evaluation.table.factors.items()}
        if np.allclose(self.tasks.mean_weight[known], factors["task"], rtol=1e-3):
            return spread_shares({"task": factors["task"][1:]})  # the others have mean 1
        for name, values in factors.items():
            if values.ndim == 2:  # the geometric mean over the samples
                factors[name] = np.exp(np.nanmean(np.log(np.maximum(values, 1e-30)), axis=0))
        return spread_shares({name: values[1:] for name, values in factors.items()})


def find(run, evaluation=None, missing=(), rank_by="auto"):
    """The ``Findings`` of a ``Run`` and of its ``Evaluation``, or of the former alone (None)."""
    if evaluation is None:
        return Findings(run, tasks=_tasks_from_history(run), missing=list(missing))
    samples = _samples(run, evaluation)
    numbers = evaluation.tasks[0].classes is None
    labels, ranking = rank_labels(samples, evaluation.valid, rank_by, numbers)
    if run.config.effective_corrupted_rate:
        labels["wrong"] = labels.given_label != labels.label
    tasks = _tasks(run, evaluation) if run.method.bilevel else None
    return Findings(run, evaluation, tasks, samples, labels, ranking, list(missing))


def _tasks_from_history(run):
    """The last row of schedule.jsonl as a table of tasks."""
    if not run.schedule:
        return None
    families = [name.split("::")[0] for name in run.task_names]
    weights = np.array(run.schedule[-1]["mean_weight"], float)
    return pd.DataFrame({"name": run.task_names, "mean_weight": weights, "family": families})


def _tasks(run, evaluation):
    table, roles = evaluation.table, evaluation.split.roles
    names = [task.name for task in evaluation.tasks]
    with warnings.catch_warnings():  # of a task without any label all is NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanquantile(table.weights, (0.05, 0.95), axis=0)
        # The one place that knows that ``table.losses`` are raw: a_k makes them scheduled ones.
        part = np.nanmean(table.weights * table.losses, axis=0) * run.loss_factors
        columns = {
            "name": names,
            "mean_weight": np.nanmean(table.weights, axis=0),
            "spread": np.nanstd(table.weights, axis=0),
            "low": low,
            "high": high,
            "task_factor": table.factors.get("task"),
            "family": [name.split("::")[0] for name in names],
            "role": roles and ["target", *(roles[name] for name in names[1:])],
            "mean_loss": np.nanmean(table.losses, axis=0),
            "share_of_loss": part / max(np.nansum(part), 1e-30),
            "class_information": [np.nan, *_information(evaluation)],
        }
    return pd.DataFrame({name: values for name, values in columns.items() if values is not None})


def _information(evaluation):
    """Every auxiliary task's information on the target, in bits."""
    target = evaluation.labels(0)
    for k in range(1, len(evaluation.tasks)):
        labels = evaluation.labels(k)
        both = ~np.isnan(target) & ~np.isnan(labels)
        columns = (evaluation.tasks[0], target[both]), (evaluation.tasks[k], labels[both])
        yield information(
            *(v.astype(int) if task.classes or not len(v) else fifths(v) for task, v in columns)
        )


def _samples(run, evaluation):
    table, split = evaluation.table, evaluation.split
    positions = evaluation.samples.positions
    kind = "Int64" if evaluation.tasks[0].classes else "float64"
    columns = {
        "id": [split.ids[p] for p in positions],
        "path": split.paths and [split.paths[p] for p in positions],
        "label": pd.array(evaluation.labels(0), kind),
        "given_label": pd.array(evaluation.given(), kind),
        "weight": table.weights[:, 0].astype(float) if run.method.bilevel else np.nan,
        "loss": table.losses[:, 0].astype(float),
        "prediction": pd.array(evaluation.predicted(0), kind),
        "margin": evaluation.margins,
    }
    return pd.DataFrame({name: values for name, values in columns.items() if values is not None})


def rank_labels(samples, valid, rank_by="auto", numbers=False):
    """(labels, ranking) of ``samples``: see ``Findings``. ``rank_by``: auto, margin, weight, loss.

    With auto, by loss; of a weak model (validation accuracy below ``WEAK``) by the mean of a
    label's ranks by loss and by margin, if the run recorded a margin of every label.
    docs/label_audit.md has the evidence. The truth, where it is known, has no say.

    ``valid`` is the metric in validation: accuracy, or with ``numbers`` RMSE. A label is suspected
    if the model predicts another class, or a number that is more than ``FAR`` RMSEs off, provided
    that it does so clearly more often than by its own errors: those that validation counts, or so
    many of normal ones.
    """
    kind = float if numbers else int
    labels = samples.dropna(subset="loss")
    labels = labels.astype({"label": kind, "given_label": kind, "prediction": kind})
    by, reason = _ranked_by(labels, rank_by, weak=not numbers and valid < WEAK)
    score = suspicion(labels, by)
    if numbers:
        another, share = (labels.prediction - labels.given_label).abs() > FAR * valid, NORMAL
    else:
        another, share = labels.prediction != labels.given_label, 1 - valid
    expected = round(share * len(labels))
    suspicious = bool(another.sum() > EXCESS * expected)
    labels = labels.assign(quality=rankdata(-score) / len(labels), suspected=another & suspicious)
    labels = labels.iloc[np.lexsort((-labels.loss, -score))]
    labels.insert(0, "rank", np.arange(1, len(labels) + 1))
    return labels, Ranking(by, reason, int(another.sum()), expected, suspicious, numbers)


def _ranked_by(labels, rank_by, weak):
    """(what ``suspicion`` takes, a sentence that says why)."""
    if rank_by == "auto" and not weak:
        return "loss", "Ranked by loss, the default."
    if rank_by == "weight" and labels.weight.isna().all():
        return "loss", "Ranked by loss: the method learns no weights of samples."
    if rank_by in ("auto", "margin") and not _have_margins(labels):
        return "loss", "Ranked by loss: the run has no margins of its labels."
    if rank_by == "auto":
        return TOGETHER, (
            f"Ranked by {TOGETHER}, the mean of both ranks: the default of a model that is right "
            f"on less than {WEAK:.0%} of the validation set."
        )
    return rank_by, f"Ranked by {rank_by}, as --rank_by asks."


def suspicion(labels, by):
    """A column of ``labels`` that is highest where they are most suspicious; NaN if not known.

    ``by``: a name in ``WORDS``.
    """
    if by == "loss":
        return labels.loss
    if by == TOGETHER:
        return (labels.loss.rank() + suspicion(labels, "margin").rank()) / 2
    return -labels[by] if by in labels else labels.loss * np.nan


def _have_margins(labels):
    return "margin" in labels and bool(labels.margin.notna().all())


def _differ(weight):
    return len(weight) > 0 and np.ptp(weight) > 1e-6 * np.abs(weight).max()
