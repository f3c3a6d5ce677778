"""Trains a tiny hybrid on made-up data, in the process of a test or in others.

deepspeed --num_accelerators 2 tests/support/tiny_training.py FOLDER '{"train": {"max_steps": 3}}' [FOLDER SETTINGS …]
"""

import argparse
import json
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config

from lt_train.dataset.examples import Example, ExampleSet, examples_fingerprint
from lt_train.hybrid.loading import build_hybrid, load_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.sinks_file import read_sinks
from lt_train.recipe.schema import Recipe
from lt_train.runtime.processes import leave, this_process
from lt_train.runtime.tracking import NoTracker, Tracker
from lt_train.training.distillation.top_k import write_top_k
from lt_train.training.settings import teacher_fingerprint
from lt_train.training.trainer import LoadModel, TrainResult, train

EOS, PAD, VOCABULARY = 0, 1, 40
SPEC = HybridSpec(num_layers=4, lazy_layers=(1, 2), w_sink=1, w_recent=4)
LEARNED = replace(SPEC, w_sink=0, learned_sinks=True)
SPLIT = replace(SPEC, lazy_layers=(1,), split_layers=((2, (0,)), (3, (1,))))


def train_in(
    out: Path,
    settings: dict[str, Any],
    tracker: Tracker,
    examples: int = 22,
    load: LoadModel | None = None,
    spec: HybridSpec = SPEC,
) -> TrainResult:
    """`spec`: of what `load` loads; with learned sinks it is LEARNED."""
    recipe = tiny_recipe(settings)
    spec = LEARNED if recipe.hybrid.sink == "learned" else spec
    data = tiny_examples(recipe.data.heldout, examples)
    return train(
        recipe, load or partial(load_tiny, spec=spec), tiny_tokenizer(), data, spec, out, tracker, teacher=out.with_name("teacher")
    )


def write_teacher(settings: dict[str, Any], folder: Path, load: LoadModel) -> Path:
    """What a training with these settings and `train.distill.teacher: top_k` learns from."""
    recipe = tiny_recipe(settings)
    given, examples, base = recipe.train.distill, tiny_examples(recipe.data.heldout).train, load(torch.float32)
    fingerprint = teacher_fingerprint(recipe, examples_fingerprint(examples))
    files = {"k": given.top_k, "temperature": given.temperature, "fingerprint": fingerprint, "batch_size": 3, "progress": False}
    with base.full_attention():
        write_top_k(base, examples, folder, **files)
    return folder


def tiny_recipe(settings: dict[str, Any]) -> Recipe:
    """A valid recipe; `settings` is laid over it, part by part."""
    parts: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "model": {"base": "tiny", "dtype": "fp32"},
        "hybrid": {"layers": list(SPEC.lazy_layers), "w_sink": SPEC.w_sink, "w_recent": SPEC.w_recent},
        "data": {"source": "made up", "format": "prompt_response", "max_length": 24},
        "train": {"method": "full", "learning_rate": 3e-3, "max_steps": 4, "batch_size": 4, "micro_batch_size": 2},
    }
    for part, values in settings.items():
        parts[part] = {**parts[part], **values} if isinstance(values, dict) and part in parts else values
    return Recipe.model_validate(parts)


def load_tiny(dtype: torch.dtype, spec: HybridSpec = SPEC) -> HybridForCausalLM:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_hybrid(tiny_config(), spec).to(dtype)


def load_decided(dtype: torch.dtype, spec: HybridSpec = SPEC) -> HybridForCausalLM:
    """As `load_tiny`, with weights so large that streaming changes what it says: its distributions are far from uniform."""
    config = tiny_config()
    config.initializer_range = 0.25
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_hybrid(config, spec).to(dtype)


def hybrid_from(base: Path, settings: dict[str, Any] | None = None) -> LoadModel:
    """The base as a hybrid; its learned sinks, if the settings ask for them, are read from sinks.safetensors beside its weights."""
    if "sink" not in (settings or {}).get("hybrid", {}):
        return lambda dtype: load_hybrid(base, SPEC, dtype=dtype)

    def load(dtype: torch.dtype) -> HybridForCausalLM:
        model = load_hybrid(base, LEARNED, dtype=dtype)
        read_sinks(model, base / "sinks.safetensors")
        return model

    return load


def tiny_config() -> Qwen3Config:
    return Qwen3Config(**tiny_sizes())


def tiny_sizes() -> dict[str, Any]:
    """Settings that the configs of all families have."""
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(2, VOCABULARY)}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")


def tiny_examples(heldout: int = 0, count: int = 22) -> ExampleSet:
    """`count` training examples of 6 to 20 tokens and `heldout` others; the answer repeats the prompt's words."""
    generator = random.Random(1)
    examples = []
    for number in range(count + heldout):
        prompt = tuple(generator.randrange(2, VOCABULARY) for _ in range(generator.randint(3, 9)))
        answer = (*prompt[: generator.randint(2, len(prompt))], EOS)
        examples.append(Example(id=str(number), where=f"made up:{number}", prompt_ids=prompt, answer_ids=answer))
    return ExampleSet(train=examples[:count], heldout=examples[count:], counts={"read": count + heldout})


class Cut(BaseException):
    """Ends a training in mid-step, past every `except Exception`, as a kill would."""


class CutAt(NoTracker):
    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step == self.step:
            raise Cut


class SignalAt(NoTracker):
    """Sends SIGTERM to this process while a step is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)


def train_each(trainings: dict[Path, dict[str, Any]], base: Path | None = None, examples: int = 22) -> None:
    """Train in each folder with its settings, one after the other; all the work of a process."""
    torch.set_num_threads(1)
    for folder, settings in trainings.items():
        load = load_tiny if base is None else hybrid_from(base, settings)
        print(train_in(folder, settings, NoTracker(), examples=examples, load=load))
    if this_process().launched:
        leave(0)  # as the commands do


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trainings", nargs="+", metavar="FOLDER SETTINGS")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--examples", type=int, default=22)
    parser.add_argument("--local_rank", type=int)  # what the deepspeed launcher adds
    given = parser.parse_args()
    pairs = zip(given.trainings[::2], given.trainings[1::2], strict=True)
    train_each({Path(folder): json.loads(settings) for folder, settings in pairs}, given.base, given.examples)


if __name__ == "__main__":
    main()
