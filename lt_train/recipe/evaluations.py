"""The parts of a recipe that evaluate or sample a model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from lt_train.benchmarks import BENCHMARKS, answer_tokens
from lt_train.recipe.faults import Fault
from lt_train.recipe.part import ADDED, MOST, PATH, Bytes, Count, EachOnce, Name, Natural, Part, Seed, Text, formerly
from lt_train.recipe.reasoning_tags import THINK

if TYPE_CHECKING:
    BenchmarkName = str
else:
    BenchmarkName = Literal[tuple(BENCHMARKS)]

BASE: Final = "base"
CONVERTED: Final = "converted"
TRAINED: Final = "trained"
Variant = Literal["base", "converted", "trained"]
"""A model to evaluate: the base model, the hybrid before training, the hybrid after training."""

HELDOUT = ("heldout_loss", "heldout_kl")
"""Evaluations that generate no answers."""


DEFAULT_THINKING_CLOSE = f"{THINK.gap}{THINK.closing}\n\n"


class EvalConfig(Part):
    """What all evaluations have in common."""

    batch_size: Count = 16
    """Samples in one forward pass."""
    limit: Count | None = None
    """Number of problems (held-out samples), from the first. null: all."""
    variants: Annotated[list[Variant], Field(min_length=1), EachOnce] | None = Field(default=None, json_schema_extra=formerly("of"))
    """Models to evaluate. Default: [trained], or [converted] in a recipe without training."""
    name: Name | None = None
    """Folder of the results, unique in a recipe. Default: the benchmark's name."""

    @model_validator(mode="before")
    @classmethod
    def _named_as_its_benchmark(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") is None and values.get("benchmark") in [*BENCHMARKS, *HELDOUT]:
            return {**values, "name": values["benchmark"]}
        return values


class Recall(Part):
    """The problems of needle, passkey and copying."""

    lengths: Annotated[list[Count], Field(min_length=1), EachOnce] = Field(default=[2048, 4096, 8192])
    """Lengths of the user's turn, in tokens of the model's tokenizer."""
    depths: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1), EachOnce] = Field(
        default=[0.0, 0.25, 0.5, 0.75, 1.0]
    )
    """Positions of what must be found, as fractions of the text before it."""
    repeats: Count = 2
    """Number of problems for each length and depth."""
    keys: int = Field(default=1, ge=1, le=64)
    """needle: number of needles in the text. The question names one of them."""
    span: Count = 128
    """copying: number of tokens to copy."""


class ProblemColumns(Part):
    """Where a row holds a problem: names of columns, and dotted paths into what they hold (reward_model.ground_truth)."""

    question: Text = "problem"
    """The question."""
    answer: Text = "answer"
    """The reference answer. Where the text holds GSM8K's marker ####, what follows it."""
    id: Text | None = None
    """What names the problem, unique in the file. null: id or unique_id where a row has it, else the row's number."""


