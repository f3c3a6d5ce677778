"""A recipe: one YAML file with all settings of a run. This is its schema: strict, unknown names are errors.

The docstring under a setting is its documentation: docs/recipes.md is made from them. Relative paths count from the working
directory. part.py holds what the parts share, evaluations.py the parts that evaluate, checks.py the checks that span several parts.
"""

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ByteSize, Field, model_validator

from lt_train.recipe.columns import Columns
from lt_train.recipe.evaluations import CONVERTED, TRAINED, Eval, HeldoutKL, HeldoutLoss, Sample
from lt_train.recipe.faults import Fault, nearest_multiples
from lt_train.recipe.part import (
    ADDED,
    MAY_CHANGE,
    MOST,
    PATH,
    Bytes,
    Count,
    EachOnce,
    Fraction,
    Name,
    Natural,
    Part,
    Seed,
    Text,
    former_name,
    formerly,
    is_marked,
    parts_in,
    twice,
    value_fault,
)

Strategy = Literal["gates", "reach", "nll", "kl", "lazy_ratio", "periodic", "random"]
"""A way to rank layers by how little they lose by streaming."""


def converted_by(strategy: str) -> str:
    """Name of the untrained hybrid whose layers `strategy` chose for comparison."""
    return f"{CONVERTED}-by-{strategy}"


EVAL_LOSS = "eval_loss"
"""The held-out loss of a training, as a metric of train.keep_best."""

Precision = Literal["auto", "bf16", "fp32"]

HUB_REPOSITORY = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"


class RopeScaling(Part):
    """Scaling of the rotary embeddings, for contexts longer than the base was trained on. Names and meaning are transformers'."""

    rope_type: Literal["yarn", "linear"]
    """yarn: arXiv 2309.00071, as Qwen's model cards recommend. linear: positions are divided by `factor`."""
    factor: float = Field(gt=1, le=1000)
    """The context becomes this many times the original one."""
    original_max_position_embeddings: Count | None = None
    """Context of the base, in tokens. null: its config's max_position_embeddings."""


class Model(Part):
    """The full-attention model that becomes a hybrid, and how it computes."""

    base: Text = Field(json_schema_extra=PATH)
    """Hub id or local folder of the full-attention model."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id. null: main."""
    dtype: Precision = "auto"
    """Dtype of matrix products. auto: bf16 where the device computes in it, else fp32; a run resumes only on machines where it is
    the same."""
    attention: Literal["auto", "reference", "blocked", "flash"] = "auto"
    """Attention kernel. All kernels compute the same attention. auto: the fastest that works on the device; the log reports which
    one and why. flash: flash attention in bf16, of the flash-attn package if it is installed, else of torch. blocked: plain torch
    on any device. reference: slow, to compare with."""
    family: Literal["auto"] | None = Field(default=None, json_schema_extra=ADDED)
    """auto: a base of a family that docs/families.md does not list becomes a hybrid by its own classes of transformers, if a small
    model of its config proves before anything else runs that they stream. null: the families listed there."""
    trust_remote_code: bool = False
    """Run the Python code that a hub repository brings with its tokenizer or config."""
    rope_scaling: RopeScaling | None = Field(default=None, json_schema_extra=ADDED)
    """A longer context than the base's config gives; the export has it, too. null: as in the base's config."""

    def conflicts(self) -> Iterator[Fault]:
        if self.attention == "flash" and self.dtype == "fp32":
            yield Fault(("attention", "dtype"), "flash attention computes in bf16 only", "set dtype to bf16, or attention to auto")


class Calibration(Part):
    """The samples on which layers are scored."""

    source: Text | None = Field(default=None, json_schema_extra=ADDED | PATH)
    """Texts to score the layers on instead of training samples: a .txt file, or a folder of them. Every token of a text counts as
    one of an answer; a longer text is split into samples of max_length tokens. For long documents, without traces to train on."""
    samples: Count = 64
    """Number of samples, drawn by the recipe's seed."""
    max_length: Annotated[int, Field(ge=2, le=MOST)] | None = None
    """Tokens of a sample that are used, from its start. null: data.max_length."""
    w_last: Count = 64
    """Number of queries at the end of a sample over which lazy_ratio averages (LightTransfer, Eq. 1)."""
    long_reach_fraction: float = Field(default=0.1, gt=0, le=1, json_schema_extra=formerly("long_reach_share"))
    """Fraction of answer tokens that count as long-reach tokens: those whose loss rises most when every layer streams. Strategies
    reach and gates measure the loss on them."""
    sink_steps: Natural = Field(default=24, json_schema_extra=ADDED)
    """Optimizer steps of one sample each that fit learned sinks to the answers' loss before any training, all else frozen. 0: they
    start where the scores of the first tokens are."""
    sink_learning_rate: float = Field(default=0.1, gt=0, le=1, json_schema_extra=ADDED)
    """Learning rate of Adam in these steps."""


