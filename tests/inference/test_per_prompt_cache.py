"""LightTransfer-Test in `generate()`: each row of a batch decides which layers stream in its answer."""

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedConfig

from lt_train.hybrid.cache import CACHE_ARGUMENT, HybridCache
from lt_train.hybrid.kv_size import token_bytes
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridError, HybridSpec
from lt_train.inference.per_prompt import PerPrompt
from lt_train.inference.per_prompt_cache import PerPromptCache, choose_per_prompt
from lt_train.runtime.errors import UserError
from tests.support.families import FAMILIES, WITH_SINKS, base_of
from tests.support.peak_memory import LiveBytes
from tests.support.per_prompt import SPEC, W_LAST, chosen_offline, likeliest
from tests.support.tiny_engine import requests, tiny_model

PROMPTS = [request.prompt_ids for request in requests([40, 1, 7, 64, 11, 12, 25, 33])]
"""Shorter than w_last, as long as the window, and longer."""


def choosing(keep: int, dtype: torch.dtype = torch.float64) -> HybridForCausalLM:
    """In fp64 rounding in another batch never tips a greedy token."""
    model = tiny_model(SPEC, dtype)
    model.generation_config.eos_token_id = None
    choose_per_prompt(model, PerPrompt(keep, W_LAST))
    return model


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) >= width - torch.tensor([[len(p)] for p in prompts])).long()}


def answers(model: HybridForCausalLM, prompts: Sequence[Sequence[int]], new: int = 20) -> list[list[int]]:
    batch = left_padded(prompts)
    return model.generate(**batch, max_new_tokens=new, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def prefill(model: HybridForCausalLM, prompts: Sequence[Sequence[int]]) -> tuple[PerPromptCache, torch.Tensor]:
    out = model(**left_padded(prompts), use_cache=True)
    assert isinstance(out.past_key_values, PerPromptCache)
    return out.past_key_values, out.logits


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_every_row_keeps_the_layers_with_the_smallest_of_all_ratios(keep: int) -> None:
    model = choosing(keep)
    prompts = [prompt for prompt in PROMPTS if len(prompt) > SPEC.window]
    cache, _ = prefill(model, prompts)
    found = [queue.streaming for queue in cache.queues]
    assert found == [chosen_offline(model, prompt, keep) for prompt in prompts]
    assert len({frozenset(layers) for layers in found}) > 1, "the prompts of this test choose differently"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_the_prompts_are_full_attentions_to_the_last_bit(dtype: torch.dtype) -> None:
    model = choosing(2, dtype)
    _, logits = prefill(model, PROMPTS)
    with model.full_attention(), torch.inference_mode():
        assert torch.equal(logits, model(**left_padded(PROMPTS), use_cache=True).logits)


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_greedy_answers_of_a_padded_batch_are_those_of_masking_the_same_layers_without_a_cache(keep: int) -> None:
    model = choosing(keep)
    found = answers(model, PROMPTS)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        assert likeliest(model, chosen_offline(model, prompt, keep), prompt, ids) == ids and len(ids) == 20
    with model.full_attention():
        assert answers(model, PROMPTS) != found


def test_rows_of_a_batch_get_the_answers_that_they_get_alone() -> None:
    model = choosing(3)
    assert answers(model, PROMPTS) == [answers(model, [prompt])[0] for prompt in PROMPTS]


def test_samples_of_one_prompt_are_drawn_from_what_its_layers_predict() -> None:
    model, batch = choosing(3), left_padded([PROMPTS[0]])
    torch.manual_seed(0)
    sampled = model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=3, top_k=1)
    assert sampled[:, len(PROMPTS[0]) :].tolist() == answers(model, [PROMPTS[0]], 6) * 3


@pytest.mark.parametrize("keep", [1, 3])
def test_cached_bytes_follow_the_queue_while_the_prompts_are_read(keep: int) -> None:
    model, held = choosing(keep), []
    cache = model.model.new_cache()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: held.append(cache.nbytes))
    prompts, bytes_of_token = [requests([n])[0].prompt_ids for n in (64, 40)], token_bytes(model.config.to_dict(), 8)
    with torch.inference_mode():
        model(**left_padded(prompts), **{CACHE_ARGUMENT: cache})
    full, rings = (64 + 40) * bytes_of_token, 2 * SPEC.window * bytes_of_token
    assert held == [min(layer, keep) * full + max(layer - keep, 0) * rings for layer in range(1, SPEC.num_layers + 1)]


