"""Write the hybrid as a checkpoint that loads without lt_train, check that it does, and push it to the hub if the recipe does."""

from pathlib import Path

import torch

from lt_train.dataset.chat_template import ChatTemplate, own_template
from lt_train.export.checkpoint import export_hybrid
from lt_train.export.code_files import check_exportable
from lt_train.export.push import check_push, push_export
from lt_train.export.weights import ExportedHybrid, MergedWeights, NotOnDisk, WeightFiles, base_files, files_by_name, in_memory
from lt_train.inference.loading import empty_checkpoint, empty_hybrid
from lt_train.inference.trained_weights import adapter_without_query_key, restored_weights
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.keys import export_key
from lt_train.pipeline.provenance import export_metadata
from lt_train.recipe.evaluations import CONVERTED, TRAINED
from lt_train.recipe.schema import PER_PROMPT
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import set_aside
from lt_train.runtime.fingerprints import file_hash
from lt_train.runtime.run_paths import EXPORT_MANIFEST
from lt_train.runtime.sources import resolve_model

NAME = "export"
NEEDS: tuple[str, ...] = ("eval",)


def is_wanted(context: RunContext) -> bool:
    return context.recipe.hybrid.select != PER_PROMPT


def is_done(context: RunContext) -> bool:
    return _is_written(context) and (context.recipe.export.push is None or _pushed(context) == _to_push(context))


def describe(context: RunContext) -> str:
    push = context.recipe.export.push
    to_hub = f", and push it to {push}" if push else ""
    return f"push the export to {push}" if push and _is_written(context) else f"export (to {context.paths.export}{to_hub})"


def check(context: RunContext) -> None:
    check_exportable(context.base_config)
    if context.recipe.export.push is not None:
        check_push(context.recipe.export.push)


def run(context: RunContext) -> None:
    if not _is_written(context):
        _write(context)
    push = context.recipe.export.push
    if push is not None:
        context.report(NAME, f"pushing to {push}")
        push_export(context.paths.export, push, lambda line: context.report(NAME, line))
        context.folder.note(NAME, pushed=_to_push(context))


def _is_written(context: RunContext) -> bool:
    return context.folder.is_done(NAME, export_key(context.recipe, context.paths))


def _to_push(context: RunContext) -> list[str]:
    """The repository, and the hash of the manifest, which has that of every file."""
    manifest = context.paths.export / EXPORT_MANIFEST
    return [str(context.recipe.export.push), file_hash(manifest) if manifest.is_file() else ""]


def _pushed(context: RunContext) -> list[str] | None:
    pushed: list[str] | None = context.folder.marker(NAME).get("pushed")
    return pushed


def _write(context: RunContext) -> None:
    recipe, out = context.recipe, context.paths.export
    if context.folder.is_marked(NAME):  # finished with other settings, weights or scores
        context.report(NAME, f"the previous export is now in {set_aside(out)}")
    exported = CONVERTED if recipe.train is None else TRAINED
    context.report(NAME, f"writing the {exported} hybrid to {out}")
    with context.folder.doing(NAME, export_key(recipe, context.paths)):
        export_hybrid(
            _hybrid(context, exported),
            context.tokenizer,
            out,
            export_metadata(recipe, context.paths.root, context.examples.counts, _default_system_turn(context)),
            dtype=_dtype(context),
            max_shard_size=recipe.export.max_shard_size,
            chat_template=own_template(recipe.prompt),
            report=lambda line: context.report(NAME, line),
        )


def _default_system_turn(context: RunContext) -> str:
    """That of the chat template; nothing where the run has no prompts, or has a system turn of its own."""
    recipe = context.recipe
    if recipe.prompt.system is not None or not (recipe.prompt.chat_template or context.tokenizer.chat_template):
        return ""
    try:
        return ChatTemplate(context.tokenizer, recipe.prompt).default_system_turn
    except UserError:  # then no prompt was made by it
        return ""


def _hybrid(context: RunContext, exported: str) -> ExportedHybrid:
    """The hybrid with weights from their files where that is possible, else in memory."""
    try:
        return hybrid_on_disk(context, exported)
    except NotOnDisk as reason:
        context.report(NAME, f"the model is loaded into memory: {reason}")
        return in_memory(context.variants.load(exported, torch.float32))


def hybrid_on_disk(context: RunContext, exported: str) -> ExportedHybrid:
    """
    Raises:
        NotOnDisk: the model must be loaded into memory.
    """
    recipe, variants, paths = context.recipe, context.variants, context.paths
    spec, sinks = variants.spec(exported), variants.sinks(exported)
    skeleton = empty_hybrid(recipe.model, spec, context.base_config)
    full = exported == TRAINED and recipe.lora is None
    restores = recipe.train is not None and recipe.train.restore_query_key
    files: dict[str, Path] = {}
    if not full or restores:
        files |= files_by_name(base_files(resolve_model(recipe.model.base), recipe.model.revision))
    if sinks is not None and not full:
        files |= files_by_name([sinks])
    if full:
        trained = files_by_name(sorted(paths.trained.glob("*.safetensors")))
        kept = restored_weights(spec) if restores else None
        files |= {name: path for name, path in trained.items() if not (kept and kept.search(name))}
        if not restores:
            skeleton = empty_checkpoint(paths.trained)
    weights = WeightFiles(files)
    weights.check_fits(skeleton)
    if exported == TRAINED and not full:
        config = adapter_without_query_key(paths.trained, spec) if restores else None
        merged = MergedWeights(weights, empty_hybrid(recipe.model, spec, context.base_config), paths.trained, config)
        return ExportedHybrid(skeleton, merged.read, lambda: variants.load(exported, torch.float32), torch.float32)
    dtype = _dtype(context)
    return ExportedHybrid(skeleton, weights.read, lambda: variants.load(exported, dtype), dtype)


def _dtype(context: RunContext) -> torch.dtype:
    if context.recipe.export.dtype == "auto":
        dtype = context.base_config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[context.recipe.export.dtype]