SCORED_W_SINK = 4
"""Sink tokens by which layers are scored for learned sinks: the paper's number."""


HOW_MANY = ("lazy_layer_ratio", "kv_budget", "max_rise")
"""Settings of `hybrid` that decide how many layers or KV heads stream."""

NAMED = ("layers", "streaming_kv_heads")
"""Settings of `hybrid` that name what streams."""


PER_PROMPT: Final = "per_prompt"
"""Value of `hybrid.select` with which each prompt chooses the layers that stream."""


class Hybrid(Part):
    """Which layers or KV heads stream, and what these see."""

    granularity: Literal["layer", "kv_head"] = Field(default="layer", json_schema_extra=ADDED | MAY_CHANGE)
    """What is chosen. layer: entire layers. kv_head: single KV heads with their query heads, by strategy gates. At an equal KV
    cache they lose less than layers where nearly all streams (87 %), hardly less at three quarters, and no less at half. It may
    change until the run is trained: scores by gates serve both."""
    lazy_layer_ratio: Fraction | None = None
    """Fraction of layers that stream, of those with full attention in the base; by kv_head of the KV heads of these layers. Set one
    of this, `kv_budget`, `max_rise`, `layers` and `streaming_kv_heads`."""
    kv_budget: Fraction | None = Field(default=None, json_schema_extra=ADDED)
    """KV cache of a sequence of 32,768 tokens, as a fraction of the base's, at most: as few layers or heads stream as this
    needs."""
    max_rise: Annotated[float, Field(gt=0)] | None = Field(default=None, json_schema_extra=ADDED)
    """Rise of the loss on long-reach tokens, in nats, that the scores predict without training, at most: as many layers or heads
    stream as stay below it. Strategy gates predicts it."""
    select: Literal["static", "per_prompt"] = Field(default="static", json_schema_extra=ADDED)
    """When the layers are chosen. static: once, by `strategy` or `layers`. per_prompt: by each prompt while the built-in engine
    reads it. Its least lazy layers stay full, and nothing is trained (LightTransfer-Test)."""
    strategy: Strategy | None = None
    """How the layers are chosen. gates: by each layer's share of the loss on long-reach tokens when every layer streams, from
    gradients. reach: by the loss on long-reach tokens when the layer alone streams. nll: by the loss on all answer tokens then.
    kl: by the divergence from the full model then. lazy_ratio: by where attention goes (the paper's score). periodic: evenly
    spaced. random: drawn by `seed`. Default: reach (gates for granularity kv_head), or null where what streams is named or
    prompts choose."""
    layers: Annotated[list[Natural], Field(min_length=1), EachOnce] | None = None
    """Indices of the layers that stream, from 0, instead of a choice by strategy."""
    streaming_kv_heads: Annotated[list[Annotated[list[Natural], EachOnce]], Field(min_length=1)] | None = Field(
        default=None, json_schema_extra=ADDED
    )
    """A list for each layer: the indices of its KV heads that stream, from 0, as in an export's config.json. Instead of a choice by
    strategy; granularity is then kv_head."""
    sink: Literal["tokens", "learned"] = Field(default="tokens", json_schema_extra=ADDED)
    """What a streaming layer has at the start of a sequence. tokens: the first w_sink tokens. learned: a logit for each query head
    in the softmax's denominator, as in gpt-oss: no tokens, and stock kernels know it, so the export of a Llama, Mistral, Qwen2,
    Seed-OSS or Granite base is a checkpoint of a stock class. The logits are fitted when the base is converted, and trained with
    everything else."""
    w_sink: Natural = 4
    """Number of first tokens of a sequence that a streaming layer always sees. 0 where sink is learned."""
    w_recent: Count = 1020
    """Number of most recent tokens that a streaming layer sees. The query itself counts."""
    compare: Annotated[list[Strategy], EachOnce] = Field(default=[], json_schema_extra=MAY_CHANGE)
    """Further strategies to score. Where converted is evaluated, the hybrid of each is evaluated too, untrained. They choose entire
    layers, by granularity kv_head as many as come nearest to its KV cache; gates in this list then compares layers with heads."""
    calibration: Calibration = Calibration()

    @property
    def scored_w_sink(self) -> int:
        """Sink tokens of the streaming layers that a strategy tries: before learned sinks are fitted, tokens take their place."""
        return SCORED_W_SINK if self.sink == "learned" else self.w_sink

    @model_validator(mode="before")
    @classmethod
    def _with_defaults_that_depend(cls, values: Any) -> Any:
        """A strategy where nothing that streams is named and no prompts choose; granularity kv_head where heads are named; no sink
        tokens where sinks are learned."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        if values.get("streaming_kv_heads") is not None:
            filled.setdefault("granularity", "kv_head")
        named = any(values.get(name) is not None for name in NAMED)
        if not named and values.get("strategy") is None and values.get("select") != PER_PROMPT:
            filled["strategy"] = "gates" if values.get("granularity") == "kv_head" else "reach"
        if values.get("sink") == "learned":
            filled.setdefault("w_sink", 0)
        return filled

    def conflicts(self) -> Iterator[Fault]:
        sized_by = [name for name in HOW_MANY if getattr(self, name) is not None]
        named = [name for name in NAMED if getattr(self, name) is not None]
        if not named and not sized_by:
            problem, fix = "neither is set, so no layer streams", "set lazy_layer_ratio (0.5 in the paper), or list the layers"
            yield Fault(("lazy_layer_ratio", "layers"), problem, fix)
        for names, each in ((sized_by, "each sets how many layers stream"), (named, "each names what streams")):
            if len(names) > 1:
                yield Fault(tuple(names), each, "set one of them, and the others to null")
        for by_hand in named[:1]:
            for name in (*sized_by, "strategy"):
                if getattr(self, name) is not None:
                    kind = "the layers that stream" if by_hand == "layers" else "the KV heads that stream"
                    yield Fault((by_hand, name), f"both choose {kind}", f"set {by_hand} or {name} to null")
        yield from self._granularity()
        if self.select == PER_PROMPT:
            for name in ("layers", "strategy", "kv_budget", "max_rise"):
                if getattr(self, name) is not None:
                    problem = "each prompt keeps as many layers full as lazy_layer_ratio leaves, by its own lazy ratios"
                    yield Fault(("select", name), problem, f"set {name} to null, or select to static")
            if self.sink == "learned":
                problem, fix = "learned sinks are fitted to layers that always stream", "set sink to tokens, or select to static"
                yield Fault(("select", "sink"), problem, fix)
        elif self.max_rise is not None and not named and self.strategy != "gates":
            yield Fault(("max_rise", "strategy"), f"{self.strategy} predicts no rise", "set strategy to gates, or lazy_layer_ratio")
        if self.sink == "learned" and self.w_sink:
            yield Fault(("sink", "w_sink"), "learned sinks take the place of tokens", "remove w_sink, or set sink to tokens")
        if self.w_recent == 1 and self.w_sink == 0:
            problem = "transformers caches every token of a window of one, so an export would generate others"
            yield Fault(("w_recent", "w_sink"), problem, "set w_recent to at least 2")
        for name in ("sink_steps", "sink_learning_rate"):
            if self.sink == "tokens" and getattr(self.calibration, name) != Calibration.model_fields[name].default:
                problem = "no sinks are fitted"
                yield Fault((f"calibration.{name}", "sink"), problem, f"set sink to learned, or remove {name}")
        if self.strategy in self.compare and self.granularity == "layer":
            problem = f"{self.strategy} is the strategy of this recipe; compare lists others"
            yield Fault(("compare", "strategy"), problem, f"remove {self.strategy} from compare")

    def _granularity(self) -> Iterator[Fault]:
        """Conflicts with the granularity."""
        if self.granularity == "layer":
            if self.streaming_kv_heads is not None:
                problem, fix = "single KV heads are named", "set granularity to kv_head, or streaming_kv_heads to null"
                yield Fault(("granularity", "streaming_kv_heads"), problem, fix)
            return
        if self.layers is not None:
            fix = "name them in streaming_kv_heads, or set granularity to layer"
            yield Fault(("granularity", "layers"), "layers are named, not KV heads", fix)
        if self.strategy not in (None, "gates"):
            fix = "set strategy to gates, or granularity to layer"
            yield Fault(("granularity", "strategy"), f"{self.strategy} scores entire layers, not KV heads", fix)
        if self.select == PER_PROMPT:
            fix = "set granularity to layer, or select to static"
            yield Fault(("granularity", "select"), "prompts choose entire layers", fix)
        if self.sink == "learned":
            fix = "set sink to tokens, or granularity to layer"
            yield Fault(("granularity", "sink"), "layers of which some KV heads stream have no learned sinks", fix)


FULL: Final = "full"
"""Stands for a strategy in a grid: full attention in every layer, with what a hybrid trains trained alike."""


class Grid(Part):
    """What `lt-train compare` measures side by side: every strategy at every ratio. Its options override this part, and nothing
    else reads it."""

    strategies: Annotated[list[Literal[Strategy, "per_prompt", "full"]], EachOnce] = Field(
        default=["reach", "lazy_ratio", "periodic", "random"], min_length=1
    )
    """How layers are chosen. per_prompt: by each prompt. full: full attention in every layer, trained alike."""
    ratios: Annotated[list[Fraction], EachOnce] = Field(default=[0.5, 0.75], min_length=1)
    """Fractions of layers that stream."""
    granularities: Annotated[list[Literal["layer", "kv_head"]], EachOnce] = Field(default=["layer"], min_length=1)
    """layer: by `strategies`. kv_head: by gates alone, as many KV heads as have the layers' KV cache."""
    trainings: Annotated[list[Literal["sft", "distilled"]], EachOnce] = Field(default=[])
    """How each hybrid is trained. sft: without train.distill. distilled: with it. []: once, as the recipe sets."""
    seeds: Annotated[list[Seed], EachOnce] = Field(default=[])
    """Seeds to repeat everything with, each in runs of its own. []: once, with the recipe's seed."""

    @property
    def by_head(self) -> bool:
        return "kv_head" in self.granularities

    @property
    def choosing(self) -> list[str]:
        """The strategies that choose layers, and those that leave the choice to prompts."""
        return [strategy for strategy in self.strategies if strategy != FULL]

    def conflicts(self) -> Iterator[Fault]:
        if FULL in self.strategies and not self.by_head and not {*self.choosing} - {PER_PROMPT}:
            yield Fault(("strategies",), f"{FULL}: no hybrid that it is trained as", "name a strategy beside it, such as reach")


