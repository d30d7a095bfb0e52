"""Hyper-parameters of the tables: chosen on validation, from equally many candidates.

One readable file holds, by data set and table, what was chosen for every row, from which
candidates, and the validation accuracy of each (null: its run failed):

    {"digits": {"seeds": [101, 102], "flags": [...], "fingerprint": "...",
     "tables": {"table2": {"setting": "supervised", "rows":
      {"joint": {"command": "python reproduce_tables.py tune ...",
                 "chosen": {"main_lr": 0.002, ...},
                 "candidates": [{"main_lr": 0.002, ..., "valid_accuracy": 0.91}, ...]}}}}}}

Of a target that is a real number it is valid_rmse, and the lowest is chosen. A table of several
settings is tuned on one of them. Ablations take what was chosen for the whole method. The test set
plays no part.
"""

from pathlib import Path
from statistics import fmean

from auxilearn.errors import UserError
from auxilearn.files import read_json, write_json
from auxilearn.metrics import ACCURACY
from auxilearn.tables.protocol import DATASETS, TABLES, candidates, rows, tuned_as
from auxilearn.tables.sweep import RunFlags


class Hyperparameters:
    """The tuned hyper-parameters of a data set.

    Args: ``file`` (None, or a missing file: nothing is tuned), the name of the data set, and the
    metric of its target.
    """

    def __init__(self, file, dataset, metric=ACCURACY):
        self.file, self.dataset, self.metric = file and Path(file), dataset, metric
        self.content = read_json(self.file) if file and self.file.exists() else {}
        self.entry = self.content.get(dataset)
        self.flags = RunFlags.read(self.entry["flags"]) if self.entry else None

    def of(self, table, row, flags):
        """{setting or option: value} for a row of a table; {} if nothing was tuned.

        Settings given by ``flags`` (``RunFlags``) are left out, unless tuned under the same flags.
        """
        found = self._row(table, row)
        if not found:
            return {}
        method = rows()[row].method
        given = {} if flags.same(self.flags) else flags.for_method(method)
        given = {**given, **given.get("options", {})}
        return {k: v for k, v in found["chosen"].items() if k not in given}

    def _row(self, table, row):
        tables = self.entry["tables"] if self.entry else {}
        return tables.get(table, {"rows": {}})["rows"].get(tuned_as(row))

    def check_seeds(self, seeds):
        """UserError: hyper-parameters were chosen on one of ``seeds``."""
        shared = set(seeds) & set(self.entry["seeds"] if self.entry else ())
        if shared:
            raise UserError(
                f"--seeds {min(shared)}: the hyper-parameters in {self.file} were chosen on this "
                "seed; tables take other seeds"
            )

    def notes(self, table, names, flags, fingerprint):
        """Sentences on the origin of the hyper-parameters of the rows ``names``.

        ``flags`` and ``fingerprint`` are those of the table's runs.
        """
        found = {row: self._row(table, row) for row in names}
        tuned = [entry for entry in found.values() if entry]
        sentences = []
        if tuned:
            budgets = sorted({len(entry["candidates"]) for entry in tuned})
            commands = dict.fromkeys(f"`{entry['command']}`" for entry in tuned)
            sentences.append(
                f"Hyper-parameters: for every method the best of {' or '.join(map(str, budgets))} "
                f"candidates by validation {self.metric.words} in the setting "
                f"{TABLES[table].tuned_on}, on seed {', '.join(map(str, self.entry['seeds']))}, "
                "which the table does not use; ablations take those of the whole method. All "
                f"candidates: `{self.file}`, by {', '.join(commands)}."
            )
            if not flags.same(self.flags):
                sentences.append(
                    f"They were chosen under other flags than the table's: "
                    f"`{' '.join(self.flags.words) or 'none'}`, not "
                    f"`{' '.join(flags.words) or 'none'}`."
                )
            if fingerprint != self.entry["fingerprint"]:
                sentences.append("They were chosen on other data or another split.")
        untuned = [rows()[row].title for row, entry in found.items() if not entry]
        if untuned:
            usual = "data set's settings" if self.dataset in DATASETS else "defaults of training"
            sentences.append(
                f"Not tuned, with the {usual} as in the commands: {'; '.join(untuned)}."
            )
        return sentences

    def check_origin(self, seeds, flags, fingerprint):
        """UserError: the choices for this data set were made with other seeds, flags or data."""
        if self.entry and not (
            (self.entry["seeds"], self.entry["fingerprint"]) == (seeds, fingerprint)
            and flags.same(self.flags)
        ):
            raise UserError(
                f"{self.file} holds hyper-parameters of {self.dataset} that were chosen on other "
                "seeds, flags or data: give another --hyperparameters, or remove them there"
            )

    def write_choice(self, outcomes, command, seeds, flags, fingerprint):
        """Choose, for every row of every table, the candidate that is best on validation.

        Args:
            outcomes: {(table, row): [(candidate, [value by seed, None if failed])]}.
            command, seeds, flags, fingerprint: of the tuning, for the record.

        A candidate with a failed run is not chosen; of equals, the first is. Other rows, tables and
        data sets of the file stay. Returns {(table, row): chosen}, without the rows whose
        candidates all failed.
        """
        entry = self.content.setdefault(
            self.dataset,
            {"seeds": seeds, "flags": flags.words, "fingerprint": fingerprint, "tables": {}},
        )
        chosen = {}
        for (table, row), tried in outcomes.items():
            means = [None if None in values else fmean(values) for _, values in tried]
            done = [i for i, mean in enumerate(means) if mean is not None]
            if not done:
                continue
            best = max(done, key=lambda i: self.metric.sign * means[i])
            chosen[table, row] = tried[best][0]
            setting = TABLES[table].tuned_on
            of_table = entry["tables"].setdefault(table, {"setting": setting, "rows": {}})
            of_table["rows"][row] = {
                "command": command,
                "chosen": chosen[table, row],
                "candidates": [
                    {**candidate, f"valid_{self.metric.name}": mean}
                    for (candidate, _), mean in zip(tried, means, strict=True)
                ],
            }
        entry["tables"] = {t: entry["tables"][t] for t in TABLES if t in entry["tables"]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.content)
        return chosen


def trials(tables, names, main_lr):
    """(table, row, setting, candidate) of every run that tuning needs, for one seed.

    Learning rates are tried around ``main_lr``.
    """
    tuned = list(dict.fromkeys(map(tuned_as, names)))
    return [
        (table, row, TABLES[table].tuned_on, candidate)
        for table in tables
        for row in tuned
        for candidate in candidates(table, row, main_lr)
    ]
