"""Speculative decoding changes no answer: the draft decides how many tokens a forward pass gives, never which."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference import kv_store as kv
from lt_train.inference.draft import Acceptance, Draft, DraftLength
from lt_train.inference.engine import Engine
from lt_train.inference.kv_store import KVStore
from lt_train.inference.requests import Sampling
from lt_train.inference.runner import ModelRunner
from lt_train.runtime.errors import UserError
from tests.support.tiny_engine import GREEDY, MANY, answered, letter_tokenizer, requests, texts, tiny_model

FULL = HybridSpec(num_layers=3, lazy_layers=(), w_sink=2, w_recent=6)
HYBRID = replace(FULL, lazy_layers=(1,))
HEADS = HybridSpec.from_streaming_heads([(1,), (0, 1), (0,)], kv_heads=2, w_sink=2, w_recent=6)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=24)
TOKENIZER = letter_tokenizer()
Plain = Callable[[HybridSpec, Sampling], dict[tuple[str, int], tuple[str, int, str]]]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages of 8 tokens: rounds then end within and across pages."""
    for module in ("kv_store", "key_blocks", "views"):
        monkeypatch.setattr(f"lt_train.inference.{module}.PAGE", 8)
    yield


@pytest.fixture(scope="module")
def models() -> dict[HybridSpec, HybridForCausalLM]:
    """In fp64: a forward pass of several tokens rounds otherwise than one of a single token, and fp32 tips one now and then."""
    return {spec: tiny_model(spec, torch.float64) for spec in (FULL, HYBRID, HEADS)}


@pytest.fixture(scope="module")
def plain(models) -> Plain:
    """The answers to MANY without a draft."""

    @cache
    def answers(spec: HybridSpec, sampling: Sampling) -> dict:
        return texts(answered(Engine(models[spec], TOKENIZER), requests(MANY), sampling))

    return answers


def speculating(
    model: HybridForCausalLM, length: int | None = 3, streaming: HybridSpec | tuple[int, ...] | None = None, **settings
) -> Engine:
    return Engine(model, TOKENIZER, draft=Draft.of(model.spec, streaming, length), **settings)


@pytest.mark.parametrize(
    ("spec", "streaming", "slots", "length"),
    [
        (FULL, None, 3, 1),
        (FULL, (0, 2), 4, 5),
        (FULL, HEADS, 16, 3),
        (HYBRID, None, 4, 5),
        (HYBRID, (2,), 16, 3),
        (HEADS, None, 16, 3),
        (HEADS, (2,), 3, 1),
        (HEADS, None, 4, 5),
    ],
    ids=[
        "full",
        "full, two layers",
        "full, a hybrid's heads",
        "hybrid",
        "hybrid, one layer",
        "heads",
        "heads, one layer",
        "heads, five tokens",
    ],
)
def test_greedy_answers_are_those_without_a_draft(models, plain, spec: HybridSpec, streaming, length: int, slots: int) -> None:
    engine = speculating(models[spec], length, streaming, max_slots=slots, prefill_chunk=8)
    assert texts(answered(engine, requests(MANY), GREEDY)) == plain(spec, GREEDY)
    assert 0 < engine.acceptance.accepted < engine.acceptance.compared


SAMPLINGS = {
    "temperature": SAMPLED,
    "top_k and min_p": replace(SAMPLED, top_k=7, min_p=0.05, temperature=1.5),
    "repetition penalty": replace(SAMPLED, repetition_penalty=1.3),
    "greedy with a repetition penalty": replace(GREEDY, repetition_penalty=1.3),
    "stop strings": replace(SAMPLED, stop=("QQ", "K")),
    "closed reasoning": replace(SAMPLED, thinking_budget=5, thinking_close="ABCDEF</think>"),
    "one token": replace(SAMPLED, max_new_tokens=1),
    "two tokens": replace(SAMPLED, max_new_tokens=2),
}