def test_the_peak_of_a_prompts_memory_falls_by_the_layers_that_leave_the_queue() -> None:
    prompt, peaks = requests([2000])[0].prompt_ids, []
    for keep in (None, 2):
        model = tiny_model(SPEC)
        if keep is not None:
            choose_per_prompt(model, PerPrompt(keep, W_LAST))
        with torch.no_grad(), LiveBytes(model.parameters()) as live:
            model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        peaks.append(live.peak)
    layer = 2000 * token_bytes(model.config.to_dict(), 4)
    # One layer more than the queue holds while the next one enters it, and the logits of the lazy ratio.
    assert peaks[1] < peaks[0] - 2 * layer


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("olmo3", *WITH_SINKS)])
def test_in_every_family_a_prompt_within_the_window_streams_in_the_first_layers(family: str) -> None:
    """All ratios are 1, and the lower of equally lazy layers leaves the queue; within the window its cache holds every token."""
    torch.manual_seed(0)
    base: PreTrainedConfig = base_of(family)
    model = build_hybrid(base, HybridSpec(4, (), 2, 9)).eval()
    static = build_hybrid(base, HybridSpec(4, (0, 1), 2, 9)).eval()
    static.load_state_dict(model.state_dict())
    choose_per_prompt(model, PerPrompt(2, W_LAST))
    prompts = [range(3, 12), range(5, 10)]
    assert answers(model, prompts, 25) == answers(static, prompts, 25)


def test_a_prompt_in_several_passes_is_refused() -> None:
    model, batch = choosing(3), left_padded([PROMPTS[0]])
    with pytest.raises(HybridError, match=r"new tokens after a prompt.*Fix: pass a prompt in one forward pass"):
        model.generate(**batch, max_new_tokens=3, prefill_chunk_size=16)
    cache, _ = prefill(model, [PROMPTS[0]])
    with pytest.raises(HybridError, match="3 new tokens after a prompt"):
        model(torch.tensor([[5, 6, 7]]), **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (dict(num_beams=2), "generation mode: beam_search"),
        (dict(prompt_lookup_num_tokens=3), "greedy search or sampling"),
        (dict(use_cache=False), "use_cache: False: the layers that stream are cut in the cache"),
        ({CACHE_ARGUMENT: HybridCache(SPEC)}, "cache: HybridCache: no layer of it would be cut"),
    ],
)
def test_generation_that_would_keep_every_layer_full_or_reorder_rows_is_refused(requested, message: str) -> None:
    with pytest.raises(HybridError, match=message):
        choosing(3).generate(**left_padded(PROMPTS[:1]), max_new_tokens=3, **requested)


def test_training_and_saving_are_refused(tmp_path) -> None:
    model, ids = choosing(3).train(), torch.randint(3, 30, (1, 20))
    with pytest.raises(HybridError, match=r"select: per_prompt: this model is in training mode.*Fix: call eval\(\)"):
        model(ids, labels=ids)
    with pytest.raises(HybridError, match=r"select: per_prompt: a checkpoint names the layers that stream.*Fix: save the base"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_row_of_padding_alone_is_refused() -> None:
    batch = left_padded(PROMPTS[:2])
    batch["attention_mask"][1] = 0
    with pytest.raises(HybridError, match=r"attention_mask: it hides every token of row 1. Fix: leave the row out"):
        choosing(3)(**batch, use_cache=True)


def test_a_cache_that_was_reset_takes_another_batch() -> None:
    model = choosing(3)
    cache, _ = prefill(model, PROMPTS[:3])
    cache.reset()
    with torch.inference_mode():
        model(**left_padded(PROMPTS[3:5]), **{CACHE_ARGUMENT: cache})
    assert cache.queues[0].streaming == chosen_offline(model, PROMPTS[3], 3)
    assert [len(layer.parts) for layer in cache.layers] == [2] * SPEC.num_layers


@pytest.mark.parametrize("streaming", [dict(lazy_layers=(1,)), dict(lazy_layers=(), split_layers=((1, (0,)),))], ids=str)
def test_a_model_whose_layers_or_heads_stream_already_is_refused(streaming) -> None:
    with pytest.raises(UserError, match=r"per_prompt: layers \[1\] of this model stream already. Fix: load the base"):
        choose_per_prompt(tiny_model(HybridSpec(3, w_sink=2, w_recent=6, **streaming)), PerPrompt(1, W_LAST))
