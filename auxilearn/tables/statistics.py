"""Numbers of a table: means and deviations over seeds, what is best, and paired tests.

Accuracies and their differences are in [0, 1] and [-1, 1] here; the table prints per cent.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from auxilearn.errors import needs
from auxilearn.tables.protocol import (
    ABLATION,
    BASELINE,
    ROWS,
    SCHEDULE,
    SETTINGS,
    TABLES,
    TARGET_ONLY,
)

STATES = ("done", "to do", "incomplete", "running", "failed")
ALPHA = 0.05
CONFIDENCE = 0.95
# Accuracies are counts over a test set, so true differences are far larger than this.
ROUNDING = 1e-12


class Result(NamedTuple):
    """A wanted run and what came out of it."""

    row: str  # key of ROWS
    setting: str  # key of SETTINGS
    seed: int
    state: str  # one of STATES
    test_accuracy: float | None  # in [0, 1]; None unless done
    valid_accuracy: float | None
    directory: str
    identity: str  # hash of what determines the run
    command: str  # verbatim shell command


class Cell(NamedTuple):
    """The runs of a method in a setting: ``values`` {seed: test accuracy} of those done."""

    values: Mapping
    wanted: int

    @property
    def n(self):
        return len(self.values)

    @property
    def complete(self):
        return self.n == self.wanted > 0

    @property
    def mean(self):
        """None without a run."""
        return mean(self.values.values())

    @property
    def sd(self):
        """Sample standard deviation (n - 1); None below two runs."""
        return sample_sd(self.values.values())


class Comparison(NamedTuple):
    """``row`` minus ``other`` over the ``n`` seeds that both have done.

    ``difference`` is the mean difference (None without a common seed), ``sd`` the differences'
    sample standard deviation, ``low`` .. ``high`` their t confidence interval, ``p`` the paired
    two-sided t-test's. sd and p are None below two seeds; the interval is so too where the
    differences do not vary. ``p_holm`` is ``p`` corrected for the other tests of its family.
    """

    row: str
    other: str
    setting: str
    n: int
    difference: float | None
    sd: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None = None

    @property
    def verdict(self):
        """1 or -1 where ``row`` is significantly better or worse, else 0."""
        if self.p_holm is None or self.p_holm >= ALPHA:
            return 0
        return 1 if self.difference > 0 else -1


class Statistics(NamedTuple):
    """What a table shows.

    ``rows`` in the order of ROWS, ``settings`` in the table's, ``seeds`` ascending;
    ``cells`` {(row, setting): Cell}; ``best`` {setting: rows with the highest mean}; ``baseline``
    {setting: the best baseline, or None}. ``tests`` are of schedules against the best baseline,
    ``ablations`` of ablations against the whole method, each a Holm family of its own;
    ``untested`` and ``untested_ablations`` are the (row, other, setting) that are missing there,
    because one of the cells is incomplete, or ``other`` is None for want of a complete baseline.
    """

    rows: tuple
    settings: tuple
    seeds: tuple
    cells: Mapping
    best: Mapping
    baseline: Mapping
    tests: tuple
    untested: tuple
    ablations: tuple
    untested_ablations: tuple


def evaluate(table_name, results, seeds):
    """``Statistics`` of a table from the ``Result`` list of its wanted runs.

    Of the table's settings those are shown that ``results`` have; a row is shown if they have it in
    one of these, and is then wanted in all of them with all ``seeds``. Only complete cells (every
    wanted run done) can be the best, be the best baseline, or be tested.

    Raises:
        ValueError: ``results`` contradict themselves or the protocol.
        UserError: scipy is missing.
    """
    known, seeds = runs(results), tuple(sorted(set(seeds)))
    settings = settings_of(table_name, known)
    rows = tuple(row for row in ROWS if any((row, setting) in known for setting in settings))
    cells = {
        (row, setting): Cell(_accuracies(known.get((row, setting), {}), seeds), len(seeds))
        for row in rows
        for setting in settings
    }
    baselines = of_kind(rows, TARGET_ONLY, BASELINE)
    best = {setting: _best(cells, rows, setting) for setting in settings}
    baseline = {s: next(iter(_best(cells, baselines, s)), None) for s in settings}
    schedules, ablations = of_kind(rows, SCHEDULE), of_kind(rows, ABLATION)
    return Statistics(
        rows,
        settings,
        seeds,
        cells,
        best,
        baseline,
        *_family(cells, [(row, baseline[s], s) for s in settings for row in schedules]),
        *_family(cells, [(row, ROWS[row].full, s) for s in settings for row in ablations]),
    )


def settings_of(table_name, known):
    """The settings of a table that are among the keys of ``runs``, in the table's order."""
    return tuple(s for s in TABLES[table_name].settings if any(s == key[1] for key in known))


