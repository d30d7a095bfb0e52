"""adam_scale: against the optimisers' own steps, and where a second moment is next to nothing."""

import copy
import statistics

import pytest
import torch
from torch import nn, optim

from auxilearn import Bilevel, StableJoint, TaskLosses, adam_scale, identity, neumann
from auxilearn.implicit_diff import preconditioned
from auxilearn.optim import upper_adam

LR = 0.01
# The first moment of the Adams is the gradient alone: the scale leaves momentum out.
BUILT = {
    "Adam": lambda p: optim.Adam(p, LR, betas=(0.0, 0.9)),
    "Adam, coupled decay": lambda p: optim.Adam(p, LR, betas=(0.0, 0.9), weight_decay=0.3),
    "Adam, foreach": lambda p: optim.Adam(p, LR, betas=(0.0, 0.9), foreach=True),
    "Adam, fused": lambda p: optim.Adam(p, LR, betas=(0.0, 0.9), fused=True),
    "Adam, large eps": lambda p: optim.Adam(p, LR, betas=(0.0, 0.999), eps=0.5),
    "AdamW": lambda p: optim.AdamW(p, LR, betas=(0.0, 0.9), weight_decay=0.3),
    "amsgrad": lambda p: optim.Adam(p, LR, betas=(0.0, 0.5), amsgrad=True),
    "NAdam": lambda p: optim.NAdam(p, LR, betas=(0.0, 0.9)),
    "Adagrad": lambda p: optim.Adagrad(p, LR, lr_decay=0.1, weight_decay=0.3),
    "RMSprop": lambda p: optim.RMSprop(p, LR, alpha=0.9, weight_decay=0.3),
    "RMSprop, centred": lambda p: optim.RMSprop(p, LR, alpha=0.9, centered=True),
    "RMSprop, momentum": lambda p: optim.RMSprop(p, LR, alpha=0.9, momentum=0.9, eps=1e-3),
    "SGD": lambda p: optim.SGD(p, LR, momentum=0.9, weight_decay=0.3),
}


def stepped(build, gradients, size=4):
    p = nn.Parameter(torch.randn(size, dtype=torch.float64))
    optimizer = build([p])
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p, optimizer


def response(p, optimizer, change=1e-6):
    """- d(next step) / d(gradient) / LR at p.grad, entry by entry, from two steps of copies."""
    ends = []
    for sign in (1, -1):
        parameter, stepper = copy.deepcopy((p, optimizer))  # together: the one holds the other
        parameter.grad = p.grad + sign * change
        stepper.step()
        ends.append(parameter.detach())
    return (ends[1] - ends[0]) / (2 * change * LR)


@pytest.mark.parametrize("name", BUILT)
def test_the_scale_is_the_response_of_the_next_step(name):
    torch.manual_seed(1)
    sizes = torch.tensor([1.0, 5.0, 0.1, 30.0, 2.0, 0.5, 3.0]).double()
    p, optimizer = stepped(BUILT[name], sizes[:, None] * torch.randn(7, 4).double())
    (scale,) = adam_scale(optimizer, [p])
    found = response(p, optimizer).abs()
    assert found.min() > 0
    torch.testing.assert_close(1 / scale, found, rtol=2e-4, atol=0)
    assert (name == "SGD") == torch.allclose(scale, torch.ones_like(scale))


def test_a_large_second_moment_is_all_there_is_to_it():
    """The figure of Kingma and Ba's Algorithm 1, up to half of 1 - beta2, the next step's decay."""
    p, optimizer = stepped(lambda p: optim.Adam(p, LR), [torch.randn(4).double() + 3] * 2000)
    p.grad *= 0.03
    (scale,) = adam_scale(optimizer, [p])
    moment = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**2000)
    torch.testing.assert_close(scale, moment.sqrt() + 1e-8, rtol=6e-4, atol=0)


def test_the_first_step_of_an_entry_answers_nothing():
    """v = 0: the size of Adam's step does not depend on the gradient's."""
    gradient = torch.tensor([2.0, 2.0, 0.0, 0.0]).double()
    p, optimizer = stepped(lambda p: optim.Adam(p, LR), [gradient] * 30)
    before = 1 / adam_scale(optimizer, [p])[0]
    share = 0.001 / (1 - 0.999**31)  # c: the next gradient is of the others' size, 2
    torch.testing.assert_close(
        before[2:], torch.full((2,), 1e-8 / share / 4).double(), rtol=1e-6, atol=0
    )
    assert before[0] > 0.4


