"""HybridSpec, which turns a base model into a hybrid: which layers or KV heads stream, and how many tokens they keep."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

HYBRID_VERSION = "1"
LEARNED_SINKS_VERSION = "2"
"""The version of a hybrid with learned sinks: code of version 1 would stop at it instead of leaving them out."""
KV_HEADS_VERSION = "3"
"""The version of a hybrid with split layers: earlier code would stop at it instead of giving all their heads full attention."""
SLIDING_LAYERS_VERSION = "4"
"""The version of a hybrid of a base with sliding layers: earlier code would take these for the layers that stream."""


FULL = "full_attention"
STREAMING = "sliding_attention"  # the name in transformers and vLLM for a layer with a window

GRANITE_SWA = "granite_swa"
"""The `model_type` of the stock class whose layers have windows and learned sinks."""


class HybridError(ValueError):
    """A request that a hybrid cannot compute correctly. The message names the setting, the problem and the fix."""


@dataclass(frozen=True)
class HybridSpec:
    """Which of a model's layers and KV heads stream, and the sizes of their streaming attention.

    A KV head is a key/value head with its query heads. In a split layer some KV heads stream and the others keep full attention.
    A sliding layer has a window in the base already: a query sees the latest `sliding_window` tokens and no sinks. It neither
    streams nor has full attention.

    Args:
        num_layers: decoder layers of the model.
        lazy_layers: indices of the layers that stream with all their heads, ascending. Without these and without split layers,
            every layer keeps full attention.
        w_sink: keys at the start of a sequence that stay visible, in tokens; 0 leaves a plain sliding window.
        w_recent: the latest keys a query sees, itself included, in tokens.
        learned_sinks: each query head of a streaming layer has a logit of its own in the softmax's denominator, in place of
            sink tokens (as in gpt-oss, arXiv 2508.10925).
        split_layers: (layer, the KV heads of it that stream) of each split layer, ascending.
        sliding_layers: indices of the base's sliding layers, ascending.
        sliding_window: the latest keys that a query of a sliding layer sees, itself included, in tokens; 0 without such layers.

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
    sliding_layers: tuple[int, ...] = field(default=(), repr=False)
    sliding_window: int = field(default=0, repr=False)

    # Of each spec, but no fields, which fingerprints and files would hold.
    _lazy_L: ClassVar[tuple[bool, ...]]
    _slides_L: ClassVar[tuple[bool, ...]]

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
        self._check_sliding_layers(set(streaming))
        object.__setattr__(self, "lazy_layers", tuple(sorted(self.lazy_layers)))
        object.__setattr__(self, "sliding_layers", tuple(sorted(self.sliding_layers)))
        split = tuple(sorted((layer, tuple(sorted(heads))) for layer, heads in self.split_layers))
        object.__setattr__(self, "split_layers", split)
        # Where torch.compile takes the numbers of layers for variables (dynamic=True), it finds none of them by `in`.
        object.__setattr__(self, "_lazy_L", tuple(layer in self.lazy_layers for layer in range(self.num_layers)))
        object.__setattr__(self, "_slides_L", tuple(layer in self.sliding_layers for layer in range(self.num_layers)))

    def __eq__(self, other: object) -> bool:
        """Number by number: where torch.compile takes them for variables (dynamic=True), it compares no tuples of them."""
        if type(other) is not type(self):
            return NotImplemented
        return _same(_values(self), _values(other))

    def _check_sliding_layers(self, streaming: set[int]) -> None:
        sliding = set(self.sliding_layers)
        if len(sliding) != len(self.sliding_layers) or not sliding <= set(range(self.num_layers)):
            layers = list(self.sliding_layers)
            raise HybridError(f"sliding_layers: {layers}: not layers of the model, each once. Fix: name those of the base")
        if (self.sliding_window > 0) != bool(sliding) or self.sliding_window < 0:
            raise HybridError(
                f"sliding_window: {self.sliding_window}: with {len(sliding)} sliding layers. Fix: set it to the base's window, "
                "and to 0 where no layer slides"
            )
        if both := sorted(sliding & streaming):
            raise HybridError(
                f"lazy_layers: {both}: they see {self.sliding_window:,} tokens in the base already, and only its full layers can "
                f"stream. Fix: name layers of {list(self.full_in_base)}"
            )

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

    def number_of_streaming_heads(self, kv_heads: int) -> int:
        """How many KV heads stream, of all layers, which have `kv_heads` each."""
        return sum(map(len, self.streaming_heads(kv_heads)))

    def split_heads(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a split layer that stream; none where the layer is not split."""
        return dict(self.split_layers).get(layer, ())

    @property
    def streaming_layers(self) -> tuple[int, ...]:
        """The layers that stream with all their heads or with some."""
        return tuple(sorted([*self.lazy_layers, *dict(self.split_layers)]))

    @property
    def full_in_base(self) -> tuple[int, ...]:
        """The layers that have full attention in the base: the only ones that can stream."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.sliding_layers)

    @property
    def all_full(self) -> "HybridSpec":
        """The spec of the base: the same model without anything that streams. Its sliding layers slide."""
        return replace(self, lazy_layers=(), split_layers=())

    def on(self, base: "HybridSpec") -> "HybridSpec":
        """This spec in a model whose base has sliding layers: those of `base`.

        Raises:
            HybridError: one of them streams.
        """
        return replace(self, sliding_layers=base.sliding_layers, sliding_window=base.sliding_window)

    @property
    def sliding(self) -> "HybridSpec":
        """A spec whose sizes are those of the sliding layers' attention: streaming attention without sinks."""
        return HybridSpec(self.num_layers, (), w_sink=0, w_recent=self.sliding_window)

    @property
    def streams(self) -> bool:
        """Whether any head does."""
        return bool(self.lazy_layers or self.split_layers)

    @property
    def version(self) -> str:
        """The version of the code that the hybrid needs."""
        if self.sliding_layers:
            return SLIDING_LAYERS_VERSION
        if self.split_layers:
            return KV_HEADS_VERSION
        return LEARNED_SINKS_VERSION if self.learned_sinks else HYBRID_VERSION

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer, as `layer_types` in a transformers config; a split layer is full there. With sliding layers these
        are the types of the base, whatever streams: rotary embeddings may depend on them."""
        named = set(self.sliding_layers or self.lazy_layers)
        return [STREAMING if layer in named else FULL for layer in range(self.num_layers)]

    @property
    def window(self) -> int:
        """The largest number of tokens that a streaming layer caches per sequence."""
        return self.w_sink + self.w_recent

    def is_lazy(self, layer: int) -> bool:
        """Whether the layer streams with all its heads."""
        return self._lazy_L[layer]

    def slides(self, layer: int) -> bool:
        """Whether the layer has a window in the base."""
        return self._slides_L[layer]

    def cached_tokens(self, tokens: int, kv_heads: int) -> int:
        """Cached tokens of one sequence of `tokens` tokens, summed over all KV heads of all layers."""
        streaming, sliding = self.number_of_streaming_heads(kv_heads), len(self.sliding_layers) * kv_heads
        full = self.num_layers * kv_heads - streaming - sliding
        return full * tokens + streaming * min(tokens, self.window) + sliding * min(tokens, self.sliding_window)


def _values(spec: HybridSpec) -> tuple[Any, ...]:
    sizes = spec.num_layers, spec.w_sink, spec.w_recent, spec.sliding_window
    return *sizes, spec.learned_sinks, spec.lazy_layers, spec.split_layers, spec.sliding_layers


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(_same(x, y) if isinstance(x, tuple) else bool(x == y) for x, y in pairs)
