"""Which weights a training changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.trained_weights import load_trained
from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from lt_train.training.trainable import freeze_all_but_lazy_projections, lora_config
from tests.support.gradients import parameters_with_gradients
from tests.support.tiny_training import SPEC, SPLIT, hybrid_from, load_tiny, tiny_config, tiny_recipe, train_in

LORA: dict[str, Any] = {"train": {"method": "lora", "learning_rate": 1e-2}, "lora": {"rank": 4, "alpha": 8}}

LAZY_ONLY: dict[str, Any] = {"train": {"parameters": "lazy_projections"}}


def changed(model: torch.nn.Module) -> set[str]:
    before = load_tiny(torch.float32).state_dict()
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


def layers_in(names: set[str]) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


@pytest.mark.parametrize(("spec", "layers"), [(SPEC, {1, 2}), (SPLIT, {1, 2, 3})], ids=["layers", "KV heads"])
def test_lora_gives_gradients_to_the_adapters_of_layers_that_stream_and_to_nothing_else(tmp_path: Path, spec, layers) -> None:
    # lora_B starts at zero, so in the first step all gradient of an adapter is in it
    names = parameters_with_gradients(LORA, tmp_path, spec)
    assert all("lora_B" in name for name in names)
    assert layers_in(names) == layers
    assert len(names) == 4 * len(layers)  # q, k, v, o


def test_lora_on_all_layers_reaches_all_layers(tmp_path: Path) -> None:
    names = parameters_with_gradients({**LORA, "lora": {"layers": "all", "targets": ["v_proj"]}}, tmp_path)
    assert layers_in(names) == set(range(SPEC.num_layers))
    assert all(".v_proj.lora_B" in name for name in names)


def test_lora_on_lazy_layers_trains_with_gradient_checkpointing(tmp_path: Path) -> None:
    settings = {**LORA, "train": {**LORA["train"], "gradient_checkpointing": True}}
    assert layers_in(parameters_with_gradients(settings, tmp_path)) == set(SPEC.lazy_layers)


def test_full_fine_tuning_gives_gradients_to_every_parameter(tmp_path: Path) -> None:
    names = parameters_with_gradients({}, tmp_path)
    assert names == {name for name, _ in load_tiny(torch.float32).named_parameters()}


def test_an_unknown_target_is_an_error_that_names_the_modules() -> None:
    recipe = tiny_recipe({**LORA, "lora": {"targets": ["q_proj", "query"]}})
    with pytest.raises(UserError, match=r"lora\.targets: query: .*name some of down_proj, .*q_proj"):
        lora_config(recipe.lora, SPEC, load_tiny(torch.float32))


@pytest.mark.parametrize(
    ("peft", "reported"),
    [
        ({"modules_to_save": ["lm_hed"]}, r"modules_to_save: lm_hed: no module has this name\. Fix: name some of .*lm_head"),
        ({"exclude_modules": ["k_proj"]}, r"exclude_modules: k_proj: no module with an adapter has this name\. Fix: .* q_proj"),
        ({"exclude_modules": ".*nowhere"}, r"exclude_modules: \.\*nowhere: no module with an adapter"),
        ({"exclude_modules": "("}, r"exclude_modules: \(: not a regular expression \(missing \), unterminated"),
        ({"exclude_modules": ["self_attn.q_proj"]}, r"exclude_modules: no module of lora\.targets is left"),
        ({"rank_pattern": {"v_proj": 2}}, r"rank_pattern: v_proj: no module with an adapter"),
        ({"alpha_pattern": {"[": 2}}, r"alpha_pattern: \[: not a regular expression"),
        ({"target_parameters": ["experts.down"]}, r"target_parameters: experts\.down: no parameter has this name"),
        ({"trainable_token_indices": {"embeddings": [1]}}, r"trainable_token_indices: embeddings: no module .*embed_tokens"),
    ],
)
def test_a_setting_of_peft_that_names_what_the_model_does_not_have_is_an_error(peft: dict[str, Any], reported: str) -> None:
    recipe = tiny_recipe({**LORA, "lora": {"targets": ["q_proj"], "peft": peft}})
    with pytest.raises(UserError, match=rf"^lora\.peft\.{reported}"):
        lora_config(recipe.lora, SPEC, load_tiny(torch.float32))


def test_settings_of_peft_that_name_modules_of_the_model_are_taken() -> None:
    peft = {
        "modules_to_save": ["lm_head", "model.norm"],
        "exclude_modules": r".*\.0\.self_attn\.q_proj",
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "v_proj": 8},
        "alpha_pattern": {"q_proj": 2},
        "trainable_token_indices": {"embed_tokens": [1]},
    }
    recipe = tiny_recipe({**LORA, "lora": {"targets": ["q_proj", "self_attn.v_proj"], "peft": peft}})
    assert lora_config(recipe.lora, SPEC, load_tiny(torch.float32)).rank_pattern == peft["rank_pattern"]


def test_lora_on_lazy_layers_of_a_model_without_any_is_an_error() -> None:
    with pytest.raises(UserError, match=r"lora\.layers: lazy.*lora\.layers: all"):
        lora_config(tiny_recipe(LORA).lora, HybridSpec(4, ()), load_tiny(torch.float32))


def test_adapters_are_saved_more_than_once_beside_a_base_read_from_a_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    Qwen3ForCausalLM(tiny_config()).save_pretrained(base)
    twice = LORA | {"train": {"max_steps": 4, "save_steps": 2}}
    result = train_in(tmp_path / "run", twice, NoTracker(), load=hybrid_from(base))
    assert result.steps == 4


@pytest.mark.parametrize(("spec", "layers"), [(SPEC, [1, 2]), (SPLIT, [1, 2, 3])], ids=["layers", "KV heads"])
def test_only_the_projections_of_streaming_layers_get_gradients(tmp_path: Path, spec, layers) -> None:
    names = parameters_with_gradients(LAZY_ONLY, tmp_path, spec)
    expected = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in layers for p in "qkvo"}
    assert names == expected


def test_all_else_is_the_bases_to_the_last_bit_and_training_resumes_where_it_was_interrupted(
    train_tiny, train_until, tmp_path: Path
) -> None:
    settings = {"train": {**LAZY_ONLY["train"], "max_steps": 6, "save_steps": 2, "gradient_checkpointing": True}}
    uninterrupted = train_tiny("uninterrupted", **settings)
    model = load_trained(tiny_recipe(settings), uninterrupted.folder, load_tiny, torch.float32).model
    assert changed(model) == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in SPEC.lazy_layers for p in "qkvo"}
    states = torch.load(tmp_path / "uninterrupted/checkpoint-6/optimizer.pt", weights_only=True)["state"]
    assert len(states) == 4 * len(SPEC.lazy_layers)
    train_until(5, "cut", **settings)
    assert train_tiny("cut", **settings).train_loss == pytest.approx(uninterrupted.train_loss, abs=1e-6)


def test_a_model_in_which_nothing_streams_has_nothing_to_train() -> None:
    with pytest.raises(UserError, match=r"train\.parameters: lazy_projections: no layer"):
        freeze_all_but_lazy_projections(load_tiny(torch.float32), HybridSpec(4, ()))


def test_what_is_restored_may_be_chosen_after_training(train_tiny) -> None:
    """It shapes what is loaded, not the course of the training."""
    first = train_tiny("run")
    assert train_tiny("run", train={"restore_query_key": True}) == first
