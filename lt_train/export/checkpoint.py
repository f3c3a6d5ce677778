"""A hybrid becomes one folder that runs anywhere: written beside its place, checked by a process of its own, then renamed."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lt_train.export.card import model_card
from lt_train.export.code_files import hybrid_code_files
from lt_train.export.configs import exported_config, exported_generation_config, needs_own_code
from lt_train.export.manifest import content_fingerprint, is_exported, make_manifest
from lt_train.export.metadata import ExportMetadata
from lt_train.export.verify import check_export
from lt_train.hybrid.modeling import HybridForCausalLM

CARD = "README.md"


def export_hybrid(
    model: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    metadata: ExportMetadata,
    *,
    dtype: torch.dtype,
    chat_template: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write `model` to the folder `out`; with `w_sink=0` as an ordinary checkpoint of a stock class, else with its own code.

    An export of the same content that lies there already is recognised and kept.

    Args:
        model: adapters merged. It is cast to `dtype` in place, and is in evaluation mode afterwards.
        chat_template: text of a Jinja template to ship instead of the tokenizer's own.
        report: called with a line before each long step.

    Raises:
        UserError: something else lies at `out`; no token ends an answer; the export does not load in a process without lt_train, or
            computes something else there (see `check_export`). Nothing is left behind then.
    """
    out = Path(out)
    model.to(dtype).eval()
    tokenizer = exported_tokenizer(tokenizer, chat_template)
    generation = exported_generation_config(model, tokenizer)
    with _partial_folder(out) as partial:
        _describe(partial, model, tokenizer, generation, dtype)
        report("comparing with what is exported already" if out.exists() else "taking the fingerprint of the weights")
        content = content_fingerprint(partial, model, metadata)
        if is_exported(out, content):
            report(f"{out} holds this export already")
            return out
        report("writing weights")
        _write_weights(partial, model)
        report("checking the export in a process without lt_train")
        check = check_export(partial, model, tokenizer, generation, dtype)
        card = model_card(metadata, model.config, dtype, check, own_code=needs_own_code(model.config))
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
def _partial_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, gone afterwards unless it was renamed. One that a killed export left is cleared away."""
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _describe(
    folder: Path, model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, dtype: torch.dtype
) -> None:
    """All that says what the weights mean: configs, tokenizer, code."""
    exported_config(model, dtype).save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if needs_own_code(model.config):
        for file in hybrid_code_files():
            shutil.copyfile(file, folder / file.name)


def _write_weights(folder: Path, model: HybridForCausalLM) -> None:
    """Not by model.save_pretrained, which writes its dtype and class into the config of the model in memory."""
    tied = list(model._tied_weights_keys or ())
    save_torch_state_dict(model.state_dict(), folder, shared_tensors_to_discard=tied)


def _sync(folder: Path) -> None:
    """The rename must not reach the disk before the files do."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
