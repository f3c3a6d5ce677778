"""Draw answers by the recipe's `sample` part, and write the correct ones as training data. No run needs this stage."""

from lt_train.evaluation.records import RecordFolder
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.rejection_sampling import select_traces, write_traces
from lt_train.recipe.evaluations import BASE, CONVERTED
from lt_train.recipe.schema import Sample
from lt_train.runtime.errors import UserError


def needs(sample: Sample) -> str | None:
    """The stage that leaves the variant to draw from; None: the base needs none."""
    (variant,) = sample.variants or [BASE]
    return {BASE: None, CONVERTED: "hybrid"}.get(variant, "train")


def settings(context: RunContext) -> Sample:
    """
    Raises:
        UserError: the recipe has no `sample` part.
    """
    if context.recipe.sample is None:
        raise UserError("sample: missing in this recipe. Fix: add a `sample` part: which problems, how many answers, what to keep")
    return context.recipe.sample


def run(context: RunContext) -> None:
    sample = settings(context)
    (variant,) = sample.variants or [BASE]
    context.check_attention()
    context.report("sample", f"{variant}: {sample.samples} answers to each problem of {sample.benchmark}")
    out = context.paths.sample(variant, str(sample.name))
    plan = context.evaluations.measure_answers(sample, variant, context.variants.load(variant, context.dtype), out)
    records = RecordFolder(out, plan.fingerprint).read()
    selection = select_traces([records[key] for key in plan.keys if key in records], sample)
    write_traces(out, selection, plan.questions)
    context.report("sample", ", ".join(f"{name} {count:,}" for name, count in selection.counts.items()))
    context.report("sample", f"to train on them: data.source: {out / 'traces.jsonl'}, data.format: prompt_response")
