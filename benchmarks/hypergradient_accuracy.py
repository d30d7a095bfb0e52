"""Does the hypergradient predict what a change of the schedule does to the development loss?

  python benchmarks/hypergradient_accuracy.py
  python benchmarks/hypergradient_accuracy.py --optimizer sgd --lr 0.1

A small network is trained on the scanned digits, with wrong labels among them, under a schedule.
From there, the schedule is perturbed in random directions, both ways, and the lower level runs on
for n steps with the same batches each time: the difference of the two development losses is what
really happened. A hypergradient computed before the first of these steps predicts it, as its inner
product with the direction. The table is the correlation of the two over the directions (Pearson),
for every solver and every n; a correlation of 1 means that an upper step goes where it should, up
to its length.

The directions are drawn factor by factor: each factor's changes the logarithm of the weights by the
same root mean square.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, vmap

sys.path.insert(0, str(Path(__file__).parents[1]))

from auxilearn.data.digits import INFORMATIVE  # noqa: E402
from auxilearn.hypernet import MonoJoint, StableJoint  # noqa: E402
from auxilearn.implicit_diff import (  # noqa: E402
    conjugate_gradient,
    exact,
    identity,
    neumann,
    preconditioned,
)
from auxilearn.models import TaskHeads  # noqa: E402
from auxilearn.optim import adam_scale  # noqa: E402
from auxilearn.upper_level import TaskLosses, UpperLevel, scheduled_loss  # noqa: E402

COINS = 8  # auxiliary tasks that are tied to nothing
SIZES = {"train": 500, "dev": 50}
SIZE = 0.01  # root mean square change of the logarithm of the weights, by each factor
SCHEDULES = {"joint": MonoJoint, "joint_stable": StableJoint}


class Network(nn.Module):
    """One hidden layer under all heads, smooth, without batch statistics; float64."""

    def __init__(self, tasks, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, width), nn.Tanh())
        self.heads = TaskHeads(width, [10] + [2] * (tasks - 1))

    def forward(self, batch):
        images, labels, sample_id = batch
        features = self.body(images)
        return TaskLosses(self.heads(features, labels), features, sample_id)


def data(seed, corrupted_rate):
    """{"train", "dev"}: (images (n, 64), labels (n, K), places (n,)); wrong digits in train."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    images, target = digits.images.reshape(-1, 64)[order] / 16, digits.target[order]
    known = [np.isin(target, list(having)) for having in INFORMATIVE.values()]
    coins = rng.integers(2, size=(COINS, len(target)))
    given = target.copy()
    drawn = np.flatnonzero(rng.random(SIZES["train"]) < corrupted_rate)
    given[drawn] = rng.integers(10, size=len(drawn))
    labels = torch.tensor(np.stack([given, *known, *coins], axis=1), dtype=torch.int64)
    images = torch.tensor(images)
    sets, start = {}, 0
    for name, size in SIZES.items():
        places = torch.arange(start, start + size)
        sets[name] = (images[places], labels[places], torch.arange(size))
        start += size
    return sets


def batches(train, size, seed):
    """Endless batches of ``train``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(len(train[0]), generator=generator).split(size):
            if len(places) == size:
                yield tuple(t[places] for t in train)


def build_optimizer(args, parameters):
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=args.lr)
    return torch.optim.SGD(parameters, lr=args.lr)


def solvers(args, optimizer, theta):
    """{name: solver}; Adam's own scale where it is the lower optimiser."""
    named = {
        "identity": identity(),
        **{f"neumann, alpha {a:g}, 3 terms": neumann(a, 3) for a in args.alphas},
        **{f"cg, damping {d:g}": conjugate_gradient(d, 50) for d in args.dampings},
        f"exact, damping {args.dampings[0]:g}": exact(args.dampings[0]),
    }
    if args.optimizer == "adam":

        def scale():
            return adam_scale(optimizer, theta)

        named |= {
            "identity, preconditioned": preconditioned(identity(), scale),
            **{
                f"neumann, alpha {a:g}, {n} terms, preconditioned": preconditioned(
                    neumann(a, n), scale
                )
                for a in args.alphas
                for n in (3, 30)
            },
            **{
                f"cg, damping {d:g}, preconditioned": preconditioned(
                    conjugate_gradient(d, 50), scale
                )
                for d in args.dampings
            },
        }
    return named


def directions(scheduler, outputs, count, generator):
    """``count`` random directions {name: (count, ...)}, each factor's at the size ``SIZE``."""
    phi = {name: p.detach() for name, p in scheduler.named_parameters()}

    def log_weights(values):
        shifted = {name: phi[name] + value for name, value in values.items()}
        with torch.no_grad():
            return _schedule(scheduler, phi | shifted, outputs).log()

    before = log_weights({})
    drawn = {}
    for name, value in phi.items():
        noise = torch.randn(count, *value.shape, generator=generator, dtype=value.dtype)
        change = torch.stack(
            [(log_weights({name: 1e-4 * one}) - before).square().mean() for one in noise]
        )
        if change.mean() > 0:
            drawn[name] = noise * (SIZE * 1e-4 / change.mean().sqrt())
        else:
            drawn[name] = torch.zeros_like(noise)
    return drawn


