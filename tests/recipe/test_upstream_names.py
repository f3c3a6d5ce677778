"""The lists in lt_train/recipe/upstream_names.py against the installed libraries. When one moves, copy what the failure shows."""

import dataclasses

import pytest

from lt_train.recipe.upstream_names import (
    DEEPSPEED_ZERO_NAMES,
    PEFT_LORA_CONFIG_NAMES,
    PEFT_SET_BY_RECIPE,
    SCHEDULER_NAMES,
    TRL_SET_BY_RECIPE,
    TRL_SFT_CONFIG_NAMES,
)


def arguments(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if field.init}


def test_the_list_of_trl_names_is_that_of_the_installed_class() -> None:
    from trl import SFTConfig

    assert arguments(SFTConfig) == TRL_SFT_CONFIG_NAMES


def test_the_list_of_peft_names_is_that_of_the_installed_class() -> None:
    from peft import LoraConfig

    assert arguments(LoraConfig) == PEFT_LORA_CONFIG_NAMES


def test_the_list_of_deepspeeds_sharding_settings_is_that_of_the_installed_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()} == DEEPSPEED_ZERO_NAMES


def test_the_list_of_schedulers_is_that_of_the_installed_transformers() -> None:
    from transformers import SchedulerType

    assert {kind.value for kind in SchedulerType} == SCHEDULER_NAMES


@pytest.mark.parametrize(
    ("refused", "known"),
    [(TRL_SET_BY_RECIPE, TRL_SFT_CONFIG_NAMES), (PEFT_SET_BY_RECIPE, PEFT_LORA_CONFIG_NAMES)],
    ids=["trl", "peft"],
)
def test_names_that_the_recipe_sets_itself_are_real_names(refused: dict[str, str], known: frozenset[str]) -> None:
    assert refused.keys() <= known


@pytest.mark.parametrize("clause", [*TRL_SET_BY_RECIPE.values(), *PEFT_SET_BY_RECIPE.values()])
def test_a_setting_that_is_recommended_instead_exists(clause: str) -> None:
    from lt_train.recipe.messages import _all_settings
    from lt_train.recipe.schema import Recipe

    named = [word for word in clause.replace(",", " ").split() if "." in word and "/" not in word]
    assert set(named) <= set(_all_settings(Recipe))
