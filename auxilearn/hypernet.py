"""Schedulers: networks that turn the losses of a batch into one scheduled training loss.

Notation (Chen et al., "Auxiliary Learning with Joint Task and Data Scheduling", ICML 2022):

    losses    L   (B, K)   per-sample, per-task losses; column ``main_task`` is the target task
    features  F   (B, d)   the backbone's pooled output
    schedule  W   (B, K)   how much sample i counts under task k, all entries > 0
    mask      m   (B, K)   True where a loss exists (semi-supervised); None means everywhere
    factors   a   (K,)     1 for the target, ``aux_weight`` for every auxiliary task

A task model returns losses, features and mask as ``losses.TaskLosses``. The scheduled loss is
mean_i sum_k W_ik a_k L_ik. The parameters of a scheduler are the upper-level parameters phi.
Whatever a schedule looks at is a constant to it: no gradient reaches the task model through W.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxilearn.losses import (
    TaskLosses,
    check_features,
    check_outputs,
    check_sample_id,
    masked_column_means,
    times_aux_weight,
)

STANDARDISE_EPS = 1e-6
FACTORS = ("feature", "loss", "task")  # of JTDS's schedule


def scheduled_loss(scheduler: "HyperNet", outputs: TaskLosses, aux_weight: float = 1.0) -> Tensor:
    """The scheduler's scalar for ``outputs``, differentiable in both levels.

    ``aux_weight`` multiplies the losses of all auxiliary tasks. Raises ValueError: the shapes of
    ``outputs`` do not fit each other or the scheduler; a masked loss makes the model's gradient NaN
    (found on the CPU, where looking does not wait). TypeError: ``outputs`` are no ``TaskLosses``.
    """
    check_outputs(outputs, scheduler)
    losses = times_aux_weight(outputs.losses, aux_weight, scheduler.main_task)
    return loss_of_schedule(scheduler, losses, outputs)


def loss_of_schedule(scheduler: "HyperNet", losses: Tensor, outputs: TaskLosses) -> Tensor:
    """``scheduled_loss`` with a_k L_ik given as ``losses``: its derivative in them is W_ik / N_k.

    N_k is the number of samples with a loss under task k. The caller has checked ``outputs``
    (``check_outputs``).
    """
    loss = scheduler.scheduled_loss(losses, outputs.detached())
    if loss.dim():
        raise ValueError(
            f"{type(scheduler).__name__}.scheduled_loss must return a scalar, not shape "
            f"{tuple(loss.shape)}"
        )
    return loss


def weighted_mean(weights: Tensor, losses: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum_k mean_i W_ik L_ik, a scalar; every task's mean is over its own samples.

    Raises ValueError: ``weights`` are not (B, K) like ``losses``.
    """
    if weights.shape != losses.shape:
        raise ValueError(
            f"weights must be (B, K) like losses, {tuple(losses.shape)}, not {tuple(weights.shape)}"
        )
    if mask is not None:  # before the product, so that a masked NaN is not multiplied
        losses = losses.masked_fill(~mask, 0.0)
    return masked_column_means(weights * losses, mask).sum()


def standardise(losses: Tensor, mask: Tensor | None = None) -> Tensor:
    """Losses standardised task by task, (L - mean) / (unbiased std + 1e-6), shape (B, K).

    Zero wherever the formula says nothing: in a column of fewer than two losses, in a column whose
    losses are all equal, and outside the mask.
    """
    if mask is None:
        mask = torch.ones_like(losses, dtype=torch.bool)
    filled = losses.masked_fill(~mask, 0.0)
    count = mask.sum(dim=0)
    mean = filled.sum(dim=0) / count.clamp(min=1)
    deviation = (filled - mean).masked_fill(~mask, 0.0)
    std = (deviation.square().sum(dim=0) / (count - 1).clamp(min=1)).sqrt()
    highest = losses.masked_fill(~mask, -torch.inf).amax(dim=0)
    lowest = losses.masked_fill(~mask, torch.inf).amin(dim=0)
    # A constant column is recognised by its range: its rounded mean need not equal its entries.
    return torch.where(highest > lowest, deviation / (std + STANDARDISE_EPS), 0.0)


