"""The command line: users' own commands, defaults, help, and what happens to bad values."""

import dataclasses
import json
import re
import shlex

import pytest
import torch

import data_preprocess
import train_bilevel
from auxilearn.data import cub
from auxilearn.data.split import load_split, write_split
from auxilearn.errors import UserError
from auxilearn.hypernet import Identity
from auxilearn.methods import METHODS, register
from auxilearn.run import config as config_module
from auxilearn.run.command_line import flags_of, parse
from auxilearn.run.config import (
    FIELDS,
    GROUPS,
    KINDS,
    UPPER,
    Config,
    check,
    from_record,
    ineffective,
    resolve,
    slow_device,
    with_method_defaults,
)
from tests.conftest import Run, assert_one_error_line, prepare, tiny_flags
from tests.cub_shape import write_cub_shape

# Section 6 of the specification, as users type it.
TYPED = """--task_num 313 --epochs 100 --exp_name train_joint_seed5 --whether_aux 1 \
--train_batch_size 64 --aux_weight 1.0 --main_lr 1e-4 --aux_lr 1e-2 --method joint --hyperstep 20 \
--corupted 0 --auxw_decay 5e-5 --n_meta_train_loss_accum 1 --corupted_rate 0.2"""

# Section 6's defaults, under the present names.
RELEASED = {
    "feature_dim": 512,
    "epochs": 20,
    "train_batch_size": 32,
    "test_batch_size": 128,
    "main_lr": 1e-4,
    "upper_lr": 1e-3,
    "w_decay": 5e-4,
    "upper_decay": 1e-5,
    "aux_weight": 1.0,
    "dev_batch_size": 50,
    "hyperstep": 20,
    "n_meta_loss_accum": 1,
    "n_meta_train_loss_accum": 1,
    "method": "joint",
    "corrupted": False,
    "corrupted_rate": 0.2,
    "backbone_pretrain": True,
}

PLUGIN = """
from auxilearn import register
from auxilearn.hypernet import Identity
from auxilearn.backbones import ConvNet, register_backbone

@register("mine", title="My method", learned="upper", defaults={"upper_lr": 0.5, "hyperstep": 7})
def build(problem, temperature=1.0, sizes=(3, 4), fast=False, mode="a", name=None):
    return Identity(0, problem.tasks)

register_backbone("mynet")(ConvNet)
"""


def resolved(split_dir, *flags):
    return resolve(parse(["--device", "cpu", *flags]), load_split(split_dir))


# --------------------------------------------------------------------------------------------------
# What users type
# --------------------------------------------------------------------------------------------------


def test_the_released_command_line_means_what_it_meant():
    config = parse(shlex.split(TYPED))
    expected = Config(
        task_num=313,
        epochs=100,
        exp_name="train_joint_seed5",
        whether_aux=True,
        train_batch_size=64,
        aux_weight=1.0,
        main_lr=1e-4,
        upper_lr=1e-2,
        method="joint",
        hyperstep=20,
        corrupted=False,
        upper_decay=5e-5,
        n_meta_train_loss_accum=1,
        corrupted_rate=0.2,
    )
    assert config == expected
    assert config.setting == "full"


