"""The pictures of a layer profile, with what the run lets stream marked on them."""

from lt_train.pipeline.context import RunContext
from lt_train.recipe.evaluations import BASE
from lt_train.recipe.schema import PER_PROMPT
from lt_train.selection.choose import choose_spec
from lt_train.selection.profile import LayerProfile


def draw_pictures(context: RunContext, profile: LayerProfile) -> None:
    """The scores, and with scores by gates the curve of the choice."""
    from lt_train.selection.curve import draw_curve  # both load matplotlib
    from lt_train.selection.picture import draw_profile

    recipe, chosen = context.recipe, context.variants.spec(BASE)
    if recipe.hybrid.select != PER_PROMPT:
        chosen = choose_spec(recipe.hybrid, chosen, context.variants.kv_heads, recipe.seed, profile)
    draw_profile(profile, chosen, context.paths.profile_picture)
    if "gates" in profile.strategies:
        draw_curve(profile, chosen, context.paths.curve_picture)
