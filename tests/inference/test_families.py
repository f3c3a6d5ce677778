"""The built-in engine over every family of bases."""

import pytest
import torch

from lt_train.inference.draft import Draft
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Request, Sampling
from tests.support.families import FAMILIES
from tests.support.tiny_engine import likeliest, written
from tests.support.tiny_exports import tiny_hybrid, tiny_tokenizer

NEW = 12
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_recomputing_each_prompt_alone(family: str) -> None:
    torch.manual_seed(0)
    model, tokenizer = tiny_hybrid(family), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.sinks"):  # those of the base: strong enough to change answers
            parameter.fill_(3.0)
    prompts = [torch.randint(3, 60, (length,)).tolist() for length in (1, 5, 11, 30)]
    requests = [Request(f"p{n}", 0, n, tuple(ids)) for n, ids in enumerate(prompts)]
    for draft in (None, Draft.of(model.spec, None, 3)):
        answers = written(Engine(model, tokenizer, prefill_chunk=16, draft=draft), requests, GREEDY)
        for request in requests:
            ids = answers[request.problem]
            assert likeliest(model, request.prompt_ids, ids) == ids, request.problem
            assert len(ids) == NEW or ids[-1] == tokenizer.eos_token_id
