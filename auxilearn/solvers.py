"""More solvers than ``implicit_diff`` has, and the largest stable alpha of its series.

Any callable (hvp, v) -> ``Solution`` is a solver.
"""

import math

import torch

from auxilearn.implicit_diff import Solution, Solver
from auxilearn.vectors import dot, flat, norm, ratio, read_scalars


def conjugate_gradient(
    damping: float = 1.0, iterations: int = 20, tolerance: float = 1e-10
) -> Solver:
    """(H + damping I) p = v by conjugate gradients.

    ``damping`` must exceed the size of H's most negative eigenvalue. Where the curvature along a
    search direction is not positive, the iteration stops with what it has, which is v itself on the
    first direction (as truncated Newton methods do). The residual is |v - (H + damping I) p| / |v|,
    as the recurrence tracks it.
    """

    def solve(hvp, v):
        solution, residual, direction = [torch.zeros_like(t) for t in v], v, v
        start = square = dot(v, v)
        products = 0
        for products in range(1, iterations + 1):
            product = torch._foreach_add(hvp(direction), direction, alpha=damping)
            curvature = dot(direction, product)
            step = square / curvature
            moved = _plus(solution, step, direction)
            left = _plus(residual, -step, product)
            before, square = square, dot(left, left)
            # The step is computed before the curvature's sign is known: one read for each product.
            curved, size, whole = read_scalars(curvature, square, start)
            if not curved > 0 and products == 1:
                left = torch._foreach_sub(v, product)
                return Solution(v, ratio(norm(left), norm(v)), products)
            if not curved > 0:
                return Solution(solution, ratio(before, start).sqrt(), products)
            solution, residual = moved, left
            if size <= tolerance**2 * whole:
                break
            direction = _plus(residual, square / before, direction)
        return Solution(solution, ratio(square, start).sqrt(), products)

    return solve


def _plus(vector, factor, other):
    return [a + factor * b for a, b in zip(vector, other, strict=True)]


EXACT_LIMIT = 5000  # parameters of the task model


def exact(damping: float = 0.0, max_parameters: int = EXACT_LIMIT) -> Solver:
    """(H + damping I) p = v with the dense H, one product per parameter: for small models.

    Raises ValueError above ``max_parameters`` parameters. The residual is |v - (H + damping I) p|
    / |v|. Memory: H and its factorisation, 0.2 GB in float32 at the limit.
    """

    def solve(hvp, v):
        size = sum(t.numel() for t in v)
        if size > max_parameters:
            raise ValueError(
                f"the exact solver builds a {size} x {size} matrix; it is for models of at most "
                f"{max_parameters} parameters: use neumann or conjugate_gradient"
            )
        right = flat(v)
        hessian = right.new_empty(size, size)
        for column in range(size):
            unit = torch.zeros_like(right)
            unit[column] = 1.0
            hessian[:, column] = flat(hvp(_unflatten(unit, v)))
        hessian.diagonal().add_(damping)
        solution = torch.linalg.solve(hessian, right)
        residual = torch.linalg.vector_norm(right - hessian @ solution)
        return Solution(_unflatten(solution, v), ratio(residual, norm(v)), size)

    return solve


def _unflatten(numbers, like):
    pieces = numbers.split([t.numel() for t in like])
    return [piece.reshape(t.shape) for piece, t in zip(pieces, like, strict=True)]


def stable_alpha(alpha, growth):
    """The largest alpha for which a series that grew by ``growth`` at ``alpha`` converges, or None.

    v_{j+1} = (I - alpha H) v_j is a power iteration: its terms turn towards the eigenvector of H
    with the largest |1 - alpha lambda|, and grow by that factor in the end. Where they change sign
    from one to the next, 1 - alpha lambda = -|growth|, so lambda = (1 + |growth|) / alpha, and the
    series converges for alpha < 2 / lambda = 2 alpha / (1 + |growth|). After few terms the growth
    is still below its limit, and the estimate too large. Where they grow without changing sign,
    lambda is negative, and no alpha makes the series converge: None, as where they overflow.
    """
    return 2 * alpha / (1 - growth) if -math.inf < growth < 0 else None
