"""A task model as a function of its parameters, by operators that have the derivatives needed.

Evaluations for the upper level leave the model as it was, and honour ``torch.no_grad()`` within the
model in forward mode too. They run eagerly (``torch.compile`` has no double backward), with
attention written out (fused attention has neither a second nor a forward-mode derivative).
"""

import collections
import contextlib
import functools
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
from auxilearn.hypernet import TaskLosses, task_losses
from auxilearn.randomness import generators
from auxilearn.second_order.batch_norm import SMALLEST_IN_FORWARD_MODE, fast_batch_norm
from auxilearn.second_order.double_backward import gradients
from auxilearn.second_order.operators import TWICE_DIFFERENTIABLE, Operators

_reverse_only = weakref.WeakSet()  # models in which forward mode has failed


class ModelFunction:
    """A task model as a function of its parameters theta; the model itself stays untouched.

    theta: {name: tensor}, copies of the parameters that ``keep`` (callable name -> bool) accepts.
    Of a wrapped model (``torch.compile``, ``DistributedDataParallel``) the module inside counts.

    Raises Unsupported: a part of the model is TorchScript.
    """

    def __init__(self, model, keep=lambda name: True):
        self.model = unwrapped(model)
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise Unsupported(
                    f"{name or 'the model'} is a TorchScript module, whose parameters cannot stand "
                    "aside for an upper step: pass the module that was scripted"
                )
        self._parameters = {
            name: p for name, p in self.model.named_parameters() if p.requires_grad and keep(name)
        }
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        self._state = State(self.model)
        self._copies = {p: p.detach().clone() for p in self.model.parameters()}

    @property
    def theta(self):
        return {name: self._copies[p] for name, p in self._parameters.items()}

    def named(self, vector):
        return dict(zip(self.theta, vector, strict=True))

    def leaves(self):
        """Copies of theta, with a gradient."""
        return {name: value.detach().requires_grad_() for name, value in self.theta.items()}

    @contextlib.contextmanager
    def at(self, theta):
        """``evaluate``, a function batch -> ``TaskLosses`` at ``theta``, within the block.

        Backward passes belong into the block: gradient checkpointing evaluates parts of the model
        in them. All parameters that are not in ``theta`` are constants.
        """
        stand_ins = {self._parameters[name]: value for name, value in theta.items()}
        stand_ins = self._copies | stand_ins
        with differentiable_operators(self._recurrent), self._state.copied(stand_ins):
            try:
                yield self._evaluate
            finally:
                for parameter, copy in self._copies.items():
                    if copy._version:  # the model wrote into it, as embeddings with max_norm do
                        self._copies[parameter] = parameter.detach().clone()

    def _evaluate(self, batch):
        with torch.enable_grad():  # also puts the mode back if the model does not
            return task_losses(self.model(batch))

    def directional_derivative(self, vector, batch):
        """(``TaskLosses`` without graph, D (B, K)): D = d/de L(theta + e vector).

        By one forward-mode pass. With a warning for a model in which this fails, by two backward
        passes. Raises Unsupported: these fail too, for want of a derivative.
        """
        if self.model in _reverse_only:
            return self._by_backward_passes(vector, batch)
        states = [(g, g.get_state()) for g in generators(self.theta.values())]
        try:
            return self._by_forward_mode(vector, batch)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            for generator, state in states:
                generator.set_state(state)
            result = self._by_backward_passes(vector, batch)
            _reverse_only.add(self.model)
            warnings.warn(
                f"{without_derivative(error)} has no forward-mode derivative: two backward passes "
                "take its place, which is slower",
                stacklevel=2,
            )
            return result

    def _by_forward_mode(self, vector, batch):
        _load_forward_mode()
        with torch.no_grad(), forward_ad.dual_level():
            theta = {
                name: forward_ad.make_dual(value.detach(), tangent)
                for (name, value), tangent in zip(self.theta.items(), vector, strict=True)
            }
            operators = Operators(
                fast_batch_norm(SMALLEST_IN_FORWARD_MODE)
                | TWICE_DIFFERENTIABLE
                | {torch._C._set_grad_enabled: _set_grad_enabled}
            )
            # Nothing requires a gradient, so no graph is recorded.
            with self.at(theta) as evaluate, forward_ad._set_fwd_grad_enabled(True), operators:
                outputs = evaluate(batch)
            derivative = forward_ad.unpack_dual(outputs.losses).tangent
            entries = [None if e is None else forward_ad.unpack_dual(e).primal for e in outputs]
        outputs = TaskLosses(*entries).detached()
        if derivative is None:  # no loss depends on theta
            derivative = torch.zeros_like(outputs.losses)
        return outputs, derivative.detach()

    def _by_backward_passes(self, vector, batch):
        """D = d/du <J^T u, vector>, where J^T u is linear in u (B, K)."""
        theta = self.leaves()
        operators = Operators(TWICE_DIFFERENTIABLE)
        with self.at(theta) as evaluate, second_derivatives("D"), operators:
            outputs = evaluate(batch)
            refuse_once_differentiable(outputs.losses, "D")
            u = torch.zeros_like(outputs.losses).requires_grad_()
            slopes = gradients([outputs.losses], list(theta.values()), [u], create_graph=True)
            (derivative,) = gradients(slopes, [u], list(vector))
        return outputs.detached(), derivative


