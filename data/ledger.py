r"""Write ledger problems: reasoning whose every step must look back further than a small window.

    python -m data.ledger --split train --count 4000 --out data/ledger/train.jsonl
    python -m data.ledger --split test  --count 2000 --out data/ledger/test.jsonl

A ledger lists shuffled entries of source, target and digit, such as `k>d4`. From a start key the solver follows
the entries for a number of steps and keeps the last digit of the running sum. Each key stands exactly once in front
of a `>` in the question, so each step is one unambiguous look-up; no key is visited twice, so no step can be copied
from an earlier one; and the text behind the entries keeps all of them more than `reach` symbols away, so a layer that
sees no more than `reach` symbols cannot do the look-up.

The chain of thought writes the entry it is at and the running sum, one line a step: `3. k>d4=9`.
"""

import hashlib
import itertools
import json
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

Split = Literal["train", "test"]

KEYS = string.ascii_lowercase

_AFTER_A_SPACE = ("at", "Follow", "entries", "and", "give", "the", "last", "digit", "of", "sum")
WORDS = ("Ledger", "Start", *(f" {word}" for word in _AFTER_A_SPACE), "The", " is")
"""Words that are one symbol each; a space in front belongs to the word."""

SYMBOL = re.compile(
    "|".join(
        [
            r"[1-9]?[0-9]\. (?=[a-z]>)",  # the label of a step
            r"[a-z]>",  # a marked key: the source of an entry
            r"[1-9]?[0-9]",
            r"\\boxed\{",
            *(rf"{word}(?![A-Za-z])" for word in sorted(WORDS, key=len, reverse=True)),
            r"[\s\S]",
        ]
    )
)
"""One symbol of a ledger text. The tiny reasoner's tokenizer splits with the same expression: a symbol is a token."""


@dataclass(frozen=True)
class Entry:
    source: str
    target: str
    digit: int

    def __str__(self) -> str:
        return f"{self.source}>{self.target}{self.digit}"


@dataclass(frozen=True)
class Ledger:
    """One problem. `entries` are in the order in which the question lists them."""

    entries: tuple[Entry, ...]
    start: str
    steps: int

    def path(self) -> list[Entry]:
        """The entries in the order in which the chain visits them."""
        by_source = {entry.source: entry for entry in self.entries}
        visited = [by_source[self.start]]
        while len(visited) < self.steps:
            visited.append(by_source[visited[-1].target])
        return visited

    def fingerprint(self) -> str:
        """A hash that is the same for two listings of the same entries in another order."""
        canonical = " ".join([*sorted(map(str, self.entries)), self.start, str(self.steps)])
        return hashlib.sha256(canonical.encode()).hexdigest()


def split_of(ledger: Ledger) -> Split:
    """The only split that may hold this problem: a property of the problem, so no two seeds make the splits overlap."""
    return "test" if int(ledger.fingerprint(), 16) % 8 == 0 else "train"


def draw_ledger(rng: random.Random, entries: int, steps: int) -> Ledger:
    """A random ledger whose path visits `steps` different keys.

    Raises:
        ValueError: a path of that many different keys does not exist, or the alphabet has not enough keys.
    """
    if not 1 <= steps <= entries <= len(KEYS):
        raise ValueError(
            f"entries={entries}, steps={steps}: need 1 <= steps <= entries <= {len(KEYS)}, else a key is visited twice"
        )
    keys = rng.sample(KEYS, entries)
    targets = [*keys[1:steps], *(rng.choice(keys) for _ in range(entries - steps + 1))]
    listed = [Entry(source, target, rng.randrange(10)) for source, target in zip(keys, targets, strict=True)]
    rng.shuffle(listed)
    return Ledger(tuple(listed), start=keys[0], steps=steps)


def draw_split(split: Split, seed: int, entries: int, steps: int) -> Iterator[Ledger]:
    """Endless ledgers of one split; the same arguments give the same ledgers."""
    rng = random.Random(f"{split}/{seed}/{entries}/{steps}")
    while True:
        ledger = draw_ledger(rng, entries, steps)
        if split_of(ledger) == split:
            yield ledger


