"""The rivals' numbers, against their papers' formulas written out in float64.

References take a gradient per sample and task in a loop, and use nothing of the package.
"""

import copy
import io
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import inspect_schedule
from auxilearn import Bilevel, TaskLosses, schedule_weights
from auxilearn.baselines.autolambda import AutoLambda
from auxilearn.baselines.dwa import DynamicWeightAverage
from auxilearn.baselines.l2rw import LearningToReweight
from auxilearn.baselines.mwn import MetaWeightNet
from auxilearn.baselines.pcgrad_target import TargetProjection
from auxilearn.baselines.slgrad import SampleLevelGradients
from auxilearn.methods import METHODS
from auxilearn.run.processes import Ranks, leaving
from tests.conftest import assert_one_error_line, same_bits
from tests.small import ReverseOnly

pytestmark = pytest.mark.usefixtures("float64")
K, INPUT, D, CLASSES = 4, 5, 6, (3, 2, None, 2)  # task 2 is a real number
LR, AUX, SAMPLES = 0.2, 0.5, 14  # a factor on auxiliary losses that shows where it belongs
RIVALS = {
    "l2rw": LearningToReweight,
    "slgrad": SampleLevelGradients,
    "mwn": lambda main, tasks: MetaWeightNet(main, tasks, LR, AUX, hidden=7, rate=0.05),
    "autolambda": lambda main, tasks: AutoLambda(main, tasks, LR, AUX, rate=0.08),
    "pcgrad_target": lambda main, tasks: TargetProjection(main, tasks, AUX),
    "dwa": lambda main, tasks: DynamicWeightAverage(main, tasks, SAMPLES),
}
LEARNED = ("mwn", "autolambda")


class Net(nn.Module):
    """Batch norm, dropout, and heads of three kinds."""

    def __init__(self, dropout=0.3, norm=True):
        super().__init__()
        self.body = nn.Linear(INPUT, D)
        self.norm = nn.BatchNorm1d(D) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(D, c or 1) for c in CLASSES)

    def forward(self, batch):
        x, labels, mask = batch
        features = self.dropout(torch.tanh(self.norm(self.body(x))))
        losses = []
        for k, (head, classes) in enumerate(zip(self.heads, CLASSES, strict=True)):
            if classes:
                wanted = labels[:, k].long()
                losses.append(F.cross_entropy(head(features), wanted, reduction="none"))
            else:
                losses.append((head(features)[:, 0] - labels[:, k]).square())
        return TaskLosses(torch.stack(losses, dim=1), features, None, mask)


def a_batch(size=6, masked=False):
    labels = [torch.randint(c, (size,)).double() if c else torch.randn(size) for c in CLASSES]
    mask = None
    if masked:
        mask = torch.rand(size, K) < 0.7
        mask[0, 0] = mask[1, 2] = True
        mask[1, 0] = mask[:, 3] = False  # nothing at all under task 3
    return torch.randn(size, INPUT), torch.stack(labels, dim=1), mask


def bilevel_of(name, model):
    lower = torch.optim.SGD(model.parameters(), LR)
    return Bilevel(model, RIVALS[name](0, K), lower, aux_weight=AUX)


# --------------------------------------------------------------------------------------------------
# The papers, by loops
# --------------------------------------------------------------------------------------------------


def has_loss(batch, i, k):
    return batch[2] is None or bool(batch[2][i, k])