class Eval(EvalConfig):
    """Problems that are solved by generation and graded."""

    benchmark: BenchmarkName
    """What is measured."""
    batch_size: Count = 64
    """Largest number of sequences that generate at a time. `kv_budget` may hold fewer."""
    path: Text | None = Field(default=None, json_schema_extra=PATH)
    """Local file or hub id to use instead of the benchmark's own source. For needle, passkey and copying: a folder of texts to hide
    things in."""
    columns: ProblemColumns | None = Field(default=None, json_schema_extra=ADDED)
    """custom: the columns of a row. null: problem and answer."""
    samples: Count = 1
    """Number of answers to each problem."""
    temperature: float = Field(default=0.0, ge=0, le=100)
    """Sampling temperature. 0: greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the fewest most likely tokens whose probabilities reach this sum. 1: all."""
    top_k: Natural = 0
    """Sample from this number of most likely tokens. 0: all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Sample from tokens that have at least this fraction of the most likely token's probability. 0: all."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    """Penalty of tokens that the sequence holds already (arXiv 1909.05858). 1: none."""
    stop: list[Text] = Field(default=[])
    """Strings that end an answer, besides the model's own stop tokens."""
    max_new_tokens: Count | None = None
    """Tokens of an answer, at most. null: the benchmark's own limit, where it has one."""
    max_prompt_tokens: Annotated[int, Field(ge=2, le=MOST)] | None = None
    """LongBench: tokens of a text, at most. Longer texts lose their middle. null: what the model's context leaves."""
    thinking_budget: Count | None = None
    """Tokens of reasoning, at most. Reasoning that is longer is closed with `thinking_close`. null: no limit."""
    thinking_close: Text = DEFAULT_THINKING_CLOSE
    """Text that closes the reasoning where `thinking_budget` ends it. An answer that has its last line, or a usual tag, has closed
    it already."""
    recall: Recall | None = None
    """The problems of needle, passkey and copying. null: the defaults of its settings."""
    seed: Seed | None = None
    """Seed of the sampling. null: the recipe's seed."""
    backend: Literal["hybrid", "openai"] = "hybrid"
    """What generates. hybrid: the built-in engine. openai: servers with an OpenAI-compatible API that serve the exported
    checkpoint."""
    servers: list[Text] = Field(default=[])
    """Addresses of the servers, such as http://localhost:8000. All serve the same model."""
    served_model: Text | None = None
    """Name under which the servers serve the model. null: the only one there."""
    concurrency: Count = 64
    """Requests in flight at each server."""
    timeout: float = Field(default=7200, gt=0, le=MOST)
    """Seconds that one answer of a server may take."""
    stall: float = Field(default=600, gt=0, le=MOST)
    """Seconds without a further token after which an answer of a server counts as failed."""
    kv_budget: Bytes | None = None
    """Memory for the KV cache, such as 8GiB. Sequences that do not fit wait. null: most of what is free."""
    prefill_chunk: Count = 2048
    """Prompt tokens in one forward pass."""
    draft: Literal["streaming", "hybrid"] | None = Field(default=None, json_schema_extra=ADDED)
    """Speculative decoding: the same weights with more streaming layers propose tokens, and the model reads these in one forward
    pass. No answer changes. streaming: all layers stream in the draft, or `draft_layers`. hybrid: those that stream in the run's
    hybrid, to draft for the base. null: off."""
    draft_layers: Annotated[list[Natural], Field(min_length=1), EachOnce] | None = Field(default=None, json_schema_extra=ADDED)
    """Indices of the layers that stream in the draft, besides those that stream in the model. null: all."""
    draft_length: Count | None = Field(default=None, json_schema_extra=ADDED)
    """Tokens that the draft proposes in a round. null: as many as give the most tokens per second, by the acceptance and the times
    that are measured as it runs; none where a draft does not pay."""
    allow_partial: bool = False
    """Score the samples there are when some are missing, and mark the score as partial."""
    truncated: Literal["incorrect", "graded"] = Field(default="incorrect", json_schema_extra=ADDED)
    """How an answer to maths or multiple choice counts that reaches max_new_tokens. incorrect: whatever its text. graded: by its
    text, as in most other harnesses; compare with their scores only so. scores.json and the report have both accuracies."""
    instruction: str | None = Field(default=None, json_schema_extra=ADDED)
    """What follows each question. null: the benchmark's own, such as to box the answer, where prompt.user is the bare question. "":
    nothing."""

    def conflicts(self) -> Iterator[Fault]:
        yield from self._benchmark()
        yield from self._backend()
        yield from self._draft()
        for name in ("top_p", "top_k", "min_p", "samples"):
            value = getattr(self, name)
            if self.temperature == 0 and value != type(self).model_fields[name].default:
                problem = "greedy answers are all equal" if name == "samples" else f"greedy decoding ignores {name}"
                fix = f"set samples to 1 instead of {value}" if name == "samples" else f"remove {name}"
                yield Fault((name, "temperature"), problem, f"{fix}, or set temperature above 0")

    def _benchmark(self) -> Iterator[Fault]:
        """What a benchmark leaves to the recipe, and what it does not know."""
        benchmark = BENCHMARKS[self.benchmark]
        if benchmark.reads_own_rows and self.path is None:
            yield Fault(("path",), f"missing; {benchmark.name} has no data of its own", "name a file")
        if self.columns is not None and not benchmark.reads_own_rows:
            fix = "remove columns, or set benchmark to custom"
            yield Fault(("columns", "benchmark"), f"{benchmark.name} has columns of its own", fix)
        if self.recall is not None and not benchmark.generated:
            yield Fault(("recall",), f"the problems of {benchmark.name} are read, not generated", "remove it")
        elif self.recall is not None:
            for name, field in Recall.model_fields.items():  # in a resolved recipe all are given
                if name not in benchmark.recall_settings and getattr(self.recall, name) != field.default:
                    yield Fault((f"recall.{name}",), f"unknown setting of {benchmark.name}", "remove it")
        if self.max_prompt_tokens is not None and not benchmark.truncate_middle:
            yield Fault(("max_prompt_tokens",), f"problems of {benchmark.name} are never truncated", "remove it")
        if self.instruction and benchmark.prompt_style != "as_recipe":
            yield Fault(("instruction",), f"{benchmark.name} has a prompt of its own", "remove it")
        if self.max_new_tokens is None and answer_tokens(benchmark) is None:
            fix = "set the tokens of the longest answer"
            yield Fault(("max_new_tokens",), f"missing; {benchmark.name} has no limit of its own", fix)
        budget, longest = self.thinking_budget, self.max_new_tokens or answer_tokens(benchmark)
        if budget is not None and longest is not None and budget >= longest:
            problem, fix = "no tokens are left for the answer behind the reasoning", "raise max_new_tokens above thinking_budget"
            yield Fault(("thinking_budget", "max_new_tokens"), problem, fix)

    def _backend(self) -> Iterator[Fault]:
        if self.backend == "hybrid":
            if self.servers:
                yield Fault(("servers", "backend"), "the built-in engine queries no servers", "set backend to openai")
            return
        if not self.servers:
            yield Fault(("servers", "backend"), "no server is named", "list them, such as [http://localhost:8000]")
        if len(self.variants or []) > 1:
            yield Fault(("variants", "backend"), "servers serve one model", "evaluate each variant in an item of its own")
        if self.thinking_budget is not None:
            yield Fault(("thinking_budget", "backend"), "a server cannot close the reasoning", "set backend to hybrid")

    def _draft(self) -> Iterator[Fault]:
        if self.draft is None:
            for name in ("draft_layers", "draft_length"):
                if getattr(self, name) is not None:
                    yield Fault((name, "draft"), "nothing drafts", f"set draft to streaming, or remove {name}")
            return
        if self.backend != "hybrid":
            yield Fault(("draft", "backend"), "a server decodes in its own way", "remove draft, or set backend to hybrid")
        if self.draft == "hybrid" and self.draft_layers is not None:
            problem, fix = "the layers of the run's hybrid stream", "set draft to streaming, or remove draft_layers"
            yield Fault(("draft_layers", "draft"), problem, fix)


