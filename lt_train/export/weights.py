"""The weights of an export, read one at a time from their files: the model is in memory only where that is needed.

An adapter is merged a module at a time, by PEFT itself, with the base's weights of that module alone in memory.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.trained_weights import check_merged
from lt_train.runtime.errors import UserError

PROBE_ROWS = 8

_MERGED_BY_MODULE = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights"),
}
"""The settings of LoRA with which each module merges by itself. Any other may reach beyond a module."""

_PUBLISH_AGAIN = "Fix: delete this folder, and run the same command again: it publishes the weights of the training again"

_INITIAL = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""


class NotOnDisk(Exception):
    """Why these weights cannot be read one at a time: they come from a model in memory."""


@dataclass(frozen=True)
class ExportedHybrid:
    """A hybrid to export.

    Attributes:
        skeleton: its config and generation config count, and the names and shapes of its weights, which may be on the meta device.
        read: gives the weight of a name, in the dtype in which it is stored or merged.
        load: the same hybrid in memory, made otherwise: the export is compared with it.
        loaded_dtype: in which `load` holds it at first. None: it is in memory already.
    """

    skeleton: HybridForCausalLM
    read: Callable[[str], Tensor]
    load: Callable[[], HybridForCausalLM]
    loaded_dtype: torch.dtype | None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By name, tied ones once; with what a checkpoint holds beside them, such as the correction of a router."""
        return dict(self.skeleton.named_parameters()) | saved_buffers(self.skeleton)

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """One weight as it is exported.

        Raises:
            UserError: the dtype cannot hold its values.
        """
        exact = self.read(name).detach().cpu()
        weight = exact.to(dtype).contiguous()
        if dtype == torch.float16 and not weight.isfinite().all():
            largest = exact.abs().max().item()
            raise UserError(f"export.dtype: fp16: {name} holds {largest:.3g}, and fp16 ends at 65504. Fix: set bf16 or fp32")
        return weight


def in_memory(model: HybridForCausalLM) -> ExportedHybrid:
    """A model whose weights are in memory, as they are."""
    return ExportedHybrid(model, model.state_dict().__getitem__, lambda: model, None)


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint of the model holds, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


