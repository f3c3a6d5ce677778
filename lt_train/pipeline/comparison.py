"""`lt-train compare`: one recipe with what streams chosen in several ways, at several ratios, and what they show together.

Every cell is a run of its own, with its own folder: a killed comparison resumes, and a finished cell is not run again. The layers
are scored once, in the run that also evaluates the base; the cells name what streams.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.kv_size import kv_heads
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import load_base_config
from lt_train.pipeline.run import work
from lt_train.recipe.evaluations import BASE, CONVERTED, TRAINED
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import PER_PROMPT, Eval, Recipe
from lt_train.report.comparison import FULL, Cell, Comparison, write_comparison
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from lt_train.runtime.run_paths import RunPaths
from lt_train.selection.choose import number_by_ratio, unscored_layers
from lt_train.selection.profile import SCORED, LayerProfile

STRATEGIES = ("reach", "lazy_ratio", "periodic", "random")
RATIOS = (0.5, 0.75)
GRANULARITIES = ("layer", "kv_head")
QUICK_SAMPLES, QUICK_LIMIT = 12, 64
"""Of `--quick`: calibration samples, and problems or samples of an evaluation, at most."""

UNTRAINED = ("train=null", "lora=null", "sample=null")


@dataclass(frozen=True)
class Grid:
    """What is compared: every strategy at every ratio of streaming layers.

    Args:
        strategies: of the recipe; per_prompt, where prompts choose; full, the model with full attention, trained alike.
        quick: nothing is trained, and the samples are few.
        granularities: layer: by `strategies`. kv_head: by gates alone, as many KV heads as have the layers' KV cache; `quick` has
            them at the largest ratio, where they gain most.
    """

    strategies: tuple[str, ...] = STRATEGIES
    ratios: tuple[float, ...] = RATIOS
    quick: bool = False
    granularities: tuple[str, ...] = ("layer",)

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: a strategy that is none, or nothing to compare.
        """
        known = (*SCORED, "periodic", "random", PER_PROMPT, FULL)
        unknown = [name for name in self.strategies if name not in known]
        if unknown:
            raise UserError(f"--strategies: {unknown[0]}: no strategy. Fix: use {', '.join(known)}")
        if unknown := [name for name in self.granularities if name not in GRANULARITIES]:
            raise UserError(f"--granularities: {unknown[0]}: no granularity. Fix: use {' or '.join(GRANULARITIES)}, or both")
        if FULL in self.strategies and not self.by_head and not {*self.static} - {PER_PROMPT}:
            raise UserError(f"--strategies: {FULL}: no hybrid that it is trained as. Fix: name a strategy beside it, such as reach")
        if not self.strategies or not self.ratios or not self.granularities:
            raise UserError("compare: no strategy or no ratio is named. Fix: name some, such as --strategies reach,periodic")

    @property
    def static(self) -> list[str]:
        """The strategies that choose layers, and those that leave the choice to prompts."""
        return [strategy for strategy in self.strategies if strategy != FULL]

    @property
    def scored(self) -> list[str]:
        """The strategies that look at the model."""
        wanted = {*(self.strategies if "layer" in self.granularities else ()), *(["gates"] if self.by_head else [])}
        return [strategy for strategy in SCORED if strategy in wanted]

    @property
    def by_head(self) -> bool:
        return "kv_head" in self.granularities


