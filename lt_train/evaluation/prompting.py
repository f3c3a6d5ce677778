"""A problem as the tokens of a model's prompt."""

from transformers import PreTrainedTokenizerBase

from lt_train.benchmarks.declaration import Benchmark, Problem
from lt_train.dataset import prompts
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError

SPARE_TOKENS = 16
"""Left free where a text is truncated: its two halves may have a few tokens more once they are put together."""

BARE_QUESTION = "{question}"


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    benchmark: Benchmark,
    problem: Problem,
    max_prompt_tokens: int,
    instruction: str | None = None,
) -> tuple[int, ...]:
    """
    Args:
        prompt: the recipe's. Its user turn wraps problems with a short answer; see `prompt_for`.
        max_prompt_tokens, instruction: see `question_text`.

    Raises:
        UserError: the chat template cannot express this prompt.
    """
    question = question_text(tokenizer, prompt, benchmark, problem, max_prompt_tokens, instruction)
    if benchmark.prompt_style == "without_chat":
        return tuple(tokenizer(question)["input_ids"])
    return tuple(prompts.prompt_ids(tokenizer, prompt_for(benchmark, prompt), {"question": question}))


def question_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    benchmark: Benchmark,
    problem: Problem,
    max_prompt_tokens: int,
    instruction: str | None = None,
) -> str:
    """The problem with its instruction, as the recipe's user turn wraps it.

    Args:
        max_prompt_tokens: limit of a text that is truncated in the middle, before it is put into the chat template (LongBench's
            max_length); other problems are never truncated.
        instruction: see `instruction_for`.
    """
    text = truncate_middle(tokenizer, problem.text, max_prompt_tokens) if benchmark.truncate_middle else problem.text
    follows = instruction_for(benchmark, prompt, instruction)
    return f"{text}\n\n{follows}" if follows else text


def instruction_for(benchmark: Benchmark, prompt: Prompt, instruction: str | None) -> str:
    """The text after each question: the evaluation's own `instruction`, else the benchmark's where the recipe's user turn is the
    question alone; empty: nothing.
    """
    if instruction is not None:
        return instruction
    return benchmark.instruction if prompt.user == BARE_QUESTION else ""


def prompt_for(benchmark: Benchmark, prompt: Prompt) -> Prompt:
    """The recipe's prompt; of it, benchmarks with a prompt of their own take the system turn and the chat template alone."""
    return prompt if benchmark.prompt_style == "as_recipe" else prompt.model_copy(update={"user": BARE_QUESTION})


def room_for_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, benchmark: Benchmark, context: int, max_new_tokens: int
) -> int:
    """`max_prompt_tokens` where the recipe sets none: what the model's context leaves beside the answer and the chat template.

    Raises:
        UserError: it leaves nothing.
    """
    around = 0
    if benchmark.prompt_style != "without_chat":
        around = len(prompts.prompt_ids(tokenizer, prompt_for(benchmark, prompt), {"question": ""}))
    room = context - max_new_tokens - around - SPARE_TOKENS
    if benchmark.truncate_middle and room < 2:
        raise UserError(
            f"{benchmark.name}: max_new_tokens: {max_new_tokens}: a context of {context} tokens has no room for a text beside the "
            f"answer and {around} tokens of the chat template. Fix: reduce max_new_tokens, or use a model with a longer context"
        )
    return room


def truncate_middle(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> str:
    """As LongBench's pred.py: the first and the last max_tokens // 2 tokens of too long a text, the tokenizer's own special
    tokens counted; the instructions are at both ends.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= max_tokens:
        return text
    half = max_tokens // 2
    kept = ids[:half], ids[len(ids) - half :]
    return "".join(str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for part in kept)
