"""Score the layers by every strategy that the recipe names and that looks at the model. Leaves the layer profile."""

from collections.abc import Iterator

from lt_train.inference.loading import load_for_inference
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.pictures import draw_pictures
from lt_train.recipe.evaluations import BASE
from lt_train.runtime.devices import release_memory
from lt_train.selection.choose import number_that_stream
from lt_train.selection.gates import describe_sum_of_shares
from lt_train.selection.profile import SCORED, LayerProfile
from lt_train.selection.scoring import profile_layers
from lt_train.selection.stability import describe_stability

NAME = "profile"
NEEDS: tuple[str, ...] = ()


def is_wanted(context: RunContext) -> bool:
    return bool(_strategies(context))


def is_done(context: RunContext) -> bool:
    return context.folder.is_done(NAME) and not _missing(context)


def describe(context: RunContext) -> str:
    samples = context.recipe.hybrid.calibration.samples
    layers = len(context.variants.spec(BASE).full_in_base)
    return f"profile ({layers} layers by {', '.join(_missing(context) or _strategies(context))}, {samples} samples)"


def check(context: RunContext) -> None:
    context.check_fits()
    context.check_attention()


def run(context: RunContext) -> None:
    profile, missing = context.layer_profile, _missing(context)
    with context.folder.doing(NAME, samples=context.examples.counts):
        if missing:
            context.report(NAME, f"scoring the layers of {context.recipe.model.base} by {', '.join(missing)}")
            profile = _score_layers(context, missing, profile)
            release_memory()  # before the other ranks, which wait for the hybrid, load theirs
        assert profile is not None, "no strategy is missing in it"
        draw_pictures(context, profile)
        profile.save(context.paths.layer_profile)
    for line in _findings(context, profile):
        context.report(NAME, line)


def _findings(context: RunContext, profile: LayerProfile) -> Iterator[str]:
    """Caveats of the scores, in words."""
    hybrid, kv_heads = context.recipe.hybrid, context.variants.kv_heads
    if profile.fitting:
        yield f"{len(profile.fitting)} samples fit inside the window and were skipped: they distinguish no layers"
    if "gates" in profile.strategies:
        points = [sample.gate_points for sample in profile.samples]
        yield describe_sum_of_shares(profile.mean_sum_of_shares, profile.mean_all_streaming("gates"), points)
    if hybrid.granularity == "kv_head" and hybrid.strategy is not None:
        n_heads = number_that_stream(hybrid, context.variants.spec(BASE), kv_heads, profile)
        yield from describe_stability(hybrid.strategy, profile.stability_of_heads(n_heads))
    n_layers = context.variants.number_of_layers(profile)
    for strategy in profile.strategies if hybrid.granularity == "layer" else hybrid.compare:
        if strategy in SCORED:
            yield from describe_stability(strategy, profile.stability(strategy, n_layers))


def _score_layers(context: RunContext, strategies: list[str], before: LayerProfile | None) -> LayerProfile:
    """Score by strategies that are not in the profile of `before`, in a folder of their own, and add the scores to it."""
    recipe, out = context.recipe, context.paths.profile
    calibration = context.calibration  # before the model is loaded
    model = load_for_inference(recipe.model, context.variants.spec(BASE), context.dtype, others_wait=True)
    if before is None:
        return profile_layers(model, calibration, recipe.hybrid, strategies, out=out)
    added = profile_layers(model, calibration, recipe.hybrid, strategies, out=out / "-".join(strategies))
    return before.joined(added, str(context.paths.layer_profile))


def _missing(context: RunContext) -> list[str]:
    """The strategies by which the layers are not scored yet."""
    profile = context.layer_profile
    return [strategy for strategy in _strategies(context) if profile is None or strategy not in profile.strategies]


def _strategies(context: RunContext) -> list[str]:
    hybrid = context.recipe.hybrid
    return [name for name in dict.fromkeys((hybrid.strategy, *hybrid.compare)) if name in SCORED]
