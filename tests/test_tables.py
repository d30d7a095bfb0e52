"""The tables' sweep: jobs and their states, interruption, failure, tuning, the command line."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import reproduce_tables
import train_bilevel
from auxilearn.data.split import load_split
from auxilearn.errors import UserError
from auxilearn.files import write_json
from auxilearn.methods import METHODS, load_plugin
from auxilearn.run import command_line
from auxilearn.run.command_line import parse
from auxilearn.run.config import with_method_defaults
from auxilearn.tables import local, statistics, sweep
from auxilearn.tables.local import Outcome
from auxilearn.tables.protocol import (
    ABLATION,
    BASELINE,
    DATASETS,
    SCHEDULE,
    SETTINGS,
    TABLES,
    TARGET_ONLY,
    candidates,
    rows,
    tuned_as,
    usual_rows,
)
from auxilearn.tables.sweep import RunFlags
from auxilearn.tables.tuning import Hyperparameters, trials
from tests.conftest import ROOT, Run, assert_one_error_line, assert_same_run, tiny_flags

SHORT = shlex.join(tiny_flags(epochs=1, threads=1))
BUDGET = 6
NOTHING = RunFlags.read([])
BUILT_IN = list(rows())


@pytest.fixture
def places(tiny_split, tmp_path):
    """Words of a command line that runs tiny runs in a folder of their own."""
    data = ["--data_root", str(tiny_split.parent / "data"), "--split_dir", str(tiny_split)]
    return [*data, "--sweep_dir", str(tmp_path / "sweeps"), "--run_flags", SHORT, "--jobs", "2"]


@pytest.fixture
def fingerprint(tiny_split):
    return load_split(str(tiny_split)).fingerprint


@pytest.fixture
def job_of(tiny_split, tmp_path):
    def make(row="single", setting="supervised", seed=1, chosen=None, flags=(), plugin=None):
        where = sweep.Places(tiny_split, None, tmp_path / "runs", tmp_path / "logs")
        flags = RunFlags.read([*tiny_flags(epochs=1, threads=1), *flags])
        return sweep.make_job(where, "cub", row, setting, seed, chosen or {}, flags, plugin)

    return make


@pytest.fixture
def plugin(tmp_path):
    """A file that registers two methods, which are gone after the test."""
    before = dict(METHODS)
    file = tmp_path / "own.py"
    file.write_text(
        f"# {tmp_path}: the same content is run once\n"
        "from auxilearn import register\n"
        "from auxilearn.hypernet import Identity, MonoJoint\n"
        "@register('mine', title='My schedule', learned='upper', tune=({'width': 3, 'aux_weight': "
        "'near'}, {'width': 4}, {'upper_lr': 0.1}, {'sizes': (1, 2)}))\n"
        "def build(problem, width=2, sizes=(5,)):\n"
        "    return MonoJoint(0, problem.tasks, problem.feature_dim, K=problem.tasks)\n"
        "@register('plain', baseline=True)\n"
        "def plain(problem):\n"
        "    return Identity(0, problem.tasks)\n"
    )
    yield file
    for name in METHODS.keys() - before.keys():
        del METHODS[name]


@pytest.fixture
def no_estimate(monkeypatch):
    """A dry run prints the commands alone: its estimate trains, and has tests of its own."""
    monkeypatch.setattr(reproduce_tables, "duration", lambda *args: [])


def train_as(job):
    """What a launcher does, in this process."""
    try:
        train_bilevel.train(job.config)
    except UserError:
        return Outcome(2)
    return Outcome(0)


# --------------------------------------------------------------------------------------------------
# Protocol and jobs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_row_has_the_same_number_of_candidates(dataset, table):
    unit = DATASETS[dataset].settings["main_lr"]
    for row in BUILT_IN:
        found = candidates(table, tuned_as(row), unit)
        assert len({json.dumps(c) for c in found}) == len(found) == BUDGET
        assert unit in [c["main_lr"] for c in found]


def test_candidates_are_those_that_the_committed_hyperparameters_were_chosen_from():
    content = json.loads((ROOT / "results/hyperparameters.json").read_text())
    assert set(content) == {"mini", "digits"}
    for dataset, entry in content.items():
        for table, found in entry["tables"].items():
            assert found["setting"] == TABLES[table].tuned_on
            for row, of_row in found["rows"].items():
                tried = [dict(c) for c in of_row["candidates"]]
                for candidate in tried:
                    del candidate["valid_accuracy"]
                expected = candidates(table, row, DATASETS[dataset].settings["main_lr"])
                assert sorted(map(str, map(sorted, (c.items() for c in tried)))) == sorted(
                    map(str, map(sorted, (c.items() for c in expected)))
                ), (dataset, table, row)


@pytest.mark.parametrize("table", TABLES)
def test_the_stable_form_and_its_baseline_without_a_schedule_have_the_same_candidates(table):
    assert candidates(table, "joint_stable", 2e-3) == candidates(table, "common_dev", 2e-3)


def test_the_tables_have_the_papers_settings():
    rates = [SETTINGS[name].rate for name in TABLES["table4"].settings]
    assert rates == [0.2, 0.4, 0.6]
    assert TABLES["table3"].settings == ("semi",)
    assert all(table.tuned_on in table.settings for table in TABLES.values())
    factors = ("task", "feature", "loss")
    ablations = [r.settings["options"]["factors"] for r in rows().values() if r.full == "joint"]
    assert {frozenset(a) for a in ablations} == {
        *(frozenset([f]) for f in factors),
        *(frozenset(factors) - {f} for f in factors),
    }


def test_every_method_is_a_row_of_its_kind():
    kinds = {name: row.kind for name, row in rows().items() if name in METHODS}
    assert set(kinds) == set(METHODS)
    assert [name for name, kind in kinds.items() if kind == TARGET_ONLY] == ["single"]
    assert {name for name, kind in kinds.items() if kind == SCHEDULE} == {
        *("naive", "joint", "joint_stable"),
    }
    assert {kinds[name] for name in ("common", "common_dev", "gcs", "task")} == {BASELINE}


def test_ablations_of_the_stable_form_change_one_thing_each(job_of):
    flags = ["--epochs", "20", "--dev_epochs", "10", "--hyperstep", "5"]
    whole = vars(with_method_defaults(job_of("joint_stable", flags=flags).config))
    changed = {}
    for name, row in rows().items():
        if row.full == "joint_stable":
            one = vars(with_method_defaults(job_of(name, flags=flags).config))
            assert row.kind == ABLATION
            assert name not in usual_rows()
            different = {k: v for k, v in one.items() if v != whole[k] and k != "exp_name"}
            options = different.pop("options", whole["options"])
            different |= {k: v for k, v in options.items() if v != whole["options"][k]}
            changed[name.removeprefix("stable_")] = different
    assert changed == {
        "equal": {"warmup_epochs": 1000000, "target_share": "equal"},
        "equal_share": {"target_share": "equal"},
        "start_share": {"target_share": "start"},
        "tasks_only": {"factors": ("task",)},
        "gradient": {"precondition": "none"},
        "neumann": {"solver": "neumann"},
        "sgd": {"upper_optimizer": "sgd", "max_grad_norm": 10, "upper_lr": 0.01},
        "untempered": {"tempered": False},
        "one_batch": {"n_meta_train_loss_accum": 1},
        "held_out": {"hold_out_dev": True},
        "no_fine_tuning": {"dev_epochs": 0},
        "slow_upper": {"upper_lr": 0.01},
        "fast_upper": {"upper_lr": 0.1},
        "often": {"hyperstep": 2},
        "rarely": {"hyperstep": 20},
    }
    assert {name for name, row in rows().items() if row.full != "joint_stable"} == set(usual_rows())


@pytest.mark.parametrize("row", BUILT_IN)
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_job_is_a_command_that_makes_its_configuration(dataset, row, tmp_path):
    where = sweep.Places(tmp_path / "split", None, tmp_path / "runs", tmp_path / "logs")
    job = sweep.make_job(where, dataset, row, "corrupted_0.4", 3, {}, NOTHING)
    assert parse(job.argv) == job.config
    words = shlex.split(job.command)
    assert parse(words[2:]) == job.config
    assert job.config.seed == 3
    assert (job.config.corrupted, job.config.corrupted_rate) == (True, 0.4)
    assert job.config.resume
    assert job.name.endswith(job.identity)


def test_what_is_nearer_to_the_run_wins(job_of):
    """The data set's settings, the row's on it, --run_flags, tuned, then the row's own."""
    assert job_of("naive").config.aux_weight == 0.1
    flags = ["--aux_weight", "0.5", "--upper_lr", "7"]
    assert job_of("naive", flags=flags).config.aux_weight == 0.5
    assert job_of("naive", flags=flags, chosen={"aux_weight": 3.0}).config.aux_weight == 3.0
    assert job_of("stable_sgd", flags=flags).config.upper_lr == 0.01


