"""KL(base || model) on held-out answers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from lt_train.dataset.examples import Example
from lt_train.evaluation import base_answers as base_answers_module
from lt_train.evaluation import loss
from lt_train.evaluation.base_answers import BaseAnswers, base_answers
from lt_train.evaluation.heldout import evaluate_heldout_kl
from lt_train.evaluation.loss import answer_divergences
from lt_train.evaluation.scores import LossScores
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.recipe import schema as recipe
from lt_train.runtime.errors import UserError
from tests.support.examples import examples_of_many_lengths
from tests.support.full_disk import files_of_at_most
from tests.support.peak_memory import LiveBytes

ENTRY = recipe.HeldoutKL(benchmark="heldout_kl", batch_size=4)
EXAMPLES = examples_of_many_lengths()


@pytest.fixture
def base(model: HybridForCausalLM, tmp_path: Path) -> BaseAnswers:
    """The model before its layer streamed."""
    with model.full_attention():
        return base_answers(model, EXAMPLES, 3, tmp_path / "base")


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


def test_scores_are_per_answer_token_and_the_base_answers_only_where_they_are_missing(
    model: HybridForCausalLM, base: BaseAnswers, tmp_path: Path
) -> None:
    scores = measured(model, lambda: base, tmp_path)
    assert scores.loss == pytest.approx(sum(nats(model, base, 4).values()) / scores.tokens)
    assert scores.tokens == sum(len(example.answer_ids) for example in EXAMPLES) and scores.standard_error > 0
    assert measured(model, lambda: pytest.fail("requested again"), tmp_path) == scores


def test_scores_against_another_base_are_not_taken(model: HybridForCausalLM, base: BaseAnswers, tmp_path: Path) -> None:
    measured(model, lambda: base, tmp_path)
    with pytest.raises(UserError, match="base: 'b', 'c'"):
        measured(model, lambda: base, tmp_path, of_base="c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_base_computes_comes_back_from_disk_to_the_bit_in_any_order(dtype: torch.dtype, tmp_path: Path) -> None:
    said = {example: torch.randn(len(example.answer_ids), 5, dtype=dtype) for example in EXAMPLES}
    answers = BaseAnswers(torch.zeros(2, 5, dtype=dtype), tmp_path)
    for example, states in said.items():
        answers.add(example, states)
    assert all(torch.equal(answers.states(example), said[example]) for example in reversed(EXAMPLES))


def test_their_file_has_no_name_so_a_killed_process_leaves_nothing(base: BaseAnswers, tmp_path: Path) -> None:
    assert base.states(EXAMPLES[0]).any() and list((tmp_path / "base").iterdir()) == []


def test_a_full_disk_is_reported_where_the_base_answers(model: HybridForCausalLM, tmp_path: Path) -> None:
    with files_of_at_most(2**10), pytest.raises(OSError, match="File too large"):
        base_answers(model, EXAMPLES, 3, tmp_path)


def test_of_all_held_out_answers_the_states_of_one_batch_are_in_memory(
    model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """32 answers with 8 MiB of states each, 256 MiB together: both models' passes hold a few times 8 MiB."""

    def states(
        model: HybridForCausalLM, examples: Sequence[Example], batch_size: int
    ) -> Iterator[tuple[list[Example], torch.Tensor]]:
        assert batch_size == 1
        for number, example in enumerate(examples):
            yield [example], torch.full((len(example.answer_ids), WIDE), number / 32)

    wide = torch.nn.Linear(WIDE, 8, bias=False)
    model.lm_head = wide
    for module in (base_answers_module, loss):
        monkeypatch.setattr(module, "answer_states", states)
    found: dict[str, float] = {}

    def measure(examples: Sequence[Example]) -> None:
        answers = base_answers(model, examples, 1, tmp_path)
        found.update({example.id: loss.nll for example, loss in answer_divergences(model, answers, examples, 1)})
        answers.close()

    with LiveBytes() as counted:
        measure(LONG)
    assert counted.peak < 6 * 8 * 2**20
    assert found == pytest.approx(dict.fromkeys([example.id for example in LONG], 0), abs=1e-6)


WIDE = 2048
LONG = [Example(f"long-{number}", "made up", (1,), (2,) * 1024) for number in range(32)]
