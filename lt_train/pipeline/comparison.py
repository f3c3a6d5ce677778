"""`lt-train compare`: one recipe with its layers chosen by several strategies, at several ratios, and what they show together.

Every cell is a run of its own, with its own folder: a killed comparison resumes, and a finished cell is not run again. The layers
are scored once, in the run that also evaluates the base; the cells name their layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lt_train.inference.loading import load_base_config
from lt_train.pipeline.run import work
from lt_train.recipe.evaluations import BASE, CONVERTED, TRAINED
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.report.comparison import Cell, Comparison, write_comparison
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from lt_train.runtime.run_paths import RunPaths
from lt_train.selection.choose import number_by_ratio
from lt_train.selection.periodic import periodic_layers
from lt_train.selection.profile import SCORED, LayerProfile
from lt_train.selection.random import random_layers

STRATEGIES = ("reach", "lazy_ratio", "periodic", "random")
RATIOS = (0.5, 0.75)
QUICK_SAMPLES, QUICK_LIMIT = 12, 64
"""Of `--quick`: calibration samples, and problems or samples of an evaluation, at most."""

UNTRAINED = ("train=null", "lora=null", "sample=null")


@dataclass(frozen=True)
class Grid:
    """What is compared: every strategy at every ratio of streaming layers.

    Args:
        quick: nothing is trained, and the samples are few.
    """

    strategies: tuple[str, ...] = STRATEGIES
    ratios: tuple[float, ...] = RATIOS
    quick: bool = False

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: a strategy that is none, or nothing to compare.
        """
        known = (*SCORED, "periodic", "random")
        unknown = [name for name in self.strategies if name not in known]
        if unknown:
            raise UserError(f"--strategies: {unknown[0]}: no strategy. Fix: use {', '.join(known)}")
        if not self.strategies or not self.ratios:
            raise UserError("compare: no strategy or no ratio is named. Fix: name some, such as --strategies reach,periodic")


def compare(recipe: Path, overrides: Sequence[str], grid: Grid, runs: Path, process: Process) -> Path:
    """Do what is missing of every cell, and write the tables and the picture; returns their folder.

    Raises:
        UserError: the recipe evaluates nothing, lets prompts choose, or cannot be used; a ratio that the model cannot have.
    """
    if process.count > 1:
        raise UserError(f"lt-train compare: runs in one process, not in {process.count}. Fix: start it without a launcher")
    given = load_recipe(recipe, overrides)
    _check(given)
    common = [*overrides, *(_quick_overrides(given) if grid.quick else [])]
    num_layers = load_base_config(given.model).num_hidden_layers
    counts = sorted({number_by_ratio(ratio, num_layers) for ratio in grid.ratios})
    base = load_recipe(recipe, [*common, *_base_overrides(given, grid)])
    base_folder = work(base, "eval", runs, process)
    profile = LayerProfile.load(path) if (path := RunPaths(base_folder).layer_profile).exists() else None
    cells: list[Cell] = []
    for count in counts:
        for strategy in grid.strategies:
            layers = _chosen(strategy, count, num_layers, given.seed, profile)
            same = next((cell for cell in cells if cell.layers == layers), None)
            folder = same.run if same else runs / f"{given.name}-{strategy}-{count}of{num_layers}"
            cells.append(Cell(strategy, layers, num_layers, folder))
    for folder in dict.fromkeys(cell.run for cell in cells):
        layers = next(cell.layers for cell in cells if cell.run == folder)
        work(load_recipe(recipe, [*common, *_cell_overrides(given, grid, folder.name, layers)]), "eval", runs, process)
    return write_comparison(Comparison(given.name, base_folder, tuple(cells), profile), runs / f"{given.name}-comparison")


def _check(recipe: Recipe) -> None:
    if not recipe.eval:
        raise UserError("eval: empty, so there is nothing to compare. Fix: add evaluations, such as {benchmark: heldout_loss}")
    if recipe.hybrid.select != "static":
        raise UserError(f"hybrid.select: {recipe.hybrid.select}: compare chooses the layers. Fix: set it to static")
    for name in ("kv_budget", "max_rise"):
        if getattr(recipe.hybrid, name) is not None:
            raise UserError(f"hybrid.{name}: compare sets how many layers stream. Fix: set it to null, and use --ratios")


def _quick_overrides(recipe: Recipe) -> list[str]:
    samples = min(recipe.hybrid.calibration.samples, QUICK_SAMPLES)
    limits = [f"eval.{at}.limit={min(each.limit or QUICK_LIMIT, QUICK_LIMIT)}" for at, each in enumerate(recipe.eval)]
    return [*UNTRAINED, f"hybrid.calibration.samples={samples}", *limits]


def _base_overrides(recipe: Recipe, grid: Grid) -> list[str]:
    """The run that scores the layers by every strategy that looks at the model, and evaluates the base."""
    scored = [strategy for strategy in SCORED if strategy in grid.strategies]
    first, others = (scored[0], scored[1:]) if scored else ("periodic", [])
    return [
        f"name={recipe.name}-base",
        *("hybrid.layers=null", f"hybrid.strategy={first}", f"hybrid.compare=[{', '.join(others)}]"),
        f"hybrid.lazy_layer_ratio={grid.ratios[0]}",
        *UNTRAINED,
        *_variants(recipe, [BASE]),
    ]


def _cell_overrides(recipe: Recipe, grid: Grid, name: str, layers: Sequence[int]) -> list[str]:
    trains = recipe.train is not None and not grid.quick
    return [
        f"name={name}",
        *(f"hybrid.layers={list(layers)}", "hybrid.strategy=null", "hybrid.compare=[]", "hybrid.lazy_layer_ratio=null"),
        *_variants(recipe, [CONVERTED, TRAINED] if trains else [CONVERTED]),
    ]


def _variants(recipe: Recipe, variants: Sequence[str]) -> list[str]:
    return [f"eval.{at}.variants=[{', '.join(variants)}]" for at in range(len(recipe.eval))]


def _chosen(strategy: str, count: int, num_layers: int, seed: int, profile: LayerProfile | None) -> tuple[int, ...]:
    if strategy == "periodic":
        return periodic_layers(count, num_layers)
    if strategy == "random":
        return random_layers(count, num_layers, seed)
    assert profile is not None, "the base's run scores by every strategy that scores"
    return profile.choose(strategy, count)
