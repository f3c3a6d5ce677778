"""`--draft streaming`, `--draft-layers` and `--draft-length`: speculative decoding in `lt-train serve` and `chat`."""

from dataclasses import dataclass

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.draft import Draft
from lt_train.runtime.errors import UserError, shortened


def as_option(setting: str) -> str:
    """draft_layers -> --draft-layers."""
    return f"--{setting.replace('_', '-')}"


@dataclass(frozen=True)
class DraftOptions:
    """Options of the draft of a model that is not loaded yet.

    Attributes:
        layers: stream in the draft besides what streams in the model; None: all.
        length: tokens of a round; None: as many as measurements suggest.
    """

    layers: tuple[int, ...] | None = None
    length: int | None = None

    @classmethod
    def of(cls, draft: str | None, layers: str | None, length: int | None) -> "DraftOptions | None":
        """The options as they are written on the command line.

        Raises:
            UserError: options of a draft without one, or no list of layers.
        """
        if draft is None:
            for option, given in (("--draft-layers", layers), ("--draft-length", length)):
                if given is not None:
                    raise UserError(f"{option}: {given}: nothing drafts. Fix: add --draft streaming, or remove {option}")
            return None
        try:
            return cls(None if layers is None else tuple(map(int, layers.split(","))), length)
        except ValueError:
            raise UserError(f"--draft-layers: {shortened(str(layers))}: no list of layers. Fix: write it as 1,5,6") from None

    def draft(self, model: HybridSpec) -> Draft:
        """Raises UserError: see `Draft.of`."""
        return Draft.of(model, self.layers, self.length, written=as_option)

    def __str__(self) -> str:
        streaming = "all layers stream" if self.layers is None else f"layers {', '.join(map(str, self.layers))} stream, too"
        proposed = "as many tokens as pay" if self.length is None else f"{self.length} tokens"
        return f"{streaming}; it proposes {proposed} in a round"
