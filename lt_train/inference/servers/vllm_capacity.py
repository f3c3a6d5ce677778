"""How much KV cache vLLM holds of a hybrid: less than the bytes alone allow, because of how it groups layers.

vLLM 0.32 (v1/core/kv_cache_utils.py) divides the Attention layers of each kind into groups of equal size, the number of layers of
the rarer kind, and fills the last group with padding; where the kinds are nearly as many, the larger number. A block holds some
tokens of one group. Of a streaming group, a sequence holds the sinks, the window and the tokens of a chunk that is being computed.
Where single KV heads stream, vllm_plugin/units.py makes several Attention layers of a layer of the model.
"""

from dataclasses import dataclass
from math import ceil

from lt_train.hybrid.spec import HybridSpec
from lt_train.vllm_plugin.checks import is_served
from lt_train.vllm_plugin.command import CHUNK
from lt_train.vllm_plugin.units import heads_of_a_unit, number_of_units

BLOCK = 16
"""Tokens of a block on a GPU; 128 on a CPU."""

NEARLY_AS_MANY = 1.5
"""Up to this ratio of the two kinds' numbers of layers, a group has the larger one."""


@dataclass(frozen=True)
class VllmCache:
    """vLLM's settings. Sizes in tokens."""

    chunk: int = CHUNK
    block: int = BLOCK

    def sequences(self, spec: HybridSpec, kv_heads: int, tokens: int, layer_tokens: int) -> float:
        """How many sequences of `tokens` tokens fit.

        Args:
            kv_heads: of a layer.
            layer_tokens: the memory: bytes of the cache by the bytes of one token in one layer.
        """
        size, groups_full, groups_streaming = _groups(*number_of_units(spec, kv_heads))
        held = min(spec.w_recent - 1 + self.chunk, tokens)
        streaming = ceil(held / self.block) + 1 + ceil(spec.w_sink / self.block)
        blocks = groups_full * ceil(tokens / self.block) + groups_streaming * streaming
        unit_tokens = layer_tokens * kv_heads // heads_of_a_unit(spec, kv_heads)
        return unit_tokens // (self.block * size) / blocks

    def gain(self, spec: HybridSpec, kv_heads: int, tokens: int) -> float:
        """Sequences of `tokens` tokens for one of the model in which nothing streams."""
        plenty = 10**6 * spec.num_layers * tokens
        return self.sequences(spec, kv_heads, tokens, plenty) / self.sequences(spec.all_full, kv_heads, tokens, plenty)


def with_as_many(spec: HybridSpec, lazy: int) -> HybridSpec:
    """The same sizes with another number of streaming layers."""
    return HybridSpec(spec.num_layers, tuple(range(lazy)), spec.w_sink, spec.w_recent, spec.learned_sinks)


def with_as_many_heads(spec: HybridSpec, streaming: int, kv_heads: int) -> HybridSpec:
    """The same sizes with another number of streaming KV heads: some of those of `spec`, or others beside them."""
    streaming_L = spec.streaming_heads(kv_heads)
    heads = [(layer, head) for layer in range(spec.num_layers) for head in range(kv_heads)]
    chosen = sorted(heads, key=lambda each: each[1] not in streaming_L[each[0]])[:streaming]
    heads_L = [[head for layer, head in chosen if layer == of] for of in range(spec.num_layers)]
    return HybridSpec.from_streaming_heads(heads_L, kv_heads, spec.w_sink, spec.w_recent)


def with_one_more_or_fewer(spec: HybridSpec, model_type: str, kv_heads: int) -> dict[int, HybridSpec]:
    """A hybrid and its neighbours by their number of streaming layers, or of streaming KV heads where layers are split; its own
    first. Empty where vLLM does not serve it."""
    if not is_served(model_type, spec):
        return {}
    if spec.split_layers:
        heads = spec.number_of_streaming_heads(kv_heads)
        others = [count for count in (heads - 1, heads + 1) if 0 < count < spec.num_layers * kv_heads]
        return {heads: spec} | {count: with_as_many_heads(spec, count, kv_heads) for count in others}
    lazy = len(spec.lazy_layers)
    return {count: with_as_many(spec, count) for count in (lazy, lazy - 1, lazy + 1) if 0 < count < spec.num_layers}


def _groups(full: int, streaming: int) -> tuple[int, int, int]:
    """Attention layers of a group, and the numbers of full and of streaming groups."""
    if not full or not streaming:
        return full + streaming, bool(full), bool(streaming)
    fewer, more = sorted((full, streaming))
    size = more if more < NEARLY_AS_MANY * fewer else fewer
    return size, ceil(full / size), ceil(streaming / size)
