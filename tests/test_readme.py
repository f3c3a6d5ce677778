"""What README says can be done can be done."""

import re
from pathlib import Path

import pytest

from lt_train.recipe import load_recipe

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_recipe_shown_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(shown)
    (tmp_path / "traces.jsonl").touch()
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("recipe.yaml")).name == "my-hybrid"


def test_the_tree_names_every_file_of_the_package_or_its_room() -> None:
    tree = README[README.index("## The code") :]
    files = [path for path in (REPOSITORY / "lt_train").rglob("*.py") if not path.name.startswith("__")]
    assert [str(path) for path in files if path.name not in tree and f" {path.parent.name}/ " not in tree] == []


def test_the_tree_names_no_file_that_is_gone() -> None:
    tree = README[README.index("## The code") :]
    named = set(re.findall(r"(?<![\w*])(\w+\.py)\b", tree))
    assert named - {path.name for path in (REPOSITORY / "lt_train").rglob("*.py")} == set()


def test_every_file_that_is_linked_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and [link for link in links if not (REPOSITORY / link).exists()] == []


def test_what_decides_on_a_change_are_the_two_commands_shown() -> None:
    check = (REPOSITORY / ".ci/run").read_text()
    for step in (
        "install --quiet -e .\n",
        "lt-train run recipes/quickstart.yaml\n",
        "install --quiet -e '.[test]'\n",
        " pytest -q ",
    ):
        assert step in check
    assert "pip install -e . && lt-train run recipes/quickstart.yaml" in README
    assert "pip install -e '.[test]' && pytest" in README