def test_options_go_to_the_methods_that_have_them(job_of):
    flags = ["--option", "target_share=start", "hidden_sizes=3,4", "--w_decay", "0.1"]
    assert job_of("joint_stable", flags=flags).config.options == {"target_share": "start"}
    assert job_of("task", flags=flags).config.options == {"hidden_sizes": (3, 4)}
    assert job_of("common", flags=flags).config.options == {}
    assert job_of("stable_equal_share", flags=flags).config.options == {"target_share": "equal"}
    assert job_of("common", flags=flags).config.w_decay == 0.1
    chosen = {"hidden_sizes": [5, 6], "main_lr": 0.5}  # as JSON holds a tuple
    assert job_of("task", chosen=chosen).config.options == {"hidden_sizes": (5, 6)}
    with pytest.raises(UserError, match="no method has the option nothing"):
        RunFlags.read(["--option", "nothing=1"])
    with pytest.raises(UserError, match="target_share must be one of .*, not 'much'"):
        job_of("joint_stable", flags=["--option", "target_share=much"])
    with pytest.raises(UserError, match="aux_lr: neither a setting nor an option of joint"):
        job_of("joint", chosen={"aux_lr": 0.1})


def test_a_default_that_is_given_names_the_same_run(job_of):
    """Nor does a setting to come, whose default is what was done before."""
    plain = job_of("joint_stable").identity
    flags = ["--precondition", "adam", "--precision", "tf32", "--option", "target_share=learned"]
    assert job_of("joint_stable", flags=flags).identity == plain
    assert job_of("joint_stable", flags=["--precondition", "none"]).identity != plain
    other = job_of("joint_stable", flags=["--option", "target_share=equal"])
    assert other.identity != plain
    assert other.identity == job_of("stable_equal_share").identity  # rows alike share their runs


