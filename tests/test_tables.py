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
from auxilearn.trainer import train

import data_preprocess
import inspect_schedule
import reproduce_tables
from auxilearn.data.split import load_split
from auxilearn.errors import RunError, UserError
from auxilearn.run.config import Config, flags_of, parse, with_method_defaults
from auxilearn.run.record import write_json
from auxilearn.tables import local, sweep
from auxilearn.tables.local import Outcome
from auxilearn.tables.protocol import (
    ABLATION,
    BUDGET,
    DATASETS,
    ROWS,
    SETTINGS,
    TABLES,
    TUNED_ON,
    USUAL_ROWS,
    candidates,
    tuned_as,
)
from auxilearn.tables.tuning import Hyperparameters, trials, write_choice
from tests.conftest import Run, assert_one_error_line, assert_same_run, tiny_flags

ROOT = Path(__file__).parents[1]
SHORT = shlex.join(tiny_flags(epochs=1, threads=1))


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
    def make(row="single", setting="supervised", seed=1, hyperparameters=None, flags=()):
        where = sweep.Places(tiny_split, None, tmp_path / "runs", tmp_path / "logs")
        flags = [*tiny_flags(epochs=1, threads=1), *flags]
        return sweep.make_job(where, "cub", row, setting, seed, hyperparameters, flags)

    return make


def train_as(job):
    """What a launcher does, in this process."""
    try:
        train(job.config)
    except UserError:
        return Outcome(2)
    return Outcome(0)


# --------------------------------------------------------------------------------------------------
# Protocol and jobs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_row_has_the_same_number_of_candidates(dataset, table):
    for row in ROWS:
        found = candidates(table, tuned_as(row), DATASETS[dataset].main_lr)
        assert len({json.dumps(c) for c in found}) == len(found) == BUDGET
        assert DATASETS[dataset].main_lr in [c["main_lr"] for c in found]


@pytest.mark.parametrize("table", TABLES)
def test_the_stable_form_and_its_baseline_without_a_schedule_have_the_same_candidates(table):
    assert candidates(table, "joint_stable", 2e-3) == candidates(table, "common_dev", 2e-3)


def test_auxiliary_tasks_may_count_more_where_few_images_have_a_target_label():
    def tried(table, row):
        return {c.get("aux_weight") for c in candidates(table, row, 2e-3)}

    for row in ("common_dev", "joint_stable", "uncertainty", "gcs"):
        assert tried("table2", row) == tried("table4", row) == {1.0, 0.3}
        assert tried("table3", row) == {1.0, 3.0}
    assert tried("table3", "common_tuned") == {3.0, 10.0}


def test_the_tables_have_the_papers_settings():
    rates = [SETTINGS[name].rate for name in TABLES["table4"].settings]
    assert rates == [0.2, 0.4, 0.6]
    assert TABLES["table3"].settings == ("semi",)
    assert set(TUNED_ON) == set(TABLES)
    assert all(TUNED_ON[name] in table.settings for name, table in TABLES.items())
    ablations = [row.flags[3:] for row in ROWS.values() if row.full == "joint"]
    factors = ("task", "feature", "loss")
    assert {frozenset(a) for a in ablations} == {
        *(frozenset([f]) for f in factors),
        *(frozenset(factors) - {f} for f in factors),
    }


def test_ablations_of_the_stable_form_take_one_remedy_back_each(job_of):
    flags = ["--epochs", "20", "--dev_epochs", "10", "--warmup_epochs", "5"]
    whole = with_method_defaults(job_of("joint_stable", flags=flags).config)
    changed = {}
    for row in ROWS:
        if ROWS[row].full == "joint_stable":
            one = with_method_defaults(job_of(row, flags=flags).config)
            assert ROWS[row].kind == ABLATION
            assert row not in USUAL_ROWS
            changed[row.removeprefix("stable_")] = {
                name: value
                for name, value in vars(one).items()
                if value != getattr(whole, name) and name != "exp_name"
            }
    assert changed == {
        "equal": {"warmup_epochs": 1000000},
        "free_scale": {"target_share": "free"},
        "fixed_share": {"target_share": "fixed"},
        "gradient": {"precondition": "none"},
        "neumann": {"solver": "neumann"},
        "sgd": {"upper_optimizer": "sgd", "max_grad_norm": 10, "aux_lr": 0.01},
        "no_warmup": {"warmup_epochs": 0},
        "one_batch": {"n_meta_train_loss_accum": 1},
        "held_out": {"hold_out_dev": True},
        "no_fine_tuning": {"dev_epochs": 0},
    }
    assert {row for row in ROWS if ROWS[row].full != "joint_stable"} == set(USUAL_ROWS)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_job_is_a_command_that_makes_its_configuration(dataset, row, job_of, tmp_path):
    where = sweep.Places(tmp_path / "split", None, tmp_path / "runs", tmp_path / "logs")
    job = sweep.make_job(where, dataset, row, "corrupted_0.4", 3)
    assert parse(job.argv) == job.config
    words = shlex.split(job.command)
    assert parse(words[2:]) == job.config
    assert job.config.seed == 3
    assert (job.config.corrupted, job.config.corrupted_rate) == (True, 0.4)
    assert job.config.resume
    assert job.name.endswith(job.identity)


