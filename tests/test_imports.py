"""What people import: names, what importing costs, the released signatures."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import auxilearn
from auxilearn import hypernet
from auxilearn.baselines import combiners
from auxilearn.implicit_diff import Hypergrad
from auxilearn.optim import MetaOptimizer

PACKAGE = Path(auxilearn.__file__).parent


def test_importing_the_package_loads_no_pytorch():
    code = (
        "import sys, auxilearn; assert 'torch' not in sys.modules, 'torch'; "
        "assert 'numpy' not in sys.modules; dir(auxilearn); assert 'torch' not in sys.modules; "
        "auxilearn.Bilevel; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_every_name_is_there():
    assert auxilearn.__all__ == sorted(auxilearn.__all__)
    for name in auxilearn.__all__:
        value = getattr(auxilearn, name)
        assert value.__name__ == name
        assert value.__doc__
        assert name in dir(auxilearn)
    with pytest.raises(AttributeError, match="'auxilearn' has no attribute 'nothing'"):
        auxilearn.nothing  # noqa: B018
    namespace = {}
    exec("from auxilearn import *", namespace)  # noqa: S102
    assert set(auxilearn.__all__) <= set(namespace)


def test_the_stub_lists_the_same_names_at_the_same_places():
    listed = {}
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name  # as PEP 484 asks of what is handed on
                listed[alias.name] = node.module
    assert listed == {name: f"auxilearn.{home}" for name, home in auxilearn._HOMES.items()}
    for name, module in listed.items():
        assert getattr(auxilearn, name).__module__ == module


def test_hypernet_hands_on_the_combiners():
    for name in (
        "LinearHyperNet",
        "MonoLinearHyperNet",
        "NonlinearHyperNet",
        "MonoNonlinearHyperNet",
    ):
        assert getattr(hypernet, name) is getattr(combiners, name)
    with pytest.raises(AttributeError, match="'auxilearn.hypernet' has no attribute 'nothing'"):
        hypernet.nothing  # noqa: B018


def test_any_module_may_be_imported_first():
    """The combiners need hypernet, which hands them on."""
    code = """
import importlib, sys
for first in ("hypernet", "baselines.combiners", "bilevel", "methods", "stable"):
    for name in [name for name in sys.modules if name.startswith("auxilearn")]:
        del sys.modules[name]
    importlib.import_module(f"auxilearn.{first}")
    from auxilearn.hypernet import MonoLinearHyperNet
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


# The released interface (constructors of schedulers: tests/test_hypernet.py).


def arguments_of(function):
    parameters = list(inspect.signature(function).parameters.values())
    return [
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.name != "self"
    ]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (hypernet.MonoJoint.forward, "features losses to_train=True"),
        (hypernet.Naive_hyper.forward, "losses sample_id"),
        (hypernet.Identity.forward, "losses outputs=None labels=None data=None"),
        (combiners.LinearHyperNet.forward, "losses outputs=None labels=None data=None"),
        (combiners.MonoNonlinearHyperNet.forward, "losses outputs=None labels=None data=None"),
        (Hypergrad, "learning_rate=0.1 truncate_iter=3"),
        (Hypergrad.grad, "loss_val loss_train aux_params params"),
        (MetaOptimizer, "meta_optimizer hpo_lr truncate_iter=3 max_grad_norm=10"),
        (
            MetaOptimizer.step,
            "train_loss val_loss parameters aux_params return_grads=False",
        ),
        (MetaOptimizer.zero_grad, ""),
    ],
)
def test_released_signatures(function, expected):
    """Ours may have more at the end, which have defaults."""
    found, wanted = arguments_of(function), expected.split()
    assert found[: len(wanted)] == wanted
    assert all("=" in extra for extra in found[len(wanted) :])


def test_released_calls_by_position_and_by_keyword():
    torch.manual_seed(0)
    features, losses, ids = torch.randn(6, 5), torch.rand(6, 3), torch.arange(6)
    joint, naive = hypernet.MonoJoint(0, 3, 5, K=3), hypernet.Naive_hyper(6, 3)
    network = hypernet.MonoNonlinearHyperNet(0, 3, [4], None, True, 0.0, 1.0, 0.0, False)
    pairs = [
        (joint(features, losses, False), joint(features=features, losses=losses, to_train=False)),
        (naive(losses, ids), naive(losses=losses, sample_id=ids)),
        (
            network(losses, None, None, None),
            network(losses=losses, outputs=None, labels=None, data=None),
        ),
    ]
    for one, other in pairs:
        assert one.shape == () and torch.equal(one, other)

    theta = torch.tensor([3.0, -1.0], requires_grad=True)
    phi = torch.tensor([0.5, 2.0], requires_grad=True)

    def given():
        return (theta**2).sum(), (theta * phi).sum()

    dev_loss, loss = given()
    one = Hypergrad(0.1, 3).grad(dev_loss, loss, [phi], [theta])
    dev_loss, loss = given()
    other = Hypergrad(learning_rate=0.1, truncate_iter=3).grad(
        loss_val=dev_loss, loss_train=loss, aux_params=iter([phi]), params=iter([theta])
    )
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[0], -8 * theta.detach())  # H = 0: four times v
    for keywords in (False, True):
        start = phi.detach().clone()
        inner, (dev_loss, loss) = torch.optim.SGD([phi], lr=0.1), given()
        if keywords:
            upper = MetaOptimizer(
                meta_optimizer=inner, hpo_lr=0.1, truncate_iter=3, max_grad_norm=100
            )
            grads = upper.step(
                train_loss=loss,
                val_loss=dev_loss,
                parameters=iter([theta]),
                aux_params=iter([phi]),
                return_grads=True,
            )
        else:
            upper = MetaOptimizer(inner, 0.1, 3, 100)
            grads = upper.step(loss, dev_loss, [theta], [phi], True)
        assert upper.meta_optimizer is inner
        torch.testing.assert_close(grads[0], -8 * theta.detach())
        torch.testing.assert_close(phi.detach(), start + 0.8 * theta.detach())
        upper.zero_grad()


@pytest.mark.parametrize(
    ("scheduler", "names"),
    [
        (
            lambda: hypernet.MonoJoint(0, 3, 5, K=3),
            "feature_sel.bias feature_sel.weight loss_b loss_w task_prior",
        ),
        (lambda: hypernet.Naive_hyper(6, 3), "weights.weight"),
        (lambda: hypernet.MonoLinearHyperNet(0, 3), "linear.weight_g linear.weight_v"),
        (
            lambda: hypernet.MonoNonlinearHyperNet(0, 3, [4], weight_normalization=False),
            "net.0.bias net.0.weight net.3.weight",
        ),
    ],
)
def test_released_names_of_states(scheduler, names):
    assert sorted(scheduler().state_dict()) == names.split()
