"""A task model of seconds, every scheduler on it, and what both compute, written out by hand.

The formulas (``by_hand``) use plain autograd and the names of parameters alone, nothing of the
package under test. Everything is to be used in float64.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from auxilearn.baselines.combiners import MonoLinearHyperNet, MonoNonlinearHyperNet
from auxilearn.baselines.uncertainty import Uncertainty
from auxilearn.hypernet import Identity, MonoJoint, Naive_hyper, TaskLosses
from auxilearn.stable import StableJoint
from tests import reference

INPUT, D, K, CLASSES, SAMPLES = 4, 5, 3, 4, 12


class Small(NamedTuple):
    """A batch."""

    x: torch.Tensor
    labels: torch.Tensor  # (B, K)
    ids: torch.Tensor
    mask: torch.Tensor | None


class Net(nn.Module):
    """A layer with batch norm and a head of K tasks."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Linear(INPUT, D)
        self.norm = nn.BatchNorm1d(D)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.Linear(D, K * CLASSES)

    def forward(self, batch):
        features = self.dropout(torch.tanh(self.norm(self.body(batch.x))))
        logits = self.heads(features).reshape(-1, K, CLASSES)
        losses = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        return TaskLosses(losses, features, batch.ids, batch.mask, batch.labels)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return inputs * 1

    @staticmethod
    def backward(ctx, slope):
        return slope * 1


class ReverseOnly(nn.Module):
    """The identity, without a forward-mode derivative."""

    def forward(self, inputs):
        return _Reverse.apply(inputs)


def batch(size=8, masked=False):
    """A random batch; masked: half of the target's losses and one auxiliary loss are missing."""
    mask = None
    if masked:
        mask = torch.ones(size, K, dtype=torch.bool)
        mask[::2, 0] = False
        mask[1, 2] = False
    labels = torch.randint(CLASSES, (size, K))
    return Small(torch.randn(size, INPUT), labels, torch.randperm(SAMPLES)[:size], mask)


def drawn(scheduler, std=0.5):
    """The scheduler with all parameters drawn anew, non-negative where ``clamp`` says so."""
    if getattr(scheduler, "balance", None) is not None:
        scheduler.balance.odds.copy_(torch.randn(()).exp())
    for parameter in scheduler.parameters():
        nn.init.normal_(parameter, std=std)
    if isinstance(scheduler, (MonoLinearHyperNet, MonoNonlinearHyperNet)):
        for parameter in scheduler.parameters():
            parameter.data.abs_()
    return scheduler


SCHEDULERS = {
    "joint": lambda: MonoJoint(0, K, D),
    "joint_stable": lambda: StableJoint(0, K, D),
    "naive": lambda: Naive_hyper(SAMPLES, K),
    "linear": lambda: MonoLinearHyperNet(0, K, skip_connection=True),
    "task": lambda: MonoNonlinearHyperNet(0, K, [4, 3], weight_normalization=False),
    "identity": lambda: Identity(0, K),
    "uncertainty": lambda: Uncertainty(0, K),
}
SCHEDULES = ("joint", "joint_stable", "naive")
UPPER = (*SCHEDULES, "linear", "task")  # those that an upper level learns


def odds(scheduler):
    """w_T : w_A of a scheduler that has them, else 1."""
    balance = getattr(scheduler, "balance", None)
    return 1.0 if balance is None else balance.odds.item()


# --------------------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------------------


def column_means(values, mask):
    """(K,): every column's mean over the entries of the mask."""
    if mask is None:
        return values.sum(dim=0) / len(values)
    return torch.stack([values[mask[:, k], k].sum() / mask[:, k].sum() for k in range(K)])


def standardised(losses, mask):
    """z (B, K), task by task over the samples that have a loss, 0 elsewhere."""
    z = torch.zeros_like(losses)
    for k in range(K):
        rows = slice(None) if mask is None else mask[:, k]
        values = losses[rows, k]
        std = ((values - values.mean()).square().sum() / (len(values) - 1)).sqrt()
        z[rows, k] = (values - values.mean()) / (std + 1e-6)
    return z


def factors(aux_weight):
    """a (K,)."""
    return torch.tensor([1.0] + [aux_weight] * (K - 1))


def halves(odds, tasks):
    """Weights of the target and of all others together: their ratio is ``odds``, and with the
    others alike the squares of all tasks' weights sum to the number of tasks."""
    others = tasks - 1
    each = math.sqrt(tasks / ((odds * others) ** 2 + others))
    return odds * others * each, others * each