def test_flags_of_a_configuration_make_it_again():
    config = Config(method="task", aux_hidden_dim=[3, 4], corrupted=True, whether_aux=False)
    assert parse(flags_of(config)) == config
    assert flags_of(Config()) == ["--method", "joint", "--seed", "5"]


def test_a_default_that_is_given_names_the_same_run(job_of):
    """Nor does a setting to come, whose default is what was done before."""
    plain = job_of("joint_stable").identity
    assert (
        job_of("joint_stable", flags=["--precondition", "adam", "--amp", "off"]).identity == plain
    )
    assert job_of("joint_stable", flags=["--precondition", "none"]).identity != plain


def test_the_identity_depends_on_what_determines_the_run_alone(job_of, tmp_path):
    job = job_of()
    same = sweep.make_job(
        sweep.Places(Path("a"), Path("b"), Path("c"), Path("d")),
        "cub",
        "single",
        "supervised",
        1,
        flags=[*tiny_flags(epochs=1, threads=1), "--num_workers", "3", "--cache", "on"],
    )
    assert same.identity == job.identity
    others = [
        job_of("common"),
        job_of(setting="corrupted_0.2"),
        job_of(seed=2),
        job_of(hyperparameters={"main_lr": 0.5}),
        job_of(flags=["--image_size", "18"]),
    ]
    assert len({job.identity, *(other.identity for other in others)}) == 6
    # Two rows of one configuration share their runs.
    assert job_of("common", hyperparameters={"aux_weight": 0.3}).name == (
        job_of("common_tuned", hyperparameters={"aux_weight": 0.3}).name
    )


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
    shutil.rmtree(job.directory)
    job.directory.write_text("")
    with pytest.raises(UserError, match="expected the folder of a run; remove it"):
        state()
    job.directory.unlink()
    assert train_as(job).finished
    found, summary = state()
    assert found == "done"
    assert summary == Run(job.directory).summary
    result = sweep.result_of(job, "single", "supervised", fingerprint)
    assert (result.test_accuracy, result.seed) == (summary["test_accuracy"], 1)
    assert result.command == job.command

    # Not what it should be: the summary of something else, another configuration, other data.
    changes = [
        {"test_accuracy": 93.0},
        {"valid_accuracy": None},
        {"method": "joint"},
        {"seed": 2},
        {"exp_name": "another"},
        {"fingerprint": "another"},
    ]
    for change in changes:
        write_json(job.directory / "summary.json", summary | change)
        with pytest.raises(UserError, match="not the summary of this run; remove"):
            state()
    write_json(job.directory / "summary.json", ["nothing"])
    with pytest.raises(UserError, match="not the summary of this run; remove"):
        state()
    write_json(job.directory / "summary.json", summary)
    with pytest.raises(UserError, match="another configuration: the data or their|the data or its"):
        sweep.state_of(job, fingerprint="other")
    recorded = Run(job.directory).read("config.json")
    changed = {**recorded, "config": {**recorded["config"], "main_lr": 0.5}}
    write_json(job.directory / "config.json", changed)
    with pytest.raises(UserError, match=r"main_lr was 0\.5 and is 0\.0001"):
        state()
    write_json(job.directory / "config.json", ["nothing"])
    with pytest.raises(UserError, match=r"config\.json: not written by a run"):
        state()
    (job.directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        state()


def test_a_run_that_another_process_writes_is_running(job_of, fingerprint):
    job = job_of()
    job.directory.mkdir(parents=True)
    code = (
        "import fcntl, sys; log = open(sys.argv[1], 'a'); fcntl.lockf(log, fcntl.LOCK_EX); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(job.directory / "log.txt")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        assert sweep.state_of(job, fingerprint) == ("running", None)
        process.stdin.close()
        process.wait()
    assert sweep.state_of(job, fingerprint) == ("incomplete", None)


@pytest.mark.parametrize(
    "flags",
    ["--corrupted 1", "--labeled_per_class 5", "--factors task", "--seed 3", "--exp_name x"]
    + ["--method common", "--overwrite 1", "--resume 1", "--record_dir x", "--whether_aux 0"],
)
def test_flags_that_a_table_sets_itself_are_refused(flags, job_of):
    name = flags.split()[0]
    with pytest.raises(UserError, match=f"--run_flags: {name} is set by the table"):
        job_of(flags=flags.split())


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
        bad.log.write_text("error: of long ago\n")
        for job in jobs:
            with open(job.log, "a") as log:
                log.write("error: of this time\n")
            yield job, Outcome(143)

    bad.log.write_text("error: of long ago\n")
    failed = sweep.run([bad, good], launch, fingerprint)
    assert launched == [bad]
    assert [reason for _, reason in failed] == ["exit code 143: of this time"]
    assert sweep.state_of(bad, fingerprint)[0] == "to do"  # who was asked to end has not failed


def test_a_run_elsewhere_is_waited_for(job_of, monkeypatch):
    job = job_of()
    states = iter([("running", None)] * 2 + [("running", None), ("incomplete", None)])
    done = ("done", {"test_accuracy": 0.5, "valid_accuracy": 0.5})
    monkeypatch.setattr(sweep, "POLL", 0)
    monkeypatch.setattr(sweep, "state_of", lambda *_: next(states, done))
    launched = []

    def launch(jobs):
        launched.append(list(jobs))
        return iter([(jobs[0], Outcome(0))])

    assert sweep.run([job], launch, "print") == []
    assert launched == [[job]]


def test_a_full_disk_is_one_line(job_of, monkeypatch):
    def launch(jobs):
        raise OSError(28, "No space left on device", "/somewhere")
        yield

    with pytest.raises(RunError, match="/somewhere: No space left on device; finished runs are"):
        sweep.run([job_of()], launch, "print")


def test_local_runs_are_those_of_their_command_lines(job_of, tmp_path):
    jobs = [job_of("joint", seed=1), job_of("gcs", seed=2), job_of(flags=["--task_num", "99"])]
    for job in jobs:
        job.logs.mkdir(exist_ok=True)
    assert {job.name: outcome.code for job, outcome in local.launch(jobs, 2)} == {
        jobs[0].name: 0,
        jobs[1].name: 0,
        jobs[2].name: 2,
    }
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
        rows = [
            (r["row"], r["seed"], r["test_accuracy"], r["identity"]) for r in csv.DictReader(file)
        ]
    return cells, rows


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
def test_asked_to_end_it_leaves_checkpoints(number, places, tmp_path):
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


def test_two_sweeps_at_once_share_the_work(tmp_path):
    line = [sys.executable, str(ROOT / "reproduce_tables.py"), "table2", "--dataset", "digits"]
    line += ["--methods", "single", "common", "--seeds", "1", "--sweep_dir", str(tmp_path)]
    line += ["--run_flags", "--max_steps 60 --epochs 60", "--hyperparameters", "none"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(line, **pipes) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    runs = [Run(path) for path in (tmp_path / "digits/bird_record/full").iterdir()]
    assert len(runs) == 2
    assert all(len(run.rows_of("epoch")) == 3 for run in runs)  # 23 steps each


# --------------------------------------------------------------------------------------------------
# Tuning
# --------------------------------------------------------------------------------------------------


def test_the_best_mean_validation_accuracy_is_chosen(tmp_path):
    file = tmp_path / "new/hyperparameters.json"
    a, b, c = {"main_lr": 0.1}, {"main_lr": 0.2}, {"main_lr": 0.3}
    how = ("python reproduce_tables.py tune", [7, 8], ["--epochs", "2"], "print")
    outcomes = {
        ("table2", "single"): [(a, [0.5, 0.7]), (b, [0.9, None]), (c, [0.7, 0.5])],
        ("table2", "common"): [(a, [None, None])],
    }
    chosen = write_choice(file, "digits", outcomes, *how)
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
    write_choice(file, "mini", outcomes, *how)
    write_choice(file, "digits", outcomes, *how)
    found = Hyperparameters(file, "digits")
    same = ["--epochs", "2"]
    assert found.of("table2", "single", same) == a
    assert found.of("table4", "joint", same) == found.of("table4", "joint_task", same) == b
    assert found.of("table3", "single", same) == {}
    assert Hyperparameters(file, "mini").of("table4", "joint_task", same) == b
    # A flag of the table's runs wins, unless it is one that the tuning was done under.
    assert found.of("table2", "single", ["--main_lr", "1"]) == {}
    assert found.of("table2", "single", ["--main_lr=1"]) == {}
    assert found.of("table2", "single", ["--w_decay", "1"]) == a

    # What was chosen in another way is not replaced, and a table says what it takes.
    with pytest.raises(UserError, match="give another --hyperparameters"):
        write_choice(file, "digits", outcomes, how[0], [9], *how[2:])
    with pytest.raises(UserError, match="--seeds 8 is what the hyper-parameters"):
        found.check([1, 8])
    said = found.notes("table4", ["single", "joint", "joint_task"], ["--epochs", "2"], "print")
    assert len(said) == 2
    assert "best of 1 candidates" in said[0] and "on seed 7, 8" in said[0]
    assert said[1].endswith("as in the commands: Single task.")
    said = found.notes("table2", ["single"], [], "other")
    assert "`--epochs 2`, not `none`" in said[1]
    assert said[2] == "They were chosen on other data or another split."


def test_trials_are_a_row_of_equal_budget_each():
    found = trials(["table2", "table4"], ["single", "joint", "joint_task"], 0.04)
    assert {c["main_lr"] for _, row, _, c in found if row == "joint"} == {0.04, 0.1, 0.2}
    assert len(found) == 2 * 2 * BUDGET  # an ablation takes what is chosen for joint
    assert {setting for _, _, setting, _ in found} == {"supervised", "corrupted_0.4"}


GOOD = {"command": "x", "chosen": {"main_lr": 0.1}, "candidates": [{"main_lr": 0.1}]}
FRAME = {"seeds": [1], "flags": [], "fingerprint": "x"}


def tables(**change):
    return {"digits": {**FRAME, "tables": {"table2": {"rows": {"single": {**GOOD, **change}}}}}}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"digits": 3},
        {"digits": {"tables": {}}},
        {"digits": {**FRAME, "seeds": 5, "tables": {}}},
        {"digits": {**FRAME, "seeds": [], "tables": {}}},
        {"digits": {**FRAME, "tables": []}},
        {"digits": {**FRAME, "tables": {"table9": {"rows": {}}}}},
        {"digits": {**FRAME, "tables": {"table2": {"rows": []}}}},
        tables(command=None),
        tables(candidates=[]),
        tables(chosen=["main_lr"]),
        tables(chosen={"epochs": 3}),
        tables(chosen={"main_lr": "x"}),
        tables(chosen={"main_lr": True}),
        tables(chosen={"main_lr": -1e-5}),
        tables(chosen={"dev_epochs": 2.5}),
    ],
)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    write_json(tmp_path / "h.json", content)
    with pytest.raises(UserError, match=r"h\.json: .*not written by reproduce_tables\.py tune"):
        Hyperparameters(tmp_path / "h.json", "digits")
    with pytest.raises(UserError, match=r"h\.json"):
        write_choice(tmp_path / "h.json", "digits", {}, "x", [1], [], "x")


