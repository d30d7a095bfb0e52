"""Operators in place of PyTorch's, for models that are not ours to change."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Operators(TorchFunctionMode):
    """While active, ``table`` {function of torch: what is called in its place}, in any module."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.table.get(function, function)(*args, **(kwargs or {}))


def under_plain_autograd():
    """Whether a custom autograd.Function may stand in for an operator.

    Not under torch.func's transforms, which ours do not support. Nor under hooks on saved tensors:
    checkpointing evaluates its part once more in the backward pass, where our modes are not active,
    and then finds other tensors saved.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


# --------------------------------------------------------------------------------------------------
# Operators that PyTorch cannot differentiate twice, by others that it can
# --------------------------------------------------------------------------------------------------


def hardsigmoid(input, inplace=False):
    return F.relu6(input + 3) / 6


def embedding(
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
):
    """With dense gradients: sparse ones lack most operators."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def embedding_bag(
    input,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    if scale_grad_by_freq:  # of the whole batch
        return F.embedding_bag(
            *(input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse),
            *(per_sample_weights, include_last_offset, padding_idx),
        )
    if input.dim() == 2:
        bags = len(input)
        bag = torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    else:
        bags = len(offsets) - include_last_offset
        places = torch.arange(len(input), device=input.device, dtype=offsets.dtype)
        bag = torch.searchsorted(offsets[:bags].contiguous(), places, right=True) - 1
    input = input.flatten()
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten()[:, None]
    if padding_idx is not None:  # a bag of their own, which is dropped
        bag = bag.masked_fill(input == padding_idx % len(weight), bags)
    empty = rows.new_zeros(bags + 1, rows.shape[1])
    if mode == "max":
        places = bag[:, None].expand_as(rows)
        return empty.scatter_reduce(0, places, rows, "amax", include_self=False)[:bags]
    sums = empty.index_add(0, bag, rows)[:bags]
    if mode == "sum":
        return sums
    counts = torch.bincount(bag, minlength=bags + 1)[:bags]
    return sums / counts.clamp(min=1)[:, None]


TWICE_DIFFERENTIABLE = {
    F.hardsigmoid: hardsigmoid,
    torch._C._nn.hardsigmoid: hardsigmoid,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}
