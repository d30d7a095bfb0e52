"""The hours that a dry run announces: from known seconds to known hours."""

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest

import data_preprocess
import reproduce_tables
import train_bilevel
from auxilearn.data.split import load_split
from auxilearn.errors import UserError
from auxilearn.files import write_json
from auxilearn.run.build import Plan
from auxilearn.run.config import resolve
from auxilearn.tables import sweep
from auxilearn.tables.estimate import HYPERSTEP, LOWER_STEPS, Estimate, Speed, estimate
from auxilearn.tables.local import Outcome
from auxilearn.tables.sweep import RunFlags
from tests.conftest import prepare, tiny_flags


def step(number, data, lower):
    return {"kind": "step", "step": number, "data_seconds": data, "lower_seconds": lower}


def upper(seconds):
    return {"kind": "upper", "upper_seconds": seconds}


def epoch(seconds):
    return {"kind": "epoch", "valid_seconds": seconds}


# Per lower step 0.5 and 2 s, but 9 in the first; per upper step 7 s, but 20 in the first.
ROWS = [step(1, 4, 5), upper(20), step(10, 0.5, 2), epoch(3), upper(6), upper(8), epoch(5)]
ROWS += [step(14, 0.5, 2)]
SPENT = 9 + 13 * 2.5 + 20 + 6 + 8 + 3 + 5 + 4  # the last is the test, at the mean of validations
SUMMARY = {"method": "joint", "seconds": SPENT + 1.5}  # 1.5 s more, such as checkpoints


