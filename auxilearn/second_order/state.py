"""What a forward pass may write into, and how to put it back."""

import collections
import dataclasses
import operator
import random
import types

import numpy as np
import torch
from torch import nn

# What every module has beside its state: flags and tables of hooks.
_MACHINERY = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
# What random's and numpy.random's own functions draw from.
GLOBAL_GENERATORS = (random._inst, np.random.mtrand._rand)
_IMMUTABLE = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device}


class State:
    """The present state of everything that is reached from ``roots``; ``restore`` puts it back.

    Reached are attributes, parameters and buffers of modules, entries of lists, tuples,
    dictionaries, sets and deques, and attributes of dataclasses and SimpleNamespaces, at any depth.
    Tensors and NumPy arrays are put back in place, so that whatever shares their memory is, too.
    Generators of PyTorch, NumPy and Python that are reached draw again what they have drawn since.
    """

    def __init__(self, *roots):
        self._attributes, self._containers, self._arrays = [], [], []
        self._tensors, self._kept = [], []
        self._generators = []
        seen, waiting = set(), list(roots)
        while waiting:
            value = waiting.pop()
            if type(value) not in _IMMUTABLE and id(value) not in seen:
                seen.add(id(value))
                waiting.extend(self._keep(value))
        self._kept = [tensor.clone() for tensor in self._tensors_now()]

    def _keep(self, value):
        """Note the state of ``value``; the values to look at next."""
        if isinstance(value, torch.Tensor):
            if _is_plain(value):
                self._tensors.append((value, value.data, value.requires_grad))
            return ()
        if isinstance(value, nn.Module):
            attributes = vars(value)
            self._attributes.append((attributes, attributes.copy()))
            hooks = [attributes.get(name) for name in _MACHINERY]
            self._containers += [(h, _shallow(h)) for h in hooks if isinstance(h, dict)]
            return [v for name, v in attributes.items() if name not in _MACHINERY]
        if isinstance(value, (dict, list, set, collections.deque)):
            self._containers.append((value, _shallow(value)))
        if isinstance(value, (dict, list, set, collections.deque, tuple)):
            entries = value.values() if isinstance(value, dict) else value
            return () if _IMMUTABLE.issuperset(map(type, entries)) else entries
        if isinstance(value, np.ndarray) and value.flags.writeable:
            self._arrays.append((value, value.copy()))
        elif isinstance(value, torch.Generator):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            self._generators.append((value.setstate, value.getstate()))
        elif isinstance(value, np.random.RandomState):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._generators.append((lambda state: setattr(bits, "state", state), bits.state))
        elif _is_record(value):
            attributes = vars(value)
            self._attributes.append((attributes, attributes.copy()))
            return attributes.values()
        return ()

    def parameters(self):
        """The leaf tensors that require a gradient."""
        return [tensor for tensor, _, flag in self._tensors if flag]

    def restore(self):
        for attributes, kept in self._attributes:
            attributes.clear()
            attributes.update(kept)
        for container, kept in self._containers:
            if container or kept:
                _refill(container, kept)
        for array, kept in self._arrays:
            array[...] = kept
        for set_state, state in self._generators:
            set_state(state)
        if self._kept:
            torch._foreach_copy_(self._tensors_now(), self._kept)

    def _tensors_now(self):
        """The memory of all tensors, to which they return, with their shapes and flags."""
        for tensor, memory, flag in self._tensors:
            if tensor.grad_fn is not None and not tensor._is_view():
                tensor.detach_()  # it was a leaf: the result of a graph was written into it
            if (
                tensor.data_ptr() != memory.data_ptr()
                or tensor.shape != memory.shape
                or tensor.stride() != memory.stride()
            ):
                tensor.data = memory
            if tensor.requires_grad != flag and tensor.is_leaf:
                tensor.requires_grad_(flag)
        return [memory for _, memory, _ in self._tensors]


def _is_plain(tensor):
    """Whether it can be written into: results of a graph are bound anew, not written into."""
    return (
        tensor.is_leaf
        and not tensor.is_nested
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_inference()
        and all(step or size < 2 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    )


def _is_record(value):
    return isinstance(value, (types.SimpleNamespace, collections.UserDict)) or (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and hasattr(value, "__dict__")
    )


def _shallow(container):
    return dict(container) if isinstance(container, dict) else list(container)


def _refill(container, kept):
    """Give ``container`` the entries ``kept`` unless it has them."""
    if isinstance(container, dict):
        same = list(container) == list(kept) and _are(container.values(), kept.values())
        fill = container.update
    else:
        same = len(container) == len(kept) and _are(container, kept)
        fill = container.update if isinstance(container, set) else container.extend
    if not same:
        container.clear()
        fill(kept)


def _are(one, other):
    return all(map(operator.is_, one, other))
