"""Methods of one's own: ``register``, the options of a method, and files given with --plugin."""

import math
import re

import pytest
import torch

from auxilearn import methods
from auxilearn.errors import UserError
from auxilearn.hypernet import FACTORS, Identity, MonoJoint, Naive_hyper
from auxilearn.methods import METHODS, Option, Problem, load_plugin, register
from auxilearn.run.command_line import parse_options
from auxilearn.run.config import Config, check, with_method_defaults
from auxilearn.stable import RECIPE, StableJoint

PROBLEM = Problem(tasks=3, feature_dim=5, samples=20, classes=(7, 2, 2))


@pytest.fixture(autouse=True)
def as_before():
    """The table of methods is put back."""
    known, loaded = dict(METHODS), set(methods._loaded)
    yield
    for table, before in ((METHODS, known), (methods._loaded, loaded)):
        table.clear()
        table.update(before)


# --------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [
        (1.0, "0.5", 0.5),
        (1.0, "1e-3", 1e-3),
        (1.0, "2", 2.0),
        (3, "-4", -4),
        ("a", "b c", "b c"),
        (True, "0", False),
        (False, "1", True),
        (False, "True", True),
        (True, "FALSE", False),
        ((10, 10), "5", (5,)),
        ((10, 10), "5,6,7", (5, 6, 7)),
        ([10, 10], "5,6,7", (5, 6, 7)),
        ((0.5,), "1,2e-1", (1.0, 0.2)),
        ((), "a,b", ("a", "b")),
        (None, "a", "a"),
    ],
)
def test_an_option_is_parsed_as_its_default_is(default, text, value):
    found = Option(default).parse(text)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(one) for one in found] == [type(one) for one in value]


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        (Option(1.0), "fast", "must be of type float, not 'fast'"),
        (Option(1), "0.5", "must be of type int"),
        (Option(1), "", "must be of type int, not ''"),
        (Option(True), "yes", "must be 0, 1, true or false, not 'yes'"),
        (Option((1, 2)), "1,two", "must be of type int, not 'two'"),
        (Option((1, 2)), "1,", "must be of type int"),
        (Option("a", choices=("a", "b")), "c", "must be one of a, b, not 'c'"),
        (Option(("a",), choices=("a", "b")), "a,c", "must be one of a, b, not 'c'"),
        (Option(2, choices=(1, 2)), "3", "must be one of 1, 2, not 3"),
    ],
)
def test_a_text_that_says_no_value_is_refused(option, text, message):
    with pytest.raises(ValueError, match=message):
        option.parse(text)


# --------------------------------------------------------------------------------------------------
# Registering
# --------------------------------------------------------------------------------------------------


def test_the_builder_s_keywords_are_the_options():
    @register("mine", learned="upper")
    def build(problem, temperature=1.0, sizes=(3, 4), name="x"):
        return problem, temperature, sizes, name

    method = METHODS["mine"]
    assert method.name == method.title == "mine"
    assert method.bilevel and method.auxiliary and not method.fine_tuned and not method.baseline
    assert {n: o.default for n, o in method.options.items()} == {
        "temperature": 1.0,
        "sizes": (3, 4),
        "name": "x",
    }
    assert method.build is build  # the decorator hands the function back
    assert method.build(PROBLEM, temperature=0.5) == (PROBLEM, 0.5, (3, 4), "x")


def test_options_may_be_given_in_full():
    spec = Option(2, "how many", (1, 2))
    register("mine", title="Mine", options={"count": spec, "rate": 0.5}, fine_tuned=True)(Identity)
    method = METHODS["mine"]
    assert method.title == "Mine"
    assert method.options == {"count": spec, "rate": Option(0.5)}
    assert method.fine_tuned and method.learned is None and not method.bilevel


@pytest.mark.parametrize("learned", ["upper", "lower", None])
def test_only_methods_of_the_upper_level_are_bilevel(learned):
    register("mine", learned=learned)(Identity)
    assert METHODS["mine"].learned == learned
    assert METHODS["mine"].bilevel == (learned == "upper")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "joint"}, "there is a method 'joint' already: choose another name"),
        ({"name": "my method"}, "'my method' must be a word"),
        ({"name": "../mine"}, "must be a word"),
        ({"name": "mine", "learned": "both"}, "must be 'upper', 'lower' or None, not 'both'"),
        ({"name": "mine", "learned": True}, "must be 'upper', 'lower' or None, not True"),
    ],
)
def test_what_cannot_be_registered(arguments, message):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=message):
        register(**arguments)
    assert before == METHODS


