"""A table as files: Markdown, LaTeX, tidy CSV, and the list of the runs that it is made of.

Texts are put together once, in plain characters (± − – † ▲ ▼), and escaped by the format they go
into. Code in notes stands between backticks.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from auxilearn.errors import UserError
from auxilearn.files import read_regular
from auxilearn.run.record import write_aside
from auxilearn.tables.protocol import (
    ABLATION,
    BASELINE,
    DATASETS,
    ROWS,
    SCHEDULE,
    SETTINGS,
    TABLES,
    TARGET_ONLY,
)
from auxilearn.tables.statistics import ALPHA, CONFIDENCE, evaluate, runs

PAPER_HEADER = ["dataset", "table", "row", "setting", "accuracy"]
# Data sets whose tables have the paper's figures beside their own, given or not.
PAPER_DATASETS = ("cub",)
CELL_HEADER = [
    *("table", "dataset", "row", "title", "setting", "n", "wanted", "mean", "sd", "best"),
    *("baseline", "against", "diff", "p_holm", "paper"),
]
RUN_HEADER = [
    *("row", "setting", "seed", "state", "test_accuracy", "valid_accuracy", "identity"),
    *("directory", "command"),
]
NONE, BASELINE_MARK, MARKS = "–", "†", {1: "▲", -1: "▼", 0: ""}
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


def write_table(
    table_name, dataset_name, results, seeds, out_dir, paper_file=None, notes=(), data=None
):
    """Write ``<table>.md``, ``.csv``, ``.tex`` and ``<table>_runs.csv``; returns their paths.

    The same arguments give the same bytes, in whatever order ``results`` come.

    Args:
        results: ``Result`` of each wanted run.
        paper_file: CSV of the paper's figures (``read_paper``), or None.
        notes: lines below the table; what stands between backticks is code.
        data: name of data that are not those ``dataset_name`` stands for, but in its layout.

    The cells' CSV is in per cent and points, the runs' as the runs recorded it, in [0, 1].

    Raises:
        UserError: a mistake in ``paper_file``, scipy is missing, or a file cannot be written.
    """
    table = _Table(table_name, dataset_name, results, seeds, paper_file, notes, data)
    out = Path(out_dir)
    files = {
        f"{table_name}.md": table.markdown(),
        f"{table_name}.csv": table.cells_csv(),
        f"{table_name}.tex": table.latex(),
        f"{table_name}_runs.csv": table.runs_csv(),
    }
    for name, text in files.items():
        # A path that is no valid text would stop the encoder.
        _write(out / name, text.encode("utf-8", "backslashreplace"))
    return [out / name for name in files]


def markdown(table_name, dataset_name, results, seeds, paper_file=None, notes=(), data=None):
    """What ``write_table`` writes into ``<table>.md``."""
    return _Table(table_name, dataset_name, results, seeds, paper_file, notes, data).markdown()


def read_paper(path):
    """{(dataset, table, row, setting): per cent} of a CSV file with the columns PAPER_HEADER.

    UserError names the file and the line of what cannot be used.
    """
    path = Path(path)
    columns = ",".join(PAPER_HEADER)
    try:
        text = read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a CSV file with the header "
            f"{columns}"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    figures, lines = {}, {}
    header = None
    for line, fields in _csv_lines(path, text):
        fields = [field.strip() for field in fields]
        if header is None:
            header = fields
            if header != PAPER_HEADER:
                raise UserError(
                    f"{path}, line {line}: the header is {_shown(','.join(fields))}; expected "
                    f"{columns}"
                )
        elif any(fields):
            key, accuracy = _paper_entry(f"{path}, line {line}", fields)
            if key in figures:
                raise UserError(
                    f"{path}, line {line}: {', '.join(key)} is given in line {lines[key]} already; "
                    "remove one of the two"
                )
            figures[key], lines[key] = accuracy, line
    if header is None:
        raise UserError(f"{path}, line 1: the file is empty; expected the header {columns}")
    return figures


def _csv_lines(path, text):
    """(number of its first line, fields) of each line that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {line}: not CSV ({error})") from None
        if fields:
            yield line, fields


