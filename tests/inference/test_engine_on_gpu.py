"""The engine, by CUDA graphs, `generate()` and recomputation on a GPU: the same greedy tokens, in fp32."""

from copy import deepcopy

import pytest
import torch

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.draft import Draft
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Request, Sampling, sample_seed
from lt_train.inference.step_graphs import StepGraphs
from tests.support.families import BASES, on_base
from tests.support.tiny_training import VOCABULARY, tiny_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SPECS = {
    "full": ("qwen3", HybridSpec(4, (), 2, 6)),
    "token sinks": ("qwen3", HybridSpec(4, (0, 1, 3), 2, 6)),
    "single heads": ("qwen3", HybridSpec.from_streaming_heads([(0,), (), (1,), (0, 1)], 2, 2, 6)),
    "learned sinks": ("qwen3", HybridSpec(4, (0, 1, 3), 0, 6, learned_sinks=True)),
    "sliding layers": ("olmo3", on_base(BASES["olmo3"], HybridSpec(4, (1, 3), 2, 6))),
    "experts": ("qwen3_moe", HybridSpec(4, (0, 1, 3), 2, 6)),
}
"""Family and hybrid."""
NEW = 24
PROMPTS = [tuple(3 + (n * 5 + i * i) % 30 for i in range(length)) for n, length in enumerate([1, 2, 3, 7, 15, 33, 300])]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StepGraphs]:
    """Those of every engine that is made."""
    made: list[StepGraphs] = []

    class Noted(StepGraphs):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("lt_train.inference.runner.StepGraphs", Noted)
    monkeypatch.setattr("lt_train.inference.step_graphs.STEPS_BEFORE_CAPTURE", 4)  # of the 24 of an answer
    return made


@pytest.mark.parametrize("kind", SPECS)
def test_greedy_answers_are_those_of_recomputing_each_prompt_alone(kind: str, graphs: list[StepGraphs]) -> None:
    tokenizer = tiny_tokenizer()
    family, spec = SPECS[kind]
    config = deepcopy(BASES[family])
    config.vocab_size, config.initializer_range = VOCABULARY, 0.3
    torch.manual_seed(0)
    model = build_hybrid(config, spec).to("cuda").eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    requested = [Request(f"p{n}", 0, sample_seed(7, f"p{n}", 0), prompt) for n, prompt in enumerate(PROMPTS)]
    engine = Engine(model, tokenizer, max_slots=4, prefill_chunk=8)
    answers = {answer.request.problem: answer for answer in engine.answers(requested, Sampling(0.0, 1.0, NEW))}
    if not spec.learned_sinks:
        drafting = Engine(model, tokenizer, max_slots=4, prefill_chunk=8, draft=Draft.of(spec, None, 3))
        drafted = {answer.request.problem: answer.text for answer in drafting.answers(requested, Sampling(0.0, 1.0, NEW))}
        assert drafted == {problem: answer.text for problem, answer in answers.items()}
    assert all(each.failure is None and each.captured for each in graphs), [each.failure for each in graphs]
    for request in requested:
        ids = torch.tensor([request.prompt_ids], device="cuda")
        cached = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)[
            0, ids.shape[1] :
        ].tolist()
        for _ in range(len(cached)):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        alone = ids[0, len(request.prompt_ids) :].tolist()
        assert cached == alone
        answer = answers[request.problem]
        assert answer.tokens == len(alone)
        stopped = alone[-1] == tokenizer.eos_token_id
        assert answer.text == tokenizer.decode(alone[:-1] if stopped else alone)
