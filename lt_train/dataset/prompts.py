"""One prompt for training, calibration and evaluation: the recipe's system and user turns in the model's chat template.

Text is tokenized without the tokenizer's own special tokens: a chat template writes its beginning-of-sequence token itself.
"""

from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from lt_train.dataset.chat_template import OWN_TEMPLATE, ChatTemplate, TurnEnd
from lt_train.dataset.special_tokens import SpecialTokens
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, fields: Mapping[str, str]) -> str:
    """The text that a model answers; it ends with the generation prompt.

    Args:
        fields: {"question": …}.

    Raises:
        UserError: no chat template, or one that cannot express this prompt.
    """
    return render_messages(tokenizer, prompt, [{"role": "user", "content": fields["question"]}])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, fields: Mapping[str, str]) -> list[int]:
    """`render_prompt` as token ids. A special token that the question quotes is tokenized as text."""
    special = SpecialTokens(tokenizer)
    return special.encode(render_prompt(tokenizer, prompt, {"question": special.quote(fields["question"])}))


def render_messages(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation up to the generation prompt. The recipe's user template wraps every user turn.

    A system turn of the conversation's own goes before the recipe's. Where neither has one the text has none, even if the
    chat template would put one in.
    """
    return render_turns(ChatTemplate(tokenizer, prompt), turns_of(prompt, messages))


def render_turns(template: ChatTemplate, turns: Sequence[Mapping[str, str]]) -> str:
    """As `render_messages`, of turns that hold the recipe's own already."""
    text = template.render(turns, add_generation_prompt=True)
    for turn in (turns[0], turns[-1]):
        if turn["content"].strip() not in text:
            raise UserError(f"the chat template drops or changes the {turn['role']} turn {turn['content'][:80]!r}{OWN_TEMPLATE}")
    return text


def turns_of(prompt: Prompt, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """A conversation with the recipe's system and user turns."""
    turns = [{**turn, "content": _user_turn(prompt, turn["content"])} if turn["role"] == "user" else turn for turn in messages]
    if turns[0]["role"] != "system" and prompt.system is not None:
        return [{"role": "system", "content": prompt.system}, *turns]
    return turns


def turn_end(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, eos_ids: Collection[int] = ()) -> TurnEnd:
    """How an assistant turn ends (`ChatTemplate.turn_end`)."""
    return ChatTemplate(tokenizer, prompt).turn_end(eos_ids)


def _user_turn(prompt: Prompt, question: str) -> str:
    """The user template with its {question} replaced; a question's own braces, and LaTeX's, are left alone."""
    return prompt.user.replace("{question}", question)
