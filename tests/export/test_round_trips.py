"""An export in the hands of transformers' own clients, without lt_train: pipelines, batches, streams, chat templates."""

import json
import os
import sys

import pytest
import torch
from transformers import AutoTokenizer

from lt_train.dataset import prompts
from lt_train.export.checkpoint import export_hybrid
from lt_train.export.weights import in_memory
from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Request, Sampling
from lt_train.recipe.schema import Prompt
from tests.support import processes
from tests.support.repository import REPOSITORY
from tests.support.tiny_exports import exports_are_not_checked, metadata

pytestmark = pytest.mark.slow

BASE = REPOSITORY / "data/tiny-reasoner"
QUESTIONS = [json.loads(line)["problem"] for line in (REPOSITORY / "data/ledger/test.jsonl").read_text().splitlines()[:5]]
QUESTIONS[1] = QUESTIONS[1][:20]  # of another length, so that a batch is padded
TOKENS = 16  # with these the short prompt grows beyond the window
SPECS = {
    "token sinks": HybridSpec(8, (2, 3, 4, 7), 4, 28),
    "learned sinks": HybridSpec(8, (2, 3, 4, 7), 0, 28, learned_sinks=True),
    "no sinks": HybridSpec(8, (2, 3, 4, 7), 0, 28),
    "split layers": HybridSpec(8, (2, 4), 4, 28, split_layers=((3, (0,)), (7, (1,)))),
}
CLIENTS = """
import sys
sys.modules["lt_train"] = None
import json, threading, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline
torch.set_num_threads(1)
exports, questions, tokens = json.loads(sys.argv[1])
greedy = dict(max_new_tokens=tokens, do_sample=False)
template = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
chats = [[{"role": "user", "content": question}] for question in questions]

def answers(folder):
    ask = pipeline("text-generation", folder, trust_remote_code=True)
    found = {"pipeline": [out[0]["generated_text"][-1]["content"] for out in ask(chats, batch_size=4, **greedy)], "stream": []}
    tokenizer, model = (kind.from_pretrained(folder, trust_remote_code=True) for kind in (AutoTokenizer, AutoModelForCausalLM))
    batch = tokenizer.apply_chat_template(chats, padding=True, **template)
    written = model.generate(**batch, **greedy)[:, batch["input_ids"].shape[1] :]
    found["batch"] = tokenizer.batch_decode(written, skip_special_tokens=True)
    for chat in chats[:2]:
        pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        given = dict(**tokenizer.apply_chat_template(chat, **template), streamer=pieces, **greedy)
        writer = threading.Thread(target=model.generate, kwargs=given)
        writer.start()
        found["stream"].append(list(pieces))
        writer.join()
    return found

print(json.dumps({name: answers(folder) for name, folder in exports.items()}))
"""


@pytest.fixture(scope="module")
def by_clients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list]]:
    """What they answer with the exports of all hybrids, in one process."""
    scratch, tokenizer = tmp_path_factory.mktemp("clients"), AutoTokenizer.from_pretrained(BASE)
    exports = {}
    for name, spec in SPECS.items():
        with exports_are_not_checked():
            hybrid = in_memory(load_hybrid(BASE, spec))
            exports[name] = str(export_hybrid(hybrid, tokenizer, scratch / name / "export", metadata(), dtype=torch.float32))
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-P", "-c", CLIENTS, json.dumps([exports, QUESTIONS, TOKENS])]
    done = processes.run(command, cwd=scratch, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SPECS)
def test_pipelines_batches_and_streams_of_transformers_give_the_engines_answers(by_clients, name: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), load_hybrid(BASE, SPECS[name])
    requested = [
        Request(str(number), 0, 0, tuple(prompts.prompt_ids(tokenizer, Prompt(), {"question": question})))
        for number, question in enumerate(QUESTIONS)
    ]
    answers = Engine(model, tokenizer).answers(requested, Sampling(0.0, 1.0, TOKENS))
    expected = [answer.text for answer in sorted(answers, key=lambda answer: int(answer.request.problem))]
    found = by_clients[name]
    assert found["pipeline"] == found["batch"] == expected
    assert ["".join(pieces) for pieces in found["stream"]] == expected[:2]
    assert min(len(pieces) for pieces in found["stream"]) > 3
