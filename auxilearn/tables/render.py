"""A table as files: Markdown, LaTeX, tidy CSV, and the list of its runs.

Texts are put together once, in plain characters (± − – † ▲ ▼), and escaped by the format they go
into. Code in notes stands between backticks.
"""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from auxilearn.errors import UserError
from auxilearn.files import write_aside
from auxilearn.metrics import ACCURACY
from auxilearn.tables.protocol import (
    ABLATION,
    BASELINE,
    DATASETS,
    SCHEDULE,
    SETTINGS,
    TABLES,
    TARGET_ONLY,
    rows,
)
from auxilearn.tables.statistics import ALPHA, CONFIDENCE, Statistics

PAPER_HEADER = ["dataset", "table", "row", "setting", "accuracy"]
NONE, MARKS = "–", {1: "▲", -1: "▼", 0: ""}
GROUPS = {
    TARGET_ONLY: "Target task only",
    BASELINE: "Baselines",
    SCHEDULE: "Schedules",
    ABLATION: "Ablations",
}
TEST_HEADER = [
    *("setting", "method", "against", "n", "difference", f"{CONFIDENCE:.0%} CI", "p", "Holm p"),
]
TEST_ALIGN = "lllrrrrr"


class Sheet(NamedTuple):
    """A table to be written.

    ``data``: the data set's title. ``paper``: {(row, setting): per cent} of the paper, or None for
    no such column. ``notes``: lines below the table.
    """

    found: Statistics
    dataset: str
    data: str
    paper: dict | None = None
    notes: tuple = ()

    @property
    def title(self):
        return f"{TABLES[self.found.table].title}, {self.data}"

    @property
    def stem(self):
        """Of its files: table4_pair is not to replace table4."""
        kinds = {SETTINGS[s].settings.get("corruption") for s in self.found.settings} - {None}
        return "_".join([self.found.table, *sorted(kinds)])


def write_table(sheet, out_dir):
    """Write ``<table>.md``, ``.csv``, ``.tex`` and ``<table>_runs.csv``; returns their paths.

    Accuracies are in per cent and points in the cells' CSV, and in [0, 1] in the runs'.
    """
    out, name = Path(out_dir), sheet.stem
    texts = {
        f"{name}.md": markdown(sheet),
        f"{name}.csv": cells_csv(sheet),
        f"{name}.tex": latex(sheet),
        f"{name}_runs.csv": sheet.found.runs.to_csv(index=False),
    }
    out.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        # A path in a command may be no valid text.
        content = text.encode("utf-8", "backslashreplace")
        write_aside(out / file, lambda opened, content=content: opened.write(content))
    return [out / file for file in texts]


def read_paper(path):
    """{(dataset, table, row, setting): per cent} of a CSV file with the columns PAPER_HEADER.

    The file is filled in by hand: UserError names the line of a mistake.
    """
    path, figures, columns = Path(path), {}, ",".join(PAPER_HEADER)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [field.strip() for field in next(reader, [])]
        if header != PAPER_HEADER:
            raise UserError(f"the header is {','.join(header) or 'missing'!r}; expected {columns}")
        for fields in reader:
            if any(map(str.strip, fields)):
                key, accuracy = _paper_entry([field.strip() for field in fields])
                if key in figures:
                    raise UserError(f"{', '.join(key)} is given twice; remove one of the two")
                figures[key] = accuracy
    except (csv.Error, UserError) as error:
        raise UserError(f"{path}, line {max(reader.line_num, 1)}: {error}") from None
    return figures


def _paper_entry(fields):
    """((dataset, table, row, setting), per cent)."""
    if len(fields) != len(PAPER_HEADER):
        raise UserError(f"{len(fields)} fields; expected {len(PAPER_HEADER)}")
    *key, accuracy = fields
    table = TABLES.get(key[1])
    known = DATASETS, TABLES, rows(), table.settings if table else ()
    for name, value, names in zip(PAPER_HEADER, key, known, strict=False):
        if value not in names:
            raise UserError(f"no {name} is called {value!r}; expected one of {', '.join(names)}")
    try:
        value = float(accuracy)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise UserError(
            f"the accuracy is {accuracy!r}; expected per cent, a number from 0 to 100 such as 83.5"
        )
    return tuple(key), value


def notes_on(runs):
    """Sentences for below a table on the programs, machines and data of its runs."""
    done = runs[runs.state == "done"].drop_duplicates("identity")
    kinds = done.groupby("environment").size().items()
    sentences = [f"{n} run{'s' * (n > 1)} on {kind}." for kind, n in kinds]
    if len(done):
        sentences.append(
            f"Training took {done.seconds.sum() / 3600:.2f} h in all, each run by its own clock. "
            f"Data: fingerprint {', '.join(done.fingerprint.str[:12].unique())}."
        )
    return sentences


# --------------------------------------------------------------------------------------------------
# The parts of a table, in a format
# --------------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """A text format: how it writes plain text, bold, the title of a group, and code."""

    escape: Callable
    bold: str
    group: str
    code: Callable
    before_marks: str


