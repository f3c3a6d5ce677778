"""A hybrid learns from its own past self: the base, with full attention in every layer."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.tracking import NoTracker
from lt_train.training import trainer as training
from lt_train.training.log import read_log
from lt_train.training.sft_trainer import HybridSFTTrainer
from tests.support.tiny_training import (
    SPEC,
    VOCABULARY,
    load_decided,
    tiny_config,
    tiny_examples,
    tiny_recipe,
    tiny_tokenizer,
    train_in,
    write_teacher,
)
from tests.support.training_log import assert_same_course

LORA: dict[str, Any] = {"method": "lora", "learning_rate": 1e-2}
DISTILLED: dict[str, Any] = {"weight": 0.7, "temperature": 1.5}
TEMPERATURE = DISTILLED["temperature"]
NOTHING_STREAMS = HybridSpec(4, (), w_sink=1, w_recent=4)


def recipe_of(**distill: Any) -> dict[str, Any]:
    return {"train": {"distill": {**DISTILLED, **distill}}}


def lora_recipe(**distill: Any) -> dict[str, Any]:
    return {"train": {**LORA, "distill": {**DISTILLED, **distill}}, "lora": {"rank": 4, "alpha": 8}}


def build(settings: dict[str, Any], out: Path, spec: HybridSpec = SPEC, load: Any = load_decided) -> HybridSFTTrainer:
    recipe, data = tiny_recipe(settings), tiny_examples()
    config = training.sft_config(recipe, recipe.train, out)
    trainer = training._build_trainer(recipe, config, load, tiny_tokenizer(), data, spec)
    teacher = write_teacher(settings, out / "teacher", load) if recipe.train.distill.teacher == "top_k" else None
    trainer.distillation = training._distillation(recipe, trainer, load, data, spec, teacher)
    return trainer


def moved(trainer: HybridSFTTrainer) -> HybridSFTTrainer:
    """The student has trained already: it is away from its teacher by more than its streaming layers."""
    with torch.no_grad():
        torch.manual_seed(5)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return trainer


def batch(trainer: HybridSFTTrainer) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def dense_loss(trainer: HybridSFTTrainer, inputs: dict[str, Any], weight: float) -> torch.Tensor:
    """The same loss from full logits of both models, in fp64."""
    batch_inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask", "position_ids")}
    base = load_decided(torch.float32).eval()
    with torch.no_grad(), base.full_attention():
        teacher = base(**batch_inputs, use_cache=False).logits[:, :-1]
    student = trainer.model(**batch_inputs, use_cache=False).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    answers = labels != -100
    sft = cross_entropy(student[answers].double(), labels[answers])
    log_p, log_q = ((logits[answers].double() / TEMPERATURE).log_softmax(-1) for logits in (teacher, student))
    return (1 - weight) * sft + weight * TEMPERATURE**2 * kl_div(log_q, log_p, log_target=True, reduction="sum") / answers.sum()


def gradients(trainer: HybridSFTTrainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def losses(folder: Path, column: str = "loss") -> list[float]:
    return [row[column] for row in read_log(folder / "log.jsonl") if "loss" in row]


@pytest.mark.parametrize(("packing", "weight"), [(False, 0.7), (True, 1.0)])
@pytest.mark.parametrize(
    "settings",
    [lora_recipe, recipe_of, lambda **given: recipe_of(teacher="top_k", top_k=VOCABULARY, **given)],
    ids=["own", "copy", "top_k"],
)
def test_the_chunked_loss_and_its_gradients_are_those_of_full_logits(
    tmp_path: Path, settings, packing: bool, weight: float
) -> None:
    given = {**settings(weight=weight), "data": {"packing": packing}}
    trainer = moved(build(given, tmp_path))
    inputs = batch(trainer)
    chunked = trainer.compute_loss(trainer.model, dict(inputs))
    dense = dense_loss(trainer, inputs, weight)
    assert chunked.item() == pytest.approx(dense.item(), abs=1e-5)
    mine, theirs = gradients(trainer, chunked), gradients(trainer, dense)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [lora_recipe, recipe_of], ids=["own", "copy"])
def test_an_unconverted_model_has_nothing_to_learn_from_itself(tmp_path: Path, settings) -> None:
    """A model that is its own teacher has a divergence of 0 exactly."""

    def unconverted(dtype: torch.dtype) -> HybridForCausalLM:
        model = build_hybrid(tiny_config(), NOTHING_STREAMS)
        model.load_state_dict(load_decided(dtype).state_dict())
        return model.to(dtype)

    given = settings(weight=1.0)
    if "lora" in given:
        given["lora"]["layers"] = "all"
    trainer = build(given, tmp_path, NOTHING_STREAMS, unconverted)
    loss = trainer.compute_loss(trainer.model, batch(trainer))
    assert loss.item() == 0
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(trainer, loss).values())


def test_a_window_longer_than_the_data_leaves_nothing_to_learn(tmp_path: Path) -> None:
    spec = HybridSpec(4, (1, 2), w_sink=1, w_recent=30)

    def wide(dtype: torch.dtype) -> HybridForCausalLM:
        model = load_decided(dtype)
        model.config.sliding_window = spec.w_recent
        return model

    trainer = build(lora_recipe(weight=1.0), tmp_path, spec, wide)
    assert trainer.compute_loss(trainer.model, batch(trainer)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("settings", [lora_recipe, recipe_of], ids=["own", "copy"])
def test_the_teacher_is_the_base_whatever_the_student_has_learned(tmp_path: Path, settings) -> None:
    trainer = moved(build(settings(), tmp_path))
    hybrid = trainer.distillation.hybrid
    hybrid.model.embed_tokens.register_forward_hook(lambda module, args, output: output + 1 if module.training else output)
    inputs = batch(trainer)
    answers = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    answers[:, :-1] = inputs["labels"][:, 1:] != -100
    trainer.model.train()
    targets = trainer.distillation.teacher.targets(trainer.model, inputs, answers)
    assert hybrid.training and not hybrid.model.attends_fully
    stock = load_decided(torch.float32).eval()
    with torch.no_grad(), stock.full_attention():
        expected = stock.model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).last_hidden_state
    torch.testing.assert_close(targets.hidden_AH, expected[answers], atol=1e-6, rtol=1e-6)
    assert torch.equal(targets.lm_head.weight, stock.lm_head.weight) or "lora" not in settings()
    assert not targets.hidden_AH.requires_grad


@pytest.mark.parametrize(
    "spec", [SPEC, replace(SPEC, lazy_layers=(1,), split_layers=((2, (0,)),))], ids=["layers", "a layer and a KV head"]
)
def test_the_hidden_loss_is_the_relative_squared_difference_after_streaming_layers(tmp_path: Path, spec: HybridSpec) -> None:
    trainer = moved(build(recipe_of(hidden_weight=1.0), tmp_path, spec, partial(load_decided, spec=spec)))
    inputs = batch(trainer)
    trainer.compute_loss(trainer.model, dict(inputs))
    batch_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    base = load_decided(torch.float32, spec)
    with torch.no_grad():
        student = trainer.model.model(**batch_inputs, output_hidden_states=True, use_cache=False).hidden_states
        with base.full_attention():
            teacher = base.model(**batch_inputs, output_hidden_states=True, use_cache=False).hidden_states
    answers = inputs["labels"][:, 1:] != -100
    shares = []
    for layer in (1, 2):
        mine, theirs = student[layer + 1][:, :-1][answers], teacher[layer + 1][:, :-1][answers]
        shares.append(((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)) ** 2)
    (found,) = [value for name, value in trainer.distillation.means.take(1).items() if name == "hidden_difference"]
    assert found.item() == pytest.approx(torch.stack(shares).mean().item(), rel=1e-4)


def test_gradients_reach_the_student_and_never_the_teacher(tmp_path: Path) -> None:
    trainer = moved(build(recipe_of(hidden_weight=0.5), tmp_path / "full"))
    gradients(trainer, trainer.compute_loss(trainer.model, batch(trainer)))
    assert all(p.grad is not None for p in trainer.model.parameters())
    teacher = trainer.distillation.teacher.base
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    ours = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert ours == {id(p) for p in trainer.model.parameters()}

    adapted = build(lora_recipe(hidden_weight=0.5), tmp_path / "lora")
    names = gradients(adapted, adapted.compute_loss(adapted.model, batch(adapted))).keys()
    assert names and all("lora_" in name for name in names)
    assert adapted.model.training and all(p.requires_grad == ("lora_" in name) for name, p in adapted.model.named_parameters())


@pytest.mark.parametrize("settings", [lora_recipe, recipe_of], ids=["own", "copy"])
def test_one_by_four_equals_four_by_one(train_tiny, tmp_path: Path, settings) -> None:
    for name, micro in (("accumulated", 1), ("at once", 4)):
        given = settings(hidden_weight=0.3)
        given["train"] |= {"max_steps": 4, "batch_size": 4, "micro_batch_size": micro, "logging_steps": 2}
        train_tiny(name, load=load_decided, **given)
    for column in ("loss", "sft_loss", "kl", "hidden_difference"):
        assert losses(tmp_path / "accumulated", column) == pytest.approx(losses(tmp_path / "at once", column), abs=2e-5), column


def test_the_logged_parts_make_up_the_loss(train_tiny, tmp_path: Path) -> None:
    given = recipe_of(hidden_weight=0.3)
    given["train"] |= {"max_steps": 5, "logging_steps": 2, "save_steps": 3}
    train_tiny("run", load=load_decided, **given)
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [2, 3, 4, 5]
    for row in rows:
        taught = TEMPERATURE**2 * row["kl"] + 0.3 * row["hidden_difference"]
        assert row["loss"] == pytest.approx(0.3 * row["sft_loss"] + 0.7 * taught, abs=1e-5)
        assert row["kl"] > 0 and row["hidden_difference"] > 0


def test_gradient_checkpointing_changes_no_loss(train_tiny, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("checkpointed", True)):
        given = lora_recipe(hidden_weight=0.5)
        given["train"] |= {"max_steps": 3, "gradient_checkpointing": on}
        train_tiny(name, load=load_decided, **given)
    for column in ("loss", "kl", "hidden_difference", "grad_norm"):
        assert losses(tmp_path / "plain", column) == pytest.approx(losses(tmp_path / "checkpointed", column), abs=1e-5)


@pytest.mark.parametrize("settings", [lora_recipe, recipe_of], ids=["own", "copy"])
def test_a_resumed_distillation_has_the_course_of_an_uninterrupted_one(train_tiny, train_until, tmp_path: Path, settings) -> None:
    given = settings(hidden_weight=0.3)
    given["train"] |= {"max_steps": 8, "save_steps": 3, "logging_steps": 2}
    if "lora" in given:
        given["lora"]["dropout"] = 0.1
    train_tiny("uninterrupted", load=load_decided, **given)
    train_until(6, "cut", load=load_decided, **given)
    train_tiny("cut", load=load_decided, **given)
    assert_same_course(tmp_path / "cut", tmp_path / "uninterrupted")
    assert losses(tmp_path / "cut", "kl") == pytest.approx(losses(tmp_path / "uninterrupted", "kl"), abs=1e-6)


def test_without_a_weight_no_teacher_runs_or_is_loaded(tmp_path: Path) -> None:
    loaded = []

    def load(dtype: torch.dtype) -> HybridForCausalLM:
        loaded.append(dtype)
        model = load_decided(dtype)
        model.full_attention = model.model.full_attention = lambda: pytest.fail("a teacher ran")
        return model

    settings = {"train": {"max_steps": 1}}
    training.train(tiny_recipe(settings), load, tiny_tokenizer(), tiny_examples(), SPEC, tmp_path, NoTracker())
    assert len(loaded) == 1
    assert "kl" not in read_log(tmp_path / "log.jsonl")[0]


def test_learning_from_the_teacher_alone_brings_the_hybrid_nearer_to_it(train_tiny, tmp_path: Path) -> None:
    given = recipe_of(weight=1.0, hidden_weight=0.1)
    given["train"] |= {"max_steps": 25, "batch_size": 22, "micro_batch_size": 22}
    train_tiny("run", load=load_decided, **given)
    for column, share in (("kl", 0.5), ("hidden_difference", 0.85)):
        found = losses(tmp_path / "run", column)
        assert found[-1] < share * found[0], column


def test_training_learns_from_stored_log_probabilities_as_from_the_copy(train_tiny, tmp_path: Path) -> None:
    for name in ("copy", "top_k"):
        given = recipe_of(teacher=name, top_k=VOCABULARY) | {"data": {"packing": True, "max_length": 48}}
        if name == "top_k":
            write_teacher(given, tmp_path / "teacher", load_decided)
        train_tiny(name, load=load_decided, **given)
    assert losses(tmp_path / "copy") == pytest.approx(losses(tmp_path / "top_k"), abs=1e-5)


def test_bf16_training_learns_from_a_bf16_copy(tmp_path: Path) -> None:
    given = recipe_of(hidden_weight=0.1) | {"model": {"dtype": "bf16"}}
    given["train"]["max_steps"] = 2
    train_in(tmp_path / "bf16", given, NoTracker(), load=load_decided)
    given["model"] = {"dtype": "fp32"}
    train_in(tmp_path / "fp32", given, NoTracker(), load=load_decided)
    assert losses(tmp_path / "bf16", "kl") == pytest.approx(losses(tmp_path / "fp32", "kl"), rel=0.2, abs=2e-3)
