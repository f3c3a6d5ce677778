"""Answers from servers that misbehave. All over real sockets."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tiny_tokenizer import build_tokenizer
from lt_train.inference.requests import Request, Sampling, sample_seed
from lt_train.inference.servers.backend import OpenAIBackend, SharedTime, read_answer
from lt_train.inference.servers.completions_api import Completion
from lt_train.inference.servers.pool import Health, ServerFailure, ServerSettings
from lt_train.runtime.errors import UserError
from tests.support.misbehaving_server import (
    MisbehavingServer,
    cut_in_the_middle,
    cut_json,
    end_early,
    error_500,
    first,
    hang,
    stall,
)

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=64)
DRAWN = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=64)
TOKENIZER = build_tokenizer()
GARBAGE = [
    b"<html>502</html>",
    b"[]",
    b"null",
    b"{}",
    b'{"choices": []}',
    b'{"choices": [3]}',
    b'{"choices": [{"text": 7, "finish_reason": "stop"}]}',
    b'{"choices": [{"text": "no finish_reason"}]}',
    b'{"choices": [{"text": "", "finish_reason": "stop"}], "usage": [1]}',
    b'{"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"prompt_tokens": "three"}}',
    b'{"choices": [{"text": "half", "finish_reason": "abort"}]}',
    b'{"error": {"message": "engine is dead"}}',
]


@pytest.fixture
def server():
    with MisbehavingServer() as server:
        yield server


def requests_for(count):
    return [Request(f"problem {n}", 0, sample_seed(7, f"problem {n}", 0), (5, 6, 10 + n)) for n in range(count)]


def backend(*servers, messages=None, report=lambda line: None, **settings):
    urls = tuple(server if isinstance(server, str) else server.url for server in servers)
    patience = {"backoff": 0.02, "timeout": 20.0, "stall": 10.0} | settings
    return OpenAIBackend(TOKENIZER, (1,), ServerSettings(urls, **patience), messages=messages, report=report)


def texts(answers):
    return {answer.request.problem: answer.text for answer in answers}


def expected(requests):
    return {request.problem: f"answer to {list(request.prompt_ids)}" for request in requests}


def no_thread_left():
    """Of the servers' own threads apart."""
    return not [thread for thread in threading.enumerate() if thread.name.startswith(("openai", "asyncio"))]


def test_every_request_is_answered_once_by_its_own_answer(server):
    requests = requests_for(40)
    watched = []
    answers = list(backend(server).answers(requests, GREEDY, watched.append))
    assert sum(watched) == sum(answer.tokens for answer in answers)
    assert len(answers) == 40 and texts(answers) == expected(requests)
    assert {answer.finish_reason for answer in answers} == {"stop"} and {answer.tokens for answer in answers} == {5}
    assert no_thread_left()


def test_no_more_requests_are_in_flight_than_requested(server):
    server.misbehave = lambda handler, body: time.sleep(0.05) or False
    list(backend(server, concurrency=3).answers(requests_for(12), GREEDY))
    assert server.most_in_flight == 3


def test_answers_come_as_they_are_done(server):
    slow = requests_for(5)[0]
    server.misbehave = lambda handler, body: (body["prompt"] == list(slow.prompt_ids) and time.sleep(0.3)) or False
    assert [answer.request.problem for answer in backend(server).answers(requests_for(5), GREEDY)][-1] == slow.problem


def test_all_that_decides_how_tokens_are_chosen_is_sent(server):
    sampling = Sampling(0.7, 0.9, 64, top_k=20, min_p=0.05, repetition_penalty=1.1, stop=("###",))
    requests = requests_for(2)
    list(backend(server, concurrency=1).answers(requests, sampling))
    sent = server.bodies[0]
    expected = dict(temperature=0.7, top_p=0.9, max_tokens=64, top_k=20, min_p=0.05, repetition_penalty=1.1, stop=["###"])
    assert {name: sent[name] for name in expected} == expected
    assert sent["model"] == "tiny" and sent["prompt"] == [5, 6, 10]
    assert [body["seed"] for body in server.bodies] == [request.seed >> 33 for request in requests]
    assert server.bodies[0]["seed"] != server.bodies[1]["seed"]


