"""Columns of a row."""

from collections.abc import Iterator

from pydantic import Field

from lt_train.recipe.faults import Fault
from lt_train.recipe.part import Part, Text


class Columns(Part):
    """Where a row holds its parts: names of columns, and dotted paths into what they hold (thinking_trajectories.0)."""

    messages: Text | None = None
    """A conversation that ends with an answer, instead of question and answer."""
    question: Text | None = None
    """The question, as text or as a list of messages."""
    input: Text | None = None
    """Text that belongs to the question and is put after it. It may be empty."""
    answer: Text | None = None
    """The answer, as text or as a list of messages; with `verified` a list of texts."""
    reasoning: Text | None = None
    """The reasoning, where it is not part of the answer."""
    system: Text | None = None
    """The system turn of the row."""
    verified: list[Text] = Field(default=[])
    """Columns of true and false, one for each item of a list of answers. Answers that are true in all of them are trained on."""

    def conflicts(self) -> Iterator[Fault]:
        needed = {"question": self.question, "answer": self.answer}
        if self.messages is None:
            for name in needed:
                if needed[name] is None:
                    yield Fault((name,), "missing", f"name the column that holds the {name}")
            return
        for name, column in {**needed, "input": self.input, "verified": self.verified}.items():
            if column:
                yield Fault((name, "messages"), "messages hold question and answer", f"remove {name} or messages")
