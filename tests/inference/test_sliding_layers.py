"""The built-in engine on hybrids of bases in which some layers have a window from the start: rings of two sizes."""

from dataclasses import replace

import pytest
import torch
from transformers import Olmo3Config

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.kv_size import kv_bytes
from lt_train.hybrid.loading import build_hybrid
from lt_train.inference import views
from lt_train.inference.draft import Draft
from lt_train.inference.engine import Engine
from lt_train.inference.kv_store import PAGE, KVStore, RingLayer, kv_sizes
from lt_train.inference.per_prompt import PerPrompt
from lt_train.inference.requests import Request, Sampling
from lt_train.runtime.errors import UserError
from tests.support.families import BASES, SIZES
from tests.support.tiny_engine import likeliest, written
from tests.support.tiny_exports import tiny_tokenizer

TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=10)


def hybrid_of(window: int, *, w_sink: int = 2, w_recent: int = 6, **streaming):
    torch.manual_seed(0)
    base = Olmo3Config(
        **SIZES,
        layer_types=TYPES,
        sliding_window=window,
        rope_parameters={"sliding_attention": {"rope_theta": 100.0}, "full_attention": {"rope_theta": 5e5}},
    )
    model = build_hybrid(base, replace(base_spec(base.to_dict(), w_sink, w_recent), **streaming)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    model.generation_config.eos_token_id = None
    return model


LAZY, SPLIT = {"lazy_layers": (1,)}, {"lazy_layers": (2,), "split_layers": ((1, (0,)),)}


@pytest.mark.parametrize(
    ("window", "streaming", "compiled"),
    [(3, {}, True), (8, LAZY, True), (11, SPLIT, True), (11, {}, False), (3, LAZY, False), (8, SPLIT, False)],
)
@torch.no_grad()
def test_greedy_answers_with_and_without_a_draft_are_those_of_recomputation(window, streaming, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(views, "obstacle", lambda device, dtype: "switched off")
    model, tokenizer = hybrid_of(window, **streaming), tiny_tokenizer()
    prompts = [torch.randint(3, 60, (length,)).tolist() for length in (1, 4, 9, 30)]
    requests = [Request(f"p{n}", 0, n, tuple(ids)) for n, ids in enumerate(prompts)]
    for draft in (None, Draft.of(model.spec, None, 2)):
        answers = written(Engine(model, tokenizer, prefill_chunk=8, draft=draft), requests, GREEDY)
        for request in requests:
            ids = answers[request.problem]
            assert likeliest(model, request.prompt_ids, ids) == ids, request.problem
            assert len(ids) == GREEDY.max_new_tokens or ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("drafted", [0, 3])
def test_the_sizes_are_those_of_the_buffers_and_of_a_sequence(drafted):
    model = hybrid_of(11, lazy_layers=(1,))
    draft = Draft.of(model.spec, [2], drafted) if drafted else None
    sizes, store = kv_sizes(model, draft), KVStore(model, slots=3, pages=5, draft=draft)
    held = {"page": 0, "slot": 0}
    for each in store.held:
        held["slot" if isinstance(each, RingLayer) else "page"] += each.keys.nbytes + each.values.nbytes
    assert held == {"page": 5 * sizes.page, "slot": 3 * sizes.slot}
    if not drafted:
        assert sizes.sequence(PAGE) == kv_bytes(model.config.to_dict(), model.spec, PAGE, 4)


def test_a_draft_streams_in_full_layers_alone_and_fits_into_the_smaller_window():
    model = hybrid_of(4, lazy_layers=(1,))
    assert Draft.of(model.spec, None, 3).spec.lazy_layers == (1, 2)
    with pytest.raises(UserError, match=r"draft_layers: \[3\]: they see 4 tokens in the base already.* name layers of \[1, 2\]"):
        Draft.of(model.spec, [2, 3], 3)
    with pytest.raises(UserError, match="draft_length: 4: not within the window of 4 tokens"):
        Draft.of(model.spec, None, 4)


def test_prompts_that_choose_their_layers_are_refused():
    with pytest.raises(UserError, match=r"per_prompt: layers \[0, 3\] of this base see 11 tokens from the start"):
        PerPrompt(2, 8).check(hybrid_of(11))
    full = type(BASES["gpt_oss"])(**BASES["gpt_oss"].to_dict() | {"layer_types": ["full_attention"] * 4, "sliding_window": None})
    with pytest.raises(UserError, match=r"per_prompt: each layer of this base has learned sinks"):
        PerPrompt(2, 8).check(build_hybrid(full, base_spec(full.to_dict())))
