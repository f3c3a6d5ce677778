"""Generation through the sink and ring cache equals recomputation without one, and its memory stays where it should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_train.hybrid.cache import CACHE_ARGUMENT, HybridCache, slot_positions
from lt_train.hybrid.kv_size import kv_bytes
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridError, HybridSpec
from tests.support.families import BASES, SIZES, SPLIT, on_base, over_families

SPEC = HybridSpec(4, (0, 1, 3), w_sink=3, w_recent=6)
SPECS = pytest.mark.parametrize("spec", [SPEC, SPLIT], ids=["layers", "KV heads"])
OVER_FAMILIES = over_families(SPEC)


def left_padded(lengths):
    width = max(lengths)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return torch.randint(2, 96, (len(lengths), width)) * mask, mask


@OVER_FAMILIES
def test_left_padded_decoding_equals_recomputation_token_for_token(base_config, spec):
    """Rows shorter than the sinks, than the window, and than both."""
    decoded_as_recomputed(base_config, spec, [1, 2, 3, 9, 20])


@SPECS
@pytest.mark.parametrize("lengths", [[12, 12], [1, 3, 20]])
def test_a_row_is_decoded_as_if_alone(core_config, spec, lengths):
    model, ids, decoded = decoded_as_recomputed(core_config, spec, lengths)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], max_new_tokens=12, do_sample=False)
        assert torch.equal(decoded[row, -length - 12 :], alone[0])


def decoded_as_recomputed(base_config, spec, lengths):
    """The model, its prompts, and what it decodes with a cache, which is what it decodes without."""
    model = build_hybrid(base_config, on_base(base_config, spec)).eval()
    ids, mask = left_padded(lengths)
    settings = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    decoded = model.generate(ids, **settings)
    assert torch.equal(decoded, model.generate(ids, **settings, use_cache=False))
    return model, ids, decoded


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    heads=st.lists(st.sets(st.integers(0, 1)), min_size=4, max_size=4),
    w_sink=st.integers(0, 5),
    w_recent=st.integers(1, 9),
)
def test_any_chunking_of_the_input_gives_the_logits_of_one_pass(lengths, chunks, heads, w_sink, w_recent):
    model = build_hybrid(BASES["qwen3"], HybridSpec.from_streaming_heads(heads, 2, w_sink, w_recent)).eval()
    ids, mask = left_padded([length + sum(chunks) for length in lengths])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        cache, column, parts = HybridCache(model.spec), 0, []
        for size in [*chunks, ids.shape[1] - sum(chunks)]:
            columns = slice(column, column + size)
            column += size
            parts.append(model(ids[:, columns], attention_mask=mask[:, :column], **{CACHE_ARGUMENT: cache}).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real], atol=1e-5, rtol=1e-5)


@SPECS
def test_sampling_draws_from_the_same_distribution_with_and_without_cache(qwen3_config, spec):
    model = build_hybrid(qwen3_config, spec).eval()
    ids, mask = left_padded([4, 11])

    def sample(use_cache):
        torch.manual_seed(5)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=True, temperature=0.7, top_p=0.9, use_cache=use_cache
        )

    assert torch.equal(sample(True), sample(False))


@SPECS
def test_prefill_in_chunks_generates_the_same(qwen3_config, spec):
    model = build_hybrid(qwen3_config, spec).eval()
    ids, mask = left_padded([4, 19])
    greedy = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, **greedy, prefill_chunk_size=5))


def test_over_ten_windows_of_tokens_lazy_layers_stay_within_their_window(qwen3_config):
    spec = HybridSpec(2, (1,), w_sink=4, w_recent=28)
    model = build_hybrid(type(qwen3_config)(**SIZES | dict(num_hidden_layers=2, head_dim=16)), spec).eval()
    cache, ids = HybridCache(spec), torch.randint(2, 96, (1, 40))
    lazy, bytes_at, most = [cache.layers[layer] for layer in spec.lazy_layers], {}, 0
    with torch.inference_mode():
        for step in range(320):
            ids = model(ids, **{CACHE_ARGUMENT: cache}).logits[:, -1:].argmax(-1)
            most = max(most, *(layer.keys.shape[2] for layer in lazy))
            bytes_at[step] = sum(layer.nbytes for layer in lazy)
    assert most == spec.window
    assert len({bytes_at[step] for step in range(10, 320)}) == 1
    assert bytes_at[319] == 2 * spec.window * 2 * 16 * 4  # keys and values, slots, heads, head size, fp32
    assert cache.layers[0].keys.shape[2] == 40 + 319


@settings(max_examples=100, deadline=None)
@given(real=st.integers(0, 60), w_sink=st.integers(0, 6), w_recent=st.integers(1, 10))
def test_slots_hold_the_sinks_and_the_latest_tokens_and_nothing_twice(real, w_sink, w_recent):
    slots = min(real, w_sink + w_recent)
    held = slot_positions(torch.tensor([real]), w_sink + w_recent, w_sink, w_recent)[0]
    expected = sorted(set(range(min(real, w_sink))) | set(range(max(real - w_recent, min(real, w_sink)), real)))
    assert sorted(held[held >= 0].tolist()) == expected
    assert len(expected) == slots


@SPECS
@pytest.mark.parametrize(
    "requested",
    [
        dict(num_beams=2),
        dict(prompt_lookup_num_tokens=3),
        dict(cache_implementation="static"),
        dict(cache_implementation="offloaded"),
        dict(cache_implementation="paged"),
    ],
)
def test_decoding_that_a_ring_cannot_serve_is_refused(qwen3_config, spec, requested):
    model = build_hybrid(qwen3_config, spec).eval()
    with pytest.raises(HybridError):
        model.generate(torch.randint(2, 96, (1, 5)), max_new_tokens=3, **requested)


@SPECS
def test_assisted_decoding_is_refused(qwen3_config, spec):
    model = build_hybrid(qwen3_config, spec).eval()
    with pytest.raises(HybridError, match="greedy search or sampling"):
        model.generate(torch.randint(2, 96, (1, 5)), max_new_tokens=3, assistant_model=build_hybrid(qwen3_config, spec).eval())


def test_continuous_batching_is_refused(qwen3_config):
    model = build_hybrid(qwen3_config, SPEC)
    for entrance in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(HybridError, match="without sinks"):
            entrance()


@SPECS
def test_taking_tokens_back_or_reordering_rows_is_refused(qwen3_config, spec):
    model, cache = build_hybrid(qwen3_config, spec).eval(), HybridCache(spec)
    model(torch.randint(2, 96, (2, 5)), **{CACHE_ARGUMENT: cache})
    for refused in (
        lambda: cache.crop(-2),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(HybridError, match="Fix: use greedy search or sampling"):
            refused()
    assert not cache.is_croppable


@SPECS
def test_padding_after_real_tokens_is_refused_with_a_cache(qwen3_config, spec):
    model = build_hybrid(qwen3_config, spec).eval()
    ids = torch.randint(2, 96, (1, 4))
    with pytest.raises(HybridError, match="left padding only"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 0]]), **{CACHE_ARGUMENT: HybridCache(spec)})


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_the_cache_is_taken_by_both_its_names(qwen3_config):
    model, ids = build_hybrid(qwen3_config, SPEC).eval(), torch.randint(2, 96, (1, 30))
    caches = {name: HybridCache(SPEC) for name in ("past_key_values", CACHE_ARGUMENT)}
    logits = [model(ids, **{name: cache}).logits for name, cache in caches.items()]
    assert all(torch.equal(logits[0], other) for other in logits)
    assert [cache.get_seq_length() for cache in caches.values()] == [30] * len(caches)


@SPECS
def test_a_cache_serves_one_batch(qwen3_config, spec):
    model, cache = build_hybrid(qwen3_config, spec).eval(), HybridCache(spec)
    model(torch.randint(2, 96, (2, 5)), **{CACHE_ARGUMENT: cache})
    with pytest.raises(HybridError, match="make a cache for each batch"):
        model(torch.randint(2, 96, (3, 1)), **{CACHE_ARGUMENT: cache})
    cache.reset()
    model(torch.randint(2, 96, (3, 5)), **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 5


@SPECS
def test_a_cache_holds_the_bytes_that_the_sizes_predict(qwen3_config, spec):
    model, cache = build_hybrid(qwen3_config, spec).eval(), HybridCache(spec)
    for tokens in (50, 1, 7):
        model(torch.randint(2, 96, (1, tokens)), **{CACHE_ARGUMENT: cache})
        held = sum(x.numel() * x.element_size() for part in cache.parts for x in (part.keys, part.values))
        assert held == kv_bytes(model.config.to_dict(), spec, cache.get_seq_length(), itemsize=4)


def test_cached_tokens_of_a_spec_are_those_of_its_kv_heads():
    assert SPEC.cached_tokens(50, kv_heads=2) == 2 * (50 + 3 * 9)
    assert SPLIT.cached_tokens(50, kv_heads=2) == 4 * 50 + 4 * 10


def passes(model, *masks, call="forward"):
    """Tokens in as many passes as there are masks, each over all columns so far."""
    cache, column = HybridCache(model.config.spec), 0
    ids = torch.randint(2, 96, (len(masks[-1]), len(masks[-1][0])))
    for mask in masks:
        mask_BT = torch.tensor(mask)
        if call == "generate" and mask is masks[-1]:
            given = {"attention_mask": mask_BT, CACHE_ARGUMENT: cache}
            return model.generate(ids, max_new_tokens=3, do_sample=False, **given)
        new = ids[:, column : mask_BT.shape[1]]
        logits = model(new, attention_mask=mask_BT, **{CACHE_ARGUMENT: cache}).logits
        column = mask_BT.shape[1]
    return logits


@torch.no_grad()
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("later", "cause"),
    [([0, 0, 1, 1, 1, 1], "hides a token at row 1, column 1"), ([0, 1, 1, 0, 1, 1], "hides a token at row 1, column 3")],
)
def test_a_mask_that_hides_cached_tokens_is_refused(qwen3_config, later, cause, call):
    model = build_hybrid(qwen3_config, SPEC).eval()
    with pytest.raises(HybridError, match=f"attention_mask: it {cause}"):
        passes(model, [[1, 1, 1, 1], [0, 1, 1, 1]], [[1] * 6, later], call=call)


@torch.no_grad()
def test_a_mask_that_shows_cached_padding_is_refused(qwen3_config):
    model = build_hybrid(qwen3_config, SPEC).eval()
    with pytest.raises(HybridError, match="attention_mask: it shows padding at row 1, column 0"):
        passes(model, [[1, 1], [0, 1]], [[1, 1, 1], [1, 1, 1]])


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "cause"),
    [
        ([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]], "attention_mask: it has a hole in row 1"),
        ([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], "padding after a row's first real token.*padding_side"),
        ([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], "attention_mask: it hides every token of row 1"),
    ],
)
def test_generate_names_the_mask_that_it_made_its_positions_from(qwen3_config, mask, cause):
    model = build_hybrid(qwen3_config, SPEC).eval()
    with pytest.raises(HybridError, match=cause):
        model.generate(torch.randint(2, 96, (2, 5)), attention_mask=torch.tensor(mask), max_new_tokens=3, do_sample=False)


@torch.no_grad()
def test_generate_names_the_mask_that_does_not_fit_the_cache(qwen3_config):
    model = build_hybrid(qwen3_config, SPEC).eval()
    with pytest.raises(HybridError, match=r"row 1 continues at 4, and its cache ends before 2.*pass the attention_mask"):
        passes(model, [[1, 1, 1, 1], [0, 0, 1, 1]], [[1] * 6, [1] * 6], call="generate")
