"""docs/reliability.md names tests that exist."""

import re

from tests.conftest import ROOT


def test_every_named_test_exists():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


def test_every_promise_names_its_test():
    page = (ROOT / "docs" / "reliability.md").read_text()
    tables = [table for table in page.split("\n\n") if table.startswith("| promise |")]
    rows = [line for table in tables for line in table.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | held by |"]
    assert promises
    assert all("::test_" in row for row in promises)
