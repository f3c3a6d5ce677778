"""The tiny reasoner's tokenizer: one token for each symbol of a ledger text.

It splits with `data.ledger.SYMBOL`, and any printable ASCII character that is no ledger symbol is a token of its own,
so that `decode(encode(text)) == text` for all printable ASCII text. Everything else becomes `<|unk|>`.
"""

import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.ledger import KEYS, SYMBOL, WORDS

UNKNOWN, PADDING, END_OF_TURN = "<|unk|>", "<|pad|>", "<|im_end|>"
SPECIALS = (PADDING, UNKNOWN, "<|im_start|>", END_OF_TURN)
TRACE_TAGS = ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>")
"""One token each, but not special: `skip_special_tokens` must leave them in the text, as with Qwen3's `<think>`."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' ~ message.role ~ ': use system, user or assistant') -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def vocabulary() -> list[str]:
    """Specials first, then the ledger's symbols, then what is left of ASCII."""
    numbers = [str(number) for number in range(100)]
    labels = [f"{number}. " for number in range(1, len(KEYS) + 1)]
    marked_keys = [f"{key}>" for key in KEYS]
    roles = ["system", "user", "assistant"]
    ascii_characters = [chr(code) for code in range(128) if chr(code).isprintable() or chr(code) in string.whitespace]
    tokens = [*SPECIALS, *TRACE_TAGS, *numbers, *labels, *marked_keys, "\\boxed{", *WORDS, *roles, *ascii_characters]
    return list(dict.fromkeys(tokens))


def build_tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: index for index, token in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    roles = r"(?:system|user|assistant)(?=\n)"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{roles}|{SYMBOL.pattern}"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TRACE_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        eos_token=END_OF_TURN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
