"""Two processes against one: the same run, where a batch is a mean over its samples."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from auxilearn.balance import FASTEST, LATE, LIMIT, START
from auxilearn.baselines.combiners import MonoLinearHyperNet
from auxilearn.bilevel import Bilevel
from auxilearn.hypernet import MonoJoint, Naive_hyper, TaskLosses
from auxilearn.implicit_diff import identity, neumann, preconditioned
from auxilearn.run.processes import Ranks, leaving
from auxilearn.solvers import conjugate_gradient
from auxilearn.stable import StableJoint
from tests import reference, small

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, TASKS = 10, 3


class Model(nn.Module):
    """No statistics over the batch: the one kind of model that sharding cannot change."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, TASKS)

    def forward(self, batch):
        inputs, targets, sample_id = batch
        features = self.body(inputs)
        return TaskLosses((self.head(features) - targets).square(), features, sample_id)


def problem(method):
    """Model, scheduler, a training and a development batch; the same in every process."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = Model()
    scheduler = {
        "naive": lambda: Naive_hyper(SAMPLES, TASKS),
        "linear": lambda: MonoLinearHyperNet(0, TASKS),
        "joint": lambda: MonoJoint(0, TASKS, 6),
        "joint_stable": lambda: StableJoint(0, TASKS, 6),
    }[method]()
    # 10 and 7 samples: the two ranks' shares of the second differ in size.
    batches = [(torch.randn(n, 4), torch.randn(n, TASKS), torch.arange(n)) for n in (10, 7)]
    return model, scheduler, *batches


def shard(batch, rank, size):
    return tuple(t[rank::size] for t in batch)


def one_step(method, solver, ranks):
    """Lower gradient and hypergradient as flat vectors, development loss, lower gradient's norm."""
    model, scheduler, train, dev = problem(method)
    train, dev = (shard(b, ranks.rank, ranks.size) for b in (train, dev))
    theta = list(model.parameters())

    def average(tensors, batches):
        return ranks.average(tensors, sum(len(b[2]) for b in batches))

    solve = neumann(0.05, 3)
    if solver == "cg":
        scale = [1.0 + p.detach().abs() for p in theta]
        solve = preconditioned(conjugate_gradient(1.0, 20), lambda: scale)
    bilevel = Bilevel(
        model, scheduler, torch.optim.SGD(theta, 0.1), solver=solve, aux_weight=0.5, average=average
    )
    hypergrads, _, dev_loss = bilevel.hypergradient([train], [dev])
    norm = bilevel.lower_step(train).gradient_norm.item()
    gradient = torch.cat([p.grad.flatten() for p in theta])
    return gradient, torch.cat([h.flatten() for h in hypergrads]), dev_loss, norm


def balanced(ranks):
    """The state of the stable form's balance after each of two upper steps."""
    model, scheduler, dev, train = problem("joint_stable")
    train, dev = (shard(b, ranks.rank, ranks.size) for b in (train, dev))

    def average(tensors, batches):
        return ranks.average(tensors, sum(len(b[2]) for b in batches))

    lower = torch.optim.SGD(model.parameters(), 0.1)
    upper = torch.optim.SGD(scheduler.parameters(), 0.1)
    bilevel = Bilevel(model, scheduler, lower, upper, solver=identity(), average=average)
    states = []
    for _ in range(2):
        bilevel.upper_step([train], [dev])
        states.append({n: v.clone() for n, v in scheduler.balance.state_dict().items()})
    return states


CASES = [("naive", "neumann"), ("linear", "cg"), ("joint", "neumann"), ("joint_stable", "neumann")]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with leaving():
        results = {case: one_step(*case, Ranks(rank, 2)) for case in CASES}
        results["balance"] = balanced(Ranks(rank, 2))
        torch.save(results, f"{folder}/{rank}.pt")
    os._exit(0)  # PyTorch's threads may abort the interpreter as it ends, see ``leaving``


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """{case: (gradient, hypergradient, development loss)} of two processes that share a batch."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    for case in CASES:
        for ours, theirs in zip(first[case][:2], second[case][:2], strict=True):
            assert torch.equal(ours, theirs)  # every rank takes the same step
        gradient, *_, norm = first[case]
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-12)
    found = {case: first[case][:3] for case in CASES}
    return found | {"balance": (first["balance"], second["balance"])}


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case[0])
def test_two_processes_equal_the_full_batch(case, two_processes):
    gradient, hypergradient, dev_loss = two_processes[case]
    alone = one_step(*case, Ranks())
    assert error(gradient, alone[0]) < 1e-12
    assert error(hypergradient, alone[1]) < 1e-10
    assert dev_loss == pytest.approx(alone[2], rel=1e-12)


def test_standardised_losses_are_each_ranks_own(two_processes):
    """Where batch statistics do not allow equality: joint's loss factor sees its shard alone."""
    gradient, hypergradient, _ = two_processes["joint", "neumann"]
    alone = one_step("joint", "neumann", Ranks())
    assert 1e-6 < error(gradient, alone[0]) < 0.1
    assert 1e-6 < error(hypergradient, alone[1]) < 0.5


def test_the_stable_form_starts_as_one_and_learns_from_each_ranks_batch(two_processes):
    """All samples count alike at first, so what sees samples one by one is that of the whole batch:
    the lower gradient and the task prior's hypergradient. Loss and feature factor see the shard."""
    gradient, hypergradient, _ = two_processes["joint_stable", "neumann"]
    alone = one_step("joint_stable", "neumann", Ranks())
    assert error(gradient, alone[0]) < 1e-12
    pieces = (h.split([TASKS, TASKS, TASKS * 6]) for h in (hypergradient, alone[1]))
    of_loss_w, of_task_prior, of_features = map(error, *pieces)
    assert of_task_prior < 1e-10
    assert min(of_loss_w, of_features) > 1e-6