class WeightFiles:
    """The tensors of safetensors files, each read when it is needed.

    Args:
        files: name -> the file that holds it (see `files_by_name`).
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._joined: dict[str, Callable[[], Tensor]] = {}

    def read(self, name: str) -> Tensor:
        if name in self._joined:
            return self._joined[name]()
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def check_fits(self, skeleton: HybridForCausalLM) -> None:
        """Check names and shapes. From then on `read` joins a weight that the files hold in parts, as those of each expert.

        Raises:
            NotOnDisk: the names or shapes are not those of the skeleton.
        """
        weights: dict[str, Tensor] = dict(skeleton.named_parameters()) | saved_buffers(skeleton)
        tied = skeleton.state_dict().keys() - weights.keys()
        wanted: dict[str, list[int]] = {}
        together = revert_weight_conversion(skeleton, weights)  # one at a time it looks through all modules for each
        for name, weight in weights.items():
            parts = {name: together[name]} if name in together else revert_weight_conversion(skeleton, {name: weight})
            wanted |= {part: list(shaped.shape) for part, shaped in parts.items()}
            if parts.keys() != {name}:
                self._joined[name] = partial(self._join, name, list(parts), skeleton)
        found: dict[str, list[int]] = {}
        for path in set(self._files.values()):
            with safe_open(path, framework="pt") as opened:
                found |= {name: opened.get_slice(name).get_shape() for name in opened.keys() if self._files.get(name) == path}  # noqa: SIM118
        differing = sorted(
            name for name in (wanted.keys() | found.keys()) - tied if name not in wanted or wanted[name] != found.get(name)
        )
        if differing:
            raise NotOnDisk(f"the files do not hold {differing[0]} as this model has it")
        output, embedding = skeleton.lm_head.weight, "model.embed_tokens.weight"
        if tied & found.keys() and not (
            output is skeleton.get_parameter(embedding) and torch.equal(self.read("lm_head.weight"), self.read(embedding))
        ):
            raise NotOnDisk("the files hold two tied weights that differ")

    def _join(self, name: str, parts: list[str], skeleton: HybridForCausalLM) -> Tensor:
        """As transformers joins them when it loads a checkpoint."""
        conversions = get_model_conversion_mapping(skeleton)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        join: WeightConverter | None = None
        for part in parts:
            target, pattern = rename_source_key(part, renamings, converters)
            if pattern is None:  # the file has another name for it
                return self.read(part)
            join = deepcopy(of_pattern[pattern]) if join is None else join
            join.add_tensor(target, part, pattern, self.read(part))
        assert join is not None, "a weight has parts"
        joined: Any = join.convert(name, model=skeleton, config=skeleton.config)[name]
        return joined[0] if isinstance(joined, list) else joined


def files_by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """Name of a tensor -> the safetensors file that holds it."""
    found: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), path)
    return found


def base_files(base: str, revision: str | None) -> list[Path]:
    """The safetensors files of a model in a folder or on the hub; transformers loads the same.

    Raises:
        NotOnDisk: it has none.
    """
    found = [
        cached_file(base, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    ]
    if found[0] is not None:
        return [Path(found[0])]
    if found[1] is None:
        raise NotOnDisk(f"{base} has no safetensors files")
    shards, _ = get_checkpoint_shard_files(base, found[1], revision=revision)
    return list(map(Path, shards))


class MergedWeights:
    """The weights of a base with an adapter merged into them in fp32, module by module.

    Args:
        base: the weights under the adapter. folder: of the adapter.
        skeleton: of this hybrid, on the meta device, for this alone: the adapter is put into it.
        config: instead of the one in the folder.

    Raises:
        NotOnDisk: a setting of the adapter reaches beyond single modules.
        UserError: the adapter is of another base or of other layers.
    """

    def __init__(self, base: WeightFiles, skeleton: HybridForCausalLM, folder: Path, config: PeftConfig | None) -> None:
        _check_merges_by_module(config or PeftConfig.from_pretrained(str(folder)), skeleton)
        self._base, self._folder = base, folder
        for module in skeleton.modules():
            for name, parameter in module.named_parameters(recurse=False):  # PEFT puts an adapter where its base is: not on meta
                setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
        self._empty = {id(weight): weight for weight in (*skeleton.parameters(), *saved_buffers(skeleton).values())}
        try:
            loaded = PeftModel.from_pretrained(skeleton, folder, config=config, low_cpu_mem_usage=True, torch_device="cpu").eval()
        except (RuntimeError, KeyError, ValueError) as error:  # other shapes, or modules that are not there
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: the adapter does not fit this hybrid: {reason}. {_PUBLISH_AGAIN}") from error
        missing = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
        if missing:
            raise UserError(
                f"{folder}: the adapter lacks {len(missing)} weights of this hybrid, such as {missing[0]}: it is of another "
                f"base or of other layers. {_PUBLISH_AGAIN}"
            )
        self._adapted = loaded.base_model.model

    def read(self, name: str) -> Tensor:
        place, _, leaf = name.rpartition(".")
        module = self._adapted.get_submodule(place)
        if isinstance(module, BaseTunerLayer):
            return self._merged(place, module, leaf)
        parameter: Tensor = getattr(module, leaf)  # of modules_to_save the trained one
        return self._base.read(name) if id(parameter) in self._empty else parameter

    @torch.no_grad()
    def _merged(self, place: str, module: Any, leaf: str) -> Tensor:
        layer = module.get_base_layer()
        empty = dict(layer.named_parameters(recurse=False))
        for each in empty:
            setattr(layer, each, nn.Parameter(self._base.read(f"{place}.{each}").to(torch.float32, copy=True), requires_grad=False))
        rows = torch.randn(PROBE_ROWS, layer.in_features, generator=torch.Generator().manual_seed(0))
        before = module(rows)
        module.merge()
        check_merged(before, module(rows), self._folder)
        merged: Tensor = getattr(layer, leaf).detach()
        for each, parameter in empty.items():
            setattr(layer, each, parameter)
        module.merged_adapters.clear()
        return merged


def _check_merges_by_module(config: PeftConfig, skeleton: HybridForCausalLM) -> None:
    defaults = LoraConfig()
    others = [
        field.name
        for field in fields(LoraConfig)
        if field.name not in _MERGED_BY_MODULE and getattr(config, field.name, MISSING) != getattr(defaults, field.name)
    ]
    if getattr(config, "init_lora_weights", True) not in _INITIAL:
        others.append("init_lora_weights")
    tied = skeleton.state_dict().keys() - dict(skeleton.named_parameters()).keys()
    if tied and {"lm_head", "embed_tokens"} & set(getattr(config, "modules_to_save", None) or ()):
        others.append("modules_to_save of tied weights")
    if others:
        raise NotOnDisk(f"lora.peft sets {', '.join(others)}, so the adapter is merged in the loaded model")