def symbols(text: str) -> list[str]:
    """The symbols of a text; joined they are the text again."""
    return SYMBOL.findall(text)


def write_question(ledger: Ledger, reach: int = 0) -> str:
    """The problem text; dots stand behind the entries where the closing sentence is shorter than `reach` symbols."""
    closing = f"Start at {ledger.start}. Follow {ledger.steps} entries and give the last digit of the sum."
    dots = max(0, reach - len(symbols(closing)))
    return "\n".join(["Ledger:", *map(str, ledger.entries), "." * dots + closing])


def write_chain(ledger: Ledger) -> str:
    """The chain of thought: a line for each step, with the entry and the last digit of the sum so far."""
    running = itertools.accumulate((entry.digit for entry in ledger.path()), lambda total, digit: (total + digit) % 10)
    lines = [f"{step}. {entry}={total}" for step, (entry, total) in enumerate(zip(ledger.path(), running, strict=True), start=1)]
    return "\n".join(lines)


def write_solution(ledger: Ledger) -> str:
    answer = sum(entry.digit for entry in ledger.path()) % 10
    return f"The last digit is \\boxed{{{answer}}}"


def write_response(ledger: Ledger) -> str:
    """Thought and solution in the format of STILL-2's `combined_text`."""
    return (
        f"<|begin_of_thought|>{write_chain(ledger)}<|end_of_thought|>"
        f"<|begin_of_solution|>{write_solution(ledger)}<|end_of_solution|>"
    )


def solve(question: str) -> str:
    """The answer of a problem text, worked out from the text alone (nothing of the generator is used)."""
    follow = dict[str, tuple[str, int]]()
    for source, target, digit in re.findall(r"^([a-z])>([a-z])(\d)$", question, flags=re.MULTILINE):
        follow[source] = (target, int(digit))
    closing = re.search(r"Start at ([a-z])\. Follow (\d+) entries", question)
    if closing is None:
        raise ValueError(f"not a ledger problem, it has no 'Start at … Follow … entries': {question!r}")
    key, total = closing[1], 0
    for _ in range(int(closing[2])):
        key, digit = follow[key]
        total += digit
    return str(total % 10)


def look_backs(ledger: Ledger, reach: int = 0) -> list[int]:
    """For each step, how many symbols lie between the entry in the question and the source that the chain writes.

    Counted over question and chain alone; a chat template puts more between them, so these are lower bounds.
    """
    question, chain = symbols(write_question(ledger, reach)), symbols(write_chain(ledger))
    sources = [f"{entry.source}>" for entry in ledger.path()]
    return [len(question) + chain.index(source) - question.index(source) for source in sources]


def as_training_row(ledger: Ledger, reach: int) -> dict[str, str]:
    return {"question": write_question(ledger, reach), "combined_text": write_response(ledger), "domain": "ledger"}


def as_test_row(ledger: Ledger, reach: int, index: int) -> dict[str, str]:
    problem = write_question(ledger, reach)
    return {"id": f"ledger-{index:05d}", "problem": problem, "answer": solve(problem)}


def rows(split: Split, count: int, seed: int, entries: int, steps: int, reach: int) -> Iterator[dict[str, str]]:
    """The rows of one file, in order."""
    for index, ledger in enumerate(itertools.islice(draw_split(split, seed, entries, steps), count)):
        yield as_training_row(ledger, reach) if split == "train" else as_test_row(ledger, reach, index)


def main(
    split: Annotated[Split, typer.Option(help="train: question and worked answer; test: problem and answer")],
    count: Annotated[int, typer.Option(help="rows to write")],
    out: Annotated[Path, typer.Option(help="the JSONL file")],
    seed: Annotated[int, typer.Option(help="the same seed writes the same file")] = 0,
    entries: Annotated[int, typer.Option(help="difficulty: entries that the question lists, at most 26")] = 16,
    steps: Annotated[int, typer.Option(help="length: entries to follow, at most `entries`")] = 10,
    reach: Annotated[int, typer.Option(help="symbols that lie at least between the entries and the chain")] = 0,
) -> None:
    """Write ledger problems of one split as JSONL."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for row in rows(split, count, seed, entries, steps, reach):
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
