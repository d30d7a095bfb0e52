"""A task model as a function of its parameters, by operators that have the derivatives needed.

Evaluations for the upper level leave the model as it was, and honour ``torch.no_grad()`` within the
model in forward mode too. They run eagerly (``torch.compile`` has no double backward), with
attention written out (fused attention has neither a second nor a forward-mode derivative).
"""

import contextlib
import functools
import math
import re
import sys
import traceback
import warnings
import weakref

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from auxilearn.errors import Unsupported
from auxilearn.losses import TaskLosses, task_losses
from auxilearn.randomness import generator_states, put_back
from auxilearn.second_order.batch_norm import SMALLEST_IN_FORWARD_MODE, fast_batch_norm
from auxilearn.second_order.double_backward import gradients
from auxilearn.second_order.operators import TWICE_DIFFERENTIABLE, Operators
from auxilearn.second_order.state import GLOBAL_GENERATORS, State
from auxilearn.vectors import dot, norm

_reverse_only = weakref.WeakSet()  # models in which forward mode has failed
# model: the sets of parameters, by id, along which it has been held against a backward pass
_checked = weakref.WeakKeyDictionary()


class ModelFunction:
    """A task model as a function of its parameters theta, for a ``with`` block.

    Every evaluation starts from the state that the model had before the block, and the block leaves
    that: parameters, buffers, other attributes, batches. Of a wrapped model (``torch.compile``,
    ``DistributedDataParallel``) the module inside counts.

    Args: ``theta``: tensors that require a gradient. ``others``: what else evaluations may write
    into.

    Raises Unsupported: a part of the model is TorchScript.
    """

    def __init__(self, model, theta, *others):
        self.model = unwrapped(model)
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise Unsupported(
                    f"{name or 'the model'} is a TorchScript module, whose state cannot be put "
                    "back after an upper step: pass the module that was scripted"
                )
        self.theta = list(theta)
        self._along = frozenset(map(id, self.theta))
        self._state = State(self.model, self.theta, GLOBAL_GENERATORS, *others)
        self._batches = {}  # by id: the batch and its state
        self._evaluated = False  # since the state was put back last

    def __enter__(self):
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        self._operators = differentiable_operators(recurrent)
        self._operators.__enter__()
        return self

    def __exit__(self, *error):
        self._operators.__exit__(*error)
        self.restore()

    def restore(self):
        """Put the model and the batches back to where they were before the block."""
        if self._evaluated:
            self._state.restore()
            for _, state in self._batches.values():
                state.restore()
        self._evaluated = False

    def _start(self, batch):
        """Put the model and the batches back; the state of ``batch`` alone is kept."""
        self.restore()
        self._evaluated = True
        self._batches = {id(batch): self._batches.get(id(batch)) or (batch, State(batch))}

    @contextlib.contextmanager
    def evaluated(self, batch, table=TWICE_DIFFERENTIABLE):
        """``TaskLosses`` of ``batch``, by the operators in ``table``.

        Backward passes belong into the block: gradient checkpointing evaluates parts of the model
        in them.
        """
        self._start(batch)
        with Operators(table):
            with torch.enable_grad():  # also puts the mode back if the model does not
                outputs = task_losses(self.model(batch))
            yield outputs

    def directional_derivative(self, vector, batch):
        """(``TaskLosses`` without graph, D (B, K)): D = d/de L(theta + e vector).

        By one forward-mode pass. With a warning for a model in which this fails, or differentiates
        another function than backward passes do, by two backward passes. Raises Unsupported: these
        fail too, for want of a derivative.
        """
        if self.model in _reverse_only:
            return self._by_backward_passes(vector, batch)
        states, reason = generator_states(self.theta), None
        checked = self._along in _checked.get(self.model, ())
        operators = (Operators if checked else _Precision)(_FORWARD_MODE)
        try:
            result = self._by_forward_mode(vector, batch, operators)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # one of the model's own comes again from the backward passes
            reason = f"{without_derivative(error)} has no forward-mode derivative"
        if reason is None:
            if checked:
                return result
            put_back(states)
            agrees = self._agrees(*result, vector, batch, operators.eps)
            if agrees is not False:
                if agrees:
                    _checked.setdefault(self.model, set()).add(self._along)
                return result
            reason = (
                "the model's forward-mode derivative is not that of its backward pass (a hook that "
                "changes gradients, requires_grad or autograd.grad in forward(), a custom operator)"
            )
        put_back(states)
        result = self._by_backward_passes(vector, batch)
        _reverse_only.add(self.model)
        warnings.warn(
            f"{reason}: two backward passes take its place, which is slower", stacklevel=2
        )
        return result

    def _by_forward_mode(self, vector, batch, operators):
        _load_forward_mode()
        self._start(batch)
        with (
            # Nothing requires a gradient, so no graph is recorded.
            frozen(self._state.parameters()),
            # Graphs of the caller's may hold theta, whose values stay the same.
            torch.autograd._unsafe_preserve_version_counter(tuple(self.theta)),
            forward_ad.dual_level(),
        ):
            with torch.no_grad():
                for parameter, tangent in zip(self.theta, vector, strict=True):
                    parameter.copy_(forward_ad.make_dual(parameter.detach(), tangent))
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), operators:
                outputs = task_losses(self.model(batch))
            derivative = forward_ad.unpack_dual(outputs.losses).tangent
            entries = [None if e is None else forward_ad.unpack_dual(e).primal for e in outputs]
        outputs = TaskLosses(*entries).detached()
        if derivative is None:  # no loss depends on theta
            derivative = torch.zeros_like(outputs.losses)
        return outputs, derivative.detach()

    def _by_backward_passes(self, vector, batch):
        """D = d/du <J^T u, vector>, where J^T u is linear in u (B, K)."""
        with second_derivatives("D"), self.evaluated(batch) as outputs:
            refuse_once_differentiable(outputs.losses, "D")
            u = torch.zeros_like(outputs.losses).requires_grad_()
            slopes = gradients([outputs.losses], self.theta, [u], create_graph=True)
            (derivative,) = gradients(slopes, [u], list(vector))
        return outputs.detached(), derivative

    def _agrees(self, outputs, derivative, vector, batch, eps):
        """Whether <u, D> is <J^T u, vector>, for a u without meaning, up to rounding.

        None: they are zero or not finite, which says nothing.
        """
        u = torch.rand(derivative.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        u = u.to(derivative)
        if outputs.mask is not None:
            u, derivative = (t.masked_fill(~outputs.mask, 0.0) for t in (u, derivative))
        with self.evaluated(batch) as again:
            slopes = gradients([again.losses], self.theta, [u])
        found, expected = torch.sum(u * derivative), dot(slopes, vector)
        size = torch.linalg.vector_norm(derivative) + expected.abs()
        rounding = 5 * eps * norm(torch._foreach_mul(slopes, list(vector)))
        tolerance = min(10 * eps**0.5, 0.1) * size + rounding
        difference, size, tolerance = torch.stack([found - expected, size, tolerance]).tolist()
        if not math.isfinite(difference) or size <= 2 * tolerance:
            return None
        return abs(difference) <= tolerance


class _Precision(Operators):
    """Notes the rounding of the least precise tensor that is computed: ``eps``."""

    def __init__(self, table):
        super().__init__(table)
        self.eps = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            eps = torch.finfo(result.dtype).eps
            if result.is_cuda:
                eps = max(eps, 2**-11 if result.dtype == torch.float32 else 0.0)  # TF32
            self.eps = max(self.eps, eps)
        return result


@contextlib.contextmanager
def frozen(parameters):
    """The parameters without gradient for a while, so that no graph to them is recorded."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)


def _set_grad_enabled(mode):
    """What the model computes without gradients has no forward-mode derivative either."""
    torch._C._set_fwd_grad_enabled(mode)
    torch._C._set_grad_enabled(mode)


_FORWARD_MODE = {
    **fast_batch_norm(SMALLEST_IN_FORWARD_MODE),
    **TWICE_DIFFERENTIABLE,
    torch._C._set_grad_enabled: _set_grad_enabled,
}


@functools.cache
def _load_forward_mode():
    with warnings.catch_warnings():  # PyTorch itself scripts its decompositions on first use
        warnings.simplefilter("ignore", FutureWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextlib.contextmanager
def differentiable_operators(recurrent):
    """Operators with second and forward-mode derivatives, in place of fused ones.

    ``recurrent``: of recurrent layers too; cuDNN is off, since its ones have no second derivative.
    """
    fast_path, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cudnn.enabled = cudnn and not recurrent
    try:
        with sdpa_kernel(SDPBackend.MATH), _eagerly():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.cudnn.enabled = cudnn


def _eagerly():
    # torch.compile imports dynamo, which takes seconds: nothing is compiled where it is missing.
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def unwrapped(model):
    """The module inside of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):  # as torch.compile names it
            model = model._orig_mod
        else:
            return model


