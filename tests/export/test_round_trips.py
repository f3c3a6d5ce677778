"""An export in the hands of transformers' own clients, without lt_train: pipelines, batches, streams, chat templates."""

import json
import os
import sys
from pathlib import Path

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
from tests.support.tiny_exports import metadata

pytestmark = pytest.mark.slow

BASE = REPOSITORY / "data/tiny-reasoner"
QUESTIONS = [json.loads(line)["problem"] for line in (REPOSITORY / "data/ledger/test.jsonl").read_text().splitlines()[:6]]
QUESTIONS[1] = QUESTIONS[1][:20]  # of another length, so that a batch is padded
TOKENS = 60
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
folder, questions, tokens = json.loads(sys.argv[1])
greedy = dict(max_new_tokens=tokens, do_sample=False)
chats = [[{"role": "user", "content": question}] for question in questions]
ask = pipeline("text-generation", folder, trust_remote_code=True)
found = {"pipeline": [out[0]["generated_text"][-1]["content"] for out in ask(chats, batch_size=4, **greedy)]}
tokenizer, model = (kind.from_pretrained(folder, trust_remote_code=True) for kind in (AutoTokenizer, AutoModelForCausalLM))
template = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
batch = tokenizer.apply_chat_template(chats, padding=True, **template)
texts = tokenizer.batch_decode(model.generate(**batch, **greedy)[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
found["batch"] = texts
found["stream"] = []
for chat in chats[:2]:
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = dict(**tokenizer.apply_chat_template(chat, **template), streamer=pieces, **greedy)
    writer = threading.Thread(target=model.generate, kwargs=given)
    writer.start()
    found["stream"].append(list(pieces))
    writer.join()
print(json.dumps(found))
"""


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_pipelines_batches_and_streams_of_transformers_give_the_engines_answers(spec: HybridSpec, tmp_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), load_hybrid(BASE, spec)
    asked = [
        Request(str(number), 0, 0, tuple(prompts.prompt_ids(tokenizer, Prompt(), {"question": question})))
        for number, question in enumerate(QUESTIONS)
    ]
    answers = Engine(model, tokenizer).answers(asked, Sampling(0.0, 1.0, TOKENS))
    expected = [answer.text for answer in sorted(answers, key=lambda answer: int(answer.request.problem))]
    with processes.checks_of_exports_are_forked():
        folder = export_hybrid(in_memory(model), tokenizer, tmp_path / "export", metadata(), dtype=torch.float32)
    given = json.dumps([str(folder), QUESTIONS, TOKENS])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = processes.run([sys.executable, "-P", "-c", CLIENTS, given], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pipeline"] == found["batch"] == expected
    assert ["".join(pieces) for pieces in found["stream"]] == expected[:2]
    assert min(len(pieces) for pieces in found["stream"]) > 3
