"""A reply that no client can use costs a retry and no answer, whatever it holds; the key is printed nowhere."""

import json
import time
from urllib.parse import quote

import pytest

from data.tiny_tokenizer import build_tokenizer
from lt_train.inference.requests import Request, Sampling, sample_seed
from lt_train.inference.servers.backend import OpenAIBackend
from lt_train.inference.servers.pool import ServerSettings
from lt_train.runtime.errors import UserError
from tests.support.misbehaving_server import MisbehavingServer, first

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=64)
TOKENIZER = build_tokenizer()
KEY = "sk-secret/key+1234=="
DEEP = b"[" * 100_000 + b"]" * 100_000


def a_choice(**fields):
    return {"choices": [{"text": "", "finish_reason": "stop"} | fields], "usage": {"prompt_tokens": 3, "completion_tokens": 0}}


def with_usage(**fields):
    return {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {"prompt_tokens": 3} | fields}


UNUSABLE = {
    "deeply nested": DEEP,
    "deeply nested inside": b'{"choices": [{"text": "x", "finish_reason": "stop", "text": ' + DEEP + b"}]}",
    "deeply nested where nobody looks": b'{"choices": [{"text": "x", "finish_reason": "stop"}], "more": ' + DEEP + b"}",
    "a number of 5,000 digits": b'{"choices": [], "usage": {"completion_tokens": ' + b"9" * 5000 + b"}}",
    "bytes that are no UTF-8": b'{"choices": [{"text": "\xff\xfe", "finish_reason": "stop"}]}',
    "a lone surrogate": b'{"choices": [{"text": "\\ud800", "finish_reason": "stop"}]}',
    "a lone surrogate in the reasoning": b'{"choices": [{"message": {"reasoning": "\\udfff"}, "finish_reason": "stop"}]}',
    "a lone surrogate as finish_reason": a_choice(finish_reason="\ud800"),
    "a negative token": a_choice(token_ids=[-1]),
    "a token beyond the vocabulary": a_choice(token_ids=[10_000_000]),
    "a token beyond 64 bits": a_choice(token_ids=[2**70]),
    "a token that is a string": a_choice(token_ids=["5"]),
    "a token that is true": a_choice(token_ids=[True]),
    "a fractional token": a_choice(token_ids=[5.5]),
    "a list as text": a_choice(text=["x"]),
    "a number as message": a_choice(message=5),
    "a list as finish_reason": a_choice(finish_reason=["stop"]),
    "an infinite log-probability": a_choice(logprobs={"token_logprobs": [float("-inf")]}),
    "a log-probability that is no number": a_choice(logprobs={"token_logprobs": ["a"]}),
    "two choices": {"choices": [{"text": "x", "finish_reason": "stop"}] * 2},
    "choices as object": {"choices": {"0": {"text": "x", "finish_reason": "stop"}}},
    "a negative count": with_usage(completion_tokens=-5),
    "a count beyond 64 bits": with_usage(completion_tokens=10**30),
    "a count of no number": with_usage(completion_tokens=float("nan")),
    "more tokens than were allowed": with_usage(completion_tokens=10_000),
    "a prompt beyond 64 bits": with_usage(prompt_tokens=10**30),
    "usage as list": {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": [1]},
    "an error without a message": {"error": [[]]},
}


@pytest.fixture
def server():
    with MisbehavingServer() as server:
        yield server


def requests_for(count):
    return [Request(f"problem {n}", 0, sample_seed(7, f"problem {n}", 0), (5, 6, 10 + n)) for n in range(count)]


def texts(server, count=3, report=lambda line: None, **settings):
    backend = OpenAIBackend(TOKENIZER, (1,), ServerSettings((server.url,), backoff=0.02, **settings), report=report)
    return {answer.request.problem: answer.text for answer in backend.answers(requests_for(count), GREEDY)}


def correct(count=3):
    return {request.problem: f"answer to {list(request.prompt_ids)}" for request in requests_for(count)}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("reply", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_reply_costs_a_retry_and_no_answer(server, reply, streamed):
    data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()

    def send(handler, body):
        if streamed:
            handler.begin_stream()
            handler.send_chunk(b"data: " + data + b"\n\n")
            handler.send_chunk(b"")
        else:
            handler.send_bytes(200, data)

    server.misbehave = first(2, send)
    lines = []
    assert texts(server, report=lines.append) == correct()
    assert lines and all(len(line) < 800 for line in lines)


@pytest.mark.parametrize("value", ["1e400", "nan", "-5", "inf", "86400", "soon", "Wed, 21 Oct 99999999 07:28:00 GMT", "9" * 4000])
def test_no_retry_after_makes_a_wait_without_end(server, value):
    server.misbehave = first(1, lambda handler, body: handler.send_json(429, {}, retry_after=value))
    started = time.monotonic()
    assert texts(server) == correct()
    assert time.monotonic() - started < 20


def test_an_unusable_reply_to_a_probe_is_a_failure_of_the_server(server):
    server.models = [5]
    server.known = {}
    assert texts(server) == correct()
    server.text = lambda body: "\ud800"
    with pytest.raises(UserError, match="no server answers any more"):
        texts(server, failures=3)


def test_a_stream_without_end_is_ended_by_the_timeout(server):
    def drip(handler, body):
        handler.begin_stream()
        while True:
            handler.send_event({"choices": [{"text": "x"}]})
            time.sleep(0.05)

    server.misbehave = first(1, drip)
    lines = []
    assert texts(server, report=lines.append, timeout=0.5) == correct()
    assert "(timeout)" in lines[0]


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
@pytest.mark.parametrize("form", [KEY, KEY.replace("/", r"\/"), quote(KEY, safe="")])
def test_a_key_that_a_server_echoes_is_printed_nowhere(server, status, form):
    server.misbehave = lambda handler, body: handler.send_bytes(status, f"[/b] {'x' * 450} wrong key {form}".encode()) or True
    lines = []
    with pytest.raises(UserError) as error:
        texts(server, report=lines.append, api_key=KEY, attempts=1, failures=2)
    printed = "\n".join([str(error.value), *lines])
    assert "secret" not in printed and "wrong key ***" in printed
    assert KEY not in repr(ServerSettings((server.url,), api_key=KEY))


def test_an_answer_that_holds_the_key_is_no_answer(server):
    server.misbehave = first(1, lambda handler, body: handler.send_json(200, a_choice(text=f"Bearer {KEY}")))
    assert texts(server, api_key=KEY) == correct()
    server.text = lambda body: "EMPTY set"
    assert set(texts(server, api_key="EMPTY").values()) == {"EMPTY set"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(urls=("http://me:hunter2@host:8000",)), "eval.servers: an address holds a password"),
        (dict(urls=("http://host:8000",), api_key="sk-hunter2\n"), "OPENAI_API_KEY: it holds a character"),
        (dict(urls=("http://host:8000",), api_key="sk-hünter2"), "OPENAI_API_KEY: it holds a character"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_without_printing_it(settings, said):
    with pytest.raises(UserError, match=said) as error:
        ServerSettings(**settings)
    assert "nter2" not in str(error.value)