class HyperNet(nn.Module):
    """A scheduler of ``input_dim`` tasks; column ``main_task`` is the target.

    A scheduler of one's own overrides ``scheduled_loss``. Upper steps call it and put its buffers
    back, ``schedule_weights`` calls it in evaluation mode: update them ``if self.training``. Its
    ``state_dict`` must be all of its state, the same on every process of a distributed run;
    ``needs_dev`` asks for development batches before every lower step. A ``Balance``
    held as ``balance`` learns from every upper step.
    """

    needs_dev = False

    def __init__(self, main_task: int, input_dim: int):
        super().__init__()
        if not 0 <= main_task < input_dim:
            raise ValueError(f"main_task must be in 0 .. {input_dim - 1}, not {main_task}")
        self.main_task = main_task
        self.input_dim = input_dim

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        """The scheduled loss, a scalar, of ``losses`` (B, K).

        ``outputs``, ``labels`` and ``data`` are of the released signature; nothing here reads them.
        """
        raise NotImplementedError

    def scheduled_loss(self, losses: Tensor, seen: TaskLosses) -> Tensor:
        """The scheduled loss, a scalar, differentiable in ``losses`` and in the scheduler.

        Args: ``losses`` (B, K) with their graph, a_k L_ik; ``seen``: all that weights may depend
        on, without a graph, with the raw losses.
        """
        return self(losses, mask=seen.mask)

    def before_lower_step(self, model, batch, dev_batches, average):
        """Called ahead of every lower step; most schedulers do nothing.

        Args: the task model, the training batch, the development batches (None unless
        ``needs_dev``), and ``average``: callable (tensors, batches) -> their mean over the
        processes of a distributed run.
        """

    def clamp(self) -> None:
        """Project the parameters to where they are allowed, after every upper step."""

    def get_weights(self) -> list[nn.Parameter]:
        """The scheduler's parameters."""
        return list(self.parameters())


class MonoHyperNet(HyperNet):
    """The released name for schedulers that increase with every loss; nothing of its own."""


class Identity(HyperNet):
    """All weights one: the mean over samples of the sum over tasks. Nothing to learn."""

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        return masked_column_means(losses, mask).sum()


