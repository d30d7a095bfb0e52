"""Numbers of the report: rankings against a known truth, and what makes weights differ.

All take and give numpy arrays; NaN is the caller's to leave out.
"""

import numpy as np


def ranks(values):
    """Ranks 1 .. n of ``values`` (n,), equal values sharing the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def auroc(score, positive):
    """Probability that a positive has a higher ``score`` than a negative, ties counting half.

    The area under the ROC curve. NaN where there are no positives or no negatives.
    """
    positive = np.asarray(positive, dtype=bool)
    n = positive.sum()
    pairs = n * (len(positive) - n)
    if pairs == 0:
        return float("nan")
    return float((ranks(score)[positive].sum() - n * (n + 1) / 2) / pairs)


def _hits_by_threshold(score, positive):
    """(true positives, all taken) after each distinct score, from the highest down."""
    order = np.argsort(-np.asarray(score), kind="stable")
    score = np.asarray(score)[order]
    hits = np.cumsum(np.asarray(positive, dtype=bool)[order])
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    return hits[last], last + 1


def roc_curve(score, positive):
    """(false positive rates, true positive rates), from (0, 0) to (1, 1)."""
    hits, taken = _hits_by_threshold(score, positive)
    false = taken - hits
    return np.append(0, false) / max(1, false[-1]), np.append(0, hits) / max(1, hits[-1])


def precision_recall(score, positive):
    """(recalls, precisions), one point per distinct score, from the highest score down."""
    hits, taken = _hits_by_threshold(score, positive)
    return hits / max(1, hits[-1]), hits / taken


def average_precision(score, positive):
    """Mean precision over the positives: the area under the stepwise precision-recall curve.

    NaN where there is no positive.
    """
    if not np.any(positive):
        return float("nan")
    recall, precision = precision_recall(score, positive)
    return float(np.sum(np.diff(recall, prepend=0) * precision))


def correlation(one, other):
    """Spearman's rank correlation. NaN where one side is constant or has fewer than 3 values."""
    one, other = ranks(one), ranks(other)
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def class_information(attributes, labels, classes):
    """What each attribute says about the class, in bits: their mutual information, (A,).

    Args: ``attributes`` (n, A) of 0 and 1, ``labels`` (n,) in 0 .. ``classes`` - 1. Corrected for
    the bias of a small sample (Miller and Madow), which may take it a little below 0.
    """
    n = len(labels)
    members = np.zeros((classes, n))
    members[labels, np.arange(n)] = 1
    ones = members @ attributes  # (C, A)
    size = members.sum(axis=1)  # (C,)

    def entropy(share):
        share = np.clip(share, 1e-12, 1 - 1e-12)
        return -(share * np.log2(share) + (1 - share) * np.log2(1 - share))

    within = (size / n) @ entropy(ones / np.maximum(size, 1)[:, None])
    varies = np.ptp(attributes, axis=0) > 0
    bias = (np.count_nonzero(size) - 1) / (2 * n * np.log(2))
    return np.where(varies, entropy(attributes.mean(axis=0)) - within - bias, 0.0)


def spread_shares(factors):
    """How much of the spread of a product each factor makes: {name: share}, summing to 1.

    Args: {name: (n,) positive}. A factor's share is its log's covariance with the log of the
    product over that log's variance; it is negative where a factor works against the others. Empty
    where the product is constant.
    """
    logs = {name: np.log(np.maximum(values, 1e-30)) for name, values in factors.items()}
    total = sum(logs.values())
    centred = total - total.mean()
    variance = np.mean(centred**2)
    if variance < 1e-12:
        return {}
    return {
        name: float(np.mean(centred * (value - value.mean())) / variance)
        for name, value in logs.items()
    }


def two_groups(values, steps=200):
    """Do ``values`` (n,) fall into two groups? A mixture of two Gaussians, fitted by EM.

    Returns (separation, chances (n,) of belonging to the higher group). The separation is Ashman's
    D, sqrt(2) (m1 - m0) / sqrt(s0^2 + s1^2): above 2 the groups stand apart. 0 for constant values.
    """
    if np.ptp(values) == 0:
        return 0.0, np.zeros(len(values))
    centre = np.quantile(values, (0.25, 0.75))
    spread = np.full(2, values.std())
    share = np.full(2, 0.5)
    narrowest = 0.02 * values.std()  # a group must not shrink to a single value
    for _ in range(steps):
        z = (values[:, None] - centre) / spread  # (n, 2)
        density = np.log(share / spread) - z**2 / 2
        chance = np.exp(density - np.logaddexp(*density.T)[:, None])
        size = np.maximum(chance.sum(axis=0), 1e-9)
        centre = (chance * values[:, None]).sum(axis=0) / size
        variance = (chance * (values[:, None] - centre) ** 2).sum(axis=0) / size
        spread = np.maximum(np.sqrt(variance), narrowest)
        share = size / len(values)
    separation = np.sqrt(2) * (centre[1] - centre[0]) / np.hypot(*spread)
    # A wide lower group reaches beyond a narrow higher one: below its centre nothing is high.
    return float(separation), np.where(values > centre[0], chance[:, 1], 0.0)


def family(name):
    """The family of an attribute: has_bill_shape of has_bill_shape::cone."""
    return name.split("::")[0]


def compact(values):
    """``values`` in float16 where that keeps three digits of every entry, else in float32."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    close = np.isclose(half.astype(np.float32), values, rtol=1e-3, atol=0, equal_nan=True)
    return half if close.all() else values.astype(np.float32)
