"""Schedulers: networks that turn the losses of a batch into one scheduled training loss.

Notation (Chen et al., "Auxiliary Learning with Joint Task and Data Scheduling", ICML 2022):

    losses    L   (B, K)   per-sample, per-task losses; column ``main_task`` is the target task
    features  F   (B, d)   the backbone's pooled output
    schedule  W   (B, K)   how much sample i counts under task k, all entries > 0
    mask      m   (B, K)   True where a loss exists (semi-supervised); None means everywhere

The parameters of a scheduler are the upper-level parameters phi. Whatever a schedule looks at
(features, losses) is a constant to it: no gradient reaches the task model through W.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

STANDARDISE_EPS = 1e-6
FACTORS = ("feature", "loss", "task")  # of JTDS's schedule
TARGET_SHARES = ("learned", "fixed", "free")  # of the stable form's


def masked_column_means(values, mask=None):
    """Mean of every column of ``values`` (B, K) over the entries where ``mask`` holds, shape (K,).

    A column without any such entry has mean 0. Entries outside the mask are never read: they may
    be NaN.
    """
    if mask is None:
        return values.mean(dim=0)
    count = mask.sum(dim=0).clamp(min=1)
    return values.masked_fill(~mask, 0.0).sum(dim=0) / count


def standardise(losses, mask=None):
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
    """A scheduler of ``input_dim`` tasks; column ``main_task`` is the target."""

    def __init__(self, main_task, input_dim):
        super().__init__()
        if not 0 <= main_task < input_dim:
            raise ValueError(f"main_task must be in 0 .. {input_dim - 1}, not {main_task}")
        self.main_task = main_task
        self.input_dim = input_dim

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        """The scheduled loss, a scalar, of ``losses`` (B, K)."""
        raise NotImplementedError

    def scheduled_loss(self, losses, features=None, sample_id=None, mask=None):
        """The scheduled loss, called alike for every scheduler; each takes what it needs.

        Args: ``losses`` (B, K), ``features`` (B, d), ``sample_id`` (B,) places in the training
        set, ``mask`` (B, K). The result is differentiable in ``losses`` and in the scheduler.
        """
        return self(losses, mask=mask)

    def before_lower_step(self, model, batch, average):
        """Called with the task model and the batch ahead of every lower step; most do nothing.

        ``average``: callable (list of tensors, batches) -> their mean over the processes of a
        distributed run.
        """

    def get_weights(self):
        """The scheduler's parameters, as a list."""
        return list(self.parameters())


class MonoHyperNet(HyperNet):
    """A scheduler that increases with every loss, as long as ``clamp()`` follows each step."""

    def clamp(self):
        """Project the parameters back to where the scheduler is monotone."""
        raise NotImplementedError


class Identity(HyperNet):
    """All weights one: the mean over samples of the sum over tasks. Nothing to learn."""

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        return masked_column_means(losses, mask).sum()


class Uncertainty(HyperNet):
    """Weights from a learned noise per task: sum_k exp(-s_k) L_k + s_k / 2, L_k the task's mean.

    s_k is the logarithm of the task's variance, 0 at the start; it is trained with the task model,
    on the same loss (Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh
    Losses", CVPR 2018, eq. 10 and section 3.2 for cross entropies).
    """

    def __init__(self, main_task, input_dim):
        super().__init__(main_task, input_dim)
        self.log_variance = nn.Parameter(torch.zeros(input_dim))

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        means = masked_column_means(losses, mask)
        penalty = self.log_variance / 2
        if mask is not None:  # a task without a loss in this batch says nothing about its noise
            penalty = penalty * mask.any(dim=0)
        return (torch.exp(-self.log_variance) * means + penalty).sum()


# --------------------------------------------------------------------------------------------------
# JTDS
# --------------------------------------------------------------------------------------------------


