"""KL(base || model) on held-out answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_heldout_loss import examples_of_many_lengths
from torch.nn.functional import kl_div

from lt_train import recipe
from lt_train.errors import UserError
from lt_train.evaluation import loss
from lt_train.evaluation.heldout import evaluate_heldout_kl
from lt_train.evaluation.loss import BaseAnswers, answer_divergences, base_answers
from lt_train.evaluation.scores import LossScores
from lt_train.hybrid import HybridForCausalLM

ENTRY = recipe.HeldoutKL(benchmark="heldout_kl", batch_size=4)
EXAMPLES = examples_of_many_lengths()


@pytest.fixture
def base(model: HybridForCausalLM) -> BaseAnswers:
    """The model before its layer streamed."""
    with model.full_attention():
        return base_answers(model, EXAMPLES, batch_size=3)


def nats(model: HybridForCausalLM, base: BaseAnswers, batch_size: int) -> dict[str, float]:
    return {example.id: found.nll for example, found in answer_divergences(model, base, EXAMPLES, batch_size)}


def measured(model: HybridForCausalLM, base: Callable[[], BaseAnswers], out: Path, of_base: str = "b") -> LossScores:
    return evaluate_heldout_kl(model, base, EXAMPLES, ENTRY, out, model_fingerprint="m", base_fingerprint=of_base, progress=False)


def test_the_divergence_is_that_of_the_two_models_own_logits(model: HybridForCausalLM, base: BaseAnswers) -> None:
    found = nats(model, base, batch_size=4)
    for example in EXAMPLES:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            student = model(ids, use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1].double().log_softmax(-1)
            with model.full_attention():
                teacher = model(ids, use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1].double().log_softmax(-1)
        assert found[example.id] == pytest.approx(kl_div(student, teacher, log_target=True, reduction="sum").item(), abs=1e-5)
    assert max(found.values()) > 0.1


def test_the_base_does_not_diverge_from_itself(model: HybridForCausalLM, base: BaseAnswers) -> None:
    with model.full_attention():
        assert nats(model, base, batch_size=1) == pytest.approx(dict.fromkeys([e.id for e in EXAMPLES], 0), abs=1e-5)


def test_batches_and_chunks_change_no_divergence(
    model: HybridForCausalLM, base: BaseAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = nats(model, base, batch_size=7)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 2 * 3 * model.config.vocab_size)
    assert nats(model, base, batch_size=2) == pytest.approx(expected, abs=1e-4)


def test_scores_are_per_answer_token_and_the_base_is_asked_only_where_they_are_missing(
    model: HybridForCausalLM, base: BaseAnswers, tmp_path: Path
) -> None:
    scores = measured(model, lambda: base, tmp_path)
    assert scores.loss == pytest.approx(sum(nats(model, base, 4).values()) / scores.tokens)
    assert scores.tokens == sum(len(example.answer_ids) for example in EXAMPLES) and scores.standard_error > 0
    assert measured(model, lambda: pytest.fail("asked again"), tmp_path) == scores


def test_scores_against_another_base_are_not_taken(model: HybridForCausalLM, base: BaseAnswers, tmp_path: Path) -> None:
    measured(model, lambda: base, tmp_path)
    with pytest.raises(UserError, match="base: 'b' there, 'c' now"):
        measured(model, lambda: base, tmp_path, of_base="c")