def test_the_released_command_line_trains(tmp_path, command):
    """Verbatim, on data with 312 attributes; only size and place are added."""
    shape = {"classes": 3, "train_per_class": 3, "attributes": 312, "image_size": (24, 20)}
    split_dir = prepare(tmp_path / "data", tmp_path / "split", **shape)
    small = "--backbone convnet --in_dim 8 --image_size 16 --max_steps 21 --num_workers 0"
    places = ["--split_dir", split_dir, "--record_dir", tmp_path / "record"]
    code, out, err = command(train_bilevel.main, *shlex.split(TYPED), *small.split(), *places)
    assert (code, err) == (0, "")
    run = Run(tmp_path / "record" / "full" / "train_joint_seed5")
    assert out.splitlines()[-1] == f"test accuracy: {run.summary['test_accuracy']:.4f}"
    assert run.checkpoint["model"]["heads.linear.weight"].shape == (3 + 2 * 312, 8)
    assert run.checkpoint["scheduler"]["feature_sel.weight"].shape == (313, 8)
    assert [row["step"] for row in run.rows_of("upper")] == [20]
    settings = run.read("config.json")["config"]
    typed = {"task_num": 313, "epochs": 100, "train_batch_size": 64, "upper_lr": 0.01}
    typed |= {"upper_decay": 5e-5, "main_lr": 1e-4, "hyperstep": 20, "corrupted_rate": 0.2}
    by_default = {"solver": "neumann", "neumann_alpha": 1e-4, "neumann_terms": 3}
    by_default |= {"upper_optimizer": "sgd", "max_grad_norm": 10, "precondition": "none"}
    by_default |= {"options": {"factors": ["feature", "loss", "task"]}, "hold_out_dev": True}
    assert settings.items() >= {**typed, **by_default}.items()


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("corupted", "corrupted", "1"),
        ("corupted_rate", "corrupted_rate", "0.4"),
        ("aux_lr", "upper_lr", "0.4"),
        ("auxw_decay", "upper_decay", "0.4"),
        ("aux_batch_size", "dev_batch_size", "7"),
        ("in_dim", "feature_dim", "7"),
    ],
)
def test_old_names_are_aliases(old, new, text):
    assert parse([f"--{old}", text]) == parse([f"--{new}", text]) != Config()
    assert old not in FIELDS


def test_hidden_flags_are_accepted():
    flags = "--whether_aux 0 --n_meta_loss_accum 2 --test_batch_size 7 --aux_hidden_dim 5 6"
    config = parse(shlex.split(flags))
    found = (config.whether_aux, config.n_meta_loss_accum, config.test_batch_size, config.options)
    assert found == (False, 2, 7, {})  # joint has no hidden layers
    config = parse(shlex.split(f"{flags} --method task"))
    assert config.options == {"hidden_sizes": (5, 6)}


def test_a_switch_may_stand_alone():
    assert parse(["--resume", "--corrupted", "--seed", "6"]) == Config(
        resume=True, corrupted=True, seed=6
    )
    for text, value in (("1", True), ("true", True), ("0", False), ("False", False)):
        assert parse(["--resume", text]).resume is value


def test_what_is_left_open_is_taken_from_the_method(tiny_split):
    flags = ["--backbone", "convnet", "--train_batch_size", "3"]
    released = resolved(tiny_split, *flags, "--method", "joint")
    stable = resolved(tiny_split, *flags, "--method", "joint_stable")
    names = ["upper_optimizer", "solver", "precondition", "warmup_epochs", "max_grad_norm"]
    names += ["upper_lr", "hyperstep", "n_meta_train_loss_accum", "hold_out_dev"]
    expected = ["sgd", "neumann", "none", 0, 10, 1e-3, 20, 1, True]
    assert [getattr(released, name) for name in names] == expected
    expected = ["adam", "identity", "adam", 0, 0, 0.03, 5, 4, False]
    assert [getattr(stable, name) for name in names] == expected
    factors = ("feature", "loss", "task")
    assert released.options == {"factors": factors}
    assert stable.options == {"factors": factors, "target_share": "learned", "tempered": True}
    asked = ["--solver", "neumann", "--precondition", "none", "--max_grad_norm", "3"]
    asked = resolved(tiny_split, *flags, "--method", "joint_stable", *asked, "--aux_lr", "0.2")
    assert (asked.solver, asked.precondition, asked.max_grad_norm) == ("neumann", "none", 3.0)
    assert (asked.upper_lr, asked.hyperstep) == (0.2, stable.hyperstep)
    assert resolve(released, load_split(tiny_split)) == released


def test_below_sgd_the_hypergradient_is_plain_gradient_descent_s(tiny_split):
    flags = ["--method", "joint_stable", "--main_optimizer", "sgd"]
    assert resolved(tiny_split, *flags[:2]).precondition == "adam"
    assert resolved(tiny_split, *flags).precondition == "none"
    with pytest.raises(UserError, match="--precondition adam is for --main_optimizer adam, not"):
        resolved(tiny_split, *flags, "--precondition", "adam")