class MonoJoint(MonoHyperNet):
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
        main_task,
        input_dim,
        feature_dim,
        hidden_sizes=1,
        nonlinearity=None,
        bias=True,
        dropout_rate=0.0,
        weight_normalization=True,
        K=2,
        init_lower=0.0,
        init_upper=1.0,
        *,
        factors=FACTORS,
    ):
        super().__init__(main_task, input_dim)
        self.learned = _checked_factors(factors)
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

    def factors(self, features, losses, mask=None):
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
        """The schedule W (B, K); differentiable in the scheduler, constant in the model."""
        feature_factor, loss_factor, task_factor = self.factors(features, losses, mask)
        return feature_factor * loss_factor * task_factor

    def forward(self, features, losses, to_train=True, mask=None):
        """The scheduled loss sum_k mean_i W_ik L_ik, a scalar.

        ``to_train=True`` (lower level) holds W constant; ``to_train=False`` (upper level) leaves it
        differentiable in the scheduler. With a ``mask`` each task's mean is over its own samples.
        """
        weights = self.schedule(features, losses, mask)
        if to_train:
            weights = weights.detach()
        return _weighted_mean(weights, losses, mask)

    def scheduled_loss(self, losses, features=None, sample_id=None, mask=None):
        return self(features, losses, to_train=False, mask=mask)

    def clamp(self):
        """Nothing to project: every value of the parameters gives positive weights."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A vector saved as a row or a column is the same vector.
        for name, parameter in self.named_parameters(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.numel() == parameter.numel():
                state_dict[prefix + name] = saved.reshape(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class StableJoint(MonoHyperNet):
    r"""JTDS's three factors without the direction in which its weights run away.

        W_ik = r_ik / mean_i r_ik * s_k / mean_k s_k
                                    task factor
        r_ik = 2 sigmoid(a_k . G_i) * 2 sigmoid(u_k z_ik)
               feature factor         loss factor
        s_k  = sigmoid(t_k) / mean of the auxiliary tasks' sigmoid(t_l)      k an auxiliary task
        s_k  = (1 + q) / (1 + q exp(-t_k)),  q = sqrt(K - 1)                 k the target

    with z the standardised losses, as in ``MonoJoint``, and G the features of the batch, centred,
    each sample's scaled to length 1 / sqrt(d). What differs from ``MonoJoint``, and why:

    - A lower optimiser like Adam does not feel the scale of the loss, so nothing holds the scale of
      a schedule. Here every task's weights are divided by their mean over the batch (over the
      samples that have a loss), and the task factors by their mean over the tasks: no parameter can
      change the mean over the tasks, 1. To give one task more is to give another less.
    - Bounded factors. The target counts less than 1 + sqrt(K - 1) times the mean auxiliary task:
      about half-way, on a logarithmic scale, from equal weights to half of all weight. No sample
      counts more than 4 / mean r times as much as its task's mean sample.
    - All parameters are 0 at first, where W = 1 exactly: equal weights, until the development set
      says otherwise. With inputs of that size, a step of Adam at rate r moves the logits of the
      feature and task factors by about r at most, those of the loss factor by about r |z|.

    K (d + 2) parameters: feature_sel.weight a (K, d), loss_w u (K,), task_prior t (K,).

    Args: ``input_dim`` is K, ``feature_dim`` is d; ``factors``: those that are learned.
    ``target_share`` of all weight: "learned", the above; "fixed", s_k = 1 for the target, for one
    with few labels, of which a single step always wants more (and with two tasks, no task factor is
    left); "free", for ablations: W_ik = r_ik 2 sigmoid(t_k), nothing is held.
    """

    def __init__(
        self, main_task, input_dim, feature_dim, *, factors=FACTORS, target_share="learned"
    ):
        super().__init__(main_task, input_dim)
        self.learned = _checked_factors(factors)
        if target_share not in TARGET_SHARES:
            raise ValueError(f"target_share must be one of {TARGET_SHARES}, not {target_share!r}")
        self.target_share = target_share
        if "feature" in self.learned:
            self.feature_sel = nn.Linear(feature_dim, input_dim, bias=False)
            nn.init.zeros_(self.feature_sel.weight)
        if "loss" in self.learned:
            self.loss_w = nn.Parameter(torch.zeros(input_dim))
        if "task" in self.learned:
            self.task_prior = nn.Parameter(torch.zeros(input_dim))

    def factors(self, features, losses, mask=None):
        """The three factors of the schedule: feature (B, K), loss (B, K), task (K,)."""
        feature = loss = torch.zeros_like(losses.detach())
        task = torch.zeros_like(losses[0].detach())
        if "feature" in self.learned:
            centred = features.detach() - features.detach().mean(dim=0)
            feature = self.feature_sel(F.normalize(centred, dim=1)) / features.shape[1] ** 0.5
        if "loss" in self.learned:
            loss = self.loss_w * standardise(losses.detach(), mask)
        if "task" in self.learned:
            task = self.task_prior
        return 2 * torch.sigmoid(feature), 2 * torch.sigmoid(loss), self._task_factor(task)

    def _task_factor(self, t):
        """s_k / mean_k s_k, (K,), of the task priors t (K,)."""
        if self.target_share == "free":
            return 2 * torch.sigmoid(t)
        others = self.input_dim - 1
        if not others:
            return 1 + 0 * t
        target = torch.arange(self.input_dim, device=t.device) == self.main_task
        score = F.logsigmoid(t).masked_fill(target, -torch.inf)
        s = torch.exp(score - score.max().detach())  # up to a number, none of them underflows
        s = s * (others / s.sum())
        if self.target_share == "fixed":
            return s.masked_fill(target, 1.0)
        q = others**0.5
        of_target = (1 + q) / (1 + q * torch.exp(-t.clamp(min=-40)))
        s = torch.where(target, of_target, s)
        return s / s.mean()

    def schedule(self, features, losses, mask=None):
        """The schedule W (B, K); differentiable in the scheduler, constant in the model."""
        feature, loss, task = self.factors(features, losses, mask)
        weights = feature * loss
        if self.target_share != "free":
            means = masked_column_means(weights, mask)
            weights = weights / torch.where(means > 0, means, 1.0)
        return weights * task

    def forward(self, features, losses, to_train=True, mask=None):
        """The scheduled loss sum_k mean_i W_ik L_ik, a scalar; as ``MonoJoint.forward``."""
        weights = self.schedule(features, losses, mask)
        return _weighted_mean(weights.detach() if to_train else weights, losses, mask)

    def scheduled_loss(self, losses, features=None, sample_id=None, mask=None):
        return self(features, losses, to_train=False, mask=mask)

    def clamp(self):
        """Nothing to project: every value of the parameters gives positive weights."""


def _checked_factors(factors):
    unknown = set(factors) - set(FACTORS)
    if unknown or not factors:
        raise ValueError(f"factors must be some of {FACTORS}, not {tuple(factors)}")
    return tuple(name for name in FACTORS if name in factors)


class Naive_hyper(MonoHyperNet):
    """Naive joint scheduler (N-JTDS): one free weight per training sample and task.

    W_ik = softplus(table[sample i, k]), table of ``data_num`` x ``task_num``, drawn from N(0, 1).
    """

    def __init__(self, data_num, task_num):
        super().__init__(main_task=0, input_dim=task_num)
        self.weights = nn.Embedding(data_num, task_num)

    def schedule(self, sample_id):
        """The schedule W (B, K) of the samples at ``sample_id`` (B,) in the training set."""
        return F.softplus(self.weights(sample_id))

    def forward(self, losses, sample_id, mask=None):
        """The scheduled loss sum_k mean_i W_ik L_ik, a scalar."""
        return _weighted_mean(self.schedule(sample_id), losses, mask)

    def scheduled_loss(self, losses, features=None, sample_id=None, mask=None):
        return self(losses, sample_id, mask)

    def clamp(self):
        """Nothing to project: every value of the table gives positive weights."""


def _weighted_mean(weights, losses, mask):
    if mask is not None:  # before the product, so that a masked NaN is not multiplied
        losses = losses.masked_fill(~mask, 0.0)
    return masked_column_means(weights * losses, mask).sum()


# --------------------------------------------------------------------------------------------------
# AuxiLearn (Navon et al., "Auxiliary Learning by Implicit Differentiation", ICLR 2021)
# --------------------------------------------------------------------------------------------------


class WeightNormLinear(nn.Module):
    """A linear layer whose weight is g v / |v|, row by row (Salimans and Kingma, 2016)."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.ones(out_features, in_features))

    @property
    def weight(self):
        """The effective weight (out_features, in_features)."""
        norm = self.weight_v.norm(dim=1, keepdim=True)
        # clamp() may bring a whole row of v to zero, where the direction is undefined.
        return self.weight_v * (self.weight_g / torch.where(norm > 0, norm, 1.0))

    @torch.no_grad()
    def set_weight(self, weight):
        """Set g and v so that the effective weight is ``weight``; a zero row keeps its v."""
        norm = weight.norm(dim=1, keepdim=True)
        self.weight_v.copy_(torch.where(norm > 0, weight, self.weight_v))
        self.weight_g.copy_(norm)

    def forward(self, inputs):
        return F.linear(inputs, self.weight, self.bias)


