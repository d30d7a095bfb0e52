"""A table (.csv, .tsv) of samples whose columns are labels or inputs, with or without images.

``read_table`` reads it, ``choose`` says what each column is for, ``table_columns`` makes it the
``Columns`` that ``data.columns`` writes. Fields are separated by commas, semicolons or tabs; a
blank field, and those in ``MISSING``, say that there is no value.
"""

import csv
import difflib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from auxilearn.data.columns import Columns, Feature
from auxilearn.data.contract import Task
from auxilearn.data.folder import SUFFIXES, class_folders
from auxilearn.data.image_files import image_size
from auxilearn.data.sets import SET_NAMES, divide
from auxilearn.errors import UserError

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NAN", "null", "NULL", "None", "?")
SEPARATORS = {"\t": "tab", ";": "semicolon", ",": "comma"}
FEW = 20  # whole numbers with at most so many different values are taken for classes
MOST = 100_000  # classes of one column
LARGEST = float(np.finfo(np.float32).max)
CHUNK = 10_000  # rows
NUMBER, CLASSES = "number", "classes"
TARGET, AUXILIARY, FEATURE, IGNORED = "target", "auxiliary", "feature", "ignored"


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Column:
    """A column of n values.

    codes (n,) int32: places in ``values``, -1 where missing; None if there are more than ``MOST``
    different ones. numbers (n,) float64: NaN where missing; None if one of them is no number:
    ``wrong`` is the row and the text of the first such value. meant_as_number: whether more than
    half of the values are numbers, or would be with a decimal point in place of a comma.
    """

    name: str
    codes: np.ndarray | None
    values: tuple[str, ...]
    numbers: np.ndarray | None
    wrong: tuple[int, str] | None
    meant_as_number: bool

    @property
    def present(self):
        """(n,) bool: where there is a value."""
        return self.codes >= 0 if self.codes is not None else ~np.isnan(self.numbers)


@dataclass(frozen=True, eq=False)
class Table:
    """A file of ``rows`` rows under a line of names; ``columns`` by name, in order."""

    path: Path
    rows: int
    columns: dict[str, Column]

    def column(self, name, flag):
        """The column called ``name`` by a flag. UserError: there is none."""
        if name in self.columns:
            return self.columns[name]
        near = [other for other in self.columns if other.lower() == name.lower()]
        near = near or difflib.get_close_matches(name, self.columns, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {_few(list(self.columns))}"
        raise UserError(f"{flag} {name}: {self.path} has no such column; {hint}")

    def line(self, row):
        """The number of the line at which a row (from 0) begins."""
        with _opened(self.path) as lines:
            reader = _reader(lines)
            next(reader)
            filled = ((before, fields) for before, fields in _with_lines(reader) if fields)
            return next(itertools.islice(filled, row, None))[0]

    def refuse(self, row, name, problem):
        """Raise the UserError of a row (from 0) in the column ``name``."""
        raise UserError(f"{self.path}, line {self.line(row)}, column {name}: {problem}")


def read_table(path, flag="--table"):
    """Read a file, which ``flag`` names, into a ``Table``.

    Raises UserError, with file and line: it cannot be read, has no rows, a row is longer or shorter
    than the line of names, or two columns have one name.
    """
    path = Path(path)
    with _opened(path, flag) as lines:
        try:
            reader = _reader(lines)
            names = [name.strip() for name in next(reader, [])]
            _check_names(path, names)
            growing = [_Growing() for _ in names]
            rows = 0
            while chunk := list(itertools.islice(reader, CHUNK)):
                chunk = [fields for fields in chunk if fields]  # a blank line has none
                if {*map(len, chunk)} - {len(names)}:
                    _refuse_width(path, len(names))
                for column, texts in zip(growing, zip(*chunk, strict=True), strict=False):
                    column.add([*map(str.strip, texts)], rows)
                rows += len(chunk)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}; is a quote not closed?"
            ) from None
        except UnicodeError:
            raise UserError(
                f"{path}, line {_undecodable_line(path)}: not readable text; save "
                "the table as CSV in UTF-8"
            ) from None
    if not rows:
        raise UserError(f"{path}: no rows under the line of names; expected one for each sample")
    columns = [column.done(name) for column, name in zip(growing, names, strict=True)]
    return Table(path, rows, dict(zip(names, columns, strict=True)))


