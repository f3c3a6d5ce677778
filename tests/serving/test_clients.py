"""Clients that people use, against the server of `lt-train serve`: lm-eval's API models, and the project's own evaluation."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from lt_train.dataset import prompts
from lt_train.export.checkpoint import export_hybrid
from lt_train.export.weights import in_memory
from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Request, Sampling
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Prompt
from lt_train.serving.checkpoint import Checkpoint, load_checkpoint
from tests.support.processes import checks_of_exports_are_forked
from tests.support.repository import REPOSITORY
from tests.support.runs import run_in_folder
from tests.support.served import NAME, checkpoint_of, served
from tests.support.tiny_exports import metadata

pytestmark = pytest.mark.slow

BASE = REPOSITORY / "data/tiny-reasoner"
PROBLEMS = REPOSITORY / "data/ledger/test.jsonl"
SPEC = HybridSpec(8, (2, 3, 4, 7), 4, 28)
LIMIT = 6
TOKENS = 100


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return checkpoint_of(load_hybrid(BASE, SPEC), AutoTokenizer.from_pretrained(BASE))


@pytest.fixture(scope="module")
def url(checkpoint: Checkpoint) -> Iterator[str]:
    with served(checkpoint) as (address, _):
        yield address


def greedy_texts(checkpoint: Checkpoint, chat: bool) -> list[str]:
    """The engine's own answers to the first problems."""
    questions = [json.loads(line)["problem"] for line in PROBLEMS.read_text().splitlines()[:LIMIT]]
    tokenizer = checkpoint.tokenizer
    ids = [
        prompts.prompt_ids(tokenizer, Prompt(), {"question": question}) if chat else tokenizer(question)["input_ids"]
        for question in questions
    ]
    asked = [Request(str(number), 0, 0, tuple(each)) for number, each in enumerate(ids)]
    answers = Engine(checkpoint.model, tokenizer).answers(asked, Sampling(0.0, 1.0, TOKENS))
    return [answer.text for answer in sorted(answers, key=lambda answer: int(answer.request.problem))]


@pytest.fixture(scope="module")
def export(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "export"
    with checks_of_exports_are_forked():
        return export_hybrid(in_memory(checkpoint.model), checkpoint.tokenizer, folder, metadata(), dtype=torch.float32)


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions", "hf"])
def test_lm_eval_gets_the_engines_answers(checkpoint: Checkpoint, url: str, export: Path, tmp_path: Path, model: str) -> None:
    """Its two models that ask servers, and the one that loads the export by transformers and its own code."""
    task = {
        "task": "ledger",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(PROBLEMS)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{problem}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": TOKENS, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": "boxed", "filter": [{"function": "regex", "regex_pattern": r"boxed\{(\d)\}"}, {"function": "take_first"}]}
        ],
    }
    (tmp_path / "ledger.yaml").write_text(yaml.safe_dump(task))
    path = "chat/completions" if "chat" in model else "completions"
    arguments = f"model={NAME},base_url={url}/v1/{path},num_concurrent=4,tokenizer_backend=None,tokenized_requests=False"
    if model == "hf":
        arguments = f"pretrained={export},trust_remote_code=True,dtype=float32"
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        model,
        "--model_args",
        arguments,
        "--tasks",
        "ledger",
        "--log_samples",
    ]
    command += ["--include_path", str(tmp_path), "--limit", str(LIMIT), "--output_path", str(tmp_path / "out")]
    command += ["--apply_chat_template"] if "chat" in model else []
    command += ["--device", "cpu", "--batch_size", str(LIMIT)] if model == "hf" else []
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_MODULES_CACHE": str(tmp_path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_ledger_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["resps"][0][0] for row in rows] == greedy_texts(checkpoint, "chat" in model)
    assert len(rows) == LIMIT


@pytest.mark.parametrize(
    "named",
    [
        pytest.param(f"layers: {list(SPEC.lazy_layers)}", id="layers"),
        pytest.param("streaming_kv_heads: [[], [0, 1], [1], [0], [], [0, 1], [1], [0]]", id="heads", marks=pytest.mark.slow),
    ],
)
def test_a_run_evaluates_its_export_with_sinks_by_our_server_as_by_the_engine_in_its_process(tmp_path: Path, named: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: own\nmodel: {{base: {BASE}, dtype: fp32}}\nhybrid: {{{named}, w_sink: 4, w_recent: 28}}\n"
        f"data: {{source: {REPOSITORY}/data/ledger/train.jsonl, format: still, max_length: 256, limit: 4}}\n"
    )
    problems = f"benchmark: ledger, path: {PROBLEMS}, limit: 12, max_new_tokens: 120"
    in_process = f"{{{problems}, name: in-process}}"
    run_in_folder(load_recipe(recipe, [f"eval=[{in_process}]"]), tmp_path / "runs", "export")
    run = tmp_path / "runs/own"
    with served(load_checkpoint(run / "export")) as (url, _):
        by_server = f"{{{problems}, name: served, backend: openai, servers: [{url}]}}"
        run_in_folder(load_recipe(recipe, [f"eval=[{in_process}, {by_server}]"]), tmp_path / "runs", "eval")
    rows = [graded(run / "eval/converted" / name / "samples.jsonl") for name in ("in-process", "served")]
    assert rows[0] == rows[1] and len(rows[0]) == 12
    checked = json.loads((run / "eval/converted/served/servers.json").read_text())
    assert checked["logprobs"] == checked["tokens"] > 40


def graded(samples: Path) -> dict[str, dict[str, object]]:
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return {row["problem"]: {key: value for key, value in row.items() if key != "seconds"} for row in rows}
