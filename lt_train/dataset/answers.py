"""A conversation as text: the prompt up to where the model answers, and the answer as the chat template would write it there.

Where the chat template writes all of the last answer, its own rendering is followed to the character. Templates that drop the
reasoning of an answer (DeepSeek-R1's) are not: there the answer is put after the prompt as it is.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lt_train.dataset.chat_template import ChatTemplate
from lt_train.dataset.conversations import Conversation
from lt_train.dataset.faults import RowFault
from lt_train.dataset.messages import REASONING, Message
from lt_train.dataset.prompts import render_turns, turns_of
from lt_train.dataset.reasoning import (
    BaseReasoning,
    answer_alone,
    check_reasoning,
    known_tags,
    split_reasoning,
    tags_of_answer,
)
from lt_train.dataset.special_tokens import SpecialTokens, unquoted
from lt_train.recipe.reasoning_tags import ReasoningTags
from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.errors import UserError

_REASONING_KEYS = (REASONING, "reasoning", "thinking")
"""Keys of a message from which chat templates read reasoning: of Qwen3, DeepSeek and GLM; of some servers; of gpt-oss."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """The two texts; special tokens that the data quote are marked in them (`special_tokens`).

    Attributes:
        answer: as trained on, without what ends the turn.
    """

    prompt: str
    answer: str


class AnswerWriter:
    """Writes the conversations of one data set for one base.

    Raises:
        UserError: the chat template cannot be trained with (`ChatTemplate`), or data.reasoning_tags: convert has nothing to convert
            into.
    """

    def __init__(self, data: Data, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> None:
        self.data = data
        self.prompt = prompt
        self.template = ChatTemplate(tokenizer, prompt)
        self.end = self.template.turn_end(eos_ids)
        self.known = known_tags(data.reasoning_tag_pair)
        self.base = base_reasoning(self.template, self.known, data.reasoning_tag_pair is not None)
        if data.reasoning_tags == "convert" and self.base.tags is None:
            raise UserError(
                "data.reasoning_tags: convert: neither the chat template nor the tokenizer of the base shows tags of reasoning. "
                "Fix: name the base's in data.reasoning_tag_pair: [opening, closing], or remove data.reasoning_tags"
            )
        written = () if self.base.tags is None else (self.base.tags.opening, self.base.tags.closing)
        self.special = SpecialTokens(tokenizer, written)
        self._stops = tuple(self.template.stop_names(eos_ids))
        begins = self._before_tag(self.template.generation_prompt())
        self._generation_prompt = begins if self.special.quote(begins) != begins else None

    def write(self, conversation: Conversation) -> AnsweredPrompt:
        """
        Raises:
            RowFault: reasoning would be lost, or not closed as the base closes it.
            UserError: the chat template cannot express the conversation.
        """
        self._refuse_rendered(conversation.messages[-1]["content"])
        turns = turns_of(self.prompt, [self._message(message) for message in conversation.messages])
        prompt = render_turns(self.template, turns)
        reasoning, content = self._parts(conversation)
        tags = self.base.tags
        if tags is not None and self.data.reasoning_tags != "keep" and prompt.rstrip().endswith(tags.closing):
            content = answer_alone(content, reasoning, tags)
        reasoning, content = self.special.quote(reasoning), self.special.quote(content)
        written = self._by_template(turns, prompt, reasoning, content)
        if written is None:
            written = self._by_hand(prompt, reasoning, content)
        return AnsweredPrompt(prompt, written)

    def _refuse_rendered(self, question: str) -> None:
        if self._generation_prompt is not None and self._before_tag(question).endswith(self._generation_prompt):
            raise RowFault(
                f"the question ends with {self._generation_prompt!r}: a chat template was applied to it, and would be again",
                kind="question with a chat template's text",
                fix="give the question alone, or the conversation as messages",
            )

    def _before_tag(self, prompt: str) -> str:
        """A prompt without the tag that opens the answer's reasoning, and without white space around it."""
        return prompt.strip().removesuffix(self.base.tags.opening if self.base.tags else "").strip()

    def _message(self, message: Message) -> Message:
        """A message of the prompt as the chat template takes it."""
        quoted = {key: self.special.quote(text) for key, text in message.items()}
        reasoning = quoted.pop(REASONING, "")
        if not reasoning:
            return quoted
        if self.base.key is not None:
            return {**quoted, self.base.key: reasoning}
        return {**quoted, "content": self._tags.lay(reasoning, quoted["content"])}

    @property
    def _tags(self) -> ReasoningTags:
        if self.base.tags is None:
            raise RowFault(
                "reasoning in a field of its own, and neither the base's chat template nor its tokenizer shows tags for it",
                kind="reasoning without tags",
                fix="name the tags in data.reasoning_tag_pair: [opening, closing], such as [<think>, </think>]",
            )
        return self.base.tags

    def _parts(self, conversation: Conversation) -> tuple[str, str]:
        """Reasoning and content; the content holds the reasoning as well, and the first is "", where the data have it so."""
        content = without_turn_end(conversation.answer, self._stops)
        if not content.strip():
            raise RowFault("the answer is empty; take the row out, or fill it in")
        if conversation.reasoning.strip() and conversation.reasoning.strip() not in content:
            return self._apart(conversation.reasoning, content)
        if self.data.reasoning_tags == "convert":
            tags = tags_of_answer(content, self.base, self.known)
            begins_inside = tags is not None and tags.opening not in content and not self.base.opened
            if tags is not None and (tags != self.base.tags or begins_inside):
                parts = split_reasoning(content, tags)
                if parts is not None:
                    return parts
        if self.data.reasoning_tags != "keep":
            check_reasoning(content, self.base, self.known)
        return "", content

    def _apart(self, reasoning: str, content: str) -> tuple[str, str]:
        """Reasoning that the data give in a field of its own, without tags around it."""
        tags = tags_of_answer(reasoning, self.base, self.known)
        within = None if tags is None else split_reasoning(reasoning, tags)
        if within is not None and not within[1]:
            reasoning = within[0]
        own = self.base.tags
        if tags_of_answer(content, self.base, self.known) is not None or (own is not None and own.closing in reasoning):
            raise RowFault(
                "the answer has reasoning of its own beside that in a field of its own",
                kind="two kinds of reasoning",
                fix="keep one of them",
            )
        return reasoning, content

    def _by_template(self, turns: Sequence[Mapping[str, str]], prompt: str, reasoning: str, content: str) -> str | None:
        """The answer in the template's rendering of the conversation; None where that does not hold all of it."""
        answer = {"role": "assistant", "content": content}
        if reasoning:
            answer |= {self.base.key: reasoning} if self.base.key else {"content": self._tags.lay(reasoning, content)}
        rendered = self.template.render([*turns, answer], add_generation_prompt=False)
        if not rendered.startswith(prompt):
            return None
        written, end, after = rendered[len(prompt) :].rpartition(self.end.text)
        if not end or after.strip():
            return None
        if reasoning and self.base.key:
            before = _before_end(_squeezed(written), _squeezed(content))
            return written if before is not None and _squeezed(reasoning) in before else None
        before = _before_end(_squeezed(written), _squeezed(self._unopened(prompt, answer["content"])))
        return written if before == _squeezed(self._before(answer["content"])) else None

    def _by_hand(self, prompt: str, reasoning: str, content: str) -> str:
        answer = self._tags.lay(reasoning, content) if reasoning else content
        return self._before(answer) + self._unopened(prompt, answer)

    def _before(self, content: str) -> str:
        """The template's text before an answer; empty reasoning only where the answer has none and the template keeps it."""
        before = self.template.before_answer
        tags = self.base.tags
        if tags is None or tags.closing not in before:
            return before
        has_reasoning = tags_of_answer(content, self.base, self.known) is not None
        return before if self.base.kept and not has_reasoning else ""

    def _unopened(self, prompt: str, answer: str) -> str:
        """The answer without the tag that opens its reasoning, where the prompt has written that tag already."""
        if self.base.tags is None or not self.base.opened:
            return answer
        opening = self.base.tags.opening
        if not answer.lstrip().startswith(opening):
            return answer
        gap = prompt[prompt.rindex(opening) + len(opening) :]
        return answer.lstrip().removeprefix(opening).removeprefix(gap)


