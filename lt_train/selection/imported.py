"""Hybrids that others have published, as the `hybrid` part of a recipe: which layers or KV heads stream, and their sizes.

What each format means was read from its authors' code:

- transformers: `layer_types` and `sliding_window` of a config.json; a window of W sees W tokens, the query itself included. Ours
  may have `streaming_kv_heads` beside them.
- SWAA (arXiv 2512.10411): `sliding_window_size` W (flash attention's left window is W - 1), `keep_first`, `non_sliding_layers`.
- DuoAttention (arXiv 2410.10819): full_attention_heads.tsv, a gate for each layer (line) and KV head (column), clipped to 0..1;
  1 is full attention. `sink_size` and `recent_size` in the config.json beside it.
- LightTransfer (arXiv 2410.13846): the authors' modelling code, `self.lazy_list = […]`; its mask is written with `<=`.
"""

import ast
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lt_train.hybrid.kv_size import kv_heads
from lt_train.hybrid.spec import FULL, GRANITE_SWA, STREAMING
from lt_train.runtime.errors import UserError
from lt_train.selection.choose import explicit_heads, number_by_ratio
from lt_train.selection.chosen import numbers

GATES, CONFIG = "full_attention_heads.tsv", "config.json"
KNOWN = (
    "a config.json with layer_types and sliding_window (transformers), JSON with sliding_window_size, keep_first and "
    f"non_sliding_layers (SWAA), {GATES} beside its {CONFIG} (DuoAttention), or modelling code with lazy_list (LightTransfer)"
)
STREAMS_BELOW = 0.5
"""DuoAttention's own threshold of a gate."""


@dataclass(frozen=True)
class ImportedHybrid:
    """
    Attributes:
        source: the format. layers: those that stream, ascending. w_sink, w_recent: None: the source does not name them.
        heads: by layer, the KV heads that stream; None: layers stream with all their heads.
        num_layers: of the base; None: the source does not have it. learned_sinks: see HybridSpec.
        remarks: what of the source is not taken over, and what else to know.
    """

    source: str
    layers: tuple[int, ...]
    w_sink: int | None
    w_recent: int | None
    num_layers: int | None
    learned_sinks: bool = False
    remarks: tuple[str, ...] = ()
    heads: tuple[tuple[int, ...], ...] | None = None

    def as_recipe(self) -> str:
        """The `hybrid` part of a recipe in YAML, remarks as comments."""
        sizes = [f"  {name}: {value}" for name in ("w_sink", "w_recent") if (value := getattr(self, name)) is not None]
        kind = ["  sink: learned"] if self.learned_sinks else []
        comments = [f"# {line}" for line in (f"from {self.source}", *self.remarks)]
        streaming = [f"  layers: [{numbers(self.layers)}]"]
        if self.heads is not None:
            lists = [f"    - [{numbers(heads)}]  # layer {layer}" for layer, heads in enumerate(self.heads)]
            streaming = ["  granularity: kv_head", "  streaming_kv_heads:", *lists]
        return "\n".join([*comments, "hybrid:", *streaming, *kind, *sizes])


def import_hybrid(
    path: Path, num_layers: int | None = None, ratio: float | None = None, *, by_head: bool = False
) -> ImportedHybrid:
    """
    Args:
        path: a file in one of the formats above, or a folder with such files.
        num_layers: decoder layers of the base: SWAA's settings need them, other sources are compared with them.
        ratio: fraction of layers or KV heads that stream; gates need it for layers, and nothing else takes it.
        by_head: the gates' KV heads stream one by one, those of `ratio` or else those of which DuoAttention lets none see all.

    Raises:
        UserError: none of these formats, values that are none, or an argument that is missing or contradicts them.
    """
    found = _import(path, num_layers, ratio, by_head)
    if num_layers is not None and num_layers != (found.num_layers or num_layers):
        raise UserError(f"--num-layers: {num_layers}: {path} has {found.num_layers} layers. Fix: name settings of this base")
    if num_layers is not None and max(found.layers, default=0) >= num_layers:
        raise UserError(f"--num-layers: {num_layers}: {path} names layer {found.layers[-1]}. Fix: name settings of this base")
    return found


