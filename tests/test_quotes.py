"""What pages quote from results/ equals the files there.

A comment before a table says that its rows are rows of a table in that file, cell for cell; the
page may leave out rows and columns. A comment behind numbers names a CSV file, a row, a setting and
columns, one for each of the last numbers before it; the page may round them. Of a table in Markdown
it names the file, the first cell of a row and a column:

    <!-- rows of results/digits/table4.md -->

    | +4.3 (p = .018)<!-- results/digits/table4.csv joint_stable corrupted_0.6: diff p_holm --> |
    | 0.1 ± 0.5<!-- results/regret/digits_wide.md joint_stable: mean regret --> |
"""

import csv
import re

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "results/README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = re.compile(r"<!-- rows of (results/\S+\.md) -->\s*((?:\|.*\n?)+)?")
NUMBERS = re.compile(r"<!-- (results/\S+\.csv) (\S+) (\S+): (.+?) -->")
CELL = re.compile(r"<!-- (results/\S+\.md) (\S+): (.+?) -->")
COMMENT = re.compile(r"<!-- (?:rows of )?results/.*?-->", re.DOTALL)
NUMBER = re.compile(r"[-+−]?(?:\d+\.?\d*|\.\d+)")


def tables_in(text):
    """[[{title of a column: cell} of a row] of a table] in a page."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            for line in block.splitlines()
        ]
        found.append([dict(zip(lines[0], line, strict=False)) for line in lines[2:]])
    return found


def wrong_quotes(page, root=ROOT):
    """A phrase for everything that ``page`` marks as quoted and its source does not hold."""
    wrong = [f"not understood: {c}" for c in COMMENT.findall(page) if not _understood(c)]
    for source, block in ROWS.findall(page):
        (quoted,) = tables_in(block) or [[]]
        held = [row for table in tables_in((root / source).read_text()) for row in table]
        wrong += [] if quoted else [f"no table follows: {source}"]
        wrong += [
            f"{source} has no row {row}" for row in quoted if not any(_within(row, h) for h in held)
        ]
    for mark in NUMBERS.finditer(page):
        source, row, setting, columns = mark.groups()
        columns = columns.split()
        with open(root / source, newline="") as file:
            held = [c for c in csv.DictReader(file) if (c["row"], c["setting"]) == (row, setting)]
        wrong += _misquoted(page, mark, [cell[column] for cell in held for column in columns])
    for mark in CELL.finditer(page):
        source, row, column = mark.groups()
        held = [
            line[column]
            for table in tables_in((root / source).read_text())
            for line in table
            if next(iter(line.values())) == row and column in line
        ]
        wrong += _misquoted(page, mark, NUMBER.findall(" ".join(held)))
    return wrong


def _understood(comment):
    return ROWS.match(comment) or NUMBERS.fullmatch(comment) or CELL.fullmatch(comment)


def _misquoted(page, mark, values):
    """A phrase if the last numbers before ``mark`` are not ``values``, rounded."""
    before = NUMBER.findall(COMMENT.sub("", page[: mark.start()].rpartition("\n")[2]))
    numbers = before[-len(values) :]
    if values and len(numbers) == len(values) and all(map(_rounded, numbers, values)):
        return []
    return [f"{mark[0]}: {numbers} for {values}"]


def _within(row, held):
    return all(held.get(title) == cell for title, cell in row.items())


def _rounded(number, value):
    decimals = len(number.partition(".")[2])
    far = abs(float(number.replace("−", "-")) - float(value or "nan"))
    return far <= 0.5001 * 10**-decimals


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_quotes_equal_their_sources(page):
    assert wrong_quotes(page.read_text()) == []


def test_some_numbers_are_marked():
    marked = [len(COMMENT.findall(page.read_text())) for page in PAGES]
    assert sum(marked) >= 20


MARK = "<!-- results/cells.csv joint corrupted_0.4:"


@pytest.mark.parametrize(
    ("page", "faults"),
    [
        (f"| 40 % | −3.2 (p = .018){MARK} diff p_holm --> |", 0),
        (f"12 runs: 85.4 ± 6.0{MARK} mean sd -->, −3{MARK} diff -->", 0),
        (f"3.2 {MARK} diff -->", 1),  # the sign
        (f"−3.3 {MARK} diff -->", 1),
        (f"−3.23{MARK} diff p_holm -->", 1),  # one number for two columns
        (f"85.4{MARK.replace('joint', 'naive')} mean -->", 1),  # no such row
        ("85.4 <!-- results/cells.csv joint -->", 1),
        (
            "<!-- rows of results/table.md -->\n\n| method | 40% |\n|:--|--:|\n"
            "| JTDS | 85.4 ± 6.0 |\n",
            0,
        ),
        ("<!-- rows of results/table.md -->\n| method | 40% |\n|--|--|\n| JTDS | 80.1 |\n", 1),
        ("<!-- rows of results/table.md -->\n| method | 50% |\n|--|--|\n| JTDS | 85.4 ± 6.0 |", 1),
        ("<!-- rows of results/table.md -->\nNo table.", 1),
        ("JTDS reaches 85 ± 6.0<!-- results/table.md JTDS: 40% -->, as shown", 0),
        ("JTDS reaches 85.1 ± 6.0<!-- results/table.md JTDS: 40% -->", 1),
        ("JTDS reaches 6.0<!-- results/table.md JTDS: 40% -->", 1),
        ("JTDS reaches 85.4 ± 6.0<!-- results/table.md JTDS: 50% -->", 1),  # no such column
    ],
)
def test_a_wrong_quote_is_found(page, faults, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/cells.csv").write_text(
        "row,setting,mean,sd,diff,p_holm\njoint,corrupted_0.4,85.4364,5.9981,-3.2282,0.0184\n"
    )
    (tmp_path / "results/table.md").write_text(
        "| method | 20% | 40% |\n| :-- | :-- | :-- |\n| JTDS | 80.1 | 85.4 ± 6.0 |\n"
    )
    assert len(wrong_quotes(page, tmp_path)) == faults
