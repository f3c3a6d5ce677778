"""Learned sinks: their first values, and their training beside the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from lt_train.hybrid.documents import find_documents
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.sinks_file import learned_sinks, read_sinks, write_sinks
from lt_train.inference.trained_weights import load_trained
from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from lt_train.training.sink_fitting import FirstTokensView, answer_loss, fit_sinks, start_from_first_tokens
from lt_train.training.trainable import freeze_all_but_lazy_projections
from tests.support.launched_training import train_in_ranks
from tests.support.repository import REPOSITORY
from tests.support.tiny_training import LEARNED, SPEC, hybrid_from, tiny_config, tiny_examples, tiny_recipe, train_in
from tests.support.training_log import assert_same_course

RECIPE: dict[str, Any] = {"hybrid": {"layers": list(SPEC.lazy_layers), "sink": "learned", "w_sink": 0, "w_recent": SPEC.w_recent}}
LORA: dict[str, Any] = RECIPE | {"train": {"method": "lora", "learning_rate": 1e-3}, "lora": {"rank": 4, "alpha": 8}}


def load_learned(dtype: torch.dtype) -> HybridForCausalLM:
    """With weights so large that streaming and sinks change what it says, and sinks that are not all alike."""
    config = tiny_config()
    config.initializer_range = 0.25
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_hybrid(config, LEARNED)
        for logits_H in learned_sinks(model).values():
            torch.nn.init.uniform_(logits_H, 0, 1)
        return model.to(dtype)


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: logits_H.detach().clone() for name, logits_H in learned_sinks(model).items()}


def train(out: Path, settings: dict[str, Any]) -> HybridForCausalLM:
    """The trained model, as it is loaded for evaluation and export."""
    result = train_in(out, settings, NoTracker(), load=load_learned)
    return load_trained(tiny_recipe(settings), result.folder, load_learned, torch.float32).model


def test_a_sink_begins_at_the_mean_log_sum_exp_of_the_first_tokens_scores() -> None:
    """Over the queries that no longer see all of these tokens through a window of 5."""
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    view = FirstTokensView(find_documents(1, 12, q.device, None, None), w_recent=5)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    view.attend(module, q, k, v, 0.3, 0.0)
    for head in range(4):
        sums = [torch.logsumexp(0.3 * k[0, head // 2, :4] @ q[0, head, query], 0) for query in range(8, 12)]
        torch.testing.assert_close(view.mean_H[head], torch.stack(sums).mean())


def test_fitting_lowers_the_loss_changes_nothing_else_and_is_repeatable() -> None:
    examples = [example for example in tiny_examples().train if len(example) > 8]
    before, fitted, again = (load_learned(torch.float32) for _ in range(3))
    start_from_first_tokens(before.eval(), examples[:8])
    found = fit_sinks(fitted, examples, steps=12, learning_rate=0.1, progress=False)
    fit_sinks(again, examples, steps=12, learning_rate=0.1, progress=False)

    with torch.no_grad():
        loss, start = (sum(answer_loss(m, x.prompt_ids, x.answer_ids) for x in examples[:12]) for m in (fitted, before))
    assert loss < start
    assert found.last < found.first and found.logits == 8
    assert all(torch.equal(values(fitted)[name], logits_H) for name, logits_H in values(again).items())
    sinks = values(fitted).keys()
    untouched = load_learned(torch.float32).state_dict()
    assert all(torch.equal(weight, untouched[name]) for name, weight in fitted.state_dict().items() if name not in sinks)


def test_without_steps_sinks_stay_where_the_first_tokens_are() -> None:
    examples = [example for example in tiny_examples().train if len(example) > 8][:8]
    model, start = load_learned(torch.float32), load_learned(torch.float32).eval()
    start_from_first_tokens(start, examples)
    assert fit_sinks(model, examples, steps=0, learning_rate=0.1, progress=False).first is None
    torch.testing.assert_close(values(model), values(start))


def test_the_loss_that_sinks_are_fitted_to_is_the_answers() -> None:
    model, example = load_learned(torch.float32).eval(), tiny_examples().train[0]
    logits = model(torch.tensor([example.input_ids]), use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(example.answer_ids))
    torch.testing.assert_close(answer_loss(model, example.prompt_ids, example.answer_ids), expected)


def test_a_loss_that_is_not_finite_is_refused_with_the_sample() -> None:
    model, examples = load_learned(torch.float32), tiny_examples().train[:2]
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match=rf"hybrid\.sink: learned: the loss of sample {examples[0].id} is nan .* Fix: lower"):
        fit_sinks(model, examples, steps=1, learning_rate=0.1, progress=False)


def test_the_file_of_sinks_is_read_back_and_one_of_another_hybrid_refused(tmp_path: Path) -> None:
    model, other = load_learned(torch.float32), build_hybrid(tiny_config(), LEARNED)
    write_sinks(model, tmp_path / "sinks.safetensors")
    read_sinks(other, tmp_path / "sinks.safetensors")
    torch.testing.assert_close(values(other), values(model))
    with pytest.raises(UserError, match=r"sinks\.safetensors: the learned sinks are of another hybrid\. Fix: delete"):
        read_sinks(build_hybrid(tiny_config(), replace(LEARNED, lazy_layers=(0, 1))), tmp_path / "sinks.safetensors")
    (tmp_path / "sinks.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"learned sinks cannot be read: .*Fix: delete this file"):
        read_sinks(other, tmp_path / "sinks.safetensors")


@pytest.mark.parametrize("settings", [LORA, RECIPE], ids=["lora", "full"])
def test_sinks_are_trained_at_a_rate_of_their_own_saved_and_merged(tmp_path: Path, settings: dict[str, Any]) -> None:
    slow = settings | {"train": {**settings.get("train", {}), "sink_learning_rate": 1e-9}}
    before, trained, kept = values(load_learned(torch.float32)), train(tmp_path / "a", settings), train(tmp_path / "b", slow)
    moved = [(values(trained)[name] - logits_H).abs().mean() for name, logits_H in before.items()]
    assert min(moved) > 0.002, "0.003 a step where the recipe names no rate"
    torch.testing.assert_close(values(kept), before, atol=1e-6, rtol=0)
    assert trained.model.layers[1].self_attn.sinks.weight.dtype == torch.float32
    if settings is LORA:
        saved = load_file(tmp_path / "a/final/adapter_model.safetensors")
        assert sum("sinks" in name for name in saved) == len(SPEC.lazy_layers)


def test_weight_decay_does_not_pull_sinks_to_zero(tmp_path: Path) -> None:
    decayed = RECIPE | {"train": {"sink_learning_rate": 1e-9, "weight_decay": 1.0, "learning_rate": 0.9}}
    torch.testing.assert_close(values(train(tmp_path, decayed)), values(load_learned(torch.float32)), atol=1e-6, rtol=0)


def test_lora_in_bf16_trains_sinks_in_fp32(tmp_path: Path) -> None:
    """A step of 1e-5 is lost in bf16."""
    settings = LORA | {"model": {"dtype": "bf16"}, "train": {**LORA["train"], "sink_learning_rate": 1e-5}}
    result = train_in(tmp_path, settings, NoTracker(), load=load_learned)
    saved = load_file(result.folder / "adapter_model.safetensors")
    logits_H = next(value for name, value in saved.items() if "layers.1.self_attn.sinks" in name)
    moved = (logits_H - load_learned(torch.bfloat16).model.layers[1].self_attn.sinks.weight.float()).abs()
    assert logits_H.dtype == torch.float32 and 1e-6 < moved.max() < 1e-4


def test_an_interrupted_training_with_sinks_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    steps = LORA | {"train": {**LORA["train"], "max_steps": 4, "save_steps": 2}}
    whole = train(tmp_path / "whole", steps)
    train(tmp_path / "cut", steps)
    for folder in ("final", "checkpoint-4"):
        (tmp_path / "cut" / folder).rename(tmp_path / f"gone-{folder}")
    torch.testing.assert_close(values(train(tmp_path / "cut", steps)), values(whole), atol=0, rtol=0)


def test_projections_alone_are_trained_with_their_sinks() -> None:
    model = load_learned(torch.float32)
    freeze_all_but_lazy_projections(model, LEARNED)
    trained = {name.rpartition("layers.")[2] for name, weight in model.named_parameters() if weight.requires_grad}
    assert {f"{layer}.self_attn.sinks.weight" for layer in LEARNED.lazy_layers} <= trained
    assert len(trained) == 5 * len(LEARNED.lazy_layers)


@pytest.mark.slow
def test_zero3_reads_trains_and_saves_sinks_as_one_process_does(tmp_path: Path) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    Qwen3ForCausalLM(tiny_config()).save_pretrained(base)
    write_sinks(load_learned(torch.float32), base / "sinks.safetensors")
    one = RECIPE | {"train": {"micro_batch_size": 1}}
    zero3 = json.loads((REPOSITORY / "launch/zero3.json").read_text()) | {"zero_force_ds_cpu_optimizer": False}
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    two = RECIPE | {"train": {"micro_batch_size": 1, "deepspeed": str(tmp_path / "zero3.json")}}
    train_in(tmp_path / "one", one, NoTracker(), load=hybrid_from(base, one))
    train_in_ranks({tmp_path / "two": two}, base, tmp_path / "printed")
    assert_same_course(tmp_path / "two", tmp_path / "one", tolerance=1e-3, but=["token_accuracy", "grad_norm"])
    saved = [load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "two")]
    for name in values(load_learned(torch.float32)):
        torch.testing.assert_close(saved[1][name], saved[0][name], atol=1e-3, rtol=0)
