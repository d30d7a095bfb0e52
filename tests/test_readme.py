"""The README's example runs, and its table of files names all there are."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_library_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert shown.startswith("tensor(")
    assert names["solution"].products == 3
    assert names["dev_loss"] > 0


def test_every_module_stands_in_the_layout_table():
    table = README.split("## How it works")[1].split("## Differences")[0]
    for path in sorted((ROOT / "auxilearn").glob("*.py")):
        if path.name not in ("__init__.py", "errors.py", "randomness.py"):
            assert path.name in table, f"{path.name} is not in the README's table"