def test_a_property_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="colour"):
        register("mine", colour="red")(Identity)
    assert "mine" not in METHODS


def test_the_table_is_in_the_order_of_the_tables():
    """New methods come last."""
    names = ["joint", "joint_stable", "naive", "task", "linear"]
    names += ["common", "common_dev", "uncertainty", "gcs", "pcgrad_target", "dwa"]
    names += ["autolambda", "l2rw", "mwn", "slgrad", "single"]
    assert list(METHODS) == names
    register("mine")(Identity)
    assert list(METHODS) == [*names, "mine"]


def test_what_each_method_is_learned_by():
    of = {"upper": [], "lower": [], None: []}
    for name, method in METHODS.items():
        of[method.learned].append(name)
    assert of == {
        "upper": ["joint", "joint_stable", "naive", "task", "linear"],
        "lower": ["uncertainty"],
        None: ["common", "common_dev", "gcs", "pcgrad_target", "dwa"]
        + ["autolambda", "l2rw", "mwn", "slgrad", "single"],
    }
    looking = [name for name, method in METHODS.items() if method.needs_dev]
    assert looking == ["autolambda", "l2rw", "mwn", "slgrad"]
    assert METHODS["joint_stable"].defaults == RECIPE
    assert [name for name, method in METHODS.items() if not method.auxiliary] == ["single"]
    assert [n for n, m in METHODS.items() if m.fine_tuned] == ["joint_stable", "common_dev"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_a_scheduler_of_all_tasks(name):
    method = METHODS[name]
    options = {n: option.default for n, option in method.options.items()}
    scheduler = method.build(PROBLEM, **options)
    assert (scheduler.input_dim, scheduler.main_task) == (3, 0)
    by_itself = name in ("mwn", "autolambda")  # by an optimiser of the scheduler's own
    assert bool(list(scheduler.parameters())) == (method.learned is not None or by_itself)
    assert scheduler.needs_dev == method.needs_dev


def test_options_and_problem_reach_the_schedulers():
    joint = METHODS["joint"].build(PROBLEM, factors=("loss",))
    assert isinstance(joint, MonoJoint) and joint.learned == ("loss",)
    assert METHODS["joint"].options["factors"].parse("task,feature") == ("task", "feature")
    assert METHODS["joint"].options["factors"].default == FACTORS
    naive = METHODS["naive"].build(PROBLEM)
    assert isinstance(naive, Naive_hyper) and naive.weights.weight.shape == (20, 3)
    task = METHODS["task"].build(PROBLEM, hidden_sizes=(4, 2))
    assert [tuple(p.shape) for p in task.parameters() if p.dim() == 2] == [(4, 3), (2, 4), (1, 2)]
    assert METHODS["gcs"].build(PROBLEM, version="weighted").weighted
    problem = PROBLEM._replace(labelled=0.25)
    for share, odds in [("learned", 0.25), ("start", 0.25), ("equal", 0.5)]:
        options = {"factors": FACTORS, "target_share": share, "tempered": share == "learned"}
        stable = METHODS["joint_stable"].build(problem, **options)
        assert stable.tempered == options["tempered"]
        assert isinstance(stable, StableJoint) and stable.target_share == share
        assert (stable.balance is not None) == (share == "learned")
        assert float(stable.balance.odds if stable.balance else stable.odds) == odds


# --------------------------------------------------------------------------------------------------
# Plugins
# --------------------------------------------------------------------------------------------------

PER_CLASS = """
import torch

from auxilearn import HyperNet, register


class PerClass(HyperNet):
    def __init__(self, tasks, classes, temperature):
        super().__init__(0, tasks)
        self.temperature = temperature
        self.table = torch.nn.Parameter(torch.zeros(classes, tasks))

    def scheduled_loss(self, losses, seen):
        weights = torch.exp(self.table[seen.labels[:, 0]] / self.temperature)
        return (weights * losses).mean(dim=0).sum()


@register("per_class", title="Weight per class", learned="upper")
def build(problem, temperature=1.0):
    return PerClass(problem.tasks, problem.classes[0], temperature)


torch.plugin_runs = getattr(torch, "plugin_runs", 0) + 1
"""


@pytest.fixture
def runs(monkeypatch):
    """How often the plugin has been run."""
    monkeypatch.setattr(torch, "plugin_runs", 0, raising=False)
    return lambda: torch.plugin_runs


def test_a_plugin_registers_its_methods_and_the_same_content_is_run_once(tmp_path, runs):
    one, copy, other = (tmp_path / name for name in ("one.py", "copy.py", "other.py"))
    one.write_text(PER_CLASS)
    copy.write_text(PER_CLASS)
    digest = load_plugin(one)
    assert load_plugin(str(one)) == load_plugin(copy) == digest
    assert runs() == 1
    scheduler = METHODS["per_class"].build(PROBLEM, temperature=0.5)
    assert scheduler.table.shape == (7, 3)
    assert METHODS["per_class"].options["temperature"].parse("2") == 2.0
    other.write_text(PER_CLASS.replace('"per_class"', '"other"'))
    assert load_plugin(other) != digest
    assert runs() == 2 and "other" in METHODS


def refused(path):
    with pytest.raises(UserError) as caught:
        load_plugin(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"--plugin {path}")
    return message


@pytest.mark.parametrize("relative", [False, True])
def test_an_error_in_a_plugin_names_file_and_line(relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text("import torch\n\n\ndef f():\n    torch.zeros(2) @ torch.zeros(3)\n\n\nf()\n")
    path = path.relative_to(tmp_path) if relative else path
    assert ", line 5: RuntimeError: " in refused(path)
    path.write_text("import auxilearn\n\nfrom auxilearn import nothing\n")
    assert ", line 3: ImportError: cannot import name 'nothing'" in refused(path)
    path.write_text("x = 1\ny = (\n")
    assert "SyntaxError" in refused(path) and "line 2" in refused(path)
    path.write_text("from auxilearn import register\n\nregister('joint')\n")
    assert ", line 3: ValueError: there is a method 'joint' already" in refused(path)


def test_what_is_no_plugin(tmp_path):
    assert "No such file" in refused(tmp_path / "nowhere.py")
    assert "directory" in refused(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("x = 1\n")
    assert "expected a Python file, NAME.py" in refused(text)


def test_a_plugin_that_was_mended_is_run(tmp_path, runs):
    path = tmp_path / "mine.py"
    path.write_text(PER_CLASS.replace("import HyperNet", "import Hypernet"))
    refused(path)
    path.write_text(PER_CLASS)
    load_plugin(path)
    assert runs() == 1 and "per_class" in METHODS


def test_a_plugin_may_hold_what_looks_for_its_module(tmp_path):
    """Dataclasses with postponed annotations do, and so does pickle."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses, pickle\n\n\n"
        "@dataclasses.dataclass\nclass Size:\n    k: int = 3\n\n\n"
        "assert pickle.loads(pickle.dumps(Size(4))) == Size(4)\n"
    )
    load_plugin(path)


def test_defaults_are_of_settings_that_are_left_to_methods():
    register("eager", defaults={"hyperstep": 2})(lambda problem: Identity(0, problem.tasks))
    assert with_method_defaults(Config(method="eager")).hyperstep == 2
    register("odd", defaults={"epochs": 2})(lambda problem: Identity(0, problem.tasks))
    with pytest.raises(UserError, match="--method odd: its defaults may not say epochs; these"):
        with_method_defaults(Config(method="odd"))


@pytest.mark.parametrize(
    ("method", "name", "good", "bad", "expected"),
    [
        ("task", "hidden_sizes", (10, 1), (10, 0), "at least 1"),
        ("dwa", "temperature", 0.1, 0.0, "greater than 0"),
        ("autolambda", "initial", 0.0, -0.1, "at least 0"),
        ("autolambda", "rate", 1e-9, 0.0, "greater than 0"),
        ("autolambda", "rate", 1e-9, math.nan, "a finite number"),
        ("autolambda", "initial", 0.0, math.inf, "a finite number"),
        ("mwn", "hidden", 1, 0, "at least 1"),
        ("mwn", "rate", 1e-9, -1.0, "greater than 0"),
        ("mwn", "decay", 0.0, -1e-9, "at least 0"),
    ],
)
def test_an_option_outside_its_bounds_is_refused(method, name, good, bad, expected):
    """By a flag and in a ``Config``; the bound itself is fine where it belongs."""
    check(Config(method=method, options={name: good}))
    message = re.escape(f"--option {name} must be {expected}, not ")
    with pytest.raises(UserError, match=message):
        check(Config(method=method, options={name: bad}))
    text = ",".join(map(str, bad)) if isinstance(bad, tuple) else str(bad)
    with pytest.raises(UserError, match=message):
        parse_options(METHODS[method], [f"{name}={text}"])
    with pytest.raises(UserError, match="--option colour: the options of --method common are: n"):
        check(Config(method="common", options={"colour": 1}))
