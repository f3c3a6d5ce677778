"""The tags that enclose the reasoning of an answer, by the families of models and data that write them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningTags:
    """One family's tags, and how it lays an answer between and after them.

    Attributes:
        opening, closing: enclose the reasoning.
        gap: white space after `opening` and before `closing`.
        answer_opening, answer_closing: enclose what follows the reasoning, where the family marks that too.
    """

    opening: str
    closing: str
    gap: str = "\n"
    answer_opening: str = ""
    answer_closing: str = ""

    def lay(self, reasoning: str, content: str) -> str:
        """The answer as this family writes it."""
        answer = content.strip()
        if self.answer_opening:
            answer = f"{self.answer_opening}{self.gap}{answer}{self.gap}{self.answer_closing}"
        return f"{self.opening}{self.gap}{reasoning.strip()}{self.gap}{self.closing}\n\n{answer}"


THINK = ReasoningTags("<think>", "</think>")
"""DeepSeek-R1 and its distilled models, QwQ, Qwen3."""

STILL = ReasoningTags("<|begin_of_thought|>", "<|end_of_thought|>", "\n\n", "<|begin_of_solution|>", "<|end_of_solution|>")
"""STILL, OpenThoughts, Sky-T1, Bespoke-Stratos."""

REASONING_TAGS = (
    THINK,
    STILL,
    ReasoningTags("<thinking>", "</thinking>"),
    ReasoningTags("<thought>", "</thought>"),
    ReasoningTags("<reasoning>", "</reasoning>"),
    ReasoningTags("[THINK]", "[/THINK]", ""),
    ReasoningTags("<seed:think>", "</seed:think>"),
    ReasoningTags("◁think▷", "◁/think▷", ""),
)
"""All that are known, the most usual first."""

REASONING_ENDS = tuple(tags.closing for tags in REASONING_TAGS)
"""What closes the reasoning of an answer."""
