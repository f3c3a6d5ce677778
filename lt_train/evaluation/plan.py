"""All samples that an evaluation consists of, and what decides their content: settled before any model generates."""

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace

from transformers import PreTrainedTokenizerBase

from lt_train.benchmarks import BENCHMARKS, Benchmark, ProblemSet, RecallSettings, answer_tokens, load_problems
from lt_train.dataset.answers import base_reasoning
from lt_train.dataset.chat_template import ChatTemplate
from lt_train.dataset.reasoning import known_tags
from lt_train.evaluation.prompting import instruction_for, prompt_for, prompt_ids, question_text, room_for_text
from lt_train.evaluation.records import Fingerprint
from lt_train.inference.requests import Request, Sampling, sample_seed
from lt_train.recipe import schema as recipe
from lt_train.recipe.evaluations import DEFAULT_THINKING_CLOSE, Recall
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import hash_of_json


@dataclass(frozen=True)
class EvaluationPlan:
    """
    Attributes:
        prompt: wraps every question. questions: problem id -> its text with the instruction, as `prompt` wraps it.
        fingerprint: identifies the samples of one model, prompt and sampling; `for_model` adds the model.
    """

    eval_config: recipe.Eval
    benchmark: Benchmark
    problems: ProblemSet
    prompt: recipe.Prompt
    questions: Mapping[str, str]
    requests: tuple[Request, ...]
    sampling: Sampling
    fingerprint: Fingerprint

    @property
    def keys(self) -> set[tuple[str, int]]:
        return {(request.problem, request.sample) for request in self.requests}

    def for_model(self, model_fingerprint: str, stop_ids: tuple[int, ...]) -> "EvaluationPlan":
        """This plan with one model's fingerprint.

        Args:
            model_fingerprint: identifies weights and hybrid. stop_ids: tokens at which it stops.
        """
        model = {"model": model_fingerprint, "stop_tokens": " ".join(map(str, stop_ids))}
        return replace(self, fingerprint={**self.fingerprint, **model})


def make_plan(
    eval_config: recipe.Eval,
    prompt: recipe.Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    seed: int,
) -> EvaluationPlan:
    """
    Args:
        context: tokens that the model supports (max_position_embeddings).
        seed: the recipe's; the evaluation's own takes precedence.

    Raises:
        UserError: the benchmark cannot be read, or a prompt leaves no room for max_new_tokens.
    """
    benchmark, seed = BENCHMARKS[eval_config.benchmark], seed if eval_config.seed is None else eval_config.seed
    recall = None if eval_config.recall is None else _recall_settings(eval_config.recall)
    columns = None if eval_config.columns is None else eval_config.columns.model_dump()
    problems = load_problems(
        benchmark, eval_config.path, eval_config.limit, columns=columns, recall=recall, tokenizer=tokenizer, seed=seed
    )
    sampling = sampling_for(eval_config, benchmark, recall)
    if sampling.thinking_budget is not None and benchmark.prompt_style != "without_chat":
        check_thinking_close(sampling.thinking_close, tokenizer, prompt)
    room = room_for_text(tokenizer, prompt, benchmark, context, sampling.max_new_tokens)
    longest = room if eval_config.max_prompt_tokens is None else eval_config.max_prompt_tokens
    if longest > room:
        raise UserError(
            f"max_prompt_tokens: {longest}: the model's context of {context} tokens leaves {room} for a text beside "
            f"{sampling.max_new_tokens} new tokens and the chat template. Fix: set it to at most {room}"
        )
    instruction = instruction_for(benchmark, prompt, eval_config.instruction)
    requests = []
    for problem in problems.problems:
        ids = prompt_ids(tokenizer, prompt, benchmark, problem, longest, instruction)
        samples = range(eval_config.samples)
        requests += [Request(problem.id, sample, sample_seed(seed, problem.id, sample), ids) for sample in samples]
    check_fits_context(context, requests, sampling.max_new_tokens)
    fingerprint: Fingerprint = {  # nothing that only rounds otherwise: kernels, batches, drafts, packed weights
        "benchmark": eval_config.benchmark,
        "problems": hash_of_json([astuple(problem) for problem in problems.all_problems]),
        **({"instruction": instruction} if instruction else {}),
        "prompt": hash_of_json(requests[0].prompt_ids),
        "max_prompt_tokens": longest if benchmark.truncate_middle else None,
        "backend": eval_config.backend,  # each kind draws its own random numbers
        **_sampling_metadata(sampling),
        "seed": None if sampling.greedy else seed,
    }
    questions = {each.id: question_text(tokenizer, prompt, benchmark, each, longest, instruction) for each in problems.problems}
    wrapped = prompt_for(benchmark, prompt)
    return EvaluationPlan(eval_config, benchmark, problems, wrapped, questions, tuple(requests), sampling, fingerprint)


