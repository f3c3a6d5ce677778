"""Score the layers by every strategy that the recipe names and that looks at the model. Leaves the layer profile."""

from collections.abc import Iterator

from lt_train.inference.loading import load_for_inference
from lt_train.pipeline.context import RunContext
from lt_train.recipe.evaluations import BASE
from lt_train.recipe.schema import PER_PROMPT
from lt_train.runtime.devices import release_memory
from lt_train.selection.choose import choose_layers, number_that_stream
from lt_train.selection.curve import draw_curve
from lt_train.selection.gates import describe_sum_of_shares
from lt_train.selection.picture import draw_profile
from lt_train.selection.profile import SCORED, LayerProfile, profile_layers
from lt_train.selection.stability import describe_stability

NAME = "profile"
NEEDS: tuple[str, ...] = ()


def is_wanted(context: RunContext) -> bool:
    return bool(_strategies(context))


def is_done(context: RunContext) -> bool:
    return context.folder.is_done(NAME)


def describe(context: RunContext) -> str:
    samples = context.recipe.hybrid.calibration.samples
    return f"profile ({context.base_config.num_hidden_layers} layers by {', '.join(_strategies(context))}, {samples} samples)"


def check(context: RunContext) -> None:
    context.variants.check_fits()
    context.check_attention()


def run(context: RunContext) -> None:
    strategies = _strategies(context)
    context.report(NAME, f"scoring the layers of {context.recipe.model.base} by {', '.join(strategies)}")
    with context.folder.doing(NAME, samples=context.examples.counts):
        profile = _score_layers(context, strategies)
        _draw(context, profile)
        release_memory()  # before the other ranks, which wait for the hybrid, load theirs
    for line in _findings(profile, number_that_stream(context.recipe.hybrid, profile.num_layers, profile)):
        context.report(NAME, line)


def _draw(context: RunContext, profile: LayerProfile) -> None:
    """The scores and the curve of the choice, with the layers that this recipe lets stream."""
    hybrid, paths = context.recipe.hybrid, context.paths
    by_prompt = hybrid.select == PER_PROMPT
    chosen = () if by_prompt else choose_layers(hybrid, profile.num_layers, context.recipe.seed, profile)
    draw_profile(profile, chosen, paths.profile_picture)
    if "gates" in profile.strategies:
        draw_curve(profile, chosen, paths.curve_picture)


def _findings(profile: LayerProfile, n_layers: int) -> Iterator[str]:
    """What a user has to know of the scores before relying on them."""
    if profile.fitting:
        yield f"{len(profile.fitting)} samples fit inside the window and were skipped: they distinguish no layers"
    if "gates" in profile.strategies:
        yield describe_sum_of_shares(profile.mean_sum_of_shares, profile.mean_all_streaming("gates"))
    for strategy in profile.strategies:
        yield from describe_stability(strategy, profile.stability(strategy, n_layers))


def _score_layers(context: RunContext, strategies: list[str]) -> LayerProfile:
    recipe = context.recipe
    calibration = context.calibration  # before the model is loaded
    model = load_for_inference(recipe.model, context.variants.spec(BASE), context.dtype, others_wait=True)
    return profile_layers(model, calibration, recipe.hybrid, strategies, out=context.paths.profile)


def _strategies(context: RunContext) -> list[str]:
    hybrid = context.recipe.hybrid
    return [name for name in (hybrid.strategy, *hybrid.compare) if name in SCORED]