def test_what_is_left_open_is_taken_from_the_data(tiny_split):
    config = resolved(tiny_split)  # of small images
    assert (config.backbone, config.image_size, config.main_lr) == ("convnet", 21, 1e-3)
    assert (config.task_num, config.whether_aux, config.backbone_pretrain) == (5, True, False)
    config = resolved(tiny_split, "--backbone", "resnet18")
    assert (config.image_size, config.main_lr, config.backbone_pretrain) == (224, 1e-4, True)
    config = resolved(tiny_split, "--backbone", "resnet18", "--backbone_pretrain", "0")
    assert config.main_lr == 1e-3
    assert config.neumann_alpha == config.main_lr
    assert config.cache_dir == f"{config.split_dir}/cache"
    own = resolved(tiny_split, "--backbone", "resnet18", "--backbone_weights", "x.pt")
    assert (own.backbone_pretrain, own.main_lr) == (False, 1e-4)
    assert resolved(tiny_split, "--neumann_alpha", "0.5").neumann_alpha == 0.5
    left_open = {name for name, value in vars(config).items() if value is None}
    assert left_open == {"backbone_weights", "exp_name", "max_steps", "plugin", "threads"}


def test_the_paper_s_settings_are_a_flag_away():
    """What SPEC's documented command line says, whatever stands before or behind --preset."""
    typed = parse(shlex.split(TYPED))
    places = ["--task_num", "313", "--whether_aux", "1", "--exp_name", "train_joint_seed5"]
    preset = parse(["--preset", "paper", *places])
    network = {"backbone": "resnet18", "image_size": 224}  # as typed, on images of over 96 pixels
    assert with_method_defaults(preset) == dataclasses.replace(
        with_method_defaults(typed), **network
    )
    config = parse(["--aux_lr", "0.5", "--preset", "paper", "--method", "joint_stable"])
    assert (config.upper_lr, config.method, config.epochs) == (0.5, "joint_stable", 100)
    with pytest.raises(UserError, match="--preset"):
        parse(["--preset", "mine"])


def test_the_released_defaults_are_a_flag_away(tiny_split, capsys):
    config = resolved(tiny_split, "--preset", "released")
    assert "does not reproduce" in capsys.readouterr().out
    assert {name: getattr(config, name) for name in RELEASED} == RELEASED
    assert config.dev_batches == "first"
    plain = resolved(tiny_split, "--backbone", "resnet18")
    assert dataclasses.replace(config, dev_batches="random") == plain
    network = resolved(tiny_split, "--preset", "released", "--method", "task")
    assert network.options == {"hidden_sizes": (10, 10, 10, 10)}
    stable = resolved(tiny_split, "--preset", "released", "--method", "joint_stable")
    assert (stable.upper_optimizer, stable.warmup_epochs) == ("sgd", 0)  # not the method's own
    assert parse([]) == Config()


def test_every_field_is_a_flag_of_its_own():
    for name, field in FIELDS.items():
        info = field.metadata
        if name == "options":
            continue
        if choices := config_module.choices_of(field):
            text = value = choices[-1]
        else:
            text, value = {bool: ("1", True), int: ("7", 7), float: ("0.5", 0.5)}.get(
                KINDS[field.name], ("word", "word")
            )
        for flag in (name, *info["aliases"]):
            if flag == "plugin":
                continue
            config = parse([f"--{flag}", text])
            assert config == dataclasses.replace(Config(), **{name: value})


def test_the_flags_of_a_configuration_make_it():
    flags = "--method task --option hidden_sizes=3,4 --epochs 7 --corrupted --w_decay 0 --seed 5"
    config = with_method_defaults(parse(shlex.split(flags)))
    again = parse(flags_of(config))
    assert with_method_defaults(again) == config
    assert with_method_defaults(parse(flags_of(Config()))) == with_method_defaults(Config())


