"""Readers of published data sets, on tiny files in the data sets' own formats."""

import hashlib
import os
import pickle
import urllib.error

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100, OxfordIIITPet

from auxilearn.data.movielens import read_movielens
from auxilearn.data.samples import halved
from auxilearn.data.torchvision_sets import read_cifar100, read_pets
from auxilearn.errors import UserError


def refused(read, *arguments, **options):
    with pytest.raises(UserError) as caught:
        read(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_not_for_training_is_halved():
    is_train = np.array([True, False, False, True, False, False, False])
    sets = halved(is_train, seed=5)
    assert (sets[is_train] == "train").all()
    assert (sets == "valid").sum() == 2
    assert (sets == "test").sum() == 3
    assert (sets == halved(is_train, seed=5)).all()
    many = ~np.zeros(100, dtype=bool)
    assert (halved(~many, 1) != halved(~many, 2)).any()


# --------------------------------------------------------------------------------------------------
# CIFAR-100
# --------------------------------------------------------------------------------------------------

FINE, COARSE = ["apple", "bear", "bed"], ["food", "animals"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """``cifar(protocol, **changes)``: a folder with CIFAR-100's files, 4 + 3 images."""

    def write(protocol=2, sums=True, **changes):
        generator = np.random.default_rng(0)
        folder = tmp_path / "cifar-100-python"
        folder.mkdir(exist_ok=True)
        contents = {
            "train": {"fine_labels": [0, 1, 2, 1], "coarse_labels": [0, 1, 1, 1]},
            "test": {"fine_labels": [2, 0, 0], "coarse_labels": [1, 0, 0]},
            "meta": {"fine_label_names": FINE, "coarse_label_names": COARSE},
        }
        for name in ("train", "test"):
            size = len(contents[name]["fine_labels"])
            contents[name]["data"] = generator.integers(256, size=(size, 3072), dtype=np.uint8)
        for name, change in changes.items():
            contents[name] |= change
        for name, content in contents.items():
            content = {key: value for key, value in content.items() if value is not None}
            (folder / name).write_bytes(pickle.dumps(content, protocol))
        if sums:
            md5 = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in contents}
            monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
            monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
            monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
        return tmp_path, contents

    return write


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar100_has_classes_and_superclasses(protocol, cifar):
    root, contents = cifar(protocol)
    samples = read_cifar100(root)
    assert samples.tasks == ["fine", "coarse"]
    assert samples.columns["fine"].tolist() == [0, 1, 2, 1, 2, 0, 0]
    assert samples.columns["coarse"].tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert all(column.dtype == np.int64 for column in samples.columns.values())
    assert samples.class_names == {"fine": FINE, "coarse": COARSE}
    assert samples.sets[:4].tolist() == ["train"] * 4
    assert sorted(samples.sets[4:]) == ["test", "test", "valid"]
    assert (samples.images.shape, samples.images.dtype) == ((7, 32, 32, 3), np.uint8)
    red = contents["test"]["data"][1][:1024].reshape(32, 32)  # planes, in the file
    assert (samples.images[5, :, :, 0] == red).all()


def test_damaged_files_of_cifar100_are_refused(cifar):
    root, _ = cifar(sums=False)  # torchvision's own sums, of the real files
    message = refused(read_cifar100, root)
    for part in (str(root), "CIFAR100", "missing or damaged", "--download", CIFAR100.url):
        assert part in message
    assert "missing" in refused(read_cifar100, root / "nowhere")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": {"coarse_labels": None}}, ["train", "no coarse_labels"]),
        ({"train": {"coarse_labels": [0, 1]}}, ["train", "0 to 1", "4 images"]),
        ({"test": {"coarse_labels": [0, 1, 2]}}, ["test", "0 to 1", "3 images"]),
        ({"meta": {"coarse_label_names": None}}, ["meta", "no coarse_label_names"]),
    ],
)
def test_superclasses_are_checked(changes, parts, cifar):
    message = refused(read_cifar100, cifar(**changes)[0])
    for part in parts:
        assert part in message


