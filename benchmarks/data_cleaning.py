"""Data cleaning: learn a weight per training sample, half of whose labels are wrong.

  python benchmarks/data_cleaning.py > data_cleaning.md
  python benchmarks/data_cleaning.py --chart data_cleaning.png

The problem is the one of benchopt's benchmark_bilevel (Franceschi et al., ICML 2017; Dagréou et
al., NeurIPS 2022), on other data: scikit-learn's 1,797 scanned digits of 8 x 8 pixels, not MNIST.

    inner  G(theta, lambda) = mean_i sigmoid(lambda_i) CE(theta; x_i, y_i) + 0.2 |theta|^2
    outer  F(theta) = mean CE on clean development samples

theta is a linear model without bias, pixels are standardised, and each training label is redrawn
from all ten classes with probability 0.5. The metrics are F and the test accuracy at the exact
minimiser of G. This package's solvers stand beside published ones, which are written here from the
papers' formulas. Costs are counted per sample: gradients, Hessian-vector products and mixed
products. Seconds are the process's own, on one thread, without the evaluations.

Every solver has 24 candidates: 3 lower step sizes, 4 upper ones, and 1 or 10 lower steps for each
upper step (T1-T2 and SOBA take 1 by definition, and have 12). The one with the lowest F there
after 100,000 operations on a tuning seed is run on the other seeds.
"""

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from auxilearn import (  # noqa: E402
    Bilevel,
    HyperNet,
    TaskLosses,
    adam_scale,
    conjugate_gradient,
    identity,
    neumann,
    preconditioned,
)
from auxilearn.errors import Parser, run_script  # noqa: E402
from auxilearn.run.record import processor  # noqa: E402

CLASSES, DECAY, WRONG = 10, 0.2, 0.5
TRAIN, DEV = 1000, 250  # and 547 for the test
BATCH, TERMS = 64, 10  # products with H per upper step


class Problem(NamedTuple):
    """Inputs (n, p) and labels (n,) of the three sets; ``clean``: which training labels are."""

    train: tuple
    dev: tuple
    test: tuple
    clean: Tensor

    def inner(self, theta, lam, ids):
        x, y = self.train
        losses = F.cross_entropy(x[ids] @ theta, y[ids], reduction="none")
        return (lam[ids].sigmoid() * losses).mean() + DECAY * theta.square().sum()

    def outer(self, theta, ids):
        x, y = self.dev
        return F.cross_entropy(x[ids] @ theta, y[ids])


def digits(seed):
    """The ``Problem`` of a seed, in float64."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    x, y = x[order], y[order]
    mean, std = x[:TRAIN].mean(axis=0), x[:TRAIN].std(axis=0)
    x = (x - mean) / np.where(std > 0, std, 1)
    given, redrawn = y.copy(), np.flatnonzero(rng.random(TRAIN) < WRONG)
    given[redrawn] = rng.integers(CLASSES, size=len(redrawn))
    x, clean = torch.from_numpy(x), torch.from_numpy(given == y)[:TRAIN]
    sets = [slice(0, TRAIN), slice(TRAIN, TRAIN + DEV), slice(TRAIN + DEV, None)]
    return Problem(*((x[s], torch.from_numpy(given)[s]) for s in sets), clean)


def solved(problem, weights, start=None):
    """The minimiser theta (p, C) of the inner problem at the samples' ``weights`` (n,)."""
    x, y = (t.numpy() for t in problem.train)
    weights = weights.numpy() / len(y)
    shape = x.shape[1], CLASSES
    rows = np.arange(len(y))

    def value_and_gradient(flat):
        theta = flat.reshape(shape)
        log_p = log_softmax(x @ theta, axis=1)
        value = -weights @ log_p[rows, y] + DECAY * (flat @ flat)
        error = np.exp(log_p)
        error[rows, y] -= 1
        return value, (x.T @ (weights[:, None] * error) + 2 * DECAY * theta).ravel()

    start = np.zeros(shape) if start is None else start.numpy()
    options = {"gtol": 1e-9, "ftol": 0, "maxiter": 2000, "maxcor": 30}
    found = minimize(
        value_and_gradient, start.ravel(), jac=True, method="L-BFGS-B", options=options
    )
    return torch.from_numpy(found.x.reshape(shape))