class Data(Part):
    """The traces to train on."""

    source: Text | None = Field(default=None, json_schema_extra=PATH)
    """Hub id; local .jsonl, .ndjson, .json, .csv, .tsv (all of these also with .gz), .parquet or .arrow file; folder of such files;
    or folder of save_to_disk. null: no traces, for a recipe that trains nothing and scores no layers, or scores them on texts
    (hybrid.calibration.source)."""
    split: Text = "train"
    """Split of a hub data set, or of a folder with files such as train.jsonl and test.jsonl."""
    subset: Text | None = None
    """Subset (configuration) of a hub data set or a downloaded one that has several."""
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "prompt_response", "alpaca", "still"] = "auto"
    """Fields of a row. messages: messages, a list of {role, content} that ends with an answer. sharegpt: conversations, a list of
    {from, value}. prompt_completion: prompt, completion, each text or a list of messages (TRL). prompt_response: prompt, response.
    alpaca: instruction, input, output. still: question, combined_text. auto: as the first row shows; the run reports which."""
    columns: Columns | None = Field(default=None, json_schema_extra=ADDED)
    """The fields of a row that has others, instead of a format."""
    reasoning_tags: Literal["convert", "keep"] | None = Field(default=None, json_schema_extra=ADDED)
    """What happens to answers whose reasoning is not enclosed as the base encloses it. null: an error that counts them. convert:
    their tags become the base's. keep: they are trained on as they are."""
    reasoning_tag_pair: Annotated[list[Text], Field(min_length=2, max_length=2), EachOnce] | None = Field(
        default=None, json_schema_extra=ADDED
    )
    """[opening, closing]: tags of the data that are none of the usual ones; or the tags of a base that shows none in its chat
    template and tokenizer."""
    faulty: Literal["error", "drop"] = Field(default="error", json_schema_extra=ADDED)
    """What happens where rows cannot be trained on. They are counted by kind, with their first places."""
    max_length: int = Field(ge=2, le=MOST)
    """Tokens of the longest sample, prompt and answer together."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer samples. truncate removes the end, and with it the token that teaches the model to stop."""
    packing: bool = False
    """Put several samples into one row of max_length tokens. They do not see each other."""
    heldout: Natural = 0
    """Number of samples held out for the evaluation loss. None of their questions is trained on."""
    limit: Count | None = None
    """Number of rows to read, from the first. null: all."""

    @property
    def traces(self) -> str:
        """The source of a recipe that has one."""
        assert self.source is not None, "checks.py refuses what needs traces without a source"
        return self.source

    def conflicts(self) -> Iterator[Fault]:
        if self.columns is not None and self.format != "auto":
            yield Fault(("format", "columns"), "both name the fields of a row", "remove one of them")
        if self.limit is not None and self.heldout >= self.limit:
            problem = f"{self.heldout} of {self.limit} rows are held out, so none is left to train on"
            yield Fault(("heldout", "limit"), problem, "lower heldout, or raise limit")


