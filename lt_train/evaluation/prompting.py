"""A problem as the tokens that a model answers to."""

from transformers import PreTrainedTokenizerBase

from lt_train.benchmarks.declaration import Benchmark, Problem
from lt_train.dataset import prompts
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError

SPARE_TOKENS = 16
"""Left free where a text is cut to fit: its two halves may have a few tokens more once they are put together."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, benchmark: Benchmark, problem: Problem, max_prompt_tokens: int
) -> tuple[int, ...]:
    """
    Args:
        prompt: the recipe's. Its user turn wraps problems with a short answer; benchmarks with a prompt of their own only
            take its system turn and chat template.
        max_prompt_tokens: what a benchmark that is cut to fit may have before it is put into the chat template (LongBench's
            max_length); other problems are never cut.

    Raises:
        UserError: the chat template cannot say this prompt.
    """
    text = cut_middle(tokenizer, problem.text, max_prompt_tokens) if benchmark.truncate_middle else problem.text
    if benchmark.prompt_style == "without_chat":
        return tuple(tokenizer(text)["input_ids"])
    return tuple(prompts.prompt_ids(tokenizer, wrapping(prompt, benchmark), {"question": text}))


def room_for_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, benchmark: Benchmark, context: int, max_new_tokens: int
) -> int:
    """`max_prompt_tokens` where the recipe sets none: what the model's context leaves beside the answer and the chat template.

    Raises:
        UserError: it leaves nothing.
    """
    around = 0
    if benchmark.prompt_style != "without_chat":
        around = len(prompts.prompt_ids(tokenizer, wrapping(prompt, benchmark), {"question": ""}))
    room = context - max_new_tokens - around - SPARE_TOKENS
    if benchmark.truncate_middle and room < 2:
        raise UserError(
            f"{benchmark.name}: a context of {context} tokens has no room for a text beside an answer of {max_new_tokens} "
            f"(max_new_tokens) and {around} tokens of the chat template"
        )
    return room


def cut_middle(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> str:
    """As LongBench's pred.py: the first and the last max_tokens // 2 tokens of too long a text, the tokenizer's own special
    tokens counted; the instructions stand at both ends.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= max_tokens:
        return text
    half = max_tokens // 2
    kept = ids[:half], ids[len(ids) - half :]
    return "".join(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False) for part in kept)


def wrapping(prompt: Prompt, benchmark: Benchmark) -> Prompt:
    return prompt if benchmark.prompt_style == "as_recipe" else prompt.model_copy(update={"user": "{question}"})
