"""What a training left, loaded for inference: adapters merged, queries and keys restored."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lt_train.inference.trained_weights import load_trained, query_key_of_full_layers
from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from tests.support.tiny_training import SPEC, SPLIT, load_tiny, tiny_recipe, train_in

LORA: dict[str, Any] = {"train": {"method": "lora", "learning_rate": 1e-2}, "lora": {"rank": 4, "alpha": 8}}

PROBE = torch.arange(2, 26).view(1, -1)

FULL_LAYERS = tuple(layer for layer in range(SPEC.num_layers) if layer not in SPEC.lazy_layers)

RESTORED = tuple(
    f"model.layers.{layer}.self_attn.{name}" for layer in FULL_LAYERS for name in ("q_proj", "k_proj", "q_norm", "k_norm")
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of fully trained weights."""
    return train_in(tmp_path_factory.mktemp("full"), {}, NoTracker()).folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained adapter of the lazy layers."""
    return train_in(tmp_path_factory.mktemp("lora"), LORA, NoTracker()).folder


@pytest.fixture(scope="module")
def adapter_of_all_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("lora"), lora(restore=False), NoTracker()).folder


def lora(restore: bool, **given: Any) -> dict[str, Any]:
    train = {"method": "lora", "learning_rate": 1e-2, "restore_query_key": restore}
    return {"train": train, "lora": {"rank": 4, "alpha": 8, "layers": "all", **given}}


def changed(model: torch.nn.Module) -> set[str]:
    before = load_tiny(torch.float32).state_dict()
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


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
    with pytest.raises(UserError, match="not the trained one"):
        load_trained(tiny_recipe(LORA), adapter, load_tiny, torch.float32)


def test_bf16_is_cast_after_merging(adapter: Path) -> None:
    merged, cast = (load_trained(tiny_recipe(LORA), adapter, load_tiny, d).model for d in (torch.float32, torch.bfloat16))
    weight = merged.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(cast.model.layers[1].self_attn.q_proj.weight, weight.to(torch.bfloat16))


def test_a_fully_trained_model_loads_as_it_was_saved(full: Path) -> None:
    loaded = load_trained(tiny_recipe({}), full, load_tiny, torch.float32)
    assert loaded.merge_difference is None
    saved = load_file(full / "model.safetensors")
    torch.testing.assert_close(dict(loaded.model.named_parameters())["model.norm.weight"], saved["model.norm.weight"])


def test_queries_and_keys_are_restored_in_layers_in_which_nothing_streams() -> None:
    names = re.compile(query_key_of_full_layers(SPLIT))
    assert [layer for layer in range(4) if names.search(f"model.layers.{layer}.self_attn.q_proj")] == [0]


def test_after_full_fine_tuning_queries_and_keys_of_full_layers_are_the_bases_again(full: Path) -> None:
    plain, restored = (
        load_trained(tiny_recipe({"train": {"restore_query_key": on}}), full, load_tiny, torch.float32).model
        for on in (False, True)
    )
    assert changed(plain) == set(plain.state_dict())
    assert changed(plain) - changed(restored) == {f"{name}.weight" for name in RESTORED}
    kept = set(plain.state_dict()) - {f"{name}.weight" for name in RESTORED}
    assert all(torch.equal(plain.state_dict()[name], restored.state_dict()[name]) for name in kept)
    assert restored.lm_head.weight is restored.model.embed_tokens.weight and not restored.training


def test_a_restored_model_comes_in_the_requested_dtype(full: Path) -> None:
    recipe = tiny_recipe({"train": {"restore_query_key": True}})
    model = load_trained(recipe, full, load_tiny, torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_queries_and_keys_in_full_layers_are_dropped_at_the_merge(
    adapter_of_all_layers: Path, tmp_path: Path, dora: bool
) -> None:
    if dora:
        adapter_of_all_layers = train_in(tmp_path / "dora", lora(restore=False, peft={"use_dora": True}), NoTracker()).folder
    plain, restored = (
        load_trained(tiny_recipe(lora(restore=on)), adapter_of_all_layers, load_tiny, torch.float32) for on in (False, True)
    )
    assert restored.merge_difference is not None and restored.merge_difference < 1e-5
    dropped = {f"{name}.weight" for name in RESTORED if name.endswith("proj")}
    assert changed(plain.model) - changed(restored.model) == dropped
    assert changed(restored.model) == changed(plain.model) - dropped
    for name in changed(restored.model):
        torch.testing.assert_close(restored.model.state_dict()[name], plain.model.state_dict()[name], atol=1e-6, rtol=0)


def test_a_checkpoint_that_lacks_weights_is_not_filled_up_from_the_base(full: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\d+ weights are missing, such as model\."):
        load_trained(tiny_recipe({"train": {"restore_query_key": True}}), tmp_path, load_tiny, torch.float32)