def _body(sheet, form):
    """The table as a DataFrame of texts."""
    import pandas as pd

    found, known = sheet.found, rows()
    columns, lines = ["method"], []
    for setting in found.settings:
        columns += [SETTINGS[setting].title] + ["paper"] * (sheet.paper is not None)
    verdicts = {(test.row, test.setting): test.verdict for test in found.tests}
    for kind, title in GROUPS.items():
        of_kind = [row for row in found.rows if known[row].kind == kind]
        if of_kind:
            lines.append([form.group % form.escape(title)] + [""] * (len(columns) - 1))
        for row in of_kind:
            lines.append([form.escape(known[row].title)])
            for setting in found.settings:
                cell = found.cells.loc[(row, setting)]
                text = form.escape(_entry(cell, found))
                marks = "†" * bool(cell.baseline) + MARKS[verdicts.get((row, setting), 0)]
                lines[-1].append(
                    (form.bold % text if cell.best else text)
                    + form.before_marks * bool(marks)
                    + form.escape(marks)
                )
                if sheet.paper is not None:
                    figure = sheet.paper.get((row, setting))
                    lines[-1].append(form.escape(NONE if figure is None else f"{figure:.1f}"))
    return pd.DataFrame(lines, columns=[form.escape(column) for column in columns])


def _entry(cell, found):
    factor, digits = found.metric.factor, found.decimals
    text = f"{factor * cell['mean']:.{digits}f}" if cell.n else NONE
    if cell.n > 1:
        text += f" ± {factor * cell.sd:.{digits}f}"
    return text if cell.complete else f"{text} ({cell.n} of {cell.wanted})"


def _warning(found):
    """A sentence if runs are missing."""
    done, wanted = found.cells.n.sum(), found.cells.wanted.sum()
    return [] if found.complete else [f"Incomplete: {done} of {wanted} runs are done."]


def _caption(sheet):
    """Sentences on how to read the table."""
    found, metric = sheet.found, sheet.found.metric
    n, seeds = len(found.seeds), ", ".join(map(str, found.seeds))
    over = f"as mean ± sample standard deviation (n − 1) over n = {n} seeds ({seeds})."
    if n == 1:
        over = f"of one run (n = 1, seed {seeds}), so without standard deviation and tests."
    sentences = [f"Test {metric.words} {metric.unit}, {over}"]
    sentences.append(f"Bold: the {metric.best} mean of a column.")
    if not found.complete:
        sentences.append("Cells with missing runs are neither best nor baseline nor tested.")
    if found.cells.baseline.any():
        sentences.append(
            f"†: the best baseline of a column: the {metric.best} mean test {metric.words} without "
            f"a schedule. Choosing it by test {metric.words} favours the baselines."
        )
    if any(test.p is not None for test in found.tests):
        sentences.append(
            f"▲ ▼: a schedule significantly better or worse than † (paired t-test, Holm-corrected "
            f"p < {ALPHA:g})."
        )
    if sheet.paper is not None:
        sentences.append("paper: the accuracy that the paper reports.")
    return sentences


def _sections(found, form):
    """(title, explanation, DataFrame of tests or None, what is left out) of each family."""
    import pandas as pd

    for kind, other, tests in (
        (SCHEDULE, "the best baseline", found.tests),
        (ABLATION, "the whole method", found.ablations),
    ):
        if not tests:
            continue
        made = [test for test in tests if not test.missing]
        unit = found.metric.differences
        explanation = f"Paired over seeds: mean difference in {unit} from {other}"
        if any(test.p is not None for test in made):
            explanation += (
                f", its {CONFIDENCE:.0%} t confidence interval, and the p of the two-sided t-test, "
                f"which Holm's method corrects for the number of tests here ({len(made)})"
            )
        if any(test.p is not None and test.low is None for test in made):
            explanation += (
                ". Differences that do not vary have the p of the sign-flip test: 1 if they are "
                "zero, else 2 to the power of 1 − n"
            )
        lines = [[form.escape(text) for text in _test_line(test, found)] for test in made]
        header = [form.escape(text) for text in TEST_HEADER]
        missing = "; ".join(
            f"{rows()[test.row].title}, {SETTINGS[test.setting].title} ({test.missing})"
            for test in tests
            if test.missing
        )
        apart = "; ".join(
            f"{rows()[test.row].title}, {SETTINGS[test.setting].title} ({test.apart})"
            for test in made
            if test.apart
        )
        left_out = [f"Not tested: {missing}."] * bool(missing)
        left_out += [
            f"Seeds left out, because the two runs come from different processors: {apart}."
        ] * bool(apart)
        yield (
            f"{GROUPS[kind]} against {other}",
            f"{explanation}.",
            pd.DataFrame(lines, columns=header) if made else None,
            " ".join(left_out),
        )


def _test_line(test, found):
    def signed(difference):
        text = f"{found.metric.factor * difference:+.{found.decimals + 1}f}".replace("-", "−")
        return text if set(text) & set("123456789") else text[1:]

    interval = NONE if test.low is None else f"{signed(test.low)} to {signed(test.high)}"
    titles = SETTINGS[test.setting].title, rows()[test.row].title, rows()[test.other].title
    return [*titles, str(test.n), signed(test.difference), interval, _p(test.p), _p(test.p_holm)]


