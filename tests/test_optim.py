"""The upper optimiser: whole bilevel runs against a from-scratch reference, and its contract."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auxilearn.hypernet import MonoJoint, MonoLinearHyperNet, MonoNonlinearHyperNet, Naive_hyper
from auxilearn.optim import MetaOptimizer
from benchmarks import plain
from tests import reference

INPUT, HIDDEN, CLASSES, K = 3, 4, [3, 2, 2], 3
BATCH, DEV_BATCH, SAMPLES = 6, 5, 12
AUX_WEIGHT, LOWER_LR, LOWER_DECAY = 0.7, 0.02, 5e-4
UPPER_LR, UPPER_DECAY, ALPHA, MAX_NORM = 0.2, 1e-3, 0.03, 10.0
UPPER_STEPS, LOWER_STEPS = 3, 2


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny tensors: a second thread costs seconds where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TaskModel(nn.Module):
    """A tanh trunk with one head per task; parameters in the order reference.tanh_network reads."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(INPUT, HIDDEN)
        self.heads = nn.ModuleList([nn.Linear(HIDDEN, classes) for classes in CLASSES])

    def forward(self, x):
        features = torch.tanh(self.trunk(x))
        return features, [head(features) for head in self.heads]

    def losses(self, x, labels):
        features, logits = self(x)
        columns = [
            F.cross_entropy(row, labels[:, k], reduction="none") for k, row in enumerate(logits)
        ]
        scale = torch.tensor([1.0] + [AUX_WEIGHT] * (K - 1), dtype=torch.float64)
        return features, torch.stack(columns, dim=1) * scale


def batches(seed=4):
    """(ids, x, labels) of every lower and upper step, and (x, target labels) of development."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows):
        x = torch.randn(rows, INPUT, dtype=torch.float64, generator=generator)
        columns = [torch.randint(0, classes, (rows,), generator=generator) for classes in CLASSES]
        return x, torch.stack(columns, dim=1)

    x, labels = draw(SAMPLES)
    train = []
    for _ in range(UPPER_STEPS * (LOWER_STEPS + 1)):
        ids = torch.randint(0, SAMPLES, (BATCH,), generator=generator)
        train.append((ids, x[ids], labels[ids]))
    dev = [draw(DEV_BATCH) for _ in range(UPPER_STEPS)]
    return train, [(x, labels[:, 0]) for x, labels in dev]


def make_scheduler(kind):
    torch.manual_seed(4)
    options = {"init_lower": 0.1, "init_upper": 1.0}
    net = {
        "joint": lambda: MonoJoint(0, K, HIDDEN, K=K),
        "mlp": lambda: MonoNonlinearHyperNet(0, K, hidden_sizes=[4, 3], **options),
        "mlp, plain weights": lambda: MonoNonlinearHyperNet(
            0, K, hidden_sizes=[4, 3], weight_normalization=False, **options
        ),
        "naive": lambda: Naive_hyper(SAMPLES, K),
        "linear": lambda: MonoLinearHyperNet(0, K, skip_connection=True),
    }[kind]().double()
    if kind == "joint":
        with torch.no_grad():  # away from the initial state, where the factors are nearly equal
            for parameter in net.parameters():
                parameter += torch.randn(parameter.shape, dtype=torch.float64)
    return net


def scheduled(net, features, losses, ids, to_train):
    """The implementation's scheduled loss."""
    if isinstance(net, MonoJoint):
        return net(features, losses, to_train=to_train)
    if isinstance(net, Naive_hyper):
        return net(losses, ids)
    return net(losses)


# ------------------------------------------------------------------ the reference's side


def layer_weight(pieces, prefix):
    if f"{prefix}.weight" in pieces:
        return pieces[f"{prefix}.weight"]
    return reference.weight_normalised(pieces[f"{prefix}.weight_g"], pieces[f"{prefix}.weight_v"])


def reference_scheduled(pieces, losses, frozen_features, frozen_losses, ids):
    """The scheduled loss of named upper parameters; what W sees is given as constants."""
    if "task_prior" in pieces:
        names = ("feature_sel.weight", "feature_sel.bias", "loss_w", "loss_b", "task_prior")
        phi = torch.cat([pieces[name].reshape(-1) for name in names])
        z = reference.standardise(frozen_losses)
        weights = reference.mono_joint_weights(phi, frozen_features, z)
        return (weights * losses).sum() / len(losses)
    if "weights.weight" in pieces:
        weights = reference.log1p_exp(pieces["weights.weight"][ids])
        return (weights * losses).sum() / len(losses)
    prefixes = sorted({name.rsplit(".", 1)[0] for name in pieces})
    value = losses
    for prefix in prefixes:
        value = value @ layer_weight(pieces, prefix).T
        if f"{prefix}.bias" in pieces:
            value = value + pieces[f"{prefix}.bias"]
        if prefix != prefixes[-1]:
            value = reference.log1p_exp(value)
    return value.sum() / len(losses) + losses[:, 0].sum() / len(losses)


