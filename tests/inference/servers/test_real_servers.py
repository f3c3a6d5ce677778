"""Real servers: `transformers serve`, and vLLM where LT_TRAIN_VLLM_PYTHON names the python of an environment that has it."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from lt_train.dataset import prompts
from lt_train.export.checkpoint import export_hybrid
from lt_train.export.weights import in_memory
from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Request, Sampling, sample_seed
from lt_train.inference.servers.backend import OpenAIBackend
from lt_train.inference.servers.check import chat_messages, check_server
from lt_train.inference.servers.pool import ServerSettings
from lt_train.inference.sinks_file import learned_sinks
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError
from tests.support.processes import checks_of_exports_are_forked
from tests.support.runs import run_in_folder
from tests.support.tiny_exports import metadata
from tests.support.vllm_python import python_of_vllm

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[3] / "data"
LAUNCH = Path(__file__).parents[3] / "launch"
BASE = DATA / "tiny-reasoner"
LAZY = (1, 3, 5, 7)
WITHOUT_SINKS = HybridSpec(8, LAZY, 0, 28)
SPECS = {
    "no sinks": WITHOUT_SINKS,
    "learned sinks": HybridSpec(8, LAZY, 0, 28, learned_sinks=True),
    "sink tokens": HybridSpec(8, LAZY, 4, 28),
    "KV heads": HybridSpec(8, (1, 5), 0, 28, split_layers=((3, (1,)), (4, (0,)), (7, (0,)))),
    "KV heads, sink tokens": HybridSpec(8, (1, 5), 4, 28, split_layers=((3, (1,)), (4, (0,)), (7, (0,)))),
}
BY_PLUGIN = [kind for kind in SPECS if kind != "no sinks"]
STOP = (3,)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=120)
DRAWN = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=60, top_k=50, min_p=0.01)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tokenizer):
    """Kind -> folder, made when it is first asked for."""

    @cache
    def made(kind):
        folder = tmp_path_factory.mktemp("exports") / "export"
        with checks_of_exports_are_forked():
            export_hybrid(in_memory(hybrid(kind)), tokenizer, folder, metadata(), dtype=torch.float32)
        return folder

    return made


def hybrid(kind):
    """Learned sinks have logits so large that answers change where they are left out."""
    model = load_hybrid(BASE, SPECS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for logits_H in learned_sinks(model).values():
            torch.nn.init.uniform_(logits_H, 0, 4)
    return model


@contextmanager
def running(command, log, ready_path, seconds=180):
    """A server's address, once it answers; `{port}` in the command is replaced by a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_ENGINE_READY_TIMEOUT_S"] = str(START)
    url = f"http://localhost:{port}"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [part.format(port=port) for part in command], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            deadline = time.monotonic() + seconds
            while not answers(url + ready_path):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"{command[0]} did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def answers(address):
    try:
        return httpx2.get(address, timeout=5).is_success
    except httpx2.HTTPError:
        return False


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    """Loads whatever folder a request names."""
    if not is_serve_available():
        pytest.skip('`transformers serve` is not installed: pip install "transformers[serving]"')
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--host", "localhost"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with running([*command, "--trust-remote-code", "--port", "{port}"], log, "/health") as url:
        yield url