def test_settings_left_at_their_defaults_are_sent_too_for_the_server_may_have_others(server):
    list(backend(server).answers(requests_for(1), DRAWN))
    assert {name: server.bodies[0][name] for name in server.known} == {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize("setting", [{"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_a_server_that_ignores_a_sampling_setting_is_refused(server, setting):
    server.known = {}
    with pytest.raises(UserError, match=f"does not know {next(iter(setting))}"):
        list(backend(server).answers(requests_for(2), Sampling(0.7, 0.9, 64, **setting)))
    assert not server.bodies
    assert len(list(backend(server).answers(requests_for(2), DRAWN))) == 2


@pytest.mark.parametrize(
    "misbehaviour",
    [stall, hang, cut_in_the_middle, cut_json, end_early, error_500]
    + [lambda handler, body, data=data: handler.send_bytes(200, data) for data in GARBAGE]
    + [lambda handler, body: handler.send_json(503, {"error": "overloaded"})],
)
def test_a_server_that_fails_a_few_times_costs_no_answer(server, misbehaviour):
    server.misbehave = first(2, misbehaviour)
    requests = requests_for(6)
    answers = list(backend(server, timeout=0.5, stall=0.2).answers(requests, GREEDY))
    assert len(answers) == 6 and texts(answers) == expected(requests)


def test_a_server_that_stalls_in_the_middle_of_an_answer_is_not_waited_for_until_the_timeout(server):
    server.misbehave = first(1, stall)
    lines = []
    requests = requests_for(2)
    answers = list(backend(server, timeout=60.0, stall=0.3, report=lines.append).answers(requests, GREEDY))
    assert texts(answers) == expected(requests) and "(stall)" in lines[0]


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(server):
    times = []

    def limit(handler, body):
        times.append(time.monotonic())
        handler.send_json(429, {"error": "slow down"}, retry_after="0.3")

    server.misbehave = first(1, limit)
    requests = requests_for(3)
    answers = list(backend(server, concurrency=1).answers(requests, GREEDY))
    assert texts(answers) == expected(requests)
    assert time.monotonic() - times[0] >= 0.3


def test_rate_limits_use_up_no_attempts_of_a_request(server):
    server.misbehave = first(6, lambda handler, body: handler.send_json(429, {}, retry_after="0"))
    assert len(list(backend(server, concurrency=1, attempts=2, failures=10).answers(requests_for(1), GREEDY))) == 1


def test_what_a_dead_server_leaves_is_answered_by_the_others(server):
    requests = requests_for(30)
    with MisbehavingServer() as other:
        dying = first(1, lambda handler, body: (threading.Thread(target=other.die).start(), time.sleep(0.2), handler.cut()))
        other.misbehave = dying
        server.misbehave = lambda handler, body: time.sleep(0.03) or False
        answers = list(backend(server, other, concurrency=2, failures=3).answers(requests, GREEDY))
        assert len(answers) == 30 and texts(answers) == expected(requests)
        assert other.bodies and server.bodies


def test_several_servers_share_the_work(server):
    with MisbehavingServer() as other:
        for each in (server, other):
            each.misbehave = lambda handler, body: time.sleep(0.03) or False
        list(backend(server, other, concurrency=2).answers(requests_for(20), GREEDY))
        assert min(len(server.bodies), len(other.bodies)) >= 5


def test_when_all_servers_are_gone_the_finished_answers_have_come_and_the_error_says_what_to_do(server):
    requests = requests_for(10)
    server.misbehave = first(1, lambda handler, body: (server.die(), handler.cut()))
    plan = iter([False] * 4 + [True] * 100)
    dying = server.misbehave
    server.misbehave = lambda handler, body: next(plan) and dying(handler, body)
    finished = []
    with pytest.raises(UserError, match=r"no server answers any more(.|\n)*same command"):
        for answer in backend(server, concurrency=1, failures=3).answers(requests, GREEDY):
            finished.append(answer)
    assert len(finished) == 4
    assert no_thread_left()


def test_a_server_that_comes_back_is_used_again(server):
    port = server.port
    back = []

    def restart():
        server.die()
        time.sleep(0.3)
        back.append(MisbehavingServer(port))

    server.misbehave = first(1, lambda handler, body: (threading.Thread(target=restart).start(), handler.cut()))
    requests = requests_for(5)
    try:
        answers = list(backend(server, concurrency=1, backoff=0.1, failures=20).answers(requests, GREEDY))
        assert texts(answers) == expected(requests)
    finally:
        for again in back:
            again.die()


def test_one_request_that_always_breaks_the_server_does_not_stop_the_others(server):
    requests = requests_for(8)
    poison = list(requests[2].prompt_ids)
    server.misbehave = lambda handler, body: body["prompt"] == poison and (error_500(handler, body) or True)
    finished = []
    with pytest.raises(UserError, match=r"1 of 8 requests failed 3 times each, .* problem 2(.|\n)*device-side"):
        for answer in backend(server, attempts=3).answers(requests, GREEDY):
            finished.append(answer)
    assert len(finished) == 7


def test_a_server_that_breaks_on_every_request_though_it_takes_them_is_not_queried_for_ever(server):
    server.misbehave = lambda handler, body: cut_in_the_middle(handler, body) or True
    with pytest.raises(UserError, match=r"failed|no server answers"):
        list(backend(server, concurrency=2, attempts=2).answers(requests_for(200), GREEDY))
    assert len(server.bodies) < 40


def test_many_requests_that_break_together_count_as_one_failure_of_the_server(server):
    arrived = threading.Barrier(8)
    server.misbehave = first(8, lambda handler, body: (arrived.wait(5), handler.cut()))
    requests = requests_for(8)
    answers = list(backend(server, concurrency=8, failures=3).answers(requests, GREEDY))
    assert texts(answers) == expected(requests)


@pytest.mark.parametrize("status, reason", [(400, "context"), (401, "OPENAI_API_KEY"), (404, "no such model"), (422, "field")])
def test_a_refused_request_is_not_sent_again(server, status, reason):
    server.misbehave = lambda handler, body: handler.send_json(status, {"error": reason}) or True
    with pytest.raises(UserError, match=reason):
        list(backend(server, concurrency=1).answers(requests_for(3), GREEDY))
    assert len(server.bodies) == 1


def test_a_consumer_that_stops_early_leaves_no_thread(server):
    server.misbehave = lambda handler, body: (len(server.bodies) > 2 and time.sleep(3)) or False
    started = time.monotonic()
    answers = backend(server).answers(requests_for(10), GREEDY)
    next(answers)
    answers.close()
    assert no_thread_left() and time.monotonic() - started < 2


def test_a_mistake_of_ours_goes_up_as_it_is(server, monkeypatch):
    monkeypatch.setattr("lt_train.inference.servers.client.request_body", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(backend(server).answers(requests_for(2), GREEDY))
    assert no_thread_left()


def test_a_server_that_does_not_stream_is_read_whole(server):
    server.streams = False
    requests = requests_for(3)
    assert texts(backend(server).answers(requests, GREEDY)) == expected(requests)


def test_a_server_that_reads_another_prompt_is_refused(server):
    server.count_prompt = lambda body: len(body["prompt"]) + 1
    with pytest.raises(UserError, match="read 4 prompt tokens for problem problem 0, the recipe's prompt has 3"):
        list(backend(server).answers(requests_for(2), GREEDY))
    server.count_prompt = lambda body: len(body["prompt"]) + (body["max_tokens"] > 1)  # of this one only
    with pytest.raises(UserError, match="read 4 prompt tokens"):
        list(backend(server).answers(requests_for(2), GREEDY))


def test_messages_go_to_a_server_that_takes_nothing_else(server):
    server.accepts = {"messages"}
    server.count_prompt = lambda body: 3
    server.text = lambda body: f"answer to {body['messages']}"
    requests = requests_for(2)
    answers = backend(server, messages=lambda request: [{"role": "user", "content": request.problem}]).answers(requests, GREEDY)
    assert texts(answers)["problem 1"] == "answer to [{'role': 'user', 'content': 'problem 1'}]"
    server.count_prompt = lambda body: 9
    with pytest.raises(UserError, match="chat template is another one"):
        list(backend(server, messages=lambda request: [{"role": "user", "content": ""}]).answers(requests, GREEDY))


def test_text_goes_to_a_server_that_takes_no_token_ids(server):
    server.accepts = {"text"}
    server.count_prompt = lambda body: len(TOKENIZER(body["prompt"])["input_ids"])
    requests = requests_for(2)
    assert texts(backend(server).answers(requests, GREEDY))["problem 0"] == f"answer to {TOKENIZER.decode([5, 6, 10])}"


def test_an_answer_cut_before_the_limit_is_refused(server):
    usage = {"completion_tokens": 5, "prompt_tokens": 3}
    server.misbehave = lambda handler, body: (
        handler.send_json(200, {"choices": [{"text": "x", "finish_reason": "length"}], "usage": usage}) or True
    )
    with pytest.raises(UserError, match=r"max_new_tokens: 64: .* truncated an answer at 5 tokens"):
        list(backend(server).answers(requests_for(1), GREEDY))


def test_one_of_several_served_models_must_be_named(server):
    server.models = ["one", "two"]
    with pytest.raises(UserError, match="one, two"):
        list(backend(server).answers(requests_for(1), GREEDY))
    assert len(list(backend(server, model="two").answers(requests_for(1), GREEDY))) == 1
    assert server.bodies[0]["model"] == "two"


@pytest.mark.parametrize("urls", [(), ("localhost:8000",), ("http://a:1", "http://a:1/v1/")])
def test_addresses_that_cannot_be_meant_are_refused(urls):
    with pytest.raises(UserError, match="servers"):
        ServerSettings(urls)


def test_a_thinking_budget_is_refused(server):
    with pytest.raises(UserError, match="thinking_budget"):
        list(backend(server).answers(requests_for(1), Sampling(0.0, 1.0, 64, thinking_budget=10)))


# --- reading answers ---


def completion(**given):
    return Completion(**dict(finish_reason="stop", prompt_tokens=3) | given)


def read(sampling=GREEDY, tokenizer=TOKENIZER, **given):
    return read_answer(tokenizer, (1,), requests_for(1)[0], completion(**given), sampling, 1.0)


def test_token_ids_are_read_without_the_stop_token_but_count_it():
    ids = (*TOKENIZER("ab c")["input_ids"], 1)
    answer = read(token_ids=ids, text="ab c", completion_tokens=5)
    assert (answer.text, answer.tokens, answer.finish_reason) == (TOKENIZER.decode(ids[:-1]), 5, "stop")


def test_nothing_from_the_stop_string_on_is_part_of_an_answer():
    answer = read(Sampling(0.0, 1.0, 64, stop=("###",)), text="done### and more", completion_tokens=9)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("done", 9, "stop")


def test_a_thought_that_the_server_split_off_is_joined_as_the_model_wrote_it():
    answer = read(reasoning="hm", text="\n4", completion_tokens=8)
    assert answer.text == "<think>hm</think>\n4"
    assert answer.thinking_tokens == len(TOKENIZER("<think>hm</think>")["input_ids"])
    assert read(reasoning="hm", text="", finish_reason="length").text == "<think>hm"
    assert read(reasoning="hm", text="", finish_reason="length").thinking_tokens is None


def test_a_thought_that_the_prompt_opened_is_not_opened_again():
    prompt_ids = tuple(TOKENIZER("a<think>")["input_ids"])
    tokenizer = type("Tokenizer", (), {"__getattr__": lambda self, name: getattr(TOKENIZER, name)})()
    tokenizer.decode = lambda ids, **_: "a<think>\n" if tuple(ids) == prompt_ids else TOKENIZER.decode(ids)
    type(tokenizer).__call__ = lambda self, *a, **k: TOKENIZER(*a, **k)
    answer = read_answer(tokenizer, (1,), Request("p", 0, 0, prompt_ids), completion(reasoning="hm", text="4"), GREEDY, 1.0)
    assert answer.text == "hm</think>4"


# --- rests and shares of time ---


@given(st.integers(1, 40), st.floats(0.01, 10))
def test_a_server_rests_longer_with_each_consecutive_failure_up_to_a_minute(failures, backoff):
    health = Health()
    for number in range(failures):
        now = 1000.0 * number
        assert health.failed(ServerFailure("no"), now, now, backoff)
        rest = health.resting_until - now
        longest = min(60.0, backoff * 2**number)
        assert longest / 2 <= rest <= longest
    health.succeeded()
    assert health.consecutive_failures == 0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=12))
def test_the_shares_of_time_add_up_to_the_time_in_which_something_was_in_flight(spans):
    spans = [(min(span), max(span)) for span in spans]
    now = 0.0
    marks, seconds = [0.0] * len(spans), 0.0
    shared_time = SharedTime(lambda: now)
    events = sorted([(begin, 0, n) for n, (begin, _) in enumerate(spans)] + [(end, 1, n) for n, (_, end) in enumerate(spans)])
    busy, active = 0.0, 0
    for at, kind, n in events:
        busy += (at - now) if active else 0.0
        now = at
        if kind == 0:
            marks[n] = shared_time.enter()
            active += 1
        else:
            seconds += shared_time.leave(marks[n])
            active -= 1
    assert seconds == pytest.approx(busy, abs=1e-6)
