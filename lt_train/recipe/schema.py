"""A recipe: one YAML file that says everything about a run. This is its schema: strict, unknown names are errors.

Relative paths count from the working directory. loading.py reads a recipe, checks.py holds the checks that span several parts.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from lt_train.benchmarks import BENCHMARKS

Strategy = Literal["reach", "nll", "lazy_ratio", "periodic"]
"""A way to rank layers by how little they lose by streaming."""

BASE, CONVERTED, TRAINED = "base", "converted", "trained"
Variant = Literal["base", "converted", "trained"]
"""What an evaluation looks at: the base model, the hybrid before training, the hybrid after training."""


def converted_by(strategy: str) -> str:
    """Name of the untrained hybrid whose layers `strategy` chose for comparison."""
    return f"{CONVERTED}-by-{strategy}"


EVAL_LOSS = "eval_loss"
"""The held-out loss of a training, as a metric of train.keep_best."""

HELDOUT = ("heldout_loss", "heldout_kl")
"""Evaluations that ask for no answers."""

Precision = Literal["auto", "bf16", "fp32"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class AddedLater:
    """Marks a setting that older run folders lack: at its default it is not part of a recipe's fingerprints."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            field = type(self).model_fields[name or ""]
            if value != field.default or not any(isinstance(mark, AddedLater) for mark in field.metadata):
                yield name, value


class Model(Part):
    base: Text
    """Hub id or local folder of the full-attention model."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Precision = "auto"
    """auto: bf16 where the device computes in it, else fp32."""
    attention: Literal["auto", "reference", "blocked", "flex", "flash"] = "auto"
    """What computes attention; all ways give the same numbers. auto: the fastest that works here, the log says which and why.
    flash: flash attention in bf16, of the flash-attn package if it is installed, else of torch. flex: FlexAttention, compiled for a
    GPU. blocked: plain torch, on any device. reference: slow, to compare with."""
    trust_remote_code: bool = False


class Calibration(Part):
    samples: int = Field(64, ge=1)
    max_length: int | None = Field(None, ge=2)
    """Tokens of a sample that are looked at; null: data.max_length."""
    w_last: int = Field(64, ge=1)
    """Queries at the end of a sample over which lazy_ratio averages (paper, Eq. 1)."""
    long_reach_share: float = Field(0.1, gt=0, le=1)
    """Share of answer tokens, those whose loss rises most when every layer streams, over which reach measures."""


class Hybrid(Part):
    lazy_layer_ratio: Share | None = None
    """Share of layers that stream. Either this or `layers`."""
    strategy: Strategy | None = None
    """How the layers are chosen; reach unless `layers` is given."""
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    """The layers that stream, by index from 0, instead of a choice."""
    w_sink: int = Field(4, ge=0)
    """First tokens of a sequence that a streaming layer always sees."""
    w_recent: int = Field(1020, ge=1)
    """Most recent tokens that a streaming layer sees, the query itself included."""
    compare: list[Strategy] = []
    """Further strategies to score, and to evaluate untrained beside the chosen one."""
    calibration: Calibration = Calibration()

    @model_validator(mode="before")
    @classmethod
    def _strategy_unless_layers(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("layers") is None and values.get("strategy") is None:
            return {**values, "strategy": "reach"}
        return values


class Data(Part):
    source: Text
    """Hub id, local .jsonl, .json or .parquet file, or a folder of them."""
    split: Text = "train"
    """Which split of a hub data set, or of a folder with files such as train.jsonl and test.jsonl."""
    subset: Text | None = None
    """Which subset (configuration) of a hub data set, where it has several."""
    format: Literal["still", "messages", "prompt_response"]
    """Fields of a row. still: question, combined_text. prompt_response: prompt, response. messages: messages, a list of
    {role, content} that ends with an answer."""
    max_length: int = Field(ge=2)
    """Tokens of the longest sample, prompt and answer together."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What becomes of longer samples. truncate cuts the end, and with it the token that would teach to stop."""
    packing: bool = False
    """Several samples in one row of max_length tokens; they do not see each other."""
    heldout: int = Field(0, ge=0)
    """Samples set aside for the evaluation loss; none of their questions is trained on."""
    limit: int | None = Field(None, ge=1)
    """Read only the first rows."""


class Distill(Part):
    """Learning from the model's own past self, the base with full attention in every layer. The loss of an answer token is
    (1 - weight) x SFT + weight x (temperature² x KL(teacher || student) + hidden_weight x hidden states)."""

    weight: float = Field(0.0, ge=0, le=1)
    """0: no teacher is asked. 1: nothing is learned from the data's own tokens."""
    temperature: float = Field(1.0, gt=0)
    """Both distributions are softened by it; the square keeps the size of the gradients (arXiv 1503.02531)."""
    hidden_weight: float = Field(0.0, ge=0)
    """Of the squared difference between the outputs of streaming layers and the teacher's, relative to the teacher's square."""
    teacher: Literal["auto", "copy", "top_k"] = "auto"
    """auto: with LoRA the model itself, adapters off; with method full a frozen copy. copy: a frozen copy in memory.
    top_k: log-probabilities written before training (lt-train teacher), so training holds no second model."""
    top_k: int = Field(64, ge=1)
    """Tokens kept for each answer token by teacher top_k; all others count together as one more. 8 bytes on disk for each."""