def base_reasoning(template: ChatTemplate, known: tuple[ReasoningTags, ...], own_pair: bool) -> BaseReasoning:
    """How a base writes reasoning: as its generation prompt, its chat template or its tokenizer's tokens show.

    Args:
        own_pair: the first of `known` is the recipe's own, and the base's where that shows none.
    """
    key, end = template.reasoning_key(_REASONING_KEYS), template.generation_prompt()
    tags = next((tags for tags in known if tags.opening in end), None) or _tags_opened_by(end)
    if tags is not None:
        opened = tags.closing not in end.rpartition(tags.opening)[2]
        return BaseReasoning(tags, opened, key, template.keeps(tags.opening, tags.closing))
    vocabulary = template.tokenizer.get_added_vocab()
    tags = next((tags for tags in known if tags.closing in template.text), None)
    tags = tags or next((tags for tags in known if tags.opening in vocabulary and tags.closing in vocabulary), None)
    tags = tags or (known[0] if own_pair else None)
    return BaseReasoning(tags, False, key, tags is None or template.keeps(tags.opening, tags.closing))


def _tags_opened_by(generation_prompt: str) -> ReasoningTags | None:
    """The tags that a generation prompt opens with its last XML tag: the family need not be known."""
    found = re.search(r"<([A-Za-z][\w:-]+)>\s*$", generation_prompt)
    return None if found is None else ReasoningTags(f"<{found[1]}>", f"</{found[1]}>")


def without_turn_end(answer: str, stops: tuple[str, ...]) -> str:
    """The answer without stop tokens at its end: it gets the one that the chat template writes."""
    while answer.rstrip().endswith(stops):
        stripped = answer.rstrip()
        answer = stripped.removesuffix(next(stop for stop in stops if stripped.endswith(stop)))
    return answer


def _before_end(text: str, end: str) -> str | None:
    return text[: len(text) - len(end)] if text.endswith(end) else None


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim and add around reasoning."""
    return "".join(unquoted(text).split())
