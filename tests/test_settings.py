"""The paper's settings: semi-supervised, where masked labels do not exist, and corrupted labels."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

import train_bilevel
from auxilearn.data.corruption import corrupt
from auxilearn.data.dataset import training_set
from auxilearn.data.split import load_split
from auxilearn.errors import UserError
from auxilearn.methods import METHODS
from auxilearn.run.build import build
from auxilearn.run.config import resolve
from auxilearn.run.record import description
from tests.conftest import assert_one_error_line, assert_same_run, tiny_flags


@pytest.fixture
def split(tiny_split):
    return load_split(tiny_split)


def built(config):
    """The ``Run`` of a configuration, ready to train."""
    split = load_split(config.split_dir)
    return build(resolve(config, split), split)


def positions_of(split, samples, chosen):
    return set(samples.positions[np.asarray(chosen)].tolist())


# --------------------------------------------------------------------------------------------------
# Semi-supervised
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [1, 2, 4])
@pytest.mark.parametrize("seed", [5, 6])
def test_n_images_per_class_keep_their_label(per_class, seed, split):
    samples = training_set(split, "rest_train", split.tasks, seed, labeled_per_class=per_class)
    chosen = split.labels[samples.positions[samples.mask[:, 0].numpy()], 0]
    assert np.bincount(chosen, minlength=4).tolist() == [per_class] * 4
    plain = training_set(split, "rest_train", split.tasks, seed)
    assert torch.equal(samples.labels[:, 1:], plain.labels[:, 1:])
    assert samples.mask[:, 1:].all() and plain.mask is None


def test_the_choice_is_the_same_for_every_method_and_follows_the_seed(split):
    rest = training_set(split, "rest_train", split.tasks, 5, labeled_per_class=2)
    full = training_set(split, "full_train", split.tasks, 5, labeled_per_class=2)
    chosen = positions_of(split, rest, rest.mask[:, 0])
    dev = set(split.indices["dev"].tolist())
    # The development images' labels are known to every method: bilevel ones read them above.
    assert positions_of(split, full, full.mask[:, 0]) == chosen | dev
    other = training_set(split, "rest_train", split.tasks, 6, labeled_per_class=2)
    assert positions_of(split, other, other.mask[:, 0]) != chosen


def test_the_choice_is_random_within_a_class(split):
    counts = np.zeros(len(split.labels), dtype=int)
    for seed in range(200):
        samples = training_set(split, "rest_train", split.tasks, seed, labeled_per_class=1)
        counts[samples.positions[samples.mask[:, 0].numpy()]] += 1
    # 200 draws of one in four: 50 +- 6
    assert (np.abs(counts[split.indices["rest_train"]] - 50) < 30).all()


def test_the_mask_is_on_the_target_column_alone(tiny_config):
    run = built(tiny_config(labeled_per_class=2, train_batch_size=16))
    batch, ((upper,), (dev,)) = next(run.lower_batches(0)), next(run.upper_batches(0))
    assert batch.mask[:, 1:].all()
    assert torch.equal(batch.mask[:, 0], run.train_set.mask[:, 0][batch.sample_id])
    assert batch.mask[:, 0].sum() == 8
    assert torch.equal(upper.mask.sum(dim=0), batch.mask.sum(dim=0))
    assert dev.mask is None and next(iter(run.evaluation_batches("valid"))).mask is None


def copy_with_labels(tiny_split, folder, labels):
    """A copy of the split whose image_dictionary.json has other classes. Returns its folder."""
    shutil.copytree(tiny_split, folder)
    file = folder / "image_dictionary.json"
    dictionary = json.loads(file.read_text())
    for row, label in zip(dictionary.values(), labels.tolist(), strict=True):
        row[1] = label
    file.write_text(json.dumps(dictionary))
    return folder


SEED = 6
ONE_LABEL = {"labeled_per_class": 1, "seed": SEED}


def exchanged_masked_labels(split, same_choice):
    """Labels in which four masked training images have exchanged theirs in pairs.

    With ``same_choice`` the exchange is one after which the seed still chooses the same images.
    """
    samples = training_set(split, "rest_train", split.tasks, SEED, labeled_per_class=1)
    masked = samples.positions[~samples.mask[:, 0].numpy()]
    generator = np.random.default_rng(0)
    for _ in range(5000):
        labels = split.labels[:, 0].copy()
        pairs = generator.permutation(masked)[:4].reshape(2, 2)
        labels[pairs] = labels[pairs[:, ::-1]]
        if (labels[pairs] == split.labels[pairs, 0]).any():
            continue
        exchanged = np.column_stack([labels, split.labels[:, 1:]])
        trial = dataclasses.replace(split, labels=exchanged)
        again = training_set(trial, "rest_train", trial.tasks, SEED, labeled_per_class=1)
        if not same_choice or torch.equal(again.mask, samples.mask):
            return labels
    raise AssertionError("no exchange leaves the choice as it was")


@pytest.mark.parametrize("method", METHODS)
def test_masked_labels_influence_nothing(method, split, tiny_split, tiny_run, tmp_path, log_every):
    log_every(1)
    labels = exchanged_masked_labels(split, same_choice=True)
    edited = copy_with_labels(tiny_split, tmp_path / "edited", labels)
    settings = {"method": method, **ONE_LABEL, "upper_lr": 0.1}
    one = tiny_run(**settings)
    other = tiny_run(**settings, split_dir=str(edited))
    assert one.directory.parent.name == "semi"
    assert one.summary["labeled_per_class"] == 1
    assert_same_run(one, other)


def test_a_labelled_label_does_influence_the_run(split, tiny_split, tiny_run, tmp_path):
    """That the test above can fail: the same exchange, with all labels in use."""
    labels = exchanged_masked_labels(split, same_choice=True)
    edited = copy_with_labels(tiny_split, tmp_path / "edited", labels)
    one, other = tiny_run(method="common"), tiny_run(method="common", split_dir=str(edited))
    assert one.timeless_rows != other.timeless_rows


@pytest.mark.parametrize("method", ["joint", "common"])
def test_masked_labels_do_not_influence_which_images_are_labelled(
    method, split, tiny_split, tiny_run, tmp_path
):
    """Any exchange of masked labels, by editing image_dictionary.json, leaves the run as it is."""
    labels = exchanged_masked_labels(split, same_choice=False)
    edited = copy_with_labels(tiny_split, tmp_path / "edited", labels)
    one = tiny_run(method=method, **ONE_LABEL)
    other = tiny_run(method=method, **ONE_LABEL, split_dir=str(edited))
    assert_same_run(one, other)


def test_more_labels_than_a_class_has_names_the_class(tiny_split, tmp_path, command, split):
    flags = tiny_flags(split_dir=tiny_split, record_dir=tmp_path / "record")
    code, out, err = command(train_bilevel.main, *flags, "--labeled_per_class", "5")
    assert (code, out) == (2, "")
    assert_one_error_line(err, "--labeled_per_class 5", split.target.class_names[0], "4")
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize("method", ["joint", "common"])
def test_batches_without_any_label_train_the_auxiliary_tasks(method, tiny_run, log_every):
    log_every(1)
    run = tiny_run(method=method, labeled_per_class=1, train_batch_size=1, hyperstep=3)
    assert all(np.isfinite(row["loss"]) and row["loss"] > 0 for row in run.rows_of("step"))
    assert all(torch.isfinite(t).all() for t in run.checkpoint["model"].values())


def test_the_reported_target_loss_is_of_labelled_images_alone(tiny_run, log_every):
    """Four of twenty images have a label, one image a step: a step without one counts for none."""
    log_every(16)
    settings = {"method": "common", "train_batch_size": 1, "main_lr": 1e-9}
    rows = tiny_run(**settings, labeled_per_class=1).rows_of("step")[1:]
    assert all(1.0 < row["target_loss"] < 2.0 for row in rows), rows  # log(4) = 1.39


# --------------------------------------------------------------------------------------------------
# Corrupted labels
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_labels_are_redrawn_from_the_stated_matrix(rate):
    classes, samples = 7, 70_000
    labels = np.arange(samples) % classes
    redrawn = corrupt(labels, rate, classes, np.random.default_rng(1))
    assert redrawn.dtype == labels.dtype
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, redrawn), 1)
    expected = samples / classes * ((1 - rate) * np.eye(classes) + rate / classes)
    if rate == 0:
        assert np.array_equal(counts, expected)
        return
    statistic = ((counts - expected) ** 2 / expected).sum(axis=1)  # chi-square of 6 degrees
    assert (statistic < 35.3).all(), statistic  # the 99.9996 % quantile
    # One image's draw says nothing of the next one's.
    changed = redrawn != labels
    both = (changed[1:] & changed[:-1]).mean()
    assert both == pytest.approx(changed.mean() ** 2, abs=0.01)


def test_corruption_leaves_its_input_alone():
    labels = np.zeros(100, dtype=np.int64)
    corrupt(labels, 1.0, 5, np.random.default_rng(0))
    assert (labels == 0).all()


@pytest.mark.parametrize("name", ["rest_train", "full_train"])
def test_only_target_labels_of_training_images_change(name, split):
    clean = training_set(split, name, split.tasks, 5)
    samples = training_set(split, name, split.tasks, 5, corrupted_rate=0.6)
    assert torch.equal(samples.labels[:, 1:], clean.labels[:, 1:])
    assert samples.mask is None
    changed = positions_of(split, samples, samples.labels[:, 0] != clean.labels[:, 0])
    assert changed
    assert changed <= set(split.indices["rest_train"].tolist())
    uncorrupted = training_set(split, name, split.tasks, 5, corrupted_rate=0.0)
    assert torch.equal(uncorrupted.labels, clean.labels)


def test_corruption_leaves_the_split_alone(split):
    before = split.labels.copy()
    training_set(split, "full_train", split.tasks, 5, corrupted_rate=1.0)
    assert np.array_equal(split.labels, before)


def test_the_labels_are_the_same_for_every_method_and_follow_the_seed(split):
    def labels(name, seed=5, rate=0.6):
        samples = training_set(split, name, split.tasks, seed, corrupted_rate=rate)
        return dict(zip(samples.positions.tolist(), samples.labels[:, 0].tolist(), strict=True))

    rest, full = labels("rest_train"), labels("full_train")
    assert {position: full[position] for position in rest} == rest
    assert labels("rest_train") == rest
    assert labels("rest_train", seed=6) != rest


def test_labels_are_drawn_once_for_all_epochs_and_both_levels(tiny_config, split):
    run = built(tiny_config(corrupted=True, corrupted_rate=0.6, train_batch_size=5))

    def labels(stream, batches):
        seen = {}
        for _, batch in zip(range(batches), stream, strict=False):
            for place, row in zip(batch.sample_id.tolist(), batch.labels.tolist(), strict=True):
                assert seen.setdefault(place, row) == row
        return seen

    def of_upper_level(which):
        return (pair[which][0] for pair in run.upper_batches(0))

    lower = labels(run.lower_batches(0), 12)  # three passes of 16 images
    assert lower == labels(of_upper_level(0), 12)
    assert len(lower) == 16
    train = split.indices["rest_train"]
    clean = split.labels[train, 0].tolist()
    wrong = sum(lower[place][0] != label for place, label in enumerate(clean))
    assert 0 < wrong < 16
    for place, position in enumerate(train):
        assert lower[place][1:] == split.labels[position, 1:].tolist()
    for name, stream in (("dev", of_upper_level(1)), ("valid", run.evaluation_batches("valid"))):
        positions = split.indices[name]
        for place, row in labels(stream, 2).items():
            assert row[0] == split.labels[positions[place], 0]


@pytest.mark.parametrize("method", ["joint"])
def test_a_corrupted_run(method, tiny_run):
    clean = tiny_run(method=method)
    run = tiny_run(method=method, corrupted=True, corrupted_rate=0.6)
    assert run.directory.parent.name == "noisy"
    assert run.summary["setting"] == "noisy"
    assert run.summary["corrupted_rate"] == 0.6
    assert run.timeless_rows != clean.timeless_rows
    rate_without_switch = tiny_run(method=method, corrupted=False, corrupted_rate=0.6)
    assert_same_run(clean, rate_without_switch)
    assert rate_without_switch.summary["corrupted_rate"] == 0
    nothing_redrawn = tiny_run(method=method, corrupted=True, corrupted_rate=0.0)
    assert_same_run(clean, nothing_redrawn)


def test_both_settings_at_once_are_refused(tiny_split, tmp_path, command):
    flags = tiny_flags(split_dir=tiny_split, record_dir=tmp_path / "record")
    code, out, err = command(
        train_bilevel.main, *flags, "--corupted", "1", "--labeled_per_class", "2"
    )
    assert (code, out) == (2, "")
    assert_one_error_line(err, "--corrupted 1", "--labeled_per_class")
    assert not (tmp_path / "record").exists()


# --------------------------------------------------------------------------------------------------
# Which sets a method trains on
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "hold_out_dev"),
    [*((method, None) for method in METHODS), ("joint", False), ("joint_stable", True)],
)
def test_the_development_set_is_held_out_of_the_lower_level(
    method, hold_out_dev, tiny_config, split
):
    run = built(tiny_config(method=method, train_batch_size=20, hold_out_dev=hold_out_dev))
    by_default = method in ("joint", "naive", "task", "linear") or METHODS[method].needs_dev
    name = "rest_train" if hold_out_dev or (hold_out_dev is None and by_default) else "full_train"
    batch = next(run.lower_batches(0))
    expected = split.indices[name]
    assert sorted(run.train_set.positions[batch.sample_id].tolist()) == sorted(expected)
    assert description(run)["data"]["trained_on"] == name


def test_task_num_takes_the_target_and_the_first_attributes(tiny_config, split):
    run = built(tiny_config(method="common", task_num=3, train_batch_size=20))
    batch = next(run.lower_batches(0))
    positions = run.train_set.positions[batch.sample_id]
    assert batch.labels.shape == (20, 3)
    assert batch.labels.tolist() == split.labels[positions, :3].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "single"},
        {"method": "common", "task_num": 1},
        {"method": "common", "whether_aux": False},
    ],
)
def test_without_auxiliary_tasks_methods_are_the_single_task(settings, tiny_run):
    run = tiny_run(**settings)
    assert run.read("config.json")["config"]["task_num"] == 1
    assert run.read("config.json")["config"]["whether_aux"] == (settings.get("task_num") == 1)
    assert_same_run(tiny_run(method="single"), run)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"method": "single", "task_num": 3}, "--method single"),
        ({"method": "single", "whether_aux": True}, "--whether_aux"),
        ({"method": "joint", "whether_aux": False, "task_num": 3}, "--whether_aux 0"),
        ({"method": "joint", "task_num": 6}, "--task_num 6.*at most 5"),
    ],
)
def test_contradictory_numbers_of_tasks_are_refused(settings, part, tiny_run):
    with pytest.raises(UserError, match=re.compile(part)):
        tiny_run(**settings)
