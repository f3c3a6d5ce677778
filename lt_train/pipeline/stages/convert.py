"""Choose the layers that stream. Leaves the hybrid's config; no weights are copied: the base's load straight into it."""

from lt_train.hybrid.loading import hybrid_config
from lt_train.pipeline.context import RunContext
from lt_train.recipe.evaluations import CONVERTED
from lt_train.selection.picture import draw_profile

NAME = "hybrid"
NEEDS: tuple[str, ...] = ("profile",)


def is_wanted(context: RunContext) -> bool:
    return True


def is_done(context: RunContext) -> bool:
    return context.folder.is_done(NAME)


def describe(context: RunContext) -> str:
    hybrid = context.recipe.hybrid
    return f"convert ({len(hybrid.layers)} layers)" if hybrid.layers else f"convert ({hybrid.lazy_layer_ratio:.0%} of the layers)"


def check(context: RunContext) -> None:
    context.variants.check_fits()


def run(context: RunContext) -> None:
    profile = context.layer_profile
    with context.folder.doing(NAME):
        context.variants.choose(profile)
        spec = context.variants.spec(CONVERTED)
        hybrid_config(context.base_config, spec).save_pretrained(context.paths.hybrid)
        if profile is not None:
            draw_profile(profile, spec.lazy_layers, context.paths.profile_picture)
    hybrid = context.recipe.hybrid
    chosen = f"chosen by {hybrid.strategy}" if hybrid.layers is None else "named in the recipe"
    layers = ", ".join(map(str, spec.lazy_layers))
    context.report("convert", f"{len(spec.lazy_layers)} of {spec.num_layers} layers stream, {chosen}: {layers}")
