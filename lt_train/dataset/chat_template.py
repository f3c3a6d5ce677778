"""The text that a chat template writes around those of a conversation, found by rendering made-up conversations."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lt_train.dataset.special_tokens import encode
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError

OWN_TEMPLATE = ". Change the recipe's prompt, or give a template of your own: prompt.chat_template"

_FIRST, _ANSWER, _SECOND, _REASONING = "firstquestion7301", "firstanswer7302", "secondquestion7303", "reasoning7304"
"""Placeholders of a conversation's texts while a chat template is probed."""

_TODAY = date(2024, 7, 26)
"""The day of every prompt. Templates of Llama 3.2 and SmolLM3 write that of the clock into the system turn, so that a run would be
trained and evaluated with other prompts from one day to the next. It is the one that Llama 3.1's and 3.2's templates fall back to.
"""

_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class TurnEnd:
    """How the chat template ends an assistant turn: its text up to the end-of-sequence token, and that token."""

    text: str
    eos_id: int


class ChatTemplate:
    """The chat template of a tokenizer, or of the recipe.

    Raises:
        UserError: there is none, or its file cannot be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        self.tokenizer = tokenizer
        self.is_own = prompt.chat_template is not None
        self.text = _CLOCK.sub(lambda call: json.dumps(_TODAY.strftime(call["format"])), _template_text(tokenizer, prompt))

    def render(self, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """A conversation without the template's default system turn.

        Raises:
            UserError: the template refuses the conversation, or where its default system turn ends is unknown.
        """
        text = self._apply(turns, add_generation_prompt=add_generation_prompt)
        return text if turns[0]["role"] == "system" else self._without_default_system_turn(text)

    @property
    def default_system_turn(self) -> str:
        """What `render` leaves out: the system turn that the template writes by itself; "" where it writes none.

        Raises:
            UserError: where it ends is unknown.
        """
        preamble, kept = self._preamble
        return preamble[len(kept) :]

    def turn_end(self, eos_ids: Collection[int] = ()) -> TurnEnd:
        """How an assistant turn ends.

        Args:
            eos_ids: tokens besides the tokenizer's eos at which generation stops (generation_config.eos_token_id).

        Raises:
            UserError: the template does not end the turn with such a token, so a model trained on it would never stop.
        """
        names = self.stop_names(eos_ids)
        after = self._after_answer
        found = [(after.index(name), name) for name in names if name in after]
        if not found or after[: min(found)[0]].strip():
            raise UserError(
                f"the final eos would get no label: the chat template ends an assistant turn with {after!r}, generation stops at "
                f"{', '.join(names)}. Fix: set prompt.stop_token to the token that ends the turn, or give a template that ends it "
                "with one of these (prompt.chat_template)"
            )
        start, name = min(found)
        return TurnEnd(after[: start + len(name)], names[name])

    def stop_names(self, eos_ids: Collection[int] = ()) -> dict[str, int]:
        """The tokens at which generation stops, and their ids."""
        stops = {self.tokenizer.eos_token_id, *eos_ids} - {None}
        if not stops:
            raise UserError(
                "the tokenizer has no eos token: a trained model could not stop; set eos_token in tokenizer_config.json"
            )
        return {str(self.tokenizer.convert_ids_to_tokens(stop)): stop for stop in sorted(stops)}

    @cached_property
    def before_answer(self) -> str:
        """The text between generation prompt and answer: nothing, a space (Mistral), empty reasoning (Qwen3).

        "" where the template writes an answer otherwise than its own generation prompt begins it.
        """
        whole, prompt = self._conversation(2), self._conversation(1, add_generation_prompt=True)
        return _between(whole, None, _ANSWER)[len(prompt) :] if whole.startswith(prompt) else ""

    def generation_prompt(self) -> str:
        """The text after the question, up to where the model continues."""
        return _between(self._conversation(1, add_generation_prompt=True), _FIRST, None)

    def reasoning_key(self, keys: Sequence[str]) -> str | None:
        """The first key of a message whose text the template writes before the answer; None: it reads none of them."""
        for key in keys:
            text = self._conversation(2, {key: _REASONING})
            if _REASONING in text and _REASONING in text.partition(_ANSWER)[0]:
                return key
        return None

    def keeps(self, opening: str, closing: str) -> bool:
        """Whether the template writes reasoning that is between these tags in the last answer."""
        return _REASONING in self._conversation(2, {"content": f"{opening}\n{_REASONING}\n{closing}\n\n{_ANSWER}"})

    def _apply(self, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    chat_template=self.text,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(f"the chat template refuses a conversation of {roles}: {error}{OWN_TEMPLATE}") from error

    def _without_default_system_turn(self, text: str) -> str:
        preamble, kept = self._preamble
        if preamble == kept:
            return text
        if not text.startswith(preamble):
            raise UserError(f"where the chat template's default system turn ends is unknown in {text[:200]!r}{OWN_TEMPLATE}")
        return kept + text[len(preamble) :]

    @cached_property
    def _preamble(self) -> tuple[str, str]:
        """The text that a template without system turn puts before the first user turn, and the part of it that is no system turn.

        The header of a user turn is learnt from a second one, which no system turn precedes.
        """
        try:
            header = self._user_header
            before = _between(self._conversation(3), None, _FIRST)
            if not before.endswith(header):
                raise UserError("the first user turn begins otherwise than later ones")
        except UserError as error:
            if self.is_own:  # written for this recipe: taken as it is
                return "", ""
            raise UserError(
                f"prompt.system is null, and whether the chat template then puts in a system turn of its own is unknown: {error}. "
                "Set prompt.system, or give a template of your own: prompt.chat_template"
            ) from error
        preamble = before[: len(before) - len(header)]
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        if special.issuperset(encode(self.tokenizer, preamble)):
            return preamble, preamble  # such as <s>, or [gMASK]<sop>
        bos = self.tokenizer.bos_token or ""
        begins_a_sequence = bool(bos) and preamble.startswith(bos) and not header.startswith(bos)  # SmolLM2's bos begins every turn
        return preamble, bos if begins_a_sequence else ""

    @cached_property
    def _user_header(self) -> str:
        """The text between the end of an assistant turn and the text of the user turn after it."""
        between = _between(self._conversation(3), _ANSWER, _SECOND)
        end = self._after_answer
        if not between.startswith(end):
            raise UserError(f"an answer ends with {end!r} at the end of a conversation, but with {between!r} inside it")
        return between[len(end) :]

    @cached_property
    def _after_answer(self) -> str:
        """The text after that of a conversation's last answer."""
        return _between(self._conversation(2), _ANSWER, None)

    def _conversation(self, turns: int, answer: Mapping[str, str] | None = None, *, add_generation_prompt: bool = False) -> str:
        messages = [
            {"role": "user", "content": _FIRST},
            {"role": "assistant", "content": _ANSWER, **(answer or {})},
            {"role": "user", "content": _SECOND},
        ]
        return self._apply(messages[:turns], add_generation_prompt=add_generation_prompt)


def own_template(prompt: Prompt) -> str | None:
    """The recipe's own template; None: it uses the tokenizer's.

    Raises:
        UserError: its file cannot be read.
    """
    if prompt.chat_template is None:
        return None
    try:
        return Path(prompt.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt.chat_template: {Path(prompt.chat_template).absolute()} cannot be read: {error}") from error


def _template_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    own = own_template(prompt)
    if own is not None:
        return own
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so there is no prompt to train or evaluate with. "
            "Give one as a Jinja file: prompt.chat_template"
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, none of them called "default"
        raise UserError(f"the tokenizer of {tokenizer.name_or_path}: {error}{OWN_TEMPLATE}") from error


def _between(text: str, left: str | None, right: str | None) -> str:
    """The part of `text` after `left` and before `right`, each of which must be there once; None: the text's own end."""
    for marker in (left, right):
        if marker is not None and text.count(marker) != 1:
            raise UserError(f"the text of a turn occurs {text.count(marker)} times in what the chat template writes")
    start = 0 if left is None else text.index(left) + len(left)
    return text[start : None if right is None else text.index(right)]