def test_a_recorded_configuration_is_read_again(tiny_split):
    config = resolved(tiny_split, "--method", "task", "--option", "hidden_sizes=3,4")
    recorded = json.loads(json.dumps(dataclasses.asdict(config)))
    assert recorded["options"] == {"hidden_sizes": [3, 4]}
    assert from_record(recorded) == config
    with pytest.raises(UserError, match="another version of this program .*precision"):
        from_record({name: value for name, value in recorded.items() if name != "precision"})
    with pytest.raises(UserError, match="--method mine is not known: .*--plugin"):
        from_record(recorded | {"method": "mine"})


# --------------------------------------------------------------------------------------------------
# Options and plugins
# --------------------------------------------------------------------------------------------------


def test_options_of_the_methods():
    def options(*words):
        return parse(["--method", *words]).options

    assert options("joint", "--option", "factors=loss,task") == {"factors": ("loss", "task")}
    assert options("gcs", "--option", "version=weighted") == {"version": "weighted"}
    two = ("--option", "factors=loss", "--option", "target_share=equal")
    together = ("--option", "factors=loss", "target_share=equal")
    expected = {"factors": ("loss",), "target_share": "equal"}
    assert options("joint_stable", *two) == options("joint_stable", *together) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method task --option hidden_sizes=3,x", "hidden_sizes must be of type int, not 'x'"),
        (
            "--method joint --option factors=loss,x",
            "factors must be one of feature, loss, task, not",
        ),
        ("--method joint --option factors=", "factors must be one of feature, loss, task, not ''"),
        ("--method gcs --option version", "version must be one of unweighted, weighted"),
        ("--method joint --option target_share=equal", "options of --method joint are: factors"),
        ("--method common --option x=1", "the options of --method common are: none"),
        ("--method task --aux_hidden_dim 10,x", "must be of type int"),
        (
            "--plugin PLUGIN --method mine --option temperature=hot",
            "temperature must be of type",
        ),
        ("--plugin PLUGIN --method mine --option fast=2", "fast must be 0, 1, true or false"),
    ],
)
def test_a_bad_option_says_what_was_expected(flags, message, plugin, command):
    flags = flags.replace("PLUGIN", str(plugin(PLUGIN)))
    code, out, err = command(train_bilevel.main, *flags.split())
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_plugin_adds_a_method_and_a_backbone(plugin, tiny_split, command):
    path = plugin(PLUGIN)
    config = resolved(
        tiny_split,
        *("--plugin", str(path), "--method", "mine", "--backbone", "mynet"),
        *("--option", "sizes=5", "fast=1", "temperature=0.25", "name=x"),
    )
    assert (config.upper_lr, config.hyperstep, config.solver) == (0.5, 7, "neumann")
    expected = {"temperature": 0.25, "sizes": (5,), "fast": True, "mode": "a", "name": "x"}
    assert config.options == expected
    _, out, _ = command(train_bilevel.main, "--plugin", path, "--help")
    assert "--option temperature=1.0" in out and "; mine 7)" in " ".join(out.split())


def test_a_plugin_is_needed_for_its_method(command):
    code, _, err = command(train_bilevel.main, "--method", "mine")
    assert code == 2
    assert "invalid choice: 'mine'" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.py", None, "no.py: No such file"),
        ("a.txt", "", "a.txt: expected a Python file"),
        ("a.py", "x = 1\nx +", "SyntaxError"),
        ("a.py", "x = 1\ny = z", "a.py, line 2: NameError: name 'z' is not defined"),
        (
            "a.py",
            "from auxilearn import register\nregister('joint')(None)",
            "a.py, line 2: ValueError: there is a method 'joint' already",
        ),
    ],
)
def test_a_bad_plugin_is_one_line(name, content, message, tmp_path, command):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    code, out, err = command(train_bilevel.main, "--plugin", path)
    assert (code, out) == (2, "")
    assert_one_error_line(err, message)


# --------------------------------------------------------------------------------------------------
# --help
# --------------------------------------------------------------------------------------------------