def schedule_by_hand(name, phi, outputs, odds=1.0, labelled=1.0):
    """W (B, K) of the named parameters ``phi``, from what it sees as constants: RAW losses."""
    losses, features = outputs.losses.detach(), outputs.features.detach()
    if name == "naive":
        return reference.log1p_exp(phi["weights.weight"][outputs.sample_id])
    z = standardised(losses, outputs.mask)
    if name == "joint":
        a, b = phi["feature_sel.weight"], phi["feature_sel.bias"]
        label = 1 / (1 + torch.exp(-(phi["loss_w"] * z + phi["loss_b"])))
        task = reference.log1p_exp(phi["task_prior"])
        return reference.log1p_exp(features @ a.T + b) * label * task
    centred = features - features.mean(dim=0)
    directions = centred / centred.norm(dim=1, keepdim=True) / math.sqrt(D)
    heat = labelled / (1 + odds)  # labelled times w_A
    feature = 2 * torch.sigmoid(heat * directions @ phi["feature_sel.weight"].T)
    r = feature * 2 * torch.sigmoid(heat * phi["loss_w"] * z)
    others = torch.sigmoid(phi["task_prior"][1:])
    target, rest = halves(odds, K)
    s = torch.cat([torch.tensor([target]), rest * others / others.sum()])
    return r / column_means(r, outputs.mask) * s


def by_hand(name, phi, outputs, aux_weight=1.0, odds=1.0, labelled=1.0):
    """The scheduled loss of ``TaskLosses`` by the formulas; ``phi``: {name: parameter}."""
    scaled = outputs.losses * factors(aux_weight)
    if name in SCHEDULES:
        weights = schedule_by_hand(name, phi, outputs, odds, labelled)
        return column_means(weights * scaled, outputs.mask).sum()
    return combined_by_hand(name, phi, scaled, outputs.mask)


def combined_by_hand(name, phi, scaled, mask):
    """What a function of the losses a_k L_ik alone makes of them."""
    means = column_means(scaled, mask)
    if name == "identity":
        return means.sum()
    if name == "uncertainty":
        s = phi["log_variance"]
        return (torch.exp(-s) * means + s / 2).sum()
    if name == "linear":
        g, v = phi["linear.weight_g"], phi["linear.weight_v"]
        return (reference.weight_normalised(g, v) @ means).sum() + means[0]
    hidden = scaled if mask is None else torch.where(mask, scaled, 0.0)
    for layer in (0, 3):
        hidden = hidden @ phi[f"net.{layer}.weight"].T + phi[f"net.{layer}.bias"]
        hidden = reference.log1p_exp(hidden)
    return (hidden @ phi["net.6.weight"].T).mean() + means[0]


def weights_by_hand(name, phi, outputs, aux_weight=1.0, odds=1.0):
    """(B, K): W of a schedule; of a combiner N_k dS/d(a_k L_ik); 0 outside the mask."""
    mask = outputs.mask
    if name in SCHEDULES:
        weights = schedule_by_hand(name, phi, outputs, odds).detach()
    else:
        scaled = (outputs.losses.detach() * factors(aux_weight)).requires_grad_()
        (slope,) = torch.autograd.grad(combined_by_hand(name, phi, scaled, mask), scaled)
        weights = slope * (len(scaled) if mask is None else mask.sum(dim=0))
    return weights if mask is None else torch.where(mask, weights, 0.0)


def target_and_rest(phi, outputs, odds, theta, v, scale, labelled=1.0):
    """c / |v| (2,) and N (2, 2) of the two halves of the stable form's loss, of the target (task 0)
    and of the rest; without a factor on the auxiliary losses. NumPy arrays.

    Args: ``v``, the development gradient, and ``scale``, D: lists like ``theta``.
    """
    weights = schedule_by_hand("joint_stable", phi, outputs, odds, labelled).detach()
    means = column_means(weights * outputs.losses, outputs.mask)
    halves = [
        torch.autograd.grad(
            half, theta, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for half in (means[0], means[1:].sum())
    ]

    def product(a, b):
        return sum((x * y / d).sum().item() for x, y, d in zip(a, b, scale, strict=True))

    gram = np.array([[product(a, b) for b in halves] for a in halves])
    return np.array([product(a, v) for a in halves]) / product(v, v) ** 0.5, gram


def double_backward(losses, dev_losses, theta, phi, alpha, terms):
    """- d/dphi <g, v_0 + ... + v_J> by plain double backward.

    Args: ``losses``: scheduled losses of the training batches; ``dev_losses``: of the development
    batches; both with their graphs.
    """

    def gradient(value, inputs, **more):
        return torch.autograd.grad(
            value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True, **more
        )

    term = gradient(sum(dev_losses) / len(dev_losses), theta)
    total = list(term)
    g = gradient(sum(losses) / len(losses), theta, create_graph=True)
    for _ in range(terms):
        inner = sum((a * b).sum() for a, b in zip(g, term, strict=True))
        term = [t - alpha * h for t, h in zip(term, gradient(inner, theta), strict=True)]
        total = [s + t for s, t in zip(total, term, strict=True)]
    inner = sum((a * b).sum() for a, b in zip(g, total, strict=True))
    return [-m for m in gradient(inner, phi)]
