from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from lt_train.training.lora import load_trained, lora_config
from tests.support.gradients import parameters_with_gradients
from tests.support.tiny_training import (
    SPEC,
    hybrid_from,
    load_tiny,
    tiny_config,
    tiny_recipe,
    train_in,
)

LORA: dict[str, Any] = {"train": {"method": "lora", "learning_rate": 1e-2}, "lora": {"rank": 4, "alpha": 8}}
PROBE = torch.arange(2, 26).view(1, -1)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained adapter."""
    return train_in(tmp_path_factory.mktemp("lora"), LORA, NoTracker()).folder


def layers_in(names: set[str]) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


def test_lora_gives_gradients_to_the_lazy_layers_adapters_and_to_nothing_else(tmp_path: Path) -> None:
    # lora_B starts at zero, so in the first step all gradient of an adapter is in it
    names = parameters_with_gradients(LORA, tmp_path)
    assert all("lora_B" in name for name in names)
    assert layers_in(names) == set(SPEC.lazy_layers)
    assert len(names) == 4 * len(SPEC.lazy_layers)  # q, k, v, o


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


def test_an_unknown_target_is_an_error_that_names_the_modules_there_are() -> None:
    recipe = tiny_recipe({**LORA, "lora": {"targets": ["q_proj", "query"]}})
    with pytest.raises(UserError, match=r"lora\.targets: query: .*This model has: down_proj, .*q_proj"):
        lora_config(recipe.lora, SPEC, load_tiny(torch.float32))


def test_lora_on_lazy_layers_of_a_model_without_any_is_an_error() -> None:
    with pytest.raises(UserError, match=r"lora\.layers: lazy.*lora\.layers: all"):
        lora_config(tiny_recipe(LORA).lora, HybridSpec(4, ()), load_tiny(torch.float32))


def test_a_trained_adapter_merges_to_the_same_logits_and_changes_the_base(adapter: Path) -> None:
    loaded = load_trained(tiny_recipe(LORA), adapter, load_tiny, torch.float32)
    assert loaded.merge_difference is not None and loaded.merge_difference < 1e-5
    base = load_tiny(torch.float32).eval()
    with torch.no_grad():
        moved = (loaded.model(PROBE).logits - base(PROBE).logits).abs().max()
    assert moved > 1e-2
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())


def test_the_merged_weights_are_base_plus_scaled_product(adapter: Path) -> None:
    saved = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    delta = saved[f"{prefix}.lora_B.weight"] @ saved[f"{prefix}.lora_A.weight"] * (8 / 4)
    loaded = load_trained(tiny_recipe(LORA), adapter, load_tiny, torch.float32).model
    before, after = (m.model.layers[1].self_attn.q_proj.weight for m in (load_tiny(torch.float32), loaded))
    torch.testing.assert_close(after, before + delta, atol=1e-6, rtol=0)


def test_an_adapter_that_does_not_merge_to_what_was_trained_is_an_error(adapter: Path, monkeypatch) -> None:
    def forgetful(self: Any) -> Any:
        return load_tiny(torch.float32)

    monkeypatch.setattr("peft.PeftModel.merge_and_unload", forgetful, raising=False)
    with pytest.raises(UserError, match="not what was trained"):
        load_trained(tiny_recipe(LORA), adapter, load_tiny, torch.float32)


def test_adapters_are_saved_more_than_once_beside_a_base_read_from_a_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    Qwen3ForCausalLM(tiny_config()).save_pretrained(base)
    twice = LORA | {"train": {"max_steps": 4, "save_steps": 2}}
    result = train_in(tmp_path / "run", twice, NoTracker(), load=hybrid_from(base))
    assert result.steps == 4


def test_a_fully_trained_model_loads_as_it_was_saved(train_tiny) -> None:
    result = train_tiny("full")
    loaded = load_trained(tiny_recipe({}), result.folder, load_tiny, torch.float32)
    assert loaded.merge_difference is None
    saved = load_file(result.folder / "model.safetensors")
    torch.testing.assert_close(dict(loaded.model.named_parameters())["model.norm.weight"], saved["model.norm.weight"])


def test_bf16_is_cast_after_merging(adapter: Path) -> None:
    merged, cast = (load_trained(tiny_recipe(LORA), adapter, load_tiny, d).model for d in (torch.float32, torch.bfloat16))
    weight = merged.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(cast.model.layers[1].self_attn.q_proj.weight, weight.to(torch.bfloat16))
