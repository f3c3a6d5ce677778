"""What an evaluation by the built-in engine needs: the KV cache of one sequence, full and hybrid, and how many fit at once."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from lt_train.benchmarks import BENCHMARKS, RecallSettings, answer_tokens
from lt_train.hybrid.kv_size import kv_bytes
from lt_train.planning.setup import Machine, inference_number
from lt_train.planning.shape import ModelShape
from lt_train.recipe.schema import Eval, Recipe


@dataclass(frozen=True)
class Cache:
    """Bytes of one sequence.

    Attributes:
        tokens: of its answer, at most.
        at_once: how many such sequences fit beside the weights: (hybrid, full).
    """

    evaluation: str
    tokens: int
    hybrid: int
    full: int
    at_once: tuple[int, int]


def kv_cache(recipe: Recipe, base_config: PreTrainedConfig, shape: ModelShape, machine: Machine) -> Cache | None:
    """Of the recipe's evaluation with the longest answers; None where nothing is generated.

    The engine spreads a model's layers over all GPUs of its process, so it has the memory of all of them.
    """
    entries = [entry for entry in recipe.eval if isinstance(entry, Eval)]
    if not entries:
        return None
    longest = max(entries, key=_tokens)
    number = inference_number(recipe, machine)
    tokens, spec = _tokens(longest), shape.spec
    hybrid, full = (kv_bytes(base_config.to_dict(), each, tokens, number) for each in (spec, spec.all_full))
    left = max(machine.gpus * machine.usable - number * shape.base_parameters, 0)
    return Cache(longest.name, tokens, hybrid, full, (left // hybrid, left // full))


def _tokens(entry: Eval) -> int:
    if entry.max_new_tokens is not None:
        return entry.max_new_tokens
    recall = RecallSettings(span=entry.recall.span) if entry.recall is not None else None
    return answer_tokens(BENCHMARKS[entry.benchmark], recall) or 0