HYBRIDS = {"full": FULL, "hybrid": HYBRID, "heads": HEADS}
CASES = [(kind, "temperature") for kind in HYBRIDS] + list(zip(cycle(HYBRIDS), [*SAMPLINGS][1:], strict=False))


@pytest.mark.parametrize(
    ("spec", "sampling"),
    [(HYBRIDS[kind], SAMPLINGS[name]) for kind, name in CASES],
    ids=[f"{kind}, {name}" for kind, name in CASES],
)
def test_samples_of_a_seed_are_those_without_a_draft(models, plain, spec: HybridSpec, sampling: Sampling) -> None:
    assert texts(answered(speculating(models[spec], 4, max_slots=5), requests(MANY), sampling)) == plain(spec, sampling)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    slots=st.integers(1, 5),
    chunk=st.sampled_from([3, 8, 64]),
    length=st.integers(1, 5),
    spare=st.integers(0, 12),
)
@settings(max_examples=4, deadline=None)
def test_no_budget_changes_or_loses_an_answer(models, lengths, slots: int, chunk: int, length: int, spare: int) -> None:
    """From just enough for the longest sequence, where nearly all are put back again and again, to plenty."""
    model, requested = models[HEADS], requests(lengths)
    expected = texts(answered(Engine(model, TOKENIZER), requested, SAMPLED))
    sizes = kv.kv_sizes(model, Draft.of(model.spec, None, length))
    budget = sizes.sequence(max(lengths) + 24) + spare * sizes.page
    tight = speculating(model, length, kv_budget=budget, max_slots=slots, prefill_chunk=chunk)
    assert texts(answered(tight, requested, SAMPLED)) == expected


def test_each_request_has_its_own_limit_and_sampling(models) -> None:
    """Rows of one batch accept different numbers of tokens, and end in the middle of a round."""
    requested = [replace(request, max_new_tokens=1 + 3 * n) for n, request in enumerate(requests(MANY))]
    samplings = [Sampling(0.2 * n, 0.95, 24, repetition_penalty=1 + n % 2 / 4) for n in range(len(MANY))]
    alone = {}
    for request, sampling in zip(requested, samplings, strict=True):
        alone |= texts(answered(Engine(models[FULL], TOKENIZER), [request], sampling))
    engine = speculating(models[FULL], 4, max_slots=4)
    batch = engine.batch(engine.lay_out(len(MANY), 64))
    for request, sampling in zip(requested, samplings, strict=True):
        batch.add(request, sampling)
    found, most, come = {}, 0, Counter()
    while not batch.is_empty:
        tokens = batch.step()
        come.update(token.sequence.request.problem for token in tokens)
        most = max(most, len(tokens) - len({token.sequence.request for token in tokens}))
        found |= {(t.answer.request.problem, 0): t.answer for t in tokens if t.answer is not None}
    assert texts(found) == alone
    assert come == {problem: answer.tokens for (problem, _), answer in found.items()}
    assert most > 2, "a step gives several tokens of a sequence"
    assert (batch.store.free_pages, batch.store.lengths) == (engine.lay_out(len(MANY), 64).free_pages, [])


@torch.inference_mode()
@pytest.mark.parametrize("layers", [None, (0,)], ids=["all layers draft", "one layer drafts"])
def test_logits_after_rejected_tokens_are_those_of_recomputing_the_kept_ones(models, layers) -> None:
    """From prompts shorter than the sinks to some longer than the window, over several pages."""
    for model in models.values():
        store = KVStore(model, 4, 60, Draft.of(model.spec, layers, 4))
        runner = ModelRunner(model, store, prefill_chunk=7)
        ids = [list(request.prompt_ids) for request in requests([1, 5, 8, 30])]
        for slot, prompt in enumerate(ids):
            store.admit(100)
            runner.prefill([(slot, prompt)])
        for number, kept in enumerate((1, 5, 2, 1, 1, 4, 3, 5)):
            for drafted in range(4):
                runner.draft([3 + drafted] * 4, drafted)
            new = [[3 + (7 * row + n * number) % 30 for n in range(5)] for row in range(4)]
            for slot, logits_TV in enumerate(runner.verify(new)):
                recomputed = model(torch.tensor([[*ids[slot], *new[slot]]]), use_cache=False).logits[0, -5:]
                torch.testing.assert_close(logits_TV, recomputed)
                ids[slot] += new[slot][:kept]
                store.lengths[slot] = len(ids[slot])