START = 1500
"""Seconds after which a server that neither answers nor ends is taken for hanging: several may start on a busy machine."""
OPTIONS = ("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory, exports):
    """Serves the export without sinks, started by the script."""
    command = [
        "env",
        f"VLLM_PYTHON={python_of_vllm()}",
        str(LAUNCH / "serve-vllm.sh"),
        str(exports("no sinks")),
        "{port}",
        *OPTIONS,
    ]
    with running(command, tmp_path_factory.mktemp("vllm") / "log", "/health", seconds=START) as url:
        yield url


@pytest.fixture(scope="module", params=BY_PLUGIN)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def vllm_by_plugin(tmp_path_factory, exports, kind):
    """Started by `lt-train serve`. Prompts are read in chunks smaller than they are, and answers share what their prompts have in
    common."""
    chunked = ["--max-num-batched-tokens", "32", "--max-num-seqs", "16", "--enable-chunked-prefill", "--enable-prefix-caching"]
    blocks = ["--block-size", "32"]  # several in a prompt
    serve = [sys.executable, "-m", "lt_train", "serve", str(exports(kind)), "--vllm", python_of_vllm(), "--port", "{port}"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with running([*serve, "--kv-budget", "1GiB", "--", *OPTIONS, *chunked, *blocks], log, "/health", seconds=START) as url:
        yield url


def ledger_requests(tokenizer, count):
    rows = [json.loads(line) for line in (DATA / "ledger/test.jsonl").read_text().splitlines()[:count]]
    questions = {f"ledger {number}": row["problem"] for number, row in enumerate(rows)}
    made = [
        Request(name, 0, sample_seed(0, name, 0), tuple(prompts.prompt_ids(tokenizer, Prompt(), {"question": question})))
        for name, question in questions.items()
    ]
    return made, questions


@torch.inference_mode()
def by_transformers(folder, tokenizer, requests):
    """Greedy answers of the stock class."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = {}
    for request in requests:
        ids = model.generate(torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=GREEDY.max_new_tokens)
        new = ids[0, len(request.prompt_ids) :]
        texts[request.problem] = tokenizer.decode(new[:-1] if new[-1] in STOP else new)
    return texts


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
    with pytest.raises(UserError, match="500"):
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
        f"data: {{source: {DATA}/ledger/train.jsonl, format: still, max_length: 256, limit: 4}}\n"
    )
    problems = f"benchmark: ledger, path: {DATA}/ledger/test.jsonl, limit: 5, max_new_tokens: 60"
    server = f"backend: openai, servers: [{transformers_serve}], served_model: {tmp_path}/runs/served/export"
    built_in, served = f"{{{problems}, name: built-in}}", f"{{{problems}, name: served, {server}}}"

    with pytest.raises(UserError, match="Export first"):
        work(recipe, tmp_path, f"[{served}]")
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


def test_vllm_gives_the_greedy_answers_of_the_stock_class(vllm, exports, tokenizer):
    requests, _ = ledger_requests(tokenizer, 20)
    answers = list(OpenAIBackend(tokenizer, STOP, ServerSettings((vllm,))).answers(requests, GREEDY))
    assert texts(answers) == by_transformers(exports("no sinks"), tokenizer, requests)
    assert sum(answer.finish_reason == "stop" and bool(answer.thinking_tokens) for answer in answers) > 15


def test_vllm_draws_by_the_samples_seed(vllm, tokenizer):
    requests, _ = ledger_requests(tokenizer, 8)
    backend = OpenAIBackend(tokenizer, STOP, ServerSettings((vllm,)))
    assert texts(backend.answers(requests, DRAWN)) == texts(backend.answers(list(reversed(requests)), DRAWN))


def test_vllm_is_checked_against_the_checkpoint_by_tokens_and_probabilities(vllm, exports, tokenizer):
    settings = ServerSettings((vllm,))
    reference = hybrid("no sinks")
    check = check_server(settings, reference, exports("no sinks"), tokenizer, Prompt(), STOP)
    assert check.tokens == check.logprobs > 40
    for spec in (HybridSpec(8, LAZY, 4, 28), HybridSpec(8, (), 0, 28), HybridSpec(8, LAZY, 0, 16)):
        with pytest.raises(UserError, match="computes something else"):
            check_server(settings, load_hybrid(BASE, spec), exports("no sinks"), tokenizer, Prompt(), STOP)


def test_vllm_gives_the_greedy_answers_of_the_engine(vllm_by_plugin, kind, tokenizer):
    requests, _ = ledger_requests(tokenizer, 20)
    assert min(len(request.prompt_ids) for request in requests) > SPECS[kind].window
    by_engine = texts(Engine(hybrid(kind), tokenizer).answers(requests, GREEDY))
    for _ in range(2):  # the second time from cached prefixes
        answers = OpenAIBackend(tokenizer, STOP, ServerSettings((vllm_by_plugin,))).answers(requests, GREEDY)
        assert texts(answers) == by_engine
    assert texts(Engine(hybrid("no sinks"), tokenizer).answers(requests, GREEDY)) != by_engine


def test_vllm_is_checked_against_the_checkpoint_of_every_kind(vllm_by_plugin, kind, exports, tokenizer):
    settings = ServerSettings((vllm_by_plugin,))
    check = check_server(settings, hybrid(kind), exports(kind), tokenizer, Prompt(), STOP)
    assert check.tokens == check.logprobs > 40
    with pytest.raises(UserError, match="computes something else"):
        check_server(settings, hybrid("no sinks"), exports(kind), tokenizer, Prompt(), STOP)
