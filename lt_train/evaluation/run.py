"""Evaluate: generate, grade, record, score. It can be interrupted at any moment, and resumes with the samples that are missing.

Several processes may share the work: each draws its own shard into a file of its own, and reading the folder joins them.
"""

import operator
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from lt_train.benchmarks.declaration import Problem
from lt_train.evaluation.grading.grader_process import TIMED_OUT, Grader
from lt_train.evaluation.grading.scoring import score_answer
from lt_train.evaluation.plan import EvaluationPlan
from lt_train.evaluation.records import GRADER_VERSION, RecordFolder, SampleRecord, Verdict, shard_of
from lt_train.evaluation.scores import AnswerScores, answer_scores, finished_scores, truncated_as_for, write_scores
from lt_train.inference.requests import Answer, Backend
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import hash_of_json
from lt_train.runtime.processes import wait_until
from lt_train.runtime.progress import show_progress
from lt_train.runtime.run_paths import SCORES

SECONDS_ALONE = 10
"""Of computing, for an answer that is judged again once no model generates."""

PATIENCE_ALONE = 60
"""Times as long by the clock: what else runs on the machine must not decide a verdict."""

Records = dict[tuple[str, int], SampleRecord]


def evaluate(
    plan: EvaluationPlan, backend: Backend, out: Path, *, rank: int = 0, world_size: int = 1, progress: bool = True
) -> AnswerScores | None:
    """Draw what is missing of a plan's samples, and score them.

    `out` gets meta.json, samples.jsonl and at last scores.json. Samples already there are not drawn again, also after a change of
    `samples`, `limit`, `truncated` or the number of processes.

    Args:
        rank: this process's number among the `world_size` processes that share the work. The first one waits for the others and
            scores.
        progress: show samples done, tokens per second and time left on stderr.

    Returns:
        The scores; None in all processes but the first.

    Raises:
        UserError: `out` holds something else, a server cannot be used, a sample is missing.
    """
    folder = RecordFolder(out, plan.fingerprint, rank, world_size)
    done = finished_scores(out / SCORES, plan.fingerprint)
    if isinstance(done, AnswerScores) and _matches(done, plan):
        return done
    with Grader() as grader:
        draw_missing_samples(plan, backend, folder, grader, rank, world_size, progress)
    if rank > 0:
        return None
    if world_size > 1:
        wait_until(lambda: plan.keys <= folder.read().keys())
    records = folder.read()
    with closing(Grader(SECONDS_ALONE, PATIENCE_ALONE)) as grader:  # starts where it is needed
        records = judge_again(plan, records, folder, grader)
        scores = answer_scores(
            records,
            [problem.id for problem in plan.problems.problems],
            plan.eval_config.samples,
            benchmark=plan.eval_config.benchmark,
            available=plan.problems.available,
            fingerprint=plan.fingerprint,
            equivalent=grader.equivalent if plan.benchmark.grader == "math" else operator.eq,
            allow_partial=plan.eval_config.allow_partial,
            truncated_as=truncated_as_for(plan.benchmark, plan.eval_config.truncated),
        )
    write_scores(out / SCORES, scores)
    return scores


def draw_missing_samples(
    plan: EvaluationPlan, backend: Backend, folder: RecordFolder, grader: Grader, rank: int, world_size: int, progress: bool
) -> None:
    """Generate, grade and record every sample of this process's shard that the folder lacks."""
    there = folder.read()
    check_same_prompts(plan, there, folder.folder)
    shard = shard_of(plan.requests, rank, world_size)
    missing = [request for request in shard if (request.problem, request.sample) not in there]
    problems = {problem.id: problem for problem in plan.problems.problems}
    done, tokens = len(shard) - len(missing), 0
    shown = progress and rank == 0
    with show_progress(f"evaluating {plan.eval_config.name}", done=done, total=len(shard), shown=shown) as bar:

        def watch(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(done, f"{tokens / bar.seconds:,.0f} tokens/s")

        for answer in backend.answers(missing, plan.sampling, watch):
            folder.append(make_record(plan, answer, problems[answer.request.problem], grader))
            done += 1
            bar.update(done, f"{tokens / bar.seconds:,.0f} tokens/s")


def make_record(plan: EvaluationPlan, answer: Answer, problem: Problem, grader: Grader) -> SampleRecord:
    verdict = judge(plan, problem, answer.text, answer.finish_reason == "length", grader)
    return SampleRecord(
        problem=problem.id,
        sample=answer.request.sample,
        seed=None if plan.sampling.greedy else answer.request.seed,
        prompt_hash=hash_of_json(answer.request.prompt_ids),
        text=answer.text,
        tokens=answer.tokens,
        thinking_tokens=answer.thinking_tokens,
        finish_reason=answer.finish_reason,
        extracted=verdict.extracted,
        extracted_from=verdict.extracted_from,
        score=verdict.score,
        correct=verdict.correct,
        grading_error=verdict.grading_error,
        seconds=round(answer.seconds, 6),
        graded_score=verdict.graded_score,
        grader=verdict.grader,
    )


def judge(plan: EvaluationPlan, problem: Problem, text: str, truncated: bool, grader: Grader) -> Verdict:
    found = score_answer(plan.benchmark, problem, text, grader.grade, ended=not truncated)
    score = 0.0 if truncated and plan.benchmark.truncated_is_incorrect else found.score
    return Verdict(found.extracted, found.extracted_from, score, score == 1.0, found.error, found.score, GRADER_VERSION)


def judge_again(plan: EvaluationPlan, records: Records, folder: RecordFolder, grader: Grader) -> Records:
    """Judge what an earlier grader judged, and what timed out while the model may have kept the machine busy: alone, and with more
    time. The new verdicts are written down, so that this happens once.
    """
    settled, wanted = dict(records), plan.keys
    problems = {problem.id: problem for problem in plan.problems.problems}
    for key, record in records.items():
        outdated, timed_out = record.grader < GRADER_VERSION, (record.grading_error or "").startswith(TIMED_OUT)
        if key not in wanted or not (outdated or timed_out):
            continue
        verdict = judge(plan, problems[record.problem], record.text, record.truncated, grader)
        if (verdict.grading_error or "").startswith(TIMED_OUT):
            verdict = replace(verdict, grading_error=f"Judged alone: {verdict.grading_error}")
        settled[key] = folder.append_verdict(record, verdict)
    return settled


def check_same_prompts(plan: EvaluationPlan, there: Mapping[tuple[str, int], SampleRecord], folder: Path) -> None:
    for request in plan.requests:
        record = there.get((request.problem, request.sample))
        if record is not None and record.prompt_hash != hash_of_json(request.prompt_ids):
            raise UserError(
                f"{folder}: sample {request.sample} of problem {request.problem} was made with another prompt than this recipe "
                "and tokenizer make now. Fix: give this evaluation another `name`, or move the folder away"
            )


def _matches(done: AnswerScores, plan: EvaluationPlan) -> bool:
    """Whether finished scores are of all samples that are requested now, and count truncated ones as requested."""
    truncated_as = truncated_as_for(plan.benchmark, plan.eval_config.truncated)
    wanted = (len(plan.problems.problems), plan.eval_config.samples, truncated_as)
    return not done.partial and (done.problems, done.samples, done.truncated_as) == wanted
