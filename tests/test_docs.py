"""README and docs/ agree with the code."""

import ast
import re

import pytest

from lt_train.recipe.reference import reference
from tests.support.code_tree import PAGE, page_with_tree
from tests.support.repository import REPOSITORY

DOCS = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_readme_fits_into_130_lines():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_tree_of_the_code_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_tree(page), "run: python -m tests.support.code_tree"


def test_the_page_of_all_settings_is_up_to_date():
    page = (REPOSITORY / "docs/recipes.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m lt_train.recipe.reference > docs/recipes.md"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_file_that_is_linked_is_there(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))]
    gone = [link for link in links if link and not link.startswith("http") and not (page.parent / link).exists()]
    assert gone == []


def test_what_troubleshooting_quotes_is_written_by_the_code():
    """Its headings quote parts of messages: a reader searches the page for them."""
    page = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = {part for heading in re.findall(r"^## (.*)$", page, re.MULTILINE) for part in re.findall(r"`([^`]+)`", heading)}
    said = "\n".join(
        node.value
        for file in (REPOSITORY / "lt_train").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert len(quoted) > 4
    assert {part for part in quoted if part not in said} == set()


def test_every_message_that_names_where_to_read_more_names_a_section_that_is_there():
    page = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^## (.*)$", page, re.MULTILINE)
    }
    named = {
        section
        for file in (REPOSITORY / "lt_train").rglob("*.py")
        for section in re.findall(r"""\bmore\(["'](.+?)["']\)""", file.read_text(encoding="utf-8"))
    }
    assert len(named) > 6 and named <= anchors


def test_every_page_is_in_the_sites_navigation():
    listed = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (REPOSITORY / "docs").glob("*.md") if f": {page.name}" not in listed] == []
