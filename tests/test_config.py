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
from auxilearn.run.config import (
    _MATTERS,
    UPPER,
    Config,
    check,
    ineffective,
    parse,
    resolve,
    with_method_defaults,
)
from tests.conftest import Run, assert_one_error_line, prepare, tiny_flags
from tests.cub_shape import write_cub_shape

# Section 6 of the specification, as users type it.
TYPED = """--task_num 313 --epochs 100 --exp_name train_joint_seed5 --whether_aux 1 \
--train_batch_size 64 --aux_weight 1.0 --main_lr 1e-4 --aux_lr 1e-2 --method joint --hyperstep 20 \
--corupted 0 --auxw_decay 5e-5 --n_meta_train_loss_accum 1 --corupted_rate 0.2"""

DEFAULTS = {
    "in_dim": 512,
    "epochs": 20,
    "train_batch_size": 32,
    "test_batch_size": 128,
    "main_lr": 1e-4,
    "aux_lr": 1e-3,
    "w_decay": 5e-4,
    "auxw_decay": 1e-5,
    "aux_weight": 1.0,
    "aux_batch_size": 50,
    "hyperstep": 20,
    "aux_hidden_dim": [10, 10, 10, 10],
    "n_meta_loss_accum": 1,
    "n_meta_train_loss_accum": 1,
    "method": "joint",
    "corrupted": False,
    "corrupted_rate": 0.2,
    "seed": 5,
}


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
        aux_lr=1e-2,
        method="joint",
        hyperstep=20,
        corrupted=False,
        auxw_decay=5e-5,
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


@pytest.mark.parametrize("name", ["corupted", "corrupted"])
def test_both_spellings_of_the_corruption_flags(name):
    config = parse([f"--{name}", "1", f"--{name}_rate", "0.4"])
    assert config.corrupted is True
    assert config.corrupted_rate == 0.4
    assert config.setting == "noisy"


def test_the_defaults_are_the_released_ones(tiny_split):
    config = parse([])
    assert config == Config()
    resolved = resolve(parse(["--device", "cpu"]), load_split(tiny_split))
    by_method = ("aux_lr", "hyperstep", "n_meta_train_loss_accum")
    assert {getattr(config, name) for name in by_method} == {None}  # the method's to say
    found = {name: getattr(config, name) for name in DEFAULTS}
    found |= {name: getattr(resolved, name) for name in by_method}
    assert found == DEFAULTS


def test_what_is_left_open_is_taken_from_the_method(tiny_split):
    split = load_split(tiny_split)
    flags = ["--device", "cpu", "--backbone", "convnet", "--train_batch_size", "3"]
    released = resolve(parse([*flags, "--method", "joint"]), split)
    stable = resolve(parse([*flags, "--method", "joint_stable"]), split)
    names = ["upper_optimizer", "solver", "precondition", "warmup_epochs", "max_grad_norm"]
    names += ["target_share"]
    assert [getattr(released, name) for name in names] == ["sgd", "neumann", "none", 0, 10, "none"]
    assert [getattr(stable, name) for name in names] == [
        "adam",
        "identity",
        "adam",
        5,
        0,
        "learned",
    ]
    few_labels = [*flags, "--labeled_per_class", "1", "--method"]
    assert resolve(parse([*few_labels, "joint_stable"]), split).target_share == "fixed"
    assert resolve(parse([*few_labels, "joint"]), split).target_share == "none"
    asked = resolve(parse([*few_labels, "joint_stable", "--target_share", "learned"]), split)
    assert asked.target_share == "learned"
    asked = ["--solver", "cg", "--precondition", "none", "--max_grad_norm", "3", "--aux_lr", "0.2"]
    asked = resolve(parse([*flags, "--method", "joint_stable", *asked]), split)
    assert (asked.solver, asked.precondition, asked.max_grad_norm) == ("cg", "none", 3.0)
    assert (asked.aux_lr, asked.hyperstep) == (0.2, stable.hyperstep)
    assert resolve(released, split) == released


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (3, 1), (9, 4), (10, 5), (100, 5)])
def test_a_short_run_has_a_short_warm_up(tiny_split, epochs, warmup):
    flags = ["--device", "cpu", "--epochs", str(epochs), "--method"]
    split = load_split(tiny_split)
    assert resolve(parse([*flags, "joint_stable"]), split).warmup_epochs == warmup
    assert resolve(parse([*flags, "joint"]), split).warmup_epochs == 0
    given = resolve(parse([*flags, "joint_stable", "--warmup_epochs", "7"]), split)
    assert given.warmup_epochs == 7


