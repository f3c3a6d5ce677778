"""A teacher on disk: written once, complete after any number of kills, and found again whatever a document is packed with."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from lt_train.inference.answer_hidden_states import answer_states
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json
from lt_train.training.distillation import top_k
from lt_train.training.distillation.top_k import StoredTopK, TopKDivergence, open_top_k, top_k_of
from tests.support.processes import exit_code, start_python
from tests.support.stored_teacher import EXAMPLES, FINGERPRINT, TEMPERATURE, K, write
from tests.support.tiny_training import VOCABULARY, load_decided


def opened(folder: Path, **given: Any) -> StoredTopK:
    return open_top_k(folder, EXAMPLES, **{"k": K, "temperature": TEMPERATURE, "fingerprint": FINGERPRINT} | given)


def contents(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in folder.glob("*.npy")}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write(folder)
    return folder


def random_problem(tokens: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's hidden states, teacher's, and a head, all in need of nothing but a gradient."""
    torch.manual_seed(seed)
    return torch.randn(tokens, 6, requires_grad=True), torch.randn(tokens, 6), torch.randn(30, 6, requires_grad=True)


def kept(hidden: torch.Tensor, head: torch.Tensor, k: int) -> top_k.TopK:
    return tuple(part.clone() for part in top_k_of(hidden, head.detach(), k, TEMPERATURE))


def of_outcomes(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, k: int) -> torch.Tensor:
    """KL over the k likeliest tokens and 'any other', spelled out."""
    log_p, log_q = (
        (hidden @ weight.t() / TEMPERATURE).log_softmax(-1) for hidden, weight in ((teacher, head.detach()), (student, head))
    )
    indices = log_p.topk(k).indices
    outcomes = []
    for log in (log_p, log_q):
        best = log.gather(1, indices)
        rest = log.masked_fill(torch.zeros_like(log, dtype=torch.bool).scatter(1, indices, True), -torch.inf).logsumexp(-1)
        outcomes.append(torch.cat([best, rest[:, None]], dim=1) if k < log.shape[1] else best)
    return kl_div(outcomes[1], outcomes[0], log_target=True, reduction="sum")


@pytest.mark.parametrize("k", [1, 4, 29, 30])
@pytest.mark.parametrize("at_once", [2**26, 4 * 30])
def test_the_divergence_and_its_gradients_are_those_of_k_outcomes_and_the_rest(
    monkeypatch: pytest.MonkeyPatch, k: int, at_once: int
) -> None:
    monkeypatch.setattr(top_k, "LOGITS_AT_ONCE", at_once)
    student, teacher, head = random_problem()
    expected = of_outcomes(student, teacher, head, k)
    by_hand = torch.autograd.grad(3 * expected, (student, head))
    found = TopKDivergence.apply(student, head, *kept(teacher, head, k), TEMPERATURE)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    for mine, theirs in zip(torch.autograd.grad(3 * found, (student, head)), by_hand, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_the_more_tokens_are_kept_the_nearer_the_divergence_comes_to_the_full_one_from_below() -> None:
    student, teacher, head = random_problem()
    found = [TopKDivergence.apply(student, head, *kept(teacher, head, k), TEMPERATURE).item() for k in (1, 2, 5, 15, 30)]
    assert found == sorted(found) and found[0] < found[-1]
    assert found[-1] == pytest.approx(of_outcomes(student, teacher, head, 30).item(), abs=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    _, teacher, head = random_problem()
    same = teacher.clone().requires_grad_()
    found = TopKDivergence.apply(same, head, *kept(teacher, head, 3), TEMPERATURE)
    assert found.item() == pytest.approx(0, abs=1e-5)
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(found, (same, head))) < 1e-5


def test_the_files_hold_the_most_likely_tokens_and_the_rest(complete: Path) -> None:
    stored, model = opened(complete), load_decided(torch.float32).eval()
    for example in EXAMPLES[:5]:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids]), use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1]
        expected = (logits / TEMPERATURE).log_softmax(-1)
        inputs = {"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])}
        indices, log_probs, rest = stored.of_batch(inputs)
        torch.testing.assert_close(log_probs, expected.topk(K).values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(expected.gather(1, indices), log_probs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rest.exp(), 1 - log_probs.exp().sum(-1), atol=1e-5, rtol=1e-4)


def test_documents_are_found_in_padded_rows_and_in_packs(complete: Path) -> None:
    stored, (first, second) = opened(complete), EXAMPLES[3:5]
    alone = [
        stored.of_batch({"input_ids": torch.tensor([e.input_ids]), "labels": torch.tensor([e.labels])}) for e in (second, first)
    ]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    packed = {
        "input_ids": torch.tensor([[*second.input_ids, *first.input_ids]]),
        "labels": torch.tensor([[*second.labels, *first.labels]]),
        "position_ids": torch.tensor([[*range(len(second)), *range(len(first))]]),
    }
    longest = max(len(first), len(second))
    padded = {
        "input_ids": torch.tensor([e.input_ids + [1] * (longest - len(e)) for e in (second, first)]),
        "labels": torch.tensor([e.labels + [-100] * (longest - len(e)) for e in (second, first)]),
        "attention_mask": torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in (second, first)]),
    }
    for inputs in (packed, padded):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(stored.of_batch(inputs), expected, strict=True))


