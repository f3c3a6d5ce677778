"""What runs in vLLM's own environment, whose python LT_TRAIN_VLLM_PYTHON names: kernels, block bookkeeping, answers, speed, and a
server that is started as users start it, but for vLLM's libraries, which its processes have imported when they begin.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lt_train.bench import vllm_speed
from lt_train.bench.base import StoredBase
from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Answer
from lt_train.inference.servers.backend import OpenAIBackend
from lt_train.inference.servers.check import check_server, compare_continuations, continue_greedily, distinguishing_prompts
from lt_train.inference.servers.completions_api import Completion
from lt_train.inference.servers.pool import ServerSettings
from lt_train.inference.servers.vllm_capacity import VllmCache
from lt_train.recipe.schema import Model, Prompt
from lt_train.runtime.errors import UserError
from tests.support import processes
from tests.support.launches import WARM_PYTHON
from tests.support.real_servers import until_it_answers
from tests.support.repository import REPOSITORY
from tests.support.streaming_reasoner import (
    BASE,
    DRAWN,
    GRANITE_SWA,
    GREEDY,
    SPECS,
    STOP,
    by_transformers,
    exported,
    hybrid,
    ledger_requests,
    text_of,
)
from tests.support.vllm_python import ForkedVllm, forked_vllm, python_of_vllm

pytestmark = pytest.mark.slow

KINDS = ["no sinks", "learned sinks", GRANITE_SWA, "sink tokens", "KV heads, sink tokens"]
SERVED = "KV heads"
"""The kind that the server computes."""
MIB = 2**20
SHORT = replace(GREEDY, max_new_tokens=40)  # more than a block of the cache holds


@pytest.fixture(scope="module")
def vllm() -> Iterator[ForkedVllm]:
    with forked_vllm() as forked:
        yield forked


def test_on_a_cpu_a_query_attends_to_what_the_mask_lets_it_see(vllm: ForkedVllm) -> None:
    cases, difference = vllm.printed("sink_kernels.py", "cpu", BASE)
    assert cases == 18 and difference < 1e-5


def test_for_a_gpu_vllms_triton_kernel_with_our_settings_attends_to_the_same(vllm: ForkedVllm) -> None:
    cases, difference = vllm.printed("in_interpreter.py", "sink_kernels.py", "gpu", BASE)
    assert cases == 4 and difference < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_query_attends_to_what_the_mask_says_it_sees(vllm: ForkedVllm) -> None:
    cases, difference = vllm.printed("sink_kernels.py", "gpu", BASE)
    assert cases == 18 and difference < 5e-3  # its products are in TF32


def test_every_query_finds_its_sinks_and_its_window_in_the_cache_whatever_is_freed_evicted_or_shared(vllm: ForkedVllm) -> None:
    tokens_from_cached_prefixes, preempted = vllm.printed("sink_blocks.py")
    assert tokens_from_cached_prefixes > 1000 and preempted > 100


def test_sequences_are_those_that_vllms_code_counts(vllm: ForkedVllm, tmp_path: Path) -> None:
    """Of every kind: no sinks, sink tokens, single KV heads in few layers and in many."""
    some, many = ((7, (0, 2)), (9, (1,))), tuple((layer, (1,)) for layer in range(13, 30))
    specs = [
        HybridSpec(30, tuple(range(21)), 0, 1024),
        HybridSpec(30, tuple(range(21)), 4, 1020),
        HybridSpec(30, tuple(range(5)), 4, 1020, split_layers=some),
        HybridSpec(30, tuple(range(13)), 0, 1024, split_layers=many),
    ]
    layer_tokens = 2**30 // (2 * 3 * 64 * 4)
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([[asdict(spec), 3, 8192, 512, layer_tokens] for spec in specs]))
    expected = [VllmCache(512, block=128).sequences(spec, 3, 8192, layer_tokens) for spec in specs]
    assert vllm.printed("capacity.py", BASE, cases) == pytest.approx(expected, rel=1e-12)


def test_the_base_is_decoded_with_as_many_sequences_and_as_long(vllm: ForkedVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_speed, "subprocess", SimpleNamespace(run=vllm.run))
    base = StoredBase(Model(base=str(BASE), dtype="fp32"))
    found = vllm_speed.vllm_steps(base, Path(python_of_vllm()), {40: 3, 300: 40}, 16 * MIB, vocab_size=50)
    assert list(found) == [40, 300] and all(0 < step.milliseconds < 60_000 for step in found.values())
    assert found[40].slots == 3 and 0 < found[300].slots < 40  # as many as its blocks hold


class Answers:
    """Of vLLM, to questions and to the prompts that distinguish a kind from the mistakes that engines make."""

    def __init__(self, vllm: ForkedVllm, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.requests, _ = ledger_requests(self.tokenizer, 3)
        self.exports = {kind: exported(kind, self.tokenizer, folder / kind / "export") for kind in KINDS}
        self.distinguishing = {kind: distinguishing_prompts(hybrid(kind), self.tokenizer, Prompt(), STOP)[1] for kind in KINDS}
        requested = [request.prompt_ids for request in self.requests]
        order = {
            "exports": {kind: str(path) for kind, path in self.exports.items()},
            "prompts": {kind: [*requested, *(one.prompt_ids for one in self.distinguishing[kind])] for kind in KINDS},
            "again": len(requested),
            "max_tokens": SHORT.max_new_tokens,
        }
        (folder / "order.json").write_text(json.dumps(order))
        ran = vllm.run([python_of_vllm(), "answers.py", folder / "order.json", folder / "result.json"])
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
        self.written = json.loads((folder / "result.json").read_text())

    def texts(self, kind: str, cached: bool) -> dict[str, str]:
        answers = zip(self.requests, self.written[kind][cached], strict=cached)
        return {request.problem: text_of(self.tokenizer, ids) for request, (ids, _) in answers}


@pytest.fixture(scope="module")
def answers(vllm: ForkedVllm, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(vllm, tmp_path_factory.mktemp("answers"))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_engines_and_those_from_cached_prefixes_too(answers: Answers, kind: str) -> None:
    assert min(len(request.prompt_ids) for request in answers.requests) > SPECS[kind].window
    by_engine = Engine(hybrid(kind), answers.tokenizer).answers(answers.requests, SHORT)
    expected = {answer.request.problem: answer.text for answer in by_engine}
    assert answers.texts(kind, cached=False) == answers.texts(kind, cached=True) == expected
    if kind != "no sinks":
        assert answers.texts("no sinks", cached=False) != expected


@pytest.mark.parametrize("kind", ["no sinks", GRANITE_SWA])
def test_answers_of_a_stock_class_are_those_of_transformers(answers: Answers, kind: str) -> None:
    texts = by_transformers(answers.exports[kind], answers.tokenizer, answers.requests, SHORT.max_new_tokens)
    assert texts == answers.texts(kind, cached=False)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_probabilities_are_the_checkpoints_and_not_those_of_another(answers: Answers, kind: str) -> None:
    written = [Completion(token_ids=ids, logprobs=logprobs) for ids, logprobs in answers.written[kind][0][len(answers.requests) :]]

    def compared(expected: list) -> list[tuple[int, int]]:
        pairs = zip(expected, written, strict=True)
        return [compare_continuations(answers.tokenizer, STOP, one, completion, "vllm") for one, completion in pairs]

    agreed = compared(answers.distinguishing[kind])
    assert sum(tokens for tokens, _ in agreed) == sum(logprobs for _, logprobs in agreed) > 40
    other = hybrid("sink tokens" if kind == "no sinks" else "no sinks")
    with pytest.raises(UserError, match="computes something else"):
        compared([continue_greedily(other, one.prompt_ids, STOP) for one in answers.distinguishing[kind]])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def served(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(SERVED, tokenizer, tmp_path_factory.mktemp("served") / "export")


@pytest.fixture(scope="module")
def server(vllm: ForkedVllm, served: Path) -> Iterator[str]:
    """Started by `lt-train serve`. Answers share what their prompts have in common."""
    log, port = served.with_name("log"), processes.free_port()
    sizes = ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--block-size", "32"]  # several blocks in a prompt
    command = [sys.executable, "-m", "lt_train", "serve", str(served), "--vllm", str(WARM_PYTHON), "--port", str(port)]
    options = ["--kv-budget", "1GiB", "--", *sizes, "--enable-prefix-caching"]
    environment = os.environ | vllm.environment | {"VLLM_ENGINE_READY_TIMEOUT_S": "1500"}
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment, cwd=REPOSITORY)
    with until_it_answers(process, url := f"http://localhost:{port}", log, seconds=1500):  # several may start on a busy machine
        yield url


def texts(answers: Iterable[Answer]) -> dict[str, str]:
    return {answer.request.problem: answer.text for answer in answers}


def test_a_server_gives_the_greedy_answers_of_the_engine(server: str, tokenizer: Any) -> None:
    requests, _ = ledger_requests(tokenizer, 4)
    assert min(len(request.prompt_ids) for request in requests) > SPECS[SERVED].window
    by_engine = texts(Engine(hybrid(SERVED), tokenizer).answers(requests, GREEDY))
    for _ in range(2):  # the second time from cached prefixes
        answers = list(OpenAIBackend(tokenizer, STOP, ServerSettings((server,))).answers(requests, GREEDY))
        assert texts(answers) == by_engine
    assert sum(answer.finish_reason == "stop" and bool(answer.thinking_tokens) for answer in answers) > 2
    assert texts(Engine(hybrid("no sinks"), tokenizer).answers(requests, GREEDY)) != by_engine


def test_a_server_draws_by_the_samples_seed(server: str, tokenizer: Any) -> None:
    requests, _ = ledger_requests(tokenizer, 2)
    backend = OpenAIBackend(tokenizer, STOP, ServerSettings((server,)))
    assert texts(backend.answers(requests, DRAWN)) == texts(backend.answers(list(reversed(requests)), DRAWN))


def test_a_server_is_checked_against_the_checkpoint_by_tokens_and_probabilities(server: str, served: Path, tokenizer: Any) -> None:
    settings = ServerSettings((server,))
    check = check_server(settings, hybrid(SERVED), served, tokenizer, Prompt(), STOP)
    assert check.tokens == check.logprobs > 40
    with pytest.raises(UserError, match="computes something else"):
        check_server(settings, load_hybrid(BASE, SPECS["no sinks"]), served, tokenizer, Prompt(), STOP)


def test_the_script_starts_vllm_with_our_command() -> None:
    script = REPOSITORY / "launch/serve-vllm.sh"
    for given, command in (
        (["8123", "--dtype", "float32"], "--port 8123 --dtype float32"),
        ([], "--port 8000"),
    ):
        run = subprocess.run([script, "export", *given], env={**os.environ, "VLLM_PYTHON": "echo"}, capture_output=True, text=True)
        assert run.stdout == f"-m lt_train.vllm_plugin.command export {command}\n"