def test_fine_tuning_is_five_times_as_slow_unless_given(tiny_split):
    split = load_split(tiny_split)
    flags = ["--device", "cpu", "--main_lr", "0.01"]
    assert resolve(parse(flags), split).dev_lr == pytest.approx(0.002)
    assert resolve(parse([*flags, "--dev_lr", "0.01"]), split).dev_lr == 0.01


def test_below_sgd_the_hypergradient_is_plain_gradient_descent_s(tiny_split):
    flags = ["--device", "cpu", "--method", "joint_stable", "--main_optimizer", "sgd"]
    split = load_split(tiny_split)
    assert resolve(parse(flags[:4]), split).precondition == "adam"
    assert resolve(parse(flags), split).precondition == "none"
    with pytest.raises(UserError, match="--precondition adam is for --main_optimizer adam, not"):
        resolve(parse([*flags, "--precondition", "adam"]), split)


def test_what_is_left_open_is_taken_from_the_data(tiny_split):
    split = load_split(tiny_split)
    config = resolve(parse(["--device", "cpu"]), split)
    assert config.task_num == 5
    assert config.whether_aux is True
    assert config.backbone_pretrain is True
    assert config.neumann_alpha == config.main_lr
    assert None not in {v for k, v in vars(config).items() if k in ("task_num", "data_root")}
    assert resolve(parse(["--backbone", "convnet"]), split).backbone_pretrain is False
    assert resolve(parse(["--backbone_weights", "x.pt"]), split).backbone_pretrain is False
    assert resolve(parse(["--neumann_alpha", "0.5"]), split).neumann_alpha == 0.5


def test_the_paper_s_settings_are_a_flag_away():
    """What SPEC's documented command line says, whatever stands before or behind --preset."""
    typed = parse(shlex.split(TYPED))
    places = ["--task_num", "313", "--whether_aux", "1", "--exp_name", "train_joint_seed5"]
    preset = parse(["--preset", "paper", *places])
    assert with_method_defaults(preset) == with_method_defaults(typed)
    config = parse(["--aux_lr", "0.5", "--preset", "paper", "--method", "joint_stable"])
    assert (config.aux_lr, config.method, config.epochs) == (0.5, "joint_stable", 100)
    with pytest.raises(SystemExit):
        parse(["--preset", "mine"])


def test_every_field_is_a_flag_of_its_own():
    for field in dataclasses.fields(Config):
        info = field.metadata
        if info["choices"]:
            text = value = info["choices"][-1]
            if info["many"]:
                value = [text]
        elif info["many"]:
            text, value = "3 4", [3, 4]
        else:
            text, value = {bool: ("1", True), int: ("7", 7), float: ("0.5", 0.5)}.get(
                info["kind"], ("word", "word")
            )
        for name in (field.name, *info["aliases"]):
            config = parse([f"--{name}", *text.split()])
            assert getattr(config, field.name) == value
            others = [f.name for f in dataclasses.fields(Config) if f.name != field.name]
            assert all(getattr(config, other) == getattr(Config(), other) for other in others)


def test_two_configurations_share_no_list():
    one, other = parse([]), parse([])
    one.aux_hidden_dim.append(1)
    assert other.aux_hidden_dim == Config().aux_hidden_dim == [10, 10, 10, 10]


# --------------------------------------------------------------------------------------------------
# --help
# --------------------------------------------------------------------------------------------------


