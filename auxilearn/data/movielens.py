"""MovieLens-1M (Harper and Konstan 2015): its three published files as columns."""

import io
import os
import re
from pathlib import Path

import numpy as np

from auxilearn.data.columns import Columns, Feature, target_first
from auxilearn.data.contract import Task
from auxilearn.data.sets import divide
from auxilearn.errors import UserError

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"

DEV_SIZE = 512  # development rows
_ID = r"(\d{1,18})"
# file: (what a line consists of, a line as a pattern)
FORMATS = {
    "ratings.dat": ("user::movie::rating::time", rf"{_ID}::{_ID}::([1-5])::{_ID}"),
    "users.dat": ("user::F or M::age::occupation::zip", rf"{_ID}::([FM])::{_ID}::{_ID}::[^:]*"),
    "movies.dat": ("movie::title::genre|genre...", rf"{_ID}::(.+)::([^:|]+)[^:]*"),
}


def movielens_columns(root, *, target="click", seed=5, dev_size=None, **division):
    """``click`` (rated above 3) and ``rating`` (1 to 5, a number) from six features.

    Features: user, movie, first genre of the movie, gender, age group and occupation of the user,
    all as classes. Ratings of 3 are dropped. Of the rest, in the file's order, 80 % are training
    data, 10 % validation and 10 % test data, at random by ``seed``. The design is that of the
    authors' later release; what Chen et al. (2022) did is not known here.

    Args: ``root`` holds ratings.dat, users.dat and movies.dat, latin-1 with ``::`` between fields.
    dev_size: development rows, 512 or a tenth of the training rows by default; ``division``: more
    of ``sets.divide``.

    Raises UserError, with file and line, for a file that is missing or a line of another format;
    an id that occurs twice; a rating of an unknown user or movie; no ratings other than 3.
    """
    root = Path(os.path.abspath(root))
    users, movies = (_read_lines(root / name) for name in ("users.dat", "movies.dat"))
    ratings = _read_ratings(root / "ratings.dat")
    user = _places(root / "ratings.dat", ratings[:, 0], users, root / "users.dat")
    movie = _places(root / "ratings.dat", ratings[:, 1], movies, root / "movies.dat")
    kept = ratings[:, 2] != 3
    user, movie, rating = user[kept], movie[kept], ratings[kept, 2]
    if len(rating) < 10:
        raise UserError(
            f"{root / 'ratings.dat'}: {len(rating)} ratings other than 3; expected 10 or more, to "
            "be divided into three sets"
        )
    user_ids, gender, age, occupation = zip(*users, strict=True)
    movie_ids, _, genre = zip(*movies, strict=True)
    features = [
        Feature("user", user, user_ids),
        Feature("movie", movie, movie_ids),
        _feature("genre", genre, movie),
        _feature("gender", gender, user),
        _feature("age", [*map(int, age)], user),
        _feature("occupation", [*map(int, occupation)], user),
    ]
    tasks, labels = target_first(
        [Task("click", 2, ("no", "yes")), Task("rating", None)],
        [(rating > 3).astype(np.int64), rating.astype(np.float64)],
        target,
    )
    given = _random_sets(len(rating), seed)
    if dev_size is None and division.get("aux_shot") is None:
        dev_size = max(1, min(DEV_SIZE, (given == "train").sum() // 10))
    source = str(root / "ratings.dat")
    sets = divide(tasks[0], labels[0], given, source, dev_size=dev_size, seed=seed, **division)
    return Columns(tasks, labels, sets, root, [root / n for n in FORMATS], features=features)


def _feature(name, values, place):
    """The ``Feature`` of rows that take the values of their ``place`` in another file."""
    found, codes = np.unique(values, return_inverse=True)
    return Feature(name, codes[place], tuple(map(str, found)))


def _random_sets(samples, seed):
    sets = np.full(samples, "train")
    order = np.random.default_rng(seed).permutation(samples)
    tenth = samples // 10
    sets[order[:tenth]] = "valid"
    sets[order[tenth : 2 * tenth]] = "test"
    return sets


def _read_bytes(path):
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected the files of MovieLens-1M: unpack {URL} and give "
            "the folder ml-1m as --data_root"
        ) from None
    if not data.strip():
        raise UserError(f"{path}, line 1: the file is empty; unpack {URL} again")
    return data


def _read_lines(path):
    """The fields of every line of a small file. The first one, an id, occurs once."""
    rows, lines = [], {}
    for number, fields in _matches(path, _read_bytes(path)):
        first = lines.setdefault(int(fields[0]), number)
        if first != number:
            raise UserError(
                f"{path}, line {number}: id {fields[0]} occurs a second time (first on line "
                f"{first}); every id is expected once"
            )
        rows.append(fields)
    return rows


def _matches(path, data):
    """Yield (line number, fields) of every line that is not blank. UserError: another format."""
    words, pattern = FORMATS[path.name]
    for number, line in enumerate(data.decode("latin-1").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        match = re.fullmatch(pattern, line, re.ASCII)
        if match is None:
            raise UserError(
                f"{path}, line {number}: expected {words!r}, found {line[:60]!r}; correct it, or "
                f"unpack {URL} again"
            )
        yield number, match.groups()


def _read_ratings(path):
    """(N, 4) int64: user, movie, rating 1 to 5, time."""
    data = _read_bytes(path)
    try:
        rows = np.loadtxt(
            io.BytesIO(data.replace(b"::", b":")), np.int64, delimiter=":", comments=None, ndmin=2
        )
        colons, doubles = data.count(b":"), data.count(b"::")
        sound = rows.shape[1] == 4 and colons == 2 * doubles == 6 * len(rows)
        sound = sound and rows.min() >= 0 and rows[:, 2].min() >= 1 and rows[:, 2].max() <= 5
    except ValueError:
        sound = False
    if not sound:  # slower, and says where
        rows = np.array([fields for _, fields in _matches(path, data)], dtype=np.int64)
    return rows


def _places(path, ids, listed, source):
    """The places (N,) of ``ids`` in the file ``source``, which lists them first on every line."""
    known = np.array([int(row[0]) for row in listed])
    order = np.argsort(known)
    places = order[np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)]
    wrong = np.flatnonzero(known[places] != ids)
    if len(wrong):
        lines = (number for number, _ in _matches(path, _read_bytes(path)))
        number = next(number for row, number in enumerate(lines) if row == wrong[0])
        raise UserError(
            f"{path}, line {number}: id {ids[wrong[0]]} is not in {source}; expected one that it "
            "lists"
        )
    return places