def test_the_identity_depends_on_what_determines_the_run_alone(job_of):
    job = job_of()
    flags = [*tiny_flags(epochs=1, threads=1), "--num_workers", "3", "--cache_dir", "elsewhere"]
    same = sweep.make_job(
        sweep.Places(Path("a"), Path("b"), Path("c"), Path("d")),
        *("cub", "single", "supervised", 1, {}, RunFlags.read(flags)),
    )
    assert same.identity == job.identity
    others = [
        job_of("common"),
        job_of(setting="corrupted_0.2"),
        job_of(seed=2),
        job_of(chosen={"main_lr": 0.5}),
        job_of(flags=["--image_size", "18"]),
    ]
    assert len({job.identity, *(other.identity for other in others)}) == 6
    weight = {"aux_weight": 0.3}
    assert job_of("common", chosen=weight).name == job_of("common_tuned", chosen=weight).name


def test_the_states_of_a_job(job_of, fingerprint):
    job = job_of()

    def state():
        return sweep.state_of(job, fingerprint)

    assert state() == ("to do", None)
    job.directory.mkdir(parents=True)
    assert state() == ("incomplete", None)
    job.failure.parent.mkdir()
    job.failure.write_text("exit code 1\n")
    assert state() == ("failed", None)
    job.failure.unlink()
    assert train_as(job) == Outcome(0)
    found, summary = state()
    assert found == "done"
    assert summary == Run(job.directory).summary
    of_cell = sweep.Run("table2", "single", "supervised", {}, job)
    result = sweep.result_of(of_cell, fingerprint)
    assert (result.test_accuracy, result.seed) == (summary["test_accuracy"], 1)
    assert result.command == job.command

    # Another configuration, other data, unreadable files.
    with pytest.raises(UserError, match="another configuration: the data or its split"):
        sweep.state_of(job, fingerprint="other")
    recorded = Run(job.directory).read("config.json")
    changed = {**recorded, "config": {**recorded["config"], "main_lr": 0.5}}
    write_json(job.directory / "config.json", changed)
    with pytest.raises(UserError, match=r"main_lr was 0\.5 and is 0\.0001"):
        state()
    write_json(job.directory / "config.json", ["nothing"])
    with pytest.raises(UserError, match=r"config\.json: not written by a run"):
        state()
    write_json(job.directory / "config.json", recorded)
    (job.directory / "summary.json").write_text('{"test_acc')
    with pytest.raises(UserError, match=r"summary\.json is not valid JSON"):
        state()