def test_help_mentions_every_flag_and_says_something_of_it(command):
    code, out, err = command(train_bilevel.main, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    for field in dataclasses.fields(Config):
        for name in (field.name, *field.metadata["aliases"]):
            assert re.search(rf"--{name}\b", out), name
        assert len(field.metadata["help"]) > 10, field.name
        words = field.metadata["help"].split("(default")[0].split()[:5]
        assert " ".join(words) in " ".join(out.split()), field.name


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("epochs", "20"),
        ("aux_hidden_dim", "10 10 10 10"),
        ("corrupted", "0"),
        ("overwrite", "0"),
        ("main_lr", "0.0001"),
        ("record_dir", "bird_record"),
        ("task_num", "all the data has"),
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
        "--backbone vgg",
        "--dev_batches last",
        "--epochs 1.5",
        "--epochs many",
        "--main_lr fast",
        "--aux_hidden_dim",
        "--aux_hidden_dim 10,10",
        "--exp_name",
    ],
)
def test_usage_errors(flags, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(train_bilevel.main, *flags.split())
    assert (code, out) == (2, "")
    assert re.match(r"\w+\.py: error: ", err.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


BAD_VALUES = {
    "--corrupted_rate 1.5": "--corrupted_rate",
    "--corrupted_rate -0.1": "--corrupted_rate",
    "--corrupted_rate nan": "--corrupted_rate",
    "--corrupted 1 --corupted_rate 2": "--corrupted_rate",
    "--main_lr 0": "--main_lr",
    "--main_lr -1": "--main_lr",
    "--main_lr inf": "--main_lr",
    "--aux_lr 0": "--aux_lr",
    "--w_decay -1": "--w_decay",
    "--auxw_decay nan": "--auxw_decay",
    "--epochs 0": "--epochs",
    "--max_steps 0": "--max_steps",
    "--train_batch_size 0": "--train_batch_size",
    "--test_batch_size 0": "--test_batch_size",
    "--aux_batch_size -1": "--aux_batch_size",
    "--hyperstep 0": "--hyperstep",
    "--n_meta_loss_accum 0": "--n_meta_loss_accum",
    "--n_meta_train_loss_accum 0": "--n_meta_train_loss_accum",
    "--in_dim 0": "--in_dim",
    "--in_dim 1000000000000": "--in_dim",
    "--backbone resnet18 --backbone_pretrain 0 --in_dim 1000000000000": "--in_dim",
    "--image_size 0": "--image_size",
    "--num_workers -1": "--num_workers",
    "--aux_hidden_dim 0": "--aux_hidden_dim",
    "--aux_hidden_dim 10 -1": "--aux_hidden_dim",
    "--neumann_alpha 0": "--neumann_alpha",
    "--neumann_terms -1": "--neumann_terms",
    "--damping -1": "--damping",
    "--cg_iterations 0": "--cg_iterations",
    "--max_grad_norm -1": "--max_grad_norm",
    "--warmup_epochs -1": "--warmup_epochs",
    "--seed -1": "--seed",
    "--log_every 0": "--log_every",
    "--task_num 0": "--task_num",
    "--task_num 6": "--task_num 6",
    "--labeled_per_class -1": "--labeled_per_class",
    "--labeled_per_class 5": "--labeled_per_class 5",
    "--whether_aux 0 --task_num 3": "--whether_aux 0",
    "--method single --whether_aux 1": "--method single",
    "--device abacus": "--device abacus",
    "--device cuda:77": "--device cuda:77",
    "--device meta": "--device meta",
    "--device hpu": "--device hpu",
    "--backbone_pretrain 1": "--backbone_pretrain",
    "--backbone_weights nowhere.pt": "nowhere.pt",
    "--backbone_weights x.pt --backbone_pretrain 1 --backbone resnet18": "--backbone_weights",
    "--split_dir nowhere": "nowhere",
    "--data_root nowhere": "nowhere",
    "--exp_name a/b": "--exp_name",
    "--exp_name a\a": "--exp_name",
    "--exp_name \udcff": "--exp_name",
    f"--epochs {10**20}": "--epochs",
    f"--seed {10**30}": "--seed",
    f"--n_meta_loss_accum {10**9}": "--n_meta_loss_accum must be at most 10000",
    f"--n_meta_train_loss_accum {10**9}": "--n_meta_train_loss_accum must be at most 10000",
    f"--neumann_terms {10**9}": "--neumann_terms must be at most 10000",
    f"--cg_iterations {10**9}": "--cg_iterations must be at most 10000",
    **{
        f"--{name} 1e38": f"--{name} must be at most 1e+37, not 1e+38"
        for name in ("main_lr", "dev_lr", "aux_lr", "w_decay", "auxw_decay", "aux_weight")
    },
    f"--num_workers {10**8}": "--num_workers",
    f"--image_size {10**6}": "--image_size",
    f"--method task --aux_hidden_dim {10**9}": "--aux_hidden_dim",
    "--data_root=": "--data_root must not be empty",
    "--cache_dir=": "--cache_dir must not be empty",
    "--backbone_weights=": "--backbone_weights must not be empty",
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


def test_the_exact_solver_is_the_librarys_alone():
    with pytest.raises(UserError, match="--solver exact is unknown"):
        check(Config(solver="exact"))


def test_an_empty_record_dir_is_not_the_root_of_the_disk():
    with pytest.raises(UserError, match="--record_dir"):
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


def test_check_needs_no_data():
    check(Config())
    with pytest.raises(UserError, match="--epochs"):
        check(Config(epochs=0))
    with pytest.raises(UserError, match="choose from"):
        check(Config(method="magic"))


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
# Settings without effect
# --------------------------------------------------------------------------------------------------

# Of every setting that may be without effect, another value than its default.
OTHER_VALUES = {
    "backbone_pretrain": False,
    "aux_weight": 0.3,
    "gcs": "weighted",
    "corrupted_rate": 0.6,
    "cache_dir": "elsewhere",
    "dev_epochs": 2,
    "dev_lr": 0.01,
    "aux_lr": 0.05,
    "auxw_decay": 0.5,
    "upper_optimizer": "adam",
    "warmup_epochs": 1,
    "hyperstep": 3,
    "aux_batch_size": 2,
    "dev_batches": "first",
    "n_meta_loss_accum": 2,
    "n_meta_train_loss_accum": 2,
    "hold_out_dev": False,
    "factors": ["loss"],
    "target_share": "free",
    "aux_hidden_dim": [3],
    "solver": "identity",
    "precondition": "adam",
    "neumann_alpha": 0.05,
    "neumann_terms": 2,
    "neumann_scale": "alpha",
    "damping": 3.0,
    "cg_iterations": 1,
    "reduction": "final",
    "on_nonfinite": "skip",
    "on_divergence": "identity",
    "max_grad_norm": 1e-3,
}
# What shows in accidents alone, or in no number.
SILENT = {"on_nonfinite", "on_divergence", "cache_dir"}


def test_every_setting_that_may_be_without_effect_is_listed():
    upper = {field.name for field in dataclasses.fields(Config) if field.metadata["group"] == UPPER}
    assert OTHER_VALUES.keys() == upper | _MATTERS.keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "joint"},
        {"method": "joint", "solver": "cg"},
        {"method": "joint_stable"},
        {"method": "common_dev"},
        {"method": "gcs", "corrupted": True},
        {"method": "task"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_setting_changes_a_run_unless_it_is_called_ineffective(settings, tiny_config, tiny_run):
    settings = {**settings, "main_lr": 2e-3, "overwrite": True, "exp_name": "run"}
    plain, own = tiny_run(**settings).timeless_rows, with_method_defaults(tiny_config(**settings))
    for name, value in OTHER_VALUES.items():
        if name in SILENT or name in settings or value == getattr(own, name):
            continue
        changed = {**settings, name: value}
        unchanged = tiny_run(**changed).timeless_rows == plain
        assert unchanged == (name in ineffective(tiny_config(**changed))), name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--method joint --aux_lr 0.1 --solver cg --damping 2 --cg_iterations 3", ""),
        ("--method joint --solver cg --neumann_terms 5", "neumann_terms"),
        ("--method joint --solver identity --damping 2", "damping"),
        ("--method joint_stable --dev_lr 0.1 --aux_batch_size 7 --target_share free", ""),
        ("--method joint_stable --dev_epochs 0 --dev_lr 0.1", "dev_lr"),
        ("--method common_dev --aux_batch_size 7 --aux_lr 0.1 --hyperstep 5", "aux_lr hyperstep"),
        ("--method common_dev --dev_epochs 0 --aux_batch_size 7", "aux_batch_size"),
        (
            "--method single --aux_weight 0.1 --factors loss --gcs weighted",
            "aux_weight factors gcs",
        ),
        ("--method task --aux_hidden_dim 5 --target_share fixed", "target_share"),
        ("--method common --aux_weight 0.1 --whether_aux 0", "aux_weight"),
        ("--method common --aux_weight 0.1 --task_num 1", "aux_weight"),
        ("--method gcs --gcs weighted --task_num 1", "gcs"),
        ("--method joint --neumann_terms 0 --neumann_alpha 0.1", "neumann_alpha"),
        ("--method joint --neumann_terms 0 --neumann_alpha 0.1 --neumann_scale alpha", ""),
        ("--method joint --neumann_terms 0 --on_divergence identity", "on_divergence"),
        ("--method joint --on_divergence identity --on_nonfinite skip", ""),
        ("--method joint_stable --on_divergence identity", "on_divergence"),
        ("--method joint_stable --factors loss --target_share fixed", "target_share"),
        ("--method joint_stable --factors loss --target_share free", ""),
        ("--method joint_stable --task_num 1 --target_share fixed", "target_share"),
        ("--backbone convnet --backbone_pretrain 0", "backbone_pretrain"),
        ("--backbone_pretrain 0", ""),
        ("--backbone_weights other.pt --backbone_pretrain 0", "backbone_pretrain"),
        ("--method joint --cache off --cache_dir elsewhere", "cache_dir"),
        ("--method joint --cache_dir elsewhere", ""),
        ("--method common --precondition adam --main_optimizer sgd", "precondition"),
        ("--method common --corrupted_rate 0.6", "corrupted_rate"),
        ("--method common --corrupted_rate 0.6 --corrupted 1", ""),
    ],
)
def test_flags_without_effect(flags, expected):
    assert sorted(ineffective(parse(shlex.split(flags)))) == expected.split()


def test_the_reduction_matters_under_torchrun():
    config = parse(["--method", "joint", "--reduction", "final"])
    assert ineffective(config) == ["reduction"] and ineffective(config, processes=2) == []


def test_a_batch_of_one_image_is_refused_where_it_would_be_trained_on(tiny_config, tiny_split):
    split = load_split(tiny_split)
    small = {"image_size": 8, "aux_batch_size": 1, "backbone": "convnet"}
    resolve(tiny_config(method="common_dev", dev_epochs=0, **small), split)
    with pytest.raises(UserError, match="aux_batch_size 1 leaves a batch of one image"):
        resolve(tiny_config(method="common_dev", dev_epochs=1, **small), split)


def test_a_run_says_which_of_its_flags_have_no_effect(tmp_path, tiny_split, command):
    flags = {"split_dir": tiny_split, "record_dir": tmp_path, "epochs": 1, "method": "common"}
    code, out, err = command(train_bilevel.main, *tiny_flags(**flags, solver="cg"))
    assert (code, err) == (0, "")
    # TINY has settings for every method; warmup_epochs 0 among them.
    names = "dev_epochs warmup_epochs hyperstep aux_batch_size solver neumann_terms"
    given = ", ".join(f"--{name}" for name in names.split())
    assert f"note: settings without effect in this run: {given}\n" in out
    assert "no label is corrupted" not in out
    run = tiny_flags(**flags, corrupted_rate=0.6, overwrite=1)
    assert "warning: --corrupted_rate without" in command(train_bilevel.main, *run)[1]