def test_a_file_that_is_right_is_taken(tmp_path):
    write_json(tmp_path / "h.json", tables())
    assert Hyperparameters(tmp_path / "h.json", "digits").of("table2", "single", []) == {
        "main_lr": 0.1
    }


def test_tune_writes_what_the_tables_use(places, tmp_path, command):
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
    assert_one_error_line(err, "--seeds 9 is what the hyper-parameters")


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def test_some_tables_of_all(places, command):
    wanted = ["all", *places, "--seeds", "1", "--methods", "single", "--dry_run"]
    code, out, _ = command(reproduce_tables.main, *wanted, "--tables", "table3", "table2")
    assert (code, len(out.splitlines())) == (0, 3)
    assert "--labeled_per_class 5" in out and "--corrupted" not in out
    wanted = ["table2", *wanted[1:], "--tables", "table3"]
    code, _, err = command(reproduce_tables.main, *wanted)
    assert code == 2 and "--tables goes with all and tune" in err


def test_some_columns_of_a_table(places, command):
    wanted = ["all", *places, "--seeds", "1", "2", "--methods", "single", "--dry_run", "--settings"]
    code, out, _ = command(reproduce_tables.main, *wanted, "corrupted_0.6", "supervised")
    assert (code, len(out.splitlines())) == (0, 5)
    assert out.count("--corrupted_rate 0.6") == 2 and out.count("--corrupted ") == 2
    code, _, err = command(reproduce_tables.main, "table2", *wanted[1:], "corrupted_0.6", "semi")
    assert code == 2 and "--settings: table2 has no column corrupted_0.6 or semi" in err
    code, _, err = command(reproduce_tables.main, "tune", *wanted[1:], "semi")
    assert code == 2 and "--settings goes with tables" in err


