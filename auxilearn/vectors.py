"""Vectors in the space of theta, as lists of tensors, one per parameter."""

import torch
from torch import Tensor

Vector = list[Tensor]


def dot(a: Vector, b: Vector) -> Tensor:
    """<a, b>, a scalar on the device."""
    return torch.dot(flat(a), flat(b))


def norm(vector: Vector) -> Tensor:
    """|vector|, a scalar on the device; of no tensors 0."""
    if not vector:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where there is nothing to compare with."""
    return torch.where(whole == 0, 0.0, part / whole)


def flat(vector: Vector) -> Tensor:
    """All numbers of a vector, (n,)."""
    return torch.cat([t.reshape(-1) for t in vector])


def read_scalars(*scalars: float | Tensor) -> list[float]:
    """Floats of numbers and scalar tensors, by one read from the device."""
    tensors = [s for s in scalars if isinstance(s, Tensor)]
    numbers = iter(torch.stack([t.detach().double() for t in tensors]).tolist() if tensors else ())
    return [next(numbers) if isinstance(s, Tensor) else float(s) for s in scalars]