def _opened(path, flag="--table"):
    try:
        return open(path, encoding="utf-8-sig", newline="")
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None


def _reader(lines):
    """A reader of the file's fields.

    The separator is the commonest in the line of names, of those that are as many in the next line.
    """
    # What stands in quotes may hold others.
    first, second = (re.sub('"[^"]*"', "", lines.readline()) for _ in range(2))
    lines.seek(0)

    def likely(separator):
        count = first.count(separator)
        return count > 0 and count == second.count(separator), count

    return csv.reader(map(_text, lines), delimiter=max(SEPARATORS, key=likely), strict=True)


def _text(line):
    """The line. UnicodeError: it holds a NUL byte, as UTF-16 and damaged files do."""
    if "\0" in line:
        raise UnicodeError
    return line


def _with_lines(reader):
    """(the line at which a row begins, its fields)."""
    before = reader.line_num
    for fields in reader:
        yield before + 1, fields
        before = reader.line_num


def _check_names(path, names):
    if not names:
        raise UserError(f"{path}, line 1: the file is empty; expected a line of column names")
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{path}, line 1: column {number} has no name; give it one")
        if names.index(name) + 1 != number:
            raise UserError(
                f"{path}, line 1: columns {names.index(name) + 1} and {number} are both called "
                f"{name}; rename one"
            )


def _refuse_width(path, width):
    with _opened(path) as lines:
        reader = _reader(lines)
        separator = SEPARATORS[reader.dialect.delimiter]
        for line, fields in _with_lines(reader):
            if fields and len(fields) != width:
                raise UserError(
                    f"{path}, line {line}: {len(fields)} fields, parted by a {separator}, but line "
                    f"1 names {width} columns; correct it (a field that holds a {separator} must "
                    "stand in quotes)"
                )


def _undecodable_line(path):
    content = path.read_bytes()
    try:
        content.decode("utf-8")
        place = content.index(b"\0")
    except UnicodeDecodeError as error:
        place = error.start
    return content.count(b"\n", 0, place) + 1


class _Growing:
    """A column while it is read: numbered texts, and floats once there are too many of these."""

    def __init__(self):
        self.index = dict.fromkeys(MISSING, -1)
        self.parts, self.wrong = [], None

    def add(self, texts, row):
        """Take the next texts, the first of which is in ``row``."""
        if self.index is not None:
            index = self.index
            codes = (index.setdefault(text, len(index)) for text in texts)
            self.parts.append(np.fromiter(codes, np.int32, len(texts)))
            if len(index) > MOST + len(MISSING):
                self._only_numbers()
        elif not self.wrong:
            self._add_numbers(texts, row)

    def done(self, name):
        """The ``Column``."""
        if self.index is None:
            numbers = None if self.wrong else np.concatenate(self.parts)
            return Column(name, None, (), numbers, self.wrong, self.parts[0] is not None)
        codes = np.concatenate(self.parts)
        numbers = self._as_numbers(codes)
        codes = np.where(codes < 0, np.int32(-1), codes - np.int32(len(MISSING)))
        values = tuple(self.index)[len(MISSING) :]
        meant = numbers is not None
        if not meant:
            fine = [_number(value.replace(",", ".")) is not None for value in values]
            meant = bool(np.array([*fine, False])[codes].sum() > (codes >= 0).sum() / 2)
        return Column(name, codes, values, numbers, self.wrong, meant)

    def _only_numbers(self):
        self.parts, self.index = [self._as_numbers(np.concatenate(self.parts))], None

    def _as_numbers(self, codes):
        """Floats of all codes so far, or None, and then ``wrong`` is set."""
        values = np.full(len(self.index) + 1, np.nan)  # its last entry is that of -1
        for text, code in self.index.items():
            if code >= 0:
                value = _number(text)
                if value is None:
                    self.wrong = int(np.argmax(codes == code)), text
                    return None
                values[code] = value
        return values[codes]

    def _add_numbers(self, texts, row):
        try:
            values = np.fromiter(map(float, texts), np.float64, len(texts))
        except ValueError:  # a blank, or no number
            values = None
        if values is None or "_" in "".join(texts) or not (np.abs(values) <= LARGEST).all():
            found = [np.nan if text in MISSING else _number(text) for text in texts]
            if None in found:
                place = found.index(None)
                self.wrong = row + place, texts[place]
                return
            values = np.array(found)
        self.parts.append(values)


