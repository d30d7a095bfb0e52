"""Readers of tables and of folders of images: kinds, roles, sets, files, and wrong input."""

import csv
import json
import os
import time

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import data_preprocess
from auxilearn.data import table
from auxilearn.data.columns import SET_FILES
from auxilearn.data.contract import Task
from auxilearn.data.folder import images_below
from auxilearn.data.sets import divide
from auxilearn.data.split import load_split
from auxilearn.errors import UserError
from tests.conftest import assert_one_error_line
from tests.test_preprocess import contents

ROWS = 40


def write_csv(path, columns, delimiter=",", encoding="utf-8"):
    """A table of {name: values}; None is blank."""
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.fixture
def columns():
    """Of 40 rows: three classes, a number with blanks, few and many whole numbers, texts."""
    return {
        "species": [("owl", "tit", "emu")[i % 3] for i in range(ROWS)],
        "mass": [None if i % 4 == 1 else f"{i / 8}" for i in range(ROWS)],
        "legs": [str(i % 2 + 10) for i in range(ROWS)],
        "year": [str(1900 + i) for i in range(ROWS)],
        "note": [f"seen by {i}" for i in range(ROWS)],
        "same": ["x"] * ROWS,
        "ring": [("", "?", "NA", "yes", "no")[i % 5] for i in range(ROWS)],
    }


@pytest.fixture
def path(tmp_path, columns):
    return write_csv(tmp_path / "birds.csv", columns)


@pytest.fixture
def prepare(tmp_path, command):
    """``prepare(*flags)`` runs data_preprocess.py: (exit code, stdout, stderr)."""
    return lambda *flags: command(data_preprocess.main, *flags, "--out_dir", tmp_path / "out")


@pytest.fixture
def split(tmp_path):
    return lambda: load_split(tmp_path / "out")