def test_epochs_are_given_once(command):
    wanted = ["table2", "--dataset", "mini", "--epochs", "3", "--dry_run"]
    for flags in ("--epochs 2", "--epochs=2"):
        code, _, err = command(reproduce_tables.main, *wanted, f"--run_flags={flags}")
        assert code == 2 and "--epochs: given twice" in err


def test_every_command_of_a_dry_run_runs(places, tmp_path, command):
    wanted = ["table2", *places, "--seeds", "1", "--methods", "single", "joint_task"]
    code, out, _ = command(reproduce_tables.main, *wanted, "--dry_run")
    assert code == 0
    assert not (tmp_path / "sweeps").exists()
    lines = out.splitlines()
    assert len(lines) == 3
    for line in lines:
        subprocess.run(line, shell=True, check=True, capture_output=True)
    code, out, _ = command(reproduce_tables.main, *wanted)
    assert out.splitlines()[0] == "2 runs: 2 done"


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
    assert "## Table 2: Supervised, data\n\n| method | supervised |\n" in out
    assert "Supervised: data" in (tmp_path / "sweeps/cub/tables/table2.svg").read_text()
    # A run that was deleted is run again, and it alone.
    gone = runs[0].directory
    shutil.rmtree(gone)
    code, out, _ = command(reproduce_tables.main, *wanted)
    assert out.splitlines()[0] == "4 runs: 3 done, 1 to do" or "1 to do, 3 done" in out
    assert (gone / "summary.json").exists()


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
        (["table2", "--run_flags=--help"], "flags of train_bilevel.py"),
        (["table2", "--epochs", "0"], "expected an integer from 1 up"),
        (["table2", "--sbatch", "account"], "expected OPTION=VALUE"),
        (["table2", "--hyperparameters", "x" * 300], "File name too long"),
        (["table2", "--paper", "nothing.csv"], "nothing.csv"),
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
    assert_one_error_line(err, tmp_path / "file", "expected a folder")