class Distill(Part):
    """Distillation from the base model, with full attention in every layer. The loss of an answer token is
    (1 - weight) x SFT + weight x (temperature² x KL(teacher || student) + hidden_weight x hidden states)."""

    weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the teacher. 0: SFT alone, without a teacher. 1: the teacher alone."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature of both distributions. Its square keeps the size of the gradients (arXiv 1503.02531)."""
    hidden_weight: float = Field(default=0.0, ge=0, le=1e6)
    """Weight of the squared difference between the outputs of streaming layers and the teacher's, relative to the teacher's
    square."""
    teacher: Literal["auto", "copy", "top_k"] = "auto"
    """auto: with LoRA the model itself, its adapters off; with method full a frozen copy. copy: a frozen copy in memory. top_k:
    log-probabilities that `lt-train teacher` writes before training, so that training holds no second model."""
    top_k: Count = 64
    """Number of tokens that teacher top_k keeps for each answer token; 8 bytes on disk for each. All others count as one more."""

    def conflicts(self) -> Iterator[Fault]:
        if self.weight > 0 and self.teacher == "top_k" and self.hidden_weight > 0:
            problem, fix = "files of teacher top_k hold no hidden states", "set hidden_weight to 0, or teacher to auto"
            yield Fault(("hidden_weight", "teacher"), problem, fix)
        for name, field in type(self).model_fields.items():
            if self.weight == 0 and getattr(self, name) != field.default:
                yield Fault((name, "weight"), f"weight is 0, so {name} has no effect", f"set weight above 0, or remove {name}")


