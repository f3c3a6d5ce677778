"""Rows of data become examples: token ids of a prompt, and of the answer that is trained on.

An answer is the whole trace, as written in the data, and the token that ends the turn. It is laid behind the prompt by
hand and not by the chat template, because many templates drop the reasoning of an answer.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from lt_train.dataset.conversations import Sample, read_samples
from lt_train.dataset.prompts import TurnEnd, encode, render_messages, turn_end
from lt_train.recipe.schema import Calibration, Data, Prompt
from lt_train.runtime.errors import UserError

IGNORED = -100
"""Label of a token that the loss leaves out."""


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        id: follows from the question and the answer; the same in every order of the data.
        where: file and line it was read from.
        prompt_ids: ends with the generation prompt.
        answer_ids: ends with the eos, unless truncated.
        question_id: follows from the last question alone.
    """

    id: str
    where: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    truncated: bool = False
    question_id: str = ""

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.answer_ids]

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * len(self.prompt_ids) + list(self.answer_ids)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class ExampleSet:
    """Examples to train on, examples set aside, and what became of the rows on the way (`counts`)."""

    train: list[Example]
    heldout: list[Example]
    counts: dict[str, int]


def load_examples(
    data: Data,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_max_length: int,
    seed: int,
    eos_ids: Collection[int] = (),
) -> ExampleSet:
    """Read, render, tokenize, treat what is too long, and set the held-out part aside.

    Args:
        model_max_length: tokens that the model can take (its config's max_position_embeddings).
        eos_ids: tokens besides the tokenizer's eos at which the model stops (generation_config.eos_token_id).

    Raises:
        UserError: a faulty row, with file and line; an answer that the tokenizer cannot hold; nothing left, with the counts.
    """
    if data.max_length > model_max_length:
        raise UserError(
            f"data.max_length: {data.max_length} tokens are more than the model's context of {model_max_length}; "
            f"set it to at most {model_max_length}"
        )
    end = turn_end(tokenizer, prompt, eos_ids)
    counts = Counter(dict.fromkeys(("rows", "too_long", "dropped", "truncated", "train", "heldout"), 0))
    fitted: list[Example] = []
    too_long: list[Example] = []
    damaged: list[str] = []
    for sample in read_samples(data):
        counts["rows"] += 1
        example, whole = _tokenized(sample, prompt, tokenizer, end)
        if not whole:
            damaged.append(sample.where)
        if len(example) > data.max_length:
            too_long.append(example)
        fitted += _fitted(example, data, counts)
    _stop_at_damage(damaged, counts["rows"])
    _stop_at_overlong(too_long, data, counts)
    if not fitted:
        raise UserError(
            f"{data.source}: no sample is left to train on ({_in_words(counts)}); raise data.max_length, now {data.max_length}"
        )
    train, heldout = _set_aside(_with_unique_ids(fitted), data.heldout, seed, counts)
    counts.update(train=len(train), heldout=len(heldout))
    return ExampleSet(train, heldout, dict(counts))


def calibration_examples(examples: ExampleSet, calibration: Calibration, seed: int) -> list[Example]:
    """The samples that layers are scored on: the first of a shuffle of the training part, cut to calibration.max_length.

    A sample whose prompt alone fills calibration.max_length has no answer token to score and is passed over.
    """
    shuffled = list(examples.train)
    random.Random(f"calibration {seed}").shuffle(shuffled)
    longest = calibration.max_length
    if longest is None:
        return shuffled[: calibration.samples]
    fitting = [_cut(example, longest) for example in shuffled if len(example.prompt_ids) < longest]
    if not fitting:
        raise UserError(f"hybrid.calibration.max_length: every prompt has {longest} tokens or more; raise it")
    return fitting[: calibration.samples]


