"""Numbers of a table: means and deviations over seeds, the best methods, and paired tests.

Accuracies and their differences are in [0, 1] and [-1, 1] here; the table prints per cent. An RMSE
is in the target's own unit everywhere.
"""

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from auxilearn.errors import needs
from auxilearn.metrics import ACCURACY, Metric
from auxilearn.tables.protocol import (
    ABLATION,
    BASELINE,
    SCHEDULE,
    TABLES,
    TARGET_ONLY,
    rows,
)
from auxilearn.tables.sweep import Result

REQUIREMENTS = "requirements-tables.txt"
ALPHA = 0.05
CONFIDENCE = 0.95
# Of the values themselves: true differences are far larger than this.
ROUNDING = 1e-12


class Comparison(NamedTuple):
    """``row`` minus ``other`` in a setting, paired over ``n`` seeds.

    ``apart``: how many seeds form no pair, as the two runs come from different processors.
    ``difference`` is the mean difference, ``low`` .. ``high`` its t confidence interval (None if
    the differences do not vary), ``p`` the paired two-sided t-test's (None for one seed) and
    ``p_holm`` corrected for the other tests of its family. ``missing`` says why there is no
    comparison. ``sign``: the metric's.
    """

    row: str
    setting: str
    other: str | None
    missing: str | None = None
    n: int = 0
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    sign: int = 1
    apart: int = 0

    @property
    def verdict(self):
        """1 or -1 where ``row`` is significantly better or worse, else 0."""
        if self.p_holm is None or self.p_holm >= ALPHA:
            return 0
        return self.sign if self.difference > 0 else -self.sign


@dataclass(frozen=True)
class Statistics:
    """All numbers of a table, computed once.

    metric: of the target task.
    runs: DataFrame of its ``Result``s; columns of values bear the metric's name.
    values: DataFrame of the metric on the test set, a line per seed, a column per (row, setting);
        NaN: not done.
    cells: DataFrame with a line per (row, setting): n, wanted, mean, sd (the sample's), and whether
        the cell is complete, the best, or the best baseline of its column.
    tests: ``Comparison``s of schedules with the best baseline of the column.
    ablations: ``Comparison``s of ablations with the whole method.

    Only complete cells (every wanted run done) are the best, the best baseline, or tested.
    """

    table: str
    rows: list
    settings: list
    seeds: list
    metric: Metric
    runs: Any
    values: Any
    cells: Any
    tests: list
    ablations: list

    @property
    def complete(self):
        return bool(self.cells.complete.all())

    @property
    def decimals(self):
        """How many a mean is shown with."""
        return self.metric.decimals(self.cells["mean"].dropna().tolist())


def need_packages():
    """UserError: a package is missing that tables need."""
    for package in ("pandas", "tabulate", "scipy"):
        with needs(package, "a table", REQUIREMENTS):
            importlib.import_module(package)


def evaluate(table, results, seeds, metric=ACCURACY):
    """``Statistics`` of a table from the ``Result`` list of its wanted runs."""
    import pandas as pd

    runs, known, seeds = pd.DataFrame(results, columns=Result._fields), rows(), sorted(seeds)
    names = [row for row in known if row in set(runs.row)]
    settings = [s for s in TABLES[table].all_settings if s in set(runs.setting)]
    columns = pd.MultiIndex.from_product([names, settings], names=["row", "setting"])
    values, processors = (
        runs[runs.state == "done"]
        .pivot(index="seed", columns=["row", "setting"], values=of_run)
        .reindex(index=seeds, columns=columns)
        for of_run in ("test_accuracy", "processor")
    )
    values = values.astype(float)
    runs.columns = runs.columns.str.replace(ACCURACY.name, metric.name)
    cells = pd.DataFrame({"n": values.count(), "wanted": len(seeds)})
    cells["mean"], cells["sd"] = values.mean(), values.std()
    cells["complete"] = cells.n == cells.wanted
    cells["best"] = cells["baseline"] = False
    baseline = {}
    for setting in settings:
        of_column = [(row, setting) for row in names]
        cells.loc[_best(cells, of_column, metric), "best"] = True
        rivals = [(r, s) for r, s in of_column if known[r].kind in (TARGET_ONLY, BASELINE)]
        for cell in _best(cells, rivals, metric)[:1]:
            cells.loc[[cell], "baseline"] = True
            baseline[setting] = cell[0]
    pairs = [(row, s) for s in settings for row in names]
    tests = [(r, s, baseline.get(s)) for r, s in pairs if known[r].kind == SCHEDULE]
    ablations = [(r, s, known[r].full) for r, s in pairs if known[r].kind == ABLATION]
    families = [_family(cells, values, processors, metric, family) for family in (tests, ablations)]
    return Statistics(table, names, settings, seeds, metric, runs, values, cells, *families)


def _best(cells, keys, metric):
    """Those of ``keys`` whose complete cell has the best mean: several in a tie."""
    means = metric.sign * cells.loc[keys].query("complete")["mean"]
    return list(means.index[means >= means.max() - ROUNDING * abs(means.max())])


def _family(cells, values, processors, metric, pairs):
    """``Comparison``s of (row, setting, other), with Holm's correction over all of them."""
    found = [_compare(cells, values, processors, *pair) for pair in pairs]
    found = [test._replace(sign=metric.sign) for test in found]
    corrected = iter(holm([test.p for test in found if test.p is not None]))
    return [test if test.p is None else test._replace(p_holm=next(corrected)) for test in found]


def _compare(cells, values, processors, row, setting, other):
    for name in (row, other):
        if (name, setting) not in cells.index or not cells.complete[name, setting]:
            why = f"{rows()[name].title} lacks runs" if name else "no baseline is complete"
            return Comparison(row, setting, other, why)
    alike = processors[row, setting] == processors[other, setting]
    apart = int((~alike).sum())
    if not alike.any():
        return Comparison(row, setting, other, "no seed has both runs of one kind of processor")
    found = _tested(values[row, setting][alike], values[other, setting][alike])
    return Comparison(row, setting, other, None, *found, apart=apart)


def _tested(one, two):
    """n, difference, low, high and p of ``Comparison``, of two paired series."""
    differences, rounding = one - two, ROUNDING * max(one.max(), two.max())
    n, difference = len(differences), float(differences.mean())
    if n < 2:
        return n, difference
    if differences.max() - differences.min() <= rounding:
        # t is 0/0 or infinite. The sign-flip test is still defined: of the 2^n ways to flip the
        # differences' signs, all are as extreme as none, or two as extreme as a constant.
        p = 1.0 if abs(difference) <= rounding else 2.0 ** (1 - n)
        return n, difference, None, None, p
    from scipy import stats

    found = stats.ttest_rel(one, two)
    low, high = map(float, found.confidence_interval(CONFIDENCE))
    return n, difference, low, high, float(found.pvalue)


def holm(p_values):
    """Holm's step-down correction, in the order given.

    The k-th smallest of m is multiplied by m - k + 1, raised to the corrected value before it if
    it fell below that, and cut at 1.
    """
    corrected, so_far = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = so_far
    return corrected
