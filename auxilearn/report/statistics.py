"""Statistics of the report that scipy and scikit-learn leave to us."""

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import mutual_info_score


def correlation(a, b):
    """Spearman's rank correlation over the pairs without NaN; NaN if ``a`` or ``b`` is constant."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    known = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[known], b[known]
    if len(a) == 0 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return spearmanr(a, b).statistic


def information(a, b):
    """Mutual information in bits of two columns of class numbers (n,), of R and C classes.

    Corrected for the bias of a small sample, (R - 1) (C - 1) / 2n nats (Miller and Madow), which
    may take it a little below 0. NaN if fewer than (R - 1) (C - 1) samples make that a guess.
    """
    freedom = (len(np.unique(a)) - 1) * (len(np.unique(b)) - 1)
    if len(a) < max(freedom, 1):
        return np.nan
    return (mutual_info_score(a, b) - freedom / (2 * len(a))) / np.log(2)


def fifths(values):
    """The fifth of their distribution, 0 to 4, that each of ``values`` (n,) lies in."""
    return np.searchsorted(np.quantile(values, (0.2, 0.4, 0.6, 0.8)), values)


def spread_shares(factors):
    """The share of a product's spread that each factor makes: {name: share}, summing to 1.

    Args: {name: (n,) positive}. A share is the covariance of the factor's log with the product's
    log, divided by the variance of the latter; it is negative if the factor works against the
    others. Empty for a constant product.
    """
    logs = {name: np.log(np.maximum(values, 1e-30)) for name, values in factors.items()}
    total = sum(logs.values())
    variance = np.var(total)
    if variance < 1e-12:
        return {}
    centred = total - total.mean()
    return {name: float(np.mean(centred * value) / variance) for name, value in logs.items()}
