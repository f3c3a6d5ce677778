"""Evaluate a model: ask, grade, record, score. Can be cut off at any moment; called again it goes on with the samples
that are missing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lt_train import prompts, recipe
from lt_train.errors import UserError
from lt_train.evaluation.benchmarks import BENCHMARKS, ProblemSet, load_problems
from lt_train.evaluation.generation import (
    Generation,
    Request,
    Sampling,
    SpecialTokens,
    check_fits_context,
    generate,
    sample_seed,
    special_tokens,
)
from lt_train.evaluation.grading import equivalent, grade
from lt_train.evaluation.loss import answer_losses
from lt_train.evaluation.records import Fingerprint, RecordFolder, SampleRecord
from lt_train.evaluation.scores import AnswerScores, LossScores, answer_scores, finished_scores, write_scores
from lt_train.evaluation.statistics import TokenLoss, mean_loss
from lt_train.examples import Example
from lt_train.progress import show_progress


@dataclass(frozen=True)
class Plan:
    """All samples that one evaluation consists of, and what decides what they say."""

    entry: recipe.Eval
    problems: ProblemSet
    requests: tuple[Request, ...]
    sampling: Sampling
    tokens: SpecialTokens
    fingerprint: Fingerprint


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entry: recipe.Eval,
    prompt: recipe.Prompt,
    out: Path,
    *,
    seed: int,
    model_fingerprint: str,
    progress: bool = True,
) -> AnswerScores:
    """Score a model on one entry of a recipe's `eval` list.

    `out` gets meta.json, samples.jsonl and at last scores.json. Samples already there are not drawn again; neither are
    they when `samples` or `limit` grew since, or `batch_size` changed.

    Args:
        seed: the recipe's; the entry's own goes before it.
        model_fingerprint: says which weights and which hybrid these are; a folder takes samples of one only.
        progress: show samples done, tokens per second and time left on stderr.

    Raises:
        UserError: the benchmark cannot be read, a prompt leaves no room for max_new_tokens, or `out` holds something
            else.
    """
    plan = make_plan(model, tokenizer, entry, prompt, seed, model_fingerprint)
    check_fits_context(model.config.max_position_embeddings, plan.requests, entry.max_new_tokens)
    folder = RecordFolder(out, plan.fingerprint)
    done = finished_scores(out / "scores.json", plan.fingerprint)
    asked = (len(plan.problems.problems), entry.samples)
    if isinstance(done, AnswerScores) and not done.partial and (done.problems, done.samples) == asked:
        return done
    draw_missing_samples(model, tokenizer, plan, folder, progress)
    scores = score(plan, folder.read())
    write_scores(out / "scores.json", scores)
    return scores


def check_evaluation(tokenizer: PreTrainedTokenizerBase, entry: recipe.Eval, prompt: recipe.Prompt, context: int) -> None:
    """Find what would stop `evaluate` before a model is trained for it: no such problems, or no room for the answers.

    Args:
        context: tokens that the model was made for.

    Raises:
        UserError: as `evaluate`.
    """
    problems = load_problems(BENCHMARKS[entry.benchmark], entry.path, entry.limit)
    one_each = entry.model_copy(update={"samples": 1})
    check_fits_context(context, make_requests(tokenizer, one_each, prompt, problems, seed=0), entry.max_new_tokens)


def evaluate_heldout_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    entry: recipe.HeldoutLoss,
    out: Path,
    *,
    model_fingerprint: str,
    progress: bool = True,
) -> LossScores:
    """The mean loss per answer token over the first `limit` examples; `out` gets scores.json.

    Raises:
        UserError: there are no examples, or `out` holds scores of something else.
    """
    chosen = examples[: entry.limit]
    check_heldout(chosen)
    fingerprint = {"model": model_fingerprint, "benchmark": entry.benchmark, "examples": hash_examples(chosen)}
    done = finished_scores(out / "scores.json", fingerprint)
    if isinstance(done, LossScores):
        return done
    losses: dict[str, TokenLoss] = {}
    with show_progress(f"evaluating {entry.name}", total=len(chosen), shown=progress) as bar:
        for example, loss in answer_losses(model, chosen, entry.batch_size):
            losses[example.id] = loss
            bar.advance()
    mean = mean_loss([losses[example.id] for example in chosen])
    scores = LossScores(
        benchmark=entry.benchmark,
        samples=mean.n,
        tokens=sum(loss.tokens for loss in losses.values()),
        loss=mean.value,
        standard_error=mean.standard_error,
        fingerprint=fingerprint,
        by_sample={example.id: losses[example.id] for example in chosen},
    )
    write_scores(out / "scores.json", scores)
    return scores


def make_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entry: recipe.Eval,
    prompt: recipe.Prompt,
    seed: int,
    model_fingerprint: str,
) -> Plan:
    problems = load_problems(BENCHMARKS[entry.benchmark], entry.path, entry.limit)
    seed = seed if entry.seed is None else entry.seed
    tokens = special_tokens(model, tokenizer)
    sampling = Sampling(entry.temperature, entry.top_p, entry.max_new_tokens)
    requests = make_requests(tokenizer, entry, prompt, problems, seed)
    fingerprint: Fingerprint = {
        "model": model_fingerprint,
        "benchmark": entry.benchmark,
        "problems": hash_of([astuple(problem) for problem in problems.all_problems]),
        "prompt": hash_of(requests[0].prompt_ids),
        "stop_tokens": " ".join(map(str, tokens.stop_ids)),
        "max_new_tokens": entry.max_new_tokens,
        "temperature": entry.temperature,
        "top_p": None if sampling.greedy else entry.top_p,
        "seed": None if sampling.greedy else seed,
    }
    return Plan(entry, problems, requests, sampling, tokens, fingerprint)


def make_requests(
    tokenizer: PreTrainedTokenizerBase, entry: recipe.Eval, prompt: recipe.Prompt, problems: ProblemSet, seed: int
) -> tuple[Request, ...]:
    requests = []
    for problem in problems.problems:
        prompt_ids = tuple(prompts.prompt_ids(tokenizer, prompt, {"question": problem.text}))
        for sample in range(entry.samples):
            requests.append(Request(problem.id, sample, sample_seed(seed, problem.id, sample), prompt_ids))
    return tuple(requests)


def draw_missing_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, folder: RecordFolder, progress: bool
) -> None:
    """Generate, grade and record every sample of the plan that the folder lacks."""
    there = folder.read()
    check_same_prompts(plan, there, folder.samples_path)
    missing = [request for request in plan.requests if (request.problem, request.sample) not in there]
    answers = {problem.id: problem.answer for problem in plan.problems.problems}
    done = len(plan.requests) - len(missing)
    new_tokens = 0
    with show_progress(f"evaluating {plan.entry.name}", done=done, total=len(plan.requests), shown=progress) as bar:
        for generation in generate(model, missing, plan.sampling, plan.tokens, plan.entry.batch_size):
            folder.append(make_record(tokenizer, plan, generation, answers[generation.request.problem]))
            new_tokens += len(generation.token_ids)
            bar.advance(f"{new_tokens / bar.seconds:,.0f} tokens/s")


def make_record(tokenizer: PreTrainedTokenizerBase, plan: Plan, generation: Generation, answer: str) -> SampleRecord:
    request = generation.request
    text = tokenizer.decode(
        plan.tokens.content(generation.token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    verdict = grade(text, answer)
    return SampleRecord(
        problem=request.problem,
        sample=request.sample,
        seed=None if plan.sampling.greedy else request.seed,
        prompt_hash=hash_of(request.prompt_ids),
        text=text,
        tokens=len(generation.token_ids),
        thinking_tokens=None,
        finish_reason=generation.finish_reason,
        extracted=verdict.extracted,
        extracted_from=verdict.extracted_from,
        score=float(verdict.correct),
        correct=verdict.correct,
        grading_error=verdict.error,
        seconds=round(generation.seconds, 6),
    )


def score(plan: Plan, there: Mapping[tuple[str, int], SampleRecord]) -> AnswerScores:
    """The scores over exactly the plan's samples; a folder may hold more, from an earlier run with more of them.

    Raises:
        UserError: a sample of the plan is missing, so any score would be over another set.
    """
    return answer_scores(
        there,
        [problem.id for problem in plan.problems.problems],
        plan.entry.samples,
        benchmark=plan.entry.benchmark,
        available=plan.problems.available,
        fingerprint=plan.fingerprint,
        equivalent=equivalent,
    )


def check_same_prompts(plan: Plan, there: Mapping[tuple[str, int], SampleRecord], path: Path) -> None:
    for request in plan.requests:
        record = there.get((request.problem, request.sample))
        if record is not None and record.prompt_hash != hash_of(request.prompt_ids):
            raise UserError(
                f"{path}: sample {request.sample} of problem {request.problem} was made with another prompt than this "
                f"recipe and "
                f"tokenizer make now. Give this evaluation another `name`, or move the folder away"
            )


def check_heldout(examples: Sequence[Example]) -> None:
    if not examples:
        raise UserError("heldout_loss: no samples are held out; set data.heldout to the number of samples to set aside")
    if len({example.id for example in examples}) != len(examples):
        raise UserError("heldout_loss: two held-out samples have one id, so their losses could not be told apart")


def hash_examples(examples: Sequence[Example]) -> str:
    return hash_of([[example.id, example.prompt_ids, example.answer_ids] for example in examples])


def hash_of(value: object) -> str:
    """16 hex digits that follow from a value of lists, text and numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
