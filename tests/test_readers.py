"""Readers of published data sets, on tiny files in the data sets' own formats."""

import hashlib
import os
import pickle
import urllib.error

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100, OxfordIIITPet

import data_preprocess
import train_bilevel
from auxilearn.data.movielens import movielens_columns
from auxilearn.data.split import load_split
from auxilearn.data.torchvision_sets import cifar100_columns, pets_columns
from auxilearn.errors import UserError


def refused(read, *arguments, **options):
    with pytest.raises(UserError) as caught:
        read(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------------------------------
# CIFAR-100
# --------------------------------------------------------------------------------------------------

FINE, COARSE = ["apple", "bear", "bed"], ["food", "animals"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """``cifar(protocol, **changes)``: a folder with CIFAR-100's files, 6 + 4 images."""

    def write(protocol=2, sums=True, **changes):
        generator = np.random.default_rng(0)
        folder = tmp_path / "cifar-100-python"
        folder.mkdir(exist_ok=True)
        contents = {
            "train": {"fine_labels": [0, 1, 2, 1, 0, 2], "coarse_labels": [0, 1, 1, 1, 0, 1]},
            "test": {"fine_labels": [2, 0, 0, 2], "coarse_labels": [1, 0, 0, 1]},
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
def test_cifar100_has_classes_and_superclasses(protocol, cifar, capsys):
    root, contents = cifar(protocol)
    columns = cifar100_columns(root)
    assert "warning" not in capsys.readouterr().err
    fine, coarse = columns.tasks
    assert (fine.name, fine.class_names) == ("fine", tuple(FINE))
    assert (coarse.name, coarse.class_names) == ("coarse", tuple(COARSE))
    assert columns.labels[0].tolist() == [0, 1, 2, 1, 0, 2, 2, 0, 0, 2]
    assert columns.labels[1].tolist() == [0, 1, 1, 1, 0, 1, 1, 0, 0, 1]
    assert columns.sets["full_train"].tolist() == [*range(6)]
    assert sorted(fine.class_names[columns.labels[0][k]] for k in columns.sets["dev"]) == FINE
    halves = [*columns.sets["valid"], *columns.sets["test"]]
    assert sorted(halves) == [6, 7, 8, 9] and len(columns.sets["valid"]) == 2
    theirs = [CIFAR100(root, train=train) for train in (True, False)]
    images = np.concatenate([part.data for part in theirs])
    for path, image in zip(columns.paths, images, strict=True):
        assert (np.asarray(Image.open(columns.root / path)) == image).all()
    assert cifar100_columns(root, target="coarse").tasks == [coarse, fine]
    assert "fine, coarse" in refused(cifar100_columns, root, target="colour")


def test_files_of_cifar100_of_another_sum_are_read_with_a_warning(cifar, capsys):
    root, _ = cifar(sums=False)  # torchvision's own sums, of the real files
    assert cifar100_columns(root).paths[7] == "test/00001.png"
    assert capsys.readouterr().err.count("is not the published file") == 3
    changed, _ = cifar(train={"fine_labels": [0, 1, 2, 1, 2, 0]})
    assert "holds the images of other files" in refused(cifar100_columns, changed)


def test_damaged_files_of_cifar100_are_refused(cifar):
    root, _ = cifar(train={"data": np.zeros((6, 100), np.uint8)})
    assert "3072 bytes, found uint8 of shape (6, 100)" in refused(cifar100_columns, root)
    cifar()
    file = root / "cifar-100-python" / "test"
    file.write_bytes(file.read_bytes()[:100])
    assert f"{file}: no data can be read" in refused(cifar100_columns, root)
    file.unlink()
    message = refused(cifar100_columns, root)
    for part in (str(file), "is missing", "--download", CIFAR100.url):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": {"coarse_labels": None}}, ["train", "no coarse_labels"]),
        ({"train": {"coarse_labels": [0, 1]}}, ["train", "0 to 1", "6 images"]),
        ({"test": {"coarse_labels": [0, 1, 2, 1]}}, ["test", "0 to 1", "4 images"]),
        ({"meta": {"coarse_label_names": None}}, ["meta", "no coarse_label_names"]),
    ],
)
def test_superclasses_are_checked(changes, parts, cifar):
    message = refused(cifar100_columns, cifar(**changes)[0])
    for part in parts:
        assert part in message


def test_reading_cifar100_runs_no_code(cifar, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    root, _ = cifar(4, train={"coarse_labels": Evil()})
    assert "mkdir is no part of this data set" in refused(cifar100_columns, root)
    assert not (tmp_path / "executed").exists()


def test_cifar100_from_files_to_a_run(cifar, tmp_path, command):
    root, _ = cifar(sums=False)
    split, record = tmp_path / "split", tmp_path / "record"
    flags = ["--dataset", "cifar100", "--data_root", str(root), "--out_dir", str(split)]
    code, out, _ = command(data_preprocess.main, *flags)
    assert code == 0 and "10 images" in out and "fine, 3 classes; 1 auxiliary task" in out
    assert "already up to date" in command(data_preprocess.main, *flags)[1]
    flags = ["--split_dir", str(split), "--record_dir", str(record), "--epochs", "1"]
    code, out, _ = command(train_bilevel.main, *flags, "--device", "cpu")
    assert code == 0 and "convnet at 32 pixels from random weights, learning rate 0.001" in out


@pytest.mark.parametrize("read", [cifar100_columns, pets_columns])
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
TRAINVAL += ["american_bulldog_3 2 2 1"]
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
    columns = pets_columns(root)
    assert [task.name for task in columns.tasks] == ["breed", "species"]
    assert [column.tolist() for column in columns.labels] == [[0, 1, 0, 1, 0, 1]] * 2
    names = [task.class_names for task in columns.tasks]
    assert names == [("Abyssinian", "American Bulldog"), ("cat", "dog")]
    assert columns.sets["full_train"].tolist() == [0, 1, 2, 3]
    assert sorted([*columns.sets["valid"], *columns.sets["test"]]) == [4, 5]
    assert columns.root == root / "oxford-iiit-pet" / "images"
    assert columns.paths[1] == "american_bulldog_2.jpg"
    theirs = OxfordIIITPet(root, "test", target_types=["category", "binary-category"])
    assert [theirs[n][1] for n in range(2)] == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"test": ["Abyssinian_7 1 1 1", "Abyssinian_8 1"]}, ["test.txt, line 2", "species"]),
        ({"trainval": ["Abyssinian_100 one 1 1"]}, ["trainval.txt, line 1", "'Abyssinian_100 one"]),
        ({"trainval": [*TRAINVAL, "Abyssinian_7 1 3 1"]}, ["trainval.txt, line 5"]),
        ({"test": ["lost_1 1 1 1"]}, ["test.txt, line 1", "lost_1.jpg is missing"]),
        ({"test": ["american_bulldog_9 3 2 1"]}, ["2 names", "breeds up to 3"]),
    ],
)
def test_a_wrong_line_of_pets_is_named(changes, parts, pets):
    message = refused(pets_columns, pets(**changes))
    for part in parts:
        assert part in message