def _schedule(scheduler, phi, outputs):
    class Of(nn.Module):
        def __init__(self):
            super().__init__()
            self.scheduler = scheduler

        def forward(self):
            return self.scheduler.schedule(outputs.features, outputs.losses)

    return functional_call(Of(), {f"scheduler.{k}": v for k, v in phi.items()}, ())


def _loss_of(model, scheduler):
    """(theta, phi, batch) -> scheduled loss; (theta, batch) -> target loss. Both functional."""

    class Scheduled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.scheduler = model, scheduler

        def forward(self, batch):
            return scheduled_loss(self.scheduler, self.model(batch))

    both = Scheduled()

    def training(theta, phi, batch):
        named = {f"model.{k}": v for k, v in theta.items()}
        return functional_call(
            both, named | {f"scheduler.{k}": v for k, v in phi.items()}, (batch,)
        )

    def development(theta, batch):
        return functional_call(model, theta, (batch,)).losses[:, 0].mean()

    return training, development


def realised(args, model, scheduler, optimizer, shifts, train, dev, after):
    """{n: (count,)}: the development loss under phi + shift less that under phi - shift, after n
    more steps of the real optimiser. All copies step side by side, on the same batches."""
    phi = {name: p.detach() for name, p in scheduler.named_parameters()}
    both = {name: torch.cat([phi[name] + s, phi[name] - s]) for name, s in shifts.items()}
    copies = len(next(iter(both.values())))
    names, theta = zip(*model.named_parameters(), strict=True)
    stacked = [p.detach().expand(copies, *p.shape).clone().requires_grad_() for p in theta]
    stepping = build_optimizer(args, stacked)
    for copy, original in zip(stacked, theta, strict=True):
        for key, value in optimizer.state.get(original, {}).items():
            full = value.dim() > 0
            stepping.state[copy][key] = value.expand_as(copy).clone() if full else value.clone()
    training, development = _loss_of(model, scheduler)
    losses_of = vmap(training, in_dims=(0, 0, None))
    dev_losses_of = vmap(development, in_dims=(0, None))
    found = {}
    stream = batches(train, args.batch, args.seed + 1)
    for step in range(1, max(after) + 1):
        stepping.zero_grad()
        losses_of(dict(zip(names, stacked, strict=True)), both, next(stream)).sum().backward()
        stepping.step()
        if step in after:
            with torch.no_grad():
                ends = dev_losses_of(dict(zip(names, stacked, strict=True)), dev)
            found[step] = ends[: copies // 2] - ends[copies // 2 :]
    return found


def one_schedule(args, name, steps):
    """Rows (solver, [correlation at every n], residual) after ``steps`` lower steps."""
    torch.manual_seed(args.seed)
    tasks = 1 + len(INFORMATIVE) + COINS
    sets = data(args.seed, args.corrupted_rate)
    model = Network(tasks, args.width)
    scheduler = SCHEDULES[name](0, tasks, args.width)
    theta = list(model.parameters())
    optimizer = build_optimizer(args, theta)
    stream = batches(sets["train"], args.batch, args.seed)
    for _ in range(steps):
        optimizer.zero_grad()
        scheduled_loss(scheduler, model(next(stream))).backward(inputs=theta)
        optimizer.step()
    with torch.no_grad():
        outputs = model(sets["train"])
        hits = (
            model.heads.target_logits(outputs.features).argmax(1) == sets["train"][1][:, 0]
        ).sum()
    generator = torch.Generator().manual_seed(args.seed)
    shifts = directions(scheduler, outputs, args.directions, generator)
    truth = realised(
        args, model, scheduler, optimizer, shifts, sets["train"], sets["dev"], args.after
    )
    rows = []
    for title, solver in solvers(args, optimizer, theta).items():
        upper = UpperLevel(model, scheduler, solver)
        hypergrads, solution, dev_loss = upper.hypergradient([sets["train"]], [sets["dev"]])
        predicted = sum(
            (shifts[key] * h).flatten(1).sum(dim=1)
            for (key, _), h in zip(scheduler.named_parameters(), hypergrads, strict=True)
        )
        rows.append((title, [_correlation(predicted, truth[n]) for n in args.after], solution))
    return rows, dev_loss, hits.item() / SIZES["train"]


def _correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--corrupted_rate", type=float, default=0.4)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 300], help="before the test")
    parser.add_argument("--after", type=int, nargs="+", default=[1, 10, 100, 1000], help="n")
    parser.add_argument("--directions", type=int, default=64)
    parser.add_argument("--alphas", type=float, nargs="+", default=[1e-4, 1e-2, 1e-1])
    parser.add_argument("--dampings", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    for name in SCHEDULES:
        for steps in args.steps:
            rows, dev_loss, accuracy = one_schedule(args, name, steps)
            print(
                f"\n{name}, {args.optimizer} {args.lr:g}, after {steps} steps: development loss "
                f"{dev_loss:.3f}, {accuracy:.0%} of the given labels learned"
            )
            print(
                f"{'solver':45s}" + "".join(f"{f'n = {n}':>10s}" for n in args.after) + "  residual"
            )
            for title, correlations, solution in rows:
                cells = "".join(f"{c:10.2f}" for c in correlations)
                print(f"{title:45s}{cells}{solution.residual:10.2g}")


if __name__ == "__main__":
    main()
