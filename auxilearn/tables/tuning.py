"""Hyper-parameters of the tables: chosen on validation accuracy, from equally many candidates.

One readable file holds, by data set and table, what was chosen for every row, from which
candidates, and the validation accuracy of each (null: its run failed):

    {"digits": {"seeds": [101, 102], "flags": [...], "fingerprint": "...",
     "tables": {"table2": {"setting": "supervised", "rows":
      {"joint": {"command": "python reproduce_tables.py tune ...",
                 "chosen": {"main_lr": 0.002, ...},
                 "candidates": [{"main_lr": 0.002, ..., "valid_accuracy": 0.91}, ...]}}}}}}

A table of several settings is tuned on one of them (``TUNED_ON``). Ablations take what was chosen
for the full schedule. The test set plays no part.
"""

from pathlib import Path

from auxilearn.errors import UserError
from auxilearn.run.config import Config
from auxilearn.run.record import read_json, write_json
from auxilearn.tables.protocol import ROWS, TABLES, TUNED_ON, candidates, tuned_as
from auxilearn.tables.statistics import mean

SETTABLE = ("main_lr", "aux_weight", "aux_lr", "dev_lr", "dev_epochs")


class Hyperparameters:
    """The tuned hyper-parameters of a data set.

    Args: ``file`` (need not exist: then nothing is tuned; None: nothing is to be), ``dataset`` a
    key of DATASETS. Raises UserError where the file is not one that ``write_choice`` wrote.
    """

    def __init__(self, file, dataset):
        self.file = Path(file) if file else None
        self.entry = _read(self.file).get(dataset) if self.file else None

    def of(self, table, row, flags):
        """{setting of Config: value} for a row of a table; {} where nothing was tuned.

        What ``flags`` of the table's runs set themselves is left out, unless it was tuned under
        these very flags.
        """
        found = self._row(table, row)
        if not found:
            return {}
        given = {word.partition("=")[0] for word in flags} if flags != self.entry["flags"] else ()
        return {k: v for k, v in found["chosen"].items() if f"--{k}" not in given}

    def _row(self, table, row):
        tables = self.entry["tables"] if self.entry else {}
        return tables.get(table, {"rows": {}})["rows"].get(tuned_as(row))

    def check(self, seeds):
        """Raises UserError where hyper-parameters were chosen on one of ``seeds``."""
        shared = set(seeds) & set(self.entry["seeds"] if self.entry else ())
        if shared:
            raise UserError(
                f"--seeds {min(shared)} is what the hyper-parameters in {self.file} were chosen "
                "on: tables take other seeds"
            )

    def notes(self, table, rows, flags, fingerprint):
        """How the hyper-parameters of ``rows`` of a table came about, a list of sentences.

        ``flags`` and ``fingerprint`` are those of the table's runs.
        """
        tuned = [row for row in rows if self._row(table, row)]
        sentences = []
        if tuned:
            budgets = {len(self._row(table, row)["candidates"]) for row in tuned}
            commands = dict.fromkeys(self._row(table, row)["command"] for row in tuned)
            sentences.append(
                f"Hyper-parameters: for every method the best of {_either(budgets)} candidates by "
                f"validation accuracy in the setting {TUNED_ON[table]}, on seed "
                f"{', '.join(map(str, self.entry['seeds']))}, which the table does not use; "
                f"ablations take those of the whole method. All candidates: `{self.file}`, by "
                f"{', '.join(f'`{command}`' for command in commands)}."
            )
            if flags != self.entry["flags"]:
                sentences.append(
                    f"They were chosen under other flags than the table's: "
                    f"`{' '.join(self.entry['flags']) or 'none'}`, not "
                    f"`{' '.join(flags) or 'none'}`."
                )
            if fingerprint != self.entry["fingerprint"]:
                sentences.append("They were chosen on other data or another split.")
        untuned = [ROWS[row].title for row in rows if row not in tuned]
        if untuned:
            sentences.append(
                f"Not tuned, with the data set's settings as in the commands: {'; '.join(untuned)}."
            )
        return sentences


def _either(numbers):
    return " or ".join(map(str, sorted(numbers)))


def trials(tables, rows, main_lr):
    """(table, row, setting, candidate) of every run that tuning needs, for one seed.

    Learning rates are tried around ``main_lr``.
    """
    tuned = list(dict.fromkeys(tuned_as(row) for row in rows))
    return [
        (table, row, TUNED_ON[table], candidate)
        for table in tables
        for row in tuned
        for candidate in candidates(table, row, main_lr)
    ]


