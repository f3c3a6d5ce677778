"""Benchmarks: each is one small declaration, and its problems are read (or generated) and counted before anything runs.

declaration.py defines what a benchmark is; short_answers.py, longbench.py and RECALL below declare them; reading.py and recall.py
make their problems; evaluation/prompting.py turns a problem into tokens, evaluation/grading/ grades the answers. Importing this
package needs none of the large libraries.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lt_train.benchmarks.declaration import Benchmark, Grader, Problem, ProblemSet, RecallSettings
from lt_train.benchmarks.longbench import LONGBENCH
from lt_train.benchmarks.reading import read_problems
from lt_train.benchmarks.short_answers import SHORT_ANSWERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BENCHMARKS", "Benchmark", "Grader", "Problem", "ProblemSet", "RecallSettings", "answer_tokens", "load_problems"]

PLACES = ("lengths", "depths", "repeats")

RECALL = (
    Benchmark("needle", "needle", prompt_style="as_is", max_new_tokens=64, recall_settings=(*PLACES, "keys")),
    Benchmark("passkey", "needle", prompt_style="as_is", max_new_tokens=32, recall_settings=PLACES),
    Benchmark("copying", "copying", prompt_style="as_is", recall_settings=(*PLACES, "span")),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in (*SHORT_ANSWERS, *LONGBENCH, *RECALL)}


def load_problems(
    benchmark: Benchmark,
    path: str | None,
    limit: int | None,
    *,
    columns: Mapping[str, str | None] | None = None,
    recall: RecallSettings | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    seed: int = 0,
) -> ProblemSet:
    """Read or make a benchmark's problems, check them, and take the first `limit`.

    Args:
        path: a local file, a folder or a hub id that takes the place of the benchmark's own source; of a generated benchmark a
            folder of texts to hide things in.
        limit: how many problems to evaluate; None: all.
        columns: where a row of a custom benchmark holds its `question`, `answer` and `id`: columns, or dotted paths into them.
        recall, tokenizer, seed: decide the problems of a generated benchmark.

    Raises:
        UserError: the source cannot be read, a row lacks a field (with file and line), two problems have one id, the number
            of problems is not the benchmark's, or a length to generate has no room for the question.
        ValueError: a generated benchmark without a tokenizer to measure its texts.
    """
    if not benchmark.generated:
        everything = read_problems(benchmark if columns is None else benchmark.with_columns(columns), path)
    elif tokenizer is None:
        raise ValueError(f"{benchmark.name}: its problems are measured in tokens, so it needs a tokenizer")
    else:
        from lt_train.benchmarks.recall import make_problems

        everything = make_problems(benchmark, recall or RecallSettings(), tokenizer, path, seed)
    return ProblemSet(everything, everything[:limit])


def answer_tokens(benchmark: Benchmark, recall: RecallSettings | None = None) -> int | None:
    """`max_new_tokens` where the recipe sets none; None: the benchmark has none, so the recipe must set it."""
    if benchmark.grader == "copying":
        span = (recall or RecallSettings()).span
        return span + span // 4 + 32  # room for a copy with a few words around it
    return benchmark.max_new_tokens
