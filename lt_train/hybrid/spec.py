"""HybridSpec, which turns a base model into a hybrid: which layers or KV heads stream, and how many tokens they keep."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

HYBRID_VERSION = "1"
LEARNED_SINKS_VERSION = "2"
"""The version of a hybrid with learned sinks: code of version 1 would stop at it instead of leaving them out."""
KV_HEADS_VERSION = "3"
"""The version of a hybrid with split layers: earlier code would stop at it instead of giving all their heads full attention."""


FULL = "full_attention"
STREAMING = "sliding_attention"  # the name in transformers and vLLM for a layer with a window


class HybridError(ValueError):
    """A request that a hybrid cannot compute correctly. The message names the setting, the problem and the fix."""


@dataclass(frozen=True)
class HybridSpec:
    """Which of a model's layers and KV heads stream, and the sizes of their streaming attention.

    A KV head is a key/value head with its query heads. In a split layer some KV heads stream and the others keep full attention.

    Args:
        num_layers: decoder layers of the model.
        lazy_layers: indices of the layers that stream with all their heads, ascending. Without these and without split layers,
            every layer keeps full attention.
        w_sink: keys at the start of a sequence that stay visible, in tokens; 0 leaves a plain sliding window.
        w_recent: the latest keys a query sees, itself included, in tokens.
        learned_sinks: each query head of a streaming layer has a logit of its own in the softmax's denominator, in place of
            sink tokens (as in gpt-oss, arXiv 2508.10925).
        split_layers: (layer, the KV heads of it that stream) of each split layer, ascending.

    Raises:
        HybridError: a size, a layer or a head out of range, a layer named twice, two kinds of sinks, or learned sinks with split
            layers.
    """

    num_layers: int
    lazy_layers: tuple[int, ...]
    w_sink: int = 4
    w_recent: int = 1020
    # Fingerprints of runs without these follow from the repr.
    learned_sinks: bool = field(default=False, repr=False)
    split_layers: tuple[tuple[int, tuple[int, ...]], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.w_sink < 0:
            raise HybridError(f"w_sink: {self.w_sink}: below 0. Fix: set 0 or more tokens")
        if self.w_recent < 1:
            raise HybridError(f"w_recent: {self.w_recent}: below 1, and a query always sees itself. Fix: set 1 or more tokens")
        if self.learned_sinks and self.w_sink:
            raise HybridError(f"w_sink: {self.w_sink}: learned sinks take the place of sink tokens. Fix: set w_sink to 0")
        if self.learned_sinks and self.split_layers:
            raise HybridError("learned_sinks: layers of which some KV heads stream have none. Fix: set w_sink")
        streaming = [*self.lazy_layers, *(layer for layer, _ in self.split_layers)]
        outside = [layer for layer in streaming if not 0 <= layer < self.num_layers]
        if outside:
            raise HybridError(f"lazy_layers: {outside}: not in the model. Fix: name layers from 0 to {self.num_layers - 1}")
        if len(set(streaming)) != len(streaming):
            raise HybridError(f"lazy_layers: {streaming}: a layer is named twice. Fix: name each layer once")
        for layer, heads in self.split_layers:
            if not heads or min(heads) < 0 or len(set(heads)) != len(heads):
                raise HybridError(
                    f"split_layers: layer {layer}, KV heads {list(heads)}: not one or more different heads. "
                    "Fix: name each head once"
                )
        object.__setattr__(self, "lazy_layers", tuple(sorted(self.lazy_layers)))
        split = tuple(sorted((layer, tuple(sorted(heads))) for layer, heads in self.split_layers))
        object.__setattr__(self, "split_layers", split)

    @classmethod
    def from_layer_types(cls, layer_types: list[str], w_sink: int, w_recent: int, learned_sinks: bool = False) -> "HybridSpec":
        lazy = tuple(layer for layer, kind in enumerate(layer_types) if kind == STREAMING)
        return cls(len(layer_types), lazy, w_sink, w_recent, learned_sinks)

    @classmethod
    def from_streaming_heads(cls, heads_L: Sequence[Collection[int]], kv_heads: int, w_sink: int, w_recent: int) -> "HybridSpec":
        """
        Args:
            heads_L: by layer, the KV heads that stream. A layer of which all do streams as a whole.
            kv_heads: of each layer.

        Raises:
            HybridError: a head out of range or named twice; see the class.
        """
        for layer, heads in enumerate(heads_L):
            if outside := sorted(head for head in heads if not 0 <= head < kv_heads):
                raise HybridError(
                    f"KV heads {outside} of layer {layer}: not in the model. Fix: name heads from 0 to {kv_heads - 1}"
                )
            if len(set(heads)) != len(heads):
                raise HybridError(f"KV heads {sorted(heads)} of layer {layer}: a head is named twice. Fix: name each head once")
        lazy = tuple(layer for layer, heads in enumerate(heads_L) if len(heads) == kv_heads)
        split = tuple((layer, tuple(heads)) for layer, heads in enumerate(heads_L) if 0 < len(heads) < kv_heads)
        return cls(len(heads_L), lazy, w_sink, w_recent, split_layers=split)

    def streaming_heads(self, kv_heads: int) -> list[tuple[int, ...]]:
        """By layer, the KV heads that stream: none, some, or all `kv_heads` of it."""
        everything = tuple(range(kv_heads))
        return [everything if self.is_lazy(layer) else self.split_heads(layer) for layer in range(self.num_layers)]

    def split_heads(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a split layer that stream; none where the layer is not split."""
        return dict(self.split_layers).get(layer, ())

    @property
    def streaming_layers(self) -> tuple[int, ...]:
        """The layers that stream with all their heads or with some."""
        return tuple(sorted([*self.lazy_layers, *dict(self.split_layers)]))

    @property
    def all_full(self) -> "HybridSpec":
        """The spec of the base: the same model without anything that streams."""
        return replace(self, lazy_layers=(), split_layers=())

    @property
    def streams(self) -> bool:
        """Whether any head does."""
        return bool(self.lazy_layers or self.split_layers)

    @property
    def version(self) -> str:
        """The version of the code that the hybrid needs."""
        if self.split_layers:
            return KV_HEADS_VERSION
        return LEARNED_SINKS_VERSION if self.learned_sinks else HYBRID_VERSION

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer, as `layer_types` in a transformers config; a split layer is full there."""
        lazy = set(self.lazy_layers)
        return [STREAMING if layer in lazy else FULL for layer in range(self.num_layers)]

    @property
    def window(self) -> int:
        """The largest number of tokens that a streaming layer caches per sequence."""
        return self.w_sink + self.w_recent

    def is_lazy(self, layer: int) -> bool:
        """Whether the layer streams with all its heads."""
        return layer in self.lazy_layers

    def cached_tokens(self, tokens: int, kv_heads: int) -> int:
        """Cached tokens of one sequence of `tokens` tokens, summed over all KV heads of all layers."""
        streaming = sum(map(len, self.streaming_heads(kv_heads)))
        return (self.num_layers * kv_heads - streaming) * tokens + streaming * min(tokens, self.window)
