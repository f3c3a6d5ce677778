"""Training over every family of bases."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Lora
from lt_train.training import trainer
from lt_train.training.trainable import freeze_all_but_lazy_projections, lora_config
from tests.support import tiny_training
from tests.support.families import CORE, FAMILIES, WITH_SINKS, attention_linears, base_of, on_base
from tests.support.tiny_training import tiny_examples, tiny_recipe, tiny_tokenizer
from tests.support.training_log import assert_same_course

SPEC = HybridSpec(4, (1, 3), w_sink=3, w_recent=7)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_streaming_layers_alone_learn_and_merging_them_changes_no_logit(family: str) -> None:
    torch.manual_seed(0)
    hybrid = build_hybrid(base_of(family), on_base(base_of(family), SPEC))
    lora = Lora(rank=4, alpha=8, targets=attention_linears(hybrid))
    model = get_peft_model(hybrid, lora_config(lora, hybrid.spec, hybrid)).train()
    optimizer = torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), lr=1.0)
    ids = torch.randint(3, 96, (2, 40))
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        learned = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in learned} == {1, 3}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted = model.eval()(ids, use_cache=False).logits
    merged = model.merge_and_unload()(ids, use_cache=False).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_projections_are_all_linear_modules_of_attention_in_streaming_layers(family: str) -> None:
    hybrid = build_hybrid(base_of(family), on_base(base_of(family), SPEC))
    freeze_all_but_lazy_projections(hybrid, hybrid.spec)
    trained = {
        name.removesuffix(".weight").removesuffix(".bias") for name, weight in hybrid.named_parameters() if weight.requires_grad
    }
    names = attention_linears(hybrid) + (["sinks"] if family in WITH_SINKS else [])
    assert trained == {f"model.layers.{layer}.self_attn.{name}" for layer in (1, 3) for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_that_training_reports_is_that_of_the_models_logits(family: str, tmp_path: Path) -> None:
    def load(dtype: torch.dtype) -> HybridForCausalLM:
        torch.manual_seed(0)
        return build_hybrid(base_of(family), on_base(base_of(family), tiny_training.SPEC)).to(dtype).eval()

    recipe, examples = tiny_recipe({"data": {"heldout": 3, "packing": False}}), tiny_examples(heldout=3)
    config = trainer.sft_config(recipe, recipe.train, tmp_path)
    training = trainer._build_trainer(recipe, config, load, tiny_tokenizer(), examples, tiny_training.SPEC)
    model, losses = load(torch.float32), []
    for example in examples.heldout:
        ids = torch.tensor([example.input_ids])
        logits = model(ids, use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(example.prompt_ids) :], reduction="none"))
    assert training.evaluate()["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*CORE, *WITH_SINKS])
def test_a_resumed_training_has_the_losses_of_an_uninterrupted_one(family: str, train_tiny, train_until, tmp_path: Path) -> None:
    spec = on_base(base_of(family), tiny_training.SPEC)

    def load(dtype: torch.dtype) -> HybridForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_hybrid(base_of(family), spec).to(dtype)

    lora = {"rank": 4, "targets": attention_linears(load(torch.float32))}
    settings = {"train": {"method": "lora", "max_steps": 4, "save_steps": 2}, "lora": lora}
    train_tiny("uninterrupted", load=load, spec=spec, **settings)
    train_until(3, "cut", load=load, spec=spec, **settings)
    train_tiny("cut", load=load, spec=spec, **settings)
    assert_same_course(tmp_path / "cut", tmp_path / "uninterrupted")
