"""A hybrid becomes one folder that runs anywhere: written beside its place, checked by a process of its own, then renamed."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lt_train.export.card import loading_code, model_card
from lt_train.export.code_files import hybrid_code
from lt_train.export.configs import exported_config, exported_generation_config, needs_own_code
from lt_train.export.granite_swa import GraniteSWAWeights, is_granite_swa
from lt_train.export.manifest import content_fingerprint, is_exported, make_manifest
from lt_train.export.metadata import ExportMetadata
from lt_train.export.room import lacking_room
from lt_train.export.verify import Check, check_export
from lt_train.export.weights import ExportedHybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.errors import UserError

CARD = "README.md"

MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of a file of weights, as in transformers."""

ANSWER_IN_CHECK = 2
"""Tokens that the card's code generates in the check: the second one from the cache. What is compared is generated after it."""


def export_hybrid(
    hybrid: ExportedHybrid,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    metadata: ExportMetadata,
    *,
    dtype: torch.dtype,
    max_shard_size: int = MAX_SHARD_SIZE,
    chat_template: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a hybrid to the folder `out`; as an ordinary checkpoint of a stock class where one computes it, else with its own code.

    One shard of the weights is in memory at a time; only the check loads the model, where there is room for it. An export of the
    same content that is there already is recognised and kept.

    Args:
        max_shard_size: bytes of the largest file of weights.
        chat_template: text of a Jinja template to ship instead of the tokenizer's own.
        report: called with a line before each long step.

    Raises:
        UserError: something else is at `out`; no token ends an answer; the disk is full; the export does not load in a process
            without lt_train, or computes something else there (see `check_export`). Then what was written is kept
            beside `out`.
    """
    out, skeleton = Path(out), hybrid.skeleton
    own_code = needs_own_code(skeleton.config)
    tokenizer = exported_tokenizer(tokenizer, chat_template)
    generation = exported_generation_config(skeleton, tokenizer)
    with _empty_folder(out, "partial") as partial, _empty_folder(out, "check") as scratch:
        _describe(partial, skeleton, tokenizer, generation, dtype)
        report("comparing with what is exported already" if out.exists() else "taking the fingerprint of the weights")
        content = content_fingerprint(partial, hybrid, dtype, metadata)
        if is_exported(out, content):
            report(f"{out} holds this export already")
            return out
        report("writing weights")
        _write_weights(partial, hybrid, dtype, max_shard_size)
        check: Check | str | None = lacking_room(hybrid, dtype)
        if check is None:
            report("checking the export in a process without lt_train")
            with _kept_if_refused(partial, out):
                model = hybrid.load().to(dtype).eval()
                code = loading_code(own_code=own_code, new_tokens=ANSWER_IN_CHECK)
                check = check_export(partial, code, model, tokenizer, generation, dtype, scratch)
        else:
            report(f"warning: the export is not compared with the model in memory: {check}")
        card = model_card(metadata, skeleton.config, dtype, check, own_code=own_code)
        (partial / CARD).write_text(card, encoding="utf-8")
        make_manifest(partial, content, check).write(partial)
        _sync(partial)
        os.rename(partial, out)
    return out


def exported_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """A copy that pads on the left, as generation needs it, with the template that the model was trained with."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


@contextmanager
def _empty_folder(out: Path, name: str) -> Iterator[Path]:
    """An empty folder beside `out`, gone afterwards unless it was renamed. One that a killed export left is cleared away."""
    folder = out.absolute().with_name(f".{out.name}.{name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _kept_if_refused(partial: Path, out: Path) -> Iterator[None]:
    """Keep an export that its check refuses beside `out`, in place of an earlier refused one; the error names the place."""
    try:
        yield
    except UserError as error:
        refused = out.with_name(f"{out.name}-refused")
        shutil.rmtree(refused, ignore_errors=True)
        os.rename(partial, refused)
        raise UserError(f"{error}\nNothing was exported. The refused export is in {refused}") from error


def _describe(
    folder: Path, model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, dtype: torch.dtype
) -> None:
    """All that loading the weights needs: configs, tokenizer, code."""
    exported_config(model, dtype).save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if needs_own_code(model.config):
        for name, text in hybrid_code(model.config).items():
            (folder / name).write_text(text, encoding="utf-8")


def _write_weights(folder: Path, hybrid: ExportedHybrid, dtype: torch.dtype, max_shard_size: int) -> None:
    """Files and index as transformers' save_pretrained names them, a shard at a time."""
    stored = GraniteSWAWeights(hybrid) if is_granite_swa(hybrid.skeleton.config) else hybrid
    shapes = {name: torch.empty_like(weight, dtype=dtype, device="meta") for name, weight in stored.parameters.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        weights = {name: stored.weight(name, dtype) for name in names}
        try:
            save_file(weights, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # which has no errno
            problem = f"{folder.parent}: {file} of the export could not be written there: {error}"
            raise UserError(f"{problem}. Earlier exports are complete. Fix: free some space, and export again") from error
        del weights  # before those of the next file are read
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes files that their owner alone can read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """The rename must not reach the disk before the files do."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