def _import(path: Path, num_layers: int | None, ratio: float | None, by_head: bool) -> ImportedHybrid:
    gates = path / GATES if path.is_dir() else path if path.suffix == ".tsv" else None
    if gates is not None and gates.is_file():
        return _heads_from_gates(gates, ratio) if by_head else _layers_from_gates(gates, ratio)
    if by_head:
        raise UserError(f"--granularity: kv_head: {path}: not a gate for each KV head. Fix: name DuoAttention's {GATES}")
    if ratio is not None:
        raise UserError(f"--lazy-layer-ratio: {ratio:g}: this source names the layers itself. Fix: leave it out")
    config = path / CONFIG if path.is_dir() else path if path.suffix == ".json" else None
    if config is not None and config.is_file():
        settings = _read_json(config)
        swaa = settings.get("swaa_config", settings)
        if isinstance(swaa, dict) and "sliding_window_size" in swaa:
            return _from_swaa(config, swaa, settings.get("num_hidden_layers", num_layers))
        if settings.get("layer_types"):
            return _from_layer_types(config, settings)
    for code in sorted(path.glob("*.py")) if path.is_dir() else [path] if path.suffix == ".py" else []:
        if code.is_file() and (found := _from_code(code)) is not None:
            return found
    what = "none of the formats that are known" if path.exists() else "no such file or folder"
    raise UserError(f"{path}: {what}. Fix: name {KNOWN}")


def _from_layer_types(path: Path, settings: dict[str, Any]) -> ImportedHybrid:
    kinds, window = settings["layer_types"], settings.get("sliding_window")
    others = sorted({str(kind) for kind in kinds} - {FULL, STREAMING}) if isinstance(kinds, list) else [str(kinds)]
    if others:
        raise UserError(f"{path}: layer_types: {others[0]}: not {FULL} or {STREAMING}. Fix: name another checkpoint")
    if settings.get("w_recent") is not None:
        return _beside_sliding_layers(path, settings)
    layers = [layer for layer, kind in enumerate(kinds) if kind == STREAMING]
    split = settings.get("streaming_kv_heads") is not None
    remark = "model.base: a copy of the checkpoint whose config.json has full attention (docs/choosing.md, 'Hybrids of others')"
    has_sinks = settings.get("model_type") == GRANITE_SWA
    if has_sinks:
        remark = "model.base: the model that this was made from, for a checkpoint of GraniteSWA is no base"
    found = ImportedHybrid(
        "layer_types of transformers",
        _checked(path, "layer_types", layers, len(kinds), may_be_empty=split),
        _count(path, "w_sink", settings.get("w_sink", 0), least=0),
        _count(path, "sliding_window", window),
        len(kinds),
        learned_sinks=has_sinks or settings.get("learned_sinks") is True,
        heads=_heads_of_config(path, settings),
    )
    return found if "w_sink" in settings else replace(found, remarks=(remark,))


def _beside_sliding_layers(path: Path, settings: dict[str, Any]) -> ImportedHybrid:
    """A hybrid of ours whose base has sliding layers: `layer_types` are the base's, and streaming_kv_heads set what streams."""
    heads_L = _heads_of_config(path, settings)
    if heads_L is None:
        raise UserError(f"{path}: streaming_kv_heads: missing beside w_recent. Fix: name an export as it was written")
    whole = [layer for layer, heads in enumerate(heads_L) if len(heads) == kv_heads(settings)]
    split = any(0 < len(heads) < kv_heads(settings) for heads in heads_L)
    return ImportedHybrid(
        "layer_types of transformers",
        _checked(path, "streaming_kv_heads", whole, len(heads_L), may_be_empty=split),
        _count(path, "w_sink", settings.get("w_sink", 0), least=0),
        _count(path, "w_recent", settings["w_recent"]),
        len(heads_L),
        learned_sinks=settings.get("learned_sinks") is True,
        heads=heads_L if split else None,
    )


