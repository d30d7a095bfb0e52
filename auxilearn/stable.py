"""The stable form of JTDS: its schedule, and the recipe that trains with it.

``docs/stability.md`` says what was wrong with the published form and what each change is worth.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxilearn.balance import Balance
from auxilearn.bilevel import Bilevel
from auxilearn.hypernet import FACTORS, HyperNet, JointSchedule, checked_factors, standardise
from auxilearn.implicit_diff import identity, preconditioned
from auxilearn.losses import masked_column_means
from auxilearn.optim import adam_scale, upper_adam

TARGET_SHARES = ("learned", "start", "equal")

# The recipe as settings of ``run.config.Config``.
RECIPE: dict[str, Any] = {
    "upper_optimizer": "adam",  # with betas .9 and .99, see ``optim.upper_adam``
    "upper_lr": 0.03,
    "hyperstep": 5,
    "solver": "identity",
    "precondition": "adam",
    "max_grad_norm": 0.0,
    "n_meta_train_loss_accum": 4,
    "hold_out_dev": False,
}
FINE_TUNING_DIVISOR = 5  # of the lower level's learning rate
UPPER_DECAY = 1e-5


class StableJoint(JointSchedule):
    r"""JTDS's three factors without the direction in which its weights run away.

        W_ik = r_ik / mean_i r_ik * s_k
                                    task factor
        r_ik = 2 sigmoid(h a_k . G_i) * 2 sigmoid(h u_k z_ik)     h = w_A * min(labelled, 1)
               feature factor           loss factor
        s_k  = c w_T                                                        k the target
        s_k  = c w_A sigmoid(t_k) / sum of the auxiliary tasks' sigmoid(t_l)     k an auxiliary task
        c    = sqrt(K / (w_T^2 + w_A^2 / (K - 1)))

    with z the standardised losses, as in ``MonoJoint``, and G the features of the batch, centred,
    each sample's scaled to length 1 / sqrt(d). What differs from ``MonoJoint``, and why:

    - A lower optimiser like Adam does not feel the scale of the loss, so nothing holds the scale of
      a schedule. Here every task's weights are divided by their mean over the batch (over the
      samples that have a loss), and to give one auxiliary task more is to give another less. Other
      optimisers do feel it: c keeps the length that the gradient has under equal weights, were the
      tasks' gradients equally long and at right angles.
    - The weight of the target, w_T, against that of all auxiliary tasks, w_A = 1 - w_T, is solved
      for in every upper step (``balance``), from the first one on. At the start every label counts
      alike, so w_T is 1/2 where all samples have all labels.
    - Samples are weighed only as far as the target is not trusted: their logits hold w_A. While the
      target is underfitted, w_T is near 1, and to prefer samples that are like the development
      set's, or easy, slows it down; where its labels are wrong, w_A is large. Where they are few,
      w_A is too, but there is little to tell samples apart by: the logits hold their share as well.
    - Bounded factors. No sample counts more than 4 / mean r times as much as its task's mean
      sample.
    - All parameters are 0 at first: no sample and no auxiliary task counts more than another, until
      the development set says otherwise. With inputs of that size, a step of Adam at rate r moves
      the logits of the feature and task factors by about r at most, those of the loss factor by
      about r |z|.

    K (d + 2) parameters: feature_sel.weight a (K, d), loss_w u (K,), task_prior t (K,), whose entry
    of the target has no effect.

    Args: ``input_dim`` is K, ``feature_dim`` is d; ``factors``: those that are learned (without
    "task", the target's weight stays where it starts). ``target_share`` of all weight: "learned",
    the above; for ablations "start", held where it starts, and "equal", held at 1 / K.
    ``labelled``: the number of the target's labels over the mean number of an auxiliary task's,
    below 1 where most samples lack the target's label: w_T : w_A at the start. ``tempered=False``,
    for ablations, makes h 1.
    """

    def __init__(
        self,
        main_task: int,
        input_dim: int,
        feature_dim: int,
        *,
        factors: Sequence[str] = FACTORS,
        target_share: str = "learned",
        labelled: float = 1.0,
        tempered: bool = True,
    ):
        super().__init__(main_task, input_dim)
        self.learned = checked_factors(factors)
        if target_share not in TARGET_SHARES:
            raise ValueError(f"target_share must be one of {TARGET_SHARES}, not {target_share!r}")
        self.target_share = target_share
        self.tempered = tempered
        self.labelled = min(labelled, 1.0)
        if "feature" in self.learned:
            self.feature_sel = nn.Linear(feature_dim, input_dim, bias=False)
            nn.init.zeros_(self.feature_sel.weight)
        if "loss" in self.learned:
            self.loss_w = nn.Parameter(torch.zeros(input_dim))
        if "task" in self.learned:
            self.task_prior = nn.Parameter(torch.zeros(input_dim))
        self.balance: Balance | None = None
        others = input_dim - 1
        self.odds = labelled  # w_T / w_A; ``balance`` has its own
        if not others:
            self.odds = 0.0  # the target alone: samples are weighed in full
        elif target_share == "equal":
            self.odds = 1 / others
        elif target_share == "learned" and "task" in self.learned:
            self.balance = Balance(labelled)

    def factors(
        self, features: Tensor, losses: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three factors of the schedule: feature (B, K), loss (B, K), task (K,)."""
        feature = loss = torch.zeros_like(losses.detach())
        task = torch.zeros_like(losses[0].detach())
        if "feature" in self.learned:
            centred = features.detach() - features.detach().mean(dim=0)
            feature = self.feature_sel(F.normalize(centred, dim=1)) / features.shape[1] ** 0.5
        if "loss" in self.learned:
            loss = self.loss_w * standardise(losses.detach(), mask)
        if self.tempered:
            h = self.labelled / (1 + self._odds())  # w_A = 1 / (1 + w_T / w_A)
            feature, loss = feature * h, loss * h
        if "task" in self.learned:
            task = self.task_prior
        return 2 * torch.sigmoid(feature), 2 * torch.sigmoid(loss), self._task_factor(task)

    def _odds(self):
        """w_T / w_A now: the one that ``balance`` has learned, or the fixed one."""
        return self.odds if self.balance is None else self.balance.odds

    def _task_factor(self, t):
        """s_k, (K,), of the task priors t (K,)."""
        tasks = self.input_dim
        if tasks == 1:
            return 1 + 0 * t
        target = torch.arange(tasks, device=t.device) == self.main_task
        score = F.logsigmoid(t).masked_fill(target, -torch.inf)
        shares = torch.softmax(score, dim=0)  # up to a number, none of them underflows
        odds = self._odds()
        of_target, of_others = odds / (1 + odds), 1 / (1 + odds)
        length = (of_target**2 + of_others**2 / (tasks - 1)) ** 0.5
        return tasks**0.5 / length * torch.where(target, of_target, of_others * shares)

    def schedule(self, features, losses, mask=None):
        feature, loss, task = self.factors(features, losses, mask)
        weights = feature * loss
        means = masked_column_means(weights, mask)
        return weights / torch.where(means > 0, means, 1.0) * task


class TargetTask(HyperNet):
    """The target task alone, for fine-tuning. Nothing to learn."""

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        if mask is None:
            return losses[:, self.main_task].mean()
        return masked_column_means(losses, mask)[self.main_task]


def fit_stable(
    model: nn.Module,
    lower: torch.optim.Optimizer,
    train: Iterable,
    dev: Iterable,
    *,
    tasks: int,
    feature_dim: int,
    epochs: int,
    fine_tuning_epochs: int = 20,
    validate: Callable[[], float] | None = None,
    main_task: int = 0,
    aux_weight: float = 1.0,
    labelled: float = 1.0,
) -> StableJoint:
    """Train ``model`` by the recipe of the stable form. Returns the scheduler it learned.

    Every 5 lower steps are followed by an upper step of Adam (learning rate 0.03, betas .9 and .99)
    on the response of the lower optimiser's own step, from four training batches and one
    development batch; it also solves for the target's weight anew. In the end the target task alone
    is trained on the development set, at a fifth of the learning rate.

    Args:
        model: ``model(batch)`` returns ``TaskLosses``; in train mode, which ``validate`` may leave.
        lower: its optimiser, Adam or AdamW (for others the response is gradient descent's). Its
            learning rate ends at a fifth.
        train, dev: batches, such as a DataLoader or a list; iterated anew in every pass. ``train``
            should hold the development samples as well.
        tasks, feature_dim: K and d of ``TaskLosses``.
        labelled: as of ``StableJoint``, for data on which most samples lack the target's label.
        validate: returns a number to be maximised, called after every pass. Fine-tuning starts from
            the best pass, and the model ends as it was after the best one. Without it the last
            pass counts.

    Raises ValueError: ``train`` or ``dev`` is an iterator, or has no batch for an upper step.
    """
    for name, batches in (("train", train), ("dev", dev)):
        if iter(batches) is batches:
            raise ValueError(
                f"{name} must give its batches in every pass anew: give a DataLoader or a list, "
                "not an iterator"
            )
        if next(iter(batches), None) is None:
            raise ValueError(f"{name} must hold at least one batch")
    scheduler = StableJoint(main_task, tasks, feature_dim, labelled=labelled)
    scheduler.to(next(model.parameters()))
    solver = identity()
    if isinstance(lower, (torch.optim.Adam, torch.optim.AdamW)):
        solver = preconditioned(solver, lambda: adam_scale(lower, bilevel.lower_parameters()))
    upper = upper_adam(scheduler.parameters(), RECIPE["upper_lr"], UPPER_DECAY)
    bilevel = Bilevel(model, scheduler, lower, upper, solver=solver, aux_weight=aux_weight)
    best = _Best(model, validate)
    every, batches = RECIPE["hyperstep"], RECIPE["n_meta_train_loss_accum"]
    upper_batches, dev_batches = _endless(train), _endless(dev)
    step = 0
    for _ in range(epochs):
        for batch in train:
            bilevel.lower_step(batch)
            step += 1
            if step % every == 0:
                bilevel.upper_step(
                    list(itertools.islice(upper_batches, batches)), [next(dev_batches)]
                )
        best.consider()
    best.restore()
    lower.state.clear()  # a fresh optimiser
    for group in lower.param_groups:
        group["lr"] /= FINE_TUNING_DIVISOR
    fine_tuning = Bilevel(model, TargetTask(main_task, tasks), lower)
    for _ in range(fine_tuning_epochs):
        for batch in dev:
            fine_tuning.lower_step(batch)
        best.consider()
    best.restore()
    return scheduler


def _endless(batches):
    while True:
        yield from batches


class _Best:
    """The model as it was when ``validate`` liked it best."""

    def __init__(self, model, validate):
        self.model, self.validate = model, validate
        self.value, self.state = None, None

    def consider(self):
        if self.validate is None:
            return
        value = self.validate()
        self.model.train()
        if self.value is None or value > self.value:
            self.value, self.state = value, copy.deepcopy(self.model.state_dict())

    def restore(self):
        if self.state is not None:
            self.model.load_state_dict(self.state)
