from pathlib import Path
from typing import Any

import pytest
import torch

from lt_train.hybrid.loading import load_hybrid_checkpoint
from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from lt_train.training import trainer as training
from lt_train.training.log import read_log
from tests.support.tiny_training import SPEC, load_tiny, tiny_examples, tiny_recipe, tiny_tokenizer
from tests.support.training_log import evaluations, losses


def answer_loss(model: torch.nn.Module, examples: list[Any]) -> float:
    """Mean over answer tokens, one example at a time, from full logits: what the trainer's chunked loss must equal."""
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


def test_training_lowers_the_loss_and_saves_the_hybrid_it_trained(train_tiny, tmp_path: Path) -> None:
    everything = {"max_steps": 12, "batch_size": 22, "micro_batch_size": 22}
    result = train_tiny("run", train=everything, data={"heldout": 6})
    assert result.steps == 12
    assert result.train_loss is not None and result.train_loss < losses(tmp_path / "run")[0] - 0.3
    model = load_hybrid_checkpoint(result.folder)
    assert answer_loss(model, tiny_examples(6).heldout) == pytest.approx(result.eval_loss, abs=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_the_first_loss_is_the_models_mean_over_answer_tokens(train_tiny, tmp_path: Path, packing: bool) -> None:
    """One batch of everything: packed, padded and accumulated or not, it is the same number."""
    size = {"batch_size": 1 if packing else 22, "micro_batch_size": 1 if packing else 11}
    length = 24 if not packing else 64
    settings = {"train": {"max_steps": 1, **size}, "data": {"packing": packing, "max_length": length}}
    if packing:
        packs = len(training.training_dataset(tiny_examples().train, max_length=length, packing=True))
        settings["train"]["batch_size"] = packs
    train_tiny("run", **settings)
    expected = answer_loss(load_tiny(torch.float32).eval(), tiny_examples().train)
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, abs=1e-5)


def test_one_by_four_equals_four_by_one(train_tiny, tmp_path: Path) -> None:
    """Samples differ in length, so a mean of means would differ from the mean over tokens."""
    for name, micro in (("accumulated", 1), ("at once", 4)):
        train_tiny(name, train={"max_steps": 5, "batch_size": 4, "micro_batch_size": micro})
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "at once"), abs=1e-5)


@pytest.mark.parametrize("batch", [22, 24])
def test_a_batch_of_more_rows_than_there_are_is_reported(tmp_path: Path, batch: int) -> None:
    reported: list[str] = []
    recipe = tiny_recipe({"train": {"max_steps": 1, "batch_size": batch}})
    training.train(recipe, load_tiny, tiny_tokenizer(), tiny_examples(), SPEC, tmp_path, NoTracker(), reported.append)
    warned = [line for line in reported if line.startswith("warning: train.batch_size: a step takes 24 rows, and there are 22")]
    assert len(warned) == (batch == 24)


def test_gradient_checkpointing_changes_no_loss(train_tiny, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("checkpointed", True)):
        train_tiny(name, train={"max_steps": 3, "gradient_checkpointing": on})
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "checkpointed"), abs=1e-6)


