"""Choose the layers or KV heads that stream, and fit learned sinks where the recipe has them.

Leaves the hybrid's config and the sinks; no weights are copied: the base's load straight into it.
"""

from lt_train.hybrid.loading import hybrid_config
from lt_train.inference.loading import load_for_inference
from lt_train.inference.sinks_file import write_sinks
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.keys import choice_key
from lt_train.pipeline.pictures import draw_pictures
from lt_train.recipe.evaluations import CONVERTED
from lt_train.recipe.schema import PER_PROMPT
from lt_train.runtime.devices import release_memory
from lt_train.runtime.errors import UserError
from lt_train.selection.calibration import samples_beyond_window
from lt_train.selection.chosen import describe_streaming, list_streaming
from lt_train.training.sink_fitting import FIRST_TOKENS, fit_sinks

NAME = "hybrid"
NEEDS: tuple[str, ...] = ("profile",)


def is_wanted(context: RunContext) -> bool:
    return True


def is_done(context: RunContext) -> bool:
    return context.folder.is_done(NAME, choice_key(context.recipe)) and context.variants.are_chosen()


def describe(context: RunContext) -> str:
    hybrid = context.recipe.hybrid
    if hybrid.layers is not None:
        return f"convert ({len(hybrid.layers)} layers)"
    if hybrid.streaming_kv_heads is not None:
        return f"convert ({sum(map(len, hybrid.streaming_kv_heads))} KV heads)"
    if hybrid.kv_budget is not None:
        return f"convert (to {hybrid.kv_budget:.0%} of the KV cache)"
    if hybrid.max_rise is not None:
        return f"convert (to a predicted rise of {hybrid.max_rise:g} nats)"
    chosen = ", by each prompt" if hybrid.select == PER_PROMPT else ""
    units = "layers" if hybrid.granularity == "layer" else "KV heads"
    return f"convert ({hybrid.lazy_layer_ratio:.0%} of the {units}{chosen})"


def check(context: RunContext) -> None:
    """
    Raises:
        UserError: the recipe does not fit this model, or its granularity is not that of the training that the folder holds.
    """
    context.check_fits()
    if _is_of_another_granularity(context) and context.paths.train.exists():
        raise UserError(
            f"hybrid.granularity: {context.recipe.hybrid.granularity}: {context.paths.train} was trained while others streamed. "
            "Fix: give this recipe another name (--set name=…), or delete that folder"
        )


def _is_of_another_granularity(context: RunContext) -> bool:
    """Whether this stage was finished before the recipe's granularity was changed."""
    return context.folder.is_marked(NAME) and context.folder.marker(NAME).get("key", "") != choice_key(context.recipe)


def run(context: RunContext) -> None:
    profile = context.layer_profile
    if profile is not None and _is_of_another_granularity(context):
        draw_pictures(context, profile)
    with context.folder.doing(NAME, choice_key(context.recipe)):
        context.variants.choose(profile)
        if context.recipe.hybrid.sink == "learned":
            for variant in context.variants.converted():
                if not context.paths.sinks(variant).exists():
                    _fit_sinks(context, variant)
        spec = context.variants.spec(CONVERTED)
        hybrid_config(context.base_config, spec).save_pretrained(context.paths.hybrid)
    if (by_prompt := context.variants.per_prompt(CONVERTED)) is not None:
        count = spec.num_layers - by_prompt.keep
        context.report("convert", f"{count} of {spec.num_layers} layers stream in each answer, chosen by its prompt")
        return
    strategy, streaming = context.recipe.hybrid.strategy, describe_streaming(spec, context.variants.kv_heads)
    chosen = "named in the recipe" if strategy is None else f"chosen by {strategy}"
    if strategy == "gates" and profile is not None:
        chosen += f" (predicted rise on long-reach tokens {profile.predicted_rise(spec):.3g} nats)"
    context.report("convert", f"{streaming}, {chosen}: {list_streaming(spec)}")


def _fit_sinks(context: RunContext, variant: str) -> None:
    recipe, calibration = context.recipe, context.recipe.hybrid.calibration
    spec = context.variants.spec(variant)
    usable, _ = samples_beyond_window(context.calibration, FIRST_TOKENS, spec.w_recent)
    context.report("convert", f"fitting the learned sinks of {variant}: {calibration.sink_steps} steps")
    model = load_for_inference(recipe.model, spec, context.dtype, others_wait=True)
    fitted = fit_sinks(model, usable, steps=calibration.sink_steps, learning_rate=calibration.sink_learning_rate)
    write_sinks(model, context.paths.sinks(variant))
    del model
    release_memory()  # before the other ranks, which wait for the hybrid, load theirs
    if fitted.first is not None and fitted.last is not None:
        course = f"loss {fitted.first:.3f} in the first quarter of the steps, {fitted.last:.3f} in the last"
        context.report("convert", f"{fitted.logits:,} logits fitted: {course}")
