"""The benchmark that sets the package beside a plain implementation, on a tiny workload."""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from auxilearn.errors import RunError, UserError
from auxilearn.hypernet import TaskLosses
from auxilearn.methods import METHODS, Problem, load_plugin
from auxilearn.metrics import ACCURACY, RMSE
from auxilearn.run.command_line import parse
from benchmarks import (
    beside_revision,
    on_gpu,
    regret,
    rival_steps,
    share_oracle,
    side_by_side,
)
from benchmarks.side_by_side import Measured, compare_numbers
from benchmarks.sides import Package, Plain, Worker, Workload, run_script_settings
from tests.conftest import gpu, tiny_flags

TINY = {"batch": 4, "dev_batch": 3, "image_size": 40, "tasks": 5, "classes": 6, "threads": 1}


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    result = Workload(tmp_path_factory.mktemp("workload"), **TINY)
    result.write()
    return result


def test_both_compute_the_same_numbers(workload):
    plain, package = Plain(workload, torch.float64), Package(workload)
    model = package.bilevel.model.double()
    package.bilevel.scheduler.double()
    for name in ("train_batch", "dev_batch"):
        images, labels = getattr(plain, name)
        ours = getattr(package, name)
        exact = (ours.inputs - model.pixel_mean) / model.pixel_std
        torch.testing.assert_close(images, exact, rtol=0, atol=1e-5)
        assert torch.equal(labels, ours.labels)
        setattr(plain, name, (exact, labels))  # plain has them rounded to float32
    compared = compare_numbers(package.numbers(), plain.numbers())
    assert set(compared) == {"neumann", "identity", "loss"}
    for quantity, (cosine, error) in compared.items():
        assert error < 1e-8, quantity
        assert cosine is None or cosine > 1 - 1e-12


def test_a_single_task(workload):
    single = Workload(workload.root, **{**TINY, "tasks": 1})
    losses = [side(single).lower().item() for side in (Plain, Package)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_both_sides_have_the_precision(workload):
    """In bfloat16 both are off by its rounding; the control in float64 is not."""
    bf16 = dataclasses.replace(workload, precision="bf16")
    exact, *losses = (
        Plain(workload, torch.float64).lower().item(),
        Plain(bf16).lower().item(),
        Package(bf16).lower().item(),
    )
    assert all(1e-6 < abs(loss - exact) / exact < 2e-2 for loss in losses)
    assert Plain(bf16, torch.float64).lower().item() == exact


def test_a_wrong_hypergradient_is_noticed(capsys):
    numbers = {"neumann": {"a": np.ones(3)}, "identity": {"a": np.ones(3)}, "loss": 2.0}
    assert side_by_side.print_verdict(compare_numbers(numbers, numbers)) == 0
    wrong = {**numbers, "neumann": {"a": np.array([1.0, 1.0, 1.3])}}
    assert side_by_side.print_verdict(compare_numbers(wrong, numbers)) == 1
    assert "disagree" in capsys.readouterr().out


def run_script(monkeypatch, *flags):
    """The exit code of the script on the tiny workload."""
    argv = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["side_by_side.py", *argv, "--repeats", "1", *flags])
    return side_by_side.main()


def test_the_script_prints_its_tables(monkeypatch, capfd):
    assert run_script(monkeypatch, "--only", "exactness,data,lower,identity,floor") == 0
    text = capfd.readouterr().out
    assert "- process settings, of both: 1 threads; `" in text
    assert "The two agree up to rounding." in text
    assert "image cache" not in text  # what the package says goes to stderr
    tables = read_tables(text)
    assert list(tables) == ["Exactness", "Time", "Arithmetic floor"]
    time = tables["Time"]
    plain, package, ratio = (float(cell) for cell in time["lower step"])
    assert ratio == pytest.approx(plain / package, rel=0.02)
    assert {"data, one batch", "20 lower + 1 upper (identity), computed"} < time.keys()
    title = "upper step, identity"
    floor, *fractions = tables["Arithmetic floor"][title][1:]
    for seconds, fraction in zip(time[title], fractions, strict=False):
        assert float(fraction) == pytest.approx(float(seconds) / float(floor), rel=0.02)