@pytest.fixture
def photos(tmp_path, columns):
    """A picture for every row, ``a/N.png`` or ``b/N.png``; the table has their paths."""
    columns["file"] = [f"{'ab'[i % 2]}/{i}.png" for i in range(ROWS)]
    folder = tmp_path / "photos"
    for i, name in enumerate(columns["file"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (i, 0, 0)).save(folder / name)
    write_csv(tmp_path / "birds.csv", columns)
    return folder


# --------------------------------------------------------------------------------------------------
# Values and kinds
# --------------------------------------------------------------------------------------------------


def test_kinds_are_guessed_and_printed(path, prepare):
    code, out, err = prepare("--table", path, "--target", "species")
    assert (code, err) == (0, "")
    cells = [line.split("  ") for line in out.split("(wrong?")[0].splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    assert cells == [
        ["column", "role", "kind", "values", "missing"],
        ["species", "target", "classes", "3 classes: emu, owl, tit", "0"],
        ["mass", "feature", "number", "0 to 4.875", "10"],
        ["legs", "feature", "classes", "2 classes: 10, 11", "0"],
        ["year", "feature", "number", "1900 to 1939", "0"],
        ["note", "ignored", "texts, most of them different"],
        ["same", "ignored", "one value alone"],
        ["ring", "feature", "classes", "2 classes: no, yes", "24"],
    ]


def test_a_column_that_counts_the_rows_is_no_input(tmp_path):
    rows = {"id": range(1, 41), "year": range(1900, 1940), "odd": [*range(39), 0]}
    columns = table.read_table(write_csv(tmp_path / "t.csv", rows)).columns
    kinds = [table.guessed_kind(column) for column in columns.values()]
    assert kinds == ["counts the rows", "number", "number"]


def test_values_are_those_of_the_file(path, prepare, split, columns):
    prepare(
        "--table", path, "--target", "species", "--auxiliary", "mass", "ring", "--ignore", "legs"
    )
    found = split()
    assert found.tasks == [
        Task("species", 3, ("emu", "owl", "tit")),
        Task("mass", None),
        Task("ring", 2, ("no", "yes")),
    ]
    names = found.tasks[0].class_names
    assert [names[int(k)] for k in found.labels[:, 0]] == columns["species"]
    masses = [0 if text is None else float(text) for text in columns["mass"]]
    assert found.labels[:, 1].tolist() == masses
    assert found.mask[:, 1].tolist() == [text is not None for text in columns["mass"]]
    assert found.mask[:, 2].tolist() == [text in ("yes", "no") for text in columns["ring"]]
    assert found.rows.shape == (1, []) and found.ids[:2] == ["1", "2"]
    years = np.arange(1900.0, 1940)
    train = years[found.indices["full_train"]]
    expected = (years - train.mean()) / train.std()
    np.testing.assert_allclose(found.rows.numbers[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_a_kind_that_is_guessed_wrong_is_a_flag_away(path, prepare, split):
    flags = ("--table", path, "--target", "year", "--auxiliary", "legs")
    prepare(*flags, "--kinds", "legs=number", "--features", "mass")
    assert [task.classes for task in split().tasks] == [None, None]
    prepare("--table", path, "--target", "legs", "--auxiliary", "year", "--kinds", "year=classes")
    tasks = split().tasks
    assert [task.classes for task in tasks] == [2, 40]
    assert tasks[1].class_names[:2] == ("1900", "1901")


def test_class_names_that_are_numbers_are_in_their_order(tmp_path):
    path = write_csv(tmp_path / "t.csv", {"grade": ["10", "9", "2", "10"]})
    column = table.read_table(path).columns["grade"]
    names, codes = table._classes(column)
    assert names == ("2", "9", "10") and codes.tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize(("delimiter", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-8")])
def test_other_separators_quotes_and_line_ends(delimiter, encoding, tmp_path):
    path = tmp_path / "t.csv"
    values = {"a, b": ['x "y"', "two\nlines", " z "], "n": ["1", "-2.5e3", "nan"]}
    write_csv(path, values, delimiter, encoding)
    found = table.read_table(path)
    assert found.columns["a, b"].values == ('x "y"', "two\nlines", "z")
    np.testing.assert_array_equal(found.columns["n"].numbers, [1, -2500, np.nan])
    assert [found.line(row) for row in range(3)] == [2, 3, 5]


@pytest.mark.parametrize("most", [3, 100])
def test_more_different_values_than_are_kept(most, tmp_path, monkeypatch):
    """Numbers stay numbers, texts are told by their first one; chunks make no difference."""
    monkeypatch.setattr(table, "MOST", most)
    monkeypatch.setattr(table, "CHUNK", 2)
    numbers = ["1", "", "2.5", "3", "4", "?", "5", "6"]
    texts = [*"1234567", "x"]
    found = table.read_table(write_csv(tmp_path / "t.csv", {"n": numbers, "t": texts})).columns
    np.testing.assert_array_equal(found["n"].numbers, [1, np.nan, 2.5, 3, 4, np.nan, 5, 6])
    assert found["t"].numbers is None and found["t"].wrong == (7, "x")
    assert (found["t"].codes is None) == (most == 3)


@pytest.mark.parametrize("text", ["inf", "1_000", "1e39", "1,5", "12 cm"])
def test_what_is_no_number(text, tmp_path):
    path = write_csv(tmp_path / "t.csv", {"n": ["1", "2", text]})
    assert table.read_table(path).columns["n"].wrong == (2, text)


# --------------------------------------------------------------------------------------------------
# Sets
# --------------------------------------------------------------------------------------------------


def test_sets_are_drawn_class_by_class(tmp_path):
    labels = np.repeat([0, 1, 2, -1], [600, 300, 3, 97])
    target = Task("t", 3, ("a", "b", "c"))
    sets = divide(target, labels, None, "here", seed=1)
    counts = {name: np.bincount(labels[places] + 1) for name, places in sets.items()}
    # Unlabelled ones are trained on; a class keeps two for training and development.
    assert counts["valid"][1:3].tolist() == [60, 30] and counts["valid"][0] == 0
    assert counts["test"][1:3].tolist() == [60, 30] and counts["test"][0] == 0
    assert counts["full_train"][0] == 97 and counts["full_train"][3] >= 2
    assert counts["dev"].tolist() == [0, 1, 1, 1]
    parts = [sets[name] for name in ("dev", "rest_train", "valid", "test")]
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert sorted([*sets["dev"], *sets["rest_train"]]) == sets["full_train"].tolist()
    again, other = (divide(target, labels, None, "here", seed=seed) for seed in (1, 2))
    assert all(np.array_equal(again[name], sets[name]) for name in sets)
    assert not np.array_equal(other["test"], sets["test"])


def test_development_samples_of_each_kind(tmp_path):
    labels = np.arange(100) % 4
    target = Task("t", 4, tuple("abcd"))
    sets = divide(target, labels, None, "here", aux_shot=3)
    assert np.bincount(labels[sets["dev"]]).tolist() == [3] * 4
    sets = divide(target, labels, None, "here", dev_size=76)
    assert len(sets["dev"]) == 76 and len(sets["full_train"]) == 80
    assert np.bincount(labels[sets["rest_train"]]).tolist() == [1] * 4  # one of each stays


def test_development_samples_of_the_validation_set():
    given = np.array((["train"] * 6 + ["valid"] * 3 + ["test"]) * 10)
    labels = np.arange(100) % 2
    sets = divide(Task("t", 2, ("a", "b")), labels, given, "here", aux_shot=5, dev_from="valid")
    assert (given[sets["dev"]] == "valid").all() and len(sets["dev"]) == 10
    assert np.array_equal(sets["rest_train"], np.flatnonzero(given == "train"))
    assert len(sets["valid"]) == 20 and len(sets["full_train"]) == 70


def test_a_number_is_divided_at_random_and_a_tenth_develops():
    values = np.arange(500.0)
    values[:50] = np.nan
    sets = divide(Task("t", None), values, None, "here")
    sizes = {name: len(places) for name, places in sets.items()}
    assert sizes["valid"] == sizes["test"] == 45
    assert sizes["full_train"] == 410 and sizes["dev"] == 36  # a tenth of 360 that are labelled
    assert not np.isnan(values[sets["dev"]]).any()


def test_sets_from_a_column(tmp_path, columns, prepare, split):
    columns["part"] = [("Train", "train", "val", "test")[i % 4] for i in range(ROWS)]
    path = write_csv(tmp_path / "birds.csv", columns)
    assert prepare("--table", path, "--target", "species", "--set_column", "part")[0] == 0
    found = split()
    places = np.arange(ROWS)
    assert found.indices["full_train"].tolist() == places[places % 4 < 2].tolist()
    assert found.indices["valid"].tolist() == places[places % 4 == 2].tolist()
    assert found.indices["test"].tolist() == places[places % 4 == 3].tolist()
    assert "part" not in [task.name for task in found.tasks]
    columns["part"] = [("train", "train", "train", "test")[i % 4] for i in range(ROWS)]
    write_csv(path, columns)
    prepare("--table", path, "--target", "species", "--set_column", "part")
    found = split()
    halves = sorted([*found.indices["valid"], *found.indices["test"]])
    assert halves == places[places % 4 == 3].tolist()
    assert len(found.indices["valid"]) == 5


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def test_a_table_with_images(path, photos, prepare, split, columns):
    flags = ("--table", path, "--target", "species", "--images", photos)
    code, out, _ = prepare(*flags, "--check_images")
    assert code == 0 and "path of the image" in out
    found = split()
    assert [task.name for task in found.tasks] == ["species", "mass", "legs", "year", "ring"]
    assert found.rows is None and found.paths == found.ids == columns["file"]
    assert found.image_path(3) == photos / "b/3.png"
    moved = photos.rename(photos.with_name("moved"))
    with pytest.raises(UserError, match="photos does not exist.*--data_root"):
        split()
    assert load_split(path.parent / "out", moved).image_path(3) == moved / "b/3.png"
    (moved / "b/3.png").write_bytes(b"other")
    with pytest.raises(UserError, match="changed since preprocessing: images .*--target species"):
        load_split(path.parent / "out", moved)


def test_a_table_without_a_target_is_labelled_by_its_folders(path, photos, prepare, split):
    assert prepare("--table", path, "--images", photos)[0] == 0
    found = split()
    assert found.tasks[0] == Task("folder", 2, ("a", "b"))
    assert found.labels[:, 0].tolist() == [i % 2 for i in range(ROWS)]
    assert found.tasks[1].name == "species"


def test_a_folder_of_images_per_class(photos, prepare, split, tmp_path):
    (photos / "a" / "readme.txt").write_text("no image")
    os.symlink(photos / "b", photos / "c", target_is_directory=True)
    assert prepare("--images", photos, "--aux_shot", "2")[0] == 0
    found = split()
    assert found.tasks == [Task("folder", 3, ("a", "b", "c"))]
    assert np.bincount(found.labels[:, 0]).tolist() == [20, 20, 20]
    assert np.bincount(found.labels[found.indices["dev"], 0]).tolist() == [2, 2, 2]
    theirs = ImageFolder(photos)
    assert [(str(found.image_path(i)), k) for i, k in enumerate(found.labels[:, 0])] == theirs.imgs


def test_a_development_set_of_any_classes_is_not_called_per_class(photos, prepare):
    """Two of all samples, although there are two classes."""
    assert "for development (1 per class)\n" in prepare("--images", photos)[1]
    assert "for development\n" in prepare("--images", photos, "--dev_size", "2")[1]


def test_a_link_back_is_not_followed_for_ever(photos, prepare, split):
    (photos / "a" / "again").symlink_to(photos / "a", target_is_directory=True)
    assert prepare("--images", photos)[0] == 0
    assert len(split().paths) == ROWS


def test_folders_that_are_sets(photos, prepare, split):
    for name in ("train", "val", "test"):
        (photos / name).mkdir()
    for name in ("a", "b"):
        for number, image in enumerate(sorted((photos / name).iterdir())):
            folder = photos / ("train" if number < 14 else "val" if number < 17 else "test") / name
            folder.mkdir(exist_ok=True)
            image.rename(folder / image.name)
        (photos / name).rmdir()
    assert prepare("--images", photos)[0] == 0
    found = split()
    assert found.tasks == [Task("folder", 2, ("a", "b"))]
    assert [len(found.indices[name]) for name in ("full_train", "valid", "test")] == [28, 6, 6]
    assert all(found.paths[i].startswith("val/") for i in found.indices["valid"])


# --------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------


def test_preparing_again_changes_nothing(path, prepare, tmp_path):
    flags = ("--table", path, "--target", "species")
    prepare(*flags)
    before = contents(tmp_path / "out")
    stamps = {file: (tmp_path / "out" / file).stat().st_mtime_ns for file in before}
    time.sleep(0.01)
    assert "already up to date" in prepare(*flags)[1]
    assert contents(tmp_path / "out") == before
    assert stamps == {file: (tmp_path / "out" / file).stat().st_mtime_ns for file in before}
    prepare(*flags, "--ignore", "year")  # a column less
    after = contents(tmp_path / "out")
    assert len([name for name in after if name.startswith("column_")]) == 4
    assert set(after) == {
        "split_info.json",
        "tasks.json",
        *SET_FILES.values(),
        *(f"column_{k}.npy" for k in range(4)),
    }


def test_columns_can_be_read_with_numpy_alone(path, prepare, tmp_path, columns):
    prepare("--table", path, "--target", "species", "--auxiliary", "mass")
    described = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert [task["name"] for task in described["tasks"]] == ["species", "mass"]
    mass = np.load(tmp_path / "out" / described["tasks"][1]["file"])
    expected = [np.nan if text is None else float(text) for text in columns["mass"]]
    np.testing.assert_array_equal(mass, expected)


@pytest.mark.parametrize("name", ["tasks.json", "column_1.npy", "test_set.npy"])
def test_damaged_and_missing_files_are_named(name, path, prepare, split, tmp_path):
    prepare("--table", path, "--target", "species")
    file = tmp_path / "out" / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name} is not as it was written; .*--target species"):
        split()
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        split()


def test_a_table_that_has_changed_is_refused(path, prepare, split):
    prepare("--table", path, "--target", "species")
    with open(path, "a") as file:
        file.write("owl,1,10,1900,x,x,yes\n")
    with pytest.raises(UserError, match="birds.csv; run python data_preprocess.py --table"):
        split()
    path.unlink()  # what was prepared is enough
    assert len(split().labels) == ROWS


# --------------------------------------------------------------------------------------------------
# Wrong input
# --------------------------------------------------------------------------------------------------


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


WRONG = {
    "no such table": (["--table", "no.csv", "--target", "a"], None, ["no.csv", "no such file"]),
    "a folder": (["--table", ".", "--target", "a"], None, ["--table .", "directory"]),
    "no such column": ([], ("species", "specie"), ["--target species", "did you mean specie?"]),
    "a short row": ([], ("tit,,11,", "tit,11,"), ["line 3", "6 fields", "7 columns"]),
    "two of a name": ([], ("mass", "legs"), ["line 1", "columns 2 and 3", "legs"]),
    "no name": ([], ("mass", ""), ["line 1", "column 2 has no name"]),
    "a NUL byte": ([], ("x,yes", "\0,yes"), ["birds.csv, line 5", "not readable text", "UTF-8"]),
    "no input": (
        ["--ignore", "mass", "legs", "year", "ring"],
        None,
        ["no column is left to predict from", "--features"],
    ),
    "an open quote": ([], ("tit,", '"tit,'), ["line", "quote"]),
    "no number": (
        ["--kinds", "mass=number"],
        ("0.25", "heavy"),
        ["line 4", "column mass", "heavy", "--kinds mass=classes"],
    ),
    "one class": (["--auxiliary", "same"], None, ["column same", "one value", "--ignore same"]),
    "twice": (["--ignore", "species"], None, ["--ignore species", "target already"]),
    "kinds of no column": (["--kinds", "mas=number"], None, ["--kinds mas", "did you mean mass?"]),
    "no kind": (["--kinds", "mass=real"], None, ["mass=real", "COLUMN=number"]),
    "no set": (["--set_column", "ring"], None, ["line 2", "column ring", "is no set", "valid"]),
    "few of a class": (["--aux_shot", "20"], None, ["class emu", "13", "--dev_size"]),
    "too large": (["--dev_size", "90"], None, ["--dev_size 90", "samples"]),
    "both sizes": (["--dev_size", "9", "--aux_shot", "1"], None, ["exclude"]),
    "per class of a number": (
        ["--kinds", "species=classes", "--target", "year", "--aux_shot", "2"],
        None,
        ["year is a number", "--dev_size"],
    ),
    "data_root": (["--data_root", "x"], None, ["--data_root", "leave it out"]),
    "no folder": (["--images", "gone"], None, ["--images gone", "no such folder"]),
    "no images": (["--images", "."], None, ["no column begins with the path", "--image_column"]),
    "image_column alone": (["--image_column", "note"], None, ["--image_column needs --images"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(case, path, prepare, tmp_path):
    flags, change, parts = WRONG[case]
    if change:
        replaced(path, *change)
    code, _, err = prepare("--table", path, "--target", "species", *flags)
    assert code == 2
    assert_one_error_line(err, *parts)
    assert not (tmp_path / "out").exists()


def test_text_of_another_encoding(path, prepare):
    path.write_bytes(path.read_bytes().replace(b"emu", "emü".encode("latin-1"), 1))
    code, _, err = prepare("--table", path, "--target", "species")
    assert code == 2
    assert_one_error_line(err, path, "line 4", "UTF-8")


@pytest.mark.parametrize("content", ["", "a,b\n", "a,b\n\n\n"])
def test_empty_tables(content, path, prepare):
    path.write_text(content)
    code, _, err = prepare("--table", path, "--target", "a")
    assert code == 2
    assert_one_error_line(err, path)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda photos: (photos / "a/4.png").unlink(), ["line 6", "column file", "4.png"]),
        (lambda photos: (photos / "a/4.png").write_bytes(b""), ["line 6", "empty"]),
        (
            lambda photos: (photos / "a/4.png").unlink() or (photos / "a/4.png").symlink_to("gone"),
            ["line 6", "a link that leads nowhere", "git annex get"],
        ),
    ],
)
def test_images_that_are_not_there(change, parts, path, photos, prepare):
    change(photos)
    code, _, err = prepare("--table", path, "--target", "species", "--images", photos)
    assert code == 2
    assert_one_error_line(err, *parts)
    assert "archive" not in err


def test_one_image_in_two_rows(path, photos, prepare, columns):
    columns["file"][7] = "a//4.png"
    write_csv(path, columns)
    code, _, err = prepare("--table", path, "--target", "species", "--images", photos)
    assert code == 2
    assert_one_error_line(err, "line 9", "a//4.png", "first on line 6")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda folder: None, ["no such folder"]),
        (lambda folder: folder.mkdir(), ["every class", "none"]),
        (lambda folder: (folder / "a").mkdir(parents=True), [".jpg", "a holds no image"]),
    ],
)
def test_folders_without_classes(make, parts, tmp_path, prepare):
    make(tmp_path / "pictures")
    code, _, err = prepare("--images", tmp_path / "pictures")
    assert code == 2
    assert_one_error_line(err, "pictures", *parts)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Mistakes that must not pass
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "flags", "parts"),
    [
        ("23.1 USD", [], ["line 13, column price: 23.1 USD is not", "--kinds price=classes"]),
        ("11,2", [], ["line 13, column price: 11,2 is not", "after a point, not a comma"]),
        ("inf", ["--target", "kind"], ["line 13, column price: inf is not a finite number"]),
    ],
)
def test_a_mistake_among_numbers_is_named(bad, flags, parts, tmp_path, prepare):
    prices = [f"{i / 7:.3f}" for i in range(60)]
    prices[11] = bad
    path = write_csv(tmp_path / "t.csv", {"kind": ["a", "b"] * 30, "price": prices})
    code, _, err = prepare("--table", path, *(flags or ["--target", "price"]))
    assert code == 2
    assert_one_error_line(err, *parts)
    target = ["--table", path, "--target", "kind"]
    assert prepare(*target, "--kinds", "price=classes")[0] == 0
    write_csv(path, {"kind": ["a", "b"] * 30, "price": prices, "size": range(5, 65)})
    assert prepare(*target, "--ignore", "price")[0] == 0


