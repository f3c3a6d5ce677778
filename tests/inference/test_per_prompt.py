"""LightTransfer-Test in the engine: each prompt decides which layers stream in its answer."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.kv_store import KVStore, pages_for
from lt_train.inference.per_prompt import PerPrompt
from lt_train.inference.per_prompt_store import PerPromptSizes, PerPromptStore
from lt_train.inference.requests import Answer, Sampling
from lt_train.inference.runner import ModelRunner
from lt_train.runtime.errors import UserError
from tests.support.per_prompt import SPEC, W_LAST, chosen_offline, likeliest
from tests.support.tiny_engine import GREEDY, answered, assert_greedy, letter_tokenizer, requests, texts, tiny_model

LENGTHS = [1, 7, 11, 12, 17, 24, 25, 40, 64, 33]
"""Shorter than w_last and the window, just longer, and up to eight pages. A window takes a page and three places of a second."""


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    """In fp64: rounding in another batch never tips a greedy token."""
    return tiny_model(SPEC, torch.float64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer()


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages of 8 tokens: short sequences then have several."""
    for module in ("kv_store", "views", "per_prompt_store", "per_prompt_views"):
        monkeypatch.setattr(f"lt_train.inference.{module}.PAGE", 8)
    yield


def engine(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerFast, keep: int, **settings: int) -> Engine:
    return Engine(model, tokenizer, per_prompt=PerPrompt(keep, W_LAST), **settings)


def assert_masked(model: HybridForCausalLM, keep: int, answers: dict[tuple[str, int], tuple[str, int, str]], requested) -> None:
    """They are those of masking the same layers without a cache."""
    assert_greedy(answers, requested, lambda prompt, ids: likeliest(model, chosen_offline(model, prompt, keep), prompt, ids))


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_every_prompt_keeps_the_layers_with_the_smallest_of_all_ratios(model, tokenizer, keep: int) -> None:
    requested = requests([length for length in LENGTHS if length > SPEC.window])
    batch_of = engine(model, tokenizer, keep)
    batch = batch_of.batch(batch_of.lay_out(len(requested), 100))
    for request in requested:
        batch.add(request, GREEDY)
    batch.step()
    found = [sequence.streaming for sequence in batch.store.sequences]
    assert found == [chosen_offline(model, running.request.prompt_ids, keep) for running in batch.running]
    assert len({frozenset(layers) for layers in found}) > 1, "the prompts of this test choose differently"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_a_prompt_are_full_attentions_to_the_last_bit(dtype: torch.dtype) -> None:
    model = tiny_model(SPEC, dtype)
    prompts = [(slot, request.prompt_ids) for slot, request in enumerate(requests(LENGTHS))]
    logits = []
    for store in (KVStore(model, len(prompts), 100), PerPromptStore(model, PerPrompt(2, W_LAST), len(prompts), 500)):
        for _, ids in prompts:
            store.admit(len(ids))
        logits.append(ModelRunner(model, store, prefill_chunk=100).prefill(prompts))
    assert torch.equal(*logits)


@pytest.mark.parametrize(("keep", "slots"), [(1, 16), (3, 3), (3, 1), (5, 4)])
def test_greedy_answers_are_those_of_masking_the_same_layers_without_a_cache(model, tokenizer, keep: int, slots: int) -> None:
    requested = requests(LENGTHS)
    assert_masked(model, keep, texts(answered(engine(model, tokenizer, keep, max_slots=slots), requested, GREEDY)), requested)


def test_where_attention_cannot_be_compiled_the_answers_are_the_same(model, tokenizer, monkeypatch) -> None:
    compiled = texts(answered(engine(model, tokenizer, 3), requests(LENGTHS), GREEDY))
    monkeypatch.setattr("lt_train.inference.per_prompt_views.obstacle", lambda device, dtype: "there is no C compiler")
    assert texts(answered(engine(model, tokenizer, 3), requests(LENGTHS), GREEDY)) == compiled


def test_answers_differ_from_full_attentions_and_from_one_choice_for_all(model, tokenizer) -> None:
    requested = requests(LENGTHS)
    found = texts(answered(engine(model, tokenizer, 3), requested, GREEDY))
    assert found != texts(answered(Engine(model, tokenizer), requested, GREEDY))
    choices = {request.problem: chosen_offline(model, request.prompt_ids, 3) for request in requested}
    assert len({frozenset(layers) for layers in choices.values()}) > 2


