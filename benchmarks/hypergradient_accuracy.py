"""Does the hypergradient predict how a change of the schedule changes the development loss?

  python benchmarks/hypergradient_accuracy.py
  python benchmarks/hypergradient_accuracy.py --optimizer sgd --lr 0.1

A small network is trained under a schedule on the scanned digits, some of them with wrong labels.
Then the schedule is perturbed in random directions, both ways, and the lower level runs for n steps
on the same batches. The difference of the two development losses is the outcome. The prediction is
the inner product of the direction with a hypergradient computed before these steps. The table shows
their correlation over the directions (Pearson, mean over seeds) for every solver and every n. A
correlation of 1 means that an upper step has the right direction, up to its length.

A direction is drawn factor by factor: each factor's part changes the logarithm of the weights by
the same root mean square.
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

from auxilearn.bilevel import Bilevel  # noqa: E402
from auxilearn.data.digits import INFORMATIVE  # noqa: E402
from auxilearn.hypernet import MonoJoint, TaskLosses, scheduled_loss  # noqa: E402
from auxilearn.implicit_diff import identity, neumann, preconditioned  # noqa: E402
from auxilearn.models import TaskHeads  # noqa: E402
from auxilearn.optim import adam_scale  # noqa: E402
from auxilearn.solvers import conjugate_gradient, exact  # noqa: E402
from auxilearn.stable import StableJoint  # noqa: E402

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
    """{title: solver}. A series of n - 1 terms at alpha = lr is n steps of gradient descent seen
    through, damping 1 / (lr n) about as many."""

    def seen_through(wrap):
        return {
            "identity": wrap(identity()),
            **{f"neumann, {n - 1} terms": wrap(neumann(args.lr, n - 1)) for n in args.horizons},
            **{
                f"cg, damping {1 / (args.lr * n):.3g}": wrap(
                    conjugate_gradient(1 / (args.lr * n), 50)
                )
                for n in args.horizons
            },
        }

    named = {"neumann, alpha 1e-4, 3 terms (released)": neumann(1e-4, 3)}
    named |= seen_through(lambda solver: solver)
    if not args.no_exact:
        named["exact, damping 1"] = exact(1.0)
    if args.optimizer == "adam":
        better = seen_through(lambda s: preconditioned(s, lambda: adam_scale(optimizer, theta)))
        named |= {f"{title}, preconditioned": solver for title, solver in better.items()}
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


def realised(args, model, scheduler, optimizer, shifts, stream, dev):
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
    for step in range(1, max(args.after) + 1):
        stepping.zero_grad()
        losses_of(dict(zip(names, stacked, strict=True)), both, next(stream)).sum().backward()
        stepping.step()
        if step in args.after:
            with torch.no_grad():
                ends = dev_losses_of(dict(zip(names, stacked, strict=True)), dev)
            found[step] = ends[: copies // 2] - ends[copies // 2 :]
    return found


def correlations(args, name, steps, seed):
    """{solver: [correlation at every n]} after ``steps`` lower steps, in the order of ``args``."""
    torch.manual_seed(seed)
    tasks = 1 + len(INFORMATIVE) + COINS
    sets = data(seed, args.corrupted_rate)
    model = Network(tasks, args.width)
    scheduler = SCHEDULES[name](0, tasks, args.width)
    theta = list(model.parameters())
    optimizer = build_optimizer(args, theta)
    stream = batches(sets["train"], args.batch, seed)
    bilevel = Bilevel(model, scheduler, optimizer)
    for _ in range(steps):
        bilevel.lower_step(next(stream))
    with torch.no_grad():
        outputs = model(sets["train"])
    generator = torch.Generator().manual_seed(seed)
    shifts = directions(scheduler, outputs, args.directions, generator)
    stream = batches(sets["train"], args.batch, seed + 1)
    truth = realised(args, model, scheduler, optimizer, shifts, stream, sets["dev"])
    found = {}
    for title, solver in solvers(args, optimizer, theta).items():
        bilevel.solver = solver
        hypergrads, _, _ = bilevel.hypergradient([sets["train"]], [sets["dev"]])
        predicted = sum(
            (shifts[key] * h).flatten(1).sum(dim=1)
            for (key, _), h in zip(scheduler.named_parameters(), hypergrads, strict=True)
        )
        found[title] = [_correlation(predicted, truth[n]) for n in args.after]
    return found


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
    parser.add_argument(
        "--horizons", type=int, nargs="+", default=[4, 10, 100], help="n that solvers see through"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="averaged over")
    parser.add_argument("--no_exact", action="store_true", help="leave out the dense solve")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    for name in SCHEDULES:
        for steps in args.steps:
            print(f"\n{name}, {args.optimizer} at {args.lr:g}, after {steps} steps")
            print(f"{'':45s}" + "".join(f"{f'n = {n}':>10s}" for n in args.after), flush=True)
            found = [correlations(args, name, steps, seed) for seed in args.seeds]
            for title in found[0]:
                means = np.mean([one[title] for one in found], axis=0)
                print(f"{title:45s}" + "".join(f"{mean:10.2f}" for mean in means), flush=True)


if __name__ == "__main__":
    main()
