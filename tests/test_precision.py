"""--precision: what computes in which number format, and that no run leaves it to the next."""

import pytest
import torch
from torch import nn

import train_bilevel
from auxilearn.data.split import load_split
from auxilearn.run.build import build
from auxilearn.run.config import resolve
from tests.conftest import assert_one_error_line, assert_same_run


@pytest.fixture(autouse=True)
def _as_before():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def built(tiny_config, tiny_split):
    def make(**changes):
        split = load_split(str(tiny_split))
        return build(resolve(tiny_config(**changes), split), split)

    return make


@pytest.mark.parametrize(("precision", "tf32"), [("tf32", True), ("fp32", False), ("bf16", False)])
def test_a_run_sets_all_of_it(precision, tf32, built):
    torch.backends.cudnn.allow_tf32 = not tf32
    torch.set_float32_matmul_precision("medium")
    built(precision=precision)
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_what_pytorch_does_by_itself(built):
    assert built().config.precision == "tf32"
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_on_the_cpu_tf32_is_float32_and_no_run_leaves_its_precision_behind(tiny_run):
    settings = {"method": "joint", "upper_lr": 0.1, "main_lr": 2e-3}
    tf32, bf16, fp32 = (tiny_run(**settings, precision=p) for p in ("tf32", "bf16", "fp32"))
    assert_same_run(tf32, fp32)
    losses = [[row["loss"] for row in run.rows_of("step")] for run in (tf32, bf16)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_backbone_alone_is_in_bfloat16_in_both_levels(precision, dtype, built):
    run = built(method="joint", precision=precision)
    seen = {"lower": set(), "upper": set()}
    level = "lower"
    heads = run.bilevel.model.heads.linear
    for module in run.bilevel.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *call: seen[level].add(call[2].dtype))
    in_heads = set()
    heads.register_forward_hook(lambda *call: in_heads.add(call[2].dtype))
    result = run.bilevel.lower_step(next(run.lower_batches(after=0)))
    level = "upper"
    run.bilevel.upper_step(*next(run.upper_batches(after=0)))
    assert seen == {"lower": {dtype}, "upper": {dtype}}
    assert in_heads == {torch.float32}
    assert {t.dtype for t in result.outputs[:2]} == {torch.float32}  # losses, features
    parameters = [*run.bilevel.model.parameters(), *run.bilevel.scheduler.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--precision", "fp16"], "invalid choice: 'fp16'"),
        (["--amp", "bf16"], "unrecognized arguments: --amp"),
        (["--tf32", "1"], "unrecognized arguments: --tf32"),
    ],
)
def test_an_unknown_precision_is_one_line(flags, part, command):
    code, _, err = command(train_bilevel.main, *flags)
    assert code == 2
    assert_one_error_line(err, part)
