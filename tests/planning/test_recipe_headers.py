"""What the header of a recipe says: each way to run it is a valid recipe, and trains on the hardware that is named."""

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from lt_train.planning.plan import plan_recipe
from lt_train.planning.setup import Machine
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.shipped import read_header
from lt_train.runtime.units import GIB
from tests.support.public_models import CONFIGS, HUB

RECIPES = sorted(Path("recipes").glob("*.yaml"))
EVIDENCE = sorted(Path("recipes/evidence").glob("*.yaml"))
HARDWARE = re.compile(r"on (?:(\d+) GPUs?|a CPU) (?:of|with) (\d+) GB", re.IGNORECASE)
LAUNCH = re.compile(r"--num_gpus (\d+)")


@dataclass(frozen=True)
class Way:
    """One way to run a recipe: "… on 8 GPUs of 80 GB …:" and the indented lines below it."""

    recipe: Path
    machine: Machine
    commands: str

    @property
    def overrides(self) -> list[str]:
        words = shlex.split(self.commands, comments=True)
        return [value for option, value in pairwise(words) if option == "--set"]


def ways_of(recipe: Path) -> list[Way]:
    header = recipe.read_text(encoding="utf-8").split("\nname:")[0].splitlines()
    found = []
    for at, line in enumerate(header):
        hardware = HARDWARE.search(line)
        if hardware is None:
            continue
        below = []
        for command in header[at + 1 :]:
            if not command.startswith("#   "):
                break
            below.append(command[4:])
        gpus, memory = int(hardware[1] or 1), int(hardware[2]) * GIB
        found.append(Way(recipe, Machine(gpus, memory, cpu=hardware[1] is None), "\n".join(below)))
    return found


WAYS = [way for recipe in (*RECIPES, *EVIDENCE) for way in ways_of(recipe)]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.recipe.stem}-{' '.join(way.overrides) or 'as it is'}")
def test_every_way_in_a_header_is_valid_and_fits_the_hardware_it_names(way):
    as_written = load_recipe(way.recipe, way.overrides)
    base = CONFIGS / HUB[as_written.model.base] if as_written.model.base in HUB else as_written.model.base
    checked = load_recipe(way.recipe, [*way.overrides, f"model.base={base}"])
    plan = plan_recipe(checked, way.machine, samples=5000)
    assert plan.profile_fits, plan.profile
    training = plan.training
    assert (training is None) == (checked.train is None)
    if training is not None:
        assert training.undivided is None
        assert training.fits, f"{training.memory.peak / GIB:.1f} GiB of {way.machine.usable / GIB:.1f}; {training.suggestions}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_hours_in_a_header_are_those_of_plan(recipe):
    way, time = ways_of(recipe)[0], read_header(recipe).time
    if way.machine.cpu:
        assert time.endswith("min"), "measured"
        return
    base = CONFIGS / HUB[load_recipe(recipe, way.overrides).model.base]
    plan = plan_recipe(load_recipe(recipe, [*way.overrides, f"model.base={base}"]), way.machine, samples=5000)
    assert time == f"{max(1, round(plan.training.compute.hours(way.machine)))} h"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_header_gives_a_launch_line_and_the_other_method_by_one_override(recipe):
    ways = ways_of(recipe)
    assert any(f"train {recipe}" in way.commands or f"lt-train run {recipe}" in way.commands for way in ways)
    if recipe.stem != "quickstart":  # 1.6 M parameters
        assert {load_recipe(way.recipe, way.overrides).train.method for way in ways} == {"full", "lora"}


@pytest.mark.parametrize("way", [way for way in WAYS if LAUNCH.search(way.commands)], ids=lambda way: way.recipe.stem)
def test_a_launch_line_starts_as_many_processes_as_the_header_has_gpus(way):
    assert int(LAUNCH.search(way.commands)[1]) == way.machine.gpus


def test_a_way_without_a_launcher_needs_none():
    """`lt-train run` alone is one process, and DeepSpeed's configuration is refused there."""
    for way in WAYS:
        if way.commands and "deepspeed --" not in way.commands and "lt-train run" in way.commands:
            assert load_recipe(way.recipe, way.overrides).train.deepspeed is None, way
            assert way.machine.gpus == 1


def test_the_papers_recipe_does_not_fit_where_each_of_8_gpus_has_a_sample_of_its_own():
    overrides = [f"model.base={CONFIGS / 'qwen2.5-32b-instruct'}", "train.sequence_parallel=1"]
    plan = plan_recipe(load_recipe(Path("recipes/qwq-still-32b.yaml"), overrides), Machine(8, 80 * GIB))
    assert not plan.works
