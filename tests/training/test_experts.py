"""Mixtures of experts: ZeRO-3 with processes that route differently, the router's loss, and what LoRA reaches."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lt_train.hybrid.loading import build_hybrid, load_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.trained_weights import load_trained
from lt_train.recipe.schema import Lora
from lt_train.training import trainer
from lt_train.training.experts import COEFFICIENT
from lt_train.training.sft_trainer import HybridSFTTrainer
from lt_train.training.trainable import lora_config
from tests.support.expert_training import qwen3_moe, routed_by_rank, train_experts
from tests.support.launched_training import deepspeed_file
from tests.support.processes import exit_code, start_ranks
from tests.support.tiny_training import SPEC, tiny_examples, tiny_recipe, tiny_tokenizer
from tests.support.training_log import assert_same_course, losses

SECONDS = 240
"""In which two processes that do not wait for each other have ended."""


def base_of(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_under_zero3_processes_whose_tokens_go_to_different_experts_train(tmp_path: Path) -> None:
    config = routed_by_rank()
    settings = {"train": {"max_steps": 2, "deepspeed": str(deepspeed_file("zero3.json", tmp_path))}}
    given = (tmp_path / "run", base_of(config, tmp_path / "base"), settings, config)
    ranks = start_ranks(train_experts, *given, outputs=tmp_path / "printed")
    try:
        assert [exit_code(rank, SECONDS) for rank in ranks] == [0, 0], (tmp_path / "printed/0.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_qwen3_moe_under_zero3_has_the_losses_of_one_process_and_saves_every_expert(tmp_path: Path) -> None:
    base = base_of(qwen3_moe(), tmp_path / "base")
    train = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 1}
    launched = {"train": train | {"deepspeed": str(deepspeed_file("zero3.json", tmp_path))}}
    ranks = start_ranks(train_experts, tmp_path / "two", base, launched, outputs=tmp_path / "printed")
    try:
        assert [exit_code(rank, SECONDS) for rank in ranks] == [0, 0], (tmp_path / "printed/0.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    train_experts(tmp_path / "one", base, {"train": train})
    assert_same_course(tmp_path / "two", tmp_path / "one", tolerance=1e-3, but=["token_accuracy", "grad_norm"])
    two, one = (
        load_trained(tiny_recipe({}), tmp_path / name / "final", lambda dtype: load_hybrid(base, SPEC), torch.float32).model
        for name in ("two", "one")
    )
    for (name, mine), theirs in zip(two.state_dict().items(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-2, msg=name)


@pytest.mark.parametrize(("asked_for", "trl", "coefficient"), [(True, {}, 0.5), (False, {}, 0.0), (False, {COEFFICIENT: 0.2}, 0.2)])
def test_training_adds_the_routers_loss_where_the_bases_config_requests_it_and_held_out_losses_lack_it(
    asked_for: bool, trl: dict[str, float], coefficient: float, tmp_path: Path
) -> None:
    def build(router: bool) -> tuple[HybridSFTTrainer, HybridForCausalLM]:
        torch.manual_seed(0)
        model = build_hybrid(qwen3_moe(output_router_logits=router, router_aux_loss_coef=0.5), SPEC)
        recipe, examples = tiny_recipe({"data": {"heldout": 3, "packing": False}, "train": {"trl": trl}}), tiny_examples(heldout=3)
        config = trainer.sft_config(recipe, recipe.train, tmp_path)
        return trainer._build_trainer(recipe, config, lambda dtype: model, tiny_tokenizer(), examples, SPEC), model

    training, model = build(asked_for)
    ids = torch.tensor([tiny_examples().train[0].input_ids])
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    loss = training.compute_loss(model, dict(inputs)).item()
    token_losses = model(**inputs, output_router_logits=False, use_cache=False).loss.item()
    router = model(**inputs, output_router_logits=True, use_cache=False)
    assert router.aux_loss > 0.5
    assert loss == pytest.approx(token_losses + coefficient * router.aux_loss.item(), rel=1e-5)
    assert model.config.output_router_logits is asked_for and model.config.router_aux_loss_coef == 0.5
    assert training.evaluate()["eval_loss"] == pytest.approx(build(not asked_for)[0].evaluate()["eval_loss"], rel=1e-6)


def test_lora_reaches_attention_alone_by_default(tmp_path: Path) -> None:
    hybrid = build_hybrid(qwen3_moe(), SPEC)
    adapted = get_peft_model(hybrid, lora_config(Lora(), SPEC, hybrid))
    trained = {name.split(".lora_")[0].split("layers.")[1] for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained == {
        f"{layer}.self_attn.{name}" for layer in SPEC.lazy_layers for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
