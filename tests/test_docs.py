"""README and docs/ agree with the code."""

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
