"""The HTTP API, by the openai package and by plain requests, against the answers of the engine itself."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from lt_train.inference.engine import Engine
from lt_train.inference.requests import Request, Sampling
from lt_train.serving.checkpoint import Checkpoint
from lt_train.serving.draft_options import DraftOptions
from lt_train.serving.engine_thread import EngineThread
from tests.support.served import NAME, checkpoint_of, served, until
from tests.support.symbol_model import symbol_hybrid, symbol_tokenizer

PROMPTS = ["", "1", "12+34", "abc:", "what is 7+8?", "0123456789abcdefghij", "\\boxed{1} ", "q"]
CONTEXT = 128
TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """In fp64: fp32 rounds otherwise in another batch, and a draw may tip."""
    return checkpoint_of(symbol_hybrid().double(), symbol_tokenizer())


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint) -> Iterator[tuple[str, EngineThread]]:
    with served(checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def url(server: tuple[str, EngineThread]) -> str:
    return server[0]


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def engine_answers(checkpoint: Checkpoint, prompts: list[str], sampling: Sampling, seed: int = 0) -> list[tuple[str, str]]:
    """Text and reason of each chat prompt's answer, alone."""
    requested = [
        Request(str(number), 0, seed, tuple(checkpoint.tokenizer(f"{prompt}\n:", add_special_tokens=False)["input_ids"]))
        for number, prompt in enumerate(prompts)
    ]
    answers = (next(Engine(checkpoint.model, checkpoint.tokenizer).answers([request], sampling)) for request in requested)
    return [(answer.text, answer.finish_reason) for answer in answers]


async def chat(client: AsyncOpenAI, prompt: str, stream: bool, **sampling) -> tuple[str, str]:
    messages = [{"role": "user", "content": prompt}]
    reply = await client.chat.completions.create(model=NAME, messages=messages, max_tokens=TOKENS, stream=stream, **sampling)
    if not stream:
        return reply.choices[0].message.content, reply.choices[0].finish_reason
    text, reason = "", ""
    async for chunk in reply:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


