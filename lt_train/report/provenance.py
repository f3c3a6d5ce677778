"""How a run was made: layers, seed, learning rate, data, versions, machine, and the time of each stage."""

from collections.abc import Mapping, Sequence

from lt_train.recipe.evaluations import CONVERTED
from lt_train.recipe.schema import PER_PROMPT, converted_by
from lt_train.report.contents import Run
from lt_train.runtime.units import format_duration


def provenance(run: Run) -> list[tuple[str, str]]:
    """Name and value of each property."""
    spec = run.spec(CONVERTED)
    full = [layer for layer in spec.full_in_base if not spec.is_lazy(layer) and not spec.split_heads(layer)]
    found = [("streaming layers", numbers(spec.lazy_layers)), ("full-attention layers", numbers(full))]
    if spec.sliding_layers:
        found.append((f"layers with a window of {spec.sliding_window:,} in the base", numbers(spec.sliding_layers)))
    if spec.split_layers:
        split = "; ".join(f"{layer}: {numbers(heads)}" for layer, heads in spec.split_layers)
        found.append(("streaming KV heads of other layers", split))
    if run.setting("hybrid", "select") == PER_PROMPT:
        found = [("streaming layers", "chosen by each prompt")]
    for variant in run.chosen:
        if variant != CONVERTED:
            layers = numbers(run.spec(variant).lazy_layers)
            found.append((f"streaming layers by {variant.removeprefix(converted_by(''))}", layers))
    found.append(("seed", str(run.settings.get("seed"))))
    if (learning_rate := run.setting("train", "learning_rate")) is not None:
        warmup = f", warm-up over {share:.3g} of the steps" if (share := run.setting("train", "warmup_ratio")) else ""
        found.append(("learning rate", f"{learning_rate:g}, {run.setting('train', 'lr_scheduler')}{warmup}"))
    found.append(("rows of the data", rows(run)))
    if run.profile is not None:
        fitting = f", {len(run.profile.fitting):,} skipped that fit inside the window" if run.profile.fitting else ""
        found.append(("calibration samples", f"{len(run.profile.samples):,}{fitting}"))
    if any("num_tokens" in row for row in run.log):
        last = next(row for row in reversed(run.log) if "num_tokens" in row)
        found.append(("training", f"{last['num_tokens']:,} tokens, {format_duration(last['seconds'])} in optimizer steps"))
    versions = {stage.command: ", ".join(f"{name} {version}" for name, version in stage.versions.items()) for stage in run.stages}
    found.append(("versions", by_stage(versions)))
    found.append(("machine", by_stage({stage.command: stage.machine for stage in run.stages})))
    return found


def rows(run: Run) -> str:
    """Counts of rows that were used or left out, as the last stage that read them recorded them."""
    counts = next((stage.samples for stage in reversed(run.stages) if stage.samples is not None), None)
    if counts is None:
        return "not recorded"
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def by_stage(values: Mapping[str, str]) -> str:
    """The value that all stages share, or each with its stages."""
    stages: dict[str, list[str]] = {}
    for stage, value in values.items():
        stages.setdefault(value, []).append(stage)
    if len(stages) < 2:
        return next(iter(stages), "not recorded")
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in stages.items())


def stage_times(run: Run) -> list[tuple[str, str, str]]:
    """Command, duration and end of each finished stage."""
    return [
        (stage.command, format_duration(stage.seconds), stage.finished.replace("T", " ").replace("+00:00", " UTC"))
        for stage in run.stages
    ]


def numbers(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