def test_reading_superclasses_runs_no_code(cifar, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    root, _ = cifar(4, train={"coarse_labels": Evil()})
    monkeypatch.setattr(  # torchvision trusts a file whose MD5 it knows
        "torchvision.datasets.cifar.pickle.load",
        lambda *_, **__: (
            {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0] * 4}
            | {"fine_label_names": FINE}
        ),
    )
    assert "mkdir is no part of this data set" in refused(read_cifar100, root)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("read", [read_cifar100, read_pets])
def test_a_failed_download_names_what_to_fetch(read, tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    message = refused(read, tmp_path / "data", download=True)
    for part in ("https://www.", str(tmp_path / "data"), "Name or service not known", "by hand"):
        assert part in message


# --------------------------------------------------------------------------------------------------
# Pets
# --------------------------------------------------------------------------------------------------

TRAINVAL = ["Abyssinian_100 1 1 1", "american_bulldog_2 2 2 1", "Abyssinian_101 1 1 1"]
TEST = ["Abyssinian_7 1 1 1", "american_bulldog_9 2 2 1"]


@pytest.fixture
def pets(tmp_path):
    def write(trainval=TRAINVAL, test=TEST):
        folder = tmp_path / "oxford-iiit-pet"
        for name in ("images", "annotations"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, lines in (("trainval", trainval), ("test", test)):
            (folder / "annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")
        for line in TRAINVAL + TEST:
            Image.new("RGB", (4, 3)).save(folder / "images" / f"{line.split()[0]}.jpg")
        return tmp_path

    return write


def test_pets_have_breeds_and_species(pets):
    root = pets()
    samples = read_pets(root)
    assert samples.tasks == ["breed", "species"]
    assert samples.columns["breed"].tolist() == [0, 1, 0, 0, 1]
    assert samples.columns["species"].tolist() == [0, 1, 0, 0, 1]
    names = {"breed": ["Abyssinian", "American Bulldog"], "species": ["cat", "dog"]}
    assert samples.class_names == names
    assert samples.sets[:3].tolist() == ["train"] * 3
    assert sorted(samples.sets[3:]) == ["test", "valid"]
    assert samples.images[1] == root / "oxford-iiit-pet" / "images" / "american_bulldog_2.jpg"
    theirs = OxfordIIITPet(root, "test", target_types=["category", "binary-category"])
    assert [theirs[n][1] for n in range(2)] == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"test": ["Abyssinian_7 1 1 1", "Abyssinian_8 1"]}, ["test.txt, line 2", "species"]),
        ({"trainval": ["Abyssinian_100 one 1 1"]}, ["trainval.txt, line 1", "'Abyssinian_100 one"]),
        ({"trainval": [*TRAINVAL, "Abyssinian_7 1 3 1"]}, ["trainval.txt, line 4"]),
        ({"test": ["lost_1 1 1 1"]}, ["test.txt, line 1", "lost_1.jpg is missing"]),
        ({"test": ["american_bulldog_9 3 2 1"]}, ["2 names", "breeds up to 3"]),
    ],
)
def test_a_wrong_line_of_pets_is_named(changes, parts, pets):
    message = refused(read_pets, pets(**changes))
    for part in parts:
        assert part in message


def test_missing_pets_are_named(pets):
    root = pets()
    assert "OxfordIIITPet is missing or damaged" in refused(read_pets, root / "nowhere")
    (root / "oxford-iiit-pet" / "annotations" / "test.txt").unlink()
    assert "test.txt" in refused(read_pets, root)


# --------------------------------------------------------------------------------------------------
# MovieLens
# --------------------------------------------------------------------------------------------------

USERS = ["1::F::1::10::48067", "2::M::56::2::70072", "7::M::25::10::55117-1234"]
MOVIES = [
    "1::Toy Story (1995)::Animation|Children's|Comedy",
    "5::Mission: Impossible: Misérables (1995)::Drama",
]
RATINGS = [(user, movie, 1 + n % 5) for n, (user, movie) in enumerate([(1, 1), (7, 5), (2, 5)] * 9)]