def test_a_writer_that_was_interrupted_resumes_to_the_same_files(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    class Killed(BaseException):
        pass

    def dies_in_the_third_batch(model: Any, examples: Any, batch_size: int) -> Any:
        for number, (batch, hidden) in enumerate(answer_states(model, examples, batch_size)):
            if number == 2:
                raise Killed
            yield batch, hidden

    def counts(model: Any, examples: Any, batch_size: int) -> Any:
        computed.append(len(examples))
        return answer_states(model, examples, batch_size)

    monkeypatch.setattr(top_k, "answer_states", dies_in_the_third_batch)
    with pytest.raises(Killed):
        write(tmp_path)
    with pytest.raises(UserError, match=r"written for 8 of 22 examples.*lt-train teacher"):
        opened(tmp_path)
    monkeypatch.setattr(top_k, "answer_states", counts)
    write(tmp_path)
    write(tmp_path)  # complete: no batch is computed again
    assert computed == [14]
    expected = contents(complete)
    assert contents(tmp_path).keys() == expected.keys()
    for name, found in contents(tmp_path).items():
        np.testing.assert_array_equal(found, expected[name])


@pytest.mark.slow
def test_a_writer_that_is_killed_resumes_to_the_same_files(complete: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from time import sleep; from tests.support import stored_teacher\n"
        "from lt_train.training.distillation import top_k; ask = top_k.answer_states\n"
        "top_k.answer_states = lambda *given: (sleep(0.1) or batch for batch in ask(*given))\n"
        f"stored_teacher.write(Path({str(tmp_path)!r}))"
    )
    process = start_python([sys.executable, "-c", program], complete.with_name("printed"))
    while process.is_alive() and not (tmp_path / "progress.json").exists():
        time.sleep(0.01)
    time.sleep(0.15)
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    assert 0 < read_json(tmp_path / "progress.json", "progress")["examples"] < len(EXAMPLES)
    write(tmp_path)
    for name, found in contents(tmp_path).items():
        np.testing.assert_array_equal(found, contents(complete)[name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 6}, "k: 5, 6"),
        ({"temperature": 1.0}, r"temperature: 1\.5, 1\.0"),
        ({"fingerprint": {"model": "n", "data": "d"}}, "model: 'm', 'n'"),
    ],
)
def test_files_of_another_teacher_are_neither_taken_nor_overwritten(complete: Path, given: dict[str, Any], message: str) -> None:
    before = contents(complete)
    for touch in (opened, write):
        with pytest.raises(UserError, match=message):
            touch(complete, **given)
    assert all(np.array_equal(before[name], found) for name, found in contents(complete).items())


def test_more_tokens_than_there_are_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"top_k: 41: above the model's vocab_size. Fix: set at most {VOCABULARY}"):
        write(tmp_path, k=VOCABULARY + 1)


def test_a_damaged_file_is_named(complete: Path, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "rest.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"rest\.npy: cannot be read"):
        opened(tmp_path)


def test_a_document_that_was_not_written_is_an_error(complete: Path) -> None:
    inputs = {"input_ids": torch.tensor([[2, 3, 4]]), "labels": torch.tensor([[-100, 3, 4]])}
    with pytest.raises(UserError, match="a document of the batch is not in the teacher's files"):
        opened(complete).of_batch(inputs)