def _heads_of_config(path: Path, settings: dict[str, Any]) -> tuple[tuple[int, ...], ...] | None:
    """`streaming_kv_heads` of a hybrid of ours; None where its layers stream with all their heads."""
    heads_L = settings.get("streaming_kv_heads")
    if heads_L is None:
        return None
    try:
        return tuple(explicit_heads(heads_L, len(settings["layer_types"]), kv_heads(settings)))
    except (UserError, TypeError, KeyError) as error:
        raise UserError(f"{path}: streaming_kv_heads: {error}") from error


def _from_swaa(path: Path, swaa: dict[str, Any], num_layers: int | None) -> ImportedHybrid:
    if num_layers is None:
        raise UserError(f"{path}: SWAA names the layers that do not slide. Fix: add --num-layers, how many the base has")
    full = _checked(path, "non_sliding_layers", swaa.get("non_sliding_layers", []), num_layers, may_be_empty=True)
    remarks = []
    if swaa.get("force_fa_decode"):
        remarks.append("not taken over: force_fa_decode (full attention for generated tokens)")
    others = sorted(swaa.keys() - {"sliding_window_size", "keep_first", "non_sliding_layers", "force_fa_decode"})
    if others and "model_type" not in swaa:
        remarks.append(f"not taken over: {', '.join(others)}")
    layers = [layer for layer in range(num_layers) if layer not in full]
    return ImportedHybrid(
        "SWAA",
        _checked(path, "non_sliding_layers", layers, num_layers),
        _count(path, "keep_first", swaa.get("keep_first", 0), least=0),
        _count(path, "sliding_window_size", swaa["sliding_window_size"]),
        num_layers,
        remarks=tuple(remarks),
    )


def _heads_from_gates(path: Path, ratio: float | None) -> ImportedHybrid:
    sizes, gates = _sizes_beside(path), _read_gates(path)
    num_layers, num_heads = len(gates), len(gates[0])
    ranked = sorted((gate, layer, head) for layer, row in enumerate(gates) for head, gate in enumerate(row))
    if ratio is None:
        streaming, which = [each for each in ranked if each[0] < STREAMS_BELOW], f"of a gate below {STREAMS_BELOW:g}"
    else:
        streaming, which = ranked[: number_by_ratio(ratio, len(ranked), "KV head")], "with the lowest gates"
    if not streaming:
        raise UserError(f"{path}: no gate is below {STREAMS_BELOW:g}, so nothing would stream. Fix: add --lazy-layer-ratio")
    found = {(layer, head) for _, layer, head in streaming}
    heads_L = [[head for head in range(num_heads) if (layer, head) in found] for layer in range(num_layers)]
    return ImportedHybrid(
        f"DuoAttention, the {len(found)} of {len(ranked)} KV heads {which}",
        tuple(layer for layer, heads in enumerate(heads_L) if len(heads) == num_heads),
        *sizes,
        num_layers,
        heads=tuple(explicit_heads(heads_L, num_layers, num_heads)),
    )


def _sizes_beside(path: Path) -> tuple[int, int]:
    """Sink and recent tokens, of the config.json beside the gates."""
    config = path.with_name(CONFIG)
    settings = _read_json(config)
    return _count(config, "sink_size", settings.get("sink_size"), least=0), _count(
        config, "recent_size", settings.get("recent_size")
    )