def test_both_ranks_have_the_odds_of_both_ranks_terms(two_processes):
    """The first step by hand: at the start a sample's weight is its task's, so that the halves of a
    rank's loss are plain means over its shard; c and N are means over ranks, by their samples."""
    ours, theirs = two_processes["balance"]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    model, _, dev, train = problem("joint_stable")
    theta = list(model.parameters())

    def flat_gradient(loss):
        return reference.flat(torch.autograd.grad(loss, theta, retain_graph=True)).detach()

    v = flat_gradient(model(dev).losses[:, 0].mean())
    slopes, gram = 0, 0
    for rank in (0, 1):
        part = shard(train, rank, 2)
        means = model(part).losses.mean(dim=0)
        halves = flat_gradient(means[0]), flat_gradient(means[1:].sum() / (TASKS - 1))
        halves = small.halves(1.0, TASKS)[0] * torch.stack(halves)  # as heavy at the start
        share = len(part[2]) / len(train[2])
        slopes = slopes + share * halves @ v / v.norm()
        gram = gram + share * halves @ halves.T
    odds = reference.Odds(1.0, prior=START, late=LATE, fastest=FASTEST, limit=LIMIT)
    odds.observe(slopes.numpy(), gram.numpy())
    assert ours[0]["odds"].item() == pytest.approx(odds.odds, rel=1e-10)
    ((c, n),) = odds.seen
    np.testing.assert_allclose(ours[0]["slopes"], c, rtol=1e-10)
    np.testing.assert_allclose(ours[0]["gram"], n, rtol=1e-10)
    assert ours[1]["steps"] == 2


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def torchrun(split_dir, record_dir, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [str(ROOT / "train_bilevel.py"), "--split_dir", str(split_dir)]
    command += ["--record_dir", str(record_dir), "--backbone", "convnet", "--image_size", "16"]
    command += ["--feature_dim", "8", "--train_batch_size", "4", "--hyperstep", "2"]
    return subprocess.Popen(
        [*command, "--num_workers", "0", "--device", "cpu", "--cache_dir", "none", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def split_dir(tmp_path_factory):
    from auxilearn.data import cub
    from auxilearn.data.split import write_split
    from tests.cub_shape import write_cub_shape

    folder = tmp_path_factory.mktemp("distributed")
    root = write_cub_shape(folder / "data", classes=3, train_per_class=5, test_per_class=4)
    write_split(folder / "split", cub.read_annotations(root))
    return folder / "split"


def test_torchrun_trains_and_one_rank_writes(split_dir, tmp_path):
    process = torchrun(split_dir, tmp_path, "--epochs", "2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (run,) = (tmp_path / "full").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert out.strip().splitlines()[-1] == f"test accuracy: {summary['test_accuracy']:.4f}"
    assert out.count("test accuracy") == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    assert len(steps) == len(set(steps))
    assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [1, 2]
    states = torch.load(max(run.glob("step-*.pt")), weights_only=True)["state"]["margins"]
    counts = [state["count"] for state in states]
    assert (counts[0] + counts[1] == 2).all()  # each sample once an epoch, on either rank
    assert counts[0].max() > 0 < counts[1].max()
    assert (
        np.load(run / "margins.npy").tolist()
        == ((states[0]["total"] + states[1]["total"]) / 2).tolist()
    )


STOPPED = """
import os, signal
from auxilearn import register
from auxilearn.hypernet import Identity

class Stopped(Identity):
    calls = 0

    def before_lower_step(self, *args):
        self.calls += 1
        if self.calls == 3 and os.environ.get("STOP_AT_3") == os.environ["RANK"]:
            os.kill(os.getpid(), signal.SIGTERM)

register("stopped")(lambda problem: Stopped(0, problem.tasks))
"""


def test_resumed_between_two_rows_it_writes_the_same_rows(split_dir, tmp_path, monkeypatch):
    (tmp_path / "plugin.py").write_text(STOPPED)
    flags = ["--plugin", str(tmp_path / "plugin.py"), "--method", "stopped", "--epochs", "3"]

    def rows(name, *more):
        process = torchrun(split_dir, tmp_path, *flags, *more)
        _, err = process.communicate(timeout=120)
        found = (tmp_path / "full" / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in found]
        margins = np.load(tmp_path / "full" / name / "margins.npy").tolist()
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows], margins, err

    whole, margins, err = rows("whole", "--exp_name", "whole")
    assert [row["step"] for row in whole if row["kind"] == "step"] == [1, 10, 12], err
    monkeypatch.setenv("STOP_AT_3", "1")
    name = "train_stopped_seed5"
    _, early, err = rows(name)
    assert early != margins
    assert "stopped after step 4 of 12 as asked" in err  # where an epoch ends, ranks agree
    assert f"--exp_name {name}" in err
    assert "--exp_name None" not in err
    monkeypatch.delenv("STOP_AT_3")
    assert rows(name, "--exp_name", name, "--resume", "1")[:2] == (whole, margins)


def test_a_rank_that_dies_ends_the_run(split_dir, tmp_path):
    process = torchrun(split_dir, tmp_path, "--epochs", "100000")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("full/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    if not children.exists():
        process.kill()
        pytest.skip("the kernel does not list children")
    ranks = [int(pid) for pid in children.read_text().split()]
    dead = next(pid for pid in ranks if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(dead, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert (
        "another process of this run has ended" in err
        or f"Signal 9 (SIGKILL) received by PID {dead}" in err
    )
    assert "test accuracy" not in out