@pytest.fixture
def movielens(tmp_path):
    """``movielens(file=lines)`` writes the three files, with other lines where given."""

    def write(end="\n", **changes):
        ratings = [f"{u}::{m}::{r}::97830{n:04d}" for n, (u, m, r) in enumerate(RATINGS)]
        lines = {"users": USERS, "movies": MOVIES, "ratings": ratings} | changes
        for name, content in lines.items():
            text = end.join(content) + end
            (tmp_path / f"{name}.dat").write_bytes(text.encode("latin-1"))
        return tmp_path

    return write


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_movielens_has_clicks_and_ratings(end, movielens):
    samples = read_movielens(movielens(end))
    kept = [row for row in RATINGS if row[2] != 3]
    columns, names = samples.columns, samples.class_names
    assert list(columns) == [
        *("user", "movie", "genre", "gender", "age", "occupation", "click", "rating")
    ]
    assert samples.tasks == ["click", "rating"]
    assert samples.images is None
    assert columns["rating"].dtype == np.float32
    assert columns["rating"].tolist() == [rating for *_, rating in kept]
    assert columns["click"].tolist() == [int(rating > 3) for *_, rating in kept]
    assert [int(names["user"][n]) for n in columns["user"]] == [user for user, *_ in kept]
    assert [int(n) for n in columns["movie"]] == [{1: 0, 5: 1}[movie] for _, movie, _ in kept]
    assert names["movie"][1] == "Mission: Impossible: Misérables (1995)"
    assert names["age"] == ["1", "25", "56"]
    assert names["occupation"] == ["2", "10"]
    assert names["click"] == ["no", "yes"]
    of_user = {1: ("F", "1", "10"), 2: ("M", "56", "2"), 7: ("M", "25", "10")}
    for n, (user, movie, _) in enumerate(kept):
        found = [names[name][columns[name][n]] for name in ("gender", "age", "occupation")]
        assert tuple(found) == of_user[user]
        assert names["genre"][columns["genre"][n]] == {1: "Animation", 5: "Drama"}[movie]


def test_movielens_is_divided_by_the_seed(movielens):
    root = movielens(ratings=[f"1::1::{1 + n % 2}::9" for n in range(205)])
    sets = read_movielens(root, seed=5).sets
    counts = {name: int((sets == name).sum()) for name in ("train", "valid", "test")}
    assert counts == {"train": 165, "valid": 20, "test": 20}
    assert (sets == read_movielens(root, seed=5).sets).all()
    assert (sets != read_movielens(root, seed=6).sets).any()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"ratings": ["1::1::4::9", "1::1::6::9"]}, ["ratings.dat, line 2", "'1::1::6::9'"]),
        ({"ratings": ["1::1::4::9", "1::1::4"]}, ["ratings.dat, line 2", "user::movie::rating"]),
        ({"ratings": ["1::1::4::9", "", "1:1:4:9"]}, ["ratings.dat, line 3"]),
        ({"ratings": ["1::1::4.5::9"]}, ["ratings.dat, line 1", "4.5"]),
        ({"ratings": ["UserID,MovieID", "1,2"]}, ["ratings.dat, line 1", "UserID"]),
        ({"ratings": ["-1::1::4::9"]}, ["ratings.dat, line 1"]),
        ({"ratings": ["1::1::4::9", "", "3::1::4::9"]}, ["ratings.dat, line 3: id 3", "users.dat"]),
        ({"ratings": ["1::2::4::9"]}, ["ratings.dat, line 1: id 2", "movies.dat"]),
        ({"ratings": ["1::1::3::9"] * 20}, ["ratings.dat: 0 ratings other than 3"]),
        ({"ratings": [""]}, ["ratings.dat", "empty"]),
        ({"users": [*USERS, "9::X::1::1::1"]}, ["users.dat, line 4", "F or M", "'9::X"]),
        ({"users": [*USERS, USERS[0]]}, ["users.dat, line 4: id 1 occurs a second", "line 1"]),
        ({"movies": ["1::Toy Story (1995)"]}, ["movies.dat, line 1", "movie::title::genre"]),
    ],
)
def test_a_wrong_line_of_movielens_is_named(changes, parts, movielens):
    root = movielens(**changes)
    message = refused(read_movielens, root)
    for part in (str(root), *parts):
        assert part in message


def test_a_missing_file_of_movielens_is_named(movielens):
    root = movielens()
    (root / "movies.dat").unlink()
    message = refused(read_movielens, root)
    for part in (str(root / "movies.dat"), "No such file", "ml-1m.zip", "--data_root"):
        assert part in message
