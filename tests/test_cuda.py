"""What only a GPU can show. Skipped where there is none; benchmarks/on_gpu.sh runs it."""

import copy
import dataclasses
import math
import subprocess
import sys

import pytest
import torch

import train_bilevel
from auxilearn import Bilevel, conjugate_gradient, exact, identity, neumann
from auxilearn.backbones import build_backbone
from auxilearn.data.views import Resizer
from auxilearn.errors import DivergenceError
from auxilearn.hypernet import MonoJoint
from auxilearn.implicit_diff import preconditioned
from auxilearn.methods import METHODS
from auxilearn.models import Batch, TaskModel
from auxilearn.optim import adam_scale
from auxilearn.run.state import State
from auxilearn.stable import StableJoint
from tests import small
from tests.conftest import ROOT, Run, assert_same_run, gpu, tiny_flags
from tests.test_training import built, fit
from tests.test_views import RAGGED, boxes_of, windows_of

pytestmark = gpu

PRECISIONS = ("tf32", "fp32", "bf16")
# Relative differences of a first loss from the CPU's in float32, by the rounding of the backbone.
TOLERANCE = {"tf32": 1e-2, "fp32": 1e-4, "bf16": 5e-2}


def on(device, batch):
    """A batch (a named tuple of tensors) on a device."""
    return type(batch)(*(None if entry is None else entry.to(device) for entry in batch))


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_six_steps_of_every_method(method, precision, tiny_config, tmp_path, log_every):
    log_every(1)
    settings = {"method": method, "max_steps": 6, "epochs": 3, "hyperstep": 3, "upper_lr": 1e-2}
    run = fit(built(tiny_config(**settings, device="cuda", precision=precision)), tmp_path / "gpu")
    steps, uppers = run.rows_of("step"), run.rows_of("upper")
    assert [row["step"] for row in steps if row["phase"] == "training"] == [1, 2, 3, 4, 5, 6]
    assert len(uppers) == (2 if METHODS[method].bilevel else 0)
    numbers = [v for row in run.rows for v in row.values() if isinstance(v, float)]
    assert all(math.isfinite(number) for number in numbers)
    # The first step is that of the CPU: the same weights, samples and views.
    expected = fit(built(tiny_config(**settings, precision="fp32")), tmp_path / "cpu").rows[0]
    names = {"loss", "target_loss", "aux_loss"}
    if method == "gcs":  # a cosine near zero may change its sign, and a whole task comes or goes
        names.remove("loss")
    for name in names:
        assert steps[0][name] == pytest.approx(expected[name], rel=TOLERANCE[precision]), name


@pytest.mark.parametrize("masked", [False, True], ids=["labelled", "masked"])
def test_images_on_the_device_change_nothing(masked, tiny_config, tmp_path):
    """The same batches whether the pixels are decoded, cached, or lie on the device."""
    settings = {"device": "cuda", "labeled_per_class": int(masked)}
    runs = [
        built(tiny_config(**settings, cache_dir=cache))
        for cache in ("none", str(tmp_path / "cache"))
    ]
    for one, other, _ in zip(*(run.lower_batches(0) for run in runs), range(6), strict=False):
        for entry, same in zip(one, other, strict=True):
            assert (entry is None and same is None) or torch.equal(entry, same)
            assert entry is None or entry.is_cuda