class Plain:
    """A copy of the model and its plain quantities. Dropout draws from the same state each time."""

    def __init__(self, model, batch, dev_batches):
        self.model, self.batch, self.dev_batches = copy.deepcopy(model), batch, dev_batches
        self.names = [name for name, _ in self.model.named_parameters()]
        self.theta = [p.detach().clone() for p in self.model.parameters()]
        self.state = torch.get_rng_state()
        size = len(batch[0])
        self.entries = [(i, k) for i in range(size) for k in range(K) if has_loss(batch, i, k)]
        self.count = [sum(1 for _, task in self.entries if task == k) for k in range(K)]
        self.factor = [1.0] + [AUX] * (K - 1)
        losses = copy.deepcopy(self.model)(batch).losses
        torch.set_rng_state(self.state)
        self.loss = {e: losses[e].item() for e in self.entries}
        model = copy.deepcopy(self.model)
        losses = model(batch).losses
        parameters = list(model.parameters())
        self.gradient = {
            e: self.flat(
                torch.autograd.grad(losses[e], parameters, retain_graph=True, allow_unused=True)
            )
            for e in self.entries
        }
        torch.set_rng_state(self.state)

    def flat(self, tensors):
        pairs = zip(tensors, self.theta, strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).flatten() for t, p in pairs])

    def dev_loss(self, theta):
        """The mean over batches of the target's mean loss at flat ``theta``, with its graph."""
        sizes = [p.numel() for p in self.theta]
        pieces = zip(self.names, theta.split(sizes), self.theta, strict=True)
        parameters = {name: piece.reshape(p.shape) for name, piece, p in pieces}
        model, means = copy.deepcopy(self.model), []
        for dev in self.dev_batches:
            losses = functional_call(model, parameters, (dev,)).losses
            known = [losses[i, 0] for i in range(len(dev[0])) if has_loss(dev, i, 0)]
            means.append(sum(known) / len(known))
        torch.set_rng_state(self.state)
        return sum(means) / len(means)

    def v(self):
        theta = self.flat(self.theta).requires_grad_()
        return torch.autograd.grad(self.dev_loss(theta), theta)[0]

    def mean_gradient(self, k):
        """Of a_k L_k."""
        rows = [self.gradient[e] for e in self.entries if e[1] == k]
        return (
            self.factor[k] * sum(rows, torch.zeros_like(self.flat(self.theta))) / max(1, len(rows))
        )

    def step(self, coefficients):
        """Flat theta after a step on sum over entries of coefficient times loss."""
        g = sum(coefficients[e] * self.gradient[e] for e in self.entries)
        return self.flat(self.theta) - LR * g

    def weights(self, coefficients):
        """As the project counts them: the coefficient is W_ik a_k / N_k."""
        found = torch.zeros(len(self.batch[0]), K)
        for i, k in self.entries:
            found[i, k] = coefficients[i, k] * self.count[k] / self.factor[k]
        return found

    def equal(self):
        return {(i, k): self.factor[k] / self.count[k] for i, k in self.entries}


