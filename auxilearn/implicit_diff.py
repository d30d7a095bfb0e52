"""Hypergradients by implicit differentiation.

Lower level: theta minimises the scheduled training loss f(theta, phi). With g = df/dtheta, H =
dg/dtheta (the Hessian of f) and v = d(development loss)/dtheta, the implicit function theorem gives

    d(development loss)/dphi = - d/dphi < g(theta, phi), p >   at fixed p = H^-1 v

(Lorraine, Vicol and Duvenaud, AISTATS 2020). A *solver* finds p from products with H alone; a
*mixed product* finishes. ``hypergradient`` is these two lines; the operators may be double backward
on given graphs (``Hypergrad``) or the faster ones of ``second_order.products``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxilearn.second_order.double_backward import double_backward_operators, gradients
from auxilearn.vectors import Vector, dot, norm, ratio, read_scalars


@dataclass
class Solution:
    """What a solver found for H p = v.

    vector: p, a list of tensors shaped like theta.
    residual: relative size of what is left of the equation; 0 is solved, growth means divergence.
    products: how many Hessian-vector products were spent.
    growth: |last term| / |term before it| of a series, negative if the two point away from each
        other; None without two terms.
    scale: D of ``preconditioned``, a list like p; None: 1.

    A solver leaves residual and growth on the device, as scalar tensors; ``read`` makes floats.
    """

    vector: Vector
    residual: float | Tensor
    products: int
    growth: float | Tensor | None = None
    scale: Vector | None = None

    def read(self, *others: Tensor) -> tuple["Solution", list[float]]:
        """(This solution with floats, the floats of ``others``), by one read from the device."""
        given = [*others, self.residual, *([] if self.growth is None else [self.growth])]
        numbers = read_scalars(*given)
        rest = numbers[len(others) :]
        growth = None if self.growth is None else rest[1]
        return replace(self, residual=rest[0], growth=growth), numbers[: len(others)]

    @property
    def diverging(self) -> bool:
        """Whether the residual is above 1 (or not a number): v itself would be the better guess.

        One percent is allowed: a small alpha along slight negative curvature does no harm.
        """
        return not self.residual <= 1.01


Solver = Callable[[Callable[[Vector], Vector], Vector], Solution]


def hypergradient(
    dev_gradient: Vector,
    hvp: Callable[[Vector], Vector],
    mixed: Callable[[Vector], Vector],
    solver: Solver,
) -> tuple[Vector, Solution]:
    """The hypergradient - d/dphi <g, p>, with p from ``solver``.

    Args:
        dev_gradient: v, a list of tensors shaped like theta.
        hvp: callable u -> H u on such lists.
        mixed: callable p -> d/dphi <g, p>, a list of tensors shaped like phi.
        solver: callable (hvp, v) -> ``Solution``, such as ``neumann`` and ``identity`` below, or
            ``conjugate_gradient`` and ``exact`` in ``solvers``.

    Returns: the hypergradient (a list shaped like phi) and the ``Solution``.
    """
    solution = solver(hvp, dev_gradient)
    return [-gradient for gradient in mixed(solution.vector)], solution


# --------------------------------------------------------------------------------------------------
# Solvers
# --------------------------------------------------------------------------------------------------


def neumann(alpha: float, terms: int = 3, scale: str = "released") -> Solver:
    """The truncated Neumann series p = v_0 + ... + v_J, v_{j+1} = v_j - alpha H v_j, J = ``terms``.

    ``scale="released"`` leaves the sum as it is; ``scale="alpha"`` multiplies it by alpha, so that
    it tends to H^-1 v (Lorraine et al. 2020, Algorithm 3). The residual is |v_J| / |v_0|, which is
    the relative residual of alpha (v_0 + ... + v_{J-1}) as a solution of H x = v: below 1 and
    falling with J where the series converges, above 1 where alpha is too large for it.
    """
    if scale not in ("released", "alpha"):
        raise ValueError(f"scale must be 'released' or 'alpha', not {scale!r}")
    if terms < 0:
        raise ValueError(f"terms must be 0 or more, not {terms}")

    def solve(hvp, v):
        term, before = v, None
        total = [t.clone() for t in v]
        for _ in range(terms):
            before, term = term, torch._foreach_add(term, hvp(term), alpha=-alpha)
            torch._foreach_add_(total, term)
        size, growth = norm(term), None
        if before is not None:
            growth = torch.copysign(ratio(size, norm(before)), dot(term, before))
        solution = Solution(total, ratio(size, norm(v)), terms, growth)
        if scale == "alpha":
            solution.vector = torch._foreach_mul(total, alpha)
        return solution

    return solve


def identity() -> Solver:
    """H replaced by the identity, p = v: the T1-T2 approximation (Luketina et al. 2016).

    The series above with no term beyond the first, hence its residual: 1. No product is spent.
    """

    def solve(hvp, v):
        return Solution([t.clone() for t in v], 1.0, 0)

    return solve


def preconditioned(solver: Solver, scale: Callable[[], Vector]) -> Solver:
    """``solver`` for a lower level whose optimiser divides every gradient by a scale D > 0.

    This is the implicit function theorem on the optimiser's own step (Lorraine et al. 2020, section
    3). A small change dg of the gradient changes the step by -eta D^-1 dg; Adam's D is about the
    square root of the second moment (``optim.adam_scale``). With D fixed, n steps make of dg

        -eta sum_{j<n} (I - eta D^-1 H)^j D^-1 dg    one step: -eta D^-1 dg; in the limit: -H^-1 dg

    and p is this response to v, without the factor -eta. The solver gets H and v in the coordinates
    D^1/2 theta, in which the step is plain gradient descent's; residuals are measured there.

        identity              D^-1 v
        neumann               sum_j (I - alpha D^-1 H)^j D^-1 v
        conjugate_gradient    (H + damping D)^-1 v

    Args: ``scale``: callable that returns D now, a list of tensors shaped like theta: those of the
    model's parameters that the lower optimiser steps, in the model's order, then of any others.

    Raises TypeError: ``scale`` is not callable. ValueError, in a step: D is not shaped like theta.
    """
    if not callable(scale):
        raise TypeError(
            "scale must be a callable, asked anew in every upper step, such as lambda: "
            f"adam_scale(optimizer, parameters), not {type(scale).__name__}"
        )

    def solve(hvp, v):
        scales = scale()
        roots = [d.sqrt() for d in scales]
        if [r.shape for r in roots] != [t.shape for t in v]:
            raise ValueError(
                "scale() must give a tensor for each parameter that the lower optimiser steps, in "
                "the model's order; frozen parameters have none"
            )

        def divided(vector):
            return [t / r for t, r in zip(vector, roots, strict=True)]

        solution = solver(lambda u: divided(hvp(divided(u))), divided(v))
        solution.vector, solution.scale = divided(solution.vector), scales
        return solution

    return solve


# --------------------------------------------------------------------------------------------------
# Double backward on given graphs
# --------------------------------------------------------------------------------------------------


class Hypergrad:
    """The hypergradient of two given losses, by a truncated Neumann series and double backward.

    Args:
        learning_rate: alpha of the series.
        truncate_iter: J, the number of Hessian-vector products.
    """

    def __init__(self, learning_rate=0.1, truncate_iter=3):
        self.learning_rate = learning_rate
        self.truncate_iter = truncate_iter
        self.solver = neumann(learning_rate, truncate_iter)
        self.solution = None

    def grad(self, loss_val, loss_train, aux_params, params):
        """The hypergradient, a list of tensors shaped like ``aux_params``.

        Args:
            loss_val: development loss, a scalar with a graph to ``params``.
            loss_train: scheduled training loss, a scalar with a graph to both.
            aux_params: the scheduler's parameters phi; a list or a generator.
            params: the task model's parameters theta; a list or a generator.

        A parameter that a loss does not reach has gradient zero. ``self.solution`` keeps the
        solver's residual.
        """
        aux_params, params = list(aux_params), list(params)
        v = gradients(loss_val, params, retain_graph=True)
        g = gradients(loss_train, params, create_graph=True)
        hvp, mixed = double_backward_operators(g, params, aux_params)
        hypergrad, self.solution = hypergradient(v, hvp, mixed, self.solver)
        return hypergrad
