"""The table of methods: what turns the matrix of losses into one scalar, and what learns it.

One training loop serves every method. A method is a name and a builder of its scheduler:

    from auxilearn import register

    @register("per_class", title="Weight per class", learned="upper")
    def build(problem, temperature=1.0):
        return PerClass(problem.tasks, problem.classes[0], temperature)

in a file that is given with ``--plugin FILE`` (or imported by one's own script) adds ``per_class``
to ``--method``, to ``--help``, to the tables and to tuning. The builder's keyword arguments are the
method's own settings: ``--option temperature=0.5``.
"""

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from auxilearn.baselines.autolambda import AutoLambda
from auxilearn.baselines.combiners import MonoLinearHyperNet, MonoNonlinearHyperNet
from auxilearn.baselines.dwa import DynamicWeightAverage
from auxilearn.baselines.gradient_cosine import GradientCosine
from auxilearn.baselines.l2rw import LearningToReweight
from auxilearn.baselines.mwn import MetaWeightNet
from auxilearn.baselines.pcgrad_target import TargetProjection
from auxilearn.baselines.slgrad import SampleLevelGradients
from auxilearn.baselines.uncertainty import Uncertainty
from auxilearn.errors import UserError
from auxilearn.hypernet import FACTORS, HyperNet, Identity, MonoJoint, Naive_hyper
from auxilearn.stable import RECIPE, TARGET_SHARES, StableJoint

UPPER, LOWER = "upper", "lower"


class Problem(NamedTuple):
    """What a scheduler may need to know to be built."""

    tasks: int  # K, the target included
    feature_dim: int  # d
    samples: int  # in the training set
    classes: tuple[int | None, ...]  # of every task, K entries; None: a real number
    labelled: float = 1.0  # the target's labels over the mean number of an auxiliary task's
    lower_lr: float = 1e-3  # learning rate of the task model
    aux_weight: float = 1.0  # factor on the losses of all auxiliary tasks


class Option(NamedTuple):
    """A method's own setting, of its default's type (None: text).

    A default that is a tuple or a list takes several values, comma-separated. ``low``, ``high`` and
    ``above`` are bounds of each; ``above`` is exclusive.
    """

    default: Any
    help: str = ""
    choices: tuple | None = None
    low: float | None = None
    above: float | None = None
    high: float | None = None

    def parse(self, text: str):
        """``text`` as a value of the default's type, checked. ValueError: it cannot be read."""
        if isinstance(self.default, (tuple, list)):
            kind = type(self.default[0]) if self.default else str
            value = tuple(self._one(word, kind) for word in text.split(","))
        else:
            value = self._one(text, str if self.default is None else type(self.default))
        self.check(value)
        return value

    def check(self, value) -> None:
        """Raises ValueError: a value is none of the choices, outside the bounds or not finite."""
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                raise ValueError(f"must be a finite number, not {one}")
            if self.choices and one not in self.choices:
                choices = ", ".join(map(str, self.choices))
                raise ValueError(f"must be one of {choices}, not {one!r}")
            if self.low is not None and one < self.low:
                raise ValueError(f"must be at least {self.low}, not {one}")
            if self.high is not None and one > self.high:
                raise ValueError(f"must be at most {self.high}, not {one}")
            if self.above is not None and one <= self.above:
                raise ValueError(f"must be greater than {self.above}, not {one}")

    @staticmethod
    def _one(text, kind):
        if kind is bool:
            known = {"1": True, "true": True, "0": False, "false": False}
            if text.lower() not in known:
                raise ValueError(f"must be 0, 1, true or false, not {text!r}")
            return known[text.lower()]
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"must be of type {kind.__name__}, not {text!r}") from None


@dataclass(frozen=True)
class Method:
    """A row of ``METHODS``.

    build: (``Problem``, **options) -> scheduler. title: a few words, for tables. about: a sentence.
    learned: the level whose optimiser trains the scheduler: "upper" (by hypergradients on the
    development set), "lower" (with the task model) or None. auxiliary: uses the auxiliary tasks.
    needs_dev: as of its scheduler; the development set is then held out of the lower level, as with
    an upper level. fine_tuned: training ends on the development set. baseline: tables compare
    schedules with it.
    defaults: {setting of Config that is left to the method: value}. options: {name: Option}.
    tune: what tuning tries beside learning rates of the task model, dicts of settings and options;
    the aux_weight "near" is the table's own first factor on the auxiliary losses.
    """

    name: str
    build: Callable[..., HyperNet]
    title: str
    about: str = ""
    paper: str = ""
    learned: str | None = None
    auxiliary: bool = True
    needs_dev: bool = False
    fine_tuned: bool = False
    baseline: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    tune: Sequence[Mapping[str, Any]] = ()

    def option(self, name) -> Option:
        """The option of that name. Raises UserError: there is none."""
        if name not in self.options:
            known = ", ".join(self.options) or "none"
            raise UserError(f"--option {name}: the options of --method {self.name} are: {known}")
        return self.options[name]

    @property
    def bilevel(self) -> bool:
        """Whether there is an upper level."""
        return self.learned == UPPER

    @property
    def looks_at_dev(self) -> bool:
        """Whether training looks at development batches, on either level."""
        return self.bilevel or self.needs_dev


