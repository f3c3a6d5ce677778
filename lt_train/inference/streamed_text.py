"""The text of an answer while its tokens come: each piece is final, and all pieces together are the answer's text."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from lt_train.inference.text import cut_at_stop_string, decode, unfinished

INCOMPLETE = "\ufffd"
"""What a tokenizer writes for the first bytes of a character."""


class StreamedText:
    """One answer.

    A character whose bytes have not all come is held back, and so is what may be the beginning of a stop string.

    Args:
        stop_ids: tokens that end the answer; they are no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), stop_ids: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.stop_ids = stop_ids
        self.sent = ""
        self._held = ""
        self._window: list[int] = []
        """The latest tokens. Some tokenizers write a token otherwise at the beginning of a text, so the first ones are context."""
        self._context = 0

    def add(self, token_id: int) -> str:
        """The text that a new token makes final."""
        if token_id in self.stop_ids:
            return ""
        self._window.append(token_id)
        text = decode(self.tokenizer, self._window)
        known = decode(self.tokenizer, self._window[: self._context])
        if text.endswith(INCOMPLETE) or len(text) <= len(known):
            return ""
        self._context, self._window = len(self._window) - self._context, self._window[self._context :]
        return self._release(text[len(known) :])

    def finish(self, text: str) -> str:
        """The rest of the answer.

        Args:
            text: of the complete answer.
        """
        rest = text[len(self.sent) :]
        self.sent = text
        return rest

    def _release(self, new: str) -> str:
        text = self._held + new
        before_stop = cut_at_stop_string(text, self.stop)
        if before_stop is None:
            kept = len(text) - unfinished(text, self.stop)
            before_stop, self._held = text[:kept], text[kept:]
        self.sent += before_stop
        return before_stop
