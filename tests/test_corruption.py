"""Wrong labels by pair and by instance; test_settings.py has those of the paper."""

import numpy as np
import pytest
from PIL import Image

import reproduce_tables
from auxilearn.data.corruption import Inputs, by_instance, corrupted_targets, inputs_of, to_next
from auxilearn.data.split import load_split
from auxilearn.errors import UserError
from auxilearn.randomness import derived_generator
from auxilearn.run.build import build
from auxilearn.run.config import resolve
from tests.conftest import prepare, tiny_flags
from tests.test_contract import KIND, KINDS, PRICE, PRICED, split_of


def test_a_pair_is_a_class_and_the_next():
    labels = np.arange(30_000) % 3
    wrong = to_next(labels, 0.4, 3, np.random.default_rng(0))
    changed = wrong != labels
    assert changed.mean() == pytest.approx(0.4, abs=0.01)
    assert (wrong[changed] == (labels[changed] + 1) % 3).all()
    assert (to_next(labels, 1.0, 3, np.random.default_rng(0)) == (labels + 1) % 3).all()


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.95])
def test_labels_by_instance_are_those_of_algorithm_2(rate):
    """Sample by sample, as the paper has it, from the same random numbers."""
    generator, samples, classes = np.random.default_rng(0), 400, 4
    labels = generator.integers(classes, size=samples)
    numbers, codes = generator.normal(size=(samples, 2)), generator.integers(3, size=(samples, 1))
    found = by_instance(labels, rate, classes, Inputs(numbers, codes, [3]), seed=7)

    draws = derived_generator(7, "corruption")
    flip = draws.normal(rate, 0.1, samples)
    while ((flip < 0) | (flip > 1)).any():
        again = (flip < 0) | (flip > 1)
        flip[again] = draws.normal(rate, 0.1, int(again.sum()))
    assert flip.min() >= 0 and flip.max() <= 1
    first, second = draws.random(samples), draws.random(samples)
    matrices = {}
    for y in range(classes):
        source = derived_generator(7, "projection", y)
        matrices[y] = np.concatenate([source.standard_normal((n, classes)) for n in (2, 3)])
    for i, y in enumerate(labels):
        if first[i] >= flip[i]:
            assert found[i] == y
            continue
        logits = np.concatenate([numbers[i], np.eye(3)[codes[i, 0]]]) @ matrices[y]
        others = [k for k in range(classes) if k != y]
        p = np.exp(logits[others]) / np.exp(logits[others]).sum()
        assert found[i] == others[int(np.searchsorted(np.cumsum(p), second[i], side="right"))]
    assert (found != labels).mean() == pytest.approx(flip.mean(), abs=0.08)


@pytest.mark.parametrize("kind", ["uniform", "pair", "instance"])
def test_noise_of_each_kind_is_in_the_training_set_alone(kind, tmp_path):
    root, classes = tmp_path / "data", 5
    shape = {"classes": classes, "train_per_class": 40, "attributes": 2, "image_size": (20, 24)}
    split = load_split(prepare(root, tmp_path / "split", **shape))

    def targets(seed=5, rate=0.5):
        inputs = lambda: inputs_of(split, str(tmp_path / "cache"), 0)  # noqa: E731
        return corrupted_targets(split, kind, rate, seed, inputs)

    before = split.labels.copy()
    wrong = targets()
    assert np.array_equal(split.labels, before)
    changed = np.flatnonzero(wrong != before[:, 0])
    rest = split.indices["rest_train"]
    assert set(changed) <= set(rest)
    expected = 0.4 if kind == "uniform" else 0.5  # a fifth is redrawn to the true class
    assert len(changed) / len(rest) == pytest.approx(expected, abs=0.12)
    assert np.array_equal(wrong, targets())
    assert not np.array_equal(wrong, targets(seed=6))
    assert not np.array_equal(wrong, targets(rate=0.3))


def test_images_are_seen_at_16_pixels(tiny_split, tmp_path):
    split = load_split(tiny_split)
    inputs = inputs_of(split, "none", 0)
    pixels = []
    for path in map(split.image_path, range(len(split.paths))):
        image = Image.open(path).convert("RGB")
        width, height = image.size
        size = (16, 16 * height // width) if width <= height else (16 * width // height, 16)
        image = np.asarray(image.resize(size, Image.BILINEAR), float)
        top, left = ((n - 16) // 2 for n in image.shape[:2])
        pixels.append(image[top : top + 16, left : left + 16].reshape(-1))
    pixels = np.array(pixels)
    train = pixels[split.indices["full_train"]]
    expected = (pixels - train.mean(axis=0)) / np.maximum(train.std(axis=0), 1)
    assert inputs.numbers == pytest.approx(expected, abs=1e-4)
    cached = inputs_of(split, str(tmp_path), 0)
    assert np.array_equal(cached.numbers, inputs.numbers)


def test_numbers_have_no_next_class():
    split = split_of((PRICED, PRICE), (KINDS, KIND))
    with pytest.raises(UserError, match="--corruption pair is of classes, but price is a number"):
        corrupted_targets(split, "pair", 0.4, 5)


@pytest.mark.parametrize("kind", ["pair", "instance"])
def test_a_run_trains_on_the_noise_that_it_names(kind, tiny_config, tiny_split):
    split = load_split(tiny_split)
    config = tiny_config(corrupted=True, corrupted_rate=0.6, corruption=kind, method="common")
    samples = build(resolve(config, split), split).train_set
    expected = corrupted_targets(split, kind, 0.6, 5, lambda: inputs_of(split, "none", 0))
    assert (expected != split.labels[:, 0]).any()
    assert samples.labels[:, 0].tolist() == expected[samples.positions].tolist()


def test_a_table_of_each_kind_has_columns_and_files_of_its_own(tiny_split, tmp_path, command):
    flags = ["table4", "--split_dir", tiny_split, "--sweep_dir", tmp_path, "--methods", "common"]
    flags += ["--seeds", "1", "--jobs", "1", "--settings", "corrupted_0.4"]
    flags += [f"--run_flags={' '.join(tiny_flags(max_steps=1))}"]
    code, out, err = command(reproduce_tables.main, *flags, "--corruption", "pair", "--dry_run")
    assert code == 0, err
    assert "--corrupted 1 --corrupted_rate 0.4 --corruption pair" in out
    code, out, err = command(reproduce_tables.main, *flags, "--corruption", "instance")
    assert code == 0, err
    assert "40% corrupted by instance" in out
    assert [*tmp_path.glob("*/tables/table4_instance.md")]
    assert not [*tmp_path.glob("*/tables/table4.md")]
    code, _, err = command(reproduce_tables.main, "tune", "--corruption", "pair")
    assert code == 2 and "--corruption goes with table4 and all" in err
