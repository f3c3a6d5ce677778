"""Chat templates as real model families write them, shortened, and a tokenizer that reads any of them.

Each has what trips a renderer up: a system turn that comes by itself (Qwen2.5, SmolLM2, Llama 3.1), a bos that is also the
header of every turn (SmolLM2), reasoning that is dropped (Qwen3, R1), a thought that the generation prompt opens (R1).
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    + CHATML_TURNS
)
LLAMA3_TURNS = (
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA31_TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' + s + '<|eot_id|>' }}"
) + LLAMA3_TURNS.replace("in messages", "in rest")
QWEN3 = (
    "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + c }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + c }}{% endif %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LLAMA2_DEFAULT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first %}{{ '<<SYS>>Be safe.<</SYS>> ' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)

QWEN3_REASONING = (
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% else %}{% set c = m.content %}{% set r = '' %}"
    "{% if m.reasoning_content is defined and m.reasoning_content is not none %}{% set r = m.reasoning_content %}"
    "{% elif '</think>' in c %}{% set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\\n<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' + c.lstrip('\\n') }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + c }}{% endif %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""As Qwen3's own for conversations without tools: it reads reasoning_content, and keeps the reasoning of the last answer."""

QWEN3_THINKING = QWEN3_REASONING.replace(
    "{{ '<|im_start|>assistant\\n' }}{% endif %}", "{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
"""As Qwen3's thinking models: the generation prompt opens the reasoning, too."""

QWEN3_WITHOUT_THINKING = QWEN3_REASONING.replace(
    "{{ '<|im_start|>assistant\\n' }}{% endif %}", "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
"""As Qwen3's own with enable_thinking off: the generation prompt opens the reasoning and closes it."""

SMOLLM3 = (
    "{% set s = messages[0].content if messages[0].role == 'system' else 'You are SmolLM.' %}"
    "{% set close = '<think>\\n\\n</think>\\n' if '/no_think' in s else '' %}"
    "{{ '<|im_start|>system\\nToday Date: ' + strftime_now(\"%d %B %Y\") + '\\n\\n' + s + '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' }}{% generation %}"
    "{{ (close if m.role == 'assistant' else '') + m.content + '<|im_end|>\\n' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + close }}{% endif %}"
)
"""Its system turn has the day of the clock, and decides whether the generation prompt closes the reasoning."""

NEWLINE_FIRST = LLAMA3_TURNS.replace("m.content | trim", "('\\n' if m.role == 'assistant' else '') + m.content | trim")
"""Writes a newline before an answer that the generation prompt has not written."""

FAMILIES: dict[str, tuple[str, str | None, str]] = {
    "qwen2.5": (CHATML_DEFAULT, None, "<|im_end|>"),
    "smollm2": (CHATML_DEFAULT, "<|im_start|>", "<|im_end|>"),
    "llama3": ("{{ bos_token }}" + LLAMA3_TURNS, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.1": (LLAMA31_TURNS, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": (MISTRAL, "<s>", "</s>"),
    "qwen3": (QWEN3, None, "<|im_end|>"),
    "r1": (R1, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
"""Family -> template, bos, eos."""

REASONING_FAMILIES = {
    **FAMILIES,
    "qwen3-reasoning": (QWEN3_REASONING, None, "<|im_end|>"),
    "qwen3-thinking": (QWEN3_THINKING, None, "<|im_end|>"),
    "qwen3-without-thinking": (QWEN3_WITHOUT_THINKING, None, "<|im_end|>"),
    "smollm3": (SMOLLM3, None, "<|im_end|>"),
    "still": (CHATML_TURNS + "{# keeps <|begin_of_thought|> … <|end_of_thought|> #}", None, "<|im_end|>"),
    "newline": ("{{ bos_token }}" + NEWLINE_FIRST, "<|begin_of_text|>", "<|eot_id|>"),
}
"""FAMILIES, and templates that keep reasoning."""

SPECIAL = (  # noqa: SIM905
    "<|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <s> </s> "
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> [gMASK] <sop>"
).split()


def byte_tokenizer(
    template: str | None, bos: str | None, eos: str | None, merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """One token for each byte of NFC-normalised text and for each of `merges`, as Qwen's tokenizers work."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, list(merges)))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template)


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(*REASONING_FAMILIES[family])