def test_own_settings(workload, monkeypatch, capsys):
    """Each side's process starts with its own settings; those of this process stay."""
    settings = run_script_settings()
    assert settings.keys() == {
        *("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "OMP_WAIT_POLICY")
    }
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    own = dataclasses.replace(workload, own_settings=True)
    found = {}
    for kind in (Plain, Package):
        with Worker(kind, own) as worker:
            worker.wait()
            lines = Path(f"/proc/{worker.process.pid}/environ").read_text().split("\0")
        variables = dict(line.split("=", 1) for line in lines if "=" in line)
        found[kind] = {name: variables[name] for name in settings if name in variables}
    assert found == {Plain: {}, Package: settings}
    assert os.environ["MALLOC_MMAP_MAX_"] == "7" and "MALLOC_TOP_PAD_" not in os.environ
    side_by_side.print_head(own)
    assert "MALLOC_MMAP_MAX_=0" in capsys.readouterr().out


def read_tables(text):
    """{heading up to its colon: {first cell: the other cells}}."""
    tables = {}
    for line in text.splitlines():
        if line.startswith("### "):
            rows = tables[line[4:].partition(":")[0]] = {}
        elif line.startswith("| ") and not line.startswith("| ---"):
            first, *others = (cell.strip() for cell in line[1:-1].split("|"))
            rows[first] = others
    return tables


def measured(plain, package, products=None):
    seconds = {"plain": plain, "package": package}
    sizes = {"plain": 2**30, "package": 2**29}
    return Measured(seconds, sizes, sizes, products)


def test_computed_rows(capsys):
    results = {
        "data": measured([0.4, 0.4, 0.6], [0.1, 0.1, 0.1]),
        "lower": measured([4.0, 5.0, 9.0], [2.0, 2.0, 3.0]),
        "neumann": measured([90.0, 88.0, 92.0], [30.0, 30.0, 29.0], 3),
        "identity": measured([20.0], [6.0], 0),
    }
    side_by_side.print_times(results, Workload(None))
    time = read_tables(capsys.readouterr().out)["Time"]
    assert time["lower step"] == ["5 (4 to 9)", "2 (2 to 3)", "2.50"]
    assert time["20 lower + 1 upper (neumann), computed"] == ["190", "70", "2.71"]
    # Plain with the first solver, the package with the second.
    assert time["upper step (neumann; identity), computed"] == ["90", "6", "15.00"]
    assert time["20 lower + 1 upper (neumann; identity), computed"] == ["190", "46", "4.13"]
    # 5,794 / 64 / 20 = 4.527 rounds of 20 lower steps, an upper step and 21 + 50 / 64 batches.
    epoch = time["epoch of 5,794 images (neumann), computed"]
    assert epoch == ["899", "327", "2.75"]


def test_floor(capsys):
    names = ("contiguous", "channels-last")
    convolutions = {(64, names[0]): 9.0, (50, names[0]): 9.0, (64, names[1]): 1.0}
    convolutions[50, names[1]] = 0.8
    results = {"cg": measured([], [66.8], 10)}
    del results["cg"].seconds["plain"]
    side_by_side.print_floor(convolutions, results, Workload(None))
    floor = read_tables(capsys.readouterr().out)["Arithmetic floor"]
    assert [floor[name][1] for name in ("lower step", "upper step, neumann, J = 3")] == [
        "3",
        "24.4",
    ]
    assert floor["upper step, identity"][1] == "5.4"
    assert floor["upper step, cg"][1:] == ["66.4", "", "1.01"]


def test_memory(capsys):
    side_by_side.print_memory({"lower": measured([], []), "neumann": measured([], [], 3)}, "cpu")
    memory = read_tables(capsys.readouterr().out)["Memory"]
    assert memory["before the first step"] == ["1.00", "0.50", ""]
    assert memory["upper step, neumann, J = 3"] == ["1.00", "0.50", "0.50"]


def test_growth_with_tasks(capsys):
    by_tasks = {1: measured([1.0], [1.0]), 2000: measured([4.0], [1.1])}
    side_by_side.print_tasks(by_tasks)
    rows = read_tables(capsys.readouterr().out)["Lower step against the number of tasks"]
    assert rows["2,000"] == ["4", "1.1", "3.64", "4.00", "1.10"]


def test_arguments():
    args = side_by_side.parse_arguments(["--only", "lower,floor"])
    assert args.parts == ["lower", "floor"]
    args = side_by_side.parse_arguments(["--package_flags=--aux_weight 0.5"])
    assert (args.package_flags, args.precision) == (["--aux_weight", "0.5"], "tf32")
    for wrong in (
        ["--only", "lowre"],
        ["--precision", "fp16"],
        ["--package_flags=--no_such_flag 1"],
        ["--batch", "1"],
    ):
        with pytest.raises(SystemExit):
            side_by_side.parse_arguments(wrong)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    assert run_script(monkeypatch, "--device", "cuda") == 0
    assert capsys.readouterr().out.startswith("Skipped: ")


@gpu
def test_on_a_gpu(monkeypatch, capfd):
    parts = "exactness,data,lower,memory,floor"
    assert run_script(monkeypatch, "--device", "cuda", "--precision", "fp32", "--only", parts) == 0
    assert "memory of tensors on the GPU" in capfd.readouterr().out


# --------------------------------------------------------------------------------------------------
# on_gpu.py
# --------------------------------------------------------------------------------------------------


def test_the_share_of_time_in_which_a_device_is_busy():
    """Kernels of several streams may overlap, or lie within one another."""
    assert on_gpu.covered([(0, 2), (1, 3), (6, 10), (7, 8)]) == pytest.approx(7 / 10)
    assert on_gpu.covered([(5, 6)]) == 1.0


def test_data_of_cubs_proportions(tmp_path):
    split = on_gpu.cub_shaped(tmp_path, images=300, tasks=4)
    sizes = {name: len(places) for name, places in split.indices.items()}
    classes = split.target.classes
    assert sizes["full_train"] == 152 == sizes["rest_train"] + sizes["dev"]  # 5,994 of 11,788
    assert sizes["full_train"] + sizes["valid"] + sizes["test"] == 300
    assert sorted(split.labels[split.indices["dev"], 0]) == list(range(classes))
    assert split.labels.shape == (300, 4)
    assert len(set(split.paths)) == 300
    assert all(split.image_path(position).exists() for position in (0, 299))


def test_without_a_gpu_nothing_is_measured(capsys):
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main([])
    assert stopped.value.code == 2
    assert "there is no CUDA device here: nothing was measured" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Beside another revision
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", beside_revision.METHODS)
def test_the_commands_beside_a_revision_are_known_here(size):
    args = beside_revision.parse_arguments(["--image_size", str(size), "--batch", "3"])
    for method, flags in beside_revision.METHODS[size].items():
        config = parse(beside_revision.flags(args, method))
        assert config.image_size == size and config.threads == 1
        assert f"--method {config.method}" in flags
        assert size == 16 or config.train_batch_size == config.dev_batch_size == 3


def test_a_revision_is_unpacked(tmp_path):
    try:
        name = beside_revision.unpack("HEAD", tmp_path)
    except UserError as error:
        pytest.skip(f"no history here: {error}")
    assert len(name) >= 7
    assert (tmp_path / "train_bilevel.py").is_file()
    for wrong in ("no_such_revision", "--help", "HEAD:auxilearn"):
        with pytest.raises(UserError, match=f"--revision {wrong}: "):
            beside_revision.unpack(wrong, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_tree_keeps_its_times(tmp_path, monkeypatch, capsys):
    """Medians over the rows but for the first, then over the turns, and their ratio."""

    def script(tree, name, words):
        if name == "train_bilevel.py":
            record, scale = Path(words[words.index("--record_dir") + 1]), scales[tree.name].pop()
            rows = [
                {"kind": "step", "lower_seconds": 9 * scale, "data_seconds": 9},
                *({"kind": "step", "lower_seconds": s * scale, "data_seconds": 2} for s in (1, 5)),
                *({"kind": "upper", "upper_seconds": s * scale} for s in (9, 4)),
            ]
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            (record / "metrics.jsonl").write_text(text)
            (record / "summary.json").write_text(json.dumps({"seconds": 7 * scale}))

    monkeypatch.setattr(beside_revision.Tree, "_script", script)
    monkeypatch.setattr(beside_revision, "cpu_seconds", itertools.count().__next__)
    args = beside_revision.parse_arguments(["--image_size", "16"])
    trees = [beside_revision.Tree(name, tmp_path, tmp_path, args) for name in ("old", "new")]
    scales = {"old": [4, 2, 3, 0], "new": [1, 2, 1, 0]}
    for tree in trees:
        tree.turn("common", timed=False)
        assert not tree.seconds
        for _ in range(3):
            tree.turn("common")
    beside_revision.print_table(trees)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["seconds", "old", "new", "old / new"]
    cells = {row[0]: row[1:] for row in rows[2:]}
    assert cells["common, lower step"] == ["9", "3", "3.00"]
    assert cells["common, data step"] == ["2", "2", "1.00"]
    assert cells["common, upper step"] == ["12", "4", "3.00"]
    assert cells["common, run"] == ["21", "7", "3.00"]
    assert cells["common, run and imports, CPU time"] == ["1", "1", "1.00"]
    assert "common, run and imports" in cells


def test_a_script_that_fails_is_one_line(tmp_path):
    (tmp_path / "data_preprocess.py").write_text("raise SystemExit('error: no disk')")
    args = beside_revision.parse_arguments([])
    with pytest.raises(RunError, match=r"data_preprocess\.py of old failed \(1\): error: no disk$"):
        beside_revision.Tree("old", tmp_path, tmp_path, args)


def test_steps_of_rivals_are_timed(monkeypatch, capsys):
    """After the check of the products against a gradient per sample and task."""
    flags = ["--backbone", "convnet", "--image_size", "16", "--batch", "4", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["rival_steps.py", *flags, "--tasks", "1", "2"])
    rival_steps.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["tasks", "--:", "1", "2"]


@pytest.mark.parametrize(("metric", "sign"), [(ACCURACY, 1), (RMSE(), -1)])
def test_regret_is_against_the_equal_weights_that_validation_chooses(metric, sign):
    args = SimpleNamespace(aux_weights=[0.1, 1.0], methods=["joint"], seeds=[1, 2])
    valid = {("common", 0.1): 4, ("common", 1.0): 6, ("common_dev", 0.1): 8, ("common_dev", 1.0): 7}
    valid["joint", 1.0] = 100

    def results(variant):
        value, test = valid[variant], {("common_dev", 0.1): 5, ("joint", 1.0): 3}.get(variant, 9)
        return [
            SimpleNamespace(valid_accuracy=sign * value + d, test_accuracy=sign * test + d)
            for d in (-1, 1)
        ]

    found = {variant: results(variant) for variant in valid}
    best, reached, methods = regret.regrets(args, found, metric)
    assert (best, reached) == (("common_dev", 0.1), sign * 5)
    assert methods == [(sign * 3, [2, 2], 2)]


@pytest.mark.parametrize(("metric", "sign"), [(ACCURACY, 1), (RMSE(), -1)])
def test_regret_chooses_and_tests_on_different_seeds(metric, sign):
    """Two equal weightings, each lucky on one seed: on the same seeds luck counts as tuning."""
    args = SimpleNamespace(aux_weights=[0.1, 1.0], methods=["joint"], seeds=[1, 2, 3])
    by_seed = {  # validation and test alike
        ("common", 0.1): [9, 5, 5],
        ("common", 1.0): [4, 8, 5],
        ("common_dev", 0.1): [1, 1, 1],
        ("common_dev", 1.0): [2, 2, 2],
        ("joint", 1.0): [6, 6, 7],
    }
    found = {
        variant: [
            SimpleNamespace(valid_accuracy=sign * value, test_accuracy=sign * value)
            for value in values
        ]
        for variant, values in by_seed.items()
    }
    best, reached, ((value, differences, same),) = regret.regrets(args, found, metric)
    assert best == ("common", 0.1) and reached == pytest.approx(sign * 19 / 3)
    assert value == pytest.approx(sign * 19 / 3) and same == pytest.approx(0)
    # Without seed 1, (8 + 5) / 2 beats 5; without seed 2, 7 beats 4.5; without 3, 7 beats 6.
    assert differences == pytest.approx([4 - 6, 5 - 6, 5 - 7])


@pytest.fixture
def regret_lines(tiny_split, tmp_path, monkeypatch, capfd):
    """Lines that regret.py prints for ``joint`` on a tiny data set, with these ``limits``."""

    def lines(**limits):
        flags = f"--split_dir {tiny_split} --sweep_dir {tmp_path} --epochs 1 --rates 1 --seeds 1 2"
        flags += " --aux_weights 0.1 --settings supervised --methods joint --jobs 2"
        run_flags = tiny_flags(**limits)
        del run_flags[run_flags.index("--epochs") : run_flags.index("--epochs") + 2]
        argv = ["regret.py", *flags.split(), f"--run_flags={' '.join(run_flags)}"]
        monkeypatch.setattr("sys.argv", argv)
        regret.main()
        return capfd.readouterr().out.splitlines()

    return lines


def test_regret_of_a_data_set(regret_lines):
    lines = regret_lines(max_steps=2)
    assert lines[0].split(" | ")[-3:] == ["joint", "regret of joint", "joint, same seeds |"]
    cells = lines[2].strip("| ").split(" | ")
    assert cells[:3] == ["1", "1", "supervised"]
    assert re.fullmatch(r"-?\d+\.\d ± \d+\.\d", cells[6])
    assert float(cells[7]) == pytest.approx(float(cells[4]) - float(cells[5]), abs=0.11)
    assert lines[6].startswith(f"| joint | 1 | {cells[6]} | {cells[6].split()[0]} | {cells[7]} |")
    assert lines[8].startswith("n = 2 seeds a cell")
    assert lines[12].startswith("| 1 | 1 | supervised | joint | ") and len(lines) == 13


def test_regret_needs_another_seed_to_choose_on(monkeypatch):
    monkeypatch.setattr("sys.argv", ["regret.py", "--split_dir", "none", "--seeds", "3", "3"])
    with pytest.raises(UserError, match="^--seeds: give two seeds or more, all different"):
        regret.main()


def test_regret_of_runs_without_an_upper_step(regret_lines):
    """They have a regret, and no share to follow."""
    lines = regret_lines(max_steps=1, hyperstep=5)
    assert lines[6].startswith("| joint | 1 | ")
    assert lines[10].startswith("| epochs | rate | setting | target's share of |")
    assert len(lines) == 12  # no row


def test_the_target_s_share_over_a_run(tmp_path):
    """Of eight upper steps: the first, third, fifth, seventh and last."""
    history = [{"kind": "tasks", "names": ["target", "other"]}]
    for step in range(1, 9):
        weights = [step / 10, 1 - step / 10] if step > 1 else [None, 2.0]
        history.append({"kind": "schedule", "step": 5 * step, "mean_weight": weights})
    metrics = [{"kind": "step", "step": 1}, {"kind": "upper", "step": 5, "upper_seconds": 0.25}]
    for name, rows in (("schedule.jsonl", history), ("metrics.jsonl", metrics)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert regret.shares_of(tmp_path) == pytest.approx([0.0, 0.3, 0.5, 0.7, 0.8])
    assert regret.upper_seconds(tmp_path) == [0.25]


@pytest.mark.parametrize(("metric", "sign"), [(ACCURACY, 1), (RMSE(), -1)])
def test_the_oracle_chooses_by_test_and_validation_beside_it(metric, sign):
    test = {(0.1, 0.1): 4, (0.1, 0.9): 8, (0.9, 0.1): 5, (0.9, 0.9): 6, None: 7}
    valid = {(0.1, 0.1): 1, (0.1, 0.9): 1, (0.9, 0.1): 3, (0.9, 0.9): 2, None: 9}
    results = {
        pair: [
            SimpleNamespace(test_accuracy=sign * test[pair] + d, valid_accuracy=sign * valid[pair])
            for d in (-1, 1)
        ]
        for pair in test
    }
    expected = [((0.1, 0.9), 8), ((0.9, 0.9), 6), ((0.9, 0.1), 5), (None, 7)]
    assert share_oracle.compared(results, metric) == [(p, sign * value) for p, value in expected]


def test_the_target_has_one_share_and_then_another():
    load_plugin(share_oracle.PLUGIN)
    problem = Problem(tasks=3, feature_dim=2, samples=4, classes=(2, 2, 2))
    scheduler = METHODS["two_shares"].build(problem, first=0.75, second=0.25, switch=1.5)
    losses = torch.tensor([[8.0, 1.0, 3.0]] * 2)
    seen = TaskLosses(losses, mask=torch.tensor([[True, True, False]] * 2))
    found = [scheduler.scheduled_loss(losses, seen).item() for _ in range(4)]  # 1.5 passes: 6
    assert found == [0.75 * 8 + 0.25 * 0.5] * 3 + [0.25 * 8 + 0.75 * 0.5]


def test_the_oracle_of_a_data_set(tiny_split, tmp_path, monkeypatch, capfd):
    flags = f"--split_dir {tiny_split} --sweep_dir {tmp_path} --epochs 2 --seeds 1 2 --shares .1 .9"
    run_flags = tiny_flags(max_steps=2)
    del run_flags[run_flags.index("--epochs") : run_flags.index("--epochs") + 2]
    flags += " --settings supervised --jobs 2"
    argv = ["share_oracle.py", *flags.split(), f"--run_flags={' '.join(run_flags)}"]
    monkeypatch.setattr("sys.argv", argv)
    share_oracle.main()
    lines = capfd.readouterr().out.splitlines()
    cells = lines[2].strip("| ").split(" | ")
    assert cells[:2] == ["2", "supervised"]
    found = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    assert len(found) == 10
    stable = [run["test_accuracy"] for run in found if run["method"] == "joint_stable"]
    assert len(stable) == 2
    assert float(cells[5]) == pytest.approx(100 * sum(stable) / 2, abs=0.051)
