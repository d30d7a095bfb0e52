"""Beside the series of ``implicit_diff``: conjugate gradients, the dense solve, the stable alpha.

Any callable (hvp, v) -> ``Solution`` is a solver.
"""

import math

import torch

from auxilearn.implicit_diff import Solution, Solver, dot, norm, ratio


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
        solution = [torch.zeros_like(t) for t in v]
        residual = [t.clone() for t in v]
        direction = [t.clone() for t in v]
        start = square = dot(residual, residual)
        products = 0
        while products < iterations and square > tolerance**2 * start and start > 0:
            product = [h + damping * d for h, d in zip(hvp(direction), direction, strict=True)]
            products += 1
            curvature = dot(direction, product)
            if not curvature > 0:
                if products == 1:
                    solution = direction
                    residual = [r - h for r, h in zip(residual, product, strict=True)]
                    square = dot(residual, residual)
                break
            step = square / curvature
            solution = [s + step * d for s, d in zip(solution, direction, strict=True)]
            residual = [r - step * h for r, h in zip(residual, product, strict=True)]
            previous, square = square, dot(residual, residual)
            direction = [
                r + (square / previous) * d for r, d in zip(residual, direction, strict=True)
            ]
        return Solution(solution, ratio(math.sqrt(square), math.sqrt(start)), products)

    return solve


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
        flat = _flatten(v)
        hessian = flat.new_empty(size, size)
        for column in range(size):
            unit = torch.zeros_like(flat)
            unit[column] = 1.0
            hessian[:, column] = _flatten(hvp(_unflatten(unit, v)))
        hessian.diagonal().add_(damping)
        solution = torch.linalg.solve(hessian, flat)
        residual = torch.linalg.vector_norm(flat - hessian @ solution).item()
        return Solution(_unflatten(solution, v), ratio(residual, norm(v)), size)

    return solve


def _flatten(vector):
    return torch.cat([t.reshape(-1) for t in vector])


def _unflatten(flat, like):
    pieces = flat.split([t.numel() for t in like])
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