def compare(recipe: Path, overrides: Sequence[str], grid: Grid, runs: Path, process: Process) -> Path:
    """Do what is missing of every cell, and write the tables and the picture; returns their folder.

    Raises:
        UserError: the recipe evaluates nothing, lets prompts choose, or cannot be used; a ratio that the model cannot have.
    """
    if process.count > 1:
        raise UserError(f"lt-train compare: runs in one process, not in {process.count}. Fix: start it without a launcher")
    given = load_recipe(recipe, overrides)
    _check(given)
    if PER_PROMPT in grid.strategies:
        _check_generates(given)
    if FULL in grid.strategies and (given.train is None or grid.quick or given.hybrid.sink == "learned"):
        raise UserError(f"--strategies: {FULL}: nothing is trained, or learned sinks are. Fix: leave it out; the base is measured")
    if grid.by_head and given.hybrid.sink == "learned":
        raise UserError("hybrid.sink: learned: single KV heads have no learned sinks. Fix: add --granularities layer")
    common = [*overrides, *(_quick_overrides(given) if grid.quick else [])]
    base_config = load_base_config(given.model)
    unturned = base_spec(base_config.to_dict(), given.hybrid.w_sink, given.hybrid.w_recent)
    of = len(unturned.full_in_base)
    counts = sorted({number_by_ratio(ratio, of) for ratio in grid.ratios})
    base = load_recipe(recipe, [*common, *_base_overrides(given, grid)])
    base_folder = work(base, "eval", runs, process)
    profile = LayerProfile.load(path) if (path := RunPaths(base_folder).layer_profile).exists() else None
    cells: list[Cell] = []
    for count in counts:
        for strategy in grid.static if "layer" in grid.granularities else ():
            layers = _chosen(strategy, count, unturned, given.seed, profile)
            spec = replace(unturned, lazy_layers=layers)
            same = next((cell for cell in cells if layers and cell.spec == spec), None)
            folder = same.run if same else runs / f"{given.name}-{strategy}-{count}of{of}"
            cells.append(Cell(strategy, spec, count, folder))
        if grid.by_head and (not grid.quick or count == counts[-1]):
            cells.append(_cell_by_head(given, count, unturned, kv_heads(base_config.to_dict()), profile, runs))
        if FULL in grid.strategies:
            alike = next(cell for cell in cells if cell.num_streaming == count and cell.spec.streams)
            folder = runs / f"{given.name}-full-as-{count}of{of}"
            cells.append(Cell(FULL, alike.spec.all_full, count, folder, trained_as=alike.spec))
    for folder in dict.fromkeys(cell.run for cell in cells):
        cell = next(cell for cell in cells if cell.run == folder)
        by_prompt = cell.strategy == PER_PROMPT
        changes = _by_prompt(load_recipe(recipe, common), cell) if by_prompt else _cell_overrides(given, grid, cell, profile)
        if cell.strategy == FULL:  # a window as long as the context hides nothing
            context = context_length(base_config.to_dict())
            changes += [f"hybrid.w_recent={context}", *_variants(given, [TRAINED])]
        work(load_recipe(recipe, [*common, *changes]), "eval", runs, process)
    return write_comparison(Comparison(given.name, base_folder, tuple(cells), profile), runs / f"{given.name}-comparison")


def _check(recipe: Recipe) -> None:
    if not recipe.eval:
        raise UserError("eval: empty, so there is nothing to compare. Fix: add evaluations, such as {benchmark: heldout_loss}")
    if recipe.hybrid.select != "static":
        raise UserError(f"hybrid.select: {recipe.hybrid.select}: compare chooses the layers. Fix: set it to static")
    for name in ("kv_budget", "max_rise"):
        if getattr(recipe.hybrid, name) is not None:
            raise UserError(f"hybrid.{name}: compare sets how many layers stream. Fix: set it to null, and use --ratios")


def _check_generates(recipe: Recipe) -> None:
    """What prompts that choose need."""
    if recipe.hybrid.sink == "learned":
        raise UserError(f"hybrid.sink: learned: prompts choose no such layers. Fix: leave {PER_PROMPT} out of --strategies")
    if not _generated(recipe):
        raise UserError(
            f"--strategies: {PER_PROMPT}: prompts choose layers for the answers that the built-in engine generates, and no "
            "evaluation does. Fix: add one, such as {benchmark: needle}, or leave it out"
        )


def _generated(recipe: Recipe) -> list[Eval]:
    """The evaluations in which the built-in engine generates answers without a draft."""
    answers = [each for each in recipe.eval if isinstance(each, Eval)]
    return [each for each in answers if each.backend == "hybrid" and each.draft is None]