class ByLoop:
    """Theta and the weights after a step of each paper. ``start``: a fresh scheduler's state."""

    def __init__(self, start):
        self.phi = [t.clone() for t in start]
        self.moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in self.phi]
        self.steps, self.epochs, self.seen = 0, [], []

    def l2rw(self, plain):
        v, coefficients = plain.v(), plain.equal()
        pull = {i: max(0.0, (plain.gradient[i, 0] @ v).item()) for i, k in plain.entries if k == 0}
        total = sum(pull.values())
        for i, value in pull.items():
            coefficients[i, 0] = value / total if total else 0.0
        return plain.step(coefficients), plain.weights(coefficients)

    def slgrad(self, plain):
        v = plain.v()
        pull = {e: max(0.0, (plain.gradient[e] @ v).item()) for e in plain.entries}
        total = sum(pull.values())
        coefficients = {e: plain.factor[e[1]] * value / total for e, value in pull.items()}
        return plain.step(coefficients), plain.weights(coefficients)

    def mwn(self, plain):
        def weight(loss, w1, b1, w2, b2):
            hidden = torch.relu(w1[:, 0] * loss + b1)
            return torch.sigmoid(w2[0] @ hidden + b2[0])

        def coefficients(phi):
            found = dict(plain.equal())
            for i, k in plain.entries:
                if k == 0:
                    found[i, 0] = weight(plain.loss[i, 0], *phi) / plain.count[0]
            return found

        self.learn(plain, coefficients, 0.05, 1e-4)
        found = {e: float(c) for e, c in coefficients(self.phi).items()}
        return plain.step(found), plain.weights(found)

    def autolambda(self, plain):
        def coefficients(phi):
            weights = [1.0, *phi[0]]
            return {e: weights[e[1]] * c for e, c in plain.equal().items()}

        self.learn(plain, coefficients, 0.08, 0.0)
        self.phi = [t.clamp(min=0) for t in self.phi]
        found = {e: float(c) for e, c in coefficients(self.phi).items()}
        return plain.step(found), plain.weights(found)

    def learn(self, plain, coefficients, rate, decay):
        """Adam on the development loss after the step, differentiated through the step."""
        phi = [t.clone().requires_grad_() for t in self.phi]
        loss = plain.dev_loss(plain.step(coefficients(phi)))
        self.steps += 1
        for place, g in enumerate(torch.autograd.grad(loss, phi)):
            g = g + decay * self.phi[place]
            m, s = self.moments[place]
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            self.moments[place] = m, s
            m, s = m / (1 - 0.9**self.steps), s / (1 - 0.999**self.steps)
            self.phi[place] = self.phi[place] - rate * m / (s.sqrt() + 1e-8)

    def pcgrad_target(self, plain):
        whose = [(n, p.numel()) for n, p in plain.model.named_parameters()]
        shared = torch.cat([torch.full((n,), not w.startswith("heads.")) for w, n in whose])
        gradients = [plain.mean_gradient(k) for k in range(K)]
        target = gradients[0][shared]
        total = sum(gradients)
        for g in gradients[1:]:
            product = (g[shared] @ target).item()
            if product < 0:
                total[shared] -= product / (target @ target) * target
                self.seen.append(product)
        return plain.flat(plain.theta) - LR * total, None

    def dwa(self, plain):
        """The three batches of 6, 6 and 2 samples are an epoch."""
        weights = [1.0] * K
        if self.steps % 3 == 0:
            self.epochs.append({k: [] for k in range(K)})
        if len(self.epochs) > 2:
            ratios = []
            for k in range(K):
                before, last = self.epochs[-3][k], self.epochs[-2][k]
                known = before and last
                mean = [sum(values) / len(values) for values in (last, before)] if known else [1, 1]
                ratios.append(mean[0] / mean[1])
            shares = [math.exp(r / 2) for r in ratios]
            weights = [K * share / sum(shares) for share in shares]
        for (_, k), loss in plain.loss.items():
            self.epochs[-1][k].append(loss)
        self.steps += 1
        coefficients = {e: weights[e[1]] * c for e, c in plain.equal().items()}
        return plain.step(coefficients), plain.weights(coefficients)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", RIVALS)
def test_steps_are_the_papers(name, masked):
    model = Net()
    bilevel = bilevel_of(name, model)
    reference = ByLoop([p.detach() for p in bilevel.scheduler.parameters()])
    for step in range(10 if name == "dwa" else 4):
        batch = a_batch(2 if name == "dwa" and step % 3 == 2 else 6, masked)
        if masked and name == "dwa" and 6 <= step < 9:
            batch[2][:, 1] = False  # a task that a whole epoch lacks
        dev = [a_batch(5), a_batch(4, masked)]
        theta, weights = getattr(reference, name)(Plain(model, batch, dev))
        result = bilevel.lower_step(batch, dev)
        found = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(found, theta, rtol=1e-8, atol=1e-9)
        if weights is not None:
            torch.testing.assert_close(result.weights, weights, rtol=1e-8, atol=1e-9)
    if name in LEARNED:
        learned = [p.detach() for p in bilevel.scheduler.parameters()]
        torch.testing.assert_close(learned, reference.phi, rtol=1e-8, atol=1e-9)
    if name == "pcgrad_target":
        assert reference.seen  # some did conflict


