"""Clients that people use, against the server of `lt-train serve`: lm-eval's API models, and the project's own evaluation."""

import json
import os
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
from tests.support import processes
from tests.support.graders import graders_are_kept
from tests.support.repository import REPOSITORY
from tests.support.runs import run_in_folder
from tests.support.served import NAME, checkpoint_of, served
from tests.support.tiny_exports import exports_are_not_checked, metadata

pytestmark = pytest.mark.slow

BASE = REPOSITORY / "data/tiny-reasoner"
PROBLEMS = REPOSITORY / "data/ledger/test.jsonl"
SPEC = HybridSpec(8, (2, 3, 4, 7), 4, 28)
LIMIT = 4
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
    requested = [Request(str(number), 0, 0, tuple(each)) for number, each in enumerate(ids)]
    answers = Engine(checkpoint.model, tokenizer).answers(requested, Sampling(0.0, 1.0, TOKENS))
    return [answer.text for answer in sorted(answers, key=lambda answer: int(answer.request.problem))]


LM_EVAL = """
import json
import sys

sys.modules["lt_train"] = None
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

evaluator.add_env_info = lambda results: None  # runs pip to list what is installed, for a second and more each time
folder, models, common = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
tasks = TaskManager(include_path=folder, include_defaults=False)
answers = {}
for model, settings in models.items():
    found = evaluator.simple_evaluate(model, tasks=["ledger"], task_manager=tasks, log_samples=True, **common, **settings)
    answers[model] = [row["resps"][0][0] for row in sorted(found["samples"]["ledger"], key=lambda row: row["doc_id"])]
json.dump(answers, open("answers.json", "w"))
"""


@pytest.fixture(scope="module")
def by_lm_eval(checkpoint: Checkpoint, url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The answers that its models get: two that ask servers, and one that loads an export by transformers and its own code."""
    folder = tmp_path_factory.mktemp("lm_eval")
    with exports_are_not_checked():
        export_hybrid(in_memory(checkpoint.model), checkpoint.tokenizer, folder / "export", metadata(), dtype=torch.float32)
    task = {
        "task": "ledger",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(PROBLEMS)}, "cache_dir": str(folder / "cache")},
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
    (folder / "ledger.yaml").write_text(yaml.safe_dump(task))
    asking = "num_concurrent=4,tokenizer_backend=None,tokenized_requests=False"
    chat, completions = (f"model={NAME},base_url={url}/v1/{path},{asking}" for path in ("chat/completions", "completions"))
    models: dict[str, dict[str, object]] = {
        "local-completions": {"model_args": completions},
        "local-chat-completions": {"model_args": chat, "apply_chat_template": True},
        "hf": {"model_args": f"pretrained={folder}/export,trust_remote_code=True,dtype=float32", "batch_size": LIMIT},
    }
    common = {"limit": LIMIT, "device": "cpu", "bootstrap_iters": 0}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-P", "-c", LM_EVAL, folder, json.dumps(models), json.dumps(common)]
    done = processes.run(command, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions", "hf"])
def test_lm_eval_gets_the_engines_answers(checkpoint: Checkpoint, by_lm_eval: dict[str, list[str]], model: str) -> None:
    expected = greedy_texts(checkpoint, "chat" in model)
    assert by_lm_eval[model] == expected and len(expected) == LIMIT


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
    problems = f"benchmark: ledger, path: {PROBLEMS}, limit: 4, max_new_tokens: 80"
    in_process = f"{{{problems}, name: in-process}}"
    with exports_are_not_checked():
        run_in_folder(load_recipe(recipe, [f"eval=[{in_process}]"]), tmp_path / "runs", "export")
    run = tmp_path / "runs/own"
    with served(load_checkpoint(run / "export")) as (url, _), graders_are_kept():
        by_server = f"{{{problems}, name: served, backend: openai, servers: [{url}]}}"
        run_in_folder(load_recipe(recipe, [f"eval=[{in_process}, {by_server}]"]), tmp_path / "runs", "eval")
    rows = [graded(run / "eval/converted" / name / "samples.jsonl") for name in ("in-process", "served")]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    checked = json.loads((run / "eval/converted/served/servers.json").read_text())
    assert checked["logprobs"] == checked["tokens"] > 40


def graded(samples: Path) -> dict[str, dict[str, object]]:
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return {row["problem"]: {key: value for key, value in row.items() if key != "seconds"} for row in rows}