def sampling_for(eval_config: recipe.Eval, benchmark: Benchmark, recall: RecallSettings | None) -> Sampling:
    """The recipe's settings, and the benchmark's own limit where the recipe sets none.

    Raises:
        UserError: neither sets a limit.
    """
    max_new_tokens = eval_config.max_new_tokens or answer_tokens(benchmark, recall)
    if max_new_tokens is None:
        raise UserError(f"max_new_tokens: missing: {benchmark.name} sets no limit of its own. Fix: set max_new_tokens")
    return Sampling(
        temperature=eval_config.temperature,
        top_p=eval_config.top_p,
        max_new_tokens=max_new_tokens,
        top_k=eval_config.top_k,
        min_p=eval_config.min_p,
        repetition_penalty=eval_config.repetition_penalty,
        stop=tuple(eval_config.stop),
        thinking_budget=eval_config.thinking_budget,
        thinking_close=eval_config.thinking_close,
    )


def check_thinking_close(thinking_close: str, tokenizer: PreTrainedTokenizerBase, prompt: recipe.Prompt) -> None:
    """
    Raises:
        UserError: it is the default, and the base closes its reasoning with another tag.
    """
    tags = base_reasoning(ChatTemplate(tokenizer, prompt), known_tags(None), own_pair=False).tags
    if tags is not None and tags.closing not in thinking_close and thinking_close == DEFAULT_THINKING_CLOSE:
        raise UserError(
            f"thinking_close: {thinking_close!r}: the base closes its reasoning with {tags.closing}. Fix: set thinking_close to "
            + json.dumps(f"{tags.gap}{tags.closing}\n\n", ensure_ascii=False)
        )


def check_fits_context(context: int, requests: list[Request], max_new_tokens: int) -> None:
    """
    Raises:
        UserError: the longest prompt and max_new_tokens together exceed the positions that the model supports.
    """
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    if len(longest.prompt_ids) + max_new_tokens > context:
        room = context - len(longest.prompt_ids)
        fix = f"set max_new_tokens to at most {room}" if room > 0 else "use a model with a longer context"
        raise UserError(
            f"max_new_tokens: {max_new_tokens}: with the {len(longest.prompt_ids)} tokens of the longest prompt (problem "
            f"{longest.problem}) that is more than the model's context of {context} tokens (max_position_embeddings). Fix: {fix}"
        )


def _sampling_metadata(sampling: Sampling) -> dict[str, str | int | float | None]:
    metadata = asdict(sampling)
    if sampling.greedy:
        metadata |= dict.fromkeys(("top_p", "top_k", "min_p"))
    if sampling.thinking_budget is None:
        metadata["thinking_close"] = None
    return {**metadata, "stop": " ".join(map(repr, sampling.stop))}


def _recall_settings(recall: Recall) -> RecallSettings:
    return RecallSettings(tuple(recall.lengths), tuple(recall.depths), recall.repeats, recall.keys, recall.span)