def _device(name: str) -> str:
    if not re.fullmatch(r"same|cpu|cuda:\d+(,\d+)*", name):
        raise value_fault("not a device", "use same, cpu, or GPUs such as cuda:7 or cuda:6,7")
    return name


class Probes(Part):
    """Evaluations of checkpoints during training, in a process beside it. Each gives a curve and a table."""

    steps: Count
    """Optimizer steps between two probes. A checkpoint is saved at each. The checkpoint after the last step is probed, too.
    Training waits where the previous probe has not ended."""
    evals: list[Eval] = Field(min_length=1)
    """Evaluations as in `eval`, without `variants`. Keep them small: needle, copying, or a few problems with `limit`."""
    device: Annotated[Text, AfterValidator(_device)] = "same"
    """Where the probe runs. same: the GPU of the main process, beside the training; what is free there must hold the model and the
    KV cache (set kv_budget). cuda:7 or cuda:6,7: GPUs that the training leaves free, by the machine's numbers. cpu."""

    def conflicts(self) -> Iterator[Fault]:
        yield from twice("evals", [probe.name for probe in self.evals])
        for at, probe in enumerate(self.evals):
            here = f"evals.{at}"
            if probe.name == EVAL_LOSS:
                yield Fault((f"{here}.name",), f"{EVAL_LOSS} is the name of the held-out loss", "give the probe another name")
            if probe.variants is not None:
                yield Fault((f"{here}.variants",), "a probe evaluates the checkpoint of a training", "remove it")
            if probe.backend != "hybrid":
                yield Fault((f"{here}.backend",), "no server holds the checkpoint of a training", "remove it")