def test_help(command):
    code, out, err = command(train_bilevel.main, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    shown = re.findall(r"^  (--\w+)", out, re.MULTILINE)
    assert len(shown) == len(set(shown)) < 50
    most = [f"--{name}" for name in [*FIELDS][: [*FIELDS].index([*GROUPS][1])]]
    assert shown[: len(most)] == most and shown[0] == "--method"
    text = " ".join(out.split())
    for name, field in FIELDS.items():
        info, flag = field.metadata, "--option" if name == "options" else f"--{name}"
        assert (flag in shown) != info["hidden"]
        words = info["help"].split("(default")[0].split()[:5]
        assert " ".join(words) in text, name
    for method in METHODS.values():
        assert f"{method.name} " in text and f"{method.title}: " in text
        for option in method.options:
            assert f"--option {option}=" in text


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("epochs", "20"),
        ("corrupted", "0"),
        ("overwrite", "0"),
        ("main_lr", "1e-4; 1e-3 if the backbone starts from random weights"),
        ("record_dir", "bird_record"),
        ("task_num", "all"),
        ("upper_lr", "0.001; joint_stable 0.03"),
        ("hyperstep", "20; joint_stable 5"),
        ("max_steps", "no limit"),
    ],
)
def test_help_states_the_default(name, default, command):
    _, out, _ = command(train_bilevel.main, "--help")
    text = re.split(rf"\n  --{name} ", out)[1]
    text = " ".join(re.split(r"\n  --|\n\n", text)[0].split())
    assert f"(default: {default})" in text