def reference_losses(theta, x, labels):
    features, logits = reference.tanh_network(theta, x, INPUT, HIDDEN, CLASSES)
    columns = [
        (1.0 if k == 0 else AUX_WEIGHT) * reference.cross_entropy_column(row, labels[:, k])
        for k, row in enumerate(logits)
    ]
    return features, torch.stack(columns, dim=1)


def reference_run(theta, names, shapes, phi, dev_scale, may_clamp):
    """Trajectories of theta and phi, the norms of the hypergradient, how often clamp() bit."""
    train, dev = batches()
    lower = reference.Adam(LOWER_LR, LOWER_DECAY)
    upper = reference.MomentumSGD(UPPER_LR, 0.9, UPPER_DECAY)
    bounded = torch.cat(
        [
            torch.full(shape, may_clamp and "bias" not in name).reshape(-1)
            for name, shape in zip(names, shapes, strict=True)
        ]
    )
    trajectory, norms, bites = [], [], 0
    train = iter(train)

    def train_loss_at(theta_now, ids, x, labels):
        frozen_features, frozen_losses = reference_losses(theta_now, x, labels)

        def train_loss(th, ph):
            pieces = dict(zip(names, reference.split(ph, shapes), strict=True))
            losses = reference_losses(th, x, labels)[1]
            return reference_scheduled(pieces, losses, frozen_features, frozen_losses, ids)

        return train_loss

    for x_dev, y_dev in dev:
        for _ in range(LOWER_STEPS):
            train_loss = train_loss_at(theta, *next(train))
            th = theta.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(train_loss(th, phi), th)
            theta = lower.step(theta, gradient)

        def dev_loss(th, x=x_dev, y=y_dev):
            logits = reference.tanh_network(th, x, INPUT, HIDDEN, CLASSES)[1][0]
            return dev_scale * reference.cross_entropy_column(logits, y).sum() / DEV_BATCH

        train_loss = train_loss_at(theta, *next(train))
        gradient = reference.dense_hypergradient(train_loss, dev_loss, theta, phi, ALPHA, 3)
        norms.append(float(gradient.norm()))
        phi = upper.step(phi, reference.clip_norm(gradient, MAX_NORM))
        bites += int((bounded & (phi < 0)).sum())
        phi = torch.where(bounded, phi.clamp(min=0), phi)
        trajectory.append((theta, phi))
    return trajectory, norms, bites


# ------------------------------------------------------------------ whole runs


def new_model():
    torch.manual_seed(11)
    return TaskModel().double()