FREE_IN_TRAINING = frozenset({"logging_steps", "save_steps", "eval_steps", "keep_checkpoints", "probes"})
"""Settings of `train` that shape no weights, so that they may change in a begun run."""


class Train(Part):
    method: Literal["lora", "full"]
    parameters: Literal["all", "lazy_projections"] = "all"
    """What method full trains. lazy_projections: q, k, v and o of the streaming layers alone; all else stays the base's."""
    restore_query_key: bool = False
    """After training, what makes queries and keys in the full-attention layers is the base's again (arXiv 2606.11052):
    long-thought training damages recall there."""
    learning_rate: float = Field(gt=0)
    epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps. Either this or `epochs`."""
    batch_size: int | None = Field(None, ge=1)
    """Samples (packs, when packing) per optimizer step, over all processes. Either this or `batch_tokens`."""
    batch_tokens: int | None = Field(None, ge=1)
    """Tokens per optimizer step, over all processes: packs of data.max_length tokens, so it needs data.packing."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples (packs) in one forward pass of one process. Each process runs batch / (this x processes) of them a step."""
    lr_scheduler: Text = "cosine"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0: never."""
    gradient_checkpointing: bool = False
    save_steps: int = Field(100, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    """Steps between evaluation losses on the held-out samples; null: only at the end."""
    logging_steps: int = Field(1, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    """Of the newest ones. Each holds the weights and the optimizer's states."""
    probes: "Probes | None" = None
    keep_best: Text | None = None
    """Metric whose best weights are kept besides, in train/best-<step>/: eval_loss, measured at every checkpoint, or the name of
    a probe. null: none are."""
    publish: Literal["last", "best"] = "last"
    """Which weights are the trained model, to be evaluated and exported: those after the last step, or those of keep_best."""
    sequence_parallel: int = Field(1, ge=1)
    """So many processes share each sequence (Ulysses), for samples too long for one device; 1: none. Divides the model's heads."""
    deepspeed: Text | None = None
    """Path of a DeepSpeed configuration."""
    distill: Distill = Distill()
    trl: dict[str, Any] = {}
    """Further arguments of TRL's SFTConfig, by their own names."""


class Lora(Part):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[Text] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)
    layers: Literal["lazy", "all"] = "lazy"
    """lazy: adapters in the streaming layers alone."""
    peft: dict[str, Any] = {}
    """Further arguments of PEFT's LoraConfig, by their own names."""


class Prompt(Part):
    system: Text | None = None
    """System turn; null: none, not even the one that a chat template would put in by itself."""
    user: Text = "{question}"
    """User turn; {question} is replaced, all other braces stay as they are."""
    chat_template: Text | None = None
    """Path of a Jinja file to use instead of the tokenizer's chat template. Of a default system turn in it only such is
    left out as stands by itself before the first user turn."""