def _paper_entry(where, fields):
    """((dataset, table, row, setting), per cent)."""
    if len(fields) != len(PAPER_HEADER):
        raise UserError(
            f"{where}: {len(fields)} fields; expected {len(PAPER_HEADER)}: "
            f"{', '.join(PAPER_HEADER)}"
        )
    *key, accuracy = fields
    for name, value, known in zip(PAPER_HEADER, key, (DATASETS, TABLES, ROWS), strict=False):
        if value not in known:
            raise UserError(
                f"{where}: no {name} is called {_shown(value)}; expected one of {', '.join(known)}"
            )
    settings = TABLES[key[1]].settings
    if key[3] not in settings:
        raise UserError(
            f"{where}: {key[1]} has no setting {_shown(key[3])}; expected one of "
            f"{', '.join(settings)}"
        )
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{0,20})?", accuracy) or float(accuracy) > 100:
        raise UserError(
            f"{where}: the accuracy is {_shown(accuracy)}; expected per cent, a number from 0 to "
            "100 such as 83.5"
        )
    return tuple(key), float(accuracy)


def _shown(value):
    """``value`` in a message, however long or odd it is."""
    return ascii(value if len(value) <= 60 else value[:57] + "...")


def _write(path, content):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); give another folder"
        ) from None


# --------------------------------------------------------------------------------------------------
# What is said, in whichever format
# --------------------------------------------------------------------------------------------------