class Train(Part):
    """The training of the hybrid."""

    method: Literal["lora", "full"]
    """lora: train adapters (part `lora`). full: train the weights themselves."""
    parameters: Literal["all", "lazy_projections"] = "all"
    """What method full trains. lazy_projections: the q, k, v and o projections of the streaming layers alone."""
    restore_query_key: bool = Field(default=False, json_schema_extra=MAY_CHANGE)
    """After training, give W_Q and W_K of the full-attention layers the base's values again (arXiv 2606.11052). Training on long
    reasoning damages recall there."""
    learning_rate: float = Field(gt=0, le=1)
    """Peak learning rate."""
    sink_learning_rate: float | None = Field(default=None, gt=0, le=1, json_schema_extra=ADDED)
    """Peak learning rate of learned sinks (hybrid.sink): a few hundred logits, which move further than weights. null: 0.003."""
    epochs: float | None = Field(default=None, gt=0, le=MOST)
    """Passes over the data. Set either this or `max_steps`."""
    max_steps: Count | None = None
    """Optimizer steps. Set either this or `epochs`."""
    batch_size: Count | None = None
    """Samples (with packing: rows) per optimizer step, over all processes. Set either this or `batch_tokens`."""
    batch_tokens: Count | None = None
    """Tokens per optimizer step, over all processes, in rows of data.max_length tokens. It needs data.packing."""
    micro_batch_size: Count = Field(default=1, json_schema_extra=MAY_CHANGE)
    """Samples (with packing: rows) in one forward pass of one process. Gradient accumulation follows from it."""
    lr_scheduler: Text = "cosine"
    """Learning rate schedule, by its name in transformers."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the optimizer steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=MOST)
    """Norm to which larger gradients are scaled down. 0: never."""
    gradient_checkpointing: bool = Field(default=False, json_schema_extra=MAY_CHANGE)
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    save_steps: Count = Field(default=100, json_schema_extra=MAY_CHANGE)
    """Optimizer steps between two checkpoints."""
    eval_steps: Count | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """Optimizer steps between two evaluations of the held-out loss. null: only after the last step."""
    logging_steps: Count = Field(default=1, json_schema_extra=MAY_CHANGE)
    """Optimizer steps between two lines of the training log."""
    keep_checkpoints: Count = Field(default=2, json_schema_extra=MAY_CHANGE)
    """Number of checkpoints to keep, the newest ones. Each holds weights and optimizer states."""
    probes: Probes | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """Evaluations of checkpoints during training. null: none."""
    keep_best: Text | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """Metric whose best weights are kept in train/best-<step>/: eval_loss, measured at every checkpoint, or the name of a probe.
    null: none are kept."""
    final_weights: Literal["last", "best"] = Field(default="last", json_schema_extra=MAY_CHANGE | formerly("publish"))
    """The weights of the trained model, which is evaluated and exported. last: those after the last step. best: those of
    keep_best."""
    sequence_parallel: Count = 1
    """Number of processes that share each sequence (Ulysses), for samples too long for one device. It divides the number of
    attention heads."""
    deepspeed: Text | None = Field(default=None, json_schema_extra=MAY_CHANGE | PATH)
    """Path of a DeepSpeed configuration, such as launch/zero3.json. null: no DeepSpeed."""
    distill: Distill = Distill()
    trl: dict[str, Any] = Field(default={})
    """Further arguments of TRL's SFTConfig, by their own names."""

    def conflicts(self) -> Iterator[Fault]:
        yield from self._length_and_batch()
        if self.sequence_parallel > 1:
            yield from self._sequence_parallel()
        if self.parameters == "lazy_projections" and self.method == "lora":
            problem = "with LoRA, lora.layers and lora.targets choose what is trained"
            yield Fault(("parameters", "method"), problem, "remove parameters, or set method to full")
        elif self.parameters == "lazy_projections" and self.restore_query_key:
            problem = "the full-attention layers are not trained, so nothing is restored"
            yield Fault(("restore_query_key", "parameters"), problem, "set restore_query_key to false, or parameters to all")
        if self.distill.weight > 0 and self.trl.get("label_smoothing_factor"):
            problem = "the teacher's distribution is soft already"
            yield Fault(("distill.weight", "trl.label_smoothing_factor"), problem, "remove label_smoothing_factor")
        if self.final_weights == "best" and self.keep_best is None:
            problem, fix = "no metric defines the best weights", f"set keep_best to {EVAL_LOSS} or to the name of a probe"
            yield Fault(("final_weights", "keep_best"), problem, fix)
        measured = [EVAL_LOSS, *(probe.name or "" for probe in (self.probes.evals if self.probes else []))]
        if self.keep_best is not None and self.keep_best not in measured:
            problem, fix = f"{self.keep_best!r} is not measured", f"use one of {', '.join(measured)}"
            yield Fault(("keep_best", "probes.evals"), problem, fix)

    def _length_and_batch(self) -> Iterator[Fault]:
        for one, other in (("epochs", "max_steps"), ("batch_size", "batch_tokens")):
            given = [getattr(self, name) is not None for name in (one, other)]
            if not any(given):
                yield Fault((one, other), "neither is set", "set one of them")
            elif all(given):
                yield Fault((one, other), "both are set", "keep one and set the other to null")
        if self.batch_size is not None and self.batch_tokens is None and self.batch_size % self.micro_batch_size:
            problem = f"{self.batch_size} is not a multiple of {self.micro_batch_size}"
            fix = f"set batch_size to {nearest_multiples(self.batch_size, self.micro_batch_size)}"
            yield Fault(("batch_size", "micro_batch_size"), problem, fix)

    def _sequence_parallel(self) -> Iterator[Fault]:
        if self.deepspeed is None:
            fix = "name a configuration, such as launch/zero3.json"
            yield Fault(("sequence_parallel", "deepspeed"), "sequence parallelism runs under DeepSpeed alone", fix)
        if self.micro_batch_size > 1:
            fix = f"set micro_batch_size to 1 instead of {self.micro_batch_size}"
            yield Fault(("sequence_parallel", "micro_batch_size"), "processes that share sequences take one row at a time", fix)
        if self.distill.weight > 0:
            fix = "set sequence_parallel to 1, or distill.weight to 0"
            yield Fault(("sequence_parallel", "distill.weight"), "a teacher reads complete sequences, not slices", fix)
        if "pad_to_multiple_of" in self.trl:
            problem = "rows are padded to slices of equal length already"
            yield Fault(("sequence_parallel", "trl.pad_to_multiple_of"), problem, "remove pad_to_multiple_of")