def compare(results, row, other, setting):
    """``Comparison`` of two rows over all seeds that both have done."""
    known = runs(results)
    values = [_accuracies(known.get((name, setting), {})) for name in (row, other)]
    return _compare(*values, row, other, setting)


def runs(results):
    """{(row, setting): {seed: Result}}. ValueError if ``results`` cannot be true."""
    known = {}
    for result in results:
        where = f"{result.row}, {result.setting}, seed {result.seed}"
        if result.row not in ROWS or result.setting not in SETTINGS:
            raise ValueError(f"{where}: no such row or setting")
        if result.state not in STATES:
            raise ValueError(f"{where}: {result.state!r} is none of {', '.join(STATES)}")
        accuracy = result.test_accuracy
        if result.state == "done" and (accuracy is None or not 0 <= accuracy <= 1):
            raise ValueError(f"{where}: done with test accuracy {accuracy}, not in [0, 1]")
        of_cell = known.setdefault((result.row, result.setting), {})
        if result.seed in of_cell:
            raise ValueError(f"{where}: two results")
        of_cell[result.seed] = result
    return known


def mean(values):
    """None of nothing. The order of ``values`` does not matter, so that ties are ties."""
    values = list(values)
    return math.fsum(values) / len(values) if values else None


def sample_sd(values):
    """Square root of the summed squared deviations over n - 1; None below two values."""
    values = list(values)
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def holm(p_values):
    """Holm's step-down correction, in the order given.

    The k-th smallest of m is multiplied by m - k + 1, raised to the corrected value before it if
    it fell below that, and cut at 1.
    """
    corrected = [0.0] * len(p_values)
    so_far = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = so_far
    return corrected


def of_kind(rows, *kinds):
    return tuple(row for row in rows if ROWS[row].kind in kinds)


def _accuracies(of_cell, seeds=None):
    """{seed: test accuracy} of the runs that are done, seeds ascending."""
    return {
        seed: of_cell[seed].test_accuracy
        for seed in sorted(of_cell)
        if of_cell[seed].state == "done" and (seeds is None or seed in seeds)
    }


def _best(cells, rows, setting):
    """Those of ``rows`` whose complete cell has the highest mean: several in a tie."""
    means = {row: cells[row, setting].mean for row in rows if cells[row, setting].complete}
    top = max(means.values(), default=None)
    return tuple(row for row in means if means[row] >= top - ROUNDING)


def _family(cells, pairs):
    """((Comparison, ...) with ``p_holm``, the pairs that could not be tested)."""
    tests, untested = [], []
    for row, other, setting in pairs:
        one, two = cells[row, setting], cells.get((other, setting))
        if two is None or not (one.complete and two.complete):
            untested.append((row, other, setting))
        else:
            tests.append(_compare(one.values, two.values, row, other, setting))
    corrected = iter(holm([test.p for test in tests if test.p is not None]))
    tests = [test if test.p is None else test._replace(p_holm=next(corrected)) for test in tests]
    return tuple(tests), tuple(untested)


def _compare(values, others, row, other, setting):
    seeds = [seed for seed in values if seed in others]
    one, two = [values[seed] for seed in seeds], [others[seed] for seed in seeds]
    differences = [a - b for a, b in zip(one, two, strict=True)]
    n, difference, sd = len(seeds), mean(differences), sample_sd(differences)
    low = high = p = None
    if n > 1 and max(differences) - min(differences) <= ROUNDING:
        # t is 0/0 or infinite. The sign-flip test is still defined: of the 2^n ways to flip the
        # differences' signs, all are as extreme as none, or two as extreme as a constant.
        sd = 0.0
        if abs(difference) <= ROUNDING:
            difference, p = 0.0, 1.0
        else:
            p = 2.0 ** (1 - n)
    elif n > 1:
        with needs("scipy", "testing a table", "requirements-tables.txt"):
            from scipy import stats
        p = float(stats.ttest_rel(one, two).pvalue)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
        low, high = difference - half, difference + half
    return Comparison(row, other, setting, n, difference, sd, low, high, p)
