"""``scheduled_loss``: factors on auxiliary losses, what weights may look at, shapes; in float64."""

import pytest
import torch
from torch import nn

from auxilearn.bilevel import Bilevel
from auxilearn.hypernet import HyperNet, Identity, MonoJoint, TaskLosses, scheduled_loss
from auxilearn.implicit_diff import neumann
from auxilearn.stable import TargetTask
from tests import small
from tests.small import CLASSES, SCHEDULERS, SCHEDULES, UPPER, D, K, Net, batch, drawn

pytestmark = pytest.mark.usefixtures("float64")

AUX_WEIGHTS = [0.0, 0.3, 1.0, 2.5]


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def outputs_of(masked=False, size=8):
    return Net()(batch(size, masked))


# --------------------------------------------------------------------------------------------------
# The factor on the auxiliary losses
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aux_weight", AUX_WEIGHTS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_value_and_gradients_are_the_formulas(name, aux_weight, masked):
    """Schedules see RAW losses; combiners and uncertainty weights receive a_k L_k."""
    scheduler, outputs = drawn(SCHEDULERS[name]()), outputs_of(masked)
    phi = dict(scheduler.named_parameters())
    found = scheduled_loss(scheduler, outputs, aux_weight)
    expected = small.by_hand(name, phi, outputs, aux_weight, small.odds(scheduler))
    close(found, expected)
    inputs = [outputs.losses, *phi.values()]
    close(
        torch.autograd.grad(found, inputs, retain_graph=True), torch.autograd.grad(expected, inputs)
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_does_not_depend_on_the_factor(name):
    """The factor multiplies what a task adds to S, and moves no weight."""
    scheduler, outputs = drawn(SCHEDULERS[name]()), outputs_of()
    (plain,) = torch.autograd.grad(
        scheduled_loss(scheduler, outputs), outputs.losses, retain_graph=True
    )
    for aux_weight in AUX_WEIGHTS:
        loss = scheduled_loss(scheduler, outputs, aux_weight)
        (slope,) = torch.autograd.grad(loss, outputs.losses, retain_graph=True)
        close(slope, plain * small.factors(aux_weight))


@pytest.mark.parametrize("main_task", [0, 2])
def test_the_factor_spares_the_target_wherever_it_stands(main_task):
    losses = torch.rand(5, K)
    found = scheduled_loss(Identity(main_task, K), TaskLosses(losses), 0.3)
    means = losses.mean(dim=0)
    close(found, 0.3 * means.sum() + 0.7 * means[main_task])
    close(scheduled_loss(TargetTask(main_task, K), TaskLosses(losses), 0.3), means[main_task])


class Mixture(HyperNet):
    """Looks at features, labels and losses; its parameters stand in all of them.

    W_ik = sigmoid((F_i A)_k + u_k L_ik) softplus(table[label_i0, k])
    """

    def __init__(self):
        super().__init__(0, K)
        self.a = nn.Parameter(torch.randn(D, K))
        self.u = nn.Parameter(torch.randn(K))
        self.table = nn.Parameter(torch.randn(CLASSES, K))
        self.seen = []

    def schedule(self, features, losses, labels):
        per_class = torch.nn.functional.softplus(self.table[labels[:, 0]])
        return torch.sigmoid(features @ self.a + self.u * losses) * per_class

    def scheduled_loss(self, losses, seen):
        self.seen.append((losses, seen))
        return (self.schedule(seen.features, seen.losses, seen.labels) * losses).mean(dim=0).sum()


class PerClass(HyperNet):
    """A weight per class of the target and task; labels alone are looked at."""

    def __init__(self):
        super().__init__(0, K)
        self.table = nn.Parameter(torch.randn(CLASSES, K))

    def scheduled_loss(self, losses, seen):
        return (torch.exp(self.table[seen.labels[:, 0]]) * losses).mean(dim=0).sum()


def test_what_weights_look_at_is_raw_and_without_a_graph():
    scheduler, outputs = Mixture(), outputs_of()
    scheduled_loss(scheduler, outputs, 0.3)
    ((losses, seen),) = scheduler.seen
    assert torch.equal(losses, outputs.losses * small.factors(0.3)) and losses.requires_grad
    assert torch.equal(seen.losses, outputs.losses)
    for name, entry in seen._asdict().items():
        assert entry is None or not entry.requires_grad, name
        given = getattr(outputs, name)
        assert (entry is None) == (given is None)
        assert entry is None or torch.equal(entry, given)


@pytest.mark.parametrize("aux_weight", [0.3, 2.5])
def test_the_hypergradient_holds_what_weights_look_at_constant(aux_weight):
    """Against double backward in which features and losses are detached; else it would differ."""
    model, scheduler = Net(), Mixture()
    theta, phi = list(model.parameters()), list(scheduler.parameters())
    levels = Bilevel(
        model, scheduler, torch.optim.SGD(theta, 0.1), solver=neumann(0.3, 2), aux_weight=aux_weight
    )
    train, dev = [batch(), batch(5)], [batch(6)]
    found, *_ = levels.hypergradient(train, dev)

    def expected(constant):
        losses = []
        for out in map(model, train):
            features, raw = constant(out.features), constant(out.losses)
            weights = scheduler.schedule(features, raw, out.labels) * small.factors(aux_weight)
            losses.append((weights * out.losses).mean(dim=0).sum())
        dev_losses = [model(one).losses[:, 0].mean() for one in dev]
        return small.double_backward(losses, dev_losses, theta, phi, 0.3, 2)

    close(found, expected(torch.Tensor.detach), 1e-9)
    for one, other in zip(found, expected(lambda t: t), strict=True):
        assert (one - other).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("aux_weight", [1.0, 0.3])
def test_labels_reach_a_scheduler_that_learns_a_weight_per_class(aux_weight):
    model, scheduler = Net(), PerClass()
    theta = list(model.parameters())
    upper = torch.optim.SGD(scheduler.parameters(), lr=0.7)
    levels = Bilevel(
        model, scheduler, torch.optim.SGD(theta, 0.1), upper, solver=neumann(0.2, 3),
        aux_weight=aux_weight,
    )  # fmt: skip
    train, dev = batch(), batch(6)
    train.labels[:, 0] %= CLASSES - 1  # a class without a sample
    before, statistics = scheduler.table.detach().clone(), model.norm.running_mean.clone()
    levels.upper_step([train], [dev])
    assert torch.equal(model.norm.running_mean, statistics)

    out, table = model(train), before.clone().requires_grad_()
    one_hot = nn.functional.one_hot(train.labels[:, 0], CLASSES).double()
    loss = (torch.exp(one_hot @ table) * small.factors(aux_weight) * out.losses).mean(dim=0).sum()
    dev_loss = model(dev).losses[:, 0].mean()
    (expected,) = small.double_backward([loss], [dev_loss], theta, [table], 0.2, 3)
    close(scheduler.table.detach(), before - 0.7 * expected, 1e-10)
    assert not expected[-1].any() and expected[:-1].all()


@pytest.mark.parametrize("name", UPPER)
def test_a_lower_step_with_a_factor_of_zero_trains_the_target_alone(name):
    """But a combiner's or a schedule's weights of auxiliary tasks are still told."""
    model, scheduler = Net(), drawn(SCHEDULERS[name]())
    step = Bilevel(model, scheduler, torch.optim.SGD(model.parameters(), 0.1), aux_weight=0.0)
    result = step.lower_step(batch())
    of_auxiliary_heads = model.heads.weight.grad[CLASSES:]
    assert not of_auxiliary_heads.any() and model.heads.weight.grad[:CLASSES].any()
    assert (result.weights[:, 1:] > 0).all()


# --------------------------------------------------------------------------------------------------
# Shapes
# --------------------------------------------------------------------------------------------------

GOOD = {
    "losses": (8, K),
    "features": (8, D),
    "sample_id": (8,),
    "mask": (8, K),
    "labels": (8, K),
}


def losses_with(**changes):
    entries = {name: torch.rand(shape) for name, shape in GOOD.items()}
    entries["mask"] = entries["mask"] > 0.2
    return TaskLosses(**{**entries, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": torch.rand(())}, r"losses must be \(B, 3\), a column per task.*not \(\)"),
        ({"losses": torch.rand(8)}, r"not \(8,\): leave them unreduced"),
        ({"losses": torch.rand(8, K + 1)}, r"losses must be \(B, 3\).*not \(8, 4\)"),
        ({"losses": torch.rand(8, K, 1)}, r"not \(8, 3, 1\)"),
        ({"mask": torch.rand(8, K)}, r"mask must be bool \(8, 3\) like losses, not torch.float32"),
        ({"mask": torch.ones(8, dtype=torch.bool)}, r"mask must be bool \(8, 3\).*\(8,\)"),
        ({"mask": torch.ones(1, K, dtype=torch.bool)}, r"mask must be bool \(8, 3\).*\(1, 3\)"),
        ({"features": torch.rand(7, D)}, r"features must be \(8, d\).*, not \(7, 5\)"),
        ({"features": torch.rand(8, 1, D)}, r"features must be \(8, d\).*, not \(8, 1, 5\): pool"),
        ({"features": torch.rand(8)}, r"features must be \(8, d\).*, not \(8,\)"),
        ({"sample_id": torch.zeros(8, 1).long()}, r"sample_id must be \(8,\).*, not \(8, 1\)"),
        ({"labels": torch.zeros(8)}, r"labels must be \(8, 3\) like losses, not \(8,\)"),
        ({"losses": torch.rand(0, K)}, r"not shape \(0, 3\): the batch is empty"),
        (
            {"sample_id": torch.tensor(3)},
            r"sample_id must be \(8,\), a number per sample, not \(\)",
        ),
        (
            {"labels": torch.zeros(1, K)},
            r"labels must be \(8, 3\) like losses, not \(1, 3\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        scheduled_loss(MonoJoint(0, K, D), losses_with(**changes))


def test_a_step_names_them_as_well():
    """And so does the hypergradient, which falls back to no slower way."""

    class Reduced(Net):
        def forward(self, batch):
            outputs = super().forward(batch)
            return outputs._replace(losses=outputs.losses.mean(dim=0))

    model = Reduced()
    levels = Bilevel(model, MonoJoint(0, K, D), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"losses must be \(B, 3\).*not \(3,\)"):
        levels.lower_step(batch())

    class Named(Net):
        def forward(self, batch):
            return super().forward(batch)._replace(features=torch.zeros(2, D))

    levels.model = Named()
    with pytest.raises(ValueError, match=r"features must be \(8, d\)"):
        levels.hypergradient([batch()], [batch()])


def test_what_is_missing_is_not_asked_for():
    losses = torch.rand(8, K)
    close(scheduled_loss(Identity(0, K), TaskLosses(losses)), losses.mean(dim=0).sum())
    assert torch.isfinite(scheduled_loss(MonoJoint(0, K, D), losses_with()))


def test_a_model_that_returns_something_else_is_named():
    class Wrong(Net):
        def forward(self, batch):
            return tuple(super().forward(batch))

    model = Wrong()
    bilevel = Bilevel(model, Identity(0, K), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="must return TaskLosses, not tuple"):
        bilevel.lower_step(batch(4))


def test_a_missing_entry_is_named():
    losses = torch.rand(4, K)
    for name, missing in (
        ("joint", "features"),
        ("joint_stable", "features"),
        ("naive", "sample_id"),
    ):
        with pytest.raises(ValueError, match=missing):
            scheduled_loss(SCHEDULERS[name](), TaskLosses(losses))
