"""Reasoning and answer, separated while the text is generated."""

from collections.abc import Iterator

from lt_train.inference.text import unfinished
from lt_train.recipe.reasoning_tags import REASONING_TAGS


class ReasoningStream:
    """Parts of one answer's text, each with whether it is reasoning. The tags count as reasoning.

    A tag that may still be completed is held back.

    Args:
        prompt: what the answer follows; some chat templates open the reasoning there.
    """

    def __init__(self, prompt: str) -> None:
        opened = [tags.closing for tags in REASONING_TAGS if prompt.rstrip().endswith(tags.opening)]
        self._closing = opened[0] if opened else None
        self._held = ""

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._closing is not None

    def add(self, text: str) -> Iterator[tuple[str, bool]]:
        text = self._held + text
        while (tag := self._next_tag(text)) is not None:
            end = text.index(tag)
            if self._closing is None:
                yield text[:end], False
                yield tag, True
                self._closing = next(tags.closing for tags in REASONING_TAGS if tags.opening == tag)
            else:
                yield text[: end + len(tag)], True
                self._closing = None
            text = text[end + len(tag) :]
        kept = len(text) - unfinished(text, self._tags)
        self._held = text[kept:]
        yield text[:kept], self.is_reasoning

    def finish(self) -> tuple[str, bool]:
        """The text that was held back."""
        held, self._held = self._held, ""
        return held, self.is_reasoning

    @property
    def _tags(self) -> list[str]:
        return [tags.opening for tags in REASONING_TAGS] if self._closing is None else [self._closing]

    def _next_tag(self, text: str) -> str | None:
        return min((tag for tag in self._tags if tag in text), key=text.index, default=None)
