from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lt_train.dataset.examples import Example
from lt_train.evaluation import loss
from lt_train.evaluation.heldout import evaluate_heldout_loss
from lt_train.evaluation.loss import answer_losses
from lt_train.evaluation.scores import difference, read_scores
from lt_train.evaluation.statistics import TokenLoss
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.recipe import schema as recipe
from lt_train.runtime.errors import UserError
from tests.support.examples import examples_of_many_lengths

ENTRY = recipe.HeldoutLoss(benchmark="heldout_loss", batch_size=4)


def by_id(model: HybridForCausalLM, examples: list[Example], batch_size: int) -> dict[str, TokenLoss]:
    return {example.id: found for example, found in answer_losses(model, examples, batch_size)}


def test_the_loss_is_that_of_the_answer_tokens_under_the_models_own_logits(model: HybridForCausalLM) -> None:
    for example, found in answer_losses(model, examples_of_many_lengths(), batch_size=1):
        ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
        with torch.no_grad():
            log_probabilities = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        nll = -log_probabilities.gather(1, ids[0, 1:, None])[len(example.prompt_ids) - 1 :]
        assert found.tokens == len(example.answer_ids)
        assert found.nll == pytest.approx(nll.sum().item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_losses_in_batches_are_those_one_by_one(model: HybridForCausalLM, batch_size: int) -> None:
    examples = examples_of_many_lengths()
    alone, batched = by_id(model, examples, 1), by_id(model, examples[::-1], batch_size)
    assert alone.keys() == batched.keys()
    for key in alone:
        assert batched[key].tokens == alone[key].tokens
        assert batched[key].nll / batched[key].tokens == pytest.approx(alone[key].nll / alone[key].tokens, abs=1e-5)


def test_logits_are_never_made_for_more_rows_than_allowed(model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_id(model, examples_of_many_lengths(), 7)
    rows = []
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 10 * model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: rows.append(logits.shape[0]))
    found = by_id(model, examples_of_many_lengths(), 7)
    assert sum(rows) == sum(len(example.answer_ids) for example in examples_of_many_lengths())
    assert max(rows) == 10
    assert {key: value.nll for key, value in found.items()} == pytest.approx({k: v.nll for k, v in expected.items()})


def test_a_sample_longer_than_the_context_is_named(model: HybridForCausalLM) -> None:
    long = Example(id="e", where="own.jsonl:3", prompt_ids=(5,) * 100, answer_ids=(6,) * 29)
    with pytest.raises(UserError, match=r"own\.jsonl:3: a sample of 129 tokens exceeds the model's context of 128"):
        by_id(model, [*examples_of_many_lengths(), long], 4)


def test_scores_are_written_and_read_back_and_compared_with_themselves(model: HybridForCausalLM, tmp_path: Path) -> None:
    examples = examples_of_many_lengths()
    scores = evaluate_heldout_loss(model, examples, ENTRY, tmp_path, model_fingerprint="m", progress=False)
    assert read_scores(tmp_path / "scores.json") == scores
    assert scores.samples == 7
    assert scores.tokens == sum(len(example.answer_ids) for example in examples)
    total = sum(found.nll for found in by_id(model, examples, 1).values())
    assert scores.loss == pytest.approx(total / scores.tokens, abs=1e-5)
    assert scores.standard_error > 0
    assert difference(scores, scores).value == 0


def test_finished_scores_are_returned_without_the_model(model: HybridForCausalLM, tmp_path: Path) -> None:
    examples = examples_of_many_lengths()
    scores = evaluate_heldout_loss(model, examples, ENTRY, tmp_path, model_fingerprint="m", progress=False)
    assert evaluate_heldout_loss(None, examples, ENTRY, tmp_path, model_fingerprint="m", progress=False) == scores


def test_scores_of_another_model_or_other_samples_are_not_taken_or_overwritten(model: HybridForCausalLM, tmp_path: Path) -> None:
    examples = examples_of_many_lengths()
    evaluate_heldout_loss(model, examples, ENTRY, tmp_path, model_fingerprint="m", progress=False)
    before = (tmp_path / "scores.json").read_bytes()
    with pytest.raises(UserError, match="model: 'm', 'n'"):
        evaluate_heldout_loss(model, examples, ENTRY, tmp_path, model_fingerprint="n", progress=False)
    with pytest.raises(UserError, match="examples: "):
        evaluate_heldout_loss(model, examples[1:], ENTRY, tmp_path, model_fingerprint="m", progress=False)
    assert (tmp_path / "scores.json").read_bytes() == before


def test_a_loss_without_heldout_samples_names_which_setting_makes_some(model: HybridForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.heldout"):
        evaluate_heldout_loss(model, [], ENTRY, tmp_path, model_fingerprint="m", progress=False)


def test_two_samples_with_one_id_are_refused(model: HybridForCausalLM, tmp_path: Path) -> None:
    first, second, *_ = examples_of_many_lengths()
    with pytest.raises(UserError, match="one id"):
        twins = [first, replace(second, id=first.id)]
        evaluate_heldout_loss(model, twins, ENTRY, tmp_path, model_fingerprint="m", progress=False)