class JointSchedule(MonoHyperNet):
    """A scheduler with a schedule W of features and losses; ``schedule`` is the subclass's."""

    def schedule(self, features: Tensor, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """The schedule W (B, K); differentiable in the scheduler, constant in the model."""
        raise NotImplementedError

    def forward(  # type: ignore[override]  # the released signature
        self, features: Tensor, losses: Tensor, to_train: bool = True, mask: Tensor | None = None
    ) -> Tensor:
        """The scheduled loss sum_k mean_i W_ik L_ik, a scalar.

        ``to_train=True`` (lower level) holds W constant; ``to_train=False`` (upper level) leaves it
        differentiable in the scheduler. ``Bilevel`` calls ``scheduled_loss`` instead, and freezes
        the scheduler's parameters in lower steps. With a ``mask`` each task's mean is over its own
        samples.
        """
        weights = self.schedule(features, losses, mask)
        return weighted_mean(weights.detach() if to_train else weights, losses, mask)

    def scheduled_loss(self, losses, seen):
        check_features(self, seen.features)
        weights = self.schedule(seen.features, seen.losses, seen.mask)
        return weighted_mean(weights, losses, seen.mask)


class MonoJoint(JointSchedule):
    r"""Joint task and data scheduler (JTDS; Chen et al., ICML 2022).

        W_ik = softplus((A F_i + b)_k) * sigmoid(u_k z_ik + c_k) * softplus(t_k)
               feature factor            loss factor               task factor

    with z the losses standardised task by task (see ``standardise``). K (d + 4) parameters:

        feature_sel.weight  A (K, d)  task prototypes            uniform in [-0.05, 0.05]
        feature_sel.bias    b (K,)                               0
        loss_w, loss_b      u, c (K,) adaptive pass filters      uniform in [0, 0.05]; 0
        task_prior          t (K,)    task relation vector       1

    Args: ``input_dim`` is K, ``feature_dim`` is d. ``factors``: those that are learned, for
    ablations; one left out has no parameters, and is the constant softplus(0), sigmoid(0) or
    softplus(1), around which it starts. The remaining arguments belong to the other schedulers;
    they are accepted so that all can be built by one call, and have no effect.
    """

    def __init__(
        self,
        main_task: int,
        input_dim: int,
        feature_dim: int,
        hidden_sizes=1,
        nonlinearity=None,
        bias=True,
        dropout_rate=0.0,
        weight_normalization=True,
        K=2,
        init_lower=0.0,
        init_upper=1.0,
        *,
        factors: Sequence[str] = FACTORS,
    ):
        super().__init__(main_task, input_dim)
        self.learned = checked_factors(factors)
        if "feature" in self.learned:
            self.feature_sel = nn.Linear(feature_dim, input_dim)
        if "task" in self.learned:
            self.task_prior = nn.Parameter(torch.ones(input_dim))
        if "loss" in self.learned:
            self.loss_w = nn.Parameter(torch.empty(input_dim).uniform_(0.0, 0.05))
            self.loss_b = nn.Parameter(torch.zeros(input_dim))
        if "feature" in self.learned:
            nn.init.uniform_(self.feature_sel.weight, -0.05, 0.05)
            nn.init.zeros_(self.feature_sel.bias)

    def factors(
        self, features: Tensor, losses: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three factors of the schedule: feature (B, K), loss (B, K), task (K,)."""
        feature = loss = torch.zeros_like(losses.detach())
        task = torch.ones_like(losses[0].detach())
        if "feature" in self.learned:
            feature = self.feature_sel(features.detach())
        if "loss" in self.learned:
            loss = self.loss_w * standardise(losses.detach(), mask) + self.loss_b
        if "task" in self.learned:
            task = self.task_prior
        return F.softplus(feature), torch.sigmoid(loss), F.softplus(task)

    def schedule(self, features, losses, mask=None):
        feature_factor, loss_factor, task_factor = self.factors(features, losses, mask)
        return feature_factor * loss_factor * task_factor

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A vector saved as a row or a column is the same vector.
        for name, parameter in self.named_parameters(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.numel() == parameter.numel():
                state_dict[prefix + name] = saved.reshape(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def checked_factors(factors):
    """Names of factors in the order of the formula. ValueError: unknown, or none."""
    unknown = set(factors) - set(FACTORS)
    if unknown or not factors:
        raise ValueError(f"factors must be some of {FACTORS}, not {tuple(factors)}")
    return tuple(name for name in FACTORS if name in factors)


class Naive_hyper(MonoHyperNet):
    """Naive joint scheduler (N-JTDS): one free weight per training sample and task.

    W_ik = softplus(table[sample i, k]), table of ``data_num`` x ``task_num``, drawn from N(0, 1).
    """

    def __init__(self, data_num: int, task_num: int):
        super().__init__(main_task=0, input_dim=task_num)
        self.weights = nn.Embedding(data_num, task_num)

    def schedule(self, sample_id: Tensor) -> Tensor:
        """The schedule W (B, K) of the samples at ``sample_id`` (B,) in the training set."""
        return F.softplus(self.weights(sample_id))

    def forward(  # type: ignore[override]  # the released signature
        self, losses: Tensor, sample_id: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The scheduled loss sum_k mean_i W_ik L_ik, a scalar."""
        return weighted_mean(self.schedule(sample_id), losses, mask)

    def scheduled_loss(self, losses, seen):
        check_sample_id(self, seen.sample_id)
        return self(losses, seen.sample_id, seen.mask)


# AuxiLearn's combiners stand in ``baselines.combiners``; the released package has them here.
_COMBINERS = ("LinearHyperNet", "MonoLinearHyperNet", "NonlinearHyperNet", "MonoNonlinearHyperNet")


def __getattr__(name):
    if name in _COMBINERS:
        from auxilearn.baselines import combiners

        return getattr(combiners, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