def _read_gates(path: Path) -> list[list[float]]:
    """The gates by layer and KV head, from 0 to 1."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [[float(gate) for gate in line.split("\t")] for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: not a table of gates ({error}). Fix: download it again") from error
    if not rows or len({len(row) for row in rows}) != 1 or any(gate != gate for row in rows for gate in row):
        raise UserError(f"{path}: not a gate for each layer and KV head. Fix: download it again")
    return [[min(max(gate, 0.0), 1.0) for gate in row] for row in rows]


def _layers_from_gates(path: Path, ratio: float | None) -> ImportedHybrid:
    if ratio is None:
        raise UserError(
            f"{path}: DuoAttention lets single KV heads stream. Fix: add --lazy-layer-ratio, the fraction of layers that stream "
            "whole, ranked by the mean of their gates; or --granularity kv_head"
        )
    sizes, gates = _sizes_beside(path), _read_gates(path)
    means = [sum(row) / len(row) for row in gates]
    ranked = sorted(range(len(means)), key=lambda layer: (means[layer], layer))
    layers = tuple(sorted(ranked[: number_by_ratio(ratio, len(means))]))
    cut = sum(gate >= STREAMS_BELOW for layer in layers for gate in gates[layer])
    kept = sum(gate < STREAMS_BELOW for layer, row in enumerate(gates) if layer not in layers for gate in row)
    return ImportedHybrid(
        f"DuoAttention, the {len(layers)} of {len(means)} layers with the lowest mean gate",
        layers,
        *sizes,
        len(means),
        remarks=(
            f"whole layers stream: {cut} KV heads of these layers have full attention in DuoAttention (gate of "
            f"{STREAMS_BELOW:g} or more),",
            f"and {kept} KV heads of the other layers stream there (--granularity kv_head takes heads over)",
        ),
    )


def _from_code(path: Path) -> ImportedHybrid | None:
    """The code is parsed, and never run. None: it has no lazy_list."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: no Python that can be read ({error}). Fix: download it again") from error
    lists = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(isinstance(at, ast.Attribute) and at.attr == "lazy_list" for at in node.targets)
    ]
    if not lists:
        return None
    try:
        (layers,) = [ast.literal_eval(each) for each in lists]
    except ValueError as error:
        raise UserError(f"{path}: lazy_list: not one list of numbers. Fix: write hybrid.layers by hand") from error
    sinks, window = _last_key_compared(tree, "kv_idx"), _last_key_compared(tree, "q_idx - kv_idx")
    if sinks is None or window is None:
        w_sink, w_recent, remark = None, None, "the code names no sizes: set w_sink and w_recent"
    else:  # the mask is written with <=
        w_sink, w_recent, remark = sinks + 1, window + 1, "the sizes are its mask's"
    return ImportedHybrid(
        "LightTransfer's lazy_list", _checked(path, "lazy_list", layers, None), w_sink, w_recent, None, remarks=(remark,)
    )


def _last_key_compared(tree: ast.AST, what: str) -> int | None:
    """N of `what <= N` where the code has one such comparison."""
    found = {
        node.comparators[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and ast.unparse(node.left) == what
        and isinstance(node.ops[0], ast.LtE)
        and isinstance(node.comparators[0], ast.Constant)
        and isinstance(node.comparators[0].value, int)
    }
    return found.pop() if len(found) == 1 else None


def _checked(path: Path, name: str, layers: Any, num_layers: int | None, *, may_be_empty: bool = False) -> tuple[int, ...]:
    given = layers if isinstance(layers, list) else [layers]
    faulty = [layer for layer in given if type(layer) is not int or layer < 0 or (num_layers is not None and layer >= num_layers)]
    if faulty:
        among = "" if num_layers is None else f" of {num_layers}"
        raise UserError(f"{path}: {name}: {faulty[0]!r}: not a layer{among}, from 0. Fix: see that it is of this base")
    if len(set(given)) != len(given):
        raise UserError(f"{path}: {name}: a layer is named twice. Fix: name each layer once")
    if not given and not may_be_empty:
        raise UserError(f"{path}: {name}: no layer streams. Fix: name the settings of a hybrid")
    return tuple(sorted(given))


def _count(path: Path, name: str, value: Any, *, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise UserError(f"{path}: {name}: {value!r}: not a number of tokens from {least}. Fix: correct it there")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON that can be read ({error}). Fix: download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not one mapping of settings. Fix: name a file with one")
    return found
