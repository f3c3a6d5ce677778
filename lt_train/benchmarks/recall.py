"""Long-context recall, which streaming layers lose first: needles and a passkey to find, a passage to copy verbatim.

Every problem follows from the evaluation's seed, its length, its depth and its number; texts are measured by the model's
tokenizer.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lt_train.benchmarks.declaration import Benchmark, Problem, RecallSettings
from lt_train.benchmarks.haystack import ADJECTIVES, NOISE, NOUNS, endless, essay_sentences
from lt_train.runtime.errors import UserError

NEEDLE_DIGITS, PASSKEY_DIGITS = 7, 5

Build = Callable[[Sequence[str]], str]
"""Makes a problem's text around the given sentences."""

ProblemParts = tuple[Build, str, list[str] | None]
"""How the text is made, what the answer is, and the sentences it is hidden among; None: generated ones."""


@dataclass(frozen=True)
class ProblemSpec:
    """One problem to generate. `rng` is its own; `essays`: sentences to hide things in, None: none are given."""

    settings: RecallSettings
    depth: float
    tokenizer: PreTrainedTokenizerBase
    rng: random.Random
    essays: list[str] | None


def make_problems(
    benchmark: Benchmark, settings: RecallSettings, tokenizer: PreTrainedTokenizerBase, path: str | None, seed: int
) -> tuple[Problem, ...]:
    """
    Args:
        path: a folder of .txt files to hide things in; None: generated text, for the passkey its own.

    Raises:
        UserError: the texts cannot be read, or a length leaves no room for the question.
    """
    make = {"needle": needle_problem, "passkey": passkey_problem, "copying": copying_problem}[benchmark.name]
    essays = None if path is None else essay_sentences(path)
    problems = []
    for length in settings.lengths:
        for depth in settings.depths:
            for repeat in range(settings.repeats):
                problem_id = f"{length}/{float(depth)}/{repeat}"
                rng = random.Random(f"{seed}/{benchmark.name}/{problem_id}")
                build, answer, haystack = make(ProblemSpec(settings, depth, tokenizer, rng, essays))
                text = fill(build, endless(haystack, rng), length, tokenizer, benchmark)
                problems.append(Problem(problem_id, text, (answer,)))
    return tuple(problems)


def needle_problem(spec: ProblemSpec) -> ProblemParts:
    """Needles and question in the words of RULER (arXiv 2404.06654)."""
    names = spec.rng.sample([f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS], spec.settings.keys)
    values = [str(value) for value in spec.rng.sample(range(10 ** (NEEDLE_DIGITS - 1), 10**NEEDLE_DIGITS), spec.settings.keys)]
    needles = [f"One of the special magic numbers for {name} is: {value}." for name, value in zip(names, values, strict=True)]
    depths = [spec.depth, *(spec.rng.random() for _ in needles[1:])]

    def build(sentences: Sequence[str]) -> str:
        return (
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
            f"number afterwards.\n{hidden(sentences, depths, needles)}\n"
            f"What is the special magic number for {names[0]} mentioned in the provided text?"
        )

    return build, values[0], spec.essays


def passkey_problem(spec: ProblemSpec) -> ProblemParts:
    """The passkey task of arXiv 2305.16300."""
    key = str(spec.rng.randrange(10 ** (PASSKEY_DIGITS - 1), 10**PASSKEY_DIGITS))

    def build(sentences: Sequence[str]) -> str:
        return (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about "
            f"the important information there.\n"
            f"{hidden(sentences, [spec.depth], [f'The pass key is {key}. Remember it. {key} is the pass key.'])}\n"
            "What is the pass key? The pass key is"
        )

    return build, key, list(NOISE) if spec.essays is None else spec.essays


def copying_problem(spec: ProblemSpec) -> ProblemParts:
    """A passage of words in no order that could be guessed, so that each word has to be looked up."""
    words: list[str] = []
    while count_tokens(spec.tokenizer, " ".join(words)) < spec.settings.span:
        words.append(spec.rng.choice(spec.rng.choice((ADJECTIVES, NOUNS))))
    passage = " ".join(words)

    def build(sentences: Sequence[str]) -> str:
        return (
            "A secret phrase is hidden within the following text. Make sure to memorize it. I will quiz you about the phrase "
            f"afterwards.\n{hidden(sentences, [spec.depth], [f'The secret phrase is: {passage}.'])}\n"
            "What is the secret phrase mentioned in the provided text? Repeat it word for word."
        )

    return build, passage, spec.essays


def hidden(sentences: Sequence[str], depths: Sequence[float], needles: Sequence[str]) -> str:
    """The sentences as running text, with each needle before the sentence at its depth."""
    places = sorted(
        (round(depth * len(sentences)), order, needle) for order, (depth, needle) in enumerate(zip(depths, needles, strict=True))
    )
    pieces, taken = [], 0
    for place, _, needle in places:
        pieces += [*sentences[taken:place], needle]
        taken = place
    return " ".join([*pieces, *sentences[taken:]])


def fill(build: Build, haystack: Iterator[str], length: int, tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark) -> str:
    """The text with as many sentences as fit into `length` tokens.

    Sentences are first taken by the sum of their own tokens, then a few added or left out by the tokens of all together.
    """
    room = length - count_tokens(tokenizer, build([]))
    if room < 0:
        raise UserError(
            f"{benchmark.name}: lengths: {length} tokens have no room for the question, which takes {length - room} of its own. "
            f"Fix: give lengths above {length - room}"
        )
    taken: list[str] = []
    while room > 0:
        taken.append(next(haystack))
        room -= count_tokens(tokenizer, f" {taken[-1]}")
    many = len(taken)
    while many and count_tokens(tokenizer, build(taken[:many])) > length:
        many -= 1
    while True:
        if many == len(taken):
            taken.append(next(haystack))
        if count_tokens(tokenizer, build(taken[: many + 1])) > length:
            return build(taken[:many])
        many += 1


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