def _number(text):
    """The finite number that a text says, or None. (Python would read 1_000 as well.)"""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST and "_" not in text else None


# --------------------------------------------------------------------------------------------------
# What a column is for
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A column, its role (target, auxiliary, feature, ignored, or what else it is) and its kind
    (number, classes, or why it is ignored)."""

    column: Column
    role: str
    kind: str


def guessed_kind(column):
    """number, classes, or a few words that say why a column is neither.

    Numbers are numbers, except whole ones with at most ``FEW`` different values, and those that
    count the rows. Anything else is classes, unless more than half of the values are different. If
    it looks like numbers with mistakes among them, it is taken for numbers.
    """
    if column.codes is None and column.numbers is None:
        return NUMBER if column.meant_as_number else f"more than {MOST:,} different texts"
    present = column.present
    if not present.any():
        return "no values"
    if column.codes is not None and len(column.values) == 1:
        return "one value alone"
    if column.numbers is not None:
        numbers = column.numbers[present]
        if len(numbers) > FEW and numbers[0] in (0, 1) and (np.diff(numbers) == 1).all():
            return "counts the rows"
        few = column.codes is not None and len(column.values) <= FEW
        return CLASSES if few and (numbers == np.rint(numbers)).all() else NUMBER
    if column.meant_as_number and len(column.values) > FEW:
        return NUMBER
    if len(column.values) > max(FEW, present.sum() / 2):
        return "texts, most of them different"
    return CLASSES


def choose(table, *, target, images, auxiliary=(), features=(), ignore=(), other=(), kinds=None):
    """The ``Choice`` of every column of a ``Table``, in order, the target first.

    Columns that are not named are auxiliary tasks where there are images, else features. Those
    whose values are of no use are ignored, unless they are named.

    Args:
        target: name of a column, or None: the class is the folder of the image.
        images: whether the inputs are images.
        other: {name: role} of columns with another use, such as the paths of images.
        kinds: {name: number or classes} in place of the guess.

    Raises UserError: a flag names no column, or the values of a column are not of its kind.
    """
    kinds = kinds or {}
    named = {target: TARGET} if target is not None else {}
    if images and features:
        raise UserError("--features: the inputs are images here; leave out --features or --images")
    for role, names in ((AUXILIARY, auxiliary), (FEATURE, features), (IGNORED, ignore)):
        for name in names:
            flag = {AUXILIARY: "--auxiliary", FEATURE: "--features", IGNORED: "--ignore"}[role]
            table.column(name, flag)
            before = other.get(name) or named.setdefault(name, role)
            if before != role:
                raise UserError(f"{flag} {name}: the column is the {before} already")
    for flag, names in (("--target", [target] if target is not None else []), ("--kinds", kinds)):
        for name in names:
            table.column(name, flag)
            if name in other:
                raise UserError(f"{flag} {name}: the column is the {other[name]} already")
    choices = []
    for name, column in table.columns.items():
        if name in other:
            choices.append(Choice(column, other[name], ""))
            continue
        kind = kinds.get(name) or guessed_kind(column)
        role = named.get(name)
        if role is None:
            role = AUXILIARY if images else FEATURE
            role = role if kind in (NUMBER, CLASSES) else IGNORED
        elif role != IGNORED and kind not in (NUMBER, CLASSES):
            kind = CLASSES
        if role != IGNORED:
            _check_kind(table, column, kind, role)
        choices.append(Choice(column, role, kind))
    order = [target, *auxiliary]  # then as in the table
    rank = {name: place for place, name in enumerate(dict.fromkeys(order))}
    return sorted(choices, key=lambda choice: rank.get(choice.column.name, len(rank)))


def check_number(table, column, cure=""):
    """UserError with the line of the first value that is no number; ``cure``: another way out."""
    if column.numbers is None:
        row, text = column.wrong
        problem = "is not a finite number"
        if _number(text.replace(",", ".", 1)) is not None:
            problem += " (decimals come after a point, not a comma)"
        table.refuse(
            row,
            column.name,
            f"{_shown(text)} {problem}; correct it, or leave it blank if it is not known{cure}",
        )


def _check_kind(table, column, kind, role):
    name = column.name
    cure = "give another --target" if role == TARGET else f"give --ignore {name}"
    if kind == NUMBER:
        check_number(table, column, f", or give --kinds {name}=classes")
        if not column.present.any():
            raise UserError(f"{table.path}, column {name}: no values; {cure}")
        known = column.numbers[column.present]
        if role == TARGET and (known == known[0]).all():
            raise UserError(f"{table.path}, column {name}: all values are {known[0]:g}; {cure}")
    elif column.codes is None:
        cure = f"give --kinds {name}=number" if column.numbers is not None else cure
        raise UserError(
            f"{table.path}, column {name}: more than {MOST:,} different values are too many "
            f"classes; {cure}"
        )
    elif len(column.values) < 2:
        value = f"one value alone ({_shown(column.values[0])})" if column.values else "no values"
        raise UserError(
            f"{table.path}, column {name}: {value}; expected two classes or more: {cure}"
        )


def described(choices):
    """Lines of a table for the person to check: column, role, kind, classes or range, missing."""
    rows = [("column", "role", "kind", "values", "missing")]
    for choice in choices:
        column, values, missing = choice.column, "", ""
        wrong = choice.kind == NUMBER and column.numbers is None  # such a column is ignored
        if choice.kind in (NUMBER, CLASSES) and not wrong:
            present = column.present
            missing = f"{int((~present).sum()):,}"
            if choice.kind == NUMBER:
                numbers = column.numbers[present]
                values = f"{numbers.min():.6g} to {numbers.max():.6g}"
            else:
                names = [column.values[k] for k in _order(column.values)]
                values = f"{len(names):,} classes: {_few(names)}"
        rows.append((column.name, choice.role, choice.kind, values, missing))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for *cells, missing in rows:
        text = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
        lines.append(f"{text}  {missing.rjust(widths[-1])}".rstrip())
    return lines


def _few(names):
    return ", ".join(_shown(name, 20) for name in names[:4]) + (", ..." if len(names) > 4 else "")


def _shown(text, length=60):
    return text if len(text) <= length else text[: length - 3] + "..."


def _order(values):
    """The places of class names in their order: that of numbers if they all are, else of texts."""
    numbers = [_number(value) for value in values]
    keys = list(values) if None in numbers else list(zip(numbers, values, strict=True))
    return sorted(range(len(values)), key=keys.__getitem__)


def _labels(choice):
    """(``Task``, labels (n,)) of a chosen column."""
    column = choice.column
    if choice.kind == NUMBER:
        return Task(column.name, None), column.numbers
    names, codes = _classes(column)
    return Task(column.name, len(names), names), codes


def _classes(column):
    """(class names in order, their numbers (n,), -1 where missing) of a ``Column``."""
    order = _order(column.values)
    place = np.full(len(order) + 1, -1, np.int32)  # its last entry is that of -1
    place[order] = np.arange(len(order))
    return tuple(column.values[k] for k in order), place[column.codes]


def _feature(choice):
    column = choice.column
    if choice.kind == NUMBER:
        return Feature(column.name, column.numbers)
    names, codes = _classes(column)
    return Feature(column.name, codes, names)


# --------------------------------------------------------------------------------------------------
# The data set
# --------------------------------------------------------------------------------------------------


def table_columns(table, choices, *, images=None, image_column=None, set_column=None, **division):
    """The ``Columns`` of a ``Table`` under the ``choices`` of ``choose``.

    Args:
        images: folder of the images, whose paths are in ``image_column``.
        set_column: column that says train, valid, test or dev of every row; None: drawn.
        division: as of ``sets.divide``.

    Raises UserError: an image is missing, a set is unknown, or the sets cannot be made.
    """
    paths, root, files = None, table.path.absolute().parent, [table.path]
    tasks = [_labels(choice) for choice in choices if choice.role in (TARGET, AUXILIARY)]
    if images is not None:
        root = Path(os.path.abspath(images))
        paths = _image_paths(table, root, image_column)
        if not any(choice.role == TARGET for choice in choices):
            names, codes = class_folders(paths, root)
            taken = {task.name for task, _ in tasks}
            name = "folder" if "folder" not in taken else "folder of the image"
            tasks.insert(0, (Task(name, len(names), names), codes))
    given = None if set_column is None else _sets(table, table.column(set_column, "--set_column"))
    tasks, labels = (list(entries) for entries in zip(*tasks, strict=True))
    sets = divide(tasks[0], labels[0], given, str(table.path), **division)
    features = [_feature(choice) for choice in choices if choice.role == FEATURE]
    if images is None and not features:
        raise UserError(
            f"{table.path}: no column is left to predict from; expected one at least: add it, name "
            "it with --features, or give the rows' --images"
        )
    return Columns(tasks, labels, sets, root, files, paths, features)


def image_column_of(table, folder):
    """The name of the first column whose first value is a file in ``folder``, or ends like an
    image's. UserError: none."""
    with _opened(table.path) as lines:
        reader = _reader(lines)
        next(reader)
        first = next(fields for fields in reader if fields)
    first = dict(zip(table.columns, map(str.strip, first), strict=True))
    for name, text in first.items():
        if text and os.path.isfile(Path(folder) / text):
            return name
    for name, text in first.items():
        if text.lower().endswith(SUFFIXES):
            return name  # whose file is missing
    raise UserError(
        f"{table.path}: no column begins with the path of a file in {folder}; name the column of "
        "paths with --image_column, or the folder they start from with --images"
    )


