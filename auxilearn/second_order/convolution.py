"""Two-dimensional convolution with a cheap second order.

PyTorch differentiates a convolution's backward pass through convolutions of transposed tensors,
which are slow on a CPU. The ordinary kernels will do. With y = x * w, the backward pass gives the
gradients of <g, y> in x and w; from a, c, the gradients of these two, its own backward pass makes

    of g    a * w + x * c
    of x    the input gradient of g under the weight c
    of w    the weight gradient of g at the input a

which are four convolutions' time.
"""

import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from auxilearn.second_order.operators import under_plain_autograd


def _forward(x, weight, bias, geometry):
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, (0, 0), groups
    )


def _backward(grad, x, weight, geometry, of_x, of_weight):
    """The gradients of x and weight; None for one that is not requested."""
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        *(grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups),
        (of_x, of_weight, False),
    )[:2]


def _is_leaf(tensor):
    """Whether it is a leaf of the graph, or one in another dtype (as with ``--precision bf16``)."""
    node = tensor.grad_fn
    if node is not None and node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    return node is None or node.name() == "torch::autograd::AccumulateGrad"


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry, mode):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.mode = geometry, mode
        return _forward(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        # Under create_graph gradients are enabled: this gradient is to be differentiated.
        known = ctx.mode.leaf_gradients or not (_is_leaf(weight) and torch.is_grad_enabled())
        grad_x, grad_weight = _ConvolutionBackward.apply(
            grad, x, weight, ctx.geometry, of_x, of_weight, known
        )
        return grad_x, grad_weight, grad.sum(dim=(0, 2, 3)) if of_bias else None, None, None


class _ConvolutionBackward(torch.autograd.Function):
    """grad, x, weight -> gradients of x and weight; the weight's as zeros if nobody needs it."""

    @staticmethod
    def forward(ctx, grad, x, weight, geometry, of_x, of_weight, known):
        ctx.save_for_backward(grad, x, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        grad_x = grad_weight = None
        if of_x or (of_weight and known):
            grad_x, grad_weight = _backward(grad, x, weight, geometry, of_x, of_weight and known)
        if of_weight and not known:
            grad_weight = weight.new_zeros(()).expand_as(weight)
        return grad_x, grad_weight

    @staticmethod
    def backward(ctx, a, c):
        grad, x, weight = ctx.saved_tensors
        of_grad, of_x, of_weight, *_ = ctx.needs_input_grad
        grad_grad = grad_x = grad_weight = None
        if of_grad and a is not None:
            grad_grad = _forward(a, weight, None, ctx.geometry)
        if of_grad and c is not None:
            from_c = _forward(x, c, None, ctx.geometry)
            grad_grad = from_c if grad_grad is None else grad_grad.add_(from_c)
        if of_x and c is not None:
            grad_x, _ = _backward(grad, x, c, ctx.geometry, True, False)
        if of_weight and a is not None:
            _, grad_weight = _backward(grad, a, weight, ctx.geometry, False, True)
        return grad_grad, grad_x, grad_weight, *[None] * 4


class FastConvolution:
    """``F.conv2d`` by the functions above, for ``Operators``.

    PyTorch handles single images, padding given as a word, tensors that autocast casts, and
    checkpointed parts.

    With ``leaf_gradients = False`` the gradients of weights are zeros. Use it if gradients are only
    differentiated once more and nobody reads the values of those in leaf tensors.
    """

    leaf_gradients = True

    def __call__(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if (
            input.dim() == 4
            and input.dtype == weight.dtype
            and not isinstance(padding, str)
            and not torch.is_autocast_enabled(input.device.type)
            and under_plain_autograd()
        ):
            geometry = _pair(stride), _pair(padding), _pair(dilation), groups
            return _Convolution.apply(input, weight, bias, geometry, self)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
