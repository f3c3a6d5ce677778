"""What training may change, and what it gives back to the base."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from lt_train.training.lora import load_trained
from lt_train.training.projections import freeze_all_but_lazy_projections
from tests.support.gradients import parameters_with_gradients
from tests.support.tiny_training import SPEC, load_tiny, tiny_recipe, train_in

LAZY_ONLY: dict[str, Any] = {"train": {"parameters": "lazy_projections"}}
FULL_LAYERS = tuple(layer for layer in range(SPEC.num_layers) if layer not in SPEC.lazy_layers)
RESTORED = tuple(
    f"model.layers.{layer}.self_attn.{name}" for layer in FULL_LAYERS for name in ("q_proj", "k_proj", "q_norm", "k_norm")
)


def changed(model: torch.nn.Module) -> set[str]:
    before = load_tiny(torch.float32).state_dict()
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("full"), {}, NoTracker()).folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("lora"), lora(restore=False), NoTracker()).folder


def lora(restore: bool, **given: Any) -> dict[str, Any]:
    train = {"method": "lora", "learning_rate": 1e-2, "restore_query_key": restore}
    return {"train": train, "lora": {"rank": 4, "alpha": 8, "layers": "all", **given}}


def test_only_the_projections_of_streaming_layers_get_gradients(tmp_path: Path) -> None:
    names = parameters_with_gradients(LAZY_ONLY, tmp_path)
    expected = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in SPEC.lazy_layers for p in "qkvo"}
    assert names == expected


def test_all_else_is_the_bases_to_the_last_bit_and_training_goes_on_where_it_was_cut_off(
    train_tiny, train_until, tmp_path: Path
) -> None:
    settings = {"train": {**LAZY_ONLY["train"], "max_steps": 6, "save_steps": 2, "gradient_checkpointing": True}}
    whole = train_tiny("whole", **settings)
    model = load_trained(tiny_recipe(settings), whole.folder, load_tiny, torch.float32).model
    assert changed(model) == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in SPEC.lazy_layers for p in "qkvo"}
    states = torch.load(tmp_path / "whole/checkpoint-6/optimizer.pt", weights_only=True)["state"]
    assert len(states) == 4 * len(SPEC.lazy_layers)
    train_until(5, "cut", **settings)
    assert train_tiny("cut", **settings).train_loss == pytest.approx(whole.train_loss, abs=1e-6)


def test_a_model_in_which_nothing_streams_has_nothing_to_train() -> None:
    with pytest.raises(UserError, match=r"train\.parameters: lazy_projections: no layer"):
        freeze_all_but_lazy_projections(load_tiny(torch.float32), HybridSpec(4, ()))


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


def test_a_restored_model_comes_in_the_dtype_asked_for(full: Path) -> None:
    recipe = tiny_recipe({"train": {"restore_query_key": True}})
    model = load_trained(recipe, full, load_tiny, torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_queries_and_keys_in_full_layers_are_dropped_at_the_merge(adapter: Path, tmp_path: Path, dora: bool) -> None:
    if dora:
        adapter = train_in(tmp_path / "dora", lora(restore=False, peft={"use_dora": True}), NoTracker()).folder
    plain, restored = (load_trained(tiny_recipe(lora(restore=on)), adapter, load_tiny, torch.float32) for on in (False, True))
    assert restored.merge_difference is not None and restored.merge_difference < 1e-5
    dropped = {f"{name}.weight" for name in RESTORED if name.endswith("proj")}
    assert changed(plain.model) - changed(restored.model) == dropped
    assert changed(restored.model) == changed(plain.model) - dropped
    for name in changed(restored.model):
        torch.testing.assert_close(restored.model.state_dict()[name], plain.model.state_dict()[name], atol=1e-6, rtol=0)


def test_what_is_restored_may_be_chosen_after_training(train_tiny) -> None:
    """It shapes what is loaded, not the course of the training."""
    first = train_tiny("run")
    assert train_tiny("run", train={"restore_query_key": True}) == first


def test_a_checkpoint_that_lacks_weights_is_not_filled_up_from_the_base(full: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks \d+ weights, such as model\."):
        load_trained(tiny_recipe({"train": {"restore_query_key": True}}), tmp_path, load_tiny, torch.float32)