# --------------------------------------------------------------------------------------------------
# What is not in the papers
# --------------------------------------------------------------------------------------------------


def no_average(tensors, _):
    return tensors


@pytest.mark.parametrize("name", RIVALS)
def test_looking_ahead_leaves_the_model_and_the_random_numbers_as_they_are(name):
    model, batch, dev = Net(), a_batch(masked=True), [a_batch(5)]
    scheduler, before = RIVALS[name](0, K), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    scheduler.before_lower_step(model, batch, dev, no_average)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["l2rw", "slgrad", "pcgrad_target"])
def test_a_batch_without_target_labels(name):
    model, (x, labels, _) = Net(dropout=0.0), a_batch()
    mask = torch.ones(6, K, dtype=torch.bool)
    mask[:, 0] = False
    result = bilevel_of(name, model).lower_step((x, labels, mask), [a_batch(5)])
    assert result.gradient_norm > 0 and not result.weights[:, 0].any()
    if name != "slgrad":
        assert torch.equal(result.weights, mask.double())


def test_where_nothing_helps_nothing_of_the_target_is_trained():
    """All D of the target are negative: the development labels are the wrong ones."""
    model, (x, labels, _) = Net(dropout=0.0, norm=False), a_batch(1)
    wrong = labels.clone()
    wrong[:, 0] = (labels[:, 0] + 1) % 3
    nn.init.zeros_(model.heads[0].weight)
    nn.init.zeros_(model.heads[0].bias)
    result = bilevel_of("l2rw", model).lower_step((x, labels, None), [(x, wrong, None)])
    assert result.weights.tolist() == [[0.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("difference", [85.0, 95.0, 110.0])
@pytest.mark.parametrize("name", ["l2rw", "slgrad"])
def test_a_development_set_that_is_fitted_to_the_last_bit_divides_by_nothing(name, difference):
    """Its gradient is a denormal number, whose reciprocal is not finite."""
    torch.set_default_dtype(torch.float32)

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([difference]))

        def forward(self, batch):
            x, y = batch
            logits = torch.stack([torch.zeros_like(x), x * self.w], dim=1)
            return TaskLosses(F.cross_entropy(logits, y, reduction="none")[:, None])

    model = Linear()
    lower = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    bilevel = Bilevel(model, RIVALS[name](0, 1), lower)
    batch = torch.ones(2), torch.ones(2, dtype=torch.long)
    step = bilevel.lower_step(batch, [batch])
    assert step.weights.isfinite().all() and step.gradient_norm.isfinite()
    assert model.w.item() == pytest.approx(0.99 * difference, rel=1e-5)  # the step was taken


@pytest.mark.parametrize("name", RIVALS)
def test_a_frozen_body_is_a_constant(name):
    model = Net(dropout=0.0)
    model.body.requires_grad_(False)
    model.norm.requires_grad_(False)
    body = model.body.weight.clone()
    bilevel = bilevel_of(name, model)
    batch, dev = a_batch(), [a_batch(5)]
    with torch.no_grad():
        frozen = copy.deepcopy(model)
        features = [torch.tanh(frozen.norm(frozen.body(one[0]))) for one in (batch, *dev)]
    result = bilevel.lower_step(batch, dev)
    assert torch.equal(model.body.weight, body)
    if name != "l2rw":
        return
    head = frozen.heads[0]
    v = torch.autograd.grad(
        F.cross_entropy(head(features[1]), dev[0][1][:, 0].long()), list(head.parameters())
    )
    pull = []
    for x, y in zip(features[0], batch[1][:, 0].long(), strict=True):
        g = torch.autograd.grad(F.cross_entropy(head(x), y), list(head.parameters()))
        pull.append(max(0.0, sum((a * b).sum() for a, b in zip(g, v, strict=True)).item()))
    expected = 6 * torch.tensor(pull) / sum(pull)
    torch.testing.assert_close(result.weights[:, 0], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "dwa"])