def _image_paths(table, folder, name):
    """The paths of all rows; every file must be there, none twice."""
    column = table.column(name, "--image_column")
    if column.codes is None:
        paths = _texts(table.path, name)
    else:
        paths = [None if code < 0 else column.values[code] for code in column.codes.tolist()]
    seen = {}
    for row, path in enumerate(paths):
        if path is None:
            table.refuse(row, name, f"no path; expected an image below {folder}")
        first = seen.setdefault(os.path.normpath(os.path.join(folder, path)), row)
        if first != row:
            problem = (
                f"{path} occurs a second time (first on line {table.line(first)}); one image in "
                "two rows could be both trained and tested on"
            )
            table.refuse(row, name, problem)
        try:
            image_size(folder, path, cure="put it there, correct the path, or delete the row")
        except UserError as error:
            table.refuse(row, name, str(error))
    return paths


def _texts(path, name):
    """The values of a column as texts, None where missing: of more than a ``Column`` keeps."""
    with _opened(path) as lines:
        reader = _reader(lines)
        place = [field.strip() for field in next(reader)].index(name)
        texts = (fields[place].strip() for fields in reader if fields)
        return [None if text in MISSING else text for text in texts]


def _sets(table, column):
    """(n,) names of the sets of all rows, from a column."""
    if column.codes is None:
        raise UserError(f"--set_column {column.name}: too many different values to be sets")
    names = np.array([SET_NAMES.get(value.lower(), "") for value in column.values] + [""])
    given = names[column.codes]
    if (given == "").any():
        row = int(np.argmax(given == ""))
        text = column.values[column.codes[row]] if column.codes[row] >= 0 else ""
        table.refuse(
            row, column.name, f"{_shown(text)!r} is no set; expected {', '.join(SET_NAMES)}"
        )
    return given
