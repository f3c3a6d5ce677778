"""Evaluate: ask, grade, record, score. It can be cut off at any moment, and goes on with the samples that are missing.

Several processes may share the work: each draws its own part into a file of its own, and reading the folder joins them.
"""

import operator
import time
from collections.abc import Mapping
from pathlib import Path

from lt_train.benchmarks.declaration import Problem
from lt_train.evaluation.grading.grader_process import Grader
from lt_train.evaluation.grading.scoring import score_answer
from lt_train.evaluation.plan import EvaluationPlan
from lt_train.evaluation.records import RecordFolder, SampleRecord, shard_of
from lt_train.evaluation.scores import AnswerScores, answer_scores, finished_scores, write_scores
from lt_train.inference.requests import Answer, Backend
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import hash_of_json
from lt_train.runtime.progress import show_progress

SECONDS_BETWEEN_LOOKS = 2.0


def evaluate(
    plan: EvaluationPlan, backend: Backend, out: Path, *, rank: int = 0, ranks: int = 1, progress: bool = True
) -> AnswerScores | None:
    """Draw what is missing of a plan's samples, and score them.

    `out` gets meta.json, samples.jsonl and at last scores.json. Samples already there are not drawn again; neither are they when
    `samples` or `limit` grew since, or the number of processes changed.

    Args:
        rank: this process's number among the `ranks` that share the work. The first one waits for the others and scores.
        progress: show samples done, tokens per second and time left on stderr.

    Returns:
        The scores; None in all processes but the first.

    Raises:
        UserError: `out` holds something else, a server cannot be used, a sample is missing.
    """
    folder = RecordFolder(out, plan.fingerprint, rank, ranks)
    done = finished_scores(out / "scores.json", plan.fingerprint)
    if isinstance(done, AnswerScores) and _is_of(done, plan):
        return done
    with Grader() as grader:
        draw_missing_samples(plan, backend, folder, grader, rank, ranks, progress)
        if rank > 0:
            return None
        records = folder.read()
        while ranks > 1 and not plan.keys <= records.keys():
            time.sleep(SECONDS_BETWEEN_LOOKS)  # if another process fails, the launcher ends this one
            records = folder.read()
        scores = answer_scores(
            records,
            [problem.id for problem in plan.problems.problems],
            plan.entry.samples,
            benchmark=plan.entry.benchmark,
            available=plan.problems.available,
            fingerprint=plan.fingerprint,
            equivalent=grader.equivalent if plan.benchmark.grader == "math" else operator.eq,
            allow_partial=plan.entry.allow_partial,
        )
    write_scores(out / "scores.json", scores)
    return scores


def draw_missing_samples(
    plan: EvaluationPlan, backend: Backend, folder: RecordFolder, grader: Grader, rank: int, ranks: int, progress: bool
) -> None:
    """Answer, grade and record every sample of this process's share that the folder lacks."""
    there = folder.read()
    check_same_prompts(plan, there, folder.folder)
    share = shard_of(plan.requests, rank, ranks)
    missing = [request for request in share if (request.problem, request.sample) not in there]
    problems = {problem.id: problem for problem in plan.problems.problems}
    done, tokens = len(share) - len(missing), 0
    shown = progress and rank == 0
    with show_progress(f"evaluating {plan.entry.name}", done=done, total=len(share), shown=shown) as bar:

        def watch(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(done, f"{tokens / bar.seconds:,.0f} tokens/s")

        for answer in backend.answers(missing, plan.sampling, watch):
            folder.append(make_record(plan, answer, problems[answer.request.problem], grader))
            done += 1
            bar.update(done, f"{tokens / bar.seconds:,.0f} tokens/s")


def make_record(plan: EvaluationPlan, answer: Answer, problem: Problem, grader: Grader) -> SampleRecord:
    found = score_answer(plan.benchmark, problem, answer.text, grader.grade)
    cut_off = answer.finish_reason == "length" and plan.benchmark.truncated_is_incorrect
    score = 0.0 if cut_off else found.score
    return SampleRecord(
        problem=problem.id,
        sample=answer.request.sample,
        seed=None if plan.sampling.greedy else answer.request.seed,
        prompt_hash=hash_of_json(answer.request.prompt_ids),
        text=answer.text,
        tokens=answer.tokens,
        thinking_tokens=answer.thinking_tokens,
        finish_reason=answer.finish_reason,
        extracted=found.extracted,
        extracted_from=found.extracted_from,
        score=score,
        correct=score == 1.0,
        grading_error=found.error,
        seconds=round(answer.seconds, 6),
    )


def check_same_prompts(plan: EvaluationPlan, there: Mapping[tuple[str, int], SampleRecord], folder: Path) -> None:
    for request in plan.requests:
        record = there.get((request.problem, request.sample))
        if record is not None and record.prompt_hash != hash_of_json(request.prompt_ids):
            raise UserError(
                f"{folder}: sample {request.sample} of problem {request.problem} was made with another prompt than this recipe "
                "and tokenizer make now. Give this evaluation another `name`, or move the folder away"
            )


def _is_of(done: AnswerScores, plan: EvaluationPlan) -> bool:
    """Whether finished scores are of all samples that are asked for now."""
    return not done.partial and (done.problems, done.samples) == (len(plan.problems.problems), plan.entry.samples)