def test_packed_training_does_not_depend_on_what_else_is_in_the_pack(tmp_path: Path) -> None:
    """A batch of one pack gives the same loss as its documents one by one."""
    recipe = tiny_recipe({"data": {"packing": True, "max_length": 24}})
    config = training.sft_config(recipe, recipe.train, tmp_path)
    trainer = training._build_trainer(recipe, config, load_tiny, tiny_tokenizer(), tiny_examples(), SPEC)
    row = next(r for r in trainer.train_dataset if len(r["seq_lengths"]) > 1)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
    by_ids = {tuple(e.input_ids): e for e in tiny_examples().train}
    ends = torch.tensor(row["seq_lengths"]).cumsum(0).tolist()
    documents = [by_ids[tuple(row["input_ids"][s:e])] for s, e in zip([0, *ends[:-1]], ends, strict=True)]
    assert loss.item() == pytest.approx(answer_loss(trainer.model.eval(), documents), abs=1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_evaluation_loss_weighs_every_token_alike_whatever_the_batch(train_tiny, tmp_path: Path, micro: int, packing: bool) -> None:
    settings = {"max_steps": 1, "batch_size": micro, "micro_batch_size": micro, "learning_rate": 1e-12}
    result = train_tiny("run", train=settings, data={"heldout": 7, "packing": packing})
    expected = answer_loss(load_tiny(torch.float32).eval(), tiny_examples(7).heldout)
    assert result.eval_loss == pytest.approx(expected, abs=1e-5)


def test_evaluation_comes_every_eval_steps_and_after_the_last_step(train_tiny, tmp_path: Path) -> None:
    train_tiny("run", train={"max_steps": 5, "eval_steps": 2}, data={"heldout": 4})
    assert list(evaluations(tmp_path / "run")) == [2, 4, 5]
    result = train_tiny("only at the end", train={"max_steps": 3}, data={"heldout": 4})
    assert evaluations(tmp_path / "only at the end") == {3: result.eval_loss}


def test_the_seed_decides_the_order_of_data(train_tiny, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        train_tiny(name, seed=seed, train={"max_steps": 3})
    assert losses(tmp_path / "one") == losses(tmp_path / "same")
    assert losses(tmp_path / "one") != pytest.approx(losses(tmp_path / "other"), abs=1e-4)


def test_the_log_counts_real_tokens(train_tiny, tmp_path: Path) -> None:
    result = train_tiny("run", train={"max_steps": None, "epochs": 1})
    assert result.num_tokens == sum(len(e) for e in tiny_examples().train)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert [row["num_tokens"] for row in rows] == [sum(r["tokens"] for r in rows[: i + 1]) for i in range(len(rows))]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_old_checkpoints_are_deleted_only_down_to_keep_checkpoints(train_tiny, tmp_path: Path) -> None:
    train_tiny("run", train={"max_steps": 5, "save_steps": 1, "keep_checkpoints": 3})
    folders = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert folders == ["checkpoint-3", "checkpoint-4", "checkpoint-5", "final"]


def test_a_setting_that_trl_refuses_is_the_users_error(tmp_path: Path) -> None:
    recipe = tiny_recipe({"train": {"trl": {"optim": "no_such_optimizer"}}})
    with pytest.raises(UserError, match=r"TRL refuses these settings.*no_such_optimizer"):
        training.sft_config(recipe, recipe.train, tmp_path)


def test_a_trl_setting_that_lt_train_makes_itself_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe({"train": {"trl": {"disable_tqdm": False}}})
    with pytest.raises(UserError, match=r"train\.trl: disable_tqdm"):
        training.sft_config(recipe, recipe.train, tmp_path)


def test_a_trl_setting_is_passed_on(tmp_path: Path) -> None:
    recipe = tiny_recipe({"train": {"trl": {"adam_beta2": 0.95}}})
    assert training.sft_config(recipe, recipe.train, tmp_path).adam_beta2 == 0.95


def test_bf16_trains_weights_that_are_kept_in_fp32(tmp_path: Path) -> None:
    """Steps of 1e-5 on weights of about 0.02 vanish in bf16."""
    dtypes = []

    def load(dtype: torch.dtype) -> torch.nn.Module:
        dtypes.append(dtype)
        return load_tiny(dtype)

    for method in ("full", "lora"):
        parts: dict[str, Any] = {"model": {"dtype": "bf16"}, "train": {"method": method, "max_steps": 2}}
        recipe = tiny_recipe(parts | ({"lora": {}} if method == "lora" else {}))
        training.train(recipe, load, tiny_tokenizer(), tiny_examples(), SPEC, tmp_path / method, NoTracker())
    assert dtypes == [torch.float32, torch.bfloat16]
    fp32 = tiny_recipe({"train": {"max_steps": 2}})
    training.train(fp32, load_tiny, tiny_tokenizer(), tiny_examples(), SPEC, tmp_path / "fp32", NoTracker())
    assert losses(tmp_path / "full") != losses(tmp_path / "fp32")
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "fp32"), abs=0.05)