def _tokenized(sample: Sample, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, end: TurnEnd) -> tuple[Example, bool]:
    """The example, and whether its answer's ids hold the whole answer."""
    asked = render_messages(tokenizer, prompt, sample.messages)
    answer = _without_doubled_tag(asked, sample.answer)
    asked_ids = encode(tokenizer, asked)
    answer_ids = _answer_ids(tokenizer, asked, asked_ids, answer + end.text)
    question_id = _digest(" ".join(sample.messages[-1]["content"].split()))
    whole = answer_ids[-1:] == [end.eos_id] and _hold(tokenizer, answer_ids, answer + end.text)
    example = Example(_digest(f"{asked}\0{answer}"), sample.where, tuple(asked_ids), tuple(answer_ids), question_id=question_id)
    return example, whole


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _without_doubled_tag(asked: str, answer: str) -> str:
    """The answer without the tag that opens its thought, where the generation prompt has written that tag already."""
    opened = re.search(r"(<[^<>\s]+>)(\s*)$", asked)
    if opened is None or not answer.lstrip().startswith(opened[1]):
        return answer
    return answer.lstrip().removeprefix(opened[1]).removeprefix(opened[2])


def _answer_ids(tokenizer: PreTrainedTokenizerBase, asked: str, asked_ids: list[int], answer: str) -> list[int]:
    """The answer's ids as they follow the prompt; on their own where tokens would merge across the seam.

    A model generates behind the prompt's own tokens, so these stay as they are. Tokenizing both as one text keeps
    SentencePiece from putting a space before the answer.
    """
    together = encode(tokenizer, asked + answer)
    if together[: len(asked_ids)] == asked_ids:
        return together[len(asked_ids) :]
    return encode(tokenizer, answer)


def _hold(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Whether `ids` say all of `text`, up to what the tokenizer's normaliser makes of it (Qwen's: Unicode NFC)."""
    unknown = tokenizer.unk_token_id
    if unknown is not None and ids.count(unknown) > text.count(tokenizer.unk_token):
        return False
    said = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return said == text or encode(tokenizer, said) == encode(tokenizer, text)


def _fitted(example: Example, data: Data, counts: Counter[str]) -> list[Example]:
    """The example, cut if it must be and may be; none if it is dropped."""
    if len(example) <= data.max_length:
        return [example]
    counts["too_long"] += 1
    if data.overlong != "truncate" or len(example.prompt_ids) >= data.max_length:
        counts["dropped"] += 1
        return []
    counts["truncated"] += 1
    return [_cut(example, data.max_length)]


def _cut(example: Example, max_length: int) -> Example:
    """Without its end, eos included: a trace that was cut must not teach to stop in the middle."""
    if len(example) <= max_length:
        return example
    return replace(example, answer_ids=example.answer_ids[: max_length - len(example.prompt_ids)], truncated=True)


def _stop_at_damage(damaged: list[str], rows: int) -> None:
    if damaged:
        raise UserError(
            f"{len(damaged)} of {rows} answers cannot be written in the tokenizer's tokens without loss (first: {damaged[0]}); "
            "take them out, or use a tokenizer that knows their characters"
        )


def _stop_at_overlong(too_long: list[Example], data: Data, counts: Counter[str]) -> None:
    if data.overlong == "error" and too_long:
        longest = max(too_long, key=len)
        raise UserError(
            f"data.overlong: error, and {len(too_long)} of {counts['rows']} samples are longer than data.max_length "
            f"{data.max_length} (longest: {len(longest)} tokens, {longest.where}); raise it, or set overlong to drop or truncate"
        )


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _with_unique_ids(examples: list[Example]) -> list[Example]:
    """Rows that say the same get "-2", "-3" behind their id."""
    seen: Counter[str] = Counter()
    unique = []
    for example in examples:
        seen[example.id] += 1
        unique.append(example if seen[example.id] == 1 else replace(example, id=f"{example.id}-{seen[example.id]}"))
    return unique


def _set_aside(examples: list[Example], heldout: int, seed: int, counts: Counter[str]) -> tuple[list[Example], list[Example]]:
    """Draw `heldout` examples by the seed; all answers to one question fall on the same side."""
    questions: dict[str, list[Example]] = {}
    for example in examples:
        questions.setdefault(example.question_id, []).append(example)
    drawn = list(questions.values())
    random.Random(f"heldout {seed}").shuffle(drawn)
    aside: set[str] = set()
    for answers in drawn:
        if len(aside) + len(answers) <= heldout:
            aside |= {example.id for example in answers}
    if len(aside) < heldout or len(aside) == len(examples):
        raise UserError(
            f"data.heldout: {heldout} samples cannot be set aside from {len(examples)} with {len(questions)} different questions "
            f"so that some are left to train on ({_in_words(counts)}); lower it"
        )
    return [example for example in examples if example.id not in aside], [example for example in examples if example.id in aside]