class Draw:
    """Places of random batches, a tensor of at most ``size`` each."""

    def __init__(self, problem, size=BATCH, seed=0):
        self.sizes, self.size = [len(s[1]) for s in problem[:2]], size
        self.generator = torch.Generator().manual_seed(seed)

    def train(self):
        return torch.randperm(self.sizes[0], generator=self.generator)[: self.size]

    def dev(self):
        return torch.randperm(self.sizes[1], generator=self.generator)[: self.size]


# --------------------------------------------------------------------------------------------------
# This package. All solvers are generators of (per-sample operations of the upper iteration, theta,
# lambda); lr and rate are the step sizes of the lower and upper level.
# --------------------------------------------------------------------------------------------------


class LinearModel(nn.Module):
    """The target is task 0; task 1 is the penalty, the same for every sample."""

    def __init__(self, features):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(features, CLASSES, dtype=torch.float64))

    def forward(self, batch):
        x, y, ids = batch
        losses = F.cross_entropy(x @ self.theta, y, reduction="none")
        penalty = DECAY * self.theta.square().sum()
        return TaskLosses(torch.stack([losses, penalty.expand_as(losses)], dim=1), sample_id=ids)


class SampleWeights(HyperNet):
    """sigmoid(lambda_i) on the target's loss of sample i, 1 on the penalty."""

    def __init__(self, samples):
        super().__init__(main_task=0, input_dim=2)
        self.lam = nn.Parameter(torch.zeros(samples, dtype=torch.float64))

    def scheduled_loss(self, losses, seen):
        target, penalty = losses.unbind(dim=1)
        return (self.lam[seen.sample_id].sigmoid() * target).mean() + penalty.mean()


def package(solver_of, optimizer=torch.optim.SGD, full=False):
    """A run of this package with the solver ``solver_of(lower step size, Bilevel)``.

    ``optimizer``: of both levels; ``full``: batches are full.
    """

    def run(problem, draw, lr, rate, steps):
        draw = Draw(problem, size=max(draw.sizes)) if full else draw
        model, scheduler = LinearModel(problem.train[0].shape[1]), SampleWeights(draw.sizes[0])
        lower = optimizer(model.parameters(), lr)
        bilevel = Bilevel(model, scheduler, lower, optimizer(scheduler.parameters(), rate))
        bilevel.solver = solver_of(lr, bilevel)

        def batch(part, ids):
            return part[0][ids], part[1][ids], ids

        while True:
            for _ in range(steps):
                bilevel.lower_step(batch(problem.train, draw.train()))
            train, dev = draw.train(), draw.dev()
            step = bilevel.upper_step([batch(problem.train, train)], [batch(problem.dev, dev)])
            products = steps + step.solution.products + 1
            yield products * len(train) + len(dev), model.theta.detach(), scheduler.lam.detach()

    return run


def _adam_identity(lr, bilevel):
    return preconditioned(identity(), lambda: adam_scale(bilevel.lower, bilevel.model.parameters()))


# --------------------------------------------------------------------------------------------------
# Published solvers
# --------------------------------------------------------------------------------------------------


def start(problem):
    """theta and lambda: zeros, of which autograd computes derivatives."""
    (x, y), zeros = problem.train, {"dtype": torch.float64, "requires_grad": True}
    return torch.zeros(x.shape[1], CLASSES, **zeros), torch.zeros(len(y), **zeros)


def lower_step(problem, theta, lam, ids, lr):
    (gradient,) = torch.autograd.grad(problem.inner(theta, lam, ids), theta)
    theta.data -= lr * gradient


def outer_gradient(problem, theta, ids):
    return torch.autograd.grad(problem.outer(theta, ids), theta)[0]