def _combiner_layer(in_features, out_features, bias, weight_normalization, initial_weight):
    """A linear layer with zero biases whose weight is what ``initial_weight(weight)`` fills in."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        initial_weight(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    if not weight_normalization:
        return layer
    normalised = WeightNormLinear(in_features, out_features, bias=bias)
    normalised.set_weight(layer.weight)
    return normalised


@torch.no_grad()
def _clamp_parameters(module, biases):
    for name, parameter in module.named_parameters():
        if biases or not name.endswith("bias"):
            parameter.clamp_(min=0.0)


class LinearHyperNet(HyperNet):
    """One learned weight per task: ``linear(L).mean()``, plus the target's mean loss if skipping.

    The bias shifts the value of the loss only; no gradient of the task model depends on it.
    """

    def __init__(
        self,
        main_task,
        input_dim,
        skip_connection=False,
        init_value=1.0,
        weight_normalization=True,
    ):
        super().__init__(main_task, input_dim)
        self.skip_connection = skip_connection
        self.linear = _combiner_layer(
            input_dim,
            1,
            bias=True,
            weight_normalization=weight_normalization,
            initial_weight=lambda weight: nn.init.constant_(weight, init_value),
        )

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        # linear(L).mean() = linear(column means): so a masked column counts by its own mean.
        means = masked_column_means(losses, mask)
        loss = self.linear(means).squeeze(-1)
        return loss + means[self.main_task] if self.skip_connection else loss

    def get_weights(self):
        """The weight of every task, shape (1, K)."""
        return self.linear.weight

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The bias is inert, so a state saved without one is complete.
        state_dict.setdefault(prefix + "linear.bias", torch.zeros_like(self.linear.bias))
        super()._load_from_state_dict(state_dict, prefix, *args)


class MonoLinearHyperNet(LinearHyperNet, MonoHyperNet):
    """``LinearHyperNet`` with non-negative weights."""

    def __init__(
        self,
        main_task,
        input_dim,
        skip_connection=False,
        clamp_bias=False,
        init_value=1.0,
        weight_normalization=True,
    ):
        super().__init__(main_task, input_dim, skip_connection, init_value, weight_normalization)
        self.clamp_bias = clamp_bias

    def clamp(self):
        """Bound the weights (g and v if weight-normalised) at 0, the bias too if ``clamp_bias``."""
        _clamp_parameters(self.linear, biases=self.clamp_bias)


class NonlinearHyperNet(HyperNet):
    """A network of the losses: ``net(L).mean() + L[:, main_task].mean()``.

    ``net`` is Linear -> nonlinearity -> dropout for every entry of ``hidden_sizes`` (an int or a
    list), then a Linear to one output without bias. Weights uniform in [``init_lower``,
    ``init_upper``], or PyTorch's own initialisation where these are None; biases zero.
    ``nonlinearity`` is a module, softplus by default. Masked losses enter the network as 0.
    """

    def __init__(
        self,
        main_task,
        input_dim,
        hidden_sizes=1,
        nonlinearity=None,
        bias=True,
        dropout_rate=0.0,
        init_upper=None,
        init_lower=None,
        weight_normalization=True,
    ):
        super().__init__(main_task, input_dim)
        if (init_lower is None) != (init_upper is None):
            raise ValueError("init_lower and init_upper go together: give both or neither")
        self.init_lower, self.init_upper = init_lower, init_upper
        widths = [hidden_sizes] if isinstance(hidden_sizes, int) else list(hidden_sizes)
        layers = []
        fan_in = input_dim
        for width in widths:
            layers += [
                _combiner_layer(fan_in, width, bias, weight_normalization, self._initial_weight),
                nn.Softplus() if nonlinearity is None else copy.deepcopy(nonlinearity),
                nn.Dropout(dropout_rate),
            ]
            fan_in = width
        layers.append(_combiner_layer(fan_in, 1, False, weight_normalization, self._initial_weight))
        self.net = nn.Sequential(*layers)

    def _initial_weight(self, weight):
        if self.init_lower is not None:
            nn.init.uniform_(weight, self.init_lower, self.init_upper)

    def forward(self, losses, outputs=None, labels=None, data=None, *, mask=None):
        inputs = losses if mask is None else losses.masked_fill(~mask, 0.0)
        return self.net(inputs).mean() + masked_column_means(losses, mask)[self.main_task]


class MonoNonlinearHyperNet(NonlinearHyperNet, MonoHyperNet):
    """``NonlinearHyperNet`` with non-negative weights, hence increasing in every loss."""

    def _initial_weight(self, weight):
        super()._initial_weight(weight)
        if self.init_lower is None:
            weight.abs_()  # PyTorch's initialisation is symmetric around 0

    def clamp(self):
        """Bound all weights (g and v if weight-normalised) at 0; biases stay free."""
        _clamp_parameters(self.net, biases=False)