@given(
    lengths=st.lists(st.integers(1, 40), min_size=3, max_size=5),
    slots=st.integers(1, 5),
    spare=st.integers(0, 60),
    keep=st.integers(1, 5),
)
@settings(max_examples=5, deadline=None)
def test_no_budget_changes_or_loses_an_answer(model, tokenizer, lengths: list[int], slots: int, spare: int, keep: int) -> None:
    """From just enough for the longest sequence, where the others wait, to plenty; slots are freed and moved on the way."""
    requested, sampled = requests(lengths), Sampling(temperature=0.9, top_p=0.95, max_new_tokens=24)
    alone = texts(answered(engine(model, tokenizer, keep, max_slots=1), requested, sampled))
    sizes = PerPromptSizes.of(model, PerPrompt(keep, W_LAST))
    budget = sizes.sequence(max(lengths) + 24) + spare * sizes.page
    assert texts(answered(engine(model, tokenizer, keep, kv_budget=budget, max_slots=slots), requested, sampled)) == alone


def test_requests_that_come_and_go_while_others_run_get_the_answers_they_get_alone(model, tokenizer) -> None:
    requested = requests([40, 9, 64, 17, 33])
    made = engine(model, tokenizer, 2, max_slots=3)
    batch = made.batch(made.lay_out(5, 64 + 24))
    first = batch.add(requested[0], GREEDY)
    answers: dict[tuple[str, int], Answer] = {}
    waiting = requested[1:]
    for step in range(200):
        if waiting and step % 3 == 1:
            batch.add(waiting.pop(0), GREEDY)
        if step == 8:
            batch.cancel(first)
        for token in batch.step():
            if token.answer is not None:
                answers[token.answer.request.problem, 0] = token.answer
        if batch.is_empty and not waiting:
            break
    answers.pop((requested[0].problem, 0), None)
    assert len(answers) == 4
    assert_masked(model, 2, texts(answers), requested[1:])
    assert batch.store.free_pages == batch.store.num_pages


@pytest.mark.parametrize("keep", [1, 3])
def test_a_prompt_never_holds_the_pages_of_more_layers_than_stay_full(model, keep: int) -> None:
    tokens = 64
    store = PerPromptStore(model, PerPrompt(keep, W_LAST), slots=1, pages=SPEC.num_layers * pages_for(tokens))
    store.admit(tokens)
    in_use: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_: in_use.append(store.num_pages - store.free_pages)) for layer in model.model.layers
    ]
    ModelRunner(model, store, prefill_chunk=tokens).prefill([(0, requests([tokens])[0].prompt_ids)])
    for hook in hooks:
        hook.remove()
    full, ring = pages_for(tokens), pages_for(SPEC.window)
    assert in_use == [min(layer, keep) * full + max(layer - keep, 0) * ring for layer in range(1, SPEC.num_layers + 1)]
    assert max(in_use) == store.sizes.pages(tokens) < SPEC.num_layers * full


def test_a_prompt_longer_than_a_chunk_is_refused_with_the_chunk_that_would_do(model, tokenizer) -> None:
    with pytest.raises(UserError, match=r"prefill_chunk: 32: prompt p1-33 has 33 tokens.* Fix: set prefill_chunk to at least 33"):
        list(engine(model, tokenizer, 2, prefill_chunk=32).answers(requests([9, 33]), GREEDY))


@pytest.mark.parametrize("keep", [0, 6])
def test_keeping_no_layer_or_every_layer_is_refused(model, tokenizer, keep: int) -> None:
    with pytest.raises(UserError, match=f"per_prompt.keep: {keep}: of 6 layers.* Fix: set it from 1 to 5"):
        engine(model, tokenizer, keep)


@pytest.mark.parametrize("spec", [HybridSpec(3, (1,), 2, 6), HybridSpec(3, (), 2, 6, split_layers=((1, (0,)),))], ids=str)
def test_a_model_whose_layers_or_heads_stream_already_is_refused(tokenizer, spec: HybridSpec) -> None:
    with pytest.raises(UserError, match=r"per_prompt: layers \[1\] of this model stream already. Fix: load the base"):
        engine(tiny_model(spec), tokenizer, 1)


def test_a_budget_below_one_sequence_is_refused_with_the_bytes_that_would_do(model, tokenizer) -> None:
    needed = PerPromptSizes.of(model, PerPrompt(2, W_LAST)).sequence(33 + 24)
    with pytest.raises(UserError, match=f"{needed:,}"):
        list(engine(model, tokenizer, 2, kv_budget=needed - 1).answers(requests([33]), GREEDY))
    assert answered(engine(model, tokenizer, 2, kv_budget=needed), requests([33]), GREEDY)