def products(problem, theta, lam, ids):
    """u -> H u and u -> (d^2 G / d lambda d theta) u on a batch, by double backward."""
    (g,) = torch.autograd.grad(problem.inner(theta, lam, ids), theta, create_graph=True)

    def along(variable):
        return lambda u: torch.autograd.grad(g, variable, u, retain_graph=True)[0]

    return along(theta), along(lam)


def t1_t2(problem, draw, lr, rate, steps=1):
    """Luketina et al. 2016: one step on each level, H replaced by the identity."""
    theta, lam = start(problem)
    while True:
        lower_step(problem, theta, lam, draw.train(), lr)
        train, dev = draw.train(), draw.dev()
        _, mixed = products(problem, theta, lam, train)
        lam.data += rate * mixed(outer_gradient(problem, theta, dev))
        yield 2 * len(train) + len(dev), theta.detach(), lam.detach()


def stocbio(problem, draw, lr, rate, steps, terms=TERMS):
    """Ji et al. 2021: a Neumann series whose every product has a batch of its own."""
    theta, lam = start(problem)
    while True:
        for _ in range(steps):
            lower_step(problem, theta, lam, draw.train(), lr)
        dev, train = draw.dev(), draw.train()
        term = outer_gradient(problem, theta, dev)
        total = term.clone()
        for _ in range(terms):
            hvp, _ = products(problem, theta, lam, draw.train())
            term = term - lr * hvp(term)
            total += term
        _, mixed = products(problem, theta, lam, train)
        lam.data += rate * mixed(lr * total)
        yield (steps + terms + 1) * len(train) + len(dev), theta.detach(), lam.detach()


def amigo(problem, draw, lr, rate, steps, terms=TERMS):
    """Arbel and Mairal 2022: SGD on the linear system H u = dF/dtheta, from the last solution."""
    theta, lam = start(problem)
    u = torch.zeros_like(theta)
    while True:
        for _ in range(steps):
            lower_step(problem, theta, lam, draw.train(), lr)
        dev, train = draw.dev(), draw.train()
        v = outer_gradient(problem, theta, dev)
        for _ in range(terms):
            hvp, _ = products(problem, theta, lam, draw.train())
            u = u - lr * (hvp(u) - v)
        _, mixed = products(problem, theta, lam, train)
        lam.data += rate * mixed(u)
        yield (steps + terms + 1) * len(train) + len(dev), theta.detach(), lam.detach()


def soba(problem, draw, lr, rate, steps=1):
    """Dagréou et al. 2022: one step on theta, on the linear system and on lambda, on one batch."""
    theta, lam = start(problem)
    u = torch.zeros_like(theta)
    while True:
        train, dev = draw.train(), draw.dev()
        (g,) = torch.autograd.grad(problem.inner(theta, lam, train), theta, create_graph=True)
        hu, mixed = torch.autograd.grad(g, (theta, lam), u)
        v = outer_gradient(problem, theta, dev)
        theta.data -= lr * g.detach()
        u = u - lr * (hu - v)
        lam.data += rate * mixed
        yield 3 * len(train) + len(dev), theta.detach(), lam.detach()


def aid_cg(problem, draw, lr, rate, steps, terms=TERMS):
    """Pedregosa 2016, Grazzi et al. 2020: full batches, conjugate gradients for H u = v."""
    theta, lam = start(problem)
    train, dev = map(torch.arange, draw.sizes)
    while True:
        for _ in range(steps):
            lower_step(problem, theta, lam, train, lr)
        v = outer_gradient(problem, theta, dev)
        hvp, mixed = products(problem, theta, lam, train)
        u, left, direction = torch.zeros_like(v), v, v
        for _ in range(terms):
            product = hvp(direction)
            square = left.square().sum()
            step = square / (direction * product).sum()
            u, left = u + step * direction, left - step * product
            direction = left + left.square().sum() / square * direction
        lam.data += rate * mixed(u)
        yield (steps + terms + 1) * len(train) + len(dev), theta.detach(), lam.detach()


