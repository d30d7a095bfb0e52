"""The digits data set: real scans, CUB's layout, attributes of known roles."""

import builtins
import json

import numpy as np
import pytest
from PIL import Image

import data_preprocess
from auxilearn.data import cub, digits
from auxilearn.data.split import load_split
from auxilearn.errors import UserError

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    digits.write_digits(root)
    return root


@pytest.fixture(scope="module")
def annotations(root):
    return cub.read_annotations(root)


@pytest.fixture(scope="module")
def roles(root):
    return json.loads((root / "attribute_roles.json").read_text())["roles"]


def columns(annotations, roles, role):
    chosen = [roles[name] == role for name in annotations.attribute_names]
    return annotations.attributes[:, chosen]


def test_layout_and_official_split(annotations):
    assert len(annotations.image_ids) == 1797
    assert annotations.class_names[0] == "001.zero" and annotations.class_names[9] == "010.nine"
    assert annotations.paths[0] == "001.zero/zero_0001.png"
    scans_per_digit = np.bincount(sklearn_datasets.load_digits().target)
    assert np.bincount(annotations.labels).tolist() == scans_per_digit.tolist()
    assert np.bincount(annotations.labels[annotations.is_train]).tolist() == [72] * 10
    assert (np.diff(annotations.labels) >= 0).all(), "the ids are in class order, as CUB's are"


def test_images_are_the_scans(root, annotations):
    data = sklearn_datasets.load_digits()
    scans = data.images[np.argsort(data.target, kind="stable")]
    for i in range(0, 1797, 97):
        with Image.open(root / "images" / annotations.paths[i]) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), scans[i].ravel())[0, 1] > 0.97
        assert int(annotations.paths[i].split("_")[1][:4]) > 0


def test_roles(annotations, roles):
    """Informative attributes follow from the class, noise does not, image is between."""
    assert list(roles) == annotations.attribute_names
    counts = {role: list(roles.values()).count(role) for role in ("informative", "image", "noise")}
    assert counts == {"informative": 8, "image": 6, "noise": 8}
    known = columns(annotations, roles, "informative")
    shares = np.stack([known[annotations.labels == digit].mean(axis=0) for digit in range(10)])
    assert set(np.unique(shares)) == {0.0, 1.0}
    assert len({tuple(row) for row in shares}) == 10, "together they tell every digit"
    for bits in columns(annotations, roles, "noise").T:
        assert 0.1 < bits.mean() < 0.9
        assert np.abs(correlation_with_classes(bits, annotations.labels)).max() < 0.1
    for bits in columns(annotations, roles, "image").T:
        assert 0.3 < bits.mean() < 0.55
        share = np.array([bits[annotations.labels == digit].mean() for digit in range(10)])
        assert np.maximum(share, 1 - share).mean() < 0.8, "not a function of the class"


def correlation_with_classes(bits, labels):
    return np.array([np.corrcoef(bits, labels == digit)[0, 1] for digit in range(10)])


def test_order_and_names_do_not_reveal_roles(annotations, roles):
    sequence = [roles[name] for name in annotations.attribute_names]
    assert sum(a != b for a, b in zip(sequence, sequence[1:], strict=False)) >= 8
    for name in annotations.attribute_names:
        assert name.startswith("has_") and name.count("::") == 1
        assert not any(word in name for word in ("noise", "informative", "image", "random"))


def test_measures_of_drawn_strokes():
    """Three scans differ in one property at a time; the median is the plain one."""
    plain, other, opposite = np.zeros((3, 8, 8))
    plain[:, 3:5] = 10
    other[np.arange(8), 7 - np.arange(8)] = 16  # a slash: leans right, broad, solid
    opposite[np.arange(8), np.arange(8)] = 4
    found = dict(
        zip(digits.IMAGE, digits.measure(np.stack([plain, other, opposite])).T, strict=True)
    )
    assert found["has_slant::rightward"].tolist() == [False, True, False]
    assert found["has_line::solid"].tolist() == [False, True, False]
    assert found["has_ink::plenty"].tolist() == [True, False, False]
    high, low, middle = np.zeros((3, 8, 8))
    high[:2], low[6:], middle[3:5] = 8, 8, 8
    found = digits.measure(np.stack([high, low, middle]))
    assert found[:, digits.IMAGE.index("has_weight::top_heavy")].tolist() == [True, False, False]
    found = digits.measure(np.stack([high.T, low.T, middle.T]))
    assert found[:, digits.IMAGE.index("has_balance::left_heavy")].tolist() == [True, False, False]


def test_every_call_writes_the_same_files(root, tmp_path):
    def contents(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    (tmp_path / "again").mkdir()  # an empty folder will do
    digits.write_digits(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(root)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_folder_with_content_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="is not empty"):
            digits.write_digits(place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_draw_attributes", fail)
    with pytest.raises(KeyboardInterrupt):
        digits.write_digits(tmp_path / "digits")
    assert not any(tmp_path.iterdir())


def test_without_scikit_learn(tmp_path, monkeypatch):
    genuine = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        digits.write_digits(tmp_path / "digits")
    assert not any(tmp_path.iterdir())


def test_generate_on_the_command_line(tmp_path, monkeypatch, capsys):
    """The default place is ./digits; the second time it is there and nothing changes."""
    monkeypatch.chdir(tmp_path)
    data_preprocess.main(["--generate", "digits", "--check_images"])
    assert "1,797 images, 10 classes, 22 attributes" in capsys.readouterr().out
    split = load_split("preprocess_data")
    sizes = {name: len(positions) for name, positions in split.indices.items()}
    assert sizes == {"full_train": 720, "dev": 10, "rest_train": 710, "valid": 538, "test": 539}
    assert split.roles["has_parity::even"] == "informative"
    assert split.data_root == tmp_path / "digits"
    data_preprocess.main(["--generate", "digits"])
    assert "already up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match="digits holds another data set"):
        data_preprocess.main(["--generate", "mini", "--data_root", "digits"])