def test_data_that_are_not_there(command, tmp_path):
    where = ["--data_root", tmp_path / "nothing", "--sweep_dir", tmp_path / "sweeps"]
    code, _, err = command(reproduce_tables.main, "table2", *where)
    assert code == 2
    assert_one_error_line(err, tmp_path / "nothing")


def test_hyperparameters_that_are_named_must_be_there(places, command, tmp_path):
    missing = tmp_path / "tuned.json"
    code, _, err = command(reproduce_tables.main, "table2", *places, "--hyperparameters", missing)
    assert code == 2
    assert_one_error_line(err, missing, "does not exist")


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
    cub = SimpleNamespace(class_names=["a"] * 200, labels=range(11_788), data_root=tmp_path)
    assert reproduce_tables.own_data("cub", cub) is None
    own = SimpleNamespace(class_names=["a"] * 10, labels=range(100), data_root=tmp_path / "birds")
    assert reproduce_tables.own_data("cub", own) == "birds"
    assert reproduce_tables.own_data("digits", own) is None


@pytest.mark.parametrize(
    "words",
    [
        [reproduce_tables.main, "table2", "--sweep_dir"],
        [reproduce_tables.main, "table2", "--hyperparameters"],
        [data_preprocess.main, "--out_dir"],
        [data_preprocess.main, "--data_root"],
        [inspect_schedule.main],
    ],
    ids=lambda words: " ".join([words[0].__module__, *words[1:]]),
)
def test_an_empty_word_is_not_the_current_folder(words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words, "")
    assert (code, out) == (2, "")
    assert "expected a name, not an empty word" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


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
    monkeypatch.setattr(local, "launch", lambda jobs, count, gpus: [])
    job = job_of()
    job.config.threads = threads
    args = SimpleNamespace(launcher="local", jobs=jobs, gpus=[])
    reproduce_tables.launcher(args, None, [job])([job, job])
    assert ("--threads 1" in capsys.readouterr().err) == warns
