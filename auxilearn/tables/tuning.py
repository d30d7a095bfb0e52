"""Hyper-parameters of the tables: chosen on validation accuracy, from equally many candidates.

One readable file holds, by data set and table, what was chosen for every row, from which
candidates, on which seeds, and the validation accuracy of each:

    {"digits": {"command": "...", "seeds": [101], "flags": [...], "fingerprint": "...",
     "tables": {"table2": {"setting": "supervised", "rows":
      {"joint": {"chosen": {"main_lr": 0.002, ...},
                 "candidates": [{"main_lr": 0.002, ..., "valid_accuracy": 0.91}, ...]}}}}}}

A table of several settings is tuned on one of them (``TUNED_ON``). Ablations take what was chosen
for the full schedule. The test set plays no part.
"""

from pathlib import Path

from auxilearn.errors import UserError
from auxilearn.record import read_json, write_json
from auxilearn.tables.protocol import CANDIDATES, TABLES, TUNED_ON, tuned_as
from auxilearn.tables.statistics import mean


class Hyperparameters:
    """The tuned hyper-parameters of a data set. Raises UserError where the file is not one.

    Args: ``file`` (need not exist: then nothing is tuned; None: nothing is to be), ``dataset`` a
    key of DATASETS.
    """

    def __init__(self, file, dataset):
        self.file = Path(file) if file else None
        self.dataset = dataset
        content = read_json(self.file) if self.file and self.file.exists() else {}
        self.entry = _mapping(content, self.file).get(dataset, {})
        self.tables = _mapping(_mapping(self.entry, self.file).get("tables", {}), self.file)

    def of(self, table, row):
        """{setting of Config: value} for a row of a table; {} where nothing was tuned."""
        rows = _mapping(_mapping(self.tables.get(table, {}), self.file).get("rows", {}), self.file)
        chosen = _mapping(rows.get(tuned_as(row), {}), self.file).get("chosen", {})
        known = {name for candidate in CANDIDATES[tuned_as(row)] for name in candidate}
        for name, value in _mapping(chosen, self.file).items():
            if name not in known or not isinstance(value, (int, float)) or value != value:
                raise UserError(
                    f"{self.file}: {self.dataset}, {table}, {row}: {name} = {value!r}: expected "
                    f"a number for some of {', '.join(sorted(known))}"
                )
        return chosen

    def note(self, table):
        """How the hyper-parameters of a table came about, a sentence."""
        if table not in self.tables:
            return "Hyper-parameters were not tuned: the same for every row, as in the commands."
        seeds = ", ".join(map(str, self.entry["seeds"]))
        budget = len(CANDIDATES["joint"])
        return (
            f"Hyper-parameters: for every method the best of {budget} candidates by validation "
            f"accuracy in the setting {TUNED_ON[table]}, on seed {seeds}, which the table does "
            f"not use; ablations take those of JTDS. All candidates are in "
            f"`{self.file}`, which `{self.entry['command']}` writes."
        )


def _mapping(value, file):
    if not isinstance(value, dict):
        raise UserError(
            f"{file}: not written by reproduce_tables.py tune (expected an object, found "
            f"{str(value):.40})"
        )
    return value


def trials(tables, rows):
    """(table, row, setting, candidate) of every run that tuning needs, for one seed."""
    tuned = list(dict.fromkeys(tuned_as(row) for row in rows))
    return [
        (table, row, TUNED_ON[table], candidate)
        for table in tables
        for row in tuned
        for candidate in CANDIDATES[row]
    ]


def write_choice(file, dataset, outcomes, command, seeds, flags, fingerprint):
    """Choose, for every row of every table, the candidate with the best mean validation accuracy.

    Args:
        outcomes: {(table, row): [(candidate, [validation accuracy by seed, None if missing])]}.
        command, seeds, flags, fingerprint: of the tuning, for the record.

    A candidate without all its runs is not chosen; of equals, the first is. Other entries of the
    file stay. Returns {(table, row): chosen}. Raises UserError: no candidate of a row has all runs.
    """
    file = Path(file)
    content = _mapping(read_json(file) if file.exists() else {}, file)
    entry = _mapping(content.get(dataset, {}), file)
    same = (entry.get("seeds"), entry.get("flags"), entry.get("fingerprint"))
    kept = entry.get("tables", {}) if same == (seeds, flags, fingerprint) else {}
    tables = {table: dict(found) for table, found in kept.items()}
    chosen = {}
    for (table, row), candidates in outcomes.items():
        scored = [
            {**candidate, "valid_accuracy": mean(values) if None not in values else None}
            for candidate, values in candidates
        ]
        complete = [s["valid_accuracy"] for s in scored if s["valid_accuracy"] is not None]
        if not complete:
            raise UserError(f"no candidate of {row} in {table} has been trained: nothing is chosen")
        best = [s["valid_accuracy"] for s in scored].index(max(complete))
        chosen[table, row] = candidates[best][0]
        found = tables.setdefault(table, {})
        found["setting"] = TUNED_ON[table]
        found.setdefault("rows", {})[row] = {"chosen": candidates[best][0], "candidates": scored}
    content[dataset] = {
        "command": command,
        "seeds": seeds,
        "flags": flags,
        "fingerprint": fingerprint,
        "tables": {table: tables[table] for table in TABLES if table in tables},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)
    return chosen
