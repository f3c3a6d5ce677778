"""The problems of an evaluation, as far as their source can be read now."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from lt_train.benchmarks import BENCHMARKS, Problem, load_problems
from lt_train.evaluation.scores import AnswerScores
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import hash_of_json


@dataclass(frozen=True)
class KnownProblems:
    """Problems `by_id`; empty where `unknown` has the reason why they cannot be shown."""

    by_id: Mapping[str, Problem]
    unknown: str | None = None


def known_problems(eval_config: Mapping[str, Any], scores: AnswerScores) -> KnownProblems:
    """The problems that `scores` count.

    A source that is gone or has changed is no error: scores do not depend on it any more. Texts are shown only when they are those
    that the models were given.

    Args:
        eval_config: the evaluation in the recipe's `eval` list.
    """
    benchmark = BENCHMARKS.get(scores.benchmark)
    if benchmark is None:
        return KnownProblems({}, f"this version of lt_train has no benchmark {scores.benchmark}")
    if benchmark.generated:
        return KnownProblems({}, "they were generated for the model's tokenizer; an id is length/depth/repeat")
    try:
        path, limit, columns = (eval_config.get(name) for name in ("path", "limit", "columns"))
        problems = load_problems(benchmark, path, limit, columns=columns).all_problems
    except UserError as error:
        return KnownProblems({}, str(error))
    if hash_of_json([astuple(problem) for problem in problems]) != scores.fingerprint.get("problems"):
        source = eval_config.get("path") or benchmark.source
        return KnownProblems({}, f"{source} now holds other problems than those of this evaluation, or holds them in another form")
    return KnownProblems({problem.id: problem for problem in problems if problem.id in scores.by_problem})