async def chat_about_all(url: str, **sampling) -> list[tuple[str, str]]:
    """All prompts at once: each streamed, then each not."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return await asyncio.gather(*(chat(client, prompt, stream, **sampling) for stream in (True, False) for prompt in PROMPTS))


def test_concurrent_chats_streamed_and_not_get_the_greedy_answers_that_the_engine_gives_alone(checkpoint, url) -> None:
    expected = engine_answers(checkpoint, PROMPTS, Sampling(0.0, 1.0, TOKENS))
    assert asyncio.run(chat_about_all(url, temperature=0)) == [*expected, *expected]
    assert len(set(expected)) > 4


@pytest.mark.parametrize("draft", [DraftOptions(), DraftOptions(layers=(0,), length=3)], ids=["as measured", "three tokens"])
def test_a_draft_changes_no_answer(checkpoint, draft: DraftOptions) -> None:
    with served(checkpoint, draft=draft) as (url, engine):
        expected = engine_answers(checkpoint, PROMPTS, Sampling(0.0, 1.0, TOKENS))
        assert asyncio.run(chat_about_all(url, temperature=0)) == [*expected, *expected]
        expected = engine_answers(checkpoint, PROMPTS, Sampling(0.8, 0.9, TOKENS), seed=5)
        assert asyncio.run(chat_about_all(url, temperature=0.8, top_p=0.9, seed=5)) == [*expected, *expected]
    assert engine._batch.acceptance.accepted > 0


def test_a_seed_draws_the_sample_that_the_engine_draws_whatever_runs_beside_it(checkpoint, client) -> None:
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "max_tokens": TOKENS, "extra_body": {"top_k": 12, "min_p": 0.02}}

    def ask(prompt: str) -> tuple[str, str]:
        choice = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": prompt}], **settings).choices[0]
        return choice.message.content, choice.finish_reason

    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(ask, PROMPTS))
    assert drawn == engine_answers(checkpoint, PROMPTS, Sampling(0.8, 0.9, TOKENS, top_k=12, min_p=0.02), seed=5)


def test_choices_of_one_request_differ_and_the_first_is_the_one_that_comes_alone(client) -> None:
    requested = {"model": NAME, "prompt": "12", "temperature": 1, "seed": 3, "max_tokens": 12}
    several = client.completions.create(**requested, n=3).choices
    alone = client.completions.create(**requested).choices[0]
    assert [choice.index for choice in several] == [0, 1, 2]
    assert several[0].text == alone.text and len({choice.text for choice in several}) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.completions.create(**requested, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == {choice.index: choice.text for choice in several}


def test_several_prompts_of_one_request_are_answered_by_index(client, checkpoint) -> None:
    requested = {"model": NAME, "temperature": 0, "max_tokens": 9}
    each = [client.completions.create(**requested, prompt=prompt).choices[0].text for prompt in PROMPTS[1:4]]
    ids = [checkpoint.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[1:4]]
    for prompts in (PROMPTS[1:4], ids):
        reply = client.completions.create(**requested, prompt=prompts)
        assert [choice.text for choice in reply.choices] == each
        assert reply.usage.prompt_tokens == sum(map(len, ids))


def test_usage_counts_tokens_streamed_and_not(client, checkpoint) -> None:
    requested = {"model": NAME, "prompt": "0123", "temperature": 0, "max_tokens": 7}
    usage = client.completions.create(**requested).usage
    assert (usage.prompt_tokens, usage.total_tokens) == (4, 4 + usage.completion_tokens)
    *chunks, last = client.completions.create(**requested, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == usage
    assert all(chunk.usage is None for chunk in chunks)


def test_an_answer_without_a_limit_continues_until_the_context_is_full(client) -> None:
    prompt = "0123456789abcdefghijklmnop"
    chat = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": prompt}], temperature=0)
    choice = chat.choices[0]
    assert choice.finish_reason == "stop" or chat.usage.total_tokens == CONTEXT
    assert client.completions.create(model=NAME, prompt="0", temperature=0).usage.completion_tokens <= 16


def test_a_stop_string_ends_an_answer_before_it_in_every_chunk(client) -> None:
    requested = {"model": NAME, "prompt": "12+34", "temperature": 0, "max_tokens": TOKENS}
    whole = client.completions.create(**requested).choices[0].text
    stop = whole[6:9]
    cut = client.completions.create(**requested, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    chunks = [chunk.choices[0] for chunk in client.completions.create(**requested, stop=[stop, "never"], stream=True)]
    assert "".join(chunk.text for chunk in chunks) == cut.text
    assert chunks[-1].finish_reason == "stop"


def test_text_that_a_stop_string_might_have_begun_with_comes_at_the_end(client) -> None:
    requested = {"model": NAME, "prompt": "12+34", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**requested).choices[0]
    assert whole.finish_reason == "length"
    chunks = client.completions.create(**requested, stop=[f"{whole.text[-3:]}never"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text


def test_log_probabilities_come_with_their_tokens(client) -> None:
    requested = {"model": NAME, "prompt": "12+34", "temperature": 0, "max_tokens": 6}
    reported = client.completions.create(**requested, logprobs=2).choices[0]
    logprobs = reported.logprobs
    assert "".join(logprobs.tokens).startswith(reported.text) and len(logprobs.token_logprobs) == len(logprobs.tokens)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()) <= 0 and len(top) == 2
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**requested, logprobs=0, stream=True)]
    assert [value for part in parts if part for value in part.token_logprobs] == pytest.approx(logprobs.token_logprobs, abs=1e-4)
    assert [value for part in parts if part for value in part.text_offset] == logprobs.text_offset
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "1"}], max_tokens=3, temperature=0, logprobs=True, top_logprobs=1
    )
    for entry in chat.choices[0].logprobs.content:
        assert entry.top_logprobs[0].token == entry.token and entry.logprob <= 0


def test_the_model_is_listed_and_another_name_is_not_found(client, url) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.max_model_len) == (NAME, CONTEXT)
    assert client.models.retrieve(NAME).id == NAME
    assert httpx2.get(f"{url}/health").status_code == 200
    for ask in (lambda: client.models.retrieve("other"), lambda: client.completions.create(model="other", prompt="1")):
        with pytest.raises(openai.NotFoundError, match=f"model: other: not served here. Fix: {NAME}"):
            ask()


VALID = {"completions": {"prompt": "12"}, "chat/completions": {"messages": [{"role": "user", "content": "12"}]}}


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 0.5}, "temprature: unknown parameter; did you mean temperature?"),
        ({"use_beam_search": True}, "use_beam_search: unknown parameter; Fix: leave it out"),
        ({"presence_penalty": 0.5}, "presence_penalty: 0.5: this server does not support it. Fix: leave it out"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"echo": True}, "echo: true: this server does not support it"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 0}, "max_tokens: 0: input should be greater than or equal to 1"),
        ({"max_tokens": "12"}, "max_tokens: '12': input should be a valid integer"),
        ({"max_tokens": CONTEXT}, f"hold {CONTEXT}"),
        ({"temperature": -1}, "temperature: -1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_p": 0}, "top_p: 0"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n: 0"),
        ({"n": 100}, "n: 100 answers: more than the 72 that may run and wait"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop_token_ids": [7]}, "stop_token_ids: 7: not supported: answers end at 1"),
        ({"stream": "yes"}, "stream: 'yes'"),
        ({"stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        ({"model": 5}, "model: 5"),
    ],
)
def test_what_would_change_an_answer_and_is_not_supported_is_refused(url, kind, changes, message) -> None:
    content = json.dumps(VALID[kind] | changes)
    reply = httpx2.post(f"{url}/v1/{kind}", content=content, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == 400 and message in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert error["code"] == ("context_length_exceeded" if "hold" in message else None)


@pytest.mark.parametrize("kind", VALID)
def test_values_that_change_nothing_are_taken(url, kind) -> None:
    more = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None, "user": "me", "stop": None, "n": 1, "top_k": -1}
    more |= {"stop_token_ids": [1], "skip_special_tokens": False, "temperature": 0, "max_tokens": 2}
    assert httpx2.post(f"{url}/v1/{kind}", json=VALID[kind] | more).status_code == 200


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("completions", {"prompt": ""}, "the prompt is empty"),
        ("completions", {"prompt": []}, "the prompt is empty"),
        ("completions", {"prompt": ["1", ""]}, "the prompt is empty"),
        ("completions", {}, "prompt: missing"),
        ("completions", {"prompt": [5, 99]}, "prompt: 99: no token id; there are 0 to 40"),
        ("completions", {"prompt": [5, True]}, "prompt"),
        ("completions", {"prompt": "1" * CONTEXT}, "128 tokens of the prompt and 16 of the answer"),
        ("completions", {"prompt": "a\ud800"}, "half of a surrogate pair"),
        ("chat/completions", {"messages": []}, "messages: []"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "1"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content: missing"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "user", "content": "1" * CONTEXT}]}, "130 tokens of the prompt"),
        ("chat/completions", [], "the body: []"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(url, kind, body, message) -> None:
    reply = httpx2.post(f"{url}/v1/{kind}", content=json.dumps(body), headers={"content-type": "application/json"})
    assert (reply.status_code, message in reply.json()["error"]["message"]) == (400, True), reply.text


def test_a_text_with_a_token_that_the_model_does_not_embed_is_refused(checkpoint) -> None:
    """As Gemma 3's tokenizer has one for images, which its text models lack."""
    tokenizer = symbol_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    with served(replace(checkpoint, tokenizer=tokenizer)) as (url, _):
        for kind, body in (
            ("completions", {"prompt": "1<image>"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "<image>"}]}),
        ):
            reply = httpx2.post(f"{url}/v1/{kind}", json={"model": NAME, **body})
            assert reply.status_code == 400 and "41: no token id; there are 0 to 40" in reply.text