def test_a_run_that_another_process_writes_is_running(job_of, fingerprint):
    job = job_of()
    job.directory.mkdir(parents=True)
    code = (
        "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(job.directory / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        assert sweep.state_of(job, fingerprint) == ("running", None)
        process.stdin.close()
        process.wait()
    assert sweep.state_of(job, fingerprint) == ("incomplete", None)


@pytest.mark.parametrize(
    "flags",
    ["--corrupted 1", "--labeled_per_class 5", "--seed 3", "--exp_name x", "--method common"]
    + ["--overwrite 1", "--resume 1", "--record_dir x", "--whether_aux 0"],
)
def test_flags_that_a_table_sets_itself_are_refused(flags):
    with pytest.raises(UserError, match=f"--run_flags: the table itself sets {flags.split()[0]}"):
        RunFlags.read(flags.split())


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def test_a_failing_job_stops_no_other_and_is_tried_again(job_of, fingerprint, capsys):
    good, bad = job_of(), job_of(flags=["--image_size", "18", "--task_num", "99"])
    failed = sweep.run(
        [bad, good, good], lambda jobs: ((job, train_as(job)) for job in jobs), fingerprint
    )
    assert [job for job, _ in failed] == [bad]
    assert sweep.state_of(good, fingerprint)[0] == "done"
    assert sweep.state_of(bad, fingerprint)[0] == "failed"
    said = capsys.readouterr().out
    assert "2 runs: 2 to do" in said  # the job that came twice is one
    assert "1 of 2" in said and "2 of 2" in said
    launched = []

    def launch(jobs):
        launched.extend(jobs)
        for job in jobs:
            with open(job.log, "a") as log:
                log.write("error: of this time\n")
            yield job, Outcome(143)

    bad.log.write_text("error: of long ago\n")
    failed = sweep.run([bad, good], launch, fingerprint)
    assert launched == [bad]
    assert [reason for _, reason in failed] == ["exit code 143: of this time"]
    assert sweep.state_of(bad, fingerprint)[0] == "to do"  # who was asked to end has not failed


def test_a_full_disk_is_one_line(places, command, monkeypatch):
    def launch(*_):
        raise OSError(28, "No space left on device", "/somewhere")
        yield

    monkeypatch.setattr(local, "launch", launch)
    code, _, err = command(reproduce_tables.main, "table2", *places, "--methods", "single")
    assert code == 1
    assert_one_error_line(err, "/somewhere: No space left on device; finished runs are kept")


def test_local_runs_are_those_of_their_command_lines(job_of, tmp_path):
    jobs = [job_of("joint", seed=1), job_of("gcs", seed=2), job_of(flags=["--task_num", "99"])]
    for job in jobs:
        job.logs.mkdir(exist_ok=True)
    outcomes = {j.name: o.code for j, o in local.launch(jobs, 2, train_bilevel.main)}
    assert outcomes == {jobs[0].name: 0, jobs[1].name: 0, jobs[2].name: 2}
    assert "error: --task_num 99 is more than the data has" in jobs[2].log.read_text()
    for job in jobs[:2]:
        of_sweep = job.directory.rename(tmp_path / job.name)
        subprocess.run(job.command, shell=True, check=True, capture_output=True)
        assert_same_run(Run(of_sweep), Run(job.directory))
        assert Run(of_sweep).read("config.json")["environment"]["command"][1:] == job.argv


def table_of(folder):
    """The table's cells, and its runs without what names the folder."""
    with open(folder / "table4.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    with open(folder / "table4_runs.csv", newline="") as file:
        runs = [
            (r["row"], r["seed"], r["test_accuracy"], r["identity"]) for r in csv.DictReader(file)
        ]
    return cells, runs


def test_killed_half_way_and_continued_it_is_the_same_table(places, tmp_path, command):
    wanted = ["table4", *places, "--methods", "single", "joint", "--seeds", "1", "2"]
    code, out, err = command(reproduce_tables.main, *wanted)
    assert code == 0, err
    undisturbed = table_of(tmp_path / "sweeps/cub/tables")
    assert len(undisturbed[1]) == 2 * 3 * 2
    assert "12 runs: 12 to do" in out

    sweeps = tmp_path / "again"
    wanted[wanted.index("--sweep_dir") + 1] = str(sweeps)
    line = [sys.executable, str(ROOT / "reproduce_tables.py"), *wanted]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 120
        while len(list(sweeps.glob("cub/bird_record/*/*/summary.json"))) < 4:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    code, out, err = command(reproduce_tables.main, *wanted)
    assert code == 0, err
    assert "12 runs: " in out and " done" in out.splitlines()[0]
    assert table_of(sweeps / "cub/tables") == undisturbed
    # A finished table runs nothing.
    code, out, err = command(reproduce_tables.main, *wanted)
    assert out.splitlines()[0] == "12 runs: 12 done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_leaves_checkpoints(number, places, tmp_path, command):
    wanted = ["table2", *places, "--methods", "joint", "--seeds", "1"]
    wanted[wanted.index("--run_flags") + 1] = f"{SHORT} --epochs 500 --save_every 100000"
    line = [sys.executable, str(ROOT / "reproduce_tables.py"), *wanted]
    pipe = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(line, **pipe) as process:
        deadline = time.monotonic() + 60
        while not any(
            path.stat().st_size
            for path in tmp_path.glob("sweeps/cub/bird_record/full/*/metrics.jsonl")
        ):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        # A second sweep in the same folder is refused, before it starts anything.
        code, _, err = command(reproduce_tables.main, *wanted)
        assert code == 2
        assert_one_error_line(err, "another sweep is already running in", "wait for it or stop it")
        if number == signal.SIGINT:  # a terminal's Ctrl-C reaches all processes of the group
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else 143)
        assert process.stderr.read().count("\n") == 1
    (run,) = tmp_path.glob("sweeps/cub/bird_record/full/*")
    assert list(run.glob("step-*.pt"))
    assert not (run / "summary.json").exists()
    assert not list(tmp_path.glob("sweeps/cub/logs/*.failed"))


# --------------------------------------------------------------------------------------------------
# Tuning
# --------------------------------------------------------------------------------------------------


def test_the_best_mean_validation_accuracy_is_chosen(tmp_path):
    file = tmp_path / "new/hyperparameters.json"
    a, b, c = {"main_lr": 0.1}, {"main_lr": 0.2}, {"main_lr": 0.3}
    flags = RunFlags.read(["--epochs", "2", "--in_dim", "8"])
    how = ("python reproduce_tables.py tune", [7, 8], flags, "print")
    outcomes = {
        ("table2", "single"): [(a, [0.5, 0.7]), (b, [0.9, None]), (c, [0.7, 0.5])],
        ("table2", "common"): [(a, [None, None])],
    }
    chosen = Hyperparameters(file, "digits").write_choice(outcomes, *how)
    assert chosen == {("table2", "single"): a}  # of equals the first; b has a failed run
    content = json.loads(file.read_text())["digits"]
    assert content["tables"]["table2"]["rows"] == {
        "single": {
            "command": "python reproduce_tables.py tune",
            "chosen": a,
            "candidates": [
                {**a, "valid_accuracy": 0.6},
                {**b, "valid_accuracy": None},
                {**c, "valid_accuracy": 0.6},
            ],
        }
    }
    outcomes = {("table4", "joint"): [(b, [0.5, 0.7])]}
    Hyperparameters(file, "mini").write_choice(outcomes, *how)
    Hyperparameters(file, "digits").write_choice(outcomes, *how)
    found = Hyperparameters(file, "digits")
    same = RunFlags.read(["--feature_dim=8", "--epochs", "2"])  # in other words
    assert found.of("table2", "single", same) == a
    assert found.of("table4", "joint", same) == found.of("table4", "joint_task", same) == b
    assert found.of("table3", "single", same) == {}
    assert Hyperparameters(file, "mini").of("table4", "joint_task", same) == b
    # A flag of the table's runs wins, unless it is one that the tuning was done under.
    assert found.of("table2", "single", RunFlags.read(["--main_lr", "1"])) == {}
    assert found.of("table2", "single", RunFlags.read(["--w_decay", "1"])) == a

    # Another choice is not replaced, and a table says how its own came about.
    found.check_origin([7, 8], same, "print")
    for other in (([9], same, "print"), ([7, 8], NOTHING, "print"), ([7, 8], same, "other")):
        with pytest.raises(UserError, match="give another --hyperparameters"):
            found.check_origin(*other)
    with pytest.raises(UserError, match="--seeds 8: the hyper-parameters"):
        found.check_seeds([1, 8])
    said = found.notes("table4", ["single", "joint", "joint_task"], same, "print")
    assert len(said) == 2
    assert "best of 1 candidates" in said[0] and "on seed 7, 8" in said[0]
    assert said[1].endswith("as in the commands: Single task.")
    said = found.notes("table2", ["single"], NOTHING, "other")
    assert "`--epochs 2 --in_dim 8`, not `none`" in said[1]
    assert said[2] == "They were chosen on other data or another split."


def test_trials_are_a_row_of_equal_budget_each():
    found = trials(["table2", "table4"], ["single", "joint", "joint_task"], 0.04)
    assert {c["main_lr"] for _, row, _, c in found if row == "joint"} == {0.04, 0.1, 0.2}
    assert len(found) == 2 * 2 * BUDGET  # an ablation takes what is chosen for joint
    assert {setting for _, _, setting, _ in found} == {"supervised", "corrupted_0.4"}


def test_hyperparameters_that_cannot_be_read(tmp_path):
    (tmp_path / "h.json").write_text('{"digits": ')
    with pytest.raises(UserError, match=r"h\.json is not valid JSON"):
        Hyperparameters(tmp_path / "h.json", "digits")


def test_tune_writes_what_the_tables_use(places, tmp_path, command, no_estimate):
    file = tmp_path / "h.json"
    shared = [*places, "--hyperparameters", str(file), "--methods", "single"]
    code, out, err = command(reproduce_tables.main, "tune", *shared, "--seeds", "9")
    # Table 3 needs five labelled images per class, which the tiny data set does not have.
    assert code == 1
    assert "6 of 18 runs ended without a result" in err
    assert "--labeled_per_class 5 is more than class" in err
    assert "table3 single: all runs failed" in out
    tuned = json.loads(file.read_text())["cub"]["tables"]
    assert list(tuned) == ["table2", "table4"]
    of_row = tuned["table2"]["rows"]["single"]
    accuracies = [c["valid_accuracy"] for c in of_row["candidates"]]
    assert len(accuracies) == BUDGET
    assert (
        of_row["chosen"]["main_lr"]
        == (of_row["candidates"][accuracies.index(max(accuracies))]["main_lr"])
    )
    code, out, err = command(reproduce_tables.main, "table2", *shared, "--seeds", "1", "--dry_run")
    assert f"--main_lr {of_row['chosen']['main_lr']}" in out or of_row["chosen"]["main_lr"] == 1e-4
    code, out, err = command(reproduce_tables.main, "table2", *shared, "--seeds", "9")
    assert code == 2
    assert_one_error_line(err, "--seeds 9: the hyper-parameters")


# --------------------------------------------------------------------------------------------------
# Methods from outside
# --------------------------------------------------------------------------------------------------


def test_a_method_of_a_plugin_is_a_row_with_candidates(plugin):
    load_plugin(plugin)
    known = rows()
    assert (known["mine"].title, known["mine"].kind) == ("My schedule", SCHEDULE)
    assert (known["plain"].title, known["plain"].kind) == ("plain", BASELINE)
    names = list(known)
    assert names.index("joint_stable") < names.index("mine") < names.index("joint_task")
    assert names.index("task") < names.index("plain") < names.index("naive")
    assert {"mine", "plain"} <= set(usual_rows())
    # 3 learning rates times its own entries, "near" in the table's words.
    found = candidates("table3", "mine", 0.01)
    assert len(found) == 3 * 4
    assert {c["main_lr"] for c in found} == {0.01, 0.025, 0.05}
    assert {c["aux_weight"] for c in found if c.get("width") == 3} == {3.0}
    # Without entries, what has an effect: factors on the auxiliary losses.
    assert [c.get("aux_weight") for c in candidates("table2", "plain", 0.01)] == [1.0, 0.3] * 3


def test_the_plugin_goes_with_the_runs_that_need_it(plugin, job_of):
    digest = load_plugin(plugin)
    own = job_of("mine", plugin=(str(plugin), digest), chosen={"width": 7})
    assert (own.config.plugin, own.plugin) == (str(plugin), digest)
    assert own.config.options == {"width": 7}
    assert f"--plugin {plugin}" in own.command and "--option width=7" in own.command
    assert job_of("mine", plugin=(str(plugin), "changed"), chosen={"width": 7}).name != own.name
    # An edit of the plugin does not make its rivals be trained again.
    rival = job_of("common", plugin=(str(plugin), digest))
    assert (rival.config.plugin, rival.plugin, rival.name) == (None, None, job_of("common").name)


def test_the_example_is_a_row_of_a_table(places, tmp_path, command):
    example = ROOT / "examples" / "weight_per_class.py"
    wanted = ["table2", *places, "--methods", "per_class", "--seeds", "1", "--plugin", example]
    try:
        code, out, err = command(reproduce_tables.main, *wanted)
    finally:
        METHODS.pop("per_class", None)
    assert code == 0, err
    assert "| Weight per class" in out
    with open(tmp_path / "sweeps/cub/tables/table2_runs.csv", newline="") as opened:
        (run,) = csv.DictReader(opened)
    (values,) = Run(run["directory"]).checkpoint["scheduler"].values()
    assert values.shape == (4, 5) and values.abs().max() > 0  # classes x tasks, learned


def test_a_method_of_a_plugin_in_a_table_and_in_tuning(plugin, places, tmp_path, command):
    file = tmp_path / "h.json"
    shared = [*places, "--methods", "common", "mine", "--plugin", plugin, "--hyperparameters", file]
    tune = ["tune", *shared, "--tables", "table2", "--seeds", "9"]
    code, out, err = command(reproduce_tables.main, *tune)
    assert code == 0, err
    assert f"{BUDGET + 12} runs: {BUDGET + 12} to do" in out
    tuned = json.loads(file.read_text())["cub"]["tables"]["table2"]["rows"]
    assert len(tuned["mine"]["candidates"]) == 12
    code, out, err = command(reproduce_tables.main, "table2", *shared, "--seeds", "1", "2")
    assert code == 0, err
    assert "| My schedule" in out
    with open(tmp_path / "sweeps/cub/tables/table2_runs.csv", newline="") as opened:
        runs = list(csv.DictReader(opened))
    mine = [run for run in runs if run["row"] == "mine"]
    assert [run["state"] for run in mine] == ["done"] * 2
    recorded = Run(mine[0]["directory"]).read("config.json")
    assert recorded["plugin"] == load_plugin(plugin)
    width = tuned["mine"]["chosen"].get("width", 2)
    assert recorded["config"]["options"]["width"] == width


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def test_every_cell_is_computed_once(places, command, monkeypatch):
    """One statistics object per table; jobs are made without a parse of command lines."""
    parses, evaluated, compared = [], [], []
    parser, evaluate, compare = (*(command_line._parser, statistics.evaluate, statistics._compare),)
    monkeypatch.setattr(command_line, "_parser", lambda *a: parses.append(1) or parser(*a))
    monkeypatch.setattr(
        reproduce_tables, "evaluate", lambda *a: evaluated.append(a[0]) or evaluate(*a)
    )
    monkeypatch.setattr(statistics, "_compare", lambda *a: compared.append(a[3:]) or compare(*a))
    wanted = ["all", *places, "--methods", "single", "joint", "joint_task", "--seeds", "1", "2"]
    code, _, err = command(reproduce_tables.main, *wanted, "--collect_only")
    assert code == 0, err
    assert len(parses) <= 3  # --run_flags, and the flags that hyper-parameters were tuned under
    assert sorted(evaluated) == ["table2", "table3", "table4"]
    assert len(compared) == len(set(compared)) == 2 * 5  # two tested rows in five settings


def test_some_tables_of_all(places, command, no_estimate):
    wanted = ["all", *places, "--seeds", "1", "--methods", "single", "--dry_run"]
    code, out, _ = command(reproduce_tables.main, *wanted, "--tables", "table3", "table2")
    assert (code, len(out.splitlines())) == (0, 3)
    assert "--labeled_per_class 5" in out and "--corrupted" not in out
    wanted = ["table2", *wanted[1:], "--tables", "table3"]
    code, _, err = command(reproduce_tables.main, *wanted)
    assert code == 2 and "--tables goes with all and tune" in err


def test_some_columns_of_a_table(places, command, no_estimate):
    wanted = ["all", *places, "--seeds", "1", "2", "--methods", "single", "--dry_run", "--settings"]
    code, out, _ = command(reproduce_tables.main, *wanted, "corrupted_0.6", "supervised")
    assert (code, len(out.splitlines())) == (0, 5)
    assert out.count("--corrupted_rate 0.6") == 2 and out.count("--corrupted ") == 2
    code, _, err = command(reproduce_tables.main, "table2", *wanted[1:], "corrupted_0.6", "semi")
    assert code == 2 and "--settings: table2 has no column corrupted_0.6 or semi" in err
    code, _, err = command(reproduce_tables.main, "tune", *wanted[1:], "semi")
    assert code == 2 and "--settings goes with tables" in err


def test_every_command_of_a_dry_run_runs(places, tmp_path, command):
    wanted = ["table2", *places, "--seeds", "1", "--methods", "single", "joint_task"]
    code, out, _ = command(reproduce_tables.main, *wanted, "--dry_run")
    assert code == 0
    assert not (tmp_path / "sweeps").exists()
    lines = out.splitlines()
    assert [line.startswith("#") for line in lines] == 3 * [False] + 3 * [True]
    assert lines[3] == "# 2 runs: 2 to do"
    assert "hours of training in all (2 by a short training of each of 2 kinds here)" in lines[4]
    assert lines[5].endswith(" hours with 2 runs at a time")
    for line in lines[:3]:
        subprocess.run(line, shell=True, check=True, capture_output=True)
    code, out, _ = command(reproduce_tables.main, *wanted)
    assert out.splitlines()[0] == "2 runs: 2 done"


def test_nothing_to_collect(tmp_path, command):
    wanted = ["--dataset", "digits", "--sweep_dir", tmp_path / "new", "--out_dir", tmp_path / "out"]
    code, _, err = command(reproduce_tables.main, "table2", *map(str, wanted), "--collect_only")
    assert code == 2
    assert_one_error_line(err, "is missing, so nothing of this sweep has been run here")
    assert list(tmp_path.iterdir()) == []


def test_what_a_table_says_of_its_runs(places, tmp_path, command):
    wanted = ["table2", *places, "--seeds", "1", "2", "--methods", "single", "common"]
    code, out, _ = command(reproduce_tables.main, *wanted, "--collect_only")
    assert code == 0
    assert "0 of 4 runs are done" in out
    code, out, _ = command(reproduce_tables.main, *wanted)
    assert code == 0
    runs = [Run(path) for path in (tmp_path / "sweeps/cub/bird_record/full").iterdir()]
    with open(tmp_path / "sweeps/cub/tables/table2.csv", newline="") as file:
        means = {row["row"]: float(row["mean"]) for row in csv.DictReader(file)}
    for method in ("single", "common"):
        accuracies = [r.summary["test_accuracy"] for r in runs if r.summary["method"] == method]
        assert means[method] == pytest.approx(100 * sum(accuracies) / 2)
    assert "4 runs on Python" in out
    # These images are not CUB's: neither its name nor the paper's numbers stand there.
    assert "## Table 2: Supervised, data\n\n| method " in out
    assert "paper" not in out
    assert "Supervised, data" in (tmp_path / "sweeps/cub/tables/table2.svg").read_text()
    # A run that was deleted is run again, and it alone.
    gone = runs[0].directory
    shutil.rmtree(gone)
    code, out, _ = command(reproduce_tables.main, *wanted)
    assert out.splitlines()[0] == "4 runs: 3 done, 1 to do" or "1 to do, 3 done" in out
    assert (gone / "summary.json").exists()


def test_a_sweep_continues_from_a_table_on_the_same_processor(
    places, tmp_path, command, monkeypatch
):
    """The folders of the runs are gone; the committed table is there."""
    out_dir = tmp_path / "committed"
    wanted = ["table2", *places, "--methods", "single", "common", "--seeds", "1"]
    wanted += ["--out_dir", str(out_dir)]
    code, first, err = command(reproduce_tables.main, *wanted)
    assert code == 0, err
    file = out_dir / "table2_runs.csv"
    made = file.read_text()
    kept = list(csv.DictReader(made.splitlines()))
    of_run = Run(kept[0]["directory"])
    environment = of_run.read("config.json")["environment"]
    assert kept[0]["processor"] == environment["processor"] != ""
    assert kept[0]["fingerprint"] == of_run.summary["fingerprint"]
    assert float(kept[0]["seconds"]) == of_run.summary["seconds"]
    assert f"2 runs on {kept[0]['environment']}." in first
    assert f", {environment['processor']}, cpu, threads 1, " in kept[0]["environment"]

    def again(*words):
        shutil.rmtree(tmp_path / "sweeps/cub/bird_record", ignore_errors=True)
        return command(reproduce_tables.main, *wanted, *words)

    # Both runs are taken from the table, and the table is the same. A further seed is run.
    code, out, err = again()
    assert out.splitlines()[0] == "2 runs: 2 taken from *_runs.csv of --out_dir", err
    assert file.read_text() == made
    assert out.splitlines()[1:] == first.splitlines()[-len(out.splitlines()[1:]) :]
    code, out, err = again("--seeds", "1", "2")
    assert out.splitlines()[0] == "4 runs: 2 taken from *_runs.csv of --out_dir, 2 to do"
    code, out, _ = command(reproduce_tables.main, *wanted, "--dry_run")
    assert "# 2 runs: 2 taken from" in out
    # A folder that is there counts before the table.
    file.write_text(made.replace(kept[0]["test_accuracy"], "0.125"))
    train_bilevel.train(parse(shlex.split(kept[0]["command"])[2:]))
    code, out, _ = command(reproduce_tables.main, *wanted)
    assert out.splitlines()[0] == "2 runs: 1 done, 1 taken from *_runs.csv of --out_dir"
    assert file.read_text().splitlines()[1].split(",")[4] == kept[0]["test_accuracy"]
    # Other settings, other data, another processor, a file of an earlier version: all are run.
    for text, words in (
        (made, ["--epochs", "2"]),
        (made.replace(kept[0]["fingerprint"], "0123"), []),
        (made.replace(kept[0]["processor"], "Other"), []),
        ("\n".join(",".join(line.split(",")[:6]) for line in made.splitlines()), []),
    ):
        file.write_text(text)
        code, out, err = again(*words)
        assert out.splitlines()[0] == "2 runs: 2 to do", err
    # Without a given --out_dir, the folders alone count.
    words = wanted[: wanted.index("--out_dir")]
    for _ in range(2):
        shutil.rmtree(tmp_path / "sweeps/cub/bird_record")
        assert command(reproduce_tables.main, *words)[1].startswith("2 runs: 2 to do\n")
    # --collect_only runs nothing, so it shows runs of any processor.
    file.write_text(made.replace(kept[0]["processor"], "Other"))
    assert "2 runs on Python" in again("--collect_only")[1]
    file.write_text(made.replace(kept[0]["test_accuracy"], "half"))
    code, _, err = again()
    assert code == 2
    assert_one_error_line(err, file, "is not what a table writes (could not convert")


def test_committed_tables_can_be_read():
    """Also those of versions that recorded no processor."""
    folders = {path.parent for path in (ROOT / "results").rglob("*_runs.csv")}
    assert folders
    for folder in folders:
        sweep.recorded_runs(folder, "0123")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["table5"], "invalid choice: 'table5'"),
        (["table2", "--methods", "magic"], "invalid choice: 'magic'"),
        (["table2", "--dataset", "imagenet"], "invalid choice: 'imagenet'"),
        (["table2", "--seeds", "1", "1"], "expected different integers"),
        (["table2", "--jobs", "0"], "expected an integer from 1 up"),
        (["table2", "--run_flags", "'--epochs"], "No closing quotation"),
        (["table2", "--run_flags=--main_lr -1"], "--main_lr must be greater than 0"),
        (["table2", "--run_flags=--nothing 1"], "unrecognized arguments: --nothing"),
        (["table2", "--run_flags=--help"], "--run_flags"),
        (["table2", "--run_flags=--preset paper"], "instead of --preset"),
        (["table2", "--epochs", "0"], "expected an integer from 1 up"),
        (["table2", "--sbatch", "account"], "expected OPTION=VALUE"),
        (["table2", "--hyperparameters", "x" * 300], "File name too long"),
        (["table2", "--hyperparameters", "missing.json"], "missing.json does not exist"),
        (["table2", "--paper", "nothing.csv"], "nothing.csv"),
        (["table2", "--plugin", "nothing.py"], "--plugin nothing.py: No such file"),
        (["tune", "--hyperparameters", "none"], "give it a file"),
    ],
)
def test_bad_input(words, part, command, tmp_path):
    code, _, err = command(reproduce_tables.main, *words, "--sweep_dir", tmp_path / "sweeps")
    assert code == 2
    assert part in err
    assert "Traceback" not in err
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize("flag", ["--sweep_dir", "--out_dir"])
def test_a_file_where_a_folder_is_wanted(flag, command, tmp_path):
    (tmp_path / "file").touch()
    where = ["--sweep_dir", tmp_path / "sweeps", flag, tmp_path / "file"]
    code, _, err = command(reproduce_tables.main, "table2", *where)
    assert code == 2
    assert_one_error_line(err, tmp_path / "file")


