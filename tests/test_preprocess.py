"""Reading, checking, splitting, loading: ``data.cub``, ``data.split``, ``data_preprocess.py``."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data_preprocess
from auxilearn.data import cub
from auxilearn.data.contract import Task
from auxilearn.data.split import SET_FILES, SPLIT_FILES, load_split
from auxilearn.errors import UserError
from tests.cub_shape import write_cub_shape

SCRIPT = Path(data_preprocess.__file__)
LABELS = "attributes/image_attribute_labels.txt"


@pytest.fixture
def root(tmp_path):
    return write_cub_shape(tmp_path / "cub")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def prepare(root, out, *options):
    data_preprocess.main(["--data_root", str(root), "--out_dir", str(out), *map(str, options)])


def lines_of(root, name):
    return (root / name).read_text().splitlines()


def set_line(root, name, number, text):
    """Replace line ``number`` (from 1); None removes it, a list puts several."""
    lines = lines_of(root, name)
    lines[number - 1 : number] = {str: [text], list: text, type(None): []}[type(text)]
    (root / name).write_text("\n".join(lines) + "\n")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def read_json(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def expected_files(root, aux_shot=1):
    """The JSON files derived anew from the text files, line by line; and the set of test ids."""
    path = dict(line.split() for line in lines_of(root, "images.txt"))
    label = dict(line.split() for line in lines_of(root, "image_class_labels.txt"))
    part = dict(line.split() for line in lines_of(root, "train_test_split.txt"))
    bits = {key: {} for key in path}
    for line in lines_of(root, LABELS):
        key, attribute, bit = line.split()[:3]
        bits[key][int(attribute)] = int(bit)
    train = [key for key in path if part[key] == "1"]
    dev = []
    for key in train:
        if sum(label[key] == label[other] for other in dev) < aux_shot:
            dev.append(key)
    return {
        "image_dictionary.json": {
            key: [path[key], int(label[key]) - 1, [bits[key][a] for a in sorted(bits[key])]]
            for key in path
        },
        "full_train_set.json": train,
        "aux_set.json": dev,
        "rest_train_set.json": [key for key in train if key not in dev],
    }, {key for key in path if part[key] == "0"}


# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("aux_shot", [1, 3])
def test_files_are_those_derived_from_the_text_files(root, out, aux_shot):
    prepare(root, out, "--aux_shot", aux_shot)
    written = read_json(out)
    expected, official_test = expected_files(root, aux_shot)
    for name, value in expected.items():
        assert written[name] == value, name
    assert list(written["image_dictionary.json"]) == list(expected["image_dictionary.json"])
    valid, test = written["valid_set.json"], written["test_set.json"]
    assert len(valid) == len(test) == 10
    assert set(valid) | set(test) == official_test
    assert valid + test != sorted(official_test, key=int), "not shuffled"
    assert len(written["aux_set.json"]) == 5 * aux_shot
    for name, data in contents(out).items():
        assert data.endswith(b"\n") and b", " not in data, name


def test_the_genuine_counts(tmp_path, out):
    """200 classes and 312 attributes: nothing is assumed, nothing overflows."""
    root = write_cub_shape(tmp_path / "cub", 200, 2, 1, attributes=312, image_size=(4, 4))
    prepare(root, out)
    expected, _ = expected_files(root)
    written = read_json(out)
    assert written["image_dictionary.json"] == expected["image_dictionary.json"]
    assert len(written["aux_set.json"]) == 200
    split = load_split(out)
    assert split.labels.shape == (600, 313) and split.labels[:, 0].max() == 199


def test_odd_test_count_goes_to_test(tmp_path, out):
    prepare(write_cub_shape(tmp_path / "cub", classes=3, test_per_class=3), out)
    written = read_json(out)
    assert [len(written[name]) for name in ("valid_set.json", "test_set.json")] == [4, 5]


def test_split_info(root, out):
    roles = dict.fromkeys(cub.read_annotations(root).attribute_names, "noise")
    (root / "attribute_roles.json").write_text(json.dumps({"description": "x", "roles": roles}))
    prepare(root, out, "--split_seed", 9)
    info = read_json(out)["split_info.json"]
    assert info["data_root"] == str(root) and os.path.isabs(info["data_root"])
    assert (info["split_seed"], info["aux_shot"]) == (9, 1)
    assert info["class_names"][:2] == ["001.Bird_1", "002.Bird_2"]
    assert info["attribute_names"][:2] == ["has_part_1::kind_1", "has_part_1::kind_2"]
    assert info["attribute_roles"] == roles
    assert info["attribute_roles_file"] == str(root / "attribute_roles.json")
    assert info["counts"] == {
        "images": 40,
        "classes": 5,
        "attributes": 7,
        "full_train": 20,
        "dev": 5,
        "rest_train": 15,
        "valid": 10,
        "test": 10,
    }
    six = {name: data for name, data in contents(out).items() if name != "split_info.json"}
    assert info["sha256"] == {name: cub.hash_file(out / name) for name in six}


def test_the_split_depends_on_seed_and_ids_alone(tmp_path, root, out):
    prepare(root, out, "--split_seed", 1)
    one = read_json(out)
    prepare(root, out, "--split_seed", 2)
    two = read_json(out)
    assert one["valid_set.json"] != two["valid_set.json"]
    assert one["full_train_set.json"] == two["full_train_set.json"]
    lines = lines_of(root, "images.txt")
    random.Random(0).shuffle(lines)
    (root / "images.txt").write_text("\n".join(lines) + "\n")
    np.random.seed(3)  # noqa: NPY002 - the global state must not matter
    prepare(root, out, "--split_seed", 1)
    assert read_json(out)["valid_set.json"] == one["valid_set.json"]
    assert read_json(out)["full_train_set.json"] != one["full_train_set.json"]


def test_running_twice_changes_nothing(root, out, capsys):
    prepare(root, out)
    assert f"written to {out}" in capsys.readouterr().out
    before, times = contents(out), {p: p.stat().st_mtime_ns for p in out.iterdir()}
    prepare(root, out)
    assert f"already up to date: {out}" in capsys.readouterr().out
    assert contents(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
    other = out.parent / "other"
    prepare(root, other)
    assert contents(other) == before


def test_an_interrupted_run_leaves_nothing_half_written(root, out, monkeypatch):
    prepare(root, out)
    renamed = []

    def replace(source, target):
        if len(renamed) == 3:
            raise KeyboardInterrupt
        renamed.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(cub.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, out, "--split_seed", 6)
    assert [path.name for path in out.glob(".*")] == [".lock"]
    read_json(out)  # every file that is there is whole
    with pytest.raises(UserError, match=r"split_info\.json: is missing; run python data_prep"):
        load_split(out)
    prepare(root, out, "--split_seed", 6)
    assert load_split(out).info["split_seed"] == 6


def test_an_edited_file_is_kept_when_it_is_replaced(root, out, capsys):
    prepare(root, out)
    (out / "aux_set.json").write_text('["1"]\n')
    prepare(root, out)
    (kept,) = out.glob("aux_set.edited-*.json")
    assert kept.read_text() == '["1"]\n' and str(kept) in capsys.readouterr().out
    assert len(read_json(out)["aux_set.json"]) == 5
    prepare(root, out, "--split_seed", 8)  # our own files are not kept
    assert len(list(out.glob("*.edited-*"))) == 1


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cub/attributes.txt", "cub/attributes/attributes.txt", None])
def test_where_attributes_txt_may_lie(root, place):
    names = cub.read_annotations(root).attribute_names
    content = (root / "attributes.txt").read_text()
    (root / "attributes.txt").unlink()
    if place:
        (root.parent / place).write_text(content)
        assert cub.read_annotations(root).attribute_names == names
    else:
        assert cub.read_annotations(root).attribute_names[::6] == ["attribute_1", "attribute_7"]
        (root.parent / "attributes.txt").write_text(content)  # as the archive has it
        assert cub.read_annotations(root).attribute_names == names


@pytest.mark.parametrize("end", [b"\r\n", b"\r"], ids=["Windows", "old Macintosh"])
def test_line_ends_and_blank_lines_do_not_matter(root, end):
    plain = cub.read_annotations(root)
    for name in (*cub.REQUIRED_FILES, "attributes.txt"):
        data = (root / name).read_bytes().rstrip(b"\n").replace(b"\n", end)
        (root / name).write_bytes(data.replace(end, 2 * end, 1))
    other = cub.read_annotations(root)
    for field in ("image_ids", "paths", "class_names", "attribute_names"):
        assert getattr(other, field) == getattr(plain, field), field
    for field in ("labels", "is_train", "attributes"):
        np.testing.assert_array_equal(getattr(other, field), getattr(plain, field))
        assert getattr(other, field).dtype == getattr(plain, field).dtype
    assert plain.labels.dtype == np.int64 and plain.attributes.dtype == np.uint8


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10**6), tail=st.lists(st.sampled_from(["3", "0", "27.708", "x", "#"])))
def test_rows_in_any_order_with_any_further_fields(tmp_path, seed, tail):
    rng = random.Random(seed)
    images, names = rng.sample(range(1, 10**9), 4), ["a", "b", "c"]
    bits = {(i, a): rng.randint(0, 1) for i in images for a in (1, 2, 3)}
    rows = [
        " ".join([f"{i} {a} {bit}", *tail[: rng.randint(0, 9)]]) for (i, a), bit in bits.items()
    ]
    rng.shuffle(rows)
    (tmp_path / "attributes").mkdir(exist_ok=True)
    (tmp_path / LABELS).write_text("\n".join(rows))
    table = {str(i): (line, "") for line, i in enumerate(images, 1)}
    found = cub._read_attributes(tmp_path, table, names, "attributes.txt")
    assert found.tolist() == [[bits[i, a] for a in (1, 2, 3)] for i in images]


# --- bad input ---------------------------------------------------------------------------------


def lost_image(root):
    (root / "images" / lines_of(root, "images.txt")[6].split()[1]).unlink()


def dangling_link(root):
    lost_image(root)
    (root / "images" / lines_of(root, "images.txt")[6].split()[1]).symlink_to(root / "nowhere")


def backslashes(root):
    (root / "images.txt").write_text((root / "images.txt").read_text().replace("/", "\\"))


def headings(name, text):
    return lambda root: (root / name).write_text(text + "\n" + (root / name).read_text())


def empty_image(root):
    (root / "images" / lines_of(root, "images.txt")[6].split()[1]).write_bytes(b"")


def cut(name):
    def apply(root):
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])

    return apply


def line(name, number, text):
    return lambda root: set_line(root, name, number, text)


def write(name, data):
    return lambda root: (root / name).write_bytes(data)


def remove(name):
    return lambda root: (root / name).unlink()


def no_training_image(keep):
    """Of class 2 (images 9 to 16) the first ``keep`` official training images stay."""

    def apply(root):
        rows = lines_of(root, "train_test_split.txt")
        train = [n for n in range(9, 17) if rows[n - 1].endswith(" 1")]
        for number in train[keep:]:
            set_line(root, "train_test_split.txt", number, f"{number} 0")

    return apply


SECOND_PATH = "002.Bird_2/Bird_2_00009.jpg"
BAD = {
    "no images.txt": (remove("images.txt"), "images.txt is missing.*--download.*--data_root"),
    "no classes": (remove("classes.txt"), "classes.txt is missing"),
    "no labels": (remove("image_class_labels.txt"), "image_class_labels.txt is missing"),
    "no split": (remove("train_test_split.txt"), "train_test_split.txt is missing"),
    "no attribute labels": (remove(LABELS), "image_attribute_labels.txt is missing"),
    "images.txt empty": (write("images.txt", b""), "images.txt, line 1: the file is empty"),
    "classes blank": (write("classes.txt", b"\n \n"), "classes.txt, line 1: the file is empty"),
    "attribute labels empty": (write(LABELS, b""), "labels.txt, line 1: the file is empty"),
    "attribute labels blank": (write(LABELS, b"\n\n"), "labels.txt, line 1: no rows"),
    "binary": (write("images.txt", b"1 a.jpg\n2 \xff\xfe\n"), "images.txt, line 2: not readable"),
    "zeros": (write("train_test_split.txt", b"\0" * 99), "split.txt, line 1: expected 'image_id"),
    "cut labels": (cut("image_class_labels.txt"), "no row for image id .* line"),
    "cut split": (cut("train_test_split.txt"), "train_test_split.txt.* line"),
    "cut attribute labels": (cut(LABELS), "image_attribute_labels.txt.* line "),
    "cut last row": (line(LABELS, 280, "40 7"), "labels.txt, line 280: expected 'image_id"),
    "one field": (line("images.txt", 4, "4"), "images.txt, line 4: expected 'image_id path'"),
    "no number": (line("images.txt", 4, "four a.jpg"), "images.txt, line 4: expected"),
    "id zero": (line("images.txt", 4, "0 a.jpg"), "images.txt, line 4: expected"),
    "ids from zero": (line("images.txt", 1, "0 a.jpg"), "line 1: .*; ids begin at 1: number the"),
    "headings": (
        headings("images.txt", "id path"),
        "line 1: .*; a row begins with its id.*headings",
    ),
    "headings of bits": (
        headings(LABELS, "i a b"),
        "line 1: .*; a row begins with its id.*headings",
    ),
    "backslashes": (
        backslashes,
        r"images.txt, line 1: .*; folders are parted by / on every system",
    ),
    "dangling link": (
        dangling_link,
        "line 7: cannot find .*; it is a link that leads nowhere: fetch",
    ),
    "double id": (line("images.txt", 4, "3 a.jpg"), "images.txt, line 4: id 3 .*first on line 3"),
    "double path": (
        line("images.txt", 4, f"4 {SECOND_PATH}"),
        "images.txt, line 9: image .*first on line 4",
    ),
    "lost image": (lost_image, "images.txt, line 7: cannot find image file .*7.jpg: No such file"),
    "empty image": (empty_image, "images.txt, line 7: image file .*7.jpg is empty"),
    "label missing": (
        line("image_class_labels.txt", 7, None),
        r"image_class_labels.txt: no row for image id 7 \(images.txt, line 7\)",
    ),
    "label twice": (line("image_class_labels.txt", 7, "6 1"), "line 7: id 6 .*first on line 6"),
    "label of nobody": (
        line("image_class_labels.txt", 7, ["7 1", "41 1"]),
        "labels.txt, line 8: image id 41 is not in images.txt",
    ),
    "class 0": (line("image_class_labels.txt", 7, "7 0"), "line 7: class_id '0' .*1 to 5"),
    "class 6": (line("image_class_labels.txt", 7, "7 6"), "line 7: class_id '6' .*1 to 5"),
    "class 1.0": (line("image_class_labels.txt", 7, "7 1.0"), "line 7: class_id '1.0'"),
    "split 2": (line("train_test_split.txt", 7, "7 2"), "split.txt, line 7: is_train '2' .*0 to 1"),
    "split missing": (line("train_test_split.txt", 40, None), "no row for image id 40 .*line 40"),
    "class gap": (line("classes.txt", 3, "7 003.Bird_3"), "classes.txt, line 3: id 7 .*1 to 5"),
    "class twice": (line("classes.txt", 3, "2 003.Bird_3"), "classes.txt, line 3: id 2 .*line 2"),
    "attribute gap": (line("attributes.txt", 7, "8 h"), "attributes.txt, line 7: id 8 .*1 to 7"),
    "attribute too few": (
        line("attributes.txt", 7, None),
        "labels.txt, line 7: attribute id 7 .*1 to 6 .*attributes.txt names 6",
    ),
    "attribute unnamed": (
        line("attributes.txt", 7, ["7 g", "8 h"]),
        r"labels.txt: no row for image id 1 \(images.txt, line 1\), attribute 8",
    ),
    "row of two": (line(LABELS, 30, "5 2"), "labels.txt, line 30: expected 'image_id attribute_id"),
    "row of words": (line(LABELS, 30, "5 two 1 1 1"), "labels.txt, line 30: expected"),
    "row of floats": (line(LABELS, 30, "5 2 1.0 1 1"), "labels.txt, line 30: expected"),
    "row with a huge id": (line(LABELS, 30, f"5 {10**30} 1 1 1"), "labels.txt, line 30: expected"),
    "row after a blank": (line(LABELS, 30, ["", "5 2 7 1 1"]), "labels.txt, line 31: is_present"),
    "bit 2": (line(LABELS, 30, "5 2 2 1 1"), "labels.txt, line 30: is_present is 2; expected 0 or"),
    "attribute 0": (line(LABELS, 30, "5 0 1 1 1"), "labels.txt, line 30: attribute id 0 .*1 to 7"),
    "attribute 8": (line(LABELS, 30, "5 8 1 1 1"), "labels.txt, line 30: attribute id 8 .*1 to 7"),
    "row of nobody": (line(LABELS, 30, "41 2 1 1 1"), "labels.txt, line 30: image id 41 is not in"),
    "pair twice": (line(LABELS, 30, "5 1 1 1 1"), "line 30: .*occurred before, on line 29"),
    "pair missing": (
        line(LABELS, 30, None),
        r"labels.txt: no row for image id 5 \(images.txt, line 5\), attribute 2",
    ),
    "class untrained": (no_training_image(0), "classes.txt, line 2: class 2 .* has 0 training"),
    "class too small": (no_training_image(1), "classes.txt, line 2: class 2 .* has 1 .*aux_shot 1"),
    "roles no JSON": (
        write("attribute_roles.json", b"{\n\n x"),
        "roles.json is not valid JSON .*line 3 column 2",
    ),
    "roles of nothing": (write("attribute_roles.json", b"[]"), "expected an object with a 'roles'"),
    "a role missing": (write("attribute_roles.json", b'{"roles": {}}'), "'has_part_1::kind_1' has"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(root, out, case):
    spoil, message = BAD[case]
    spoil(root)
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        prepare(root, out)
    assert str(root) in str(caught.value)
    assert sorted(path.name for path in out.parent.iterdir()) == ["cub"]


@pytest.mark.parametrize("case", ["bit 2", "class too small", "lost image"])
def test_bad_input_leaves_an_earlier_split_alone(root, out, case):
    prepare(root, out)
    before = contents(out)
    BAD[case][0](root)
    with pytest.raises(UserError):
        prepare(root, out, "--split_seed", 6)
    assert contents(out) == before


def test_a_garbled_id_without_attributes_txt_makes_no_huge_table(root):
    (root / "attributes.txt").unlink()
    set_line(root, LABELS, 30, f"5 {10**17} 1 1 1")
    with pytest.raises(
        UserError, match="line 30: attribute id 1000.*1 to 280 .the file has 280 rows"
    ):
        cub.read_annotations(root)
    set_line(root, LABELS, 30, "5 9 1 1 1")
    with pytest.raises(UserError, match=r"image id 1 .*attribute 8; .*\(line 30 has the highest"):
        cub.read_annotations(root)


def test_missing_root_says_how_to_get_it(tmp_path, root, out):
    with pytest.raises(UserError, match="nowhere does not exist.*--download.*--data_root"):
        prepare(tmp_path / "nowhere", out)
    with pytest.raises(UserError, match="images.txt is not a folder"):
        prepare(root / "images.txt", out)
    root.rename(tmp_path / "CUB_200_2011")
    with pytest.raises(UserError, match="did you mean --data_root .*CUB_200_2011"):
        prepare(tmp_path, out)


def test_two_test_images_are_needed(tmp_path, out):
    root = write_cub_shape(tmp_path / "cub", test_per_class=0)
    with pytest.raises(UserError, match="train_test_split.txt: 0 test images; expected 2"):
        prepare(root, out)


def test_one_image_spelt_in_two_ways(root, out):
    path = root / "images.txt"
    first, second, *rest = path.read_text().splitlines()
    for name in (first.split()[1].replace("/", "//"), "./" + first.split()[1]):
        path.write_text("\n".join([first, f"2 {name}", *rest]))
        with pytest.raises(UserError, match=r"images.txt, line 2: .* \(first on line 1\)"):
            prepare(root, out)


def test_a_byte_order_mark_does_not_matter(root, out):
    before = cub.read_annotations(root)
    for name in (*cub.REQUIRED_FILES, "attributes.txt"):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes())
    after = cub.read_annotations(root)
    assert (after.attributes == before.attributes).all()
    assert (after.paths, after.class_names) == (before.paths, before.class_names)


def test_unwritable_out_dir(root, out):
    out.write_text("a file")
    with pytest.raises(UserError, match="cannot write to .*out.*--out_dir"):
        prepare(root, out)


def test_check_images_decodes_them(root, out):
    paths = [root / "images" / line.split()[1] for line in lines_of(root, "images.txt")]
    prepare(root, out, "--check_images")
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    paths[5].write_text("no image")
    prepare(root, out)  # the files are there and not empty
    with pytest.raises(UserError, match="2 of 40 images cannot be decoded") as caught:
        prepare(root, out, "--check_images")
    assert str(paths[2]) in str(caught.value) and str(paths[5]) in str(caught.value)


# --- loading -----------------------------------------------------------------------------------


def test_load_split_agrees_with_the_text_files(root, out):
    prepare(root, out)
    split = load_split(out)
    expected, _ = expected_files(root)
    assert split.ids == list(expected["image_dictionary.json"])
    for i, (path, label, bits) in enumerate(expected["image_dictionary.json"].values()):
        assert split.paths[i] == path
        assert split.labels[i].tolist() == [label, *bits]
        assert split.image_path(i) == root / "images" / path
    written = read_json(out)
    for name, file in SET_FILES.items():
        assert [split.ids[i] for i in split.indices[name]] == written[file]
        assert split.indices[name].dtype == np.int64
    assert split.labels.dtype == np.int64 and split.mask is None and split.rows is None
    target, attribute = split.tasks[:2]
    assert (target.name, target.classes, target.class_names[4]) == ("target", 5, "005.Bird_5")
    assert attribute == Task("has_part_1::kind_1", 2, ("no", "yes"))
    assert split.roles is None and split.data_root == root
    assert any(Image.open(split.image_path(i)).mode == "L" for i in range(10))


def test_development_images_of_the_validation_set(root, out, tmp_path):
    prepare(root, out)
    before = read_json(out)
    prepare(root, tmp_path / "other", "--dev_from", "valid", "--split_seed", "3")
    written, label = read_json(tmp_path / "other"), before["image_dictionary.json"]
    dev = written["aux_set.json"]
    assert sorted(label[key][1] for key in dev) == list(range(5))
    assert written["rest_train_set.json"] == before["full_train_set.json"]
    assert written["full_train_set.json"] == before["full_train_set.json"] + dev
    half = dev + written["valid_set.json"]  # the half that was to be validated on
    assert len(half) == len(before["valid_set.json"]) and not set(half) & set(
        written["test_set.json"]
    )
    assert written["split_info.json"]["dev_from"] == "valid"
    assert "dev_from" not in before["split_info.json"]
    assert load_split(tmp_path / "other").indices["dev"].shape == (5,)
    with pytest.raises(UserError, match="validation half .* --dev_from valid needs 9"):
        prepare(root, out, "--dev_from", "valid", "--aux_shot", "9")


def test_another_data_root_of_the_same_content(root, out, tmp_path):
    prepare(root, out)
    before = load_split(out).fingerprint
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="cub/images does not exist.*--data_root"):
        load_split(out)
    split = load_split(out, moved)
    assert split.data_root == moved and split.fingerprint == before
    for name in ("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt"):
        (moved / name).unlink()
    with pytest.raises(UserError, match="images.txt is missing"):
        load_split(out, moved)
    (moved / LABELS).unlink()
    assert load_split(out, moved).fingerprint == before  # images/ alone will do
    (moved / "images" / split.paths[3]).write_bytes(b"shorter")
    with pytest.raises(UserError, match=r"image files \(paths and byte sizes\) differs"):
        load_split(out, moved)
    (moved / "images" / split.paths[3]).unlink()
    with pytest.raises(UserError, match="cannot find image file"):
        load_split(out, moved)


def swap_bit(root):
    row = lines_of(root, LABELS)[9].split()
    row[2] = str(1 - int(row[2]))
    set_line(root, LABELS, 10, " ".join(row))


CHANGES = {
    "image_class_labels.txt": lambda root: set_line(root, "image_class_labels.txt", 1, "1 2"),
    "train_test_split.txt": lambda root: (root / "train_test_split.txt").write_text("1 1"),
    "classes.txt": lambda root: set_line(root, "classes.txt", 1, "1 001.Other"),
    LABELS: swap_bit,
    "attributes.txt": lambda root: set_line(root, "attributes.txt", 1, "1 other"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_is_named(root, out, name):
    prepare(root, out, "--split_seed", 7)
    before = load_split(out).fingerprint
    recorded = read_json(out)["split_info.json"]["fingerprint"]
    cub.check_fingerprint(recorded, root, "THIS")
    CHANGES[name](root)
    with pytest.raises(UserError, match="preprocessed: ") as caught:
        cub.check_fingerprint(recorded, root, "THIS")
    message = str(caught.value)
    assert f"preprocessed: {name} differs; run THIS again" in message
    with pytest.raises(UserError, match=f"{name} differs; run .*--split_seed 7 again"):
        load_split(out)
    if name != "train_test_split.txt":
        prepare(root, out, "--split_seed", 7)
        assert load_split(out).fingerprint != before


def test_changes_of_images_and_of_several_files_are_named(root, out):
    prepare(root, out)
    recorded = read_json(out)["split_info.json"]["fingerprint"]
    path = root / "images" / lines_of(root, "images.txt")[4].split()[1]
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"preprocessed: the set of image files .* differs; run"):
        cub.check_fingerprint(recorded, root, "THIS")
    (root / "attributes.txt").unlink()
    set_line(root, "classes.txt", 1, "1 001.Other")
    with pytest.raises(UserError, match="attributes.txt is missing, classes.txt differs, the set"):
        cub.check_fingerprint(recorded, root, "THIS")


def edit(out, name, change):
    value = json.loads((out / name).read_text())
    changed = change(value)
    (out / name).write_text(json.dumps(value if changed is None else changed))


def test_an_edited_set_is_used_with_a_warning(root, out, capsys):
    prepare(root, out)
    before = load_split(out)
    assert capsys.readouterr().err == ""
    edit(out, "valid_set.json", lambda ids: ids[1:])
    after = load_split(out)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert str(out / "valid_set.json") in warning and "test_set.json" not in warning
    assert after.indices["valid"].tolist() == before.indices["valid"].tolist()[1:]
    assert after.fingerprint != before.fingerprint


def in_first(file, other):
    """Add to ``file`` the first id of ``other``."""
    return lambda out: edit(out, file, lambda ids: ids + json.loads((out / other).read_text())[:1])


def of_dictionary(change):
    return lambda out: edit(out, "image_dictionary.json", change)


def set_field(field, value):
    return of_dictionary(lambda rows: rows["3"].__setitem__(field, value))


BAD_SPLITS = {
    "no info": (lambda out: (out / "split_info.json").unlink(), "split_info.json: is missing"),
    "no set": (
        lambda out: (out / "test_set.json").unlink(),
        "test_set.json: is missing; run python",
    ),
    "no JSON": (
        lambda out: (out / "test_set.json").write_text('["1",\n"2'),
        "test_set.json: not valid JSON .*line 2 column 1.*data_preprocess.py",
    ),
    "no text": (
        lambda out: (out / "test_set.json").write_bytes(b"\xff\xfe\x00"),
        "test_set.json: not valid JSON",
    ),
    "no list": (
        lambda out: edit(out, "test_set.json", lambda ids: {}),
        "test_set.json, line 1: exp",
    ),
    "empty set": (
        lambda out: edit(out, "aux_set.json", lambda ids: []),
        "aux_set.json, line 1: exp",
    ),
    "number": (
        lambda out: edit(out, "aux_set.json", lambda ids: [*ids, 4]),
        "aux_set.json, line 1",
    ),
    "unknown id": (
        lambda out: edit(out, "aux_set.json", lambda ids: [*ids, "99"]),
        "aux_set.json: image id 99 is not in image_dictionary.json",
    ),
    "id twice": (
        in_first("test_set.json", "test_set.json"),
        "test_set.json: image id .* more than",
    ),
    "dev in train": (
        in_first("aux_set.json", "rest_train_set.json"),
        "both in aux_set.json and in rest_train_set.json; the sets must be disjoint",
    ),
    "dev in test": (in_first("test_set.json", "aux_set.json"), "aux_set.json and in test_set.json"),
    "valid in test": (
        in_first("test_set.json", "valid_set.json"),
        "valid_set.json and in test_set",
    ),
    "test in full": (
        in_first("full_train_set.json", "test_set.json"),
        "full_train_set.json and in test_set",
    ),
    "class lost": (
        lambda out: edit(out, "rest_train_set.json", lambda ids: [i for i in ids if int(i) > 8]),
        r"rest_train_set.json: no image of class 0 \(001.Bird_1\)",
    ),
    "label 5": (set_field(1, 5), "image id 3: class 5 is out of range; expected 0 to 4"),
    "label true": (set_field(1, True), "image id 3: class True is out of range"),
    "bits short": (set_field(2, [1]), r"image id 3: expected \[path, class, \[7 attribute bits"),
    "bit 2": (set_field(2, [2] * 7), "image id 3: an attribute is neither 0 nor 1"),
    "bit 0.5": (set_field(2, [0.5] * 7), "image id 3: expected"),
    "path of another image": (
        lambda out: edit(out, "image_dictionary.json", with_image_of_first),
        "image id 3: .* is the image of id 1 already; one image under two ids",
    ),
    "path lost": (set_field(0, "x.jpg"), "cannot find image file .*x.jpg"),
    "info": (
        lambda out: edit(out, "split_info.json", lambda info: {}),
        "split_info.json, line 1: no",
    ),
}


def with_image_of_first(dictionary):
    dictionary["3"][0] = "./" + dictionary["1"][0]
    return dictionary


@pytest.mark.parametrize("case", BAD_SPLITS)
def test_bad_splits_are_refused(root, out, case):
    spoil, message = BAD_SPLITS[case]
    prepare(root, out)
    spoil(out)
    with pytest.raises(UserError, match=message) as caught:
        load_split(out)
    assert "\n" not in str(caught.value)


# --- the command line --------------------------------------------------------------------------


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def test_the_script(root, out, tmp_path):
    done = run("--data_root", "cub", "--out_dir", "out", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for text in ("40 images, 5 classes, 7 attributes", "20 = 15 + 5", "10 for validation, 10 for"):
        assert text in done.stdout
    assert f"fingerprint  {load_split(out).fingerprint[:12]}" in done.stdout
    failed = run("--data_root", "nowhere", "--out_dir", "new", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: data root nowhere") and failed.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cub", "out"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--aux_shot", "0"],
        ["--aux_shot", "one"],
        ["--split_seed", "-1"],
        ["--generate", "birds"],
        ["--generate", "mini", "--download"],
        ["--no_such_flag"],
    ],
)
def test_bad_options_are_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=arguments[0]):
        data_preprocess.main(arguments)
    assert not any(tmp_path.iterdir())


def test_help_explains_the_files_and_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        data_preprocess.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    options = ["--data_root", "--out_dir", "--aux_shot", "--split_seed", "--download"]
    options += ["--generate", "--check_images"]
    for word in [*SPLIT_FILES, "split_info.json", *options]:
        assert word in text, word


def test_generate_leaves_other_data_alone(root, out):
    before = contents(root)
    with pytest.raises(UserError, match="holds another data set .*001.Bird_1"):
        prepare(root, out, "--generate", "digits")
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match="not a complete data set .*classes.txt is missing"):
        prepare(root, out, "--generate", "mini")
    assert {**contents(root), "classes.txt": before["classes.txt"]} == before


def test_download_needs_the_published_folder_name(tmp_path, out):
    with pytest.raises(UserError, match="--data_root .*CUB_200_2011"):
        prepare(tmp_path / "birds", out, "--download")


def test_download_fetches_into_the_folder_above(tmp_path, out, monkeypatch):
    from auxilearn.data import download

    asked = []

    def fetch_cub(directory):
        asked.append(directory)
        write_cub_shape(directory / "CUB_200_2011")

    monkeypatch.setattr(download, "fetch_cub", fetch_cub)
    prepare(tmp_path / "CUB_200_2011", out, "--download")
    assert asked == [tmp_path] and len(load_split(out).paths) == 40


FULL_SIZE = """
import re, sys, time
from pathlib import Path
from auxilearn.data import cub
table = {str(i): (i, "") for i in range(1, 11789)}
start = time.perf_counter()
bits = cub._read_attributes(Path(sys.argv[1]), table, None, None)
seconds = time.perf_counter() - start
# Not ru_maxrss, which starts from the peak of the process that started this one.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)
print(*bits.shape, bits.sum(), seconds, int(peak) / 1024)
"""


def test_the_full_size_attribute_file_is_read_quickly(tmp_path):
    """11,788 x 312 rows in under 10 s and 1 GB, in a process of its own."""
    rows = [f"@ {a} {int(a % 10 == 0)} {a % 4 + 1} {a * 0.137:.3f}\n" for a in range(1, 313)]
    rows[9] = "@ 10 1 3 0 27.708 1\n"
    block = "".join(rows)
    (tmp_path / "attributes").mkdir()
    with (tmp_path / LABELS).open("w") as file:
        file.writelines(block.replace("@", str(i)) for i in range(1, 11789))
    command = [sys.executable, "-c", FULL_SIZE, str(tmp_path)]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    images, attributes, present, seconds, megabytes = map(float, done.stdout.split())
    assert (images, attributes, present) == (11788, 312, 11788 * 31)
    assert seconds < 10 and megabytes < 1000
