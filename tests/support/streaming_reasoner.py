"""The tiny reasoner as a hybrid of every kind that servers compute, exports of it, and questions for it.

GRANITE_SWA is a Llama with random weights instead, which reads the same tokens: the reasoner is a Qwen3, and no GraniteSWA.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from lt_train.dataset import prompts
from lt_train.export.checkpoint import export_hybrid
from lt_train.export.weights import in_memory
from lt_train.hybrid.loading import build_hybrid, load_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.requests import Request, Sampling, sample_seed
from lt_train.inference.sinks_file import learned_sinks
from lt_train.recipe.schema import Prompt
from tests.support.repository import REPOSITORY
from tests.support.tiny_exports import exports_are_not_checked, metadata

BASE = REPOSITORY / "data/tiny-reasoner"
PROBLEMS = REPOSITORY / "data/ledger/test.jsonl"
LAZY = (1, 3, 5, 7)
GRANITE_SWA = "learned sinks, GraniteSWA"
SPLIT = ((3, (0, 2)), (4, (0, 3)), (7, (1, 2)))
"""Of four KV heads; with the streaming ones behind the others, no layer has an order that is its own inverse."""
SPECS = {
    "no sinks": HybridSpec(8, LAZY, 0, 28),
    "learned sinks": HybridSpec(8, LAZY, 0, 28, learned_sinks=True),
    GRANITE_SWA: HybridSpec(4, (1, 3), 0, 28, learned_sinks=True),
    "sink tokens": HybridSpec(8, LAZY, 4, 28),
    "KV heads": HybridSpec(8, (1, 5), 0, 28, split_layers=SPLIT),
    "KV heads, sink tokens": HybridSpec(8, (1, 5), 4, 28, split_layers=SPLIT),
}
STOP = (3,)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=120)
DRAWN = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=60, top_k=50, min_p=0.01)


def hybrid(kind: str) -> HybridForCausalLM:
    """Learned sinks have logits so large that answers change where they are left out. Where KV heads stream, each query head has
    one of its own, a copy of the one that it shares in the base."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _model(kind, SPECS[kind])
        for logits_H in learned_sinks(model).values():
            torch.nn.init.uniform_(logits_H, 0, 4)
    return model


def _model(kind: str, spec: HybridSpec) -> HybridForCausalLM:
    if spec.split_layers:
        return _with_a_kv_head_for_each_query_head(spec)
    return _random_llama(spec) if kind == GRANITE_SWA else load_hybrid(BASE, spec)


def _random_llama(spec: HybridSpec) -> HybridForCausalLM:
    """Its weights are so large that answers depend on every token in sight."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    config = LlamaConfig(**sizes, vocab_size=268, num_hidden_layers=spec.num_layers, eos_token_id=STOP[0], pad_token_id=0)
    model = build_hybrid(config, spec).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    return model


def _with_a_kv_head_for_each_query_head(spec: HybridSpec) -> HybridForCausalLM:
    config = AutoConfig.from_pretrained(BASE)
    copies, config.num_key_value_heads = config.num_attention_heads // config.num_key_value_heads, config.num_attention_heads
    model = build_hybrid(config, spec)
    weights = load_file(BASE / "model.safetensors")
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.unflatten(0, (-1, config.head_dim)).repeat_interleave(copies, dim=0).flatten(0, 1)
    model.load_state_dict(weights)
    return model.eval()


def exported(kind: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    with exports_are_not_checked():
        return export_hybrid(in_memory(hybrid(kind)), tokenizer, folder, metadata(), dtype=torch.float32)


def ledger_requests(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[Request], dict[str, str]]:
    rows = [json.loads(line) for line in PROBLEMS.read_text().splitlines()[:count]]
    questions = {f"ledger {number}": row["problem"] for number, row in enumerate(rows)}
    made = [
        Request(name, 0, sample_seed(0, name, 0), tuple(prompts.prompt_ids(tokenizer, Prompt(), {"question": question})))
        for name, question in questions.items()
    ]
    return made, questions


@torch.inference_mode()
def by_transformers(
    folder: Path, tokenizer: PreTrainedTokenizerBase, requests: list[Request], max_new_tokens: int = GREEDY.max_new_tokens
) -> dict[str, str]:
    """Greedy answers of the stock class."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = {}
    for request in requests:
        ids = model.generate(torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=max_new_tokens)
        texts[request.problem] = text_of(tokenizer, ids[0, len(request.prompt_ids) :].tolist())
    return texts


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids[:-1] if ids[-1] in STOP else ids))
