"""Rows of a file or hub data set as problems: each with its fields, and as many as the benchmark has."""

import hashlib
import json
import math
import string
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lt_train.benchmarks.declaration import GSM8K_MARKER, Benchmark, Problem
from lt_train.runtime import sources
from lt_train.runtime.columns import value_at
from lt_train.runtime.errors import UserError, half_character


def read_problems(benchmark: Benchmark, path: str | None) -> tuple[Problem, ...]:
    """
    Raises:
        UserError: the source cannot be read, a row lacks a field (with file and line), two problems have one id, or the number
            of problems is not the benchmark's.
    """
    source = path or benchmark.source
    if source is None:
        raise UserError(
            f"{benchmark.name}: path: missing. Fix: set `path` to the file of your problems, and `columns` where a row has "
            "others than problem and answer"
        )
    problems: dict[str, Problem] = {}
    for number, (where, row) in enumerate(load_rows(benchmark, source)):
        problem = read_problem(benchmark, row, number, where)
        check_characters(problem, where)
        if problem.id in problems:
            raise UserError(f"{where}: a second problem with the id {problem.id!r}. Fix: give every problem an id of its own")
        problems[problem.id] = problem
    check_count(benchmark, source, len(problems))
    return tuple(problems.values())


def check_characters(problem: Problem, where: str) -> None:
    for text in (problem.id, problem.text, *problem.answers):
        if half := half_character(text):
            found = text[half.start : half.end]
            raise UserError(f"{where}: holds half of a character, {found!r}. Fix: correct it, or take the row out")


def load_rows(benchmark: Benchmark, source: str) -> Iterator[sources.Row]:
    if source == benchmark.source:
        if benchmark.archive is not None:
            return archived_rows(source, *benchmark.archive)
        return sources.load_rows(source, benchmark.split, subset=benchmark.subset)
    own_file = Path(source).expanduser() / f"{benchmark.subset}.jsonl"  # a folder with a file for each part of a benchmark
    if benchmark.subset is not None and own_file.is_file():
        source = str(own_file)
    return sources.load_rows(source, benchmark.split)  # another source has subsets of its own, or none


def archived_rows(source: str, archive: str, member: str) -> Iterator[sources.Row]:
    """Rows of a JSON Lines file inside a zip archive of a hub data set.

    For data sets that are a loading script beside an archive: `datasets` no longer runs scripts
    (https://github.com/huggingface/datasets/releases/tag/4.0.0).
    """
    from huggingface_hub import hf_hub_download

    place = f"{source}/{archive}/{member}"
    try:
        zipped = zipfile.ZipFile(hf_hub_download(source, archive, repo_type="dataset"))
        content = zipped.read(member)
    except Exception as error:  # offline, gated, unknown, truncated: the hub's clients raise dozens of kinds
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{place}: cannot be read: {type(error).__name__}: {reason}. Fix: download {archive} where there is a network, unpack "
            f"it, and set `path` to the folder that holds {Path(member).name}"
        ) from error
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        if line.strip():
            try:
                yield f"{place}:{number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{place}:{number}: not JSON ({error}). Fix: download {archive} again") from error


def read_problem(benchmark: Benchmark, row: Mapping[str, Any], number: int, where: str) -> Problem:
    """One row as a problem; `where` is its file and line for errors."""
    ids = [value for field in benchmark.id_fields if (value := _value(row, field)) not in (None, "")]
    if benchmark.id_required and not ids:
        raise invalid_field(benchmark, row, benchmark.id_fields[0], where)
    problem_id = str(ids[0] if ids else number)
    reader = {"short_answer": read_short_answer, "choice": read_choice, "longbench": read_longbench}[benchmark.rows]
    return reader(benchmark, row, problem_id, where)


def read_short_answer(benchmark: Benchmark, row: Mapping[str, Any], problem_id: str, where: str) -> Problem:
    problem, answer = (read_text(benchmark, row, field, where) for field in benchmark.fields)
    return Problem(problem_id, problem, (final_answer(benchmark, answer, where),))