class _EvalEntry(Part):
    batch_size: int = Field(16, ge=1)
    limit: int | None = Field(None, ge=1)
    """Only the first problems (held-out samples)."""
    of: list[Variant] | None = Field(None, min_length=1)
    """What is evaluated. load_recipe fills it in: [trained], or [converted] in a recipe without training."""
    name: Name | None = None
    """Folder of the results, unique in a recipe. Filled in with the benchmark's name."""

    @model_validator(mode="before")
    @classmethod
    def _named_as_its_benchmark(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") is None and isinstance(values.get("benchmark"), str):
            return {**values, "name": values["benchmark"]}
        return values


class Recall(Part):
    """What problems of needle, passkey and copying are made: `repeats` of them for each length and depth."""

    lengths: list[Annotated[int, Field(ge=1)]] = Field([2048, 4096, 8192], min_length=1)
    """Tokens of the user's turn, in the model's own tokenizer."""
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Where what must be found stands, as shares of the text before it."""
    repeats: int = Field(2, ge=1)
    keys: int = Field(1, ge=1, le=64)
    """needle: numbers hidden in the text, of which one is asked for."""
    span: int = Field(128, ge=1)
    """copying: tokens to copy."""


class Eval(_EvalEntry):
    """Problems solved by generation and graded."""

    benchmark: Literal[tuple(BENCHMARKS)]
    batch_size: int = Field(64, ge=1)
    """Sequences at a time, at most; `kv_budget` may hold fewer."""
    path: Text | None = None
    """Local file or hub id instead of the benchmark's own source; of a generated benchmark a folder of texts to hide things in."""
    samples: int = Field(1, ge=1)
    """Answers drawn for each problem."""
    temperature: float = Field(0.0, ge=0)
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """Keep so many most likely tokens; 0: all."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Keep tokens at least so likely as this share of the likeliest; 0: all."""
    repetition_penalty: float = Field(1.0, gt=0)
    """1: off."""
    stop: list[Text] = []
    """Strings that end an answer, besides the model's own stop tokens."""
    max_new_tokens: int | None = Field(None, ge=1)
    """null: the benchmark's own limit, where it has one."""
    max_prompt_tokens: int | None = Field(None, ge=2)
    """LongBench's texts are cut to it and lose their middle; null: what the model's context leaves."""
    truncated: Annotated[Literal["incorrect", "graded"], AddedLater()] = "incorrect"
    """How an answer to maths or multiple choice counts that reaches max_new_tokens. incorrect: whatever it says. graded: by its
    text, as in most other harnesses; compare with their scores only so. Both accuracies stand in scores.json and in the report."""
    instruction: Annotated[str | None, AddedLater()] = None
    """What follows each question. null: the benchmark's own, such as to box the answer, where prompt.user is the bare question. "":
    nothing."""
    thinking_budget: int | None = Field(None, ge=1)
    """Tokens after which a thought that goes on is closed with `thinking_close`."""
    thinking_close: Text = "\n</think>\n\n"
    recall: Recall | None = None
    """Of needle, passkey and copying."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """null: the recipe's seed."""
    backend: Literal["hybrid", "openai"] = "hybrid"
    """hybrid: the built-in engine. openai: servers with an OpenAI-compatible API that serve the exported checkpoint."""
    servers: list[Text] = []
    """Addresses such as http://localhost:8000; all serve the same model."""
    served_model: Text | None = None
    """The name under which it is served; null: the only one there."""
    concurrency: int = Field(64, ge=1)
    """Requests in flight at each server."""
    timeout: float = Field(7200, gt=0)
    """Seconds for one answer of a server."""
    stall: float = Field(600, gt=0)
    """Seconds without a further token, once an answer has begun."""
    kv_budget: ByteSize | None = None
    """Memory for the KV cache, such as 8GiB; null: most of what is free. Sequences that do not fit wait."""
    prefill_chunk: int = Field(2048, ge=1)
    """Prompt tokens in one forward pass."""
    allow_partial: bool = False
    """Score what there is when samples are missing, and mark the score as partial."""


class Probes(Part):
    """What is asked of a checkpoint while training goes on, by a process of its own; a curve and a table for each entry."""

    steps: int = Field(ge=1)
    """Optimizer steps between probes. A checkpoint is saved at each; the one after the last step is probed, too. When a probe is
    due before the former one ended, training waits for it."""
    evals: list[Eval] = Field(min_length=1)
    """Entries as of `eval`, without `of`. Keep them small: needle, copying, a few problems with `limit`."""
    device: Text = "same"
    """same: the main process's own GPU, beside the training: what is free there must hold the model and the KV cache (set
    kv_budget). cuda:7 or cuda:6,7: GPUs that the training leaves free, by the machine's numbers. cpu."""


Train.model_rebuild()


class Sample(Eval):
    """Answers drawn to train on: settings as of an evaluation, of one variant."""

    of: list[Variant] = Field(["base"], min_length=1, max_length=1)
    keep: Literal["shortest", "all"] = "shortest"
    """Of the right answers to a problem."""
    min_tokens: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    """Longer answers are left out."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens of all kept answers together, at most; problems with the shortest answers come first."""


class HeldoutLoss(_EvalEntry):
    """Loss on the answers of the held-out samples."""

    benchmark: Literal["heldout_loss"]


class HeldoutKL(_EvalEntry):
    """KL(base || model) on the answers of the held-out samples: how far the hybrid's next tokens are from the base's."""

    benchmark: Literal["heldout_kl"]


class Track(Part):
    wandb: Literal["online", "offline", "off"] = "off"
    project: Text = "lt-train"

    @model_validator(mode="before")
    @classmethod
    def _bare_off_is_the_word(cls, values: Any) -> Any:
        """YAML 1.1 reads a bare `off` as false."""
        return {**values, "wandb": "off"} if isinstance(values, dict) and values.get("wandb") is False else values


class Export(Part):
    dtype: Precision = "auto"
    """auto: the base's own."""


class Recipe(Part):
    name: Name
    """The run lies in runs/<name>/."""
    seed: int = Field(0, ge=0, lt=2**32)
    model: Model
    hybrid: Hybrid
    data: Data
    train: Train | None = None
    """Absent: a training-free hybrid."""
    lora: Lora | None = None
    """Only with train.method lora; filled in with the defaults there."""
    prompt: Prompt = Prompt()
    eval: list[Annotated[Eval | HeldoutLoss | HeldoutKL, Field(discriminator="benchmark")]] = []
    sample: Sample | None = None
    """What `lt-train sample` draws, to be trained on by another recipe."""
    track: Track = Track()
    export: Export = Export()
