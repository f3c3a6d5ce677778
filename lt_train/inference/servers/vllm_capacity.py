"""How much KV cache vLLM holds of a hybrid: less than the bytes alone allow, because of how it groups layers.

vLLM 0.32 (v1/core/kv_cache_utils.py) divides the layers of each kind into groups of equal size, the number of layers of the rarer
kind, and fills the last group with padding; where the kinds are nearly as many, the larger number. A block holds some tokens of one
group. Of a streaming group, a sequence holds the window and the tokens of a chunk that is being computed.
"""

from dataclasses import dataclass
from math import ceil

from lt_train.hybrid.spec import HybridSpec
from lt_train.vllm_plugin.checks import serves_family
from lt_train.vllm_plugin.command import CHUNK

BLOCK = 16
"""Tokens of a block on a GPU; 128 on a CPU."""

NEARLY_AS_MANY = 1.5
"""Up to this ratio of the two kinds' numbers of layers, a group has the larger one."""


@dataclass(frozen=True)
class VllmCache:
    """vLLM's settings. Sizes in tokens."""

    chunk: int = CHUNK
    block: int = BLOCK

    def sequences(self, spec: HybridSpec, tokens: int, layer_tokens: int) -> float:
        """How many sequences of `tokens` tokens fit.

        Args:
            layer_tokens: the memory: bytes of the cache by the bytes of one token in one layer.
        """
        size, groups_full, groups_streaming = _groups(spec)
        held = min(spec.w_recent - 1 + self.chunk, tokens)
        blocks = groups_full * ceil(tokens / self.block) + groups_streaming * (ceil(held / self.block) + 1)
        return layer_tokens // (self.block * size) / blocks

    def gain(self, spec: HybridSpec, tokens: int) -> float:
        """Sequences of `tokens` tokens for one of the model without streaming layers."""
        plenty = 10**6 * spec.num_layers * tokens
        return self.sequences(spec, tokens, plenty) / self.sequences(spec.all_full, tokens, plenty)


def with_as_many(spec: HybridSpec, lazy: int) -> HybridSpec:
    """The same sizes with another number of streaming layers."""
    return HybridSpec(spec.num_layers, tuple(range(lazy)), spec.w_sink, spec.w_recent, spec.learned_sinks)


def with_one_more_or_fewer(spec: HybridSpec, model_type: str) -> dict[int, HybridSpec]:
    """A hybrid and its neighbours by their number of streaming layers, its own first; empty where vLLM does not serve it."""
    lazy = len(spec.lazy_layers)
    served = serves_family(model_type) and not spec.w_sink and not spec.split_layers and not spec.sliding_layers
    counts = (lazy, lazy - 1, lazy + 1) if served else ()
    return {count: with_as_many(spec, count) for count in counts if 0 < count < spec.num_layers}


def _groups(spec: HybridSpec) -> tuple[int, int, int]:
    """Layers of a group, and the numbers of full and of streaming groups."""
    lazy = len(spec.lazy_layers)
    full = spec.num_layers - lazy
    if not lazy or not full:
        return spec.num_layers, bool(full), bool(lazy)
    fewer, more = sorted((full, lazy))
    size = more if more < NEARLY_AS_MANY * fewer else fewer
    return size, ceil(full / size), ceil(lazy / size)
