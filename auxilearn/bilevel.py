"""The algorithm: lower steps on the task model, upper steps on the scheduler.

    lower   theta <- theta - eta  d/dtheta S(theta, phi)       S the scheduled loss, phi constant
    upper   phi   <- phi   - eta' d/dphi   L_dev(theta*(phi))  by implicit differentiation

theta* is never computed: the present theta stands in for it, and the hypergradient is taken there.
Chen et al., ICML 2022; the upper gradient is Lorraine et al., AISTATS 2020, Algorithms 2 and 3: see
``implicit_diff``.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auxilearn import checks
from auxilearn.balance import Balance
from auxilearn.hypernet import HyperNet, loss_of_schedule
from auxilearn.implicit_diff import Solution, hypergradient, neumann
from auxilearn.losses import TaskLosses, check_outputs, times_aux_weight
from auxilearn.optim import apply_hypergradient, held, step_if_finite
from auxilearn.second_order.evaluation import frozen, unwrapped
from auxilearn.second_order.products import Derivatives, FastOperators
from auxilearn.vectors import norm
from auxilearn.weights import samples_with_loss


class LowerStep(NamedTuple):
    """What a lower step did. Tensors stay on the device, without a graph."""

    loss: Tensor  # the scheduled loss, a scalar
    gradient_norm: Tensor  # of theta's gradient, a scalar; not finite: no step was taken
    outputs: TaskLosses
    weights: Tensor  # (B, K) W_ik that the step used; 0 outside the mask


class UpperStep(NamedTuple):
    """What an upper step did."""

    dev_loss: float
    hypergradient_norm: float | None  # before clipping; None: not finite, and no step was taken
    solution: Solution


class Bilevel:
    """A task model and its scheduler, with an optimiser each.

        bilevel = Bilevel(model, scheduler, lower, upper)
        for step, batch in enumerate(train_batches, start=1):
            bilevel.lower_step(batch)
            if step % 20 == 0:
                bilevel.upper_step([next(more_train_batches)], [next(dev_batches)])

    ``train_batches`` and ``dev_batches`` are lists; the training ones are read more than once. Both
    levels skip a step that is not finite, and its result shows that. Neither step changes the mode
    of ``model``: call ``model.train()`` after an evaluation.

    Args:
        model: ``model(batch)`` returns ``TaskLosses``, whatever a batch is.
        scheduler: a ``HyperNet``.
        lower: optimiser of the task model; also of the scheduler's parameters where these are
            learned on the training loss (uncertainty weights). Parameters that it does not hold
            are constants, to the hypergradient too.
        upper: optimiser of the scheduler; None without an upper level.
        solver: of ``implicit_diff`` (default: three Neumann terms, alpha the lower learning rate).
        max_norm: the hypergradient is clipped to this norm; None: no clip. Nothing else is clipped.
        aux_weight: factor on the losses of all auxiliary tasks.
        average: callable (list of tensors, batches) -> their mean over the processes of a
            distributed run, each weighted by its number of samples.

    Raises TypeError: an argument is of another kind, or an optimiser's ``step`` needs a closure.
    ValueError: an optimiser maximises, or ``lower`` holds nothing but the scheduler's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: HyperNet,
        lower: torch.optim.Optimizer,
        upper: torch.optim.Optimizer | None = None,
        *,
        solver: Callable | None = None,
        max_norm: float | None = None,
        aux_weight: float = 1.0,
        average: Callable[[list[Tensor], Sequence[Any]], list[Tensor]] | None = None,
    ):
        checks.check_kinds(model, scheduler, lower, upper, solver)
        self.model = model
        self.scheduler = scheduler
        self.lower = lower
        self.upper = upper
        self.solver = solver
        self.max_norm = max_norm
        self.aux_weight = aux_weight
        self.average = average or _of_one_process
        self._warned = False

    def lower_loss(self, batch: Any) -> Tensor:
        """The scheduled loss of ``batch``, a scalar with its graph to theta.

        For accumulation or clipping of one's own: ``backward()``, then the optimiser, are the
        caller's. Schedulers that look at gradients (``before_lower_step``) need ``lower_step``.
        """
        self._check_mode()
        return self._scheduled(batch)[2]

    def lower_step(self, batch: Any, dev_batches: Sequence[Any] | None = None) -> LowerStep:
        """One step of the lower optimiser on the scheduled loss of ``batch``.

        A step whose gradient is not finite is not taken. A fused optimiser looks at this on the
        device; for another one the norm is read from there.

        ``dev_batches``: for a scheduler that ``needs_dev``. Raises ValueError: it got none; all
        parameters are frozen, or no gradient reaches them; errors of ``scheduled_loss``.
        """
        self._check_mode()
        if self.scheduler.needs_dev:
            checks.check_dev_batches(self.scheduler, dev_batches)
        self.scheduler.before_lower_step(self.model, batch, dev_batches, self.average)
        outputs, losses, loss = self._scheduled(batch)
        parameters = self._theta()  # those that forward() has not frozen
        checks.check_theta(parameters)
        checks.check_graph(losses)
        losses.retain_grad()  # times N_k, the samples with a loss under task k: W_ik
        self.lower.zero_grad()
        loss.backward(inputs=parameters)
        reached = [p.grad for p in parameters if p.grad is not None]
        checks.check_reached(reached)
        means = self.average(reached, [batch])
        if means is not reached:
            for gradient, mean in zip(reached, means, strict=True):
                gradient.copy_(mean)
        gradient_norm = norm(reached)
        if step_if_finite(self.lower, gradient_norm) is False:
            checks.refuse_poisoned_step(outputs)
            self.lower.zero_grad()  # else adam_scale would read this gradient
        weights = losses.grad * samples_with_loss(outputs)
        return LowerStep(loss.detach(), gradient_norm, outputs.detached(), weights)

    def upper_step(self, train_batches: Sequence[Any], dev_batches: Sequence[Any]) -> UpperStep:
        """One step of the upper optimiser down the hypergradient; ``clamp()`` follows it.

        A hypergradient that is not finite is not stepped along. All numbers of the result are read
        from the device at once. Raises ValueError: there is no upper optimiser, or it holds nothing
        to learn; errors as of ``hypergradient``.
        """
        self._check_mode()
        checks.check_upper(self.upper, self._phi())
        balance = getattr(self.scheduler, "balance", None)
        balanced = isinstance(balance, Balance)  # own schedulers may have another ``balance``
        gradient, solution, dev_loss, slopes_and_gram = self._hypergradient(
            train_batches, dev_batches, balanced
        )
        solution, (dev_loss, gradient_norm) = solution.read(dev_loss, norm(gradient))
        if not math.isfinite(gradient_norm):
            batches = [*train_batches, *dev_batches]
            checks.refuse_poisoned_hypergradient(self.model, self.lower_parameters(), batches)
            return UpperStep(dev_loss, None, solution)
        apply_hypergradient(self.upper, self._phi(), gradient, self.max_norm)
        if balanced:
            balance.observe(*slopes_and_gram)
        self.scheduler.clamp()
        return UpperStep(dev_loss, gradient_norm, solution)

    def hypergradient(
        self, train_batches: Sequence[Any], dev_batches: Sequence[Any]
    ) -> tuple[list[Tensor], Solution, float]:
        """d L_dev / d phi at the present parameters, the solver's ``Solution``, and L_dev.

        The model is left as it was, batch norm's statistics included. The gradient is a list shaped
        like the scheduler's parameters (that ``upper`` holds).

        Raises ValueError: an empty list of batches, or all parameters are frozen. TypeError:
        something else than a list of batches. Errors of ``scheduled_loss``.
        """
        self._check_mode()
        gradient, solution, dev_loss, _ = self._hypergradient(train_batches, dev_batches)
        solution, (dev_loss,) = solution.read(dev_loss)
        return gradient, solution, dev_loss

    def _hypergradient(self, train_batches, dev_batches, balanced=False):
        """As ``hypergradient``, without reading from the device: L_dev is a scalar tensor.

        The fourth result is what ``Balance.observe`` takes if ``balanced``, else None.
        """
        checks.check_batches("train_batches", train_batches)
        checks.check_batches("dev_batches", dev_batches)
        theta, phi = self.lower_parameters(), self._phi()
        derivatives = Derivatives(
            self.model, self.scheduler, theta, phi, train_batches, self.aux_weight, self.average
        )
        with derivatives:
            dev_loss, v = derivatives.development_gradient(dev_batches)
            solver = self.solver or neumann(alpha=self.lower.param_groups[0]["lr"], terms=3)
            operators = FastOperators(derivatives)
            gradient, solution = hypergradient(v, operators.hvp, operators.mixed, solver)
            slopes_and_gram = None
            if balanced:
                slopes_and_gram = derivatives.target_and_rest(solution.vector, solution.scale)
        return gradient, solution, dev_loss, slopes_and_gram

    def lower_parameters(self) -> list[Tensor]:
        """Theta: what ``lower`` holds and trains, without the scheduler's parameters.

        In the order of ``model.parameters()``, then any that these do not name. Raises ValueError:
        there are none.
        """
        learned = {id(p): p for p in self._theta()}
        checks.check_theta(learned)
        for p in self.scheduler.parameters():
            learned.pop(id(p), None)
        checks.check_real(learned.values())
        places = {id(p): place for place, p in enumerate(unwrapped(self.model).parameters())}
        return sorted(learned.values(), key=lambda p: places.get(id(p), len(places)))

    def state_dict(self) -> dict[str, Any]:
        """The state of model, scheduler and both optimisers."""
        return {
            "model": self.model.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "lower": self.lower.state_dict(),
            "upper": self.upper.state_dict() if self.upper else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.model.load_state_dict(state["model"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.lower.load_state_dict(state["lower"])
        if self.upper and state["upper"]:
            self.upper.load_state_dict(state["upper"])

    def _scheduled(self, batch):
        """``TaskLosses`` of a batch, its a_k L_ik (B, K), and the scheduled loss."""
        outputs = self.model(batch)
        check_outputs(outputs, self.scheduler)
        losses = times_aux_weight(outputs.losses, self.aux_weight, self.scheduler.main_task)
        lower = set(map(id, self._theta()))
        with frozen([p for p in self.scheduler.parameters() if id(p) not in lower]):
            return outputs, losses, loss_of_schedule(self.scheduler, losses, outputs)

    def _phi(self):
        """What the upper level learns: what its optimiser holds of the scheduler's parameters."""
        learned = [p for p in self.scheduler.parameters() if p.requires_grad]
        stepped = set(map(id, held(self.upper) if self.upper else learned))
        return [p for p in learned if id(p) in stepped]

    def _theta(self):
        """All that ``lower`` trains, the scheduler's parameters included if it holds them."""
        return [p for p in held(self.lower) if p.requires_grad]

    def _check_mode(self):
        if not self.model.training and not self._warned:
            self._warned = True
            warnings.warn(
                "the model is in evaluation mode, and is trained so: dropout is off and batch norm "
                "uses its running statistics; call model.train() first if that is not intended",
                stacklevel=3,
            )


def _of_one_process(tensors, batches):
    return tensors