# --------------------------------------------------------------------------------------------------
# Bad values: exit code 2, a reason, nothing made
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--epoch 3",  # no abbreviations: they would change their meaning with new flags
        "--learning_rate 1",
        "surprise",
        "--method magic",
        "--dev_batches last",
        "--solver cg",
        "--epochs 1.5",
        "--main_lr fast",
        "--resume maybe",
        "--exp_name",
    ],
)
def test_usage_errors(flags, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(train_bilevel.main, *flags.split())
    assert (code, out) == (2, "")
    assert_one_error_line(err, flags.split()[0], "--help")
    assert list(tmp_path.iterdir()) == []


BAD_VALUES = {
    "--corrupted_rate 1.5": "--corrupted_rate must be at most 1, not 1.5",
    "--corrupted_rate nan": "--corrupted_rate must be a finite number, not nan",
    "--main_lr 0": "--main_lr must be greater than 0, not 0",
    "--main_lr inf": "--main_lr must be a finite number",
    "--aux_lr 0": "--upper_lr",
    "--epochs 0": "--epochs must be at least 1, not 0",
    "--task_num 6": "--task_num 6",
    "--labeled_per_class 5": "--labeled_per_class 5",
    "--whether_aux 0 --task_num 3": "--whether_aux 0",
    "--method single --whether_aux 1": "--method single",
    "--device abacus": "--device abacus",
    "--device cuda:77": "--device cuda:77",
    "--device meta": "--device meta",
    "--backbone resnet19": "--backbone resnet19 is unknown: did you mean resnet18 or",
    "--backbone_pretrain 1": "--backbone_pretrain",
    "--backbone_weights nowhere.pt": "nowhere.pt",
    "--backbone_weights x.pt --backbone_pretrain 1 --backbone resnet18": "--backbone_weights",
    "--split_dir nowhere": "nowhere",
    "--data_root nowhere": "nowhere",
    "--exp_name a/b": "--exp_name",
    "--exp_name=": "--exp_name must not be empty",
    "--resume": "--resume 1 needs the --exp_name",
    "--resume --overwrite --exp_name x": "choose one",
    "--corrupted --labeled_per_class 2": "choose one",
}


@pytest.mark.parametrize("flags", BAD_VALUES)
def test_a_bad_value_is_one_line_and_leaves_nothing(
    flags, tiny_split, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = tiny_flags(split_dir=tiny_split, record_dir=tmp_path / "record")
    code, out, err = command(train_bilevel.main, *places, *flags.split())
    assert (code, out) == (2, ""), err
    assert_one_error_line(err, BAD_VALUES[flags])
    assert list(tmp_path.iterdir()) == []


def test_every_bound_is_checked():
    """Beyond the bounds of a field there is an error that names its flag, at them there is none."""
    bounded = 0
    for name, field in FIELDS.items():
        info = field.metadata
        beyond = [
            value
            for bound, value in (("low", -1), ("high", 1), ("above", 0))
            if info[bound] is not None
            for value in [info[bound] + value]
        ]
        for value in beyond:
            bounded += 1
            with pytest.raises(UserError, match=f"--{name} must be"):
                check(Config(**{name: value}))
        for bound in ("low", "high"):
            if info[bound] is not None and name != "labeled_per_class":
                check(Config(**{name: KINDS[field.name](info[bound])}))
    assert bounded > 25
    with pytest.raises(UserError, match="--method must be one of joint, .*, not 'magic'"):
        check(Config(method="magic"))
    with pytest.raises(UserError, match="--record_dir must not be empty"):
        check(Config(record_dir=""))


def test_a_checkpoint_of_another_architecture_is_one_line(tiny_split, tmp_path, command):
    torch.save({"model": {"backbone.conv.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    flags = tiny_flags(split_dir=tiny_split, record_dir=tmp_path / "record")
    weights = ["--backbone_weights", tmp_path / "other.pt"]
    code, out, err = command(train_bilevel.main, *flags, *weights)
    assert (code, out) == (2, "")
    assert_one_error_line(err, "other.pt", "--backbone convnet")
    assert not (tmp_path / "record").exists()


def test_weights_that_cannot_be_downloaded_are_one_line(tiny_split, tmp_path, command, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    changes = {"backbone": "resnet18", "image_size": 33, "record_dir": tmp_path / "record"}
    code, out, err = command(train_bilevel.main, *tiny_flags(split_dir=tiny_split, **changes))
    assert code == 2
    assert "Traceback" not in out
    err = re.sub(r"^Downloading: .*\n", "", err)  # torch.hub's own notice, in older versions
    assert_one_error_line(err, "https://", tmp_path / "torch", "--backbone_pretrain 0")
    assert not (tmp_path / "record").exists()


def test_a_batch_of_one_image_is_refused_where_it_would_be_trained_on(tiny_config, tiny_split):
    split = load_split(tiny_split)
    small = {"image_size": 8, "dev_batch_size": 1}
    resolve(tiny_config(method="common_dev", dev_epochs=0, **small), split)
    with pytest.raises(UserError, match="dev_batch_size 1 leaves a batch of one image"):
        resolve(tiny_config(method="common_dev", dev_epochs=1, **small), split)


# --------------------------------------------------------------------------------------------------
# Bad data: found by preprocessing, or by training where it changed since
# --------------------------------------------------------------------------------------------------


def cut(path, keep):
    """Leave the first ``keep`` lines of a text file."""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:keep]))


def no_training_images(root):
    rows = (root / "train_test_split.txt").read_text().split("\n")
    rows[:8] = [f"{number} 0" for number in range(1, 9)]  # the images of class 1
    (root / "train_test_split.txt").write_text("\n".join(rows))


DAMAGES = {
    "missing annotations": (
        lambda root: (root / "attributes" / "image_attribute_labels.txt").unlink(),
        "image_attribute_labels.txt",
    ),
    "truncated annotations": (
        lambda root: cut(root / "attributes" / "image_attribute_labels.txt", 100),
        "image_attribute_labels.txt",
    ),
    "an image without a label": (
        lambda root: cut(root / "image_class_labels.txt", 10),
        "image_class_labels.txt",
    ),
    "an image without its file": (
        lambda root: next((root / "images").rglob("*.jpg")).unlink(),
        ".jpg",
    ),
    "a class without training images": (no_training_images, "Bird_1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_data_is_not_preprocessed(name, tmp_path, command):
    root = write_cub_shape(tmp_path / "data", classes=3)
    damage, part = DAMAGES[name]
    damage(root)
    places = ["--data_root", root, "--out_dir", tmp_path / "split"]
    code, out, err = command(data_preprocess.main, *places)
    assert (code, out) == (2, "")
    assert_one_error_line(err, part)
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize("name", DAMAGES)
def test_data_damaged_since_preprocessing_is_not_trained_on(name, tmp_path, command):
    root = tmp_path / "data"
    split_dir = prepare(root, tmp_path / "split", classes=3)
    damage, _ = DAMAGES[name]
    damage(root)
    flags = tiny_flags(split_dir=split_dir, record_dir=tmp_path / "record")
    code, out, err = command(train_bilevel.main, *flags)
    assert (code, out) == (2, "")
    assert_one_error_line(err)
    assert not (tmp_path / "record").exists()


def test_sets_that_share_an_image_are_not_trained_on(tmp_path, command):
    split_dir = prepare(tmp_path / "data", tmp_path / "split", classes=3)
    valid = json.loads((split_dir / "valid_set.json").read_text())
    test = json.loads((split_dir / "test_set.json").read_text())
    (split_dir / "test_set.json").write_text(json.dumps([*test, valid[0]]))
    flags = tiny_flags(split_dir=split_dir, record_dir=tmp_path / "record")
    code, _, err = command(train_bilevel.main, *flags)
    assert code == 2
    assert_one_error_line(err, valid[0], "valid_set.json", "test_set.json")
    assert not (tmp_path / "record").exists()


def test_no_data_at_all(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for main in (data_preprocess.main, train_bilevel.main):
        code, out, err = command(main)
        assert (code, out) == (2, "")
        assert_one_error_line(err, "data_preprocess.py")
    assert list(tmp_path.iterdir()) == []


def test_the_split_is_made_once(tmp_path):
    """That the damaged copies above differ from sound ones in the damage alone."""
    root = write_cub_shape(tmp_path / "data", classes=3)
    first = write_split(tmp_path / "split", cub.read_annotations(root))
    again = write_split(tmp_path / "split", cub.read_annotations(root))
    assert (first.changed, again.changed) == (True, False)


# --------------------------------------------------------------------------------------------------
# What a person should know at the start
# --------------------------------------------------------------------------------------------------

# Of settings that may be without effect, another value than the default.
OTHER_VALUES = {
    "backbone_pretrain": False,
    "aux_weight": 0.3,
    "corrupted_rate": 0.6,
    "dev_epochs": 2,
    "upper_lr": 0.05,
    "upper_decay": 0.5,
    "upper_optimizer": "adam",
    "warmup_epochs": 1,
    "hyperstep": 3,
    "dev_batch_size": 2,
    "dev_batches": "first",
    "n_meta_loss_accum": 2,
    "n_meta_train_loss_accum": 2,
    "hold_out_dev": False,
    "solver": "identity",
    "precondition": "adam",
    "neumann_alpha": 0.05,
    "neumann_terms": 2,
    "max_grad_norm": 1e-3,
}


def test_every_setting_that_may_be_without_effect_is_listed():
    upper = set(UPPER)
    assert upper <= OTHER_VALUES.keys()
    baseline = {**OTHER_VALUES, "method": "single", "backbone": "convnet", "dev_epochs": 3}
    assert set(ineffective(Config(**baseline))) == OTHER_VALUES.keys()


@pytest.mark.parametrize("method", ["joint", "joint_stable", "common_dev"])
def test_a_setting_changes_a_run_unless_it_is_called_ineffective(
    method, tiny_config, tiny_run, tmp_path
):
    settings = {"method": method, "main_lr": 2e-3, "overwrite": True, "exp_name": "run"}
    settings |= {"max_steps": 5, "cache_dir": str(tmp_path / "cache")}
    plain, own = tiny_run(**settings).timeless_rows, with_method_defaults(tiny_config(**settings))
    for name, value in OTHER_VALUES.items():
        if value == getattr(own, name):
            continue
        changed = {**settings, name: value}
        unchanged = tiny_run(**changed).timeless_rows == plain
        assert unchanged == (name in ineffective(tiny_config(**changed))), name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--method joint --aux_lr 0.1 --neumann_terms 5 --neumann_alpha 0.1", ""),
        ("--method joint --solver identity --neumann_terms 5", "neumann_terms"),
        ("--method joint --neumann_terms 0 --neumann_alpha 0.1", "neumann_alpha"),
        ("--method joint_stable --neumann_alpha 0.1", "neumann_alpha"),
        ("--method joint_stable --dev_batch_size 7", ""),
        ("--method joint --dev_epochs 3", "dev_epochs"),
        ("--method common_dev --aux_batch_size 7 --aux_lr 0.1 --hyperstep 5", "hyperstep upper_lr"),
        ("--method common_dev --dev_epochs 0 --aux_batch_size 7", "dev_batch_size"),
        ("--method single --aux_weight 0.1", "aux_weight"),
        ("--method common --aux_weight 0.1 --whether_aux 0", "aux_weight"),
        ("--method common --aux_weight 0.1 --task_num 1", "aux_weight"),
        ("--method gcs --option version=weighted", ""),
        ("--backbone convnet --backbone_pretrain 0", "backbone_pretrain"),
        ("--backbone_pretrain 0", ""),
        ("--backbone_weights other.pt --backbone_pretrain 0", "backbone_pretrain"),
        ("--method common --precondition adam --main_optimizer sgd", "precondition"),
        ("--method common --corrupted_rate 0.6", "corrupted_rate"),
        ("--method common --corrupted_rate 0.6 --corrupted 1", ""),
        ("--preset released --method joint", ""),
    ],
)
def test_flags_without_effect(flags, expected):
    assert sorted(ineffective(parse(shlex.split(flags)))) == expected.split()


def test_development_batches_matter_to_a_scheduler_that_asks_for_them():
    config = Config(method="common", dev_batch_size=7, dev_batches="first", n_meta_loss_accum=2)
    assert len(ineffective(config)) == 3
    assert ineffective(config, needs_dev=True) == []


def test_a_run_says_which_of_its_flags_have_no_effect(tmp_path, tiny_split, command):
    flags = {"split_dir": tiny_split, "record_dir": tmp_path, "epochs": 1, "method": "common"}
    code, out, err = command(train_bilevel.main, *tiny_flags(**flags, solver="identity"))
    assert (code, err) == (0, "")
    # TINY has settings for every method; warmup_epochs 0 among them.
    names = "hyperstep dev_epochs warmup_epochs dev_batch_size solver neumann_terms"
    given = ", ".join(f"--{name}" for name in names.split())
    assert f"note: flags without effect in this run: {given}\n" in out
    assert "no label is corrupted" not in out
    run = tiny_flags(**flags, corrupted_rate=0.6, overwrite=1)
    assert "warning: --corrupted_rate without" in command(train_bilevel.main, *run)[1]


@pytest.mark.parametrize(
    ("device_files", "visible", "size", "expected"),
    [
        (["/dev/nvidia0"], "", 16, "CUDA_VISIBLE_DEVICES= hides it"),
        (["/dev/nvidia0"], "5", 16, "CUDA_VISIBLE_DEVICES=5 hides it"),
        (["/dev/nvidia0"], None, 16, "this PyTorch cannot use it"),
        ([], None, 224, "training resnet18 at 224 pixels on the CPU, which takes days"),
        ([], None, 32, None),
    ],
)
def test_a_run_on_the_cpu_by_mistake(monkeypatch, device_files, visible, size, expected):
    monkeypatch.setattr(config_module.glob, "glob", lambda pattern: device_files)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = Config(device="cpu", backbone="resnet18", image_size=size)
    said = slow_device(config)
    assert (said is None) if expected is None else (expected in said)
    assert slow_device(dataclasses.replace(config, device="cuda")) is None


def test_a_run_warns_of_a_gpu_that_is_hidden(monkeypatch, tiny_run, capfd):
    monkeypatch.setattr(config_module.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    tiny_run(method="single", max_steps=1)
    assert "warning: training on the CPU, though this machine" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"learned": "upper"}, "no parameters"),
        ({"defaults": {"hyperstep": 0}}, "--hyperstep must be at least 1"),
    ],
)
def test_a_method_that_cannot_train_is_one_line(properties, message, tiny_config):
    register("mine", **properties)(lambda problem: Identity(0, problem.tasks))
    try:
        with pytest.raises(UserError, match=message):
            train_bilevel.train(tiny_config(method="mine", hyperstep=None))
    finally:
        del METHODS["mine"]