@pytest.mark.parametrize("method", ["joint", "joint_stable", "uncertainty", "gcs"])
def test_resumed_to_the_same_bits_where_cudnn_is_deterministic(
    method, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    settings = {"method": method, "device": "cuda", "save_every": 1, "exp_name": "run"}
    places = [str(tmp_path / name) for name in ("whole", "cut")]
    whole, cut = (tiny_config(**settings, record_dir=place) for place in places)
    train_bilevel.train(whole)
    save, kept = State.save_and_stop, []

    def killed(state, step, stop):
        save(state, step, stop)
        kept.append(step)
        if len(kept) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(State, "save_and_stop", killed)
        train_bilevel.train(cut)
    train_bilevel.train(dataclasses.replace(cut, resume=True))
    assert_same_run(*(Run(f"{place}/full/run") for place in places))


def test_one_rank_of_nccl_is_a_run_alone(tiny_split, tmp_path):
    """torchrun with one process: collectives run, and change nothing."""
    places = {"split_dir": tiny_split, "exp_name": "run", "device": "cuda", "max_steps": 4}
    runs = []
    for name, launcher in (("alone", []), ("nccl", ["-m", "torch.distributed.run"])):
        flags = tiny_flags(**places, record_dir=tmp_path / name)
        process = subprocess.run(
            [sys.executable, *launcher, "train_bilevel.py", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        runs.append(Run(tmp_path / name / "full" / "run"))
    one, other = (run.rows_of("step") for run in runs)
    for name in ("loss", "target_loss", "aux_loss"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in other], rel=1e-3)


def test_a_run_ends_before_a_checkpoint_holds_what_is_not_finite(tiny_config, monkeypatch):
    step, taken = Bilevel.lower_step, []

    def poisoned(self, *args):
        taken.append(1)
        result = step(self, *args)
        return result._replace(loss=result.loss * math.nan) if len(taken) == 2 else result

    monkeypatch.setattr(Bilevel, "lower_step", poisoned)
    with pytest.raises(DivergenceError, match="diverged at step 2: "):
        train_bilevel.train(tiny_config(method="common", device="cuda", exp_name="run"))


# --------------------------------------------------------------------------------------------------
# Hypergradients and views, beside the CPU's
# --------------------------------------------------------------------------------------------------

SOLVERS = {
    "identity": identity(),
    "neumann": neumann(0.05, 4),
    "cg": conjugate_gradient(5.0, 6),
    "exact": exact(2.0),
}


@pytest.mark.parametrize("solver", [*SOLVERS, "preconditioned"])
@pytest.mark.parametrize("masked", [False, True], ids=["labelled", "masked"])
def test_hypergradients_in_float64(solver, masked, float64):
    """Those of a small network, after a step of Adam."""
    model = small.Net()
    scheduler = small.drawn(MonoJoint(0, small.K, small.D))
    train, dev = [small.batch(8, masked), small.batch(7, masked)], [small.batch(6)]
    assert_same_hypergradient(model, scheduler, train, dev, solver)


@pytest.mark.parametrize("solver", ["identity", "neumann", "cg", "preconditioned"])
def test_hypergradients_of_a_convolutional_network_in_float64(solver, float64):
    """Through the closed forms of batch norm and convolutions."""
    counts = [5, 2, 2, 3]
    model = TaskModel(build_backbone("convnet", 16), 16, counts).double()
    scheduler = small.drawn(StableJoint(0, 4, 16))

    def batch(size):
        labels = torch.stack([torch.randint(count, (size,)) for count in counts], dim=1)
        images = torch.randint(256, (size, 3, 24, 24), dtype=torch.uint8)
        return Batch(images, labels, torch.arange(size))

    train, dev = [batch(10)], [batch(6), batch(6)]
    assert_same_hypergradient(model, scheduler, train, dev, solver)


def assert_same_hypergradient(model, scheduler, train, dev, solver):
    found = []
    for device in ("cpu", "cuda"):
        theta = copy.deepcopy(model).to(device)
        lower = torch.optim.Adam(theta.parameters(), lr=1e-3, fused=True)
        levels = Bilevel(theta, copy.deepcopy(scheduler).to(device), lower)
        levels.lower_step(on(device, train[0]))
        levels.solver = SOLVERS.get(solver) or preconditioned(
            identity(), lambda lower=lower, theta=theta: adam_scale(lower, theta.parameters())
        )
        batches = ([on(device, batch) for batch in some] for some in (train, dev))
        gradient, solution, dev_loss = levels.hypergradient(*batches)
        found.append(([t.cpu() for t in gradient], solution.residual, dev_loss))
    (expected, residual, loss), (actual, residual_too, loss_too) = found
    scale = max(t.abs().max() for t in expected)
    assert scale > 1e-6  # the comparison is not of zeros
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= 1e-8 * scale
    assert residual_too == pytest.approx(residual, rel=1e-8)
    assert loss_too == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("size", RAGGED)
def test_views_are_those_of_the_cpu(size):
    """To the bit, since the products are exact; torch's own resize is a grey level away."""
    boxes = boxes_of(*RAGGED[size])
    windows, there = windows_of(boxes), torch.from_numpy(boxes)
    here = Resizer(size, boxes[:, 2:4].max(), "cpu")
    views = Resizer(size, boxes[:, 2:4].max(), "cuda").products(windows.cuda(), there.cuda()).cpu()
    assert torch.equal(views, here.products(windows, there))
    assert (views.int() - here.one_by_one(windows, boxes).int()).abs().max() <= 1