def _set_grad_enabled(mode):
    """What the model computes without gradients has no forward-mode derivative either."""
    torch._C._set_fwd_grad_enabled(mode)
    torch._C._set_grad_enabled(mode)


@functools.cache
def _load_forward_mode():
    with warnings.catch_warnings():  # PyTorch itself scripts its decompositions on first use
        warnings.simplefilter("ignore", FutureWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextlib.contextmanager
def differentiable_operators(recurrent=False):
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
# State
# --------------------------------------------------------------------------------------------------

# What every module has, and forward passes leave alone: flags and tables of hooks.
_MACHINERY = vars(nn.Module()).keys()

_TABLES = (dict, collections.OrderedDict, collections.defaultdict)
_ROWS = (list, tuple, set, collections.deque)


class State:
    """All that a module holds, to be put back: ``with State(module).copied(): ...``.

    Copies are made of buffers, of tensors in other attributes, and of the lists, dictionaries and
    sets that hold them, at any depth.
    """

    def __init__(self, module):
        self._parts = [(vars(part), vars(part).copy()) for part in module.modules()]
        self._parameters = [p for _, part in self._parts for p in part["_parameters"].values()]
        self._others = [  # all that a block could write into
            (own, name, value)
            for own, part in self._parts
            for name, value in part.items()
            if name not in _MACHINERY and _is_mutable(value)
        ]

    @contextlib.contextmanager
    def copied(self, stand_ins=None):
        """Whatever the block writes, binds or registers in the module is gone after it.

        ``stand_ins``: {parameter: tensor} to take their places in the block.
        """
        # Parameters without a stand-in are themselves, wherever they are.
        copies = {id(p): p for p in self._parameters}
        copies.update((id(p), tensor) for p, tensor in (stand_ins or {}).items())
        for own, part in self._parts:
            own["_parameters"] = {n: copies[id(p)] for n, p in part["_parameters"].items()}
            own["_buffers"] = {n: _copied(b, copies) for n, b in part["_buffers"].items()}
            own["_modules"] = part["_modules"].copy()
        for own, name, value in self._others:
            own[name] = _copied(value, copies)
        try:
            yield
        finally:
            for own, part in self._parts:
                own.clear()
                own.update(part)


def _is_mutable(value):
    if type(value) is tuple:
        return any(map(_is_mutable, value))
    return isinstance(value, torch.Tensor) or type(value) in (*_TABLES, *_ROWS)


def _copied(value, copies):
    """``value`` with the tensors in it copied; ``copies``: {id: copy} of those that have one."""
    kind, copy = type(value), copies.get(id(value))
    if copy is not None:
        return copy
    if isinstance(value, torch.Tensor):
        copy = value.detach().clone()
    elif kind in _ROWS:
        copy = kind(_copied(entry, copies) for entry in value)
        copy = collections.deque(copy, value.maxlen) if kind is collections.deque else copy
    elif kind in _TABLES:
        copy = value.copy()
        copy.update((key, _copied(entry, copies)) for key, entry in value.items())
    else:
        return value
    copies[id(value)] = copy
    return copy


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
        if not re.search(r"derivative for|differentiate twice|double backward", str(error), re.I):
            raise
        raise _unsupported(without_derivative(error), what) from error


def _unsupported(operator, what):
    cure = {
        "H u": "use solver=identity(), which does without H u, or another operator",
        "D": "and no forward-mode derivative: use another operator, or detach() its result if the "
        "model's parameters are not to be learned through it",
    }[what]
    return Unsupported(f"{operator} has no second derivative, which hypergradients need; {cure}")
