"""Data cleaning: every solver's hypergradient against differences through the solved problem."""

import numpy as np
import pytest
import torch

from benchmarks import data_cleaning
from benchmarks.data_cleaning import CLASSES, DECAY, SOLVERS, Draw, Problem, digits, solved, trace

SAMPLES, FEATURES = 12, 3
EXACT = ["package: Neumann, 10 terms", "package: CG, 10 products", "package: CG, full batches"]
EXACT += ["stocBiO (Neumann)", "AmIGO (warm-started system)", "SOBA (one step each)"]
EXACT += ["AID-CG, full batches", "ITD (unrolling), full batches"]


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def part(n):
        x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
        return x, torch.randint(CLASSES, (n,), generator=generator)

    return Problem(part(SAMPLES), part(8), part(5), torch.ones(SAMPLES, dtype=torch.bool))


def newton(problem, lam):
    """The inner minimiser, by Newton's method with a dense Hessian."""
    flat = torch.zeros(FEATURES * CLASSES, dtype=torch.float64)
    ids = torch.arange(SAMPLES)

    def loss(flat):
        return problem.inner(flat.reshape(FEATURES, CLASSES), lam, ids)

    for _ in range(8):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        flat = flat - torch.linalg.solve(torch.autograd.functional.hessian(loss, flat), gradient)
    return flat.reshape(FEATURES, CLASSES)


def value(problem, lam):
    return problem.outer(newton(problem, lam), slice(None)).item()


def differences(problem, lam, size=1e-4):
    """The derivative of the value function, by central differences."""
    units = size * torch.eye(len(lam), dtype=torch.float64)
    return torch.tensor(
        [(value(problem, lam + u) - value(problem, lam - u)) / (2 * size) for u in units],
        dtype=torch.float64,
    )


def closed_form(problem, lam, inverse=True):
    """- (d^2 G / d lambda d theta) H^-1 dF/dtheta from softmax's formulas; without H^-1 on wish."""
    theta = newton(problem, lam)
    (x, y), (x_dev, y_dev) = problem.train, problem.dev
    weights = lam.sigmoid() / SAMPLES

    def errors(x, y):
        p = (x @ theta).softmax(dim=1)
        return p, p - torch.eye(CLASSES, dtype=torch.float64)[y]

    p, error = errors(x, y)
    v = (x_dev.T @ errors(x_dev, y_dev)[1] / len(y_dev)).flatten()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("n,nf,ng,ncd->fcgd", weights, x, x, curvature)
    hessian = hessian.reshape(len(v), len(v)) + 2 * DECAY * torch.eye(len(v), dtype=torch.float64)
    of_sample = (x[:, :, None] * error[:, None, :]).flatten(1)
    slopes = lam.sigmoid() * (1 - lam.sigmoid()) / SAMPLES
    return -slopes * (of_sample @ (torch.linalg.solve(hessian, v) if inverse else v))


def found(name, problem, **more):
    """d F / d lambda at lambda = 0, from how a solver's next upper step moves lambda.

    Batches are full, and earlier upper steps are too small to matter: so the lower level is solved,
    as are linear systems that are solved over many steps.
    """
    rate, steps = 1e-7, max(SOLVERS[name].steps)
    draw, how = Draw(problem, size=100), (0.3, rate, 1 if steps == 1 else 150)
    iterations = SOLVERS[name].run(problem, draw, *how, **more)
    for _ in range(400 if steps == 1 else 15):
        before = next(iterations)[2].clone()
    return (before - next(iterations)[2]) / rate


def test_closed_form_and_differences_agree(problem):
    lam = torch.linspace(-1, 2, SAMPLES, dtype=torch.float64)
    expected = differences(problem, lam)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(closed_form(problem, lam), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_hypergradients_at_the_exact_inner_solution(name, problem, monkeypatch):
    expected = closed_form(problem, torch.zeros(SAMPLES, dtype=torch.float64))
    monkeypatch.setattr(data_cleaning, "TERMS", 150)  # of the package's series
    terms = {"terms": 150} if name.startswith("stocBiO") else {}
    torch.testing.assert_close(found(name, problem, **terms), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["package: identity", "T1-T2 (identity)"])
def test_the_identity_leaves_out_the_hessian(name, problem):
    lam = torch.zeros(SAMPLES, dtype=torch.float64)
    expected = closed_form(problem, lam, inverse=False)
    torch.testing.assert_close(found(name, problem), expected, rtol=1e-5, atol=1e-9)


def test_the_packages_identity_is_t1_t2():
    """On the same batches, to rounding, at the same cost."""
    problem, how = digits(0), (0.3, 100.0, 1)
    runs = [
        SOLVERS[n].run(problem, Draw(problem), *how)
        for n in ("package: identity", "T1-T2 (identity)")
    ]
    for _ in range(5):
        one, two = map(next, runs)
        assert one[0] == two[0] == 3 * 64
        torch.testing.assert_close(one[1:], two[1:], rtol=1e-9, atol=1e-12)


def test_the_inner_problem_is_solved(problem):
    lam = torch.linspace(-1, 2, SAMPLES, dtype=torch.float64)
    exact = solved(problem, lam.sigmoid())
    torch.testing.assert_close(exact, newton(problem, lam), rtol=0, atol=1e-6)


def test_the_data():
    problem = digits(3)
    assert [len(y) for _, y in problem[:3]] == [1000, 250, 547]
    x, y = problem.train
    assert 0.5 < problem.clean.double().mean() < 0.6  # half, and a tenth of those redrawn: 0.55
    assert np.bincount(y).min() > 60
    spread = x.std(dim=0, correction=0)
    assert ((spread - 1).abs().lt(1e-9) | (spread == 0)).all() and x.mean(dim=0).abs().max() < 1e-9


def test_the_script(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    chart = tmp_path / "chart.png"
    small = ["--seeds", "1", "--tuning_count", "200", "--counts", "200", "400"]
    names = ["package: identity", "SOBA (one step each)"]
    monkeypatch.setattr(
        "sys.argv", ["x", *small, "--seconds", "0.01", "--solvers", *names, "--chart", str(chart)]
    )
    data_cleaning.main()
    out = capsys.readouterr().out
    assert out.count("| package: identity | ") == out.count("| SOBA (one step each) | ") == 3
    assert chart.stat().st_size > 0
    # The start has equal weights: its loss is the printed reference.
    assert "| all weights 1/2 (the start) | 1." in out


def test_checkpoints_count_the_operations():
    seen = []

    def run(problem, draw, *how):
        theta, lam = data_cleaning.start(problem)
        while True:
            seen.append(1)
            yield 150, theta.detach(), lam.detach()

    found, _ = trace(run, digits(1), (), 0, [100, 300, 301])
    assert list(found) == [100, 300, 301]
    assert len(seen) == 3