def check_file(file, dataset, seeds, flags, fingerprint):
    """Raises UserError unless choices made in this way may go into ``file``."""
    if not file:
        raise UserError("tune writes --hyperparameters: give it a file")
    entry = _read(Path(file)).get(dataset)
    if entry and (entry["seeds"], entry["flags"], entry["fingerprint"]) != (
        seeds,
        flags,
        fingerprint,
    ):
        raise UserError(
            f"{file} holds hyper-parameters of {dataset} that were chosen on other seeds, flags or "
            "data: give another --hyperparameters, or remove them there"
        )


def write_choice(file, dataset, outcomes, command, seeds, flags, fingerprint):
    """Choose, for every row of every table, the candidate with the best mean validation accuracy.

    Args:
        outcomes: {(table, row): [(candidate, [validation accuracy by seed, None if it failed])]}.
        command, seeds, flags, fingerprint: of the tuning, for the record.

    A candidate with a failed run is not chosen; of equals, the first is. Other rows, tables and
    data sets of the file stay. Returns {(table, row): chosen}; a row whose candidates all failed is
    left out. Raises UserError as ``check_file``.
    """
    check_file(file, dataset, seeds, flags, fingerprint)
    file = Path(file)
    content = _read(file)
    entry = content.setdefault(
        dataset, {"seeds": seeds, "flags": flags, "fingerprint": fingerprint, "tables": {}}
    )
    chosen = {}
    for (table, row), tried in outcomes.items():
        scored = [
            {**candidate, "valid_accuracy": mean(values) if None not in values else None}
            for candidate, values in tried
        ]
        accuracies = [-1.0 if s["valid_accuracy"] is None else s["valid_accuracy"] for s in scored]
        if max(accuracies) < 0:
            continue
        chosen[table, row] = tried[accuracies.index(max(accuracies))][0]
        of_table = entry["tables"].setdefault(table, {"setting": TUNED_ON[table], "rows": {}})
        of_table["rows"][row] = {
            "command": command,
            "chosen": chosen[table, row],
            "candidates": scored,
        }
    entry["tables"] = {
        table: entry["tables"][table] for table in TABLES if table in entry["tables"]
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror})") from None
    return chosen


def _read(file):
    """The file's content, {} if there is none. UserError where it is of another shape."""
    try:
        if not file.exists():
            return {}
    except OSError as error:
        raise UserError(f"{str(file)[:80]}: {error.strerror}") from None
    content = read_json(file)
    problem = _problem(content)
    if problem:
        raise UserError(f"{file}: {problem}: not written by reproduce_tables.py tune")
    return content


def _problem(content):
    """What is wrong with the content of a file, or None."""
    if not isinstance(content, dict):
        return "expected an object by data set"
    for dataset, entry in content.items():
        match entry:
            case {
                "seeds": [_, *_] as seeds,
                "flags": list(flags),
                "fingerprint": str(),
                "tables": dict(tables),
            } if all(type(s) is int for s in seeds) and all(isinstance(f, str) for f in flags):
                pass
            case _:
                return f"{dataset}: expected seeds, flags, fingerprint and tables"
        for table, found in tables.items():
            rows = found.get("rows") if isinstance(found, dict) else None
            if table not in TABLES or not isinstance(rows, dict):
                return f"{dataset}, {table}: expected a table with rows"
            for row, values in rows.items():
                match values:
                    case {"command": str(), "chosen": dict(chosen), "candidates": [_, *_]}:
                        pass
                    case _:
                        return f"{dataset}, {table}, {row}: expected command, chosen, candidates"
                for name, value in chosen.items():
                    kind = type(getattr(Config(), name, None))
                    number = isinstance(value, (int, float)) and not isinstance(value, bool)
                    if name not in SETTABLE or not number or not 0 <= value < float("inf"):
                        known = ", ".join(SETTABLE)
                        return (
                            f"{dataset}, {table}, {row}: {name} = {value!r}: expected a number "
                            f"from 0 up, of one of {known}"
                        )
                    if kind is int and not isinstance(value, int):
                        return f"{dataset}, {table}, {row}: {name} = {value!r}: a whole number"
    return None