def test_missing_pets_are_named(pets):
    root = pets()
    assert "OxfordIIITPet is missing or incomplete" in refused(pets_columns, root / "nowhere")
    (root / "oxford-iiit-pet" / "annotations" / "test.txt").unlink()
    assert "test.txt" in refused(pets_columns, root)


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
    columns = movielens_columns(movielens(end))
    kept = [row for row in RATINGS if row[2] != 3]
    assert [task.name for task in columns.tasks] == ["click", "rating"]
    click, rating = columns.tasks
    assert (click.class_names, rating.classes) == (("no", "yes"), None)
    assert columns.labels[0].tolist() == [int(stars > 3) for *_, stars in kept]
    assert columns.labels[1].tolist() == [stars for *_, stars in kept]
    values = {f.name: [f.names[k] for k in f.values] for f in columns.features}
    of_user = {1: ("F", "1", "10"), 2: ("M", "56", "2"), 7: ("M", "25", "10")}
    genre = {1: "Animation", 5: "Drama"}
    rows = [(str(u), str(m), genre[m], *of_user[u]) for u, m, _ in kept]
    names = ("user", "movie", "genre", "gender", "age", "occupation")
    assert list(values) == [*names]
    assert [*zip(*(values[name] for name in names), strict=True)] == rows
    age = columns.features[4].names
    assert age == ("1", "25", "56")  # by number
    columns = movielens_columns(movielens(end), target="rating")
    assert [task.name for task in columns.tasks] == ["rating", "click"]


def test_movielens_is_divided_by_the_seed(movielens):
    root = movielens(ratings=[f"1::1::{1 + n % 2}::9" for n in range(205)])
    with pytest.raises(UserError, match="--aux_shot 1 needs 2"):  # no rating above 3
        movielens_columns(root, aux_shot=1)
    root = movielens(ratings=[f"1::1::{1 + 4 * (n % 2)}::9" for n in range(205)])
    sets = movielens_columns(root, seed=5).sets
    counts = {name: len(positions) for name, positions in sets.items()}
    assert counts == {"full_train": 165, "dev": 16, "rest_train": 149, "valid": 20, "test": 20}
    again = movielens_columns(root, seed=5).sets
    assert all((sets[name] == again[name]).all() for name in sets)
    assert (sets["test"] != movielens_columns(root, seed=6).sets["test"]).any()
    assert len(movielens_columns(root, dev_size=7).sets["dev"]) == 7
    root = movielens(ratings=[f"1::1::{1 + 4 * (n % 2)}::9" for n in range(7000)])
    assert len(movielens_columns(root).sets["dev"]) == 512


def test_movielens_from_files_to_a_run(movielens, tmp_path, command):
    root = movielens(ratings=[f"1::1::{1 + 4 * (n % 2)}::9" for n in range(100)])
    split, record = tmp_path / "split", tmp_path / "record"
    flags = ["--dataset", "movielens", "--data_root", str(root), "--out_dir", str(split)]
    code, out, _ = command(data_preprocess.main, *flags, "--target", "rating")
    assert code == 0 and "100 rows of 6 features" in out and "rating, a number" in out
    assert "--download is not for" in command(data_preprocess.main, *flags, "--download")[2]
    loaded = load_split(split)
    assert loaded.rows.shape.categories == [2] * 6  # the one value, and the code of unknown ones
    flags = ["--split_dir", str(split), "--record_dir", str(record), "--epochs", "1"]
    code, out, _ = command(train_bilevel.main, *flags, "--device", "cpu")
    assert code == 0 and "mlp from random weights" in out and "test RMSE: " in out


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
    message = refused(movielens_columns, root)
    for part in (str(root), *parts):
        assert part in message


def test_a_missing_file_of_movielens_is_named(movielens):
    root = movielens()
    (root / "movies.dat").unlink()
    message = refused(movielens_columns, root)
    for part in (str(root / "movies.dat"), "No such file", "ml-1m.zip", "--data_root"):
        assert part in message