@pytest.mark.filterwarnings("ignore:.*two backward passes take its place")
def test_a_model_without_forward_mode_takes_the_same_steps(name):
    one, batch, dev = Net(dropout=0.0), a_batch(masked=True), [a_batch(5)]
    other = copy.deepcopy(one)
    other.norm = nn.Sequential(ReverseOnly(), other.norm)
    first = bilevel_of(name, one)
    second = bilevel_of(name, other)
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    results = [bilevel.lower_step(batch, dev) for bilevel in (first, second)]
    torch.testing.assert_close(results[0].weights, results[1].weights, rtol=1e-9, atol=1e-11)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def saved(state):
    """What a file keeps of it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ["l2rw", "slgrad", *LEARNED])
def test_development_losses_that_are_not_finite_change_nothing_and_show(name):
    model = Net(dropout=0.0)
    bilevel, batch, dev = bilevel_of(name, model), a_batch(), a_batch(5)
    bilevel.lower_step(batch, [dev])
    before = copy.deepcopy([model.state_dict(), bilevel.scheduler.state_dict()])
    result = bilevel.lower_step(batch, [(dev[0] * math.inf, *dev[1:])])
    assert not torch.isfinite(result.gradient_norm) and not torch.isfinite(result.loss)
    for name_, p in model.named_parameters():
        assert torch.equal(p, before[0][name_])
    if name in LEARNED:
        for name_, t in bilevel.scheduler.named_parameters():
            assert torch.equal(t, before[1][name_])
        state, kept = bilevel.scheduler.get_extra_state(), before[1]["_extra_state"]
        for place, values in kept["state"].items():
            assert all(torch.equal(state["state"][place][n], t) for n, t in values.items())
    assert torch.isfinite(bilevel.lower_step(batch, [dev]).gradient_norm)


def test_epochs_of_dwa_leave_out_batches_that_are_not_finite():
    model = Net(dropout=0.0, norm=False)
    bilevel = bilevel_of("dwa", model)
    for _ in range(9):
        x, labels, mask = a_batch(7)
        bilevel.lower_step((x, labels, mask))
        labels[:, 2] = math.inf
        bilevel.lower_step((x, labels, mask))
    scheduler = bilevel.scheduler
    assert scheduler.weights.isfinite().all() and not torch.equal(scheduler.weights, torch.ones(K))
    assert scheduler.weights.sum().item() == pytest.approx(K)


@pytest.mark.parametrize("name", RIVALS)
def test_it_goes_on_to_the_same_bits(name):
    batches = [(a_batch(masked=True), [a_batch(5)]) for _ in range(9)]

    def new():
        torch.manual_seed(3)
        return bilevel_of(name, Net(dropout=0.0))

    def go_on(bilevel, some):
        for batch, dev in some:
            bilevel.lower_step(batch, dev)

    whole, first, second = new(), new(), new()
    go_on(whole, batches)
    go_on(first, batches[:5])
    go_on(second, batches[6:8])  # it has been elsewhere
    second.load_state_dict(saved(first.state_dict()))
    go_on(second, batches[5:])
    assert same_bits(whole.state_dict(), second.state_dict())


@pytest.mark.parametrize("name", RIVALS)
def test_a_single_task_and_another_place_of_the_target(name):
    class Two(Net):
        def forward(self, batch):
            losses, features, *_ = super().forward(batch)
            return TaskLosses(losses.flip(1), features)

    class One(Net):
        def forward(self, batch):
            losses, features, *_ = super().forward(batch)
            return TaskLosses(losses[:, :1], features)

    torch.manual_seed(1)
    batch, dev, models = a_batch(), [a_batch(5)], [Net(dropout=0.0), Two(dropout=0.0)]
    models[1].load_state_dict(models[0].state_dict())
    results = []
    for model, target in zip(models, (0, K - 1), strict=True):
        torch.manual_seed(2)
        lower = torch.optim.SGD(model.parameters(), LR)
        bilevel = Bilevel(model, RIVALS[name](target, K), lower, aux_weight=AUX)
        results.append(bilevel.lower_step(batch, dev).weights)
    torch.testing.assert_close(results[0], results[1].flip(1), rtol=1e-9, atol=1e-12)
    model = One(dropout=0.0)
    bilevel = Bilevel(model, RIVALS[name](0, 1), torch.optim.SGD(model.parameters(), LR))
    for _ in range(2):
        assert torch.isfinite(bilevel.lower_step(batch, dev).gradient_norm)


@pytest.mark.parametrize("name", RIVALS)
def test_weights_can_be_looked_at(name):
    bilevel, dev = bilevel_of(name, Net()), [a_batch(5)]
    bilevel.lower_step(a_batch(), dev)
    before = copy.deepcopy(bilevel.scheduler.state_dict())
    table = schedule_weights(bilevel.model, bilevel.scheduler, [a_batch(), a_batch(3)])
    assert table.weights.shape == (9, K) and (table.weights >= 0).all()
    for key, value in bilevel.scheduler.state_dict().items():
        assert key == "_extra_state" or torch.equal(value, before[key])


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_trains_a_run(name, tiny_run, command):
    torch.set_default_dtype(torch.float32)
    run = tiny_run(method=name, labeled_per_class=2, epochs=1, dev_epochs=0)
    assert run.summary["method"] == name
    assert all(math.isfinite(row["loss"]) for row in run.rows_of("step"))
    assert not run.rows_of("upper")
    code, _, error = command(inspect_schedule.main, run.directory)
    assert code == 2
    assert_one_error_line(error, f"--method {name}", "has no schedule to show")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_options_are_finite(text):
    with pytest.raises(ValueError, match=f"must be a finite number, not {text}"):
        METHODS["mwn"].options["rate"].parse(text)


# --------------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------------


def three_steps(name, masked, ranks):
    """Flat parameters and the scheduler's state after three steps on this rank's share."""
    torch.manual_seed(0)
    model = Net(dropout=0.0, norm=False)
    scheduler = RIVALS[name](0, K)
    if name == "dwa":
        scheduler.samples = 9

    def share(size, masked=False):
        x, labels, _ = a_batch(size)
        mask = torch.ones(size, K, dtype=torch.bool)
        mask[: size // 3, 0] = not masked  # of the target alone
        return tuple(t[ranks.rank :: ranks.size] for t in (x, labels, mask))

    def average(tensors, batches):
        return ranks.average(tensors, sum(len(batch[0]) for batch in batches))

    lower = torch.optim.SGD(model.parameters(), LR)
    bilevel = Bilevel(model, scheduler, lower, aux_weight=AUX, average=average)
    for _ in range(3):
        bilevel.lower_step(share(9, masked), [share(5)])
    state = {n: t for n, t in scheduler.state_dict().items() if n != "_extra_state"}
    return torch.cat([p.detach().flatten() for p in model.parameters()]), state


# With missing labels: those that sum over samples. Means are each rank's own.
CASES = [*((name, False) for name in RIVALS), ("l2rw", True), ("slgrad", True)]


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with leaving():
        torch.save(
            {case: three_steps(*case, Ranks(rank, 2)) for case in CASES}, f"{folder}/{rank}.pt"
        )
    os._exit(0)  # PyTorch's threads may abort the interpreter as it ends, see ``leaving``


def test_two_processes_take_the_steps_of_one(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for case in CASES:
        theta, state = three_steps(*case, Ranks())
        assert torch.equal(ranks[0][case][0], ranks[1][case][0])
        tolerance = {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(ranks[0][case][0], theta, **tolerance)
        for found in (ranks[0][case][1], ranks[1][case][1]):
            torch.testing.assert_close(found, state, **tolerance)
