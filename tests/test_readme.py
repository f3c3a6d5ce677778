"""What README and launch/README say can be done can be done."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from lt_train.recipe.batch_size import accumulation_steps
from lt_train.recipe.loading import load_recipe
from tests.support.repository import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


LAUNCH = (REPOSITORY / "launch" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:lt-train|deepspeed|torchrun|sbatch) .*recipes/.*(?:(?<=\\)\n.*)*$", README + LAUNCH, re.MULTILINE)
PROCESSES = re.compile(r"--(?:num_gpus|num_accelerators|nproc-per-node) (\d+)")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shown_has_a_recipe_that_its_processes_can_train(command: str) -> None:
    words = shlex.split(command, comments=True)
    (recipe,) = (word for word in words if word.endswith(".yaml"))
    shown = load_recipe(REPOSITORY / recipe, [value for option, value in pairwise(words) if option == "--set"])
    processes = PROCESSES.search(command)
    if " train " in command and processes:
        assert shown.train is not None
        accumulation_steps(shown.train, shown.data, int(processes[1]))


def test_the_recipe_shown_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(shown)
    (tmp_path / "traces.jsonl").touch()
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("recipe.yaml")).name == "my-hybrid"


def test_what_decides_on_a_change_are_the_two_commands_shown() -> None:
    check = (REPOSITORY / ".ci/run").read_text()
    for step in (
        "install --quiet -e .\n",
        "lt-train run recipes/quickstart.yaml\n",
        "install --quiet -e '.[test]'\n",
        "\npytest -q ",
    ):
        assert step in check
    assert "pip install -e . && lt-train run recipes/quickstart.yaml" in README
    assert "pip install -e '.[test]' && pytest" in README
