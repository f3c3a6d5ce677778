"""One prompt for training, calibration and evaluation: the recipe's system and user turns in the model's chat template.

Text is tokenized without the tokenizer's own special tokens: a chat template writes its beginning-of-sequence token itself.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError

Message = Mapping[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": …}."""

_FIRST, _ANSWER, _SECOND = "firstquestion7301", "firstanswer7302", "secondquestion7303"
"""What stands for a conversation's texts while a chat template is probed."""


@dataclass(frozen=True)
class TurnEnd:
    """How the chat template ends an assistant turn: its text up to the end-of-sequence token, and that token."""

    text: str
    eos_id: int


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, fields: Mapping[str, str]) -> str:
    """The text a model answers to; it ends with the generation prompt.

    Args:
        fields: {"question": …}.

    Raises:
        UserError: no chat template, or one that cannot say this prompt.
    """
    return render_messages(tokenizer, prompt, [{"role": "user", "content": fields["question"]}])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, fields: Mapping[str, str]) -> list[int]:
    """`render_prompt` as token ids."""
    return encode(tokenizer, render_prompt(tokenizer, prompt, fields))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render_messages(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, messages: Sequence[Message]) -> str:
    """A conversation up to the generation prompt. The recipe's user template wraps every user turn.

    A system turn of the conversation's own goes before the recipe's. Where neither has one the text has none, even if the
    chat template would put one in.
    """
    turns = [{**turn, "content": _user_turn(prompt, turn["content"])} if turn["role"] == "user" else turn for turn in messages]
    if turns[0]["role"] != "system" and prompt.system is not None:
        turns = [{"role": "system", "content": prompt.system}, *turns]
    text = _apply_template(tokenizer, prompt, turns, add_generation_prompt=True)
    for turn in (turns[0], turns[-1]):
        if turn["content"].strip() not in text:
            raise UserError(f"the chat template drops or changes the {turn['role']} turn {turn['content'][:80]!r}{_OWN_TEMPLATE}")
    return text if turns[0]["role"] == "system" else _without_default_system_turn(tokenizer, prompt, text)


def turn_end(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, eos_ids: Collection[int] = ()) -> TurnEnd:
    """How an assistant turn ends.

    Args:
        eos_ids: tokens besides the tokenizer's eos at which generation stops (generation_config.eos_token_id).

    Raises:
        UserError: the template does not end the turn with such a token, so a model trained on it would never stop.
    """
    stops = {tokenizer.eos_token_id, *eos_ids} - {None}
    if not stops:
        raise UserError("the tokenizer has no eos token: a trained model could not stop; set eos_token in tokenizer_config.json")
    names = {tokenizer.convert_ids_to_tokens(stop): stop for stop in sorted(stops)}
    after = _after_answer(tokenizer, prompt)
    found = [(after.index(name), name) for name in names if name in after]
    if not found or after[: min(found)[0]].strip():
        raise UserError(
            f"the final eos would get no label: the chat template ends an assistant turn with {after!r}, generation stops at "
            f"{', '.join(names)}. Make one of these end the turn: in eos_token_id of the base's generation_config.json, in the "
            "tokenizer's eos_token, or in a template of your own (prompt.chat_template)"
        )
    start, name = min(found)
    return TurnEnd(after[: start + len(name)], names[name])


def _user_turn(prompt: Prompt, question: str) -> str:
    """The user template with its {question} replaced; a question's own braces, and LaTeX's, are left alone."""
    return prompt.user.replace("{question}", question)


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, turns: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    own = None
    if prompt.chat_template is not None:
        try:
            own = Path(prompt.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt.chat_template: {Path(prompt.chat_template).absolute()} cannot be read: {error}") from error
    elif not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so there is no prompt to train or evaluate with. "
            "Give one as a Jinja file: prompt.chat_template"
        )
    try:
        return tokenizer.apply_chat_template(
            list(turns), chat_template=own, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"the chat template refuses a conversation of {roles}: {error}{_OWN_TEMPLATE}") from error


_OWN_TEMPLATE = ". Change the recipe's prompt, or give a template of your own: prompt.chat_template"


def _without_default_system_turn(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> str:
    preamble, kept = _preamble(tokenizer, prompt)
    if preamble == kept:
        return text
    if not text.startswith(preamble):
        raise UserError(f"where the chat template's default system turn ends cannot be told in {text[:200]!r}{_OWN_TEMPLATE}")
    return kept + text[len(preamble) :]


def _preamble(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, str]:
    """What a template without system turn puts before the first user turn, and what of it is no default system turn.

    The header of a user turn is learnt from a second one, which no system turn precedes.
    """
    try:
        header = _user_header(tokenizer, prompt)
        before = _between(_conversation(tokenizer, prompt, 3), None, _FIRST)
        if not before.endswith(header):
            raise UserError("the first user turn begins otherwise than later ones")
    except UserError as error:
        if prompt.chat_template is not None:  # written for this recipe: taken as it stands
            return "", ""
        raise UserError(
            f"prompt.system is null, and whether the chat template then puts in a system turn of its own cannot be told: {error}. "
            "Set prompt.system, or give a template of your own: prompt.chat_template"
        ) from error
    preamble = before[: len(before) - len(header)]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if special.issuperset(encode(tokenizer, preamble)):
        return preamble, preamble  # such as <s>, or [gMASK]<sop>
    bos = tokenizer.bos_token or ""
    begins_a_sequence = bool(bos) and preamble.startswith(bos) and not header.startswith(bos)  # SmolLM2's bos begins every turn
    return preamble, bos if begins_a_sequence else ""


def _user_header(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """What a template writes between the end of an assistant turn and the text of the user turn after it."""
    between = _between(_conversation(tokenizer, prompt, 3), _ANSWER, _SECOND)
    end = _after_answer(tokenizer, prompt)
    if not between.startswith(end):
        raise UserError(f"an answer ends with {end!r} at the end of a conversation, but with {between!r} inside it")
    return between[len(end) :]


def _after_answer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """What a template writes after the text of a conversation's last answer."""
    return _between(_conversation(tokenizer, prompt, 2), _ANSWER, None)


def _conversation(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, turns: int) -> str:
    messages = [
        {"role": "user", "content": _FIRST},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _SECOND},
    ]
    return _apply_template(tokenizer, prompt, messages[:turns], add_generation_prompt=False)


def _between(text: str, left: str | None, right: str | None) -> str:
    """The part of `text` after `left` and before `right`, each of which must be there once; None: the text's own end."""
    for marker in (left, right):
        if marker is not None and text.count(marker) != 1:
            raise UserError(f"the text of a turn stands {text.count(marker)} times in what the chat template writes")
    start = 0 if left is None else text.index(left) + len(left)
    return text[start : None if right is None else text.index(right)]
