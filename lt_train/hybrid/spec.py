"""HybridSpec, which turns a base model into a hybrid: which layers stream, and how many tokens they keep."""

from dataclasses import dataclass, field, replace

HYBRID_VERSION = "1"
LEARNED_SINKS_VERSION = "2"
"""The version of a hybrid with learned sinks: code of version 1 would stop at it instead of leaving them out."""


def version_for(learned_sinks: bool) -> str:
    """The version of the code that a hybrid needs."""
    return LEARNED_SINKS_VERSION if learned_sinks else HYBRID_VERSION


FULL = "full_attention"
STREAMING = "sliding_attention"  # the name in transformers and vLLM for a layer with a window


class HybridError(ValueError):
    """A request that a hybrid cannot compute correctly. The message names the setting, the problem and the fix."""


@dataclass(frozen=True)
class HybridSpec:
    """Which of a model's layers stream, and the sizes of their streaming attention.

    Args:
        num_layers: decoder layers of the model.
        lazy_layers: indices of the layers that stream, ascending. Empty: every layer keeps full attention.
        w_sink: keys at the start of a sequence that stay visible, in tokens; 0 leaves a plain sliding window.
        w_recent: the latest keys a query sees, itself included, in tokens.
        learned_sinks: each query head of a streaming layer has a logit of its own in the softmax's denominator, in place of
            sink tokens (as in gpt-oss, arXiv 2508.10925).

    Raises:
        HybridError: a size or a layer index out of range, a layer named twice, or two kinds of sinks.
    """

    num_layers: int
    lazy_layers: tuple[int, ...]
    w_sink: int = 4
    w_recent: int = 1020
    learned_sinks: bool = field(default=False, repr=False)  # fingerprints of runs without them follow from the repr

    def __post_init__(self) -> None:
        if self.w_sink < 0:
            raise HybridError(f"w_sink: {self.w_sink}: below 0. Fix: set 0 or more tokens")
        if self.w_recent < 1:
            raise HybridError(f"w_recent: {self.w_recent}: below 1, and a query always sees itself. Fix: set 1 or more tokens")
        if self.learned_sinks and self.w_sink:
            raise HybridError(f"w_sink: {self.w_sink}: learned sinks take the place of sink tokens. Fix: set w_sink to 0")
        outside = [layer for layer in self.lazy_layers if not 0 <= layer < self.num_layers]
        if outside:
            raise HybridError(f"lazy_layers: {outside}: not in the model. Fix: name layers from 0 to {self.num_layers - 1}")
        if len(set(self.lazy_layers)) != len(self.lazy_layers):
            raise HybridError(f"lazy_layers: {list(self.lazy_layers)}: a layer is named twice. Fix: name each layer once")
        object.__setattr__(self, "lazy_layers", tuple(sorted(self.lazy_layers)))

    @classmethod
    def from_layer_types(cls, layer_types: list[str], w_sink: int, w_recent: int, learned_sinks: bool = False) -> "HybridSpec":
        lazy = tuple(layer for layer, kind in enumerate(layer_types) if kind == STREAMING)
        return cls(len(layer_types), lazy, w_sink, w_recent, learned_sinks)

    @property
    def all_full(self) -> "HybridSpec":
        """The spec of the base: the same model without streaming layers."""
        return replace(self, lazy_layers=())

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer, as `layer_types` in a transformers config."""
        lazy = set(self.lazy_layers)
        return [STREAMING if layer in lazy else FULL for layer in range(self.num_layers)]

    @property
    def window(self) -> int:
        """The largest number of tokens that a streaming layer caches per sequence."""
        return self.w_sink + self.w_recent

    def is_lazy(self, layer: int) -> bool:
        return layer in self.lazy_layers

    def cached_tokens(self, tokens: int) -> int:
        """Cached tokens of one sequence of `tokens` tokens, summed over all layers."""
        lazy = len(self.lazy_layers)
        return (self.num_layers - lazy) * tokens + lazy * min(tokens, self.window)
