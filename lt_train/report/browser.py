"""The samples as data of the page: an index of all of them that the browser parses at once, and texts that it parses when shown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lt_train.evaluation.records import SampleRecord
from lt_train.recipe.evaluations import BASE
from lt_train.report.charts import colour
from lt_train.report.contents import EvaluatedVariant, Run
from lt_train.report.problems import KnownProblems
from lt_train.report.samples import character_limit, parts, shortened

PROBLEM_CHARACTERS = 20_000
"""Of one problem's text; the middle of a longer one is left out."""


@dataclass(frozen=True)
class SampleBrowser:
    """
    Attributes:
        data: JSON by the id of its script element: "index", "texts-0", "problems-0", …
        limit: characters of one trace that are shown. shortened: number of traces that are longer.
        notes: what cannot be shown, and why.
    """

    data: Mapping[str, Markup]
    runs: tuple[str, ...]
    evaluations: tuple[str, ...]
    variants: tuple[str, ...]
    """Their labels."""
    count: int
    limit: int
    shortened: int
    notes: tuple[str, ...]


def sample_browser(runs: Sequence[Run]) -> SampleBrowser:
    shown = [each for run in runs for each in run.measured if each.samples]
    limit = character_limit(len(record.text) for each in shown for record in each.samples)
    problem_sets: list[KnownProblems] = []
    index, data = [], {}
    for number, each in enumerate(shown):
        known = runs[each.run_number].problems[each.result.evaluation]
        if known not in problem_sets:
            problem_sets.append(known)
        index.append(sample_set(each, problem_sets.index(known)))
        data[f"texts-{number}"] = embedded([parts(record, limit) for record in each.samples])
    for number, known in enumerate(problem_sets):
        texts = {key: [shortened(problem.text, PROBLEM_CHARACTERS), problem.answers] for key, problem in known.by_id.items()}
        data[f"problems-{number}"] = embedded(texts)
    return SampleBrowser(
        data={"index": embedded(index), **data},
        runs=tuple(dict.fromkeys(each.run for each in shown)),
        evaluations=tuple(dict.fromkeys(each.result.evaluation for each in shown)),
        variants=tuple(dict.fromkeys(each.result.label for each in shown)),
        count=sum(len(each.samples) for each in shown),
        limit=limit,
        shortened=sum(len(record.text) > limit for each in shown for record in each.samples),
        notes=tuple(notes(runs)),
    )


def sample_set(each: EvaluatedVariant, problems: int) -> dict[str, Any]:
    return {
        "run": each.run,
        "evaluation": each.result.evaluation,
        "variant": each.result.label,
        "base": each.result.variant == BASE,
        "colour": colour(each.result.variant),
        "problems": problems,
        "samples": [sample_row(record) for record in each.samples],
    }


def sample_row(record: SampleRecord) -> list[Any]:
    """The values of a sample in the order of browser.js; most of the page is samples, so names are not repeated for each."""
    return [
        record.problem,
        record.sample,
        int(record.correct),
        int(record.finish_reason == "length"),
        record.score,
        record.tokens,
        record.thinking_tokens,
        record.extracted,
        record.extracted_from,
        record.grading_error,
        len(record.text),
    ]


def notes(runs: Sequence[Run]) -> list[str]:
    found = []
    for run in runs:
        where = f"{run.name}: " if len(runs) > 1 else ""
        for evaluation, known in run.problems.items():
            if known.unknown is not None:
                found.append(f"{where}the problems of {evaluation} are shown by their ids only: {known.unknown}")
        for each in run.measured:
            if each.result.evaluation in run.problems and not each.samples:
                found.append(
                    f"{where}the samples of {each.result.label} under {each.result.evaluation} are not in the run folder any more"
                )
    return found


def embedded(value: object) -> Markup:
    """JSON that cannot end the script element around it, nor open a comment there, whatever its texts hold."""
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(written.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
