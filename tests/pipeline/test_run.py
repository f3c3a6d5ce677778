"""The start of a command's work in a run folder."""

from pathlib import Path

import pytest

from lt_train.pipeline import run
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import this_process
from tests.support.repository import REPOSITORY


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE: 2: the environment has no LOCAL_RANK,"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2: the environment has no RANK and no LOCAL_RANK,"),
        ({"RANK": "1"}, "RANK: 1: not below the number of processes, WORLD_SIZE, which is 1"),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK: 1: not below the number of processes"),
        ({"RANK": ""}, "RANK: '': no whole number"),
        ({"WORLD_SIZE": "2x"}, "WORLD_SIZE: '2x': no whole number"),
        ({"LOCAL_RANK": "cuda:0"}, "LOCAL_RANK: 'cuda:0': no whole number"),
    ],
)
def test_an_environment_from_which_a_process_cannot_tell_its_place_is_refused_before_anything_begins(
    variables: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "RunFolder", lambda *given: pytest.fail("the run begins, or waits for a first process"))
    with pytest.raises(UserError, match=problem):
        run.work(load_recipe(REPOSITORY / "recipes/quickstart.yaml"), "train", Path("runs"), this_process())