METHODS: dict[str, Method] = {}


def register(
    name: str,
    *,
    title: str | None = None,
    options: Mapping[str, Any] | None = None,
    learned: str | None = None,
    **properties,
) -> Callable:
    """A decorator that makes a builder of schedulers the method ``name``.

    Args:
        title: what tables call it (default: the name).
        options: {name: default or ``Option``} of the method's own settings, which the builder gets
            as keyword arguments (default: the builder's keyword arguments with their defaults).
        learned: "upper", "lower" or None, see ``Method``; so are the further ``properties``.

    Raises ValueError: the name is taken or is no word, or ``learned`` is something else.
    """
    if name in METHODS:
        raise ValueError(f"there is a method {name!r} already: choose another name")
    if not name.isidentifier():
        raise ValueError(f"{name!r} must be a word of letters, digits and underscores")
    if learned not in (UPPER, LOWER, None):
        raise ValueError(f"learned must be 'upper', 'lower' or None, not {learned!r}")

    def decorator(build):
        own = _keywords_of(build) if options is None else options
        known = {n: o if isinstance(o, Option) else Option(o) for n, o in own.items()}
        METHODS[name] = Method(
            name, build, title or name, learned=learned, options=known, **properties
        )
        return build

    return decorator


def _keywords_of(build):
    parameters = list(inspect.signature(build).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def load_plugin(path) -> str:
    """Run the Python file ``path``, which registers methods or backbones. Returns its SHA-256.

    The same content is run once. Raises UserError: no such file, or an error in it.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--plugin {path}: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest not in _loaded:
        spec = importlib.util.spec_from_file_location(f"auxilearn_plugin_{digest[:12]}", path)
        if spec is None:
            raise UserError(f"--plugin {path}: expected a Python file, NAME.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and pickle look for it
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            line = _line_in(error, path)
            raise UserError(f"--plugin {path}{line}: {type(error).__name__}: {error}") from error
        _loaded.add(digest)
    return digest


_loaded: set[str] = set()


def _line_in(error, path):
    """``, line N`` of ``path`` at which ``error`` was raised, as far as that is known."""
    lines = []
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path.absolute()):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""


# --------------------------------------------------------------------------------------------------
# The methods that come with the package
# --------------------------------------------------------------------------------------------------

_FACTORS = Option(FACTORS, "the factors of the schedule that are learned", FACTORS)


@register(
    "joint",
    title="JTDS",
    about="a weight per sample and task from features, losses and tasks",
    paper="Chen et al., ICML 2022",
    learned=UPPER,
    options={"factors": _FACTORS},
)
def _joint(problem, factors):
    return MonoJoint(0, problem.tasks, problem.feature_dim, K=problem.tasks, factors=factors)


@register(
    "joint_stable",
    title="JTDS, stable form",
    about="the same three factors, bounded and at a fixed scale, learned by the response of the "
    "real Adam; the target's share in closed form; trained on the development set as well, then "
    "fine-tuned on it",
    paper="this project, docs/stability.md",
    learned=UPPER,
    fine_tuned=True,
    options={
        "factors": _FACTORS,
        "target_share": Option(
            "learned",
            "the target's share of all weight: learned; start: held where it starts; equal: 1 / K",
            TARGET_SHARES,
        ),
        "tempered": Option(True, "weigh samples only as far as the target's share is below 1"),
    },
    defaults=RECIPE,
    tune=({"aux_weight": 1.0, "dev_epochs": 30}, {"aux_weight": "near", "dev_epochs": 30}),
)
def _joint_stable(problem, factors, target_share, tempered):
    return StableJoint(
        *(0, problem.tasks, problem.feature_dim),
        factors=factors,
        target_share=target_share,
        labelled=problem.labelled,
        tempered=tempered,
    )


@register(
    "naive",
    title="N-JTDS",
    about="a free weight per training sample and task",
    paper="Chen et al., ICML 2022",
    learned=UPPER,
    # The weight of a single sample moves little in a step.
    tune=({"aux_weight": "near", "upper_lr": 3e-2}, {"aux_weight": "near", "upper_lr": 3e-1}),
)
def _naive(problem):
    return Naive_hyper(problem.samples, problem.tasks)


@register(
    "task",
    title="AuxiLearn, network",
    about="AuxiLearn's monotone network of the losses",
    paper="Navon et al., ICLR 2021",
    learned=UPPER,
    baseline=True,
    options={
        "hidden_sizes": Option((10, 10, 10, 10), "sizes of the network's hidden layers", low=1)
    },
)
def _task(problem, hidden_sizes):
    return MonoNonlinearHyperNet(0, problem.tasks, list(hidden_sizes), weight_normalization=False)


@register(
    "linear",
    title="AuxiLearn, linear",
    about="one learned, non-negative weight per task",
    paper="Navon et al., ICLR 2021",
    learned=UPPER,
    baseline=True,
)
def _linear(problem):
    return MonoLinearHyperNet(0, problem.tasks, weight_normalization=False)


def _equal_weights(problem):
    return Identity(0, problem.tasks)


_ALL_ALIKE: dict[str, Any] = {"paper": "Caruana, Machine Learning 1997", "baseline": True}
register(
    "common",
    title="Equal weights",
    about="all weights 1",
    # Learning rates alone: the row common_tuned tries factors on the auxiliary losses.
    tune=({},),
    **_ALL_ALIKE,
)(_equal_weights)
register(
    "common_dev",
    title="Equal weights, development set",
    about="all weights 1, then the target task alone on the development set",
    fine_tuned=True,
    tune=METHODS["joint_stable"].tune,  # alike, so that the two differ by the schedule alone
    **_ALL_ALIKE,
)(_equal_weights)


@register(
    "uncertainty",
    title="Uncertainty",
    about="a weight per task from its learned noise",
    paper="Kendall et al., CVPR 2018",
    learned=LOWER,
    baseline=True,
)
def _uncertainty(problem):
    real = [k for k, classes in enumerate(problem.classes) if classes is None]
    return Uncertainty(0, problem.tasks, real)


@register(
    "gcs",
    title="Gradient cosine",
    about="a weight per task and step from its gradient's cosine with the target's",
    paper="Du et al., 2018",
    baseline=True,
    options={
        "version": Option(
            "unweighted",
            "unweighted leaves out tasks with a negative cosine; weighted multiplies each by its "
            "cosine, at the cost of a backward pass per task",
            ("unweighted", "weighted"),
        )
    },
)
def _gradient_cosine(problem, version):
    return GradientCosine(0, problem.tasks, weighted=version == "weighted")


@register(
    "pcgrad_target",
    title="PCGrad, target kept",
    about="auxiliary gradients projected off the target's where they conflict with it",
    paper="Yu et al., NeurIPS 2020",
    baseline=True,
)
def _pcgrad_target(problem):
    return TargetProjection(0, problem.tasks, problem.aux_weight)


@register(
    "dwa",
    title="Dynamic weight average",
    about="a weight per task and epoch: more where the loss falls slowly",
    paper="Liu et al., CVPR 2019",
    baseline=True,
    options={"temperature": Option(2.0, "T: the higher, the more alike the weights", above=0)},
)
def _dwa(problem, temperature):
    return DynamicWeightAverage(0, problem.tasks, problem.samples, temperature)


@register(
    "autolambda",
    title="Auto-Lambda",
    about="a weight per task, learned by looking a step ahead",
    paper="Liu et al., TMLR 2022",
    baseline=True,
    needs_dev=True,
    options={
        "initial": Option(0.1, "weights of auxiliary tasks at the start", low=0),
        "rate": Option(1e-4, "learning rate of the weights", above=0),
    },
    # The paper's runs take many more steps.
    tune=({"rate": 1e-4}, {"rate": 3e-3}),
)
def _autolambda(problem, initial, rate):
    return AutoLambda(
        0, problem.tasks, problem.lower_lr, problem.aux_weight, initial=initial, rate=rate
    )


@register(
    "l2rw",
    title="Learning to reweight",
    about="a weight per target sample and step: how far its gradient helps the development set",
    paper="Ren et al., ICML 2018",
    baseline=True,
    needs_dev=True,
)
def _l2rw(problem):
    return LearningToReweight(0, problem.tasks)


@register(
    "mwn",
    title="Meta-Weight-Net",
    about="a weight per target sample from its loss, by a network that looks a step ahead",
    paper="Shu et al., NeurIPS 2019",
    baseline=True,
    needs_dev=True,
    options={
        "hidden": Option(100, "units of the network's hidden layer", low=1),
        "rate": Option(1e-3, "learning rate of the network", above=0),
        "decay": Option(1e-4, "weight decay of the network", low=0),
    },
)
def _mwn(problem, hidden, rate, decay):
    return MetaWeightNet(
        *(0, problem.tasks, problem.lower_lr, problem.aux_weight),
        hidden=hidden,
        rate=rate,
        decay=decay,
    )


@register(
    "slgrad",
    title="SLGrad",
    about="a weight per sample, task and step: how far its gradient helps the development set",
    paper="Grégoire et al., 2023",
    baseline=True,
    needs_dev=True,
)
def _slgrad(problem):
    return SampleLevelGradients(0, problem.tasks)


register(
    "single",
    title="Single task",
    about="the target task alone",
    paper="no auxiliary learning",
    auxiliary=False,
)(_equal_weights)