def test_data_that_are_not_there(command, tmp_path):
    where = ["--data_root", tmp_path / "nothing", "--sweep_dir", tmp_path / "sweeps"]
    code, _, err = command(reproduce_tables.main, "table2", *where)
    assert code == 2
    assert_one_error_line(err, tmp_path / "nothing")


@pytest.mark.parametrize("package", ["pandas", "tabulate", "scipy"])
def test_a_missing_package_is_named_before_the_runs(
    package, places, command, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = command(reproduce_tables.main, "table2", *places)
    assert (code, out) == (2, "")
    assert_one_error_line(err, f"needs {package}: ", "pip install -r requirements-tables.txt")
    assert not (tmp_path / "sweeps").exists()


def test_a_mistake_in_the_papers_numbers_is_found_before_the_runs(
    places, command, tmp_path, monkeypatch
):
    monkeypatch.setattr(reproduce_tables, "RESULTS", tmp_path)
    (tmp_path / "paper_numbers.csv").write_text("no,such,header\n")
    code, out, err = command(reproduce_tables.main, "table2", *places, "--methods", "single")
    assert (code, out) == (2, "")
    assert_one_error_line(err, "paper_numbers.csv, line 1")
    assert not (tmp_path / "sweeps").exists()


def test_own_data_have_a_name_of_their_own(tmp_path):
    birds = SimpleNamespace(classes=200)
    cub = SimpleNamespace(target=birds, labels=range(11_788), data_root=tmp_path)
    assert reproduce_tables.own_data("cub", cub) is None
    birds = SimpleNamespace(classes=10)
    own = SimpleNamespace(target=birds, labels=range(100), data_root=tmp_path / "birds")
    assert reproduce_tables.own_data("cub", own) == "birds"
    assert reproduce_tables.own_data("digits", own) is None


def test_hyperparameters_of_other_data_are_noted(places, command, tmp_path, fingerprint):
    file = tmp_path / "tuned.json"
    entry = json.loads((ROOT / "results" / "hyperparameters.json").read_text())["digits"]
    for found in (fingerprint, entry["fingerprint"]):
        write_json(file, {"cub": {**entry, "fingerprint": found}})
        flags = [*places, "--hyperparameters", file, "--collect_only", "--methods", "single"]
        code, _, err = command(reproduce_tables.main, "table2", *flags)
        assert ("chosen on other data" in err) == (found != fingerprint), err


def test_a_gpu_that_is_not_there(places, command):
    code, _, err = command(reproduce_tables.main, "table2", *places, "--gpus", "99")
    assert code == 2
    assert_one_error_line(err, "--gpus 99")


def test_jobs_are_dealt_out_over_gpus():
    assert local._least_used([], []) is None
    assert local._least_used([3, 5], [(0, 0, 3)]) == 5
    assert local._least_used([3, 5], [(0, 0, 5), (0, 0, 3), (0, 0, 5)]) == 3


@pytest.mark.parametrize(
    "jobs, threads, cores, gpus, warns",
    [
        (2, 2, 2, 0, True),
        (2, None, 2, 0, True),
        (2, 1, 1, 0, False),
        (2, 2, 4, 0, False),
        (1, None, 2, 0, False),
        (2, None, 2, 2, False),
    ],
)
def test_runs_that_share_cores_are_told(
    job_of, monkeypatch, capsys, jobs, threads, cores, gpus, warns
):
    monkeypatch.setattr(local, "chosen_gpus", lambda numbers: ["0", "1"][:gpus])
    monkeypatch.setattr(local, "usable_cores", lambda: cores)
    job = job_of()
    job.config.threads = threads
    args = SimpleNamespace(launcher="local", jobs=jobs, gpus=[])
    reproduce_tables.launcher(args, None, [job, job])
    assert ("--threads 1" in capsys.readouterr().err) == warns
