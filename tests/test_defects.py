"""Section 7 of the specification: what the released code gets wrong does not come back.

Each test is named after its row. Row 5, the tables, is tested in tests/test_tables.py; the resuming
of row 9 in tests/test_resume.py; that accumulation (row 11) takes no memory in
tests/test_bilevel.py.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_bilevel
from auxilearn.backbones import build_backbone
from auxilearn.bilevel import Bilevel
from auxilearn.data import cub
from auxilearn.data.split import load_split, write_split
from auxilearn.errors import UserError
from auxilearn.methods import METHODS
from auxilearn.models import TaskHeads, TaskModel
from auxilearn.run.build import build
from auxilearn.run.command_line import parse
from auxilearn.run.config import choose_device, resolve
from tests.conftest import prepare, tiny_flags

BILEVEL = [name for name, method in METHODS.items() if method.bilevel]


def built(config):
    split = load_split(config.split_dir, config.data_root)
    return build(resolve(config, split), split)


# --------------------------------------------------------------------------------------------------
# Row 1: the development batches
# --------------------------------------------------------------------------------------------------


def development_batches(run, steps):
    """The development batch of every upper step."""
    return [dev for _, (dev,) in itertools.islice(run.upper_batches(0), steps)]


def development_classes(run, steps):
    return [batch.labels[:, 0].tolist() for batch in development_batches(run, steps)]


def test_row_1_development_batches_reach_every_class_in_a_fresh_order_every_pass(tiny_config):
    run = built(tiny_config(dev_batch_size=2))  # of four development images, one a class
    batches = development_classes(run, 20)
    passes = [batches[i] + batches[i + 1] for i in range(0, 20, 2)]
    for classes in passes:
        assert sorted(classes) == [0, 1, 2, 3]
    assert len({tuple(classes) for classes in passes}) > 5


def test_row_1_upper_steps_of_a_run_see_every_class(tiny_run, monkeypatch):
    seen = []
    compute = Bilevel.upper_step

    def watched(self, train_batches, dev_batches):
        seen.extend(batch.labels[:, 0].tolist() for batch in dev_batches)
        return compute(self, train_batches, dev_batches)

    monkeypatch.setattr(Bilevel, "upper_step", watched)
    tiny_run(method="linear", hyperstep=1, dev_batch_size=1)
    assert len(seen) == 6
    assert {label for labels in seen[:4] for label in labels} == {0, 1, 2, 3}


def test_row_1_the_released_behaviour_is_there_on_request(tiny_config, tiny_split):
    split = load_split(tiny_split)
    run = built(tiny_config(dev_batch_size=2, dev_batches="first"))
    first = split.labels[split.indices["dev"][:2], 0].tolist()
    assert development_classes(run, 6) == [first] * 6


def test_row_1_development_images_are_not_augmented(tiny_config):
    run = built(tiny_config(dev_batch_size=4))
    one, other = development_batches(run, 2)
    assert torch.equal(one.inputs[one.sample_id.argsort()], other.inputs[other.sample_id.argsort()])


# --------------------------------------------------------------------------------------------------
# Row 2: the baseline runs to its end
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_row_2_the_checkpoint_of_every_method_is_the_one_that_is_tested(
    method, tiny_run, tiny_split, tiny_config
):
    run = tiny_run(method=method)
    checkpoint = run.checkpoint
    tasks = run.read("config.json")["config"]["task_num"]
    model = TaskModel(build_backbone("convnet", 8), 8, [4] + [2] * (tasks - 1))
    model.load_state_dict(checkpoint["model"])
    again = built(tiny_config(method=method))
    again.bilevel.scheduler.load_state_dict(checkpoint["scheduler"])
    split = load_split(tiny_split)
    images = [again.inputs.load(position) for position in split.indices["test"]]
    hits = 0
    with torch.no_grad():
        model.eval()
        for image, label in zip(images, split.labels[split.indices["test"], 0], strict=True):
            top, left = (round((side - 16) / 2) for side in image.shape[:2])
            view = torch.tensor(image[top : top + 16, left : left + 16]).permute(2, 0, 1)
            hits += int(model.predict(view[None]).argmax()) == label
    assert hits / len(images) == run.summary["test_accuracy"]


# --------------------------------------------------------------------------------------------------
# Row 3: switches and whole numbers
# --------------------------------------------------------------------------------------------------

SWITCHES = ["backbone_pretrain", "whether_aux", "corrupted", "overwrite"]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(
    ("text", "value"),
    [("0", False), ("1", True), ("False", False), ("True", True), ("false", False), ("TRUE", True)],
)
def test_row_3_a_switch_means_what_it_says(name, text, value):
    assert getattr(parse([f"--{name}", text]), name) is value


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("text", ["", "2", "-1", "none", "0.0"])
def test_row_3_a_switch_takes_nothing_else(name, text):
    with pytest.raises(UserError, match=f"--{name}"):
        parse([f"--{name}", text])


def test_row_3_batch_sizes_are_whole_numbers():
    size = parse(["--aux_batch_size", "50"]).dev_batch_size
    assert (type(size), size) == (int, 50)
    with pytest.raises(UserError, match="--aux_batch_size"):
        parse(["--aux_batch_size", "50.0"])


def test_row_3_pretrain_false_really_starts_from_random_weights(tiny_config, monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("asked for the ImageNet weights")

    monkeypatch.setattr("auxilearn.backbones._load_imagenet_weights", download)
    settings = {"backbone": "resnet18", "image_size": 33}
    given = parse(["--backbone_pretrain", "False"]).backbone_pretrain
    built(tiny_config(**settings, backbone_pretrain=given))
    with pytest.raises(AssertionError, match="ImageNet"):
        built(tiny_config(**settings))  # the default is to start from them


# --------------------------------------------------------------------------------------------------
# Row 4: everybody has the same split
# --------------------------------------------------------------------------------------------------


def test_row_4_the_split_follows_its_recorded_seed_alone(tmp_path):
    root = prepare(tmp_path / "data", tmp_path / "a", classes=3, test_per_class=6).parent / "data"
    annotations = cub.read_annotations(root)

    def halves(folder, seed):
        np.random.seed(None)  # noqa: NPY002  the global generators are not asked
        write_split(tmp_path / folder, annotations, split_seed=seed)
        files = ("valid_set.json", "test_set.json")
        return [json.loads((tmp_path / folder / name).read_text()) for name in files]

    one, again, other = halves("b", 5), halves("c", 5), halves("d", 6)
    assert one == again
    assert one != other
    assert sorted(one[0] + one[1]) == sorted(other[0] + other[1])
    assert json.loads((tmp_path / "d" / "split_info.json").read_text())["split_seed"] == 6


def test_row_4_the_runs_seed_does_not_move_the_split(tiny_run):
    one, other = tiny_run(method="single", seed=1), tiny_run(method="single", seed=2)
    assert one.summary["fingerprint"] == other.summary["fingerprint"]
    assert one.read("config.json")["data"]["split_seed"] == 5


# --------------------------------------------------------------------------------------------------
# Row 6: the semi-supervised setting and the single task are there (tests/test_settings.py)
# --------------------------------------------------------------------------------------------------


def test_row_6_single_learns_from_the_target_alone(tiny_run):
    run = tiny_run(method="single")
    for row in run.rows_of("step"):
        assert row["aux_loss"] == 0
        assert row["loss"] == pytest.approx(row["target_loss"])
    assert run.checkpoint["model"]["heads.linear.weight"].shape == (4, 8)


# --------------------------------------------------------------------------------------------------
# Row 7: no fixed machine
# --------------------------------------------------------------------------------------------------


def test_row_7_the_device_is_the_first_that_is_shown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == torch.device("cuda")  # without a number
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == torch.device("cpu")


def test_row_7_data_root_says_where_the_images_are(tmp_path, tiny_run):
    split_dir = prepare(tmp_path / "here", tmp_path / "split", classes=3)
    here = tiny_run(method="single", split_dir=str(split_dir))
    shutil.move(tmp_path / "here", tmp_path / "other disk")
    there = tiny_run(
        method="single", split_dir=str(split_dir), data_root=str(tmp_path / "other disk")
    )
    assert here.timeless_rows == there.timeless_rows
    assert there.read("config.json")["data"]["data_root"] == str(tmp_path / "other disk")


# --------------------------------------------------------------------------------------------------
# Row 8: no graphs in evaluation, one head
# --------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the operators that run while it is active."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def count(self, *names):
        return sum(self.names.count(name) for name in names)


def test_row_8_evaluation_builds_no_graph_and_computes_the_target_head_alone(tiny_run, monkeypatch):
    predict, outputs = TaskModel.predict, []

    def watched(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        outputs.append(predict(self, images))
        return outputs[-1]

    monkeypatch.setattr(TaskModel, "predict", watched)
    tiny_run(method="common", test_batch_size=5)
    assert [len(output) for output in outputs] == [5, 3] * 3  # two validations and the test
    for output in outputs:
        assert output.shape[1] == 4
        assert not output.requires_grad
        assert output.grad_fn is None


def test_row_8_the_heads_of_all_tasks_are_one_module_and_one_product():
    heads = TaskHeads(16, [200] + [2] * 312)
    layers = [module for module in heads.modules() if list(module.parameters(recurse=False))]
    assert [type(layer) for layer in layers] == [nn.Linear]
    assert heads.linear.out_features == 824
    features = torch.randn(3, 16, requires_grad=True)
    labels = torch.zeros(3, 313, dtype=torch.long)
    with Calls() as calls:
        losses = heads(features, labels)
    assert losses.shape == (3, 313)
    assert calls.count("addmm", "mm", "matmul", "linear") == 1
    assert calls.count("_log_softmax") == 2  # 200 classes, and all pairs at once
    fewer, fewer_labels = TaskHeads(16, [200] + [2] * 12), labels[:, :13]
    with Calls() as of_fewer:
        fewer(features, fewer_labels)
    assert len(of_fewer.names) == len(calls.names)  # whatever the number of tasks


# --------------------------------------------------------------------------------------------------
# Row 9: nothing is overwritten, every run has its figures and its seed
# --------------------------------------------------------------------------------------------------


def test_row_9_the_same_command_twice_keeps_both_runs(tiny_split, tmp_path, command):
    flags = tiny_flags(split_dir=tiny_split, record_dir=tmp_path, method="common", max_steps=1)
    assert command(train_bilevel.main, *flags)[0] == 0
    (first,) = (tmp_path / "full").iterdir()
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert command(train_bilevel.main, *flags)[0] == 0
    assert len(list((tmp_path / "full").iterdir())) == 2
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert before["metrics.jsonl"]


def test_row_9_settings_do_not_share_a_folder(tiny_run):
    settings = {"method": "single", "exp_name": "same", "max_steps": 1}
    runs = [
        tiny_run(**settings),
        tiny_run(**settings, corrupted=True),
        tiny_run(**settings, labeled_per_class=2),
    ]
    assert [run.directory.parent.name for run in runs] == ["full", "noisy", "semi"]


# --------------------------------------------------------------------------------------------------
# Row 10: a last batch of one sample
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labeled_per_class", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_row_10_a_batch_of_one_sample_is_defined(method, labeled_per_class, tiny_run):
    size = 5 if METHODS[method].bilevel else 19  # of 16 or 20
    settings = {"train_batch_size": size, "hyperstep": 1, "epochs": 1}
    run = tiny_run(method=method, labeled_per_class=labeled_per_class, **settings)
    for row in run.rows:  # reading them refuses NaN
        assert all(np.isfinite(v) for v in row.values() if isinstance(v, float))
    for part in ("model", "scheduler"):
        tensors = [t for t in run.checkpoint[part].values() if isinstance(t, torch.Tensor)]
        assert all(torch.isfinite(t).all() for t in tensors)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"train_batch_size": 5}, "--train_batch_size"),
        ({"train_batch_size": 1}, "--train_batch_size"),
        ({"dev_batch_size": 3}, "--dev_batch_size"),
        ({"method": "common", "train_batch_size": 19}, "--train_batch_size"),
    ],
)
def test_row_10_where_batch_norm_cannot_train_on_one_it_is_refused(settings, flag, tiny_config):
    """At 8 pixels a channel of one image has a single value left."""
    with pytest.raises(UserError, match=flag):
        built(tiny_config(image_size=8, **{"train_batch_size": 4, **settings}))
    built(tiny_config(image_size=8, train_batch_size=4, dev_batch_size=4))


# --------------------------------------------------------------------------------------------------
# Row 11: several training batches per upper step
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BILEVEL)
def test_row_11_every_method_takes_the_mean_over_the_training_batches(
    method, tiny_config, monkeypatch
):
    settings = {"method": method, "solver": "identity", "n_meta_train_loss_accum": 3}
    run = built(tiny_config(**settings))
    run.bilevel.model.double()
    run.bilevel.scheduler.double()
    compute = run.bilevel.hypergradient
    batches, dev = next(run.upper_batches(0))
    assert (len(batches), len(dev)) == (3, 1)
    singles = [compute([batch], dev)[0] for batch in batches]
    together = compute(batches, dev)[0]
    for all_three, *each in zip(together, *singles, strict=True):
        torch.testing.assert_close(all_three, sum(each) / 3, rtol=1e-9, atol=1e-15)
    assert any(not torch.allclose(one, other) for one, other in zip(*singles[:2], strict=True))


@pytest.mark.parametrize("method", BILEVEL)
@pytest.mark.parametrize(("train_count", "dev_count"), [(1, 1), (3, 2)])
def test_row_11_every_upper_step_gets_the_stated_number_of_new_batches(
    method, train_count, dev_count, tiny_run, monkeypatch
):
    taken = []
    compute = Bilevel.upper_step

    def watched(self, train_batches, dev_batches):
        taken.append(([b.sample_id for b in train_batches], [b.sample_id for b in dev_batches]))
        return compute(self, train_batches, dev_batches)

    monkeypatch.setattr(Bilevel, "upper_step", watched)
    counts = {"n_meta_train_loss_accum": train_count, "n_meta_loss_accum": dev_count}
    tiny_run(method=method, train_batch_size=4, dev_batch_size=2, max_steps=4, **counts)
    assert [(len(ours), len(dev)) for ours, dev in taken] == [(train_count, dev_count)] * 2
    in_order = torch.cat([sample_id for ours, _ in taken for sample_id in ours]).tolist()
    assert len(set(in_order[:16])) == min(16, len(in_order))  # a pass repeats nothing
    in_order = torch.cat([sample_id for _, dev in taken for sample_id in dev]).tolist()
    assert len(set(in_order[:4])) == 4
