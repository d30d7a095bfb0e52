"""The package as other people get it: installed, imported, and used as the pages show."""

import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import ROOT


def run(*words, cwd=ROOT, **environment):
    result = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The folder into which pip has installed a copy of the package, without its requirements."""
    copy, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    files = subprocess.run(
        ["git", "ls-files", "auxilearn", "*.toml", "*.md", "requirements*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", target, copy)
    return target


def test_installed_elsewhere(installed, tmp_path):
    code = (
        "import auxilearn, sys; assert 'torch' not in sys.modules\n"
        "from auxilearn import Bilevel\n"
        "print(auxilearn.__version__, auxilearn.__file__)"
    )
    version, place = run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert place == str(installed / "auxilearn" / "__init__.py")
    assert (installed / f"jtds_auxilearn-{version}.dist-info").is_dir()
    for name in ("py.typed", "__init__.pyi", "report/page.html"):
        assert (installed / "auxilearn" / name).is_file(), name


def test_the_package_imports_no_script():
    scripts = "train_bilevel|data_preprocess|reproduce_tables|inspect_schedule|benchmarks|examples"
    for path in (ROOT / "auxilearn").rglob("*.py"):
        assert not re.search(rf"^\s*(from|import) ({scripts})\b", path.read_text(), re.M), path


def printed_by(example, capsys):
    runpy.run_module(f"examples.{example}", run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_own_model(capsys):
    errors = dict(line.rsplit(maxsplit=1) for line in printed_by("own_model", capsys))
    assert float(errors["JTDS"]) < 0.6 < float(errors["equal weights"]) < 1


def test_torchvision_dicts(capsys):
    accuracy, weights = printed_by("torchvision_dicts", capsys)
    assert float(accuracy.split()[1]) > 0.8
    target, *others = (float(word) for word in weights.split()[1:])
    assert target**2 + sum(others) ** 2 / 2 == pytest.approx(3, abs=0.1)  # as stable.py says of c


@pytest.mark.parametrize("name", ["own_model", "torchvision_dicts", "weight_per_class"])
def test_examples_are_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 60


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_the_loop_in_readme_trains():
    (loop,) = blocks("README.md")
    names = {}
    torch.manual_seed(0)
    exec(loop, names)
    assert (names["scheduler"].task_prior - 1).abs().max() > 1e-4  # five upper steps moved it


def test_the_model_on_the_page_of_the_library_trains():
    (page,) = blocks("docs/library.md")
    names = {}
    torch.manual_seed(0)
    exec(page, names)
    weights = names["weights"]
    assert weights.shape == (640, 3)
    assert np.isnan(weights[:16, 1]).all() and np.isfinite(weights[16:]).all()
    assert np.ptp(weights[16:, 0]) > 1e-3  # the schedule has left equal weights


def test_the_method_on_the_page_is_the_example():
    (page,) = blocks("docs/methods.md")
    example = (ROOT / "examples" / "weight_per_class.py").read_text()
    scheduler = page[page.index("class") : page.index("@register")]
    assert scheduler in example
