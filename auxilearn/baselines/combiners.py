"""AuxiLearn's combiners: functions of the loss matrix alone.

Navon, Achituve, Maron, Chechik and Fetaya, "Auxiliary Learning by Implicit Differentiation", ICLR
2021. The weight of a sample's gradient is the combiner's derivative in the sample's losses.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from auxilearn.hypernet import HyperNet, MonoHyperNet
from auxilearn.losses import masked_column_means


class WeightNormLinear(nn.Module):
    """A linear layer whose weight is g v / |v|, row by row (Salimans and Kingma, 2016)."""

    def __init__(self, in_features, out_features, bias):
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
def _clamp_weights(module):
    for name, parameter in module.named_parameters():
        if not name.endswith("bias"):
            parameter.clamp_(min=0.0)


class LinearHyperNet(HyperNet):
    """One learned weight per task: ``linear(L).mean()``, plus the target's mean if skipping."""

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
            bias=False,
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


class MonoLinearHyperNet(LinearHyperNet, MonoHyperNet):
    """``LinearHyperNet`` with non-negative weights; ``clamp_bias`` has no bias to bound."""

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

    def clamp(self):
        """Bound the weights (g and v if weight-normalised) at 0."""
        _clamp_weights(self.linear)


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
        _clamp_weights(self.net)