def _p(p):
    if p is None:
        return NONE
    return "< 0.0001" if p < 1e-4 else f"{p:.3g}"


def _note(note, form):
    """A note in one line: code between backticks, everything else escaped."""
    parts = " ".join(note.split()).split("`")
    return "".join(form.code(p) if i % 2 else form.escape(p) for i, p in enumerate(parts))


# --------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------


def markdown(sheet):
    found, form = sheet.found, _MARKDOWN
    parts = [f"## {found.table.replace('table', 'Table ')}: {form.escape(sheet.title)}"]
    parts += [form.bold % text for text in _warning(found)]
    parts += [_pipes(_body(sheet, form)), form.escape(" ".join(_caption(sheet)))]
    for title, explanation, tests, missing in _sections(found, form):
        parts += [f"### {title}", form.escape(explanation)]
        parts += [] if tests is None else [_pipes(tests, TEST_ALIGN)]
        parts += [form.escape(missing)] if missing else []
    if sheet.notes:
        notes = "\n".join(f"- {_note(note, form)}" for note in sheet.notes)
        parts += ["### Notes", notes]
    return "\n\n".join(parts) + "\n"


def _pipes(frame, align=""):
    sides = {"l": "left", "r": "right"}
    align = [sides[side] for side in align or "l" * len(frame.columns)]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def latex(sheet):
    """Floats for \\input; booktabs is the only package they need."""
    found, form = sheet.found, _LATEX
    label = f"tab:{sheet.dataset}-{found.table}"
    sentences = [f"{sheet.title}.", *_warning(found), *_caption(sheet)]
    body = _body(sheet, form)
    notes = [rf"{_note(note, form)}\par" for note in sheet.notes]
    floats = [_float(body, "l" * len(body.columns), sentences, label, notes)]
    for i, (title, explanation, tests, missing) in enumerate(_sections(found, form)):
        if tests is not None:
            sentences = [f"{sheet.title}. {title}.", explanation, missing]
            floats.append(_float(tests, TEST_ALIGN, sentences, f"{label}-tests-{i + 1}"))
    return "\n".join(["% Needs \\usepackage{booktabs}.", *floats])


def _float(frame, columns, sentences, label, notes=()):
    text = frame.to_latex(
        index=False,
        escape=False,
        column_format=f"@{{}}{columns}@{{}}",
        caption=_escape_latex(" ".join(sentences).strip()),
        label=label,
    )
    text = text.replace(r"\begin{tabular}", "\\centering\\footnotesize\n\\begin{tabular}")
    below = ["", r"\raggedright", *notes] if notes else []
    return text.replace(r"\end{table}", "\n".join([*below, r"\end{table}"]))


def cells_csv(sheet):
    """A line per cell."""
    found, metric = sheet.found, sheet.found.metric
    tests = {(t.row, t.setting): t for t in (*found.tests, *found.ablations) if not t.missing}
    cells = found.cells.drop(columns="complete").reset_index()
    cells.insert(0, "table", found.table)
    cells.insert(1, "dataset", sheet.dataset)
    cells.insert(3, "title", [rows()[row].title for row in cells.row])
    cells[["mean", "sd"]] *= metric.factor
    cells[["best", "baseline"]] = cells[["best", "baseline"]].astype(int)
    of_cell = [tests.get(key) for key in zip(cells.row, cells.setting, strict=True)]
    cells["against"] = [test and test.other for test in of_cell]
    cells["diff"] = [metric.factor * t.difference if t else float("nan") for t in of_cell]
    cells["p_holm"] = [f"{t.p_holm:.6g}" if t and t.p_holm is not None else "" for t in of_cell]
    cells["paper"] = [(sheet.paper or {}).get(key, "") for key in found.cells.index]
    if metric is not ACCURACY:  # the format is older than other metrics
        cells.insert(cells.columns.get_loc("mean"), "metric", metric.name)
    return cells.to_csv(index=False, float_format=metric.csv)


def _escape_markdown(text):
    """``text`` to stand in a line or a table cell as it is; _ means nothing inside a word."""
    return re.sub(r"([\\`*\[\]|~$]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w))", r"\\\1", text)


_LATEX_OF = {
    **{character: f"\\{character}" for character in "{}$&#%_"},
    **{character: f"${character}$" for character in "<>|"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "†": r"$^{\dagger}$",
    "▲": "$^{+}$",
    "▼": "$^{-}$",
}


def _escape_latex(text):
    return "".join(_LATEX_OF.get(character, character) for character in text)


def _code_latex(text):
    return rf"\texttt{{{_escape_latex(text).replace('-', '{-}')}}}"  # else -- is one dash


_MARKDOWN = _Form(_escape_markdown, "**%s**", "*%s*", lambda text: f"`{text}`", " ")
_LATEX = _Form(_escape_latex, r"\textbf{%s}", r"\addlinespace \textit{%s}", _code_latex, "")