def finished(directory, rows=ROWS, summary=SUMMARY):
    """A folder with what a finished run has written of its times."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(directory / "summary.json", summary)
    return directory


def test_the_speed_of_a_run(tmp_path):
    speed = Speed.of_run(finished(tmp_path))
    assert speed == pytest.approx((2.5, 7.0, 4.0 + 1.5 / 2, 4.0))


def test_a_run_of_a_single_step_has_a_speed(tmp_path):
    rows, summary = [step(1, 4, 5), epoch(3)], {"method": "common", "seconds": 9 + 3 + 3}
    assert Speed.of_run(finished(tmp_path, rows, summary)) == pytest.approx((9, 0, 3, 3))


def test_a_run_that_lacks_rows_has_no_speed(tmp_path):
    rows = [row for row in ROWS if row["kind"] != "upper"]
    assert Speed.of_run(finished(tmp_path, rows)) is None
    assert Speed.of_run(finished(tmp_path, rows, {**SUMMARY, "method": "gcs"})).upper == 0
    (tmp_path / "metrics.jsonl").unlink()
    assert Speed.of_run(tmp_path) is None


def test_from_a_speed_to_the_seconds_of_a_run():
    plan = Plan(
        steps_per_epoch=7,
        main_steps=20,  # epochs end after 7, 14 and 20 steps
        steps_per_pass=2,
        passes=3,
        hyperstep=3,
        warmup_epochs=1,  # of the upper steps after 3, 6, ..., 18 the first two fall into it
        bilevel=True,
    )
    speed = Speed(lower=1.0, upper=100.0, epoch=10_000.0, test=1_000_000.0)
    assert speed.seconds(plan) == 20 + 3 * 2 + 4 * 100 + (3 + 3) * 10_000 + 1_000_000
    without = dataclasses.replace(plan, bilevel=False, passes=0)
    assert speed.seconds(without) == 20 + 3 * 10_000 + 1_000_000


def test_hours_on_the_wall_clock():
    found = Estimate([3600.0 * h for h in (2, 1, 1, 5, 2)], measured=5, kinds=2, unknown={})
    assert found.wall_clock(1) == 11 * 3600
    # One: 2, then 5 from hour 2 on. The other: 1, 1, then 2 from hour 2 on.
    assert found.wall_clock(2) == 7 * 3600
    assert found.wall_clock(9) == 5 * 3600
    assert list(found.lines(2)) == [
        "11 hours of training in all (5 by a short training of each of 2 kinds here)",
        "7 hours with 2 runs at a time",
    ]
    found = Estimate([360.0, 36.0], measured=0, kinds=0, unknown={"no weights": 3})
    assert list(found.lines(None)) == [
        "0.11 hours of training in all (2 by the speed of finished runs)",
        "not counted, for want of a speed: 3 runs (no weights)",
    ]


# --------------------------------------------------------------------------------------------------
# Jobs of a sweep
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tiny_split, tmp_path):
    return sweep.Places(tiny_split, None, tmp_path / "runs", tmp_path / "logs")


@pytest.fixture
def split(tiny_split):
    return load_split(str(tiny_split))


@pytest.fixture
def job_of(places):
    def make(row, setting="supervised", seed=1, chosen=None, **changes):
        flags = RunFlags.read(tiny_flags(**{"epochs": 3, "threads": 1, **changes}))
        return sweep.make_job(places, "cub", row, setting, seed, chosen or {}, flags)

    return make


def in_this_process(trained):
    """A launcher that notes the configurations and the rows of metrics of what it trains."""

    def launch(jobs):
        for job in jobs:
            try:
                train_bilevel.train(job.config)
            except UserError as error:
                job.log.write_text(f"a line\nerror: {error}\n")
                yield job, Outcome(2)
                continue
            lines = (job.directory / "metrics.jsonl").read_text().splitlines()
            trained.append((job.config, [json.loads(line) for line in lines]))
            yield job, Outcome(0)

    return launch


def refuse(jobs):
    raise AssertionError("nothing is to be trained")


def record(job, split, **how):
    """A finished run of a job, with known seconds."""
    config = dataclasses.asdict(resolve(job.config, split))
    finished(job.directory, **how)
    write_json(job.directory / "config.json", {"config": config})


def test_finished_runs_of_the_kind_say_how_long_others_take(job_of, places, split):
    """3 epochs of 3 steps each on 16 images, an upper step after every second one."""
    record(job_of("joint"), split)
    twice = [{k: 2 * v if "seconds" in k else v for k, v in row.items()} for row in ROWS]
    slower = {**SUMMARY, "seconds": 2 * SUMMARY["seconds"]}
    record(job_of("joint", seed=2), split, rows=twice, summary=slower)
    speed = Speed(2.5 * 1.5, 7 * 1.5, 4.75 * 1.5, 4 * 1.5)  # the mean of the two
    others = [
        job_of("joint", seed=3),
        job_of("joint", "corrupted_0.6", chosen={"main_lr": 0.5, "upper_lr": 0.3}),
        job_of("joint_task"),  # one of its factors alone
        job_of("joint", epochs=7, hyperstep=1),
    ]
    found = estimate(others, places, split, refuse)
    short = 9 * speed.lower + 4 * speed.upper + 3 * speed.epoch + speed.test
    long = 21 * speed.lower + 21 * speed.upper + 7 * speed.epoch + speed.test
    assert found.seconds == pytest.approx([short, short, short, long])
    assert (found.measured, found.kinds, found.unknown) == (0, 0, {})


def test_runs_of_another_kind_are_measured_each_kind_once(job_of, places, split):
    record(job_of("joint"), split)
    trained = []
    jobs = [
        job_of("joint"),  # known
        *(job_of("joint", seed=seed, neumann_terms=2) for seed in (1, 2)),
        *(job_of(row, chosen={"aux_weight": 0.1}) for row in ("common", "common_tuned")),
        job_of("common", "corrupted_0.2"),
        job_of("common", train_batch_size=5),
        job_of("joint_stable", epochs=100),
    ]
    found = estimate(jobs, places, split, in_this_process(trained))
    assert (len(found.seconds), found.measured, found.kinds) == (8, 7, 4)
    assert found.seconds[5] == found.seconds[3] != found.seconds[6]
    assert min(found.seconds) > 0
    kinds = {(c.method, c.neumann_terms, c.train_batch_size) for c, _ in trained}
    assert kinds == {
        *(("joint", 2, 6), ("common", 1, 6), ("common", 1, 5), ("joint_stable", 1, 6)),
    }
    for config, rows in trained:
        assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 10, 20, 30]
        uppers = sum(row["kind"] == "upper" for row in rows)
        assert uppers == (LOWER_STEPS // HYPERSTEP if config.method != "common" else 0)
        assert {row.get("phase", "training") for row in rows} == {"training"}


def test_a_measurement_leaves_nothing_behind(job_of, places, split, tmp_path, monkeypatch):
    """Neither runs nor a cache of images; a cache that is there is used."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache, trained = tmp_path / "cache", []
    job = job_of("single", cache_dir=str(cache))
    estimate([job], places, split, in_this_process(trained))
    assert list(tmp_path.iterdir()) == []
    cache.mkdir()
    estimate([job], places, split, in_this_process(trained))
    assert list(tmp_path.iterdir()) == [cache]
    used = [config.cache_dir for config, _ in trained]
    assert used[0].startswith(str(tmp_path / "estimate_")) and used[1] == str(cache)


