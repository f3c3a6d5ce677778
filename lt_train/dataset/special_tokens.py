"""Special tokens that occur in data as text: a row that quotes <|im_end|> must not end the turn.

Each is quoted, with a mark inside it, before the chat template lays its own special tokens around the text; what is marked is
tokenized as the characters that it consists of.
"""

import re
from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

MARK = "\ue0f1\ue0f2"
"""Two characters of Unicode's private use area."""


class SpecialTokens:
    """The special tokens of a tokenizer.

    Args:
        written: tokens that data write for the model to read, such as the base's tags of reasoning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Collection[str] = ()) -> None:
        self.tokenizer = tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted((added | set(tokenizer.all_special_tokens)) - set(written), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._quoted = re.compile("(" + ("|".join(re.escape(_quoted(token)) for token in tokens) or r"(?!)") + ")")

    def quote(self, text: str) -> str:
        return self._token.sub(lambda found: _quoted(found[0]), text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which quoted tokens are text and all others are tokens."""
        if MARK not in text:
            return encode(self.tokenizer, text)
        ids: list[int] = []
        for at, part in enumerate(self._quoted.split(text)):
            if part:
                ids += encode(self.tokenizer, unquoted(part), split_special_tokens=at % 2 == 1)
        return ids


def unquoted(text: str) -> str:
    return text.replace(MARK, "")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, split_special_tokens: bool = False) -> list[int]:
    """Token ids of a text, without special tokens that the tokenizer would add by itself."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"]
    return ids


def _quoted(token: str) -> str:
    return token[0] + MARK + token[1:]