class _Table:
    """The arguments of ``write_table``, evaluated."""

    def __init__(self, name, dataset, results, seeds, paper_file, notes, data):
        self.name, self.dataset, self.notes = name, dataset, list(notes)
        self.data = data or DATASETS[dataset].title
        self.found = evaluate(name, results, seeds)
        self.results = runs(results)
        self.paper_file = paper_file
        figures = {} if paper_file is None else read_paper(paper_file)
        self.paper = {key[2:]: v for key, v in figures.items() if key[:2] == (dataset, name)}
        self.with_paper = (dataset in PAPER_DATASETS and not data) or bool(self.paper)
        self.test_of = {
            (test.row, test.setting): test for test in (*self.found.tests, *self.found.ablations)
        }

    @property
    def title(self):
        return f"{TABLES[self.name].title}, {self.data}"

    def header(self):
        columns = ["method"]
        for setting in self.found.settings:
            columns += [SETTINGS[setting].title] + ["paper"] * self.with_paper
        return columns

    def groups(self):
        """[(title, rows)], a group for every kind."""
        kinds = dict.fromkeys(row.kind for row in ROWS.values())
        groups = [(GROUPS[k], [r for r in self.found.rows if ROWS[r].kind == k]) for k in kinds]
        return [(title, rows) for title, rows in groups if rows]

    def entry(self, row, setting):
        """(text, marks, whether it is the best) of a cell."""
        cell = self.found.cells[row, setting]
        text = NONE if cell.mean is None else f"{100 * cell.mean:.1f}"
        if cell.sd is not None:
            text += f" ± {100 * cell.sd:.1f}"
        if not cell.complete:
            text += f" ({cell.n} of {cell.wanted})"
        marks = BASELINE_MARK if self.found.baseline[setting] == row else ""
        test = self.test_of.get((row, setting))
        # An ablation is compared with something else, so its mark would be misread.
        if test and ROWS[row].kind == SCHEDULE:
            marks += MARKS[test.verdict]
        return text, marks, row in self.found.best[setting]

    def paper_entry(self, row, setting):
        figure = self.paper.get((row, setting))
        return NONE if figure is None else f"{figure:.1f}"

    def body(self, form):
        """[(group title, lines of cells)] in a ``form``."""
        return [(title, [self._line(row, form) for row in rows]) for title, rows in self.groups()]

    def _line(self, row, form):
        line = [form.escape(ROWS[row].title)]
        for setting in self.found.settings:
            text, marks, best = self.entry(row, setting)
            text = form.bold(form.escape(text)) if best else form.escape(text)
            line.append(text + form.before_marks * bool(marks) + form.escape(marks))
            if self.with_paper:
                line.append(form.escape(self.paper_entry(row, setting)))
        return line

    def warning(self):
        """What is missing; None if nothing is."""
        cells = self.found.cells.values()
        done, wanted = sum(cell.n for cell in cells), sum(cell.wanted for cell in cells)
        return None if done == wanted else f"Incomplete: {done} of {wanted} runs are done."

    def caption(self):
        """Sentences on how to read the table, † ▲ ▼ included."""
        found = self.found
        seeds = ", ".join(str(seed) for seed in found.seeds)
        if len(found.seeds) == 1:
            over = f"of one run (n = 1, seed {seeds}), so without standard deviation and tests."
        else:
            over = (
                f"as mean ± sample standard deviation (n − 1) over n = {len(found.seeds)} seeds "
                f"({seeds})."
            )
        sentences = [f"Test accuracy in per cent, {over}", "Bold: the highest mean of a column."]
        if self.warning():
            sentences.append(
                f"Cells with fewer runs than wanted say so, as ({max(len(found.seeds) - 1, 0)} of "
                f"{len(found.seeds)}); they are neither best nor baseline nor tested."
            )
        if any(found.baseline.values()):
            sentences.append(
                "†: the best baseline of a column: the highest mean test accuracy without a "
                "schedule. Choosing it by test accuracy favours the baselines."
            )
        if any(test.p_holm is not None for test in found.tests):
            sentences.append(
                f"▲ ▼: a schedule significantly better or worse than † (paired t-test, "
                f"Holm-corrected p < {ALPHA:g})."
            )
        if self.with_paper:
            source = f", from {Path(self.paper_file).name}" if self.paper_file else ""
            sentences.append(f"paper: the accuracy that the paper reports{source}.")
        return sentences

    def test_sections(self):
        """[(title, explanation, lines, what could not be tested or None)] of the families."""
        found = self.found
        families = [
            ("the best baseline", "of its column", found.tests, found.untested),
            ("the whole method", "", found.ablations, found.untested_ablations),
        ]
        sections = []
        for (other, which, tests, untested), kind in zip(
            families, (SCHEDULE, ABLATION), strict=True
        ):
            if not tests and not untested:
                continue
            missing = "; ".join(self._why_untested(*pair) for pair in untested)
            sections.append(
                (
                    f"{GROUPS[kind]} against {other}",
                    _explanation(f"{other} {which}".strip(), tests),
                    [_test_line(test) for test in tests],
                    f"Not tested: {missing}." if missing else None,
                )
            )
        return sections

    def _why_untested(self, row, other, setting):
        what = f"{ROWS[row].title}, {SETTINGS[setting].title}"
        if other is None:
            return f"{what} (no baseline is complete)"
        for name in (row, other):
            cell = self.found.cells.get((name, setting))
            if cell is None:
                return f"{what} ({ROWS[name].title} is not in this table)"
            if not cell.complete:
                return f"{what} ({ROWS[name].title} has {cell.n} of {cell.wanted} runs)"
        raise AssertionError("both cells are complete")

    # ----------------------------------------------------------------------------------------------
    # Formats
    # ----------------------------------------------------------------------------------------------

    def markdown(self):
        header = self.header()
        number = self.name.replace("table", "Table ")
        lines = [f"## {number}: {_MARKDOWN.escape(self.title)}", ""]
        if self.warning():
            lines += [_MARKDOWN.bold(self.warning()), ""]
        lines += _markdown_head(header, "l" * len(header))
        for title, rows in self.body(_MARKDOWN):
            lines.append(_markdown_line([f"*{title}*"] + [""] * (len(header) - 1)))
            lines += [_markdown_line(row) for row in rows]
        lines += ["", _MARKDOWN.escape(" ".join(self.caption()))]
        for title, explanation, tests, missing in self.test_sections():
            lines += ["", f"### {_MARKDOWN.escape(title)}", "", _MARKDOWN.escape(explanation)]
            if tests:
                lines += ["", *_markdown_head(TEST_HEADER, TEST_ALIGN)]
                lines += [_markdown_line(map(_MARKDOWN.escape, line)) for line in tests]
            if missing:
                lines += ["", _MARKDOWN.escape(missing)]
        if self.notes:
            lines += ["", "### Notes", ""]
            lines += [f"- {_note(note, _MARKDOWN)}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def latex(self):
        """Floats for \\input; booktabs is the only package they need."""
        # Flush left, means stand in line whatever comes after them.
        columns = "l" * len(self.header())
        body = []
        for _, rows in self.body(_LATEX):
            body += [r"\midrule", *(_latex_line(row) for row in rows)]
        head = _latex_line(map(_LATEX.escape, self.header()))
        caption = " ".join([f"{self.title}.", *filter(None, [self.warning()]), *self.caption()])
        notes = [_note(note, _LATEX) for note in self.notes]
        lines = ["% Needs \\usepackage{booktabs}."]
        lines += _latex_float(
            f"tab:{self.dataset}-{self.name}", caption, columns, [head, *body], notes
        )
        for i, (title, explanation, tests, missing) in enumerate(self.test_sections()):
            caption = f"{self.title}. {title}. {explanation} {missing or ''}"
            rows = [_latex_line(map(_LATEX.escape, TEST_HEADER)), r"\midrule"]
            rows += [_latex_line(map(_LATEX.escape, line)) for line in tests]
            label = f"tab:{self.dataset}-{self.name}-tests-{i + 1}"
            lines += ["", *_latex_float(label, caption, TEST_ALIGN, rows if tests else [], [])]
        return "\n".join(lines) + "\n"

    def cells_csv(self):
        lines = []
        for row in self.found.rows:
            for setting in self.found.settings:
                cell = self.found.cells[row, setting]
                test = self.test_of.get((row, setting))
                lines.append(
                    [
                        *(self.name, self.dataset, row, ROWS[row].title, setting),
                        *(cell.n, cell.wanted, _per_cent(cell.mean), _per_cent(cell.sd)),
                        int(row in self.found.best[setting]),
                        int(row == self.found.baseline[setting]),
                        test.other if test else "",
                        _per_cent(test.difference) if test else "",
                        f"{test.p_holm:.6g}" if test and test.p_holm is not None else "",
                        self.paper.get((row, setting), ""),
                    ]
                )
        return _csv_text(CELL_HEADER, lines)

    def runs_csv(self):
        """A run that ``results`` lack is one to do, of which nothing more is known."""
        lines = []
        for row, setting in self.found.cells:
            for seed in self.found.seeds:
                result = self.results.get((row, setting), {}).get(seed)
                if result is None:
                    known = {"row": row, "setting": setting, "seed": seed, "state": "to do"}
                else:
                    known = result._asdict()
                lines.append([known.get(name) for name in RUN_HEADER])
        return _csv_text(RUN_HEADER, lines)


def _explanation(against, tests):
    """How to read the lines of ``tests``."""
    family = sum(test.p is not None for test in tests)
    text = f"Every method against {against}, paired over seeds: mean difference in points"
    if not family:
        return f"{text}. A test needs two seeds."
    text += (
        f" with its {CONFIDENCE:.0%} t confidence interval, and the two-sided t-test's p, which "
        f"Holm's method corrects for the {_count(family, 'test')} of this section."
    )
    if any(test.p is not None and test.low is None for test in tests):
        text += (
            " Differences that do not vary have no interval; their p is the sign-flip test's: 1 if "
            "they are zero, else 2 to the power of 1 − n."
        )
    return text


def _test_line(test):
    interval = NONE if test.low is None else f"{_points(test.low)} to {_points(test.high)}"
    return [
        SETTINGS[test.setting].title,
        ROWS[test.row].title,
        ROWS[test.other].title,
        str(test.n),
        _points(test.difference),
        interval,
        _p(test.p),
        _p(test.p_holm),
    ]


def _points(difference):
    """A difference of accuracies in points, with its sign."""
    text = f"{100 * difference:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def _p(p):
    if p is None:
        return NONE
    return "< 0.0001" if p < 1e-4 else f"{p:.3g}"


def _per_cent(value):
    return "" if value is None else f"{100 * value:.6f}"


def _count(n, noun):
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _csv_text(header, lines):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def _note(note, form):
    """A note in one line: code between backticks, everything else escaped."""
    parts = re.split(r"`([^`]*[^`\s][^`]*)`", _one_line(note))
    parts[2:-1:2] = [between or " " for between in parts[2:-1:2]]  # `` would mean something else
    return "".join(form.code(p) if i % 2 else form.escape(p) for i, p in enumerate(parts))


# --------------------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------------------


def _escape_markdown(text):
    """``text`` to stand in a line or a table cell as it is. What means nothing stays readable."""
    text = re.sub(r"([\\`*\[\]|~$]|<(?=[A-Za-z/!?]))", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # but not inside_a_name
    text = re.sub(r"&(?=#?\w+;)", r"\\&", text)
    # What would begin a heading, a list or a quotation, or underline one.
    text = re.sub(r"^(?=#+(\s|$)|[-+](\s|$)|>|[-=]+\s*$)", r"\\", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def _markdown_head(columns, align):
    """Header and rule of a table; ``align`` has l or r for every column."""
    rule = [":--" if side == "l" else "--:" for side in align]
    return [_markdown_line(map(_escape_markdown, columns)), _markdown_line(rule)]


def _markdown_line(cells):
    return f"| {' | '.join(cells)} |"


# --------------------------------------------------------------------------------------------------
# LaTeX
# --------------------------------------------------------------------------------------------------

_LATEX_OF = {
    **{character: f"\\{character}" for character in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "`": r"\textasciigrave{}",
    # Not an option or a star after a line's end, nor a longer dash.
    **{character: f"{{{character}}}" for character in "[]*-"},
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "†": r"$^{\dagger}$",
    "▲": "$^{+}$",
    "▼": "$^{-}$",
}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u030a": "r",
    "\u0327": "c",
    "\u030c": "v",
}


def _escape_latex(text):
    return "".join(map(_latex_character, text))


def _latex_character(character):
    if character in _LATEX_OF:
        return _LATEX_OF[character]
    if character.isascii():
        return character
    letter, *accents = unicodedata.normalize("NFD", character)
    if letter.isascii() and letter.isalpha() and len(accents) == 1 and accents[0] in _ACCENTS:
        return f"\\{_ACCENTS[accents[0]]}{{{letter}}}"
    return f"{{[}}U+{ord(character):04X}{{]}}"  # LaTeX stops at characters its fonts lack


def _latex_line(cells):
    return " & ".join(cells) + r" \\"


def _latex_float(label, caption, columns, rows, notes):
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escape_latex(caption)}}}"]
    lines.append(rf"\label{{{label}}}")
    if rows:
        lines += [
            r"\smallskip\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
        ]
        lines += [*rows, r"\bottomrule", r"\end{tabular}"]
    if notes:
        lines += ["", r"\raggedright\footnotesize"]
        lines += [rf"{note}\par" for note in notes]
    return [*lines, r"\end{table}"]


def _one_line(text):
    """``text`` with single spaces in the place of spaces, line ends and control characters."""
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())


class _Form(NamedTuple):
    """A text format: how a text, a bold text and code are written in it."""

    escape: Callable
    bold: Callable
    code: Callable
    before_marks: str


_MARKDOWN = _Form(_escape_markdown, lambda text: f"**{text}**", lambda text: f"`{text}`", " ")
_LATEX = _Form(
    _escape_latex,
    lambda text: rf"\textbf{{{text}}}",
    lambda text: rf"\texttt{{{_escape_latex(text)}}}",
    "",
)
