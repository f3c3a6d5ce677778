"""All samples that an evaluation consists of, and what decides what they say: settled before a model is asked anything."""

from dataclasses import asdict, astuple, dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from lt_train.benchmarks import BENCHMARKS, Benchmark, ProblemSet, RecallSettings, answer_tokens, load_problems
from lt_train.evaluation.prompting import prompt_ids, room_for_text
from lt_train.evaluation.records import Fingerprint
from lt_train.inference.requests import Request, Sampling, sample_seed
from lt_train.recipe import schema as recipe
from lt_train.recipe.evaluations import Recall
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import hash_of_json


@dataclass(frozen=True)
class EvaluationPlan:
    """`fingerprint` tells samples of one model, prompt and sampling from all others; of which model, `for_model` adds."""

    entry: recipe.Eval
    benchmark: Benchmark
    problems: ProblemSet
    requests: tuple[Request, ...]
    sampling: Sampling
    fingerprint: Fingerprint

    @property
    def keys(self) -> set[tuple[str, int]]:
        return {(request.problem, request.sample) for request in self.requests}

    def for_model(self, model_fingerprint: str, stop_ids: tuple[int, ...]) -> "EvaluationPlan":
        """This plan, answered by one model.

        Args:
            model_fingerprint: says which weights and which hybrid will answer. stop_ids: at which tokens.
        """
        model = {"model": model_fingerprint, "stop_tokens": " ".join(map(str, stop_ids))}
        return replace(self, fingerprint={**self.fingerprint, **model})


def make_plan(
    entry: recipe.Eval,
    prompt: recipe.Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    seed: int,
) -> EvaluationPlan:
    """
    Args:
        context: tokens that the model was made for (max_position_embeddings).
        seed: the recipe's; the entry's own goes before it.

    Raises:
        UserError: the benchmark cannot be read, or a prompt leaves no room for max_new_tokens.
    """
    benchmark, seed = BENCHMARKS[entry.benchmark], seed if entry.seed is None else entry.seed
    recall = None if entry.recall is None else RecallSettings(**_as_tuples(entry.recall))
    problems = load_problems(benchmark, entry.path, entry.limit, recall=recall, tokenizer=tokenizer, seed=seed)
    sampling = sampling_of(entry, benchmark, recall)
    room = room_for_text(tokenizer, prompt, benchmark, context, sampling.max_new_tokens)
    longest = room if entry.max_prompt_tokens is None else entry.max_prompt_tokens
    if longest > room:
        raise UserError(
            f"max_prompt_tokens={longest}: the model's context of {context} tokens leaves {room} for a text beside "
            f"{sampling.max_new_tokens} new tokens and the chat template"
        )
    ids = partial(prompt_ids, tokenizer, prompt, benchmark, max_prompt_tokens=longest)
    requests = []
    for problem in problems.problems:
        asked = ids(problem)
        requests += [Request(problem.id, sample, sample_seed(seed, problem.id, sample), asked) for sample in range(entry.samples)]
    check_fits_context(context, requests, sampling.max_new_tokens)
    fingerprint = {
        "benchmark": entry.benchmark,
        "problems": hash_of_json([astuple(problem) for problem in problems.all_problems]),
        "prompt": hash_of_json(requests[0].prompt_ids),
        "max_prompt_tokens": longest if benchmark.truncate_middle else None,
        "backend": entry.backend,  # each kind draws its own random numbers
        **_sampling_facts(sampling),
        "seed": None if sampling.greedy else seed,
    }
    return EvaluationPlan(entry, benchmark, problems, tuple(requests), sampling, fingerprint)


def sampling_of(entry: recipe.Eval, benchmark: Benchmark, recall: RecallSettings | None) -> Sampling:
    """The recipe's settings, and the benchmark's own limit where the recipe sets none."""
    return Sampling(
        temperature=entry.temperature,
        top_p=entry.top_p,
        max_new_tokens=entry.max_new_tokens or answer_tokens(benchmark, recall),
        top_k=entry.top_k,
        min_p=entry.min_p,
        repetition_penalty=entry.repetition_penalty,
        stop=tuple(entry.stop),
        thinking_budget=entry.thinking_budget,
        thinking_close=entry.thinking_close,
    )


def check_fits_context(context: int, requests: list[Request], max_new_tokens: int) -> None:
    """
    Raises:
        UserError: the longest prompt and max_new_tokens together exceed the positions the model was made for.
    """
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    if len(longest.prompt_ids) + max_new_tokens > context:
        room = context - len(longest.prompt_ids)
        fix = f"set max_new_tokens to at most {room}" if room > 0 else "this model cannot be asked this problem"
        raise UserError(
            f"max_new_tokens={max_new_tokens}: with the {len(longest.prompt_ids)} tokens of the longest prompt (problem "
            f"{longest.problem}) that is more than the model's context of {context} tokens (max_position_embeddings); {fix}"
        )


def _sampling_facts(sampling: Sampling) -> dict[str, str | int | float | None]:
    facts = asdict(sampling)
    if sampling.greedy:
        facts |= dict.fromkeys(("top_p", "top_k", "min_p"))
    if sampling.thinking_budget is None:
        facts["thinking_close"] = None
    return {**facts, "stop": " ".join(map(repr, sampling.stop))}


def _as_tuples(recall: Recall) -> dict[str, object]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in recall.model_dump().items()}
