from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lt_train.hybrid.kv_size import kv_bytes
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference import kv_store as kv
from lt_train.inference.continuous_batch import ContinuousBatch
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Answer, Sampling
from lt_train.runtime.errors import UserError
from tests.support.tiny_engine import (
    EOS,
    GREEDY,
    MANY,
    answered,
    assert_greedy,
    letter_tokenizer,
    likeliest,
    requests,
    texts,
    tiny_model,
)

SAMPLED = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=24)
LAYERS = HybridSpec(num_layers=3, lazy_layers=(1, 2), w_sink=2, w_recent=6)
HEADS = HybridSpec.from_streaming_heads([(1,), (0,), (0, 1)], kv_heads=2, w_sink=2, w_recent=6)


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    return tiny_model(LAYERS)


@pytest.fixture(scope="module", params=[LAYERS, HEADS], ids=["layers", "heads"])
def either(request) -> HybridForCausalLM:
    """A hybrid of which layers stream, and one of which single KV heads do."""
    return tiny_model(request.param)


@pytest.fixture(scope="module", params=[LAYERS, HEADS], ids=["layers", "heads"])
def precise(request) -> HybridForCausalLM:
    """In fp64: with thousands of draws, fp32's rounding in another batch tips one now and then."""
    return tiny_model(request.param, torch.float64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer()


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages of 8 tokens: short sequences then have several."""
    for module in ("kv_store", "key_blocks", "views"):
        monkeypatch.setattr(f"lt_train.inference.{module}.PAGE", 8)
    yield


def assert_recomputed(model: HybridForCausalLM, answers: dict[tuple[str, int], tuple[str, int, str]]) -> None:
    assert_greedy(answers, requests(MANY), partial(likeliest, model))


@pytest.fixture(scope="module")
def recomputed(model, tokenizer) -> dict[tuple[str, int], tuple[str, int, str]]:
    """The greedy answers that come without a cache."""
    found = texts(answered(Engine(model, tokenizer), requests(MANY), GREEDY))
    assert_recomputed(model, found)
    return found


@pytest.mark.parametrize(("slots", "chunk"), [(1, 16), (3, 4), (16, 2048)])
def test_greedy_answers_are_those_of_recomputing_each_prompt_alone(model, tokenizer, recomputed, slots: int, chunk: int) -> None:
    answers = answered(Engine(model, tokenizer, max_slots=slots, prefill_chunk=chunk), requests(MANY), GREEDY)
    assert texts(answers) == recomputed


def test_where_attention_cannot_be_compiled_the_answers_are_the_same(model, tokenizer, recomputed, monkeypatch) -> None:
    monkeypatch.setattr("lt_train.inference.views.obstacle", lambda device, dtype: "there is no C compiler")
    assert texts(answered(Engine(model, tokenizer, max_slots=3), requests(MANY), GREEDY)) == recomputed


@pytest.mark.parametrize(
    "spec",
    [
        HybridSpec(3, (), 2, 6),
        HybridSpec(3, (0, 1, 2), 2, 6),
        HybridSpec(3, (1,), 0, 5),
        HybridSpec(3, (0, 2), 9, 1),
        HybridSpec(3, (0, 2), 3, 500),
        HybridSpec(3, (0, 2), 0, 6, learned_sinks=True),
        HEADS,
        HybridSpec.from_streaming_heads([(1,), (), (0,)], 2, 0, 5),
        HybridSpec.from_streaming_heads([(0,), (1,), (1,)], 2, 9, 1),
    ],
    ids=[
        "all full",
        "all streaming",
        "no sinks",
        "window of one",
        "window longer than all",
        "learned sinks",
        "single heads",
        "single heads, no sinks",
        "single heads, window of one",
    ],
)
def test_every_kind_of_hybrid_answers_as_it_does_without_a_cache(tokenizer, spec: HybridSpec) -> None:
    model = tiny_model(spec)
    assert_recomputed(model, texts(answered(Engine(model, tokenizer, max_slots=4, prefill_chunk=8), requests(MANY), GREEDY)))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=6),
    slots=st.integers(1, 6),
    chunk=st.sampled_from([3, 8, 64]),
    spare=st.integers(0, 20),
)
@example(lengths=[*[1] * 10, 18], slots=2, chunk=64, spare=4)  # tipped in fp32
@settings(max_examples=3, deadline=None)
def test_no_budget_changes_or_loses_an_answer(precise, tokenizer, lengths: list[int], slots: int, chunk: int, spare: int) -> None:
    """From just enough for the longest sequence, where nearly all are put back again and again, to plenty."""
    requested = requests(lengths)
    alone = texts(answered(Engine(precise, tokenizer, max_slots=1), requested, SAMPLED))
    sizes = kv.kv_sizes(precise)
    budget = sizes.sequence(max(lengths) + 24) + spare * sizes.page
    tight = Engine(precise, tokenizer, kv_budget=budget, max_slots=slots, prefill_chunk=chunk)
    assert texts(answered(tight, requested, SAMPLED)) == alone


def test_the_youngest_is_put_back_when_pages_run_out(either, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    made = Engine.lay_out
    monkeypatch.setattr(Engine, "lay_out", lambda *args: stores.append(made(*args)) or stores[-1])
    admitted = []
    admit = kv.KVStore.admit
    monkeypatch.setattr(kv.KVStore, "admit", lambda store, tokens: admitted.append(tokens) or admit(store, tokens))
    requested = requests([20, 21, 22])
    never_ends = Sampling(0.0, 1.0, 40)
    sizes = kv.kv_sizes(either)
    budget = 2 * sizes.slot + 13 * sizes.page  # a whole sequence takes 8
    found = answered(Engine(either, tokenizer, kv_budget=budget, max_slots=2), requested, never_ends)
    assert {answer.finish_reason for answer in found.values()} <= {"length", "stop"}
    assert len(admitted) > 3
    assert max(admitted) > 22  # read again with the tokens it had
    assert (stores[0].slots, stores[0].free_pages, stores[0].lengths) == (2, 13, [])


def test_a_budget_below_one_sequence_is_refused_with_the_bytes_that_would_do(model, tokenizer) -> None:
    needed = kv.kv_sizes(model).sequence(33 + 24)
    with pytest.raises(UserError, match=f"{needed:,}"):
        list(Engine(model, tokenizer, kv_budget=needed - 1).answers(requests([33]), GREEDY))
    assert answered(Engine(model, tokenizer, kv_budget=needed), requests([33]), GREEDY)


def test_logits_in_a_full_batch_are_those_alone(either, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, dict[tuple[int, ...], torch.Tensor]] = {}

    def note(slots: int) -> None:
        seen[slots] = {}
        take = ContinuousBatch._take

        def noting(run, sequences, logits_BV):
            for sequence, logits_V in zip(sequences, logits_BV, strict=True):
                seen[slots][tuple(sequence.ids)] = logits_V.clone()
            return take(run, sequences, logits_BV)

        with monkeypatch.context() as patch:
            patch.setattr(ContinuousBatch, "_take", noting)
            answered(Engine(either, tokenizer, max_slots=slots), requests(MANY), GREEDY)

    note(1)
    note(10)
    assert seen[1].keys() == seen[10].keys() and len(seen[1]) > 50
    for ids, logits_V in seen[1].items():
        torch.testing.assert_close(logits_V, seen[10][ids], atol=1e-4, rtol=0)


def test_samples_do_not_depend_on_what_shares_the_batch_or_on_the_order(either, tokenizer) -> None:
    requested = requests(MANY, samples=2)
    alone = texts(answered(Engine(either, tokenizer, max_slots=1), requested, SAMPLED))
    assert texts(answered(Engine(either, tokenizer, max_slots=7), requested[::-1], SAMPLED)) == alone
    assert len({text for text, _, _ in alone.values()}) > len(alone) // 2


def test_a_stop_string_ends_the_answer_before_it(model, tokenizer) -> None:
    requested = requests(MANY)
    free = answered(Engine(model, tokenizer), requested, GREEDY)
    plain = [answer.text for answer in free.values() if "<" not in answer.text]
    stop = plain[0][5:8]
    stopped = answered(Engine(model, tokenizer), requested, Sampling(0.0, 1.0, 24, stop=(stop,)))
    for key, answer in stopped.items():
        before, found, _ = free[key].text.partition(stop)
        assert answer.text == before
        assert answer.finish_reason == ("stop" if found else free[key].finish_reason)
        if "<" not in before:  # every token is a letter
            assert answer.tokens == (len(before) + len(stop) if found else free[key].tokens)
    assert any(stop in answer.text for answer in free.values())


def test_reasoning_over_its_budget_is_closed_and_the_answer_continues(model, tokenizer) -> None:
    requested = requests(MANY)
    forced = Sampling(0.0, 1.0, 24, thinking_budget=5, thinking_close="</think>")
    free, closed = answered(Engine(model, tokenizer), requested, GREEDY), 0
    for key, answer in answered(Engine(model, tokenizer), requested, forced).items():
        thought = free[key].thinking_tokens
        if free[key].tokens <= 5 or (thought is not None and thought <= 5):
            assert answer.text == free[key].text
        else:
            assert answer.text.startswith(free[key].text[:5] + "</think>")
            assert answer.thinking_tokens == 6
            closed += 1
    assert closed > 5


def test_reasoning_that_is_closed_already_is_not_closed_again(model, tokenizer) -> None:
    """By the prompt, as Qwen3's without thinking, or by the tag of the recipe's own thinking_close: here a letter."""
    closed_prompts = [replace(each, prompt_ids=(*each.prompt_ids, 2)) for each in requests(MANY)]
    free = answered(Engine(model, tokenizer), closed_prompts, GREEDY)
    forced = answered(Engine(model, tokenizer), closed_prompts, replace(GREEDY, thinking_budget=5, thinking_close="</think>"))
    assert texts(forced) == texts(free)
    free = answered(Engine(model, tokenizer), requests(MANY), GREEDY)
    tag = Counter(letter for answer in free.values() for letter in set(answer.text[:5])).most_common(1)[0][0]
    own = answered(
        Engine(model, tokenizer), requests(MANY), replace(GREEDY, thinking_budget=5, thinking_close=f"Time's up.\n{tag}")
    )
    closed = [key for key, answer in free.items() if tag in answer.text[:5]]
    assert closed and all(own[key].text == free[key].text for key in closed)
    assert all(own[key].thinking_tokens == free[key].text.index(tag) + 1 for key in closed if "<" not in free[key].text)


def test_answers_come_as_soon_as_they_are_done(model, tokenizer) -> None:
    """A short one behind a long one is not held back by it."""
    requested = requests(MANY)
    hot = Sampling(temperature=2.0, top_p=1.0, max_new_tokens=60)
    done = [answer.tokens for answer in Engine(model, tokenizer, max_slots=10).answers(requested, hot)]
    assert done == sorted(done) and len(set(done)) > 1


def test_times_add_up_to_the_time_it_took(model, tokenizer) -> None:
    import time

    started = time.perf_counter()
    seconds = sum(answer.seconds for answer in Engine(model, tokenizer, max_slots=4).answers(requests(MANY), GREEDY))
    assert 0.3 * (time.perf_counter() - started) < seconds <= time.perf_counter() - started


def run_to_end(batch: ContinuousBatch) -> dict[tuple[str, int], Answer]:
    found = {}
    while not batch.is_empty:
        found |= {(t.answer.request.problem, t.answer.request.sample): t.answer for t in batch.step() if t.answer is not None}
    return found


def test_requests_that_come_while_others_run_get_the_answers_they_get_alone(precise, tokenizer) -> None:
    """Each with a sampling of its own."""
    requested = requests(MANY)
    samplings = [Sampling(0.1 * n, 0.95, 10 + n, top_k=n % 3 * 4, repetition_penalty=1 + n % 2) for n in range(len(MANY))]
    alone: dict[tuple[str, int], Answer] = {}
    for request, sampling in zip(requested, samplings, strict=True):
        alone |= answered(Engine(precise, tokenizer, max_slots=1), [request], sampling)
    engine = Engine(precise, tokenizer, max_slots=4, prefill_chunk=8)
    batch = engine.batch(engine.lay_out(len(MANY), 64))
    found: dict[tuple[str, int], Answer] = {}
    for request, sampling in zip(requested, samplings, strict=True):
        batch.add(request, sampling)
        for _ in range(3):
            found |= {(t.answer.request.problem, 0): t.answer for t in batch.step() if t.answer is not None}
    assert texts(found | run_to_end(batch)) == texts(alone)


def test_the_tokens_that_come_are_those_of_the_answer(model, tokenizer) -> None:
    engine = Engine(model, tokenizer, max_slots=3)
    batch = engine.batch(engine.lay_out(3, 64))
    come: dict[str, list[int]] = {}
    for request in requests([3, 8, 20]):
        batch.add(request, GREEDY)
    while not batch.is_empty:
        for token in batch.step():
            ids = come.setdefault(token.sequence.request.problem, [])
            ids.append(token.token_id)
            if token.answer is not None:
                assert len(ids) == token.answer.tokens
                assert tokenizer.decode(ids[:-1] if ids[-1] == EOS else ids) == token.answer.text
    assert len(come) == 3


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_cancelled_request_frees_what_it_held_and_changes_no_other_answer(model, tokenizer, steps: int) -> None:
    engine = Engine(model, tokenizer, max_slots=2)
    requested = requests([9, 15, 16, 17])
    expected = texts(answered(engine, requested, GREEDY))
    batch = engine.batch(engine.lay_out(4, 64))
    free = batch.store.free_pages
    sequences = [batch.add(request, GREEDY) for request in requested]
    found = {}
    for _ in range(steps):
        found |= {(t.answer.request.problem, 0): t.answer for t in batch.step() if t.answer is not None}
    for cancelled in (sequences[0], sequences[3], sequences[0]):  # in a slot, waiting, gone already
        batch.cancel(cancelled)
    found |= run_to_end(batch)
    kept = {key: value for key, value in expected.items() if key[0] in {requested[1].problem, requested[2].problem}}
    assert kept.items() <= texts(found).items() <= expected.items()
    assert (batch.store.free_pages, batch.store.lengths) == (free, [])


def test_log_probabilities_are_those_of_the_model(either, tokenizer) -> None:
    (request,) = requests([9])
    engine = Engine(either, tokenizer)
    batch = engine.batch(engine.lay_out(1, 64))
    batch.add(replace(request, logprobs=2), Sampling(2.0, 1.0, 6, repetition_penalty=1.5))
    ids = list(request.prompt_ids)
    while not batch.is_empty:
        for token in batch.step():
            logprobs_V = either(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            assert token.logprobs is not None
            assert token.logprobs.chosen == pytest.approx(logprobs_V[token.token_id].item(), abs=1e-4)
            assert [each for each, _ in token.logprobs.top] == logprobs_V.topk(2).indices.tolist()
            ids.append(token.token_id)
    assert len(ids) > 9


@pytest.mark.parametrize("spec", [LAYERS, HEADS, HybridSpec.from_streaming_heads([(0,), (1,), (1,)], 2, 4, 4)], ids=str)
def test_the_store_holds_the_bytes_that_a_hybrids_cache_takes(spec: HybridSpec) -> None:
    model = tiny_model(spec)
    store = kv.KVStore(model, slots=1, pages=3)
    size = kv_bytes(model.config.to_dict(), spec, 3 * 8, itemsize=4)
    assert sum(held.keys.nbytes + held.values.nbytes for held in store.held) == size == kv.kv_sizes(model).sequence(3 * 8)


def test_the_longest_sequence_is_what_context_and_budget_allow(model, tokenizer) -> None:
    sizes = kv.kv_sizes(model)
    assert Engine(model, tokenizer, kv_budget=2**30).longest() == 1024
    assert Engine(model, tokenizer, kv_budget=sizes.sequence(17)).longest() == 24  # three pages of eight tokens
    assert Engine(model, tokenizer, kv_budget=sizes.slot).longest() == 0


def test_slots_for_usual_sequences_leave_pages_for_the_longest(model, tokenizer) -> None:
    sizes = kv.kv_sizes(model)
    engine = Engine(model, tokenizer, kv_budget=8 * sizes.slot + 12 * sizes.page, max_slots=64)
    store = engine.lay_out(64, longest=80, usual=8)
    assert store.slots > engine.lay_out(64, longest=80).slots
    assert store.free_pages >= kv.pages_for(80)
    assert store.slots * sizes.slot + store.free_pages * sizes.page <= engine.budget