def _quick_overrides(recipe: Recipe) -> list[str]:
    samples = min(recipe.hybrid.calibration.samples, QUICK_SAMPLES)
    limits = [f"eval.{at}.limit={min(each.limit or QUICK_LIMIT, QUICK_LIMIT)}" for at, each in enumerate(recipe.eval)]
    return [*UNTRAINED, f"hybrid.calibration.samples={samples}", *limits]


def _base_overrides(recipe: Recipe, grid: Grid) -> list[str]:
    """The run that scores the layers by every strategy that looks at the model, and evaluates the base."""
    first, *others = grid.scored or ["periodic"]
    return [
        f"name={recipe.name}-base",
        *("hybrid.layers=null", "hybrid.streaming_kv_heads=null", "hybrid.granularity=layer"),
        *(f"hybrid.strategy={first}", f"hybrid.compare=[{', '.join(others)}]"),
        f"hybrid.lazy_layer_ratio={grid.ratios[0]}",
        *UNTRAINED,
        *_variants(recipe, [BASE]),
    ]


def _cell_by_head(recipe: Recipe, count: int, base: HybridSpec, kv_heads: int, profile: LayerProfile | None, runs: Path) -> Cell:
    """With the KV heads that have the KV cache of `count` layers."""
    assert profile is not None, "the base's run scores by gates"
    heads_L, hybrid = profile.choose_heads(count * kv_heads), recipe.hybrid
    spec = HybridSpec.from_streaming_heads(heads_L, kv_heads, hybrid.w_sink, hybrid.w_recent).on(base)
    folder = runs / f"{recipe.name}-gates-{count * kv_heads}of{len(spec.full_in_base) * kv_heads}heads"
    return Cell("gates", spec, count, folder, by_head=True)


def _cell_overrides(recipe: Recipe, grid: Grid, cell: Cell, profile: LayerProfile | None) -> list[str]:
    trains, spec = recipe.train is not None and not grid.quick, cell.trained_as or cell.spec
    chosen = [f"hybrid.layers={list(spec.lazy_layers)}", "hybrid.streaming_kv_heads=null", "hybrid.granularity=layer"]
    if spec.split_layers and profile is not None:
        heads_L = [list(heads) for heads in spec.streaming_heads(profile.kv_heads)]
        chosen = ["hybrid.layers=null", f"hybrid.streaming_kv_heads={heads_L}", "hybrid.granularity=kv_head"]
    return [
        f"name={cell.run.name}",
        *(*chosen, "hybrid.strategy=null", "hybrid.compare=[]", "hybrid.lazy_layer_ratio=null"),
        *_variants(recipe, [CONVERTED, TRAINED] if trains else [CONVERTED]),
    ]


def _by_prompt(recipe: Recipe, cell: Cell) -> list[str]:
    """Untrained, and measured on generated answers alone."""
    evaluations = [each.model_dump(mode="json") | {"variants": [CONVERTED]} for each in _generated(recipe)]
    return [
        f"name={cell.run.name}",
        *("hybrid.layers=null", "hybrid.streaming_kv_heads=null", "hybrid.granularity=layer", "hybrid.strategy=null"),
        *(f"hybrid.select={PER_PROMPT}", "hybrid.compare=[]"),
        f"hybrid.lazy_layer_ratio={cell.num_streaming / len(cell.spec.full_in_base)}",
        *UNTRAINED,
        f"eval={json.dumps(evaluations)}",
    ]


def _variants(recipe: Recipe, variants: Sequence[str]) -> list[str]:
    return [f"eval.{at}.variants=[{', '.join(variants)}]" for at in range(len(recipe.eval))]


def _chosen(strategy: str, count: int, base: HybridSpec, seed: int, profile: LayerProfile | None) -> tuple[int, ...]:
    """None where prompts choose."""
    if strategy == PER_PROMPT:
        return ()
    if strategy in ("periodic", "random"):
        return unscored_layers(strategy, count, base, seed)
    assert profile is not None, "the base's run scores by every strategy that scores"
    return profile.choose(strategy, count)