@torch.inference_mode()
def test_the_draft_attends_to_the_models_own_keys_of_the_window(models) -> None:
    """Its first token of a round follows from keys that saw everything, its later ones from its own too."""
    model = models[FULL]
    seen = []
    for length in (1, 5):
        store = KVStore(model, 1, 20, Draft.of(model.spec, None, length))
        runner = ModelRunner(model, store, prefill_chunk=64)
        (request,) = requests([33])
        store.admit(40)
        runner.prefill([(0, request.prompt_ids)])
        (heads,) = store.layers[2]
        ring, pages = heads.draft, heads.model
        assert isinstance(ring, kv.RingLayer) and isinstance(pages, kv.PagedLayer)
        for position in (0, 1, 27, 32):
            place = kv.slot_of(position, 2, 6 + length)
            assert torch.equal(ring.keys[0, :, place], pages.keys[store.pages[0][position // 8], :, position % 8])
        seen.append(runner.draft([5], 0))
    torch.testing.assert_close(*seen)
    streaming = tiny_model(replace(FULL, lazy_layers=(0, 1, 2)), torch.float64)
    alone = streaming(torch.tensor([[*request.prompt_ids, 5]]), use_cache=False).logits[0, -1:]
    assert not torch.allclose(seen[0], alone)


def test_log_probabilities_are_the_models(models) -> None:
    (request,) = (replace(each, logprobs=2) for each in requests([19]))
    found = []
    for engine in (Engine(models[FULL], TOKENIZER), speculating(models[FULL], 3)):
        batch = engine.batch(engine.lay_out(1, 64))
        batch.add(request, SAMPLED)
        found.append([])
        while not batch.is_empty:
            found[-1] += [(token.token_id, token.logprobs) for token in batch.step()]
    assert [token_id for token_id, _ in found[0]] == [token_id for token_id, _ in found[1]]
    for (_, plain), (_, drafted) in zip(*found, strict=True):
        assert drafted.chosen == pytest.approx(plain.chosen) and [t for t, _ in drafted.top] == [t for t, _ in plain.top]


def test_a_cancelled_request_frees_what_it_held_and_changes_no_other_answer(models) -> None:
    engine = speculating(models[FULL], 3, max_slots=2)
    requested = requests([9, 15, 16, 17])
    expected = texts(answered(engine, requested, GREEDY))
    batch = engine.batch(engine.lay_out(4, 64))
    free = batch.store.free_pages
    sequences = [batch.add(request, GREEDY) for request in requested]
    batch.step()
    for cancelled in (sequences[0], sequences[3]):
        batch.cancel(cancelled)
    found = {}
    while not batch.is_empty:
        found |= {(t.answer.request.problem, 0): t.answer for t in batch.step() if t.answer is not None}
    assert texts(found) == {(r.problem, 0): expected[r.problem, 0] for r in requested[1:3]}
    assert (batch.store.free_pages, batch.store.lengths) == (free, [])


def test_the_draft_guesses_more_the_more_of_the_model_it_is(models) -> None:
    """A draft that streams in one layer only, and within its window, is the model."""
    requested = requests(MANY)
    rates = []
    for layers in (None, (2,)):
        engine = speculating(models[FULL], 3, layers)
        answered(engine, requested, GREEDY)
        rates.append(engine.acceptance.rate)
    assert rates[0] < rates[1]
    short = tiny_model(replace(FULL, w_recent=500), torch.float64)
    engine = speculating(short, 3)
    answered(engine, requested, SAMPLED)
    assert engine.acceptance.rate == 1


@pytest.mark.parametrize(
    ("spec", "layers", "full_heads", "rings"), [(HYBRID, None, 4, 6), (HEADS, None, 2, 6), (HEADS, (2,), 2, 5)], ids=str
)
def test_the_budget_holds_the_rings_of_the_draft(models, spec: HybridSpec, layers, full_heads: int, rings: int) -> None:
    model = models[spec]
    token = 2 * 16 * 8  # key and value, head size, fp64
    sizes = kv.kv_sizes(model, Draft.of(model.spec, layers, 5))
    assert (sizes.page, sizes.slot) == (full_heads * 8 * token, rings * (8 + 5) * token)
    assert sizes.sequence(19) == sizes.slot + 3 * sizes.page
    needed = sizes.sequence(33 + 24)
    assert needed > kv.kv_sizes(model).sequence(33 + 24)
    with pytest.raises(UserError, match=rf"kv_budget: .*with the rings of its draft.*{needed:,}.*Fix: .*remove draft"):
        list(speculating(model, 5, layers, kv_budget=needed - 1).answers(requests([33]), GREEDY))
    engine = speculating(model, 5, layers, kv_budget=needed)
    assert answered(engine, requests([33]), GREEDY)
    store = engine.lay_out(1, 57)
    assert isinstance(store, KVStore)
    assert sum(held.keys.nbytes + held.values.nbytes for held in store.held) == needed


@pytest.mark.parametrize(
    ("spec", "layers", "length", "message"),
    [
        (HYBRID, (1,), 4, r"draft_layers: \[1\]: .*would be the model itself. Fix: name a layer that is full"),
        (HEADS, (1,), 4, r"draft_layers: \[1\]: .*would be the model itself"),
        (HEADS, HEADS, 4, "draft_layers: .*would be the model itself"),
        (replace(FULL, lazy_layers=(0, 1, 2)), None, 4, "draft_layers: .*would be the model itself"),
        (FULL, (0, 3), 4, r"draft_layers: \[3\]: not in the model. Fix: name layers from 0 to 2"),
        (FULL, None, 0, "draft_length: 0: not within the window of 6 tokens. Fix: set it from 1 to 5"),
        (FULL, None, 6, "draft_length: 6: not within the window"),
        (HybridSpec(3, (1,), 0, 6, learned_sinks=True), None, 4, "draft: .* no learned sinks. Fix: set hybrid.sink to tokens"),
    ],
    ids=[
        "the model itself",
        "the model itself, with split layers",
        "the same heads",
        "the model streams everywhere",
        "no such layer",
        "no tokens",
        "the window",
        "learned sinks",
    ],
)
def test_what_cannot_draft_is_refused(spec: HybridSpec, layers, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Draft.of(spec, layers, length)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("draft_seconds", "token_seconds"), [(0.1, 0.05), (0.9, 0.3), (0.02, 0.0)])
def test_the_length_of_a_draft_follows_from_measured_acceptance_and_times(acceptance, draft_seconds, token_seconds) -> None:
    """With rounds of known times it is the one with most tokens a second; none where a draft costs more than it saves."""

    def seconds(length: int) -> float:
        return 1 + length * (draft_seconds + token_seconds)

    measured = Acceptance(rounds=100, compared=1000, accepted=round(1000 * acceptance))
    length = DraftLength(Draft.of(FULL, None, None), measured)
    chosen = []
    for _ in range(100):
        chosen.append(length.next())
        length.took(chosen[-1], seconds(chosen[-1]))
    best = max(range(6), key=lambda each: sum(acceptance**n for n in range(each + 1)) / seconds(each))
    assert chosen[:4] == [0, 3, 0, 3]
    assert chosen[4:].count(best) >= 90
    assert (0 if best else 2) in chosen[4:], "times change, so they are taken again"


def test_a_draft_that_adapts_changes_no_answer(models, plain) -> None:
    engine = speculating(models[HYBRID], None, max_slots=4)
    assert texts(answered(engine, requests(MANY), SAMPLED)) == plain(HYBRID, SAMPLED)
    assert 1 < engine.acceptance.tokens_per_round < 6
