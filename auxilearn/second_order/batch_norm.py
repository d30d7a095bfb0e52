"""Batch normalisation with a cheap second order.

PyTorch differentiates batch norm twice through a long chain of element-wise passes. On a CPU these
take most of the time and memory of a Hessian-vector product. The closed form needs few: with
per-channel statistics mean and s = 1/std, x_hat = s (x - mean), means E over batch and positions,
and P(a) = a - E[a] - x_hat E[a x_hat],

    y    = weight x_hat + bias
    y'   = weight s P(x') + weight' x_hat + bias'                            (tangent)
    g_x  = weight s P(g),   g_weight = sum g x_hat,   g_bias = sum g         (backward)

The Jacobian in x is symmetric, so the fused backward kernel computes the tangent as well. The
backward pass is the gradient of <g, y>, whose second derivative is symmetric. Its own backward pass
receives x', weight' and bias', the gradients of its three results. It returns the tangent y' for g,
and the tangents of g_x and g_weight for x and weight. These follow from s' = -s^2 E[x_hat x'] and
x_hat' = s P(x').
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from auxilearn.second_order.operators import under_plain_autograd


def _backward_kernel(grad, x, weight, mean, invstd):
    """(weight s P(grad), sum grad x_hat, sum grad), by PyTorch's fused kernel."""
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, invstd, True, 0.0, [True, True, True]
    )


def _per_channel(values, like):
    # In the dtype of ``like``: mixed ones are added ten times more slowly on a CPU.
    return values.to(like.dtype).reshape(1, -1, *[1] * (like.dim() - 2))


def _add_scaled(total, *terms):
    """total + sum of tensor * per-channel coefficient, in place in ``total``."""
    for coefficient, tensor in terms:
        total.addcmul_(tensor, _per_channel(coefficient, tensor))
    return total


def _tangent(x_t, weight_t, bias_t, x, weight, mean, invstd):
    """(y', sum x' x_hat, sum x')."""
    y_t, sum_xt_xhat, sum_xt = _backward_kernel(x_t, x, weight, mean, invstd)
    scale = weight_t * invstd
    _add_scaled(y_t, (scale, x)).add_(_per_channel(bias_t - scale * mean, x))
    return y_t, sum_xt_xhat, sum_xt


class _BatchNorm(torch.autograd.Function):
    """x, weight, bias, ... -> y, mean, invstd; the statistics are outputs only to be saved.

    ``running``: (mean, variance), both or neither None; written into.
    """

    @staticmethod
    def forward(x, weight, bias, running, momentum, eps):
        return torch.ops.aten.native_batch_norm(x, weight, bias, *running, True, momentum, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, *_ = inputs
        _, mean, invstd = output
        ctx.mark_non_differentiable(mean, invstd)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.save_for_forward(x, weight, mean, invstd)

    @staticmethod
    def jvp(ctx, x_t, weight_t, bias_t, *_):
        x, weight, mean, invstd = ctx.saved_tensors
        y_t, _, _ = _tangent(x_t, weight_t, bias_t, x, weight, mean, invstd)
        return y_t, None, None

    @staticmethod
    def backward(ctx, grad, _mean, _invstd):
        x, weight, mean, invstd = ctx.saved_tensors
        return *_BatchNormBackward.apply(grad, x, weight, mean, invstd), None, None, None


class _BatchNormBackward(torch.autograd.Function):
    """grad, x, weight -> gradients of x, weight and bias. ``mean`` and ``invstd`` follow from x."""

    @staticmethod
    def forward(ctx, grad, x, weight, mean, invstd):
        grads = _backward_kernel(grad, x, weight, mean, invstd)
        ctx.save_for_backward(grad, x, weight, mean, invstd, *grads[1:])
        return grads

    @staticmethod
    @once_differentiable
    def backward(ctx, x_t, weight_t, bias_t):
        grad, x, weight, mean, s, grad_weight, grad_bias = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        e_g, e_g_xhat = grad_bias / count, grad_weight / count  # E[g], E[g x_hat]
        grad_t, sum_xt_xhat, sum_xt = _tangent(x_t, weight_t, bias_t, x, weight, mean, s)
        e_xt, e_xhat_xt = sum_xt / count, sum_xt_xhat / count  # E[x'], E[x_hat x']
        e_g_xt = (grad * x_t).mean(dim=[d for d in range(x.dim()) if d != 1])
        e_g_xhat_t = s * (e_g_xt - e_g * e_xt - e_g_xhat * e_xhat_xt)  # E[g x_hat']
        # (weight s P(g))' at fixed g is a sum of g, x, x' and a constant, channel by channel:
        #   (weight s)' (g - E[g] - x_hat E[g x_hat])
        #   - weight s (x_hat' E[g x_hat] + x_hat E[g x_hat'])
        # with x_hat' = s (x' - E[x'] - x_hat E[x_hat x']).
        scale_t = weight_t * s - weight * s * s * e_xhat_xt
        on_xt = -weight * s * s * e_g_xhat
        on_xhat = -scale_t * e_g_xhat - on_xt * e_xhat_xt - weight * s * e_g_xhat_t
        constant = -scale_t * e_g - on_xt * e_xt - on_xhat * s * mean
        grad_x_t = torch.mul(grad, _per_channel(scale_t, x), out=torch.empty_like(x))
        _add_scaled(grad_x_t, (on_xt, x_t), (on_xhat * s, x)).add_(_per_channel(constant, x))
        return grad_t, grad_x_t, count * e_g_xhat_t, None, None


# On a CPU, of x; PyTorch's own forward mode is faster below (measured: benchmarks/batch_norm.py).
SMALLEST_IN_FORWARD_MODE = 100_000


def fast_batch_norm(smallest=0):
    """For ``Operators``: batch norms in train mode (of any module) by the functions above.

    PyTorch handles batch norms without weight and bias, those in evaluation mode, those in
    checkpointed parts and, on a CPU, those of fewer than ``smallest`` elements, unless input and
    weight differ in type: its tangents are of the wrong one then.
    """

    def of(function, arguments):
        def batch_norm(*args, **kwargs):
            x, weight, bias, running, training, momentum, eps = arguments(*args, **kwargs)
            if (
                training
                and weight is not None
                and bias is not None
                and (x.dtype == weight.dtype or weight.dtype == torch.float32)
                and (x.is_cuda or x.dtype != weight.dtype or x.numel() >= smallest)
                and under_plain_autograd()
            ):
                return _BatchNorm.apply(x, weight, bias, running, momentum, eps)[0]
            return function(*args, **kwargs)

        return batch_norm

    return {function: of(function, arguments) for function, arguments in _ARGUMENTS.items()}


def _of_functional(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    return input, weight, bias, (running_mean, running_var), training, momentum, eps


def _of_builtin(
    input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
):
    return input, weight, bias, (running_mean, running_var), training, momentum, eps


# Called as the function is, they pick what counts.
_ARGUMENTS = {F.batch_norm: _of_functional, torch.batch_norm: _of_builtin}