class Lora(Part):
    """LoRA adapters, for train.method: lora."""

    rank: Count = 16
    """Rank of the adapters."""
    alpha: Count = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    targets: Annotated[list[Text], Field(min_length=1), EachOnce] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"])
    """Names of the linear modules that get an adapter."""
    layers: Literal["lazy", "all"] = "lazy"
    """Layers that get adapters. lazy: the streaming layers alone."""
    peft: dict[str, Any] = Field(default={})
    """Further arguments of PEFT's LoraConfig, by their own names."""


def _with_question(text: str) -> str:
    if "{question}" not in text:
        raise value_fault("no place for the question", "write {question} where it goes")
    return text


class Prompt(Part):
    """The prompt of a question, the same in training and evaluation. Where a chat template writes today's date, as Llama
    3.2's and SmolLM3's do, it is 26 July 2024 every day."""

    system: Text | None = None
    """System turn. null: none, not even the one that a chat template inserts by default."""
    user: Annotated[Text, AfterValidator(_with_question)] = "{question}"
    """User turn. {question} is replaced; all other braces stay as they are."""
    chat_template: Text | None = Field(default=None, json_schema_extra=PATH)
    """Path of a Jinja file to use instead of the tokenizer's chat template. Its default system turn is left out only where that
    is by itself before the first user turn."""
    stop_token: Text | None = Field(default=None, json_schema_extra=ADDED)
    """Token that ends an answer, in training, evaluation and export, for a base whose eos token is not the one that ends a turn in
    the chat template. null: the tokenizer's eos token and those of generation_config.json."""


class Track(Part):
    """Where curves, pictures and tables are logged, besides the run folder: in as many trackers as are named."""

    wandb: Literal["online", "offline", "off"] = "off"
    """Mode of Weights & Biases. offline: upload later with `wandb sync`."""
    tensorboard: bool = Field(default=False, json_schema_extra=ADDED)
    """Write event files to runs/<name>/tensorboard, which `tensorboard --logdir runs` shows (extra: tensorboard)."""
    trackio: bool = Field(default=False, json_schema_extra=ADDED)
    """Write to trackio's database on this machine, which `trackio show` shows (extra: trackio)."""
    project: Text = "lt-train"
    """Project of Weights & Biases and of trackio."""

    @model_validator(mode="before")
    @classmethod
    def _bare_off_is_the_word(cls, values: Any) -> Any:
        """YAML 1.1 reads a bare `off` as false."""
        return {**values, "wandb": "off"} if isinstance(values, dict) and values.get("wandb") is False else values


