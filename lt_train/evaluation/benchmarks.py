"""What is asked: a benchmark is one small declaration, and its problems are read and counted before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lt_train import sources
from lt_train.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """Where the problems are and how to read a row.

    `split` and `subset` name the part of a hub data set. `count` is the number of problems that must be there; None
    where it is the user's own file that sets it. `answer_after`: the answer is what follows the last such marker in
    the answer field; None: the whole field.
    """

    name: str
    source: str
    split: str
    count: int | None
    problem_field: str = "problem"
    answer_field: str = "answer"
    answer_after: str | None = None
    subset: str | None = None


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", source="HuggingFaceH4/aime_2024", split="train", count=30),
        Benchmark("math500", source="HuggingFaceH4/MATH-500", split="test", count=500),
        Benchmark(
            "gsm8k",
            source="openai/gsm8k",
            subset="main",
            split="test",
            count=1319,
            problem_field="question",
            answer_after="####",
        ),
        Benchmark("ledger", source="data/ledger/test.jsonl", split="test", count=None),
    )
}

ID_FIELDS = ("id", "unique_id")
"""Fields that may name a row, in the order of preference. A row with neither is named by its number, counted from 0."""


@dataclass(frozen=True)
class Problem:
    id: str
    text: str
    answer: str


@dataclass(frozen=True)
class ProblemSet:
    """`problems` are the ones to ask, the first `limit` of the `available` ones; `all_problems` identify the
    benchmark.
    """

    all_problems: tuple[Problem, ...]
    problems: tuple[Problem, ...]

    @property
    def available(self) -> int:
        return len(self.all_problems)


def load_problems(benchmark: Benchmark, path: str | None, limit: int | None) -> ProblemSet:
    """Read a benchmark whole, check it, and take its first `limit` problems.

    Args:
        path: a local file or hub id that takes the place of the benchmark's own source.
        limit: how many problems to ask; None: all.

    Raises:
        UserError: the source cannot be read, a row lacks a field (with file and line), two problems have one id, or
            the number
            of problems is not the benchmark's.
    """
    source = path or benchmark.source
    subset = benchmark.subset if source == benchmark.source else None  # another source has subsets of its own, or none
    problems: dict[str, Problem] = {}
    for number, (where, row) in enumerate(sources.load_rows(source, benchmark.split, subset=subset)):
        problem = read_problem(benchmark, row, number, where)
        if problem.id in problems:
            raise UserError(f"{where}: a second problem with the id {problem.id!r}; every problem needs an id of its own")
        problems[problem.id] = problem
    check_count(benchmark, source, len(problems))
    everything = tuple(problems.values())
    return ProblemSet(everything, everything[:limit])


def read_problem(benchmark: Benchmark, row: Mapping[str, Any], number: int, where: str) -> Problem:
    """One row as a problem; `where` is its file and line for errors."""
    problem_id = next((str(row[field]) for field in ID_FIELDS if row.get(field) is not None), str(number))
    text = read_field(benchmark, row, benchmark.problem_field, where)
    answer = read_field(benchmark, row, benchmark.answer_field, where)
    return Problem(problem_id, text, final_answer(benchmark, answer, where))


def read_field(benchmark: Benchmark, row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        there = f"is {value!r}" if field in row else f"is missing; the row has {', '.join(sorted(map(str, row)))}"
        raise UserError(
            f"{where}: field '{field}' {there}. The benchmark {benchmark.name} needs rows with "
            f"'{benchmark.problem_field}' and '{benchmark.answer_field}' (text)"
        )
    if not str(value).strip():
        raise UserError(f"{where}: field '{field}' is empty")
    return str(value)


def final_answer(benchmark: Benchmark, answer: str, where: str) -> str:
    if benchmark.answer_after is None:
        return answer.strip()
    _, marker, final = answer.rpartition(benchmark.answer_after)
    if not marker or not final.strip():
        raise UserError(f"{where}: field '{benchmark.answer_field}' has no answer behind '{benchmark.answer_after}'")
    return final.strip()


def check_count(benchmark: Benchmark, source: str, found: int) -> None:
    if benchmark.count is not None and found != benchmark.count:
        raise UserError(
            f"{source}: {found} problems, but {benchmark.name} has {benchmark.count}. A score over another number of "
            f"problems is "
            f"another benchmark: name the whole set, and use `limit` to ask only its first problems"
        )
    if found == 0:
        raise UserError(f"{source}: no problems in it; the benchmark {benchmark.name} needs at least one")
