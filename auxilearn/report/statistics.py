"""Statistics of the report that scipy and scikit-learn leave to us. Arrays hold no NaN."""

import numpy as np
from scipy.stats import spearmanr
from sklearn.feature_selection import mutual_info_classif


def correlation(a, b):
    """Spearman's rank correlation; NaN if ``a`` or ``b`` is constant."""
    return np.nan if np.ptp(a) == 0 or np.ptp(b) == 0 else spearmanr(a, b).statistic


def class_information(attributes, labels):
    """Mutual information (A,) in bits of binary ``attributes`` (n, A) and ``labels`` (n,).

    Corrected for the bias of a small sample (Miller and Madow), which may take it a little below 0.
    """
    information = mutual_info_classif(attributes, labels, discrete_features=True) / np.log(2)
    bias = (len(np.unique(labels)) - 1) / (2 * len(labels) * np.log(2))
    return np.where(np.ptp(attributes, axis=0) > 0, information - bias, 0.0)


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