@pytest.mark.parametrize("content", [b"{", b"\xff", b"", b"[" * 100_000])
def test_a_body_that_is_no_json_is_refused(url, content) -> None:
    reply = httpx2.post(f"{url}/v1/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_addresses_that_are_not_there_answer_in_the_same_form(url) -> None:
    assert httpx2.get(f"{url}/v1/embeddings").json()["error"]["message"] == "GET /v1/embeddings: Not Found"
    assert httpx2.get(f"{url}/v1/completions").status_code == 405


def slow(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, gate: object) -> None:
    """Steps of the engine wait for the gate, so that requests stay in progress."""
    from lt_train.inference.continuous_batch import ContinuousBatch

    step = ContinuousBatch.step
    monkeypatch.setattr(ContinuousBatch, "step", lambda batch: (gate.wait(20), step(batch))[1])


@pytest.fixture
def gate(checkpoint, monkeypatch):
    import threading

    event = threading.Event()
    slow(checkpoint, monkeypatch, event)
    yield event
    event.set()


ENDLESS = {"prompt": "q", "temperature": 0, "max_tokens": 100, "model": NAME}


def test_a_full_queue_is_429_with_the_time_to_come_back(checkpoint, gate) -> None:
    with served(checkpoint, max_slots=1, max_waiting=1) as (url, engine), ThreadPoolExecutor(2) as pool:
        requested = [pool.submit(httpx2.post, f"{url}/v1/completions", json=ENDLESS, timeout=60) for _ in range(2)]
        until(lambda: engine.requests == 2)
        refused = httpx2.post(f"{url}/v1/completions", json=ENDLESS)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        gate.set()
        assert [each.result().status_code for each in requested] == [200, 200]
        assert engine.requests == 0
        assert httpx2.post(f"{url}/v1/completions", json=ENDLESS).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(checkpoint, gate, stream) -> None:
    with served(checkpoint, max_slots=1) as (url, engine):
        with httpx2.Client() as client, pytest.raises(httpx2.ReadTimeout):
            reply = client.stream("POST", f"{url}/v1/completions", json=ENDLESS | {"stream": stream}, timeout=0.2)
            with reply as open_reply:
                open_reply.read()
        until(lambda: engine.requests == 0)
        gate.set()
        until(lambda: engine._batch.is_empty)
        assert engine._batch.store.lengths == [] and engine._places == {}
        assert httpx2.post(f"{url}/v1/completions", json=ENDLESS).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_answers_in_progress_end_with_an_error_when_the_server_stops(checkpoint, gate, stream) -> None:
    with served(checkpoint) as (url, engine), ThreadPoolExecutor(1) as pool:
        requested = pool.submit(httpx2.post, f"{url}/v1/completions", json=ENDLESS | {"stream": stream}, timeout=60)
        until(lambda: engine.requests == 1)
        engine.stop()
        gate.set()
        reply = requested.result()
        assert "the server is stopping" in reply.text and '"type":"server_error"' in reply.text.replace('": ', '":')
        assert reply.status_code == (200 if stream else 503)
        assert httpx2.get(f"{url}/health").status_code == 503
        assert httpx2.post(f"{url}/v1/completions", json=ENDLESS).status_code == 503


def test_a_failure_of_the_engine_reaches_its_clients(checkpoint, monkeypatch) -> None:
    from lt_train.inference.continuous_batch import ContinuousBatch

    monkeypatch.setattr(ContinuousBatch, "step", lambda batch: 1 / 0)
    with served(checkpoint) as (url, engine):
        reply = httpx2.post(f"{url}/v1/completions", json=ENDLESS)
        assert reply.status_code == 503 and "the engine failed: division by zero" in reply.text
        assert isinstance(engine.failure, ZeroDivisionError)


def test_what_a_request_leaves_open_comes_from_the_generation_config(checkpoint) -> None:
    assert checkpoint.sampling == Sampling(0.0, 1.0, 1)
    model = symbol_hybrid()
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)
    expected = Sampling(0.6, 0.95, 1, top_k=20, repetition_penalty=1.1)
    assert replace(checkpoint, model=model).sampling == expected
    model.generation_config.update(do_sample=False)
    assert replace(checkpoint, model=model).sampling == Sampling(0.0, 1.0, 1, repetition_penalty=1.1)
