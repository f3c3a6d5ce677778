"""The PEFT adapter of a training by itself: a small folder to load on the base, once that is converted."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from lt_train.export.card import is_hub_id, listed_heads
from lt_train.export.metadata import ExportMetadata
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.trained_weights import adapter_without_query_key, query_key_of_full_layers
from lt_train.runtime.errors import UserError

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter to export.

    Attributes:
        folder: where training left it. spec: of the hybrid that it was trained in.
        restores_query_key: leave out the adapters of queries and keys in full-attention layers.
    """

    folder: Path
    spec: HybridSpec
    restores_query_key: bool


def export_adapter(adapter: TrainedAdapter, out: Path, metadata: ExportMetadata) -> None:
    """Write the adapter to the new folder `out`: config and weights as PEFT reads them, and a card.

    Raises:
        UserError: something is at `out`, or the folder of the trained adapter lacks a file.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--adapter: {out}: exists already, and is not overwritten. Fix: name a new folder")
    for name in (CONFIG, WEIGHTS):
        if not (adapter.folder / name).is_file():
            raise UserError(f"{adapter.folder / name}: missing. Fix: run the training's command again; it publishes the adapter")
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _config(adapter, metadata).save_pretrained(str(partial))
        _write_weights(adapter, partial / WEIGHTS)
        (partial / CARD).write_text(adapter_card(adapter.spec, metadata), encoding="utf-8")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(adapter: TrainedAdapter, metadata: ExportMetadata) -> PeftConfig:
    restores = adapter.restores_query_key
    config = (
        adapter_without_query_key(adapter.folder, adapter.spec) if restores else PeftConfig.from_pretrained(str(adapter.folder))
    )
    config.base_model_name_or_path, config.revision, config.inference_mode = metadata.base, metadata.base_revision, True
    return config


def _write_weights(adapter: TrainedAdapter, path: Path) -> None:
    left_out = re.compile(query_key_of_full_layers(adapter.spec)) if adapter.restores_query_key else None
    tensors = load_file(adapter.folder / WEIGHTS)
    save_file({name: tensors[name] for name in tensors if not (left_out and left_out.search(name))}, path, {"format": "pt"})
    shutil.copymode(path.with_name(CONFIG), path)  # safetensors makes files that their owner alone can read


def adapter_card(spec: HybridSpec, metadata: ExportMetadata) -> str:
    """The README.md: for which base and spec the adapter is, and how it loads."""
    header: dict[str, Any] = {"base_model": metadata.base} if is_hub_id(metadata.base) else {}
    header |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lt-train", "lora", "hybrid-attention"]}
    layers = ", ".join(map(str, spec.lazy_layers)) or "none"
    streamed = f"{len(spec.lazy_layers)} of its {spec.num_layers} layers"
    heads = arguments = ""
    if spec.split_layers:
        streamed += f" and single KV heads of {len(spec.split_layers)} others"
        heads = f"\n- KV heads that stream in other layers: {listed_heads(spec)}"
        arguments = f", split_layers={spec.split_layers}"
    sinks = "learned, in this adapter" if spec.learned_sinks else f"`w_sink`: {spec.w_sink} tokens"
    arguments += ", learned_sinks=True" if spec.learned_sinks else ""
    if spec.sliding_layers:
        heads += f"\n- layers with a window in the base, as it had: {', '.join(map(str, spec.sliding_layers))}"
        arguments += f", sliding_layers={spec.sliding_layers}, sliding_window={spec.sliding_window}"
    revision = f", revision={metadata.base_revision!r}" if metadata.base_revision else ""
    training = "".join(f"\n| {name} | {value} |" for name, value in (metadata.training or {}).items())
    versions = "".join(f"\n- {name} {version}" for name, version in metadata.versions.items())
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---

# {metadata.recipe}, the adapter

A PEFT adapter for `{metadata.base}`, trained while {streamed} used streaming
attention. It belongs to this hybrid: on the base with full attention, or with other layers, it computes something else.

- base: `{metadata.base}`{f", revision `{metadata.base_revision}`" if metadata.base_revision else ""}
- streaming layers: {layers} (of 0 to {spec.num_layers - 1}; chosen by: {metadata.selection}){heads}
- sinks: {sinks}; `w_recent`: {spec.w_recent} tokens

## How to load

With lt_train and peft:

```python
from peft import PeftModel

from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec

spec = HybridSpec({spec.num_layers}, lazy_layers={spec.lazy_layers}, w_sink={spec.w_sink}, w_recent={spec.w_recent}{arguments})
base = load_hybrid({metadata.base!r}, spec{revision})
model = PeftModel.from_pretrained(base, ".")  # this folder, if Python was started in it; else its path, or its id on the hub
```

## Training

| setting | value |
|---|---|{training}

## Versions
{versions}
"""