def test_what_cannot_be_measured_is_told(job_of, places, split, monkeypatch):
    few = job_of("single", "semi")  # five labels per class, of four images
    many = job_of("common", task_num=99)
    large = job_of("common", backbone="resnet18", image_size=224, feature_dim=512)
    found = estimate([few, many, many, large], places, split, in_this_process([]))
    assert found.seconds == [] and sum(found.unknown.values()) == 4
    parts = ("--task_num 99", "resnet18 at 224 pixels on the CPU", "exit code 2: error: --labeled")
    for part, number in zip(parts, (2, 1, 1), strict=True):
        assert [n for reason, n in found.unknown.items() if part in reason] == [number]


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------


def dry_run(command, *words):
    """The lines after the commands."""
    code, out, err = command(reproduce_tables.main, "table2", *words, "--dry_run")
    assert code == 0, err
    return [line.removeprefix("# ") for line in out.splitlines() if line.startswith("# ")]


@pytest.fixture
def words(tiny_split, tmp_path):
    where = ["--data_root", tiny_split.parent / "data", "--split_dir", tiny_split]
    flags = " ".join(tiny_flags(epochs=3, threads=1))
    return [*where, "--sweep_dir", tmp_path, "--run_flags", flags, "--methods", "joint"]


def test_a_dry_run_counts_what_is_not_done(words, command, tmp_path, split, tiny_split):
    data = tiny_split.parent / "data"
    places = sweep.Places(tiny_split, data, tmp_path / "cub/bird_record", tmp_path / "logs")
    flags = RunFlags.read(tiny_flags(epochs=3, threads=1))
    job = sweep.make_job(places, "cub", "joint", "supervised", 1, {}, flags)
    hours = [{k: 3600 * v if "seconds" in k else v for k, v in row.items()} for row in ROWS]
    record(job, split, rows=hours, summary={**SUMMARY, "seconds": 3600 * SUMMARY["seconds"]})
    config = json.loads((job.directory / "config.json").read_text())
    write_json(
        job.directory / "config.json",
        {**config, "data": {"fingerprint": split.fingerprint}, "plugin": None},
    )
    one = 9 * 2.5 + 4 * 7 + 3 * 4.75 + 4  # hours: 68.75
    said = dry_run(command, *words, "--seeds", "1", "2", "3", "4", "--jobs", "2")
    assert said == [
        "4 runs: 1 done, 3 to do",
        f"{3 * one:.0f} hours of training in all (3 by the speed of finished runs)",
        f"{2 * one:.0f} hours with 2 runs at a time",
    ]
    said = dry_run(command, *words, "--seeds", "1", "2", "--launcher", "slurm")
    assert len(said) == 2 and said[1].startswith("69 hours of training in all")
    assert dry_run(command, *words, "--seeds", "1") == ["1 runs: 1 done"]


def test_a_dry_run_without_data_says_what_is_missing(words, command, tmp_path):
    (said,) = dry_run(command, *words, "--seeds", "1", "2", "--split_dir", tmp_path / "nothing")
    assert said.startswith("2 runs; their hours are not known: ")
    assert str(tmp_path / "nothing") in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_before_the_data_is_generated(command, tmp_path, monkeypatch):
    """Measured on a copy of which nothing is left; the commands are those of the real places."""

    def generate(words):  # less, in place of the miniature's 20 s
        assert words[:2] == ["--generate", "mini"]
        prepare(Path(words[3]), Path(words[5]), classes=4, train_per_class=5, attributes=4)

    monkeypatch.setattr(data_preprocess, "main", generate)
    flags = " ".join(tiny_flags(epochs=3, threads=1, image_size=8))
    words = ["--dataset", "mini", "--sweep_dir", tmp_path / "sweeps", "--seeds", "1"]
    words += ["--methods", "single", "--run_flags", flags]
    before = {*Path(tempfile.gettempdir()).glob("estimate_*")}
    code, out, err = command(reproduce_tables.main, "table2", *words, "--dry_run")
    assert code == 0, err
    commands, said = out.splitlines()[:2], out.splitlines()[2:]
    assert all(f"--split_dir {tmp_path}/sweeps" in line for line in commands[1:])
    assert said[0] == "# 1 runs: 1 to do"
    assert "hours of training in all (1 by a short training of each of 1 kinds here)" in said[1]
    assert list(tmp_path.iterdir()) == []
    assert {*Path(tempfile.gettempdir()).glob("estimate_*")} <= before
