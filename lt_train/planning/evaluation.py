"""KV cache of an evaluation by the built-in engine: bytes of one sequence, full and hybrid, and how many sequences fit."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from lt_train.benchmarks import BENCHMARKS, RecallSettings, answer_tokens
from lt_train.hybrid.kv_size import head_bytes, kv_bytes, kv_heads, token_bytes
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.draft import LONGEST
from lt_train.inference.packed_weights import fits, is_worth_packing, obstacle_here
from lt_train.inference.servers.vllm_capacity import VllmCache, with_one_more_or_fewer
from lt_train.planning.setup import Machine, inference_itemsize
from lt_train.planning.shape import ModelShape
from lt_train.recipe.schema import Eval, Recipe


@dataclass(frozen=True)
class KVCache:
    """
    Attributes:
        evaluation: its name. tokens: of its longest answers.
        hybrid, full: bytes of one sequence, with and without streaming layers, the rings of a draft included.
        sequences: how many such sequences fit beside the weights: (hybrid, full).
        vllm: how many vLLM holds there, by the number of streaming layers, or of KV heads where single ones stream: as many as in
            the recipe, one fewer and one more, and 0. Empty where it does not serve the hybrid.
    """

    evaluation: str
    tokens: int
    hybrid: int
    full: int
    sequences: tuple[int, int]
    vllm: dict[int, int]


def kv_cache(recipe: Recipe, base_config: PreTrainedConfig, shape: ModelShape, machine: Machine) -> KVCache | None:
    """The KV cache of the evaluation with the longest answers; None where nothing is generated.

    The engine distributes a model's layers over all GPUs of its process, so the memory of all of them counts.
    """
    eval_configs = [eval_config for eval_config in recipe.eval if isinstance(eval_config, Eval)]
    if not eval_configs:
        return None
    longest = max(eval_configs, key=_tokens)
    itemsize = inference_itemsize(recipe, machine)
    tokens, spec = _tokens(longest), shape.spec
    config = base_config.to_dict()
    hybrid, full = (
        kv_bytes(config, each, tokens, itemsize)
        + head_bytes(config, itemsize) * _tokens_in_rings(longest, each, spec, kv_heads(config))
        for each in (spec, spec.all_full)
    )
    left = max(machine.gpus * machine.usable - itemsize * shape.base_parameters, 0)
    left -= _packed(shape, machine, itemsize, left)
    layer_tokens = left // token_bytes(config, itemsize)
    return KVCache(
        longest.name or longest.benchmark,
        tokens,
        hybrid,
        full,
        (left // hybrid, left // full),
        _in_vllm(spec, base_config.model_type, kv_heads(config), tokens, layer_tokens),
    )


def _tokens_in_rings(eval_config: Eval, evaluated: HybridSpec, hybrid: HybridSpec, heads: int) -> int:
    """Tokens that a draft caches for a sequence, summed over the KV heads of all layers: a window where a head streams in the draft
    alone, and what it proposes in a round wherever one streams."""
    if eval_config.draft is None:
        return 0
    listed = evaluated.full_in_base if eval_config.draft_layers is None else eval_config.draft_layers
    drafting = replace(hybrid, lazy_layers=tuple(listed), split_layers=()) if eval_config.draft == "streaming" else hybrid
    own_L, drafting_L = evaluated.streaming_heads(heads), drafting.streaming_heads(heads)
    own = sum(map(len, own_L))
    rings = sum(len({*one, *other}) for one, other in zip(own_L, drafting_L, strict=True))
    sliding = len(evaluated.sliding_layers) * heads
    return (rings - own) * evaluated.window + (rings + sliding) * (eval_config.draft_length or LONGEST)


def _packed(shape: ModelShape, machine: Machine, itemsize: int, left: int) -> int:
    """Bytes of the engine's packed weights, where it packs them."""
    dense = [linear.weights for layer in shape.layers for linear in layer.linears.values() if linear.used == 1]
    packed = itemsize * sum(elements for elements in (*dense, shape.head) if is_worth_packing(elements))
    packs = machine.cpu and itemsize == torch.float32.itemsize and fits(packed, left)
    return packed if packs and packed and obstacle_here() is None else 0


def _in_vllm(spec: HybridSpec, model_type: str, heads: int, tokens: int, layer_tokens: int) -> dict[int, int]:
    specs = with_one_more_or_fewer(spec, model_type, heads)
    if specs:
        specs[0] = spec.all_full
    return {count: int(VllmCache().sequences(each, heads, tokens, layer_tokens)) for count, each in specs.items()}


def _tokens(eval_config: Eval) -> int:
    if eval_config.max_new_tokens is not None:
        return eval_config.max_new_tokens
    recall = RecallSettings(span=eval_config.recall.span) if eval_config.recall is not None else None
    return answer_tokens(BENCHMARKS[eval_config.benchmark], recall) or 0
