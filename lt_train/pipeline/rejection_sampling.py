"""A model's own correct answers as training data (SWAA, arXiv 2512.10411, adapts a model with what it generates itself).

Samples are generated and graded as in an evaluation and stay beside the file that is made of them, so another selection needs no
new samples.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lt_train.evaluation.records import SampleRecord
from lt_train.recipe.schema import Sample
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import write_json, write_text


@dataclass(frozen=True)
class Selection:
    """Which samples were kept, and what became of the others."""

    kept: tuple[SampleRecord, ...]
    counts: Mapping[str, int]


def select_traces(records: Iterable[SampleRecord], sample: Sample) -> Selection:
    """The answers to train on: correct, not truncated, of the requested length, without duplicates.

    Of each problem the shortest is kept, or all are.

    A token budget takes the problems with the shortest answers first, because they give most problems for it.
    """
    records = sorted(records, key=lambda record: (record.problem, record.sample))
    correct = [record for record in records if record.correct and record.finish_reason == "stop"]
    fitting = [r for r in correct if sample.min_tokens <= r.tokens <= (sample.max_tokens or r.tokens)]
    unique = list({(record.problem, record.text.strip()): record for record in reversed(fitting)}.values())[::-1]
    by_problem: dict[str, list[SampleRecord]] = {}
    for record in unique:
        by_problem.setdefault(record.problem, []).append(record)
    chosen = {problem: _kept(found, sample.keep) for problem, found in by_problem.items()}
    within = _within_budget(chosen, sample.token_budget)
    kept = tuple(record for found in within.values() for record in found)
    counts = {
        "generated": len(records),
        "correct": len(correct),
        "of the requested length": len(fitting),
        "without duplicates": len(unique),
        "kept": len(kept),
        "problems": len({record.problem for record in records}),
        "problems with a kept answer": len(within),
        "tokens": sum(record.tokens for record in kept),
    }
    return Selection(kept, counts)


def write_traces(out: Path, selection: Selection, questions: Mapping[str, str]) -> None:
    """traces.jsonl in the format `prompt_response`, and counts.json; both replace what an earlier selection left.

    Args:
        questions: problem id -> its text, which the recipe's prompt wraps in training as it did here.

    Raises:
        UserError: nothing was kept.
    """
    if not selection.kept:
        counts = ", ".join(f"{name} {count:,}" for name, count in selection.counts.items())
        fix = "raise sample.samples, or widen sample.min_tokens and sample.max_tokens"
        if selection.counts["without duplicates"]:
            fix = "raise sample.token_budget"
        raise UserError(f"sample: no answer is left to train on ({counts}). Fix: {fix}")
    rows = [
        {
            "prompt": questions[record.problem],
            "response": record.text,
            "id": f"{record.problem}/{record.sample}",
            "tokens": record.tokens,
        }
        for record in selection.kept
    ]
    write_text(out / "traces.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(out / "counts.json", dict(selection.counts))


def _kept(found: Sequence[SampleRecord], keep: str) -> list[SampleRecord]:
    return list(found) if keep == "all" else [min(found, key=lambda record: (record.tokens, record.sample))]


def _within_budget(chosen: Mapping[str, list[SampleRecord]], budget: int | None) -> dict[str, list[SampleRecord]]:
    if budget is None:
        return dict(chosen)
    within, tokens = {}, 0
    for problem in sorted(chosen, key=lambda problem: (sum(record.tokens for record in chosen[problem]), problem)):
        tokens += sum(record.tokens for record in chosen[problem])
        if tokens > budget:
            break
        within[problem] = chosen[problem]
    return within