def itd(problem, draw, lr, rate, steps):
    """Franceschi et al. 2017, Shaban et al. 2019: backpropagation through ``steps`` full steps."""
    theta, lam = start(problem)
    train, dev = map(torch.arange, draw.sizes)
    while True:
        unrolled = theta
        for _ in range(steps):
            loss = problem.inner(unrolled, lam, train)
            (gradient,) = torch.autograd.grad(loss, unrolled, create_graph=True)
            unrolled = unrolled - lr * gradient
        (gradient,) = torch.autograd.grad(problem.outer(unrolled, dev), lam)
        theta.data = unrolled.detach()
        lam.data -= rate * gradient
        # Backward, a step is a Hessian-vector product and a mixed one.
        yield 3 * steps * len(train) + len(dev), theta.detach(), lam.detach()


class Solver(NamedTuple):
    """``run``, and its candidates for the step sizes and the number of lower steps."""

    run: Callable
    lrs: tuple = (0.1, 0.3, 1.0)
    rates: tuple = (100.0, 1000.0, 10_000.0, 100_000.0)
    steps: tuple = (1, 10)


FULL = (1000.0, 10_000.0, 100_000.0, 1_000_000.0)  # a sample's share of a full batch is smaller
SOLVERS = {
    "package: identity": Solver(package(lambda *_: identity())),
    "package: Neumann, 10 terms": Solver(package(lambda lr, _: neumann(lr, TERMS, "alpha"))),
    "package: CG, 10 products": Solver(package(lambda *_: conjugate_gradient(0.0, TERMS))),
    "package: CG, full batches": Solver(
        package(lambda *_: conjugate_gradient(0.0, TERMS), full=True), rates=FULL
    ),
    "package: preconditioned identity, Adam": Solver(
        package(_adam_identity, torch.optim.Adam), (0.001, 0.003, 0.01), (0.1, 0.3, 1.0, 3.0)
    ),
    "T1-T2 (identity)": Solver(t1_t2, steps=(1,)),
    "stocBiO (Neumann)": Solver(stocbio),
    "AmIGO (warm-started system)": Solver(amigo),
    "SOBA (one step each)": Solver(soba, steps=(1,)),
    "AID-CG, full batches": Solver(aid_cg, rates=FULL),
    "ITD (unrolling), full batches": Solver(itd, rates=FULL),
}


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Development loss and test accuracy of the exact inner solution."""

    value: float
    accuracy: float


def measure(problem, theta, lam):
    if not (theta.isfinite().all() and lam.isfinite().all()):
        return Point(float("inf"), float("nan"))
    exact = solved(problem, lam.sigmoid(), theta)
    return at(problem, exact)


def at(problem, theta):
    """The ``Point`` of an exact inner solution."""
    x, y = problem.test
    right = ((x @ theta).argmax(dim=1) == y).double().mean().item()
    return Point(problem.outer(theta, slice(None)).item(), right)


def trace(run, problem, how, seed, counts, seconds=()):
    """{checkpoint: the ``Point`` of the first state there or beyond}, milliseconds per upper step.

    Checkpoints are ``counts`` of per-sample operations and ``seconds`` of processor time.
    """
    left = {"count": list(counts), "second": list(seconds)}
    found, taken = {}, 0
    spent = {"count": 0, "second": 0.0}
    iterations = run(problem, Draw(problem, seed=seed), *how)
    while any(left.values()):
        before = time.process_time()
        count, theta, lam = next(iterations)
        spent["second"] += time.process_time() - before
        spent["count"] += count
        taken += 1
        due = [left[k].pop(0) for k in left for _ in left[k][:] if left[k][0] <= spent[k]]
        if due:
            point = measure(problem, theta, lam)
            found |= dict.fromkeys(due, point)
            if not np.isfinite(point.value):
                found |= dict.fromkeys([*left["count"], *left["second"]], point)
                break
    return found, 1e3 * spent["second"] / taken


def chosen(solver, seed, count):
    """(lr, rate, steps) of the best candidate on a tuning ``seed``."""
    problem = digits(seed)
    tried = {
        how: trace(solver.run, problem, how, seed, [count])[0][count].value
        for how in itertools.product(solver.lrs, solver.rates, solver.steps)
    }
    return min(tried, key=tried.get)


def references(seeds):
    """{title: [``Point`` by seed]} of fixed weights, with theta solved exactly."""
    found = {}
    for problem in map(digits, seeds):
        for title, weights in (
            ("all weights 1/2 (the start)", torch.full((TRAIN,), 0.5, dtype=torch.float64)),
            ("weight 1 on right labels, 0 on wrong ones", problem.clean.double()),
        ):
            found.setdefault(title, []).append(at(problem, solved(problem, weights)))
    return found


def table(title, checkpoints, found, text):
    """A Markdown table of what ``text`` makes of the seeds' ``Point``s."""
    lines = [f"| {title} | {' | '.join(checkpoints.values())} |"]
    lines.append(f"|---|{'--:|' * len(checkpoints)}")
    for name, by_seed in found.items():
        cells = [text([points[at] for points in by_seed]) for at in checkpoints]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def values(points):
    return f"{np.mean([p.value for p in points]):.4f}"


