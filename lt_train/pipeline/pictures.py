"""The pictures of a layer profile, with what the run lets stream marked on them."""

from lt_train.hybrid.spec import HybridSpec
from lt_train.pipeline.context import RunContext
from lt_train.recipe.schema import PER_PROMPT
from lt_train.selection.choose import choose_spec
from lt_train.selection.curve import draw_curve
from lt_train.selection.picture import draw_profile
from lt_train.selection.profile import LayerProfile


def draw_pictures(context: RunContext, profile: LayerProfile) -> None:
    """The scores, and with scores by gates the curve of the choice."""
    recipe, num_layers = context.recipe, profile.num_layers
    chosen = HybridSpec(num_layers, (), recipe.hybrid.w_sink, recipe.hybrid.w_recent)
    if recipe.hybrid.select != PER_PROMPT:
        chosen = choose_spec(recipe.hybrid, num_layers, context.variants.kv_heads, recipe.seed, profile)
    draw_profile(profile, chosen, context.paths.profile_picture)
    if "gates" in profile.strategies:
        draw_curve(profile, chosen, context.paths.curve_picture)
