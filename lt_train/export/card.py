"""The model card: README.md with the front matter that the Hugging Face hub reads."""

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from lt_train.export.granite_swa import is_granite_swa
from lt_train.export.metadata import ExportMetadata, ReportedScore
from lt_train.export.verify import Check
from lt_train.hybrid.configuration import HybridConfig
from lt_train.hybrid.kv_size import KV_TOKENS, kv_bytes
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.servers.vllm_capacity import BLOCK, VllmCache, with_one_more_or_fewer
from lt_train.runtime.devices import dtype_name
from lt_train.runtime.units import format_bytes
from lt_train.vllm_plugin.checks import is_served
from lt_train.vllm_plugin.command import CHUNK


def model_card(metadata: ExportMetadata, config: HybridConfig, dtype: torch.dtype, check: Check | str, *, own_code: bool) -> str:
    """All of README.md. It follows from its arguments alone.

    Args:
        check: its result, or why there was none.
    """
    sections = [
        _title(metadata, config),
        _layers(metadata, config),
        _how_to_load(config, own_code),
        _kv_cache(config, dtype),
        *_prompts(metadata),
        _data(metadata),
        _training(metadata),
        _scores(metadata.scores),
        _limits(config, own_code),
        _check(check),
        _versions(metadata, config),
    ]
    header = yaml.safe_dump(front_matter(metadata, own_code=own_code), sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(metadata: ExportMetadata, *, own_code: bool) -> dict[str, Any]:
    """Front matter. Names only what exists on the hub; the licence is the base's, which is not known here."""
    found: dict[str, Any] = {}
    if is_hub_id(metadata.base):
        found["base_model"] = metadata.base
        if metadata.training is not None:
            found["base_model_relation"] = "finetune"
    if metadata.data is not None and is_hub_id(metadata.data):
        found["datasets"] = [metadata.data]
    tags = ["lt-train", "hybrid-attention", "streaming-attention", *(["custom_code"] if own_code else [])]
    return found | {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}


def is_hub_id(name: str) -> bool:
    """Whether a name that a recipe gives to a model or data set is one of the hub's, and no local file or folder."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _title(metadata: ExportMetadata, config: HybridConfig) -> str:
    spec = config.spec
    base = (
        f"[{metadata.base}](https://huggingface.co/{metadata.base})"
        if is_hub_id(metadata.base)
        else f"`{Path(metadata.base).name}`"
    )
    revision = f" (revision `{metadata.base_revision}`)" if metadata.base_revision else ""
    trained = "fine-tuned as such" if metadata.training is not None else "without any training"
    return (
        f"# {metadata.recipe}\n\n"
        f"{base}{revision} as a hybrid: {_fraction(spec, config.kv_heads)} use streaming attention, the "
        f"others keep full attention; {trained}. Made with lt_train, after LightTransfer "
        "([arXiv 2410.13846](https://arxiv.org/abs/2410.13846))."
    )


def _fraction(spec: HybridSpec, kv_heads: int) -> str:
    layers = f"of its {len(spec.full_in_base)} {'full-attention ' if spec.sliding_layers else ''}layers"
    if not spec.split_layers:
        return f"{len(spec.lazy_layers)} {layers}"
    streaming, heads = spec.number_of_streaming_heads(kv_heads), len(spec.full_in_base) * kv_heads
    return f"{streaming} of its {heads} key/value heads (with their query heads), in {len(spec.streaming_layers)} {layers},"


def _layers(metadata: ExportMetadata, config: HybridConfig) -> str:
    spec = config.spec
    layers = ", ".join(map(str, spec.lazy_layers)) or "none"
    kind = "heads" if spec.split_layers else "layers"
    sinks = f"the first `w_sink` = {spec.w_sink} tokens and " if spec.w_sink else ""
    plain = " (`w_sink` = 0: a plain sliding window)"
    if spec.learned_sinks:
        plain = "; the softmax's denominator has a learned logit for each query head, whose value is zero (a sink as in gpt-oss)"
    elif spec.w_sink:
        plain = ""
    return (
        "## Layers\n\n"
        f"- streaming: {layers} (of 0 to {spec.num_layers - 1}; chosen by: {metadata.selection})\n"
        f"{_split_layers(spec, config.kv_heads)}"
        f"{_sliding_layers(spec)}"
        f"- a query in these {kind} sees {sinks}the latest `w_recent` = {spec.w_recent} tokens of its own sequence, itself "
        f"included{plain}"
    )


def _sliding_layers(spec: HybridSpec) -> str:
    if not spec.sliding_layers:
        return ""
    layers = ", ".join(map(str, spec.sliding_layers))
    return f"- with a window in the base, as it had: {layers} (the latest {spec.sliding_window} tokens, no sinks)\n"


def _split_layers(spec: HybridSpec, kv_heads: int) -> str:
    if not spec.split_layers:
        return ""
    return f"- KV heads that stream in other layers (of 0 to {kv_heads - 1}): {listed_heads(spec)}\n"


def listed_heads(spec: HybridSpec) -> str:
    """The KV heads that stream in split layers, as in '2: 0, 5; 7: 1'."""
    return "; ".join(f"{layer}: {', '.join(map(str, heads))}" for layer, heads in spec.split_layers)


def loading_code(*, own_code: bool, new_tokens: int = 64) -> str:
    """Python that loads the export and answers a question. The export's check runs just this, with fewer `new_tokens`."""
    code = _LOADING_CODE.replace("TRUST", ", trust_remote_code=True" if own_code else "")
    return code.replace("NEW_TOKENS", str(new_tokens))


_LOADING_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, if Python was started in it; else its path, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folderTRUST)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"TRUST)

