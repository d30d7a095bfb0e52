"""The pages: README fits a screen or two, links lead somewhere, flags and commands exist."""

import re
import shlex
import subprocess
import sys

import pytest

import data_preprocess
import inspect_schedule
import reproduce_tables
import train_bilevel
from auxilearn.run.command_line import parse
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
# Of today's scripts alone; the others also quote earlier flags and commands of benchmarks.
OF_SCRIPTS = [ROOT / "README.md", ROOT / "preprocess_data" / "README.md"]
OF_SCRIPTS += [ROOT / "docs" / f"{name}.md" for name in ("library", "methods", "report", "runs")]
OF_SCRIPTS += [ROOT / "docs" / "tables.md"]


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_lists_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert "unofficial" in readme
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if not link.startswith("http"):
            place, _, anchor = link.partition("#")
            linked = page.parent / place if place else page
            assert linked.exists(), link
            assert not anchor or anchor in anchors(linked), link


def test_flags_on_the_pages_exist(command):
    known = {"--nproc_per_node", "--sheet"}  # torchrun's; the miniature's
    known |= {"--whether_aux"}  # released, accepted, not in --help
    for script in (data_preprocess, train_bilevel, reproduce_tables, inspect_schedule):
        known |= set(re.findall(r"--\w+", command(script.main, "--help")[1]))
    for page in OF_SCRIPTS:
        assert set(re.findall(r"(?<![\w-])--[a-z]\w*", page.read_text())) <= known, page


def test_training_commands_on_the_pages_parse():
    text = "".join(page.read_text() for page in OF_SCRIPTS).replace("\\\n", " ")
    lines = re.findall(r"^python train_bilevel\.py (.*)$", text, re.M)
    lines = [line for line in lines if "--plugin" not in line]
    assert len(lines) >= 4
    for line in lines:
        parse(shlex.split(line, comments=True))


def test_the_figure_of_the_method_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    drawing = tmp_path / "method.svg"
    subprocess.run([sys.executable, ROOT / "docs" / "method_figure.py", drawing], check=True)
    assert drawing.read_text().count("<path") > 100