_BASE_ALONE: list[Variant] = [BASE]


class Sample(Eval):
    """Answers that are drawn to train on: settings as of an evaluation, of one model."""

    variants: list[Variant] | None = Field(default=_BASE_ALONE, min_length=1, max_length=1, json_schema_extra=formerly("of"))
    """The model that answers."""
    keep: Literal["shortest", "all"] = "shortest"
    """Which of the correct answers to a problem are kept."""
    min_tokens: Count = 1
    """Tokens of an answer, at least. Shorter ones are left out."""
    max_tokens: Count | None = None
    """Tokens of an answer, at most. Longer ones are left out."""
    token_budget: Count | None = None
    """Tokens of all kept answers together, at most. Problems with the shortest answers come first."""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            yield Fault(("max_tokens", "min_tokens"), "max_tokens is below min_tokens", "swap them")


class HeldoutLoss(EvalConfig):
    """Loss on the answers of the held-out samples."""

    benchmark: Literal["heldout_loss"]
    """What is measured."""


class HeldoutKL(EvalConfig):
    """KL(base || model) on the answers of the held-out samples: how far the hybrid's next tokens are from the base's."""

    benchmark: Literal["heldout_kl"]
    """What is measured."""

    def conflicts(self) -> Iterator[Fault]:
        if BASE in (self.variants or []):
            yield Fault(("variants",), "heldout_kl compares with the base, whose divergence from itself is 0", "remove base")