class Export(Part):
    """The exported checkpoint."""

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Dtype of the exported weights. auto: the base's own."""
    max_shard_size: Bytes = Field(default=ByteSize(5 * 10**9), json_schema_extra=ADDED)
    """Size of the largest file of weights; one is in memory at a time."""
    push: Annotated[str, Field(pattern=HUB_REPOSITORY, max_length=96)] | None = Field(default=None, json_schema_extra=ADDED)
    """Repository owner/name of the Hugging Face hub to which the checked export is uploaded. It is made, private, if it does not
    exist. The token comes from the environment alone, as HF_TOKEN. null: the export stays here."""


Evaluation = Eval | HeldoutLoss | HeldoutKL


class Recipe(Part):
    """A run: from a base model to an evaluated, exported hybrid."""

    name: Name
    """Name of the run. Its folder is runs/<name>/."""
    seed: Seed = 0
    """Seed of everything that is drawn."""
    model: Model
    hybrid: Hybrid
    data: Data
    train: Train | None = None
    """null: no training; the hybrid is evaluated and exported as converted."""
    lora: Lora | None = None
    """Only with train.method: lora, where its defaults hold if it is not set."""
    prompt: Prompt = Prompt()
    eval: list[Annotated[Evaluation, Field(discriminator="benchmark")]] = Field(default=[], json_schema_extra=MAY_CHANGE)
    """Evaluations. Each names a benchmark, heldout_loss or heldout_kl, and has the settings of that kind."""
    sample: Sample | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """Answers that `lt-train sample` draws as training data for another recipe."""
    track: Track = Field(default=Track(), json_schema_extra=MAY_CHANGE)
    export: Export = Field(default=Export(), json_schema_extra=MAY_CHANGE)
    grid: Grid | None = Field(default=None, json_schema_extra=ADDED | MAY_CHANGE)
    """null: the defaults of this part."""

    @model_validator(mode="before")
    @classmethod
    def _with_defaults_that_depend(cls, values: Any) -> Any:
        """A lora part where the method is lora, and the models that each evaluation measures."""
        if not isinstance(values, dict):
            return values
        train, evaluations = values.get("train"), values.get("eval")
        filled = dict(values)
        if isinstance(train, dict) and train.get("method") == "lora" and values.get("lora") is None:
            filled["lora"] = {}
        if isinstance(evaluations, list):
            default = [CONVERTED if train is None else TRAINED]
            filled["eval"] = [
                {**item, "variants": default} if isinstance(item, dict) and item.get("variants") is None else item
                for item in evaluations
            ]
        return filled

    def conflicts(self) -> Iterator[Fault]:
        yield from twice("eval", [evaluation.name for evaluation in self.eval])
        if (
            self.grid is not None
            and "distilled" in self.grid.trainings
            and self.train is not None
            and self.train.distill.weight == 0
        ):
            problem = "distilled: the weight of the teacher is 0, so nothing is distilled"
            yield Fault(("grid.trainings", "train.distill.weight"), problem, "set the weight above 0, or remove distilled")


def settings_that_may_change(part: type[Part] = Recipe, above: str = "") -> frozenset[str]:
    """Dotted paths of the settings, or of the parts, that may change in a begun run."""
    found: set[str] = set()
    for name, field in part.model_fields.items():
        if is_marked(field, MAY_CHANGE):
            found.add(f"{above}{name}")
        else:
            for inner in parts_in(field.annotation):
                found |= settings_that_may_change(inner, f"{above}{name}.")
    return frozenset(found)


def identity_of(part: Part, without: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a part for a fingerprint, which runs of before must keep: by their former names, and without those that were
    added to lt_train later, where they are at their defaults.

    Args:
        without: settings of this part to leave out, by their names of today.
    """
    settings = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if name not in without and not (is_marked(field, ADDED) and value == field.get_default(call_default_factory=True)):
            settings[former_name(field) or name] = _identity_of_value(value)
    return settings


def _identity_of_value(value: Any) -> Any:
    if isinstance(value, Part):
        return identity_of(value)
    return [_identity_of_value(item) for item in value] if isinstance(value, list) else value