def test_a_centred_rmsprop_that_answers_the_wrong_way_counts_as_none():
    p, optimizer = stepped(
        lambda p: optim.RMSprop(p, LR, alpha=0.9, centered=True), [torch.ones(4).double()] * 60
    )
    p.grad = torch.full((4,), 5.0).double()
    assert response(p, optimizer).max() < 0
    assert 0 < (1 / adam_scale(optimizer, [p])[0]).max() < 1e-6


@pytest.mark.parametrize("build", [optim.Adam, optim.Adagrad, optim.RMSprop, optim.SGD])
def test_one_where_no_gradient_has_ever_been(build):
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = build([used, unused], lr=LR)
    assert all(torch.equal(d, torch.ones(2)) for d in adam_scale(optimizer, [used, unused]))
    used.grad, unused.grad = torch.ones(2), torch.zeros(2)
    for _ in range(8):
        optimizer.step()
    used.grad = None  # as zero_grad() leaves it
    found = adam_scale(optimizer, [used, unused])
    assert torch.equal(found[1], torch.ones(2))
    assert torch.isfinite(found[0]).all() and (found[0] > 0).all()


def test_other_optimisers_are_refused_by_name():
    p = nn.Parameter(torch.zeros(2))
    for build in (optim.RAdam, optim.Adamax, optim.Adadelta, optim.ASGD, optim.Rprop):
        with pytest.raises(TypeError, match=f"Adam, AdamW, NAdam.* SGD, not of {build.__name__}:"):
            adam_scale(build([p]), [p])


def test_frozen_parameters_are_left_out_and_strange_ones_refused():
    frozen, held, free = (nn.Parameter(torch.zeros(n)) for n in (2, 3, 4))
    frozen.requires_grad_(False)
    for parameters in ([frozen, held], [held]):
        scales = adam_scale(optim.Adam(parameters), iter([frozen, held]))
        assert [d.shape for d in scales] == [(3,)]
    with pytest.raises(ValueError, match="the optimiser does not hold one of the parameters"):
        adam_scale(optim.Adam([held]), [held, free])


class Factorisation(nn.Module):
    """Users by items, of which few are popular."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(100, 4), nn.Embedding(1000, 4)
        self.body, self.heads = nn.Sequential(nn.Linear(12, 16), nn.Tanh()), nn.Linear(16, 3)

    def forward(self, batch):
        ids, y = batch
        u, i = self.users(ids[:, 0]), self.items(ids[:, 1])
        features = self.body(torch.cat([u, i, u * i], dim=1))
        return TaskLosses((self.heads(features) - y).square(), features)


@pytest.mark.parametrize("beta2", [0.999, 0.9], ids=["unseen rows", "rows seen long ago"])
@pytest.mark.parametrize("solver", [identity(), neumann(1e-4, 2)], ids=["identity", "neumann"])
def test_rare_rows_of_an_embedding_make_no_outliers(beta2, solver):
    torch.manual_seed(0)
    popularity = 1 / torch.arange(1, 1001.0)
    model, scheduler = Factorisation(), StableJoint(0, 3, 16)
    lower = optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, beta2))

    def batch(n=64):
        u, i = torch.randint(100, (n,)), torch.multinomial(popularity, n, True)
        return torch.stack([u, i], dim=1), (u - 50)[:, None] / 30 + torch.randn(n, 3)

    bilevel = Bilevel(
        model,
        scheduler,
        lower,
        upper_adam(scheduler.parameters(), 0.03, 0.0),
        solver=preconditioned(solver, lambda: adam_scale(lower, model.parameters())),
    )
    norms = []
    for step in range(1, 301):
        bilevel.lower_step(batch())
        if step % 5 == 0:
            norms.append(bilevel.upper_step([batch()], [batch()]).hypergradient_norm)
    assert max(norms) < 15 * statistics.median(norms)
