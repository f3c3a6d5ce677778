"""What tells an engine that computes something else: configs, tokens, probabilities."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.tiny_tokenizer import build_tokenizer
from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.servers.check import (
    NEW_TOKENS,
    Continuation,
    chat_messages,
    check_server,
    compare_config,
    compare_continuations,
    computing,
    continue_greedily,
    distinguishing_prompts,
    mistaken_specs,
)
from lt_train.inference.servers.completions_api import Completion
from lt_train.inference.servers.pool import ServerSettings
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError
from tests.support.misbehaving_server import MisbehavingServer

BASE = Path(__file__).parents[3] / "data/tiny-reasoner"
STOP = (3,)
TOKENIZER = build_tokenizer()
SPEC = HybridSpec(8, (1, 3, 5, 7), w_sink=4, w_recent=28)
KV_HEADS = 2
SPLIT = HybridSpec(8, (1, 5), 4, 28, split_layers=((0, (0,)), (3, (1,)), (6, (0,)), (7, (1,))))
OF_LAYERS = ("every layer full", "sinks ignored")
OF_HEADS = (*OF_LAYERS, "streaming KV heads ignored", "the other KV heads of a layer stream")


@pytest.fixture(autouse=True, scope="module")
def prompts_are_made_once_for_each_spec():
    """All hybrids here have the weights of one base, and each spec is checked several times."""
    made = {}

    def made_once(reference, *given):
        if reference.spec not in made:
            made[reference.spec] = distinguishing_prompts(reference, *given)
        return made[reference.spec]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lt_train.inference.servers.check.distinguishing_prompts", made_once)
        yield


@pytest.fixture(scope="module")
def hybrid():
    return load_hybrid(BASE, SPEC)


@pytest.fixture(scope="module")
def continuation(hybrid):
    _, wanted, _ = distinguishing_prompts(hybrid, TOKENIZER, Prompt(), STOP)
    return wanted[0]


def completion(**given):
    return Completion(**dict(finish_reason="length") | given)


def logprobs_of(continuation):
    rows = continuation.logits_NV.log_softmax(-1)
    return tuple(rows[step, token].item() for step, token in enumerate(continuation.token_ids))


def compare(continuation, **given):
    return compare_continuations(TOKENIZER, STOP, continuation, completion(**given), "http://x")


def test_the_prompts_are_longer_than_the_window_and_tell_every_mistake(hybrid):
    texts, wanted, undetectable = distinguishing_prompts(hybrid, TOKENIZER, Prompt(), STOP)
    assert undetectable == () and len(texts) >= 3
    assert all(len(one.prompt_ids) > SPEC.window for one in wanted)
    again, _, _ = distinguishing_prompts(hybrid, TOKENIZER, Prompt(), STOP)
    assert again == texts


def test_mistakes_that_change_nothing_are_said_to_be_undetected(monkeypatch):
    monkeypatch.setattr("lt_train.inference.servers.check.MOST_PROMPTS", 4)
    window_beyond_all = load_hybrid(BASE, HybridSpec(8, (1, 3), w_sink=0, w_recent=4096))
    window_beyond_all.config.max_position_embeddings = 120  # so that no prompt can be longer than the window
    texts, _, undetectable = distinguishing_prompts(window_beyond_all, TOKENIZER, Prompt(), STOP)
    assert undetectable == ("every layer full",) and len(texts) == 4


@pytest.mark.parametrize(("spec", "mistakes"), [(SPEC, OF_LAYERS), (SPLIT, OF_HEADS)], ids=["layers", "heads"])
def test_a_mistaken_spec_computes_what_a_model_of_that_spec_computes_and_is_gone_afterwards(spec, mistakes, continuation):
    hybrid = load_hybrid(BASE, spec)
    assert tuple(mistaken_specs(spec, KV_HEADS)) == mistakes
    for mistaken_spec in mistaken_specs(spec, KV_HEADS).values():
        with computing(hybrid, mistaken_spec):
            mistaken = continue_greedily(hybrid, continuation.prompt_ids, STOP)
        expected = continue_greedily(load_hybrid(BASE, mistaken_spec), continuation.prompt_ids, STOP)
        assert mistaken.token_ids == expected.token_ids
        torch.testing.assert_close(mistaken.logits_NV, expected.logits_NV, atol=1e-5, rtol=0)
    assert hybrid.spec == spec


def test_equal_tokens_and_probabilities_pass(continuation):
    agreed = compare(continuation, token_ids=continuation.token_ids, logprobs=logprobs_of(continuation))
    assert agreed == (len(continuation.token_ids), len(continuation.token_ids))


def test_another_token_is_refused_unless_rounding_may_choose_it(continuation):
    step = 2
    likelier_N = continuation.logits_NV[step].argsort(descending=True)
    far = int(likelier_N[-1])
    changed = (*continuation.token_ids[:step], far, *continuation.token_ids[step + 1 :])
    with pytest.raises(UserError, match=rf"http://x computes something else .* prompt of {len(continuation.prompt_ids)} tokens"):
        compare(continuation, token_ids=changed)
    tied_NV = continuation.logits_NV.clone()
    tied_NV[step, far] = tied_NV[step].max() - 0.01
    assert compare(replace(continuation, logits_NV=tied_NV), token_ids=changed) == (step, 0)


def test_another_probability_of_the_same_tokens_is_refused(continuation):
    wrong = [value - 2.0 for value in logprobs_of(continuation)]
    with pytest.raises(UserError, match=r"log-probability .* there and .* in the hybrid class"):
        compare(continuation, token_ids=continuation.token_ids, logprobs=tuple(wrong))


def test_text_is_compared_where_a_server_tells_no_tokens(continuation):
    text = TOKENIZER.decode(continuation.token_ids, skip_special_tokens=True)
    assert compare(continuation, text=text) == (len(continuation.token_ids), 0)
    certain = Continuation(continuation.prompt_ids, continuation.token_ids, continuation.logits_NV * 100)
    with pytest.raises(UserError, match="computes something else"):
        compare(certain, text=f"q{text}")
    with pytest.raises(UserError, match="computes something else"):
        compare(certain, text="")


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention"] * 2},
        {"streaming_kv_heads": [[0], [0, 1]]},
        {"sliding_window": 9},
        {"w_sink": 0},
        {"model_type": "qwen2"},
    ],
)
def test_a_served_folder_with_another_config_is_refused(tmp_path, change):
    ours = {"model_type": "lt_hybrid_qwen3", "num_hidden_layers": 2, "sliding_window": 8, "w_sink": 4}
    ours |= {"layer_types": ["full_attention", "sliding_attention"]}
    for name, config in (("ours", ours), ("theirs", ours | change), ("same", ours)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    compare_config("http://x", tmp_path / "ours", f"{tmp_path / 'same'}@main")
    compare_config("http://x", tmp_path / "ours", "a-name-that-is-no-folder")
    with pytest.raises(UserError, match=next(iter(change))):
        compare_config("http://x", tmp_path / "ours", str(tmp_path / "theirs"))


def test_where_only_kv_heads_stream_the_window_of_another_config_is_found(tmp_path):
    ours = {"model_type": "lt_hybrid_qwen3", "num_hidden_layers": 1, "layer_types": ["full_attention"], "w_sink": 4}
    for name, window in (("ours", 8), ("theirs", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(ours | {"streaming_kv_heads": [[0]], "sliding_window": window}))
    with pytest.raises(UserError, match="sliding_window: 9, 8"):
        compare_config("http://x", tmp_path / "ours", str(tmp_path / "theirs"))


def test_a_hybrid_without_sinks_and_its_export_to_a_stock_class_are_one_config(tmp_path):
    own = {"model_type": "lt_hybrid_qwen3", "num_hidden_layers": 1, "sliding_window": 8, "w_sink": 0}
    for name, config in (("own", own), ("stock", {k: v for k, v in own.items() if k != "w_sink"} | {"model_type": "qwen3"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"layer_types": ["sliding_attention"]}))
    compare_config("http://x", tmp_path / "own", str(tmp_path / "stock"))


@pytest.mark.parametrize(
    ("spec", "mistake"),
    [*((SPEC, mistake) for mistake in (None, *OF_LAYERS)), *((SPLIT, mistake) for mistake in (None, *OF_HEADS))],
)
def test_a_server_is_refused_exactly_if_it_computes_something_else(spec, mistake, tmp_path):
    hybrid = load_hybrid(BASE, spec)
    served = load_hybrid(BASE, spec if mistake is None else mistaken_specs(spec, KV_HEADS)[mistake])
    (tmp_path / "config.json").write_text("{}")

    def generate(handler, body):
        with server.lock:
            written = continue_greedily(served, tuple(body["prompt"]), STOP)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(written.token_ids)}
        choice = {"text": TOKENIZER.decode(written.token_ids), "token_ids": written.token_ids}
        choice |= {"finish_reason": "length" if len(written.token_ids) == NEW_TOKENS else "stop"}
        handler.send_json(200, {"choices": [choice], "usage": usage})
        return True

    with MisbehavingServer() as server:
        server.misbehave = generate
        arguments = ServerSettings((server.url,)), hybrid, tmp_path, TOKENIZER, Prompt(), STOP
        if mistake is None:
            check = check_server(*arguments)
            assert check.tokens > 40 and check.undetectable == ()
        else:
            with pytest.raises(UserError, match="computes something else than the checkpoint"):
                check_server(*arguments)


def test_messages_say_the_recipes_prompt():
    prompt = Prompt(system="Be brief.", user="Q: {question}")
    assert chat_messages(prompt, "2+2?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 2+2?"},
    ]
    assert chat_messages(Prompt(), "2+2?") == [{"role": "user", "content": "2+2?"}]
