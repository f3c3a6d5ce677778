"""Write the hybrid as a checkpoint that loads without lt_train, and check that it does."""

from pathlib import Path

import torch

from lt_train.export.checkpoint import export_hybrid
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.keys import export_key
from lt_train.pipeline.provenance import export_metadata
from lt_train.recipe.evaluations import CONVERTED, TRAINED
from lt_train.runtime.files import set_aside

NAME = "export"
NEEDS: tuple[str, ...] = ("eval",)


def is_wanted(context: RunContext) -> bool:
    return True


def is_done(context: RunContext) -> bool:
    return context.folder.is_done(NAME, export_key(context.recipe, context.paths))


def describe(context: RunContext) -> str:
    return f"export (to {context.paths.export})"


def check(context: RunContext) -> None:
    pass


def run(context: RunContext) -> None:
    recipe, out = context.recipe, context.paths.export
    if context.folder.is_marked(NAME):  # finished with other settings, weights or scores
        context.report(NAME, f"the former export now lies in {set_aside(out)}")
    exported = CONVERTED if recipe.train is None else TRAINED
    context.report(NAME, f"writing the {exported} hybrid to {out}")
    template = recipe.prompt.chat_template
    with context.folder.doing(NAME, export_key(recipe, context.paths)):
        export_hybrid(
            context.variants.load(exported, torch.float32),
            context.tokenizer,
            out,
            export_metadata(recipe, context.paths.root, context.examples.counts),
            dtype=_dtype(context),
            chat_template=Path(template).read_text(encoding="utf-8") if template else None,
            report=lambda line: context.report(NAME, line),
        )


def _dtype(context: RunContext) -> torch.dtype:
    if context.recipe.export.dtype == "auto":
        dtype = context.base_config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[context.recipe.export.dtype]
