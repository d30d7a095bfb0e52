"""How often a step reads from the device, for every method: on a GPU each read waits for it."""

import functools
import traceback
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_bilevel
from auxilearn import Bilevel, conjugate_gradient, identity, neumann
from auxilearn.hypernet import MonoJoint
from auxilearn.methods import METHODS
from auxilearn.run.config import LOG_EVERY
from auxilearn.stable import StableJoint
from tests import small
from tests.test_training import built, fit

aten = torch.ops.aten
# Operators whose result, or its size, the host has to know.
WAITING = {
    aten._local_scalar_dense.default,  # item(), float(), bool(), if tensor: ...
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
# Invisible to a mode where the device is the CPU. (numpy() is refused where it is not.)
READING = ("cpu", "tolist")


class Reads(TorchDispatchMode):
    """Counts reads of tensors, whatever device they are on; ``places`` says where."""

    def __init__(self):
        super().__init__()
        self.places = []

    @property
    def count(self):
        return len(self.places)

    def note(self):
        self.places.append("".join(traceback.format_stack(limit=8)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = function in WAITING
        if function in (aten.index.Tensor, aten.index_put_.default):
            masks = (torch.bool, torch.uint8)
            reads = any(i is not None and i.dtype in masks for i in args[1])
        if reads and not getattr(args[0], "of_host", False):
            self.note()
        result = function(*args, **kwargs or {})
        if function is aten.randint.default:  # of the host's generator
            result.of_host = True
        return result


@contextmanager
def reads_counted(monkeypatch):
    """A ``Reads`` that counts within the block."""
    with monkeypatch.context() as patch, Reads() as reads:

        def counted(function):
            @functools.wraps(function)
            def read(self, *args, **kwargs):
                # A tensor that was read by one of them is the host's.
                if not getattr(self, "of_host", False):
                    reads.note()
                result = function(self, *args, **kwargs)
                if isinstance(result, torch.Tensor):
                    result = result.clone()  # where the device is the CPU, cpu() copies nothing
                    result.of_host = True
                return result

            return read

        for name in READING:
            patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
        yield reads


def test_the_counter_sees_every_kind_of_read(monkeypatch):
    x = torch.arange(4.0)
    kinds = {
        "item": x[0].item,
        "float": lambda: float(x[0]),
        "if": lambda: 1 if x[0] > 0 else 2,
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "mask": lambda: x[x > 1],
        "nonzero": x.nonzero,
        "equal": lambda: torch.equal(x, x),
    }
    for name, read in kinds.items():
        with reads_counted(monkeypatch) as reads:
            read()
        assert reads.count == 1, (name, reads.places)
    with reads_counted(monkeypatch) as reads:
        (x[torch.tensor([0, 2])] + 1).sum().sqrt()
        torch.where(x > 1, x, 0.0).masked_fill_(x > 2, 1.0)
    assert reads.count == 0


@pytest.mark.parametrize("kind", ["labelled", "masked", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_reads_of_a_run(method, kind, tiny_config, tmp_path, monkeypatch):
    """Lower steps none, upper steps two, with their batches, rows and histories; a row of steps,
    a checkpoint and a validation one each. A model's first D is held against a backward pass."""
    given = {"corrupted": True, "corrupted_rate": 0.5}
    if kind != "labelled":
        given = {"labeled_per_class": 1} if kind == "masked" else {"precision": "bf16"}
    run = built(tiny_config(method=method, epochs=4, hyperstep=5, dev_epochs=2, **given))
    found = Counter()

    def counted(name, most):
        function = getattr(train_bilevel, name)

        def step(*args):
            with reads_counted(monkeypatch) as reads:
                result = function(*args)
            in_lower = method in ("gcs", "pcgrad_target") or METHODS[method].needs_dev
            first_d = not found[name] and name == ("lower_step" if in_lower else "upper_step")
            found[name] += 1
            assert reads.count <= most + first_d, "\n\n".join(reads.places)
            return result

        monkeypatch.setattr(train_bilevel, name, step)

    counted("lower_step", 0)
    counted("upper_step", 2)
    counted("evaluate", 1)
    fit(run, tmp_path / "run")
    assert found["lower_step"] == run.plan.total_steps > LOG_EVERY
    assert found["upper_step"] == run.plan.upper_steps(run.plan.total_steps)
    assert found["upper_step"] > 0 or not METHODS[method].bilevel


@pytest.mark.parametrize(
    ("solver", "most"),
    [(identity(), 1), (neumann(0.01, 5), 1), (conjugate_gradient(5.0, 4), 5)],
    ids=["identity", "neumann", "cg"],
)
@pytest.mark.parametrize("schedule", [MonoJoint, StableJoint])
def test_reads_of_a_solver(schedule, solver, most, monkeypatch):
    """One for the numbers of the step; conjugate gradients one more for every product. To solve for
    the target's weight reads nothing."""
    model, scheduler = small.Net().double(), schedule(0, small.K, small.D).double()
    lower = torch.optim.Adam(model.parameters(), fused=True)
    upper = torch.optim.SGD(scheduler.parameters(), lr=0.1)
    bilevel = Bilevel(model, scheduler, lower, upper, solver=solver, max_norm=1.0)
    batches = [
        small.batch(size)._replace(x=torch.randn(size, small.INPUT).double()) for size in (5, 6)
    ]
    with reads_counted(monkeypatch) as reads:
        bilevel.lower_step(batches[0])
    assert reads.count == 0
    for first_d in (1, 0):
        with reads_counted(monkeypatch) as reads:
            result = bilevel.upper_step(batches, batches)
        assert reads.count == most + first_d
    if schedule is StableJoint:
        assert scheduler.balance.steps == 2
    assert isinstance(result.dev_loss, float) and isinstance(result.solution.residual, float)