turns = [{"role": "user", "content": "What is 7 * 8?"}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]))
"""
_OWN_CODE = (
    "The model's code is beside its weights. Without `trust_remote_code=True` loading stops with an error: no stock class "
    "computes these layers."
)
_STOCK = (
    "An ordinary checkpoint: no code of its own. In vLLM: `vllm serve FOLDER --model-impl transformers` (vLLM's own classes of "
    "this architecture do not take mixed layer types)."
)
_GRANITE_SWA = (
    "An ordinary checkpoint of GraniteSWA, whose layers have windows and learned sinks: no code of its own. In vLLM, 0.32 or "
    f"later: `vllm serve FOLDER --max-num-batched-tokens {CHUNK}`. transformers, 5.19 or later, holds all scores of a layer in "
    'memory by default; on a GPU `attn_implementation="flex_attention"` does not.'
)


def _how_to_load(config: HybridConfig, own_code: bool) -> str:
    how = _OWN_CODE if own_code else _GRANITE_SWA if is_granite_swa(config) else _STOCK
    return f"## How to load\n\n```python\n{loading_code(own_code=own_code)}```\n\n{how}"


def _kv_cache(config: HybridConfig, dtype: torch.dtype) -> str:
    full, hybrid = (kv_bytes(config.to_dict(), spec, KV_TOKENS, dtype.itemsize) for spec in (config.spec.all_full, config.spec))
    return (
        f"## KV cache\n\nOne sequence of {KV_TOKENS:,} tokens in {dtype_name(dtype)}:\n\n"
        f"| {'the base' if config.spec.sliding_layers else 'full attention'} | this hybrid | fraction |\n|---|---|---|\n"
        f"| {format_bytes(full)} | {format_bytes(hybrid)} | {hybrid / full:.1%} |"
        f"{_in_vllm(config)}"
    )


def _in_vllm(config: HybridConfig) -> str:
    """The sequences that vLLM holds in these bytes; nothing where it does not serve this hybrid."""
    spec = config.spec
    if not spec.streams or not (specs := with_one_more_or_fewer(spec, config.model_type, config.kv_heads)):
        return ""
    kind = "KV heads" if spec.split_layers else "layers"
    gain, *others_gain = (f"{VllmCache().gain(each, config.kv_heads, KV_TOKENS):.2f}" for each in specs.values())
    others = " and ".join(f"{other} with {count}" for other, count in zip(others_gain, list(specs)[1:], strict=True))
    return (
        f"\n\nvLLM, with blocks of {BLOCK} tokens and `--max-num-batched-tokens {CHUNK}`, holds {gain} times as many "
        f"sequences of this length as without streaming {kind}. It groups {kind} and fills groups up: {others} streaming {kind}."
    )


def _data(metadata: ExportMetadata) -> str:
    if metadata.data is None:
        return "## Data\n\nNone: no layers were scored, and nothing was trained."
    source = metadata.data if is_hub_id(metadata.data) else Path(metadata.data).name
    counts = "".join(f"\n- {name.replace('_', ' ')}: {count:,}" for name, count in metadata.data_counts.items())
    how = f"format `{metadata.data_format}`" if metadata.data_counts else "texts on which the layers were scored"
    return f"## Data\n\n`{source}`, {how}\n{counts}".rstrip()


def _prompts(metadata: ExportMetadata) -> list[str]:
    """Nothing where the chat template alone gives the prompts of the run."""
    if metadata.system is not None:
        text = "Its prompts had this system turn. Pass it as the first message:"
        return [f"## Prompts\n\n{text}\n\n```text\n{metadata.system}\n```"]
    if metadata.default_system_turn:
        text = (
            "Its prompts had no system turn. The chat template writes one into conversations that have none, and so do servers "
            "by it. For the prompts of the run, remove it from `chat_template.jinja`:"
        )
        return [f"## Prompts\n\n{text}\n\n```text\n{metadata.default_system_turn.strip()}\n```"]
    return []


def _training(metadata: ExportMetadata) -> str:
    if metadata.training is None:
        return "## Training\n\nNone: the base's weights as they are."
    rows = "".join(f"\n| {name} | {_value(value)} |" for name, value in metadata.training.items())
    return f"## Training\n\n| setting | value |\n|---|---|{rows}"


def _scores(scores: tuple[ReportedScore, ...]) -> str:
    if not scores:
        return "## Scores\n\nNot evaluated."
    return (
        "## Scores\n\n`base` is the base model, `converted` the hybrid before training, `trained` after it. Standard errors "
        "and intervals are over the n problems or samples.\n\n"
        "| evaluation | variant | metric | value | standard error | 95 % interval | n |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(map(_score_row, scores))
    )


def _score_row(score: ReportedScore) -> str:
    error = "–" if score.standard_error is None else f"± {score.standard_error:.2g}"
    span = "–" if score.interval is None else f"{score.interval[0]:.4g} to {score.interval[1]:.4g}"
    return f"| {score.evaluation} | {score.variant} | {score.metric} | {score.value:.4g} | {error} | {span} | {score.n:,} |"


def _limits(config: HybridConfig, own_code: bool) -> str:
    spec, kind = config.spec, "head" if config.spec.split_layers else "layer"
    through = f"the full-attention {kind}s and the sinks" if spec.w_sink or spec.learned_sinks else f"the full-attention {kind}s"
    reach = (
        f"What is further back than {spec.w_recent:,} tokens reaches a streaming {kind} only through {through}: test exact "
        "recall over long distances before relying on it."
    )
    by_vllm = is_served(config.model_type, spec)
    servers = _SERVED_BY_THE_PLUGIN + (_PLUGIN_WITH_SINK_TOKENS if spec.w_sink else "") if by_vllm else _SERVED_BY_LT_TRAIN
    limits = [reach, *([*_LIMITS_OF_OWN_CODE, servers] if own_code else [])]
    return "## What it cannot do\n\n" + "\n".join(f"- {limit}" for limit in limits)


_LIMITS_OF_OWN_CODE = [
    "Generation is greedy search or sampling. Beam search, assisted and prompt-lookup decoding, static caches and continuous "
    "batching raise an error.",
    "Batches for generation are padded on the left.",
    "`attn_implementation` cannot be chosen: stock attention kernels know neither sinks nor heads that stream.",
]
_SERVED_BY_THE_PLUGIN = (
    "vLLM serves it where `lt-train` is installed beside it, whose plugin knows these layers: `lt-train serve FOLDER --vllm "
    "PYTHON`. SGLang, TGI and llama.cpp do not load it."
)
_PLUGIN_WITH_SINK_TOKENS = " There the plugin's attention over sink tokens was run on CPUs alone."
_SERVED_BY_LT_TRAIN = (
    "vLLM, SGLang, TGI and llama.cpp have no such layers in this architecture and do not load it. `lt-train serve` serves it."
)


def _check(check: Check | str) -> str:
    if isinstance(check, str):
        return (
            f"## Check\n\nNot compared with the model in memory: {check}. The weights were written one by one from those of the "
            "base and of the training."
        )
    ties = f", except {check.ties} rows that differ from a token on which is equally likely" if check.ties else ""
    rounding = "" if check.rounding is None else f"; rounding changes one by {check.rounding:.1e}"
    faults = "".join(f", {fault} by {change:.1e}" for fault, change in check.faults.items())
    return (
        f"## Check\n\nA process without lt_train ran the code above in this folder (class `{check.model_class}`, {check.dtype}). "
        "Its model was compared with the model in memory, both computing in fp32: logits differ by at most "
        f"{check.logits_difference:.1e} (allowed {check.tolerance:.1e}; largest logit {check.largest_logit:.1f}{rounding}"
        f"{faults}); {check.tokens} tokens generated greedily are the same{ties}."
    )


def _versions(metadata: ExportMetadata, config: HybridConfig) -> str:
    rows = "".join(f"\n- {name} {version}" for name, version in metadata.versions.items())
    return f"## Versions\n\n- hybrid code {config.hybrid_version}{rows}"


def _value(value: str | int | float | bool | None) -> str:
    return "–" if value is None else str(value).replace("|", "\\|")