# --------------------------------------------------------------------------------------------------
# What has no derivative
# --------------------------------------------------------------------------------------------------


def without_derivative(error):
    """The name of the operator that ``error`` complains about, or its first line."""
    text = str(error)
    match = re.search(r"forward AD with (\S+)|derivative for '?(?:aten::)?(\w+)", text)
    if match:
        return match.group(1) or match.group(2)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return _custom(node._forward_cls)
    if "Nested forward mode AD" in text:
        return "torch.func.jvp inside the model"
    return f'the model ("{text.splitlines()[0] if text else type(error).__name__}")'


def _custom(function):
    return f"{function.__name__} (a custom autograd.Function)"


def refuse_once_differentiable(value, what):
    """Unsupported: a custom autograd.Function in the graph of ``value`` is once differentiable.

    PyTorch takes its gradient for a constant, without a word, if the one it gets is one.
    """
    seen, nodes = set(), [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        function = getattr(node, "_forward_cls", None)
        if function and function.backward.__code__ is _ONCE_DIFFERENTIABLE:
            raise _unsupported(_custom(function), what)


# Of the wrapper that the decorator makes, whatever it wraps.
_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


@contextlib.contextmanager
def second_derivatives(what):
    """Unsupported if the block fails for want of a second derivative; ``what`` needs it."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(
            r"derivative for|differentiate twice|double backward|3rd\+ order", str(error), re.I
        ):
            raise
        raise _unsupported(without_derivative(error), what) from error


def _unsupported(operator, what):
    cure = {
        "H u": "use solver=identity(), which does without H u, or another operator",
        "D": "and no forward-mode derivative: use another operator, or detach() its result if the "
        "model's parameters are not to be learned through it",
    }[what]
    return Unsupported(f"{operator} has no second derivative, which hypergradients need; {cure}")
