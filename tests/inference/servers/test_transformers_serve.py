"""A real server: `transformers serve`. vLLM's is in vllm_plugin/test_in_vllm.py."""

import json
import sys
from functools import cache

import pytest
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from lt_train.inference.requests import Request
from lt_train.inference.servers.backend import OpenAIBackend
from lt_train.inference.servers.check import chat_messages, check_server
from lt_train.inference.servers.pool import ServerSettings
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError
from tests.support import processes
from tests.support.graders import graders_are_kept
from tests.support.real_servers import until_it_answers
from tests.support.repository import ENVIRONMENT, REPOSITORY
from tests.support.runs import run_in_folder
from tests.support.streaming_reasoner import (
    BASE,
    DRAWN,
    GREEDY,
    LAZY,
    PROBLEMS,
    STOP,
    by_transformers,
    exported,
    hybrid,
    ledger_requests,
)
from tests.support.tiny_exports import exports_are_not_checked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tokenizer):
    """Kind -> folder, made when it is first requested."""
    return cache(lambda kind: exported(kind, tokenizer, tmp_path_factory.mktemp("exports") / "export"))


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    """Loads whatever folder a request names."""
    if not is_serve_available():
        pytest.skip('`transformers serve` is not installed: pip install "transformers[serving]"')
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--host", "localhost"]
    log, port = tmp_path_factory.mktemp("serve") / "log", processes.free_port()
    process = processes.popen([*command, "--trust-remote-code", "--port", str(port)], log, env=ENVIRONMENT)
    with until_it_answers(process, url := f"http://localhost:{port}", log, seconds=180):
        yield url


def texts(answers):
    return {answer.request.problem: answer.text for answer in answers}


def test_transformers_serve_gives_the_greedy_answers_of_the_stock_class(transformers_serve, exports, tokenizer):
    requests, _ = ledger_requests(tokenizer, 2)
    backend = OpenAIBackend(tokenizer, STOP, ServerSettings((transformers_serve,), model=str(exports("no sinks"))))
    answers = list(backend.answers(requests, GREEDY))
    assert texts(answers) == by_transformers(exports("no sinks"), tokenizer, requests)
    assert all(answer.finish_reason == "stop" and answer.thinking_tokens for answer in answers)


def test_transformers_serve_draws_by_our_settings_and_the_samples_seed(transformers_serve, exports, tokenizer):
    requests, _ = ledger_requests(tokenizer, 2)
    backend = OpenAIBackend(tokenizer, STOP, ServerSettings((transformers_serve,), model=str(exports("no sinks"))))
    drawn = texts(backend.answers(requests, DRAWN))
    assert texts(backend.answers(list(reversed(requests)), DRAWN)) == drawn
    assert drawn != texts(backend.answers([Request(r.problem, 1, r.seed ^ (1 << 60), r.prompt_ids) for r in requests], DRAWN))


def test_transformers_serve_is_checked_against_the_checkpoint(transformers_serve, exports, tokenizer, tmp_path):
    reference = hybrid("no sinks")
    settings = ServerSettings((transformers_serve,), model=str(exports("no sinks")))
    check = check_server(settings, reference, exports("no sinks"), tokenizer, Prompt(), STOP)
    assert check.tokens > 40 and check.undetectable == ()
    with pytest.raises(UserError, match="layer_types"):
        other = ServerSettings((transformers_serve,), model=str(BASE))
        check_server(other, reference, exports("no sinks"), tokenizer, Prompt(), STOP)


def test_transformers_serve_computes_no_sinks(transformers_serve, exports, tokenizer):
    settings, reference = ServerSettings((transformers_serve,), model=str(exports("no sinks"))), hybrid("sink tokens")
    with pytest.raises(UserError, match="computes something else"):  # the config says nothing here: as if served elsewhere
        check_server(settings, reference, exports("no sinks"), tokenizer, Prompt(), STOP)


def test_transformers_serve_does_not_load_code_beside_a_checkpoint(transformers_serve, exports, tokenizer):
    requests, _ = ledger_requests(tokenizer, 1)
    settings = ServerSettings((transformers_serve,), model=str(exports("sink tokens")), failures=2, backoff=0.1)
    # Its reply is 500, and under Python 3.13 none at all.
    with pytest.raises(UserError, match="no server answers any more; each failed 2 times"):
        list(OpenAIBackend(tokenizer, STOP, settings).answers(requests, GREEDY))


def test_messages_are_read_as_the_recipes_prompt(transformers_serve, exports, tokenizer, monkeypatch):
    monkeypatch.setattr("lt_train.inference.servers.client.text_of_prompt", lambda *_: None)
    requests, questions = ledger_requests(tokenizer, 1)
    settings = ServerSettings((transformers_serve,), model=str(exports("no sinks")))
    backend = OpenAIBackend(tokenizer, STOP, settings, messages=lambda request: chat_messages(Prompt(), questions[request.problem]))
    assert texts(backend.answers(requests, GREEDY)) == by_transformers(exports("no sinks"), tokenizer, requests)
    other = OpenAIBackend(tokenizer, STOP, settings, messages=lambda request: chat_messages(Prompt(system="1 2 3"), "4"))
    with pytest.raises(UserError, match="chat template is another one"):
        list(other.answers(requests, GREEDY))


def test_a_run_evaluates_its_export_by_a_server(transformers_serve, tmp_path):
    """The answers of the server are those of the built-in engine, sample by sample."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: served\nmodel: {{base: {BASE}, dtype: fp32}}\nhybrid: {{layers: {list(LAZY)}, w_sink: 0, w_recent: 28}}\n"
        f"data: {{source: {REPOSITORY}/data/ledger/train.jsonl, format: still, max_length: 256, limit: 4}}\n"
    )
    problems = f"benchmark: ledger, path: {PROBLEMS}, limit: 5, max_new_tokens: 60"
    server = f"backend: openai, servers: [{transformers_serve}], served_model: {tmp_path}/runs/served/export"
    built_in, served = f"{{{problems}, name: built-in}}", f"{{{problems}, name: served, {server}}}"

    with pytest.raises(UserError, match="Export first"):
        work(recipe, tmp_path, f"[{served}]")
    with exports_are_not_checked(), graders_are_kept():
        work(recipe, tmp_path, f"[{built_in}]", "export")
        work(recipe, tmp_path, f"[{built_in}, {served}]")
    texts = [written(tmp_path / "runs/served/eval/converted" / name / "samples.jsonl") for name in ("built-in", "served")]
    assert texts[0] == texts[1] and len(texts[0]) == 5
    checked = json.loads((tmp_path / "runs/served/eval/converted/served/servers.json").read_text())
    assert checked["servers"] == [transformers_serve] and checked["tokens"] > 40


def work(recipe, folder, evaluations, stage="eval"):
    run_in_folder(load_recipe(recipe, [f"eval={evaluations}"]), folder / "runs", stage)


def written(samples):
    return {row["problem"]: row["text"] for row in map(json.loads, samples.read_text().splitlines())}