@pytest.mark.parametrize("dev_scale", [1.0, 1e6], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind", ["joint", "mlp", "mlp, plain weights", "naive", "linear"])
def test_three_bilevel_steps(kind, dev_scale):
    model, net = new_model(), make_scheduler(kind)
    names, phi = zip(*net.named_parameters(), strict=True)
    shapes = [tuple(parameter.shape) for parameter in phi]
    expected, norms, bites = reference_run(
        reference.flat(model.parameters()),
        names,
        shapes,
        reference.flat(phi),
        dev_scale,
        may_clamp=kind.startswith(("mlp", "linear")),
    )
    # The run must exercise what it claims to. With norms this far above the limit, a guard
    # against division by zero in the clipping (norm + 1e-6) cannot be seen.
    assert min(norms) > 1e4 if dev_scale > 1 else max(norms) < MAX_NORM
    assert bites > 0 or dev_scale == 1 or not kind.startswith(("mlp", "linear"))

    train, dev = batches()
    train = iter(train)
    lower = torch.optim.Adam(model.parameters(), lr=LOWER_LR, weight_decay=LOWER_DECAY)
    upper = MetaOptimizer(
        torch.optim.SGD(net.parameters(), lr=UPPER_LR, momentum=0.9, weight_decay=UPPER_DECAY),
        hpo_lr=ALPHA,
    )
    for step, (x_dev, y_dev) in enumerate(dev):
        for _ in range(LOWER_STEPS):
            ids, x, labels = next(train)
            lower.zero_grad()
            scheduled(net, *model.losses(x, labels), ids, to_train=True).backward()
            lower.step()
        ids, x, labels = next(train)
        upper.zero_grad()
        upper.step(
            train_loss=scheduled(net, *model.losses(x, labels), ids, to_train=False),
            val_loss=dev_scale * F.cross_entropy(model(x_dev)[1][0], y_dev),
            parameters=model.parameters(),
            aux_params=net.parameters(),
        )
        if hasattr(net, "clamp"):
            net.clamp()
        theta_now, phi_now = reference.flat(model.parameters()), reference.flat(net.parameters())
        assert torch.isfinite(phi_now).all()
        torch.testing.assert_close(theta_now, expected[step][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(phi_now, expected[step][1], rtol=1e-9, atol=1e-9)
    assert not torch.equal(expected[-1][1], reference.flat(make_scheduler(kind).parameters()))


# ------------------------------------------------------------------ the contract


@pytest.fixture
def bilevel():
    """theta, phi and a problem whose hypergradient is known by hand."""
    theta = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def losses(scale=1.0):
        return (theta * phi).sum(), scale * (theta**2).sum()

    # H = 0 and the mixed derivative is the identity: hypergradient = -(J + 1) * 2 theta * scale
    return theta, phi, losses


def test_step_without_momentum_moves_against_the_hypergradient(bilevel):
    theta, phi, losses = bilevel
    upper = MetaOptimizer(torch.optim.SGD([phi], lr=0.01), hpo_lr=0.1, max_grad_norm=1e9)
    upper.step(*losses(), [theta], [phi])
    expected = torch.tensor([0.5 + 0.01 * 4 * 2 * 3, 2 - 0.01 * 4 * 2], dtype=torch.float64)
    torch.testing.assert_close(phi.detach(), expected, rtol=1e-12, atol=0)
    assert theta.tolist() == [3.0, -1.0]


@pytest.mark.parametrize("terms", [0, 1, 4])
def test_truncate_iter_is_the_number_of_products(bilevel, terms):
    theta, phi, losses = bilevel
    upper = MetaOptimizer(
        meta_optimizer=torch.optim.SGD([phi], lr=0.001),
        hpo_lr=0.1,
        truncate_iter=terms,
        max_grad_norm=1e9,
    )
    upper.step(*losses(), [theta], [phi])
    moved = (phi.detach() - torch.tensor([0.5, 2.0])) / 0.001
    torch.testing.assert_close(moved, (terms + 1) * 2 * theta.detach(), rtol=1e-9, atol=0)


def test_default_limit_is_ten(bilevel):
    theta, phi, losses = bilevel
    upper = MetaOptimizer(torch.optim.SGD([phi], lr=1.0), 0.1)
    upper.step(*losses(scale=1e4), [theta], [phi])
    moved = phi.detach() - torch.tensor([0.5, 2.0])
    direction = theta.detach() / theta.detach().norm()
    torch.testing.assert_close(moved, 10 * direction, rtol=1e-8, atol=0)


def test_limit_is_on_the_norm_of_all_parameters_together():
    theta = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    phi = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    upper = MetaOptimizer(torch.optim.SGD(phi, lr=1.0), 0.1, max_grad_norm=0.5)
    upper.step((theta * torch.cat(phi)).sum(), 1e4 * (theta**2).sum(), [theta], phi)
    moved = torch.cat(phi).detach()
    torch.testing.assert_close(moved, torch.tensor([0.3, 0.4]).double(), rtol=1e-7, atol=0)


def test_below_the_limit_nothing_is_scaled(bilevel):
    theta, phi, losses = bilevel
    upper = MetaOptimizer(torch.optim.SGD([phi], lr=1.0), 0.1, max_grad_norm=100)
    upper.step(*losses(), [theta], [phi])
    moved = phi.detach() - torch.tensor([0.5, 2.0])
    torch.testing.assert_close(moved, 8 * theta.detach(), rtol=1e-12, atol=0)


def test_return_grads_gives_the_hypergradient(bilevel):
    theta, phi, losses = bilevel
    upper = MetaOptimizer(torch.optim.SGD([phi], lr=0.01), 0.1, 3, 100)
    grads = upper.step(*losses(), [theta], [phi], return_grads=True)
    assert len(grads) == 1 and grads[0].shape == phi.shape
    torch.testing.assert_close(grads[0], -8 * theta.detach(), rtol=1e-12, atol=0)
    assert upper.step(*losses(), [theta], [phi]) is None


def test_returned_grads_outlive_zero_grad(bilevel):
    theta, phi, losses = bilevel
    upper = MetaOptimizer(torch.optim.SGD([phi], lr=0.01), 0.1, 3, 100)
    (grad,) = upper.step(*losses(), [theta], [phi], True)
    before = grad.clone()
    upper.zero_grad()
    assert torch.equal(grad, before)


def test_zero_grad_and_the_wrapped_optimiser(bilevel):
    theta, phi, losses = bilevel
    inner = torch.optim.SGD([phi], lr=0.01)
    upper = MetaOptimizer(inner, 0.1)
    assert upper.meta_optimizer is inner
    upper.step(*losses(), [theta], [phi])
    upper.zero_grad()
    assert phi.grad is None or not phi.grad.any()


def test_gradients_left_by_the_lower_level_do_not_count(bilevel):
    """A combiner is part of the lower loss, whose backward leaves gradients on phi."""
    theta, phi, losses = bilevel
    losses()[0].backward()
    assert phi.grad.any()
    upper = MetaOptimizer(torch.optim.SGD([phi], lr=0.01), 0.1, max_grad_norm=1e9)
    upper.step(*losses(), [theta], [phi])
    moved = (phi.detach() - torch.tensor([0.5, 2.0])) / 0.01
    torch.testing.assert_close(moved, 8 * theta.detach(), rtol=1e-9, atol=0)


def test_unreached_scheduler_parameter_only_decays(bilevel):
    theta, phi, losses = bilevel
    stray = torch.ones(2, dtype=torch.float64, requires_grad=True)
    upper = MetaOptimizer(torch.optim.SGD([phi, stray], lr=0.1, weight_decay=0.5), 0.1)
    upper.step(*losses(), (p for p in [theta]), (p for p in [phi, stray]))
    torch.testing.assert_close(stray.detach(), torch.full((2,), 0.95).double())


def test_unused_heads_and_adaptive_upper_optimiser():
    """The development loss does not reach the auxiliary heads; the optimiser is the user's."""
    model, net = new_model(), make_scheduler("joint")
    (train, *_), (dev, *_) = batches()
    ids, x, labels = train
    upper = MetaOptimizer(torch.optim.Adam(net.parameters(), lr=1e-3), ALPHA)
    before = reference.flat(net.parameters())
    theta = reference.flat(model.parameters())
    loss = scheduled(net, *model.losses(x, labels), ids, to_train=False)
    upper.step(
        loss, F.cross_entropy(model(dev[0])[1][0], dev[1]), model.parameters(), net.parameters()
    )
    moved = reference.flat(net.parameters()) - before
    assert torch.isfinite(moved).all() and moved.abs().max() <= 1e-3 * (1 + 1e-6) and moved.any()
    assert torch.equal(reference.flat(model.parameters()), theta)


# ------------------------------------------------------------------ against the plain baseline


def test_plain_baseline_and_package_take_the_same_steps():
    """A convolution with BatchNorm in train mode: two bilevel steps of both, in float64."""
    torch.manual_seed(2)
    backbone = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = plain.PlainModel(backbone, 5, CLASSES).double()
    scheduler = plain.PlainScheduler(K, 5).double()
    model_2, net = copy.deepcopy(model), MonoJoint(0, K, 5, K=K).double()
    state = net.state_dict()
    for name, value in scheduler.state_dict().items():
        state[name] = value.reshape(state[name].shape)
    net.load_state_dict(state)

    lowers = [
        torch.optim.Adam(m.parameters(), lr=LOWER_LR, weight_decay=LOWER_DECAY)
        for m in (model, model_2)
    ]
    upper = torch.optim.SGD(scheduler.parameters(), lr=0.5, momentum=0.9, weight_decay=5e-5)
    meta = MetaOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=5e-5), ALPHA
    )
    generator = torch.Generator().manual_seed(8)

    def draw():
        images = torch.randn(BATCH, 3, 7, 7, dtype=torch.float64, generator=generator)
        columns = [torch.randint(0, n, (BATCH,), generator=generator) for n in CLASSES]
        return images, torch.stack(columns, dim=1)

    for _ in range(2):
        images, labels = draw()
        loss = plain.lower_step(model, scheduler, lowers[0], images, labels, AUX_WEIGHT)
        features, logits = model_2(images)
        value = net(features, plain.loss_matrix(logits, labels, AUX_WEIGHT))
        torch.testing.assert_close(value.detach(), loss, rtol=1e-12, atol=0)
        lowers[1].zero_grad()
        value.backward()
        lowers[1].step()

        dev_images, dev_labels = draw()
        grads, norm = plain.upper_step(
            model,
            scheduler,
            upper,
            images,
            labels,
            dev_images,
            dev_labels[:, 0],
            AUX_WEIGHT,
            ALPHA,
            max_norm=MAX_NORM,
        )
        assert 0 < float(norm) < MAX_NORM
        dev_loss = F.cross_entropy(model_2(dev_images)[1][0], dev_labels[:, 0])
        features, logits = model_2(images)
        value = net(features, plain.loss_matrix(logits, labels, AUX_WEIGHT), to_train=False)
        names = [name for name, _ in net.named_parameters()]
        found = meta.step(value, dev_loss, model_2.parameters(), net.parameters(), True)
        found = dict(zip(names, found, strict=True))
        for (name, _), grad in zip(scheduler.named_parameters(), grads, strict=True):
            torch.testing.assert_close(found[name].reshape(grad.shape), grad, rtol=1e-9, atol=1e-13)
        for (name, a), b in zip(
            model.state_dict().items(), model_2.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
        parameters = dict(net.named_parameters())
        for name, a in scheduler.named_parameters():
            b = parameters[name].reshape(a.shape)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
