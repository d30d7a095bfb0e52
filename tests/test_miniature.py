"""The miniature: its files, its determinism, and that each attribute plays the role it is given."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from auxilearn.data import miniature
from auxilearn.data.miniature import ATTRIBUTES, ROLES, SPECIES, TRAITS, draw_miniature, picture_of
from auxilearn.errors import UserError

SMALL = {"classes": 3, "train_per_class": 4, "test_per_class": 5, "image_size": 32}


def draw_small(root, **settings):
    draw_miniature(root, **(SMALL | settings))
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def columns_with(*roles):
    return [i for i, name in enumerate(ATTRIBUTES) if ROLES[name] in roles]


def information(classes, bits):
    """Mutual information of two discrete variables, in nats."""
    joint = np.zeros((classes.max() + 1, 2))
    np.add.at(joint, (classes, bits), 1)
    joint /= joint.sum()
    expected = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return (joint[seen] * np.log(joint[seen] / expected[seen])).sum()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "mini"
    draw_small(root)
    return root


@pytest.fixture(scope="module")
def labels():
    """Species (3000,) and attribute bits (3000, A) of 150 pictures of each species."""
    pairs = list(itertools.product(range(len(SPECIES)), range(1, 151)))
    bits = [picture_of(species, number).bits for species, number in pairs]
    return np.array([species for species, _ in pairs]), np.array(bits)


@pytest.fixture(scope="module")
def album():
    """400 small pictures (400, 10 * 10 * 3), in [0, 1], and their attribute bits."""
    pictures = [picture_of(k % len(SPECIES), 1 + k // len(SPECIES)) for k in range(400)]
    pixels = [miniature.render(p, 40, oversample=2).reduce(4) for p in pictures]
    return np.stack(pixels).reshape(400, -1) / 255, np.array([p.bits for p in pictures])


def rows(root, name):
    return [line.split() for line in (root / name).read_text().splitlines()]


def test_the_layout_is_cubs(drawn):
    images, each = rows(drawn, "images.txt"), SMALL["train_per_class"] + SMALL["test_per_class"]
    ids = [str(i) for i in range(1, SMALL["classes"] * each + 1)]
    assert [i for i, _ in images] == ids
    for name in ("image_class_labels.txt", "train_test_split.txt"):
        assert [i for i, _ in rows(drawn, name)] == ids

    classes = dict(rows(drawn, "classes.txt"))
    assert list(classes) == ["1", "2", "3"]
    for (_, path), (_, label) in zip(images, rows(drawn, "image_class_labels.txt"), strict=True):
        folder, file = path.split("/")
        assert folder == classes[label]
        assert folder == f"{int(label):03d}.{file[: -len('_0001.jpg')]}"
        with Image.open(drawn / "images" / path) as image:
            assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "JPEG")
    assert len(list((drawn / "images").rglob("*.jpg"))) == len(images)

    split = np.array([int(flag) for _, flag in rows(drawn, "train_test_split.txt")])
    assert (split.reshape(-1, each).sum(1) == SMALL["train_per_class"]).all()


def test_the_attribute_files_say_what_was_drawn(drawn):
    assert rows(drawn, "attributes.txt") == [[str(i), n] for i, n in enumerate(ATTRIBUTES, 1)]
    table = rows(drawn, "attributes/image_attribute_labels.txt")
    assert {len(row) for row in table} == {5}
    bits = np.array([int(row[2]) for row in table]).reshape(-1, len(ATTRIBUTES))
    pairs = itertools.product(range(SMALL["classes"]), range(1, 10))
    assert bits.tolist() == [list(picture_of(*pair).bits) for pair in pairs]
    notes = json.loads((drawn / "attribute_roles.json").read_text())
    assert notes["roles"] == {name: ROLES[name] for name in ATTRIBUTES}
    assert set(notes["shows"]) == {name for name, role in ROLES.items() if role != "noise"}
    assert notes["species"] == dict(list(SPECIES.items())[: SMALL["classes"]])


def test_the_same_seed_gives_the_same_bytes(drawn, tmp_path):
    np.random.seed(1)  # noqa: NPY002  a global seed must not matter
    first = {str(p.relative_to(drawn)): p.read_bytes() for p in drawn.rglob("*") if p.is_file()}
    assert draw_small(tmp_path / "again") == first
    other = draw_small(tmp_path / "other", seed=1)
    assert set(other) == set(first)
    pictures = [name for name in first if name.endswith(".jpg")]
    assert all(other[name] != first[name] for name in pictures)
    assert other["train_test_split.txt"] != first["train_test_split.txt"]


def test_a_picture_does_not_depend_on_how_many_are_drawn(drawn, tmp_path):
    fewer = draw_small(tmp_path / "fewer", classes=2, train_per_class=1, test_per_class=2)
    for name in (n for n in fewer if n.endswith(".jpg")):
        assert fewer[name] == (drawn / name).read_bytes()


def test_only_combinations_of_parts_name_a_species():
    for trait, values in TRAITS.items():
        for value in values:
            assert sum(own[trait] == value for own in SPECIES.values()) >= 2, (trait, value)
    for one, other in itertools.combinations(SPECIES, 2):
        differ = sum(SPECIES[one][trait] != SPECIES[other][trait] for trait in TRAITS)
        assert differ >= 2
        if one.split("_")[-1] == other.split("_")[-1]:  # of one genus
            assert differ <= 3


def test_there_are_enough_attributes_of_each_role_in_no_telling_order():
    assert sorted(ATTRIBUTES) == sorted(ROLES)
    count = {role: len(columns_with(role)) for role in set(ROLES.values())}
    assert count == {"informative": 20, "irrelevant": 8, "noise": 10}
    for role in count:
        assert abs(np.mean(columns_with(role)) - len(ATTRIBUTES) / 2) < len(ATTRIBUTES) / 6


def test_no_attribute_is_nearly_constant(labels):
    mean = labels[1].mean(0)
    assert (mean > 0.05).all()
    assert (mean < 0.95).all()


def test_only_informative_attributes_know_the_species(labels):
    species, bits = labels
    for index, name in enumerate(ATTRIBUTES):
        known = information(species, bits[:, index])
        if ROLES[name] == "informative":
            assert known > 0.1, name
        else:  # under independence its mean is 19 / 6000 = 0.003
            assert known < 0.008, name


def test_noise_and_scenery_are_independent_of_everything_else(labels):
    correlation = np.corrcoef(labels[1].T) - np.eye(len(ATTRIBUTES))
    assert abs(correlation[columns_with("noise")]).max() < 0.08
    apart = correlation[np.ix_(columns_with("irrelevant"), columns_with("informative"))]
    assert abs(apart).max() < 0.08


def with_part(picture, key, value):
    """The same picture with one trait or one part of the scene changed."""
    group = "traits" if key in picture.traits else "scene"
    return dataclasses.replace(picture, **{group: getattr(picture, group) | {key: value}})


@pytest.mark.parametrize("name", [n for n in ATTRIBUTES if ROLES[n] != "noise"])
def test_a_visible_attribute_is_seen_in_the_picture(name):
    shows = miniature._INFORMATIVE | miniature._IRRELEVANT
    key, value = shows[name]
    choices = TRAITS[key] if key in TRAITS else list(miniature.SCENE[key])
    bare = dataclasses.replace(picture_of(1, 1), tint=(1, 1, 1))
    bare = with_part(with_part(bare, "front", "clear"), "light", "day")
    others = [choice for choice in choices if choice != value]
    with_it = np.asarray(miniature.render(with_part(bare, key, value), 72), dtype=int)
    for other in others:
        without = np.asarray(miniature.render(with_part(bare, key, other), 72), dtype=int)
        assert (abs(with_it - without).sum(2) > 30).sum() >= 8


def test_noise_leaves_no_trace_in_the_picture():
    picture = picture_of(3, 7)
    flipped = tuple(
        1 - bit if ROLES[name] == "noise" else bit
        for name, bit in zip(ATTRIBUTES, picture.bits, strict=True)
    )
    same = dataclasses.replace(picture, bits=flipped)
    assert miniature.render(picture, 48).tobytes() == miniature.render(same, 48).tobytes()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("has_background_kind::water", 0.85, 1),
        ("has_background_kind::foliage", 0.85, 1),
        ("has_background_kind::mountain", 0.8, 1),
        ("has_season_color::autumn", 0.85, 1),
        ("has_light_color::evening", 0.85, 1),
        ("has_primary_call::trill", 0.3, 0.7),
        ("has_under_tail_color::buff", 0.3, 0.7),
    ],
)
def test_scenery_can_be_read_from_pixels_and_noise_cannot(album, name, least, most):
    pixels, bits = album
    truth = bits[:, ATTRIBUTES.index(name)]
    features = np.hstack([pixels, np.ones((len(pixels), 1))])
    train, test = slice(0, 280), slice(280, None)
    gram = features[train] @ features[train].T + 2.0 * np.eye(280)  # ridge regression
    balance = np.where(truth == 1, 1 - truth[train].mean(), -truth[train].mean())
    guess = features[test] @ features[train].T @ np.linalg.solve(gram, balance[train]) > 0
    right = [(guess == truth[test])[truth[test] == value].mean() for value in (0, 1)]
    assert least <= np.mean(right) <= most  # balanced accuracy


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        draw_small(tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        draw_small(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="cannot write"):
        draw_small(tmp_path / "notes.txt" / "mini")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert draw_small(tmp_path / "empty", classes=2, train_per_class=1, test_per_class=1)


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(miniature, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_small(tmp_path / "mini")
    assert not list(tmp_path.iterdir())


def test_the_command_draws_the_species(tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    miniature.main(["--sheet", str(sheet)])
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