def read_choice(benchmark: Benchmark, row: Mapping[str, Any], problem_id: str, where: str) -> Problem:
    """A question and its options, the correct one first. They are shown in an order that depends on the problem's id only, so
    that every model and every run sees the same.
    """
    question, *options = (read_text(benchmark, row, field, where).strip() for field in benchmark.fields)
    order = sorted(range(len(options)), key=lambda index: hashlib.sha256(f"{problem_id}/{index}".encode()).digest())
    letters = string.ascii_uppercase[: len(options)]
    listed = "\n".join(f"({letter}) {options[index]}" for letter, index in zip(letters, order, strict=True))
    text = f"What is the correct answer to this question: {question}\n\nChoices:\n{listed}\n\nAnswer with the letter of one choice."
    return Problem(problem_id, text, (letters[order.index(0)],), classes=tuple(letters))


def read_longbench(benchmark: Benchmark, row: Mapping[str, Any], problem_id: str, where: str) -> Problem:
    """`input` may be empty (a summary has no question); `all_classes` is null except for classification."""
    context, given, answers, classes = (row.get(field) for field in benchmark.fields)
    for field, value in zip(benchmark.fields, (context, given), strict=False):
        if not isinstance(value, str):
            raise invalid_field(benchmark, row, field, where)
    if not is_texts(answers):
        raise invalid_field(benchmark, row, "answers", where)
    if benchmark.grader == "classification" and not is_texts(classes):
        raise invalid_field(benchmark, row, "all_classes", where)
    text = benchmark.template.format(context=context, input=given)
    return Problem(problem_id, text, tuple(answers or ()), tuple(classes or ()))


def is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def read_text(benchmark: Benchmark, row: Mapping[str, Any], field: str, where: str) -> str:
    value = _value(row, field)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or (isinstance(value, float) and math.isnan(value)):
        raise invalid_field(benchmark, row, field, where)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with one fraction in it makes 27 a 27.0
    if not str(value).strip():
        raise UserError(f"{where}: field '{field}' is empty. Fix: fill it in, or take the row out")
    return str(value)


def invalid_field(benchmark: Benchmark, row: Mapping[str, Any], field: str, where: str) -> UserError:
    try:
        there = f"is {value_at(row, field)!r}"[:200]
    except LookupError as error:
        inside = f" ({error})" if "." in field else ""
        there = f"is missing{inside}; the row has {', '.join(sorted(map(str, row)))}"
    if benchmark.reads_own_rows:
        fix = "name the columns that hold them, such as columns: {question: Problem, answer: Answer}"
    else:
        fix = f"give {benchmark.name} rows with {', '.join(repr(name) for name in benchmark.fields)}"
    return UserError(f"{where}: field '{field}' {there}. Fix: {fix}")


def _value(row: Mapping[str, Any], field: str) -> Any:
    """The value of a row under a column or a dotted path; None: there is none."""
    try:
        return value_at(row, field)
    except LookupError:
        return None


def final_answer(benchmark: Benchmark, answer: str, where: str) -> str:
    _, marker, final = answer.rpartition(benchmark.answer_after or GSM8K_MARKER)
    if not final.strip() or (benchmark.answer_after and not marker):
        raise UserError(f"{where}: field '{benchmark.fields[1]}' has no answer behind '{benchmark.answer_after or GSM8K_MARKER}'")
    return final.strip()


def check_count(benchmark: Benchmark, source: str, found: int) -> None:
    if benchmark.count is not None and found != benchmark.count:
        raise UserError(
            f"{source}: {found} problems, but {benchmark.name} has {benchmark.count}: a score over another number of problems is "
            "another benchmark. Fix: name the complete set, and set `limit` for its first problems"
        )
    if found == 0:
        raise UserError(f"{source}: no problems in it. Fix: give {benchmark.name} at least one")