def test_the_order_of_auxiliary_tasks_is_the_given_one(path, prepare, split):
    prepare("--table", path, "--target", "species", "--auxiliary", "year", "mass")
    assert [task.name for task in split().tasks] == ["species", "year", "mass"]


def test_tasks_and_roles_do_not_clash(photos, path, prepare, split):
    for flag in ("--target", "--kinds"):
        value = "file" if flag == "--target" else "file=classes"
        code, _, err = prepare("--table", path, "--images", photos, flag, value)
        assert code == 2
        assert_one_error_line(err, f"{flag} file: the column is the path of the image already")
    given = ["--target", "ring", "--set_column", "ring"]
    code, _, err = prepare("--table", path, *given)
    assert_one_error_line(err, "--target ring: the column is the name of the set already")


def test_a_class_without_a_training_sample_is_refused():
    sets = np.array(["train"] * 8 + ["test"] * 4)
    labels = np.array([0, 1] * 4 + [0, 1, 2, 2])
    with pytest.raises(UserError, match="no training sample has class c of t"):
        divide(Task("t", 3, tuple("abc")), labels, sets, "t.csv", dev_size=2)
    with pytest.raises(UserError, match="4 samples are in the test set, none of them with a label"):
        divide(Task("t", 3, tuple("abc")), np.where(sets == "test", -1, labels), sets, "t.csv")


@pytest.mark.parametrize("flag", ["aux_shot", "dev_size"])
def test_a_number_of_development_samples_is_refused_where_they_are_given(flag):
    sets, labels = np.array(["train", "dev", "valid", "test"] * 4), np.arange(16) // 8
    target = Task("t", 2, ("a", "b"))
    assert divide(target, labels, sets, "t.csv")["dev"].tolist() == [1, 5, 9, 13]
    with pytest.raises(UserError, match=f"t.csv: 4 samples are in the dev set, .* --{flag}"):
        divide(target, labels, sets, "t.csv", **{flag: 2})


def test_files_that_are_no_images_are_counted_once(photos, prepare):
    for name in ("a/notes.txt", "b/notes.txt", "b/.hidden"):
        (photos / name).write_text("x")
    found, others = images_below(photos, photos)
    assert (len(found), others) == (ROWS, ["a/notes.txt", "b/notes.txt"])
    code, _, err = prepare("--images", photos)
    assert code == 0
    assert err == (
        f"warning: {photos}: 2 files are left out, whose names do not end like an image's (such as "
        "a/notes.txt)\n"
    )