def accuracies(points):
    return f"{100 * np.mean([p.accuracy for p in points]):.1f}"


def draw_chart(path, args, found):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for i, (name, by_seed) in enumerate(found.items()):
        line = "-" if name.startswith("package") else "--"
        for axes, checkpoints in zip(panels, (args.counts, args.seconds), strict=True):
            means = [np.mean([points[at].value for points in by_seed]) for at in checkpoints]
            axes.plot(checkpoints, means, line, color=f"C{i % 5}", marker="os^"[i // 5], label=name)
    panels[0].set(xscale="log", xlabel="operations", ylabel="development loss")
    panels[1].set(xscale="log", xlabel="seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    figure.savefig(path, dpi=90)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tuning_seed", type=int, default=101)
    parser.add_argument("--tuning_count", type=int, default=100_000)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000])
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--solvers", nargs="+", choices=tuple(SOLVERS), default=tuple(SOLVERS))
    parser.add_argument("--chart", type=Path, metavar="FILE", help="also a chart (matplotlib)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, choices = {}, []
    for name in args.solvers:
        solver = SOLVERS[name]
        how = chosen(solver, args.tuning_seed, args.tuning_count)
        traces = [
            trace(solver.run, digits(seed), how, seed, args.counts, args.seconds)
            for seed in args.seeds
        ]
        found[name], times = map(list, zip(*traces, strict=True))
        edges = [{c[0], c[-1]} for c in solver[1:3]]
        marked = [f"{h:g}{'*' * (h in edge)}" for h, edge in zip(how, edges, strict=False)]
        cells = [name, *marked, str(how[2]), f"{np.median(times):.2f}"]
        choices.append(f"| {' | '.join(cells)} |")
        print(choices[-1], file=sys.stderr, flush=True)
    print(f"{len(args.seeds)} seeds, {processor()}, torch {torch.__version__}.\n")
    print("| fixed weights | development loss | test accuracy, % |\n|---|--:|--:|")
    for title, points in references(args.seeds).items():
        print(f"| {title} | {values(points)} | {accuracies(points)} |")
    columns = {c: f"{c:,}" for c in args.counts} | {s: f"{s:g} s" for s in args.seconds}
    print(f"\n{table('development loss', columns, found, values)}")
    print(f"\n{table('test accuracy, %', columns, found, accuracies)}")
    print(
        "\n| chosen (*: at the edge) | lower step size | upper | lower steps | ms per upper step |"
    )
    print("|---|--:|--:|--:|--:|")
    print("\n".join(choices))
    if args.chart:
        draw_chart(args.chart, args, found)


if __name__ == "__main__":
    run_script(main)
