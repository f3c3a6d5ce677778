"""Arguments of TRL, PEFT, DeepSpeed and transformers, as the installed libraries have them."""

import dataclasses
from typing import Any

import pytest

from lt_train.recipe.messages import all_settings
from lt_train.recipe.schema import Recipe
from lt_train.recipe.upstream import (
    COMMON_SCHEDULERS,
    COMMON_ZERO_SETTINGS,
    PEFT_SET_BY_RECIPE,
    TRL_SET_BY_RECIPE,
    peft_faults,
    trl_faults,
    unknown_scheduler,
    unknown_zero_setting,
)


@pytest.fixture(autouse=True)
def deepspeed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize(
    "given",
    [
        {"optim": "adamw_torch", "adam_beta2": 0.95, "dataloader_num_workers": 2, "tf32": None, "shuffle_dataset": False},
        {"neftune_noise_alpha": 5, "label_names": ["labels"], "accelerator_config": {"even_batches": True}},
    ],
)
def test_arguments_of_the_installed_trl_are_accepted(given: dict[str, Any]) -> None:
    assert list(trl_faults(given)) == []


@pytest.mark.parametrize(
    "given",
    [
        {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"], "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "pissa_niter_16", "rank_pattern": {"q_proj": 4}, "trainable_token_indices": [1, 2]},
    ],
)
def test_arguments_of_the_installed_peft_are_accepted(given: dict[str, Any]) -> None:
    assert list(peft_faults(given)) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"otpim": "sgd"}, "train.trl.otpim: no argument of SFTConfig; did you mean optim?"),
        ({"optim": 5}, "train.trl.optim: 5: not a value for SFTConfig. Fix: set it to 'adamw_torch', "),
        ({"optim": "adamw_tourch"}, "train.trl.optim: 'adamw_tourch': not a value for SFTConfig"),
        ({"adam_beta2": "0.95"}, "train.trl.adam_beta2: '0.95': not a value for SFTConfig. Fix: set it to a valid number"),
        ({"adam_beta2": True}, "train.trl.adam_beta2: true: not a value for SFTConfig"),
        ({"dataloader_num_workers": 2.0}, "train.trl.dataloader_num_workers: 2.0: not a value for SFTConfig"),
        ({"shuffle_dataset": 1}, "train.trl.shuffle_dataset: 1: not a value for SFTConfig. Fix: set it to a valid boolean"),
        ({"learning_rate": 1e-5}, "train.trl.learning_rate: not set here. Fix: use train.learning_rate"),
        ({"use_cache": True}, "train.trl.use_cache: not set here; training keeps no cache. Fix: remove it"),
    ],
)
def test_a_faulty_argument_of_trl_is_reported(given: dict[str, Any], message: str) -> None:
    (fault,) = trl_faults(given)
    assert str(fault).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_dorra": True}, "lora.peft.use_dorra: no argument of LoraConfig; did you mean use_dora?"),
        ({"use_dora": 1}, "lora.peft.use_dora: 1: not a value for LoraConfig. Fix: set it to a valid boolean"),
        ({"bias": "some"}, "lora.peft.bias: 'some': not a value for LoraConfig. Fix: set it to 'none', 'all' or 'lora_only'"),
        ({"rank_pattern": 4}, "lora.peft.rank_pattern: 4: not a value for LoraConfig. Fix: set it to a mapping"),
        ({"r": 4}, "lora.peft.r: not set here. Fix: use lora.rank"),
    ],
)
def test_a_faulty_argument_of_peft_is_reported(given: dict[str, Any], message: str) -> None:
    (fault,) = peft_faults(given)
    assert str(fault) == message


def test_a_scheduler_that_only_the_installed_transformers_knows_is_accepted() -> None:
    from transformers import SchedulerType

    assert [kind.value for kind in SchedulerType if unknown_scheduler(kind.value)] == []
    assert set(COMMON_SCHEDULERS) < {kind.value for kind in SchedulerType}
    assert unknown_scheduler("cosin") == "no scheduler of transformers; did you mean cosine?"


def test_a_setting_that_only_the_installed_deepspeed_knows_is_accepted() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert {name for name in names if unknown_zero_setting(name)} == set()
    assert names > COMMON_ZERO_SETTINGS
    assert unknown_zero_setting("overlap_com") == "no setting of DeepSpeed; did you mean overlap_comm?"


def test_arguments_that_the_recipe_sets_itself_exist() -> None:
    from peft import LoraConfig
    from trl import SFTConfig

    for elsewhere, config in ((TRL_SET_BY_RECIPE, SFTConfig), (PEFT_SET_BY_RECIPE, LoraConfig)):
        assert elsewhere.keys() <= {field.name for field in dataclasses.fields(config) if field.init}


@pytest.mark.parametrize("clause", [*TRL_SET_BY_RECIPE.values(), *PEFT_SET_BY_RECIPE.values()])
def test_a_setting_that_is_recommended_instead_exists(clause: str) -> None:
    named = [word for word in clause.replace(",", " ").split() if "." in word and "/" not in word]
    assert set(named) <= set(all_settings(Recipe))
