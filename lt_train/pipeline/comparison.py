"""`lt-train compare`: one recipe with several choices of what streams, at several ratios, and their results together.

Every cell is a run of its own, with its own folder: a killed comparison resumes, and a finished cell is not run again. The layers
are scored once for each seed, in the run that also evaluates the base; the cells name what streams.
"""

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.kv_size import kv_heads
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import load_base_config
from lt_train.pipeline.run import work
from lt_train.pipeline.run_folder import recipe_of
from lt_train.recipe.evaluations import BASE, CONVERTED, TRAINED
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import FULL, PER_PROMPT, Eval, Grid, Hybrid, Recipe
from lt_train.report.comparison import write_comparison
from lt_train.report.comparison_cells import Cell, Comparison
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from lt_train.runtime.run_paths import RunPaths
from lt_train.selection.choose import choose_spec, number_by_ratio, unscored_layers
from lt_train.selection.profile import SCORED, LayerProfile

QUICK_SAMPLES, QUICK_LIMIT = 16, 64
"""Of `--quick`: calibration samples, and problems or samples of an evaluation, at most."""

UNTRAINED = ("train=null", "lora=null", "sample=null")


@dataclass(frozen=True)
class Task:
    """One seed's comparison.

    Attributes:
        overrides: of the recipe file, for all its cells.
        recipe: with these.
        quick: nothing is trained, and the samples are few; KV heads are compared at the largest ratio alone, where they gain most.
    """

    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    grid: Grid
    quick: bool
    runs: Path
    process: Process

    def load(self, changes: Sequence[str]) -> Recipe:
        """The recipe of a run, which has no grid."""
        return load_recipe(self.path, [*self.overrides, "grid=null", *changes])

    def work(self, changes: Sequence[str]) -> Path:
        return work(self.load(changes), "eval", self.runs, self.process)

    @property
    def trains(self) -> bool:
        return self.recipe.train is not None

    @property
    def trainings(self) -> Sequence[str | None]:
        """How each hybrid is trained; None: as the recipe sets."""
        return self.grid.trainings if self.trains and self.grid.trainings else [None]

    @property
    def scored(self) -> list[str]:
        """The strategies that look at the model."""
        wanted = {*(self.grid.strategies if "layer" in self.grid.granularities else ()), *(["gates"] if self.grid.by_head else [])}
        return [strategy for strategy in SCORED if strategy in wanted]

    @cached_property
    def base_config(self) -> dict[str, Any]:
        return load_base_config(self.recipe.model).to_dict()

    @property
    def base(self) -> HybridSpec:
        """Nothing streams but what slides in the base."""
        return base_spec(self.base_config, self.recipe.hybrid.w_sink, self.recipe.hybrid.w_recent)

    @property
    def counts(self) -> list[int]:
        """How many layers stream."""
        return sorted({number_by_ratio(ratio, len(self.base.full_in_base)) for ratio in self.grid.ratios})

    @property
    def kv_heads(self) -> int:
        return kv_heads(self.base_config)


def compare(recipe: Path, overrides: Sequence[str], quick: bool, runs: Path, process: Process) -> Path:
    """Do what is missing of every cell, write the tables and the picture, and print what they show; returns their folder.

    With several seeds each has a comparison of its own, `<name>-seed<N>`, and the one that is returned shows them together.

    Raises:
        UserError: the recipe evaluates nothing, lets prompts choose, or cannot be used; a ratio that the model cannot have.
    """
    if process.count > 1:
        raise UserError(f"lt-train compare: runs in one process, not in {process.count}. Fix: start it without a launcher")
    given = load_recipe(recipe, overrides)
    grid, name = given.grid or Grid(), f"{given.name}-quick" if quick else given.name
    _check(given, grid, quick)
    common = (*overrides, *(_quick_overrides(given) if quick else []), f"name={name}")
    seeds = () if quick else tuple((f"seed={seed}", f"name={name}-seed{seed}") for seed in grid.seeds)
    comparisons = []
    for seed in seeds or ((),):
        changes = (*common, *seed)
        comparisons.append(_compare(Task(recipe, changes, load_recipe(recipe, changes), grid, quick, runs, process)))
        if seed:
            write_comparison(comparisons[-1:], comparisons[-1].name, runs / f"{comparisons[-1].name}-comparison")
    parts = write_comparison(comparisons, name, out := runs / f"{name}-comparison")
    for part in parts:
        Console().print("\n".join([f"{part.evaluation}: {part.subject}", *part.findings]), markup=False, highlight=False)
    return out


def _compare(task: Task) -> Comparison:
    """Do what is missing of every cell with one seed."""
    counts = task.counts
    base_run = task.work(_base_overrides(task))
    profile = LayerProfile.load(path) if (path := RunPaths(base_run).layer_profile).exists() else None
    cells: list[Cell] = []
    for cell in chain.from_iterable(_by_training(task, cell) for cell in _cells(task, counts, profile)):
        same = next((known for known in cells if _are_one_run(known, cell)), None)
        cells.append(replace(cell, run=same.run) if same else cell)
        if same is None:
            task.work(_cell_overrides(task, cell))
    return Comparison(task.recipe.name, base_run, tuple(cells), profile)


def _cells(task: Task, counts: Sequence[int], profile: LayerProfile | None) -> Iterator[Cell]:
    """Every cell with the run that it has where no other cell has the same."""
    name, of = f"{task.runs / task.recipe.name}", len(task.base.full_in_base)
    for count in counts:
        alike = []
        for strategy in task.grid.choosing if "layer" in task.grid.granularities else ():
            layers = _chosen(strategy, count, task.base, task.recipe.seed, profile)
            alike.append(Cell(strategy, replace(task.base, lazy_layers=layers), count, Path(f"{name}-{strategy}-{count}of{of}")))
        if task.grid.by_head and (not task.quick or count == counts[-1]):
            assert profile is not None, "the base's run scores by gates"
            heads, hybrid = count * task.kv_heads, task.recipe.hybrid
            streaming_L = profile.choose_heads(heads)
            spec = HybridSpec.from_streaming_heads(streaming_L, task.kv_heads, hybrid.w_sink, hybrid.w_recent).on(task.base)
            alike.append(Cell("gates", spec, count, Path(f"{name}-gates-{heads}of{of * task.kv_heads}heads"), by_head=True))
        yield from alike
        if FULL in task.grid.strategies and not task.quick:
            spec = next(cell.spec for cell in alike if cell.spec.streams)
            yield Cell(FULL, spec.all_full, count, Path(f"{name}-full-as-{count}of{of}"), trained_as=spec)


def _by_training(task: Task, cell: Cell) -> Iterator[Cell]:
    """The cell once for each way to train it."""
    for training in [None] if cell.strategy == PER_PROMPT else task.trainings:
        suffix = f"-{training}" if training == "distilled" else ""
        trained = replace(cell, training=training, run=cell.run.with_name(f"{cell.run.name}{suffix}"))
        yield _of_full_attention(task, trained, suffix) if cell.strategy == FULL else trained


def _of_full_attention(task: Task, cell: Cell, suffix: str) -> Cell:
    """The cell with the folder of its training, and with the layers that this was begun with, whatever else is compared now.

    A training that does not depend on these has one folder, which earlier versions named after the first ratio.
    """
    run, trained_as = cell.run, cell.trained_as
    if trains_any_alike(task.recipe, cell.training):
        named_after_ratios = sorted(run.parent.glob(f"{glob.escape(task.recipe.name)}-{FULL}-as-*of*[0-9]{suffix}"))
        finished = (each for each in named_after_ratios if RunPaths(each).marker("train").exists())
        run = run.with_name(f"{task.recipe.name}-{FULL}{suffix}")
        run = run if run.exists() else next(finished, run)
        trained_as = replace(task.base, lazy_layers=task.base.full_in_base[:1])
    begun = _begun_with(run)
    if begun is not None and (begun.layers or begun.streaming_kv_heads):
        trained_as = choose_spec(begun, task.base, task.kv_heads, task.recipe.seed)
    return replace(cell, run=run, trained_as=trained_as)


def _begun_with(run: Path) -> Hybrid | None:
    """What streams by the recipe of a run; None where there is no such run."""
    paths = RunPaths(run)
    return recipe_of(paths).hybrid if paths.recipe.is_file() else None


def _are_one_run(first: Cell, second: Cell) -> bool:
    """Whether the same streams and is trained in the same way, or both are the one training of full attention."""
    same = first.run == second.run or (first.spec.streams and first.spec == second.spec)
    return same and first.training == second.training


def trains_any_alike(recipe: Recipe, training: str | None = None) -> bool:
    """Whether the training of full attention does not depend on which layers stream in the hybrid."""
    train = recipe.train
    if train is None or train.restore_query_key or (train.distill.hidden_weight and training != "sft"):
        return False
    return train.parameters == "all" and (recipe.lora is None or recipe.lora.layers == "all")


def _check(recipe: Recipe, grid: Grid, quick: bool) -> None:
    if not recipe.eval:
        raise UserError("eval: empty, so there is nothing to compare. Fix: add evaluations, such as {benchmark: heldout_loss}")
    if recipe.hybrid.select != "static":
        raise UserError(f"hybrid.select: {recipe.hybrid.select}: compare chooses the layers. Fix: set it to static")
    for name in ("kv_budget", "max_rise"):
        if getattr(recipe.hybrid, name) is not None:
            raise UserError(f"hybrid.{name}: compare sets how many layers stream. Fix: set it to null, and use --ratios")
    if PER_PROMPT in grid.strategies:
        _check_generates(recipe)
    if grid.trainings and recipe.train is None and not quick:
        raise UserError("--trainings: the recipe trains nothing. Fix: add a train part, or leave it out")
    learned = recipe.hybrid.sink == "learned"
    if FULL in grid.strategies and (recipe.train is None or learned) and not quick:
        raise UserError(f"--strategies: {FULL}: nothing is trained, or learned sinks are. Fix: leave it out; the base is measured")
    if grid.by_head and learned:
        raise UserError("hybrid.sink: learned: single KV heads have no learned sinks. Fix: add --granularities layer")


def _check_generates(recipe: Recipe) -> None:
    """Check the settings that prompts that choose need."""
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
    return [*UNTRAINED, *_variants(recipe, [CONVERTED]), f"hybrid.calibration.samples={samples}", *limits]


def _base_overrides(task: Task) -> list[str]:
    """The run that scores the layers by every strategy that looks at the model, and evaluates the base.

    One that was begun for other ratios, or for further strategies, serves these too.
    """
    name = f"{task.recipe.name}-base"
    begun = _begun_with(task.runs / name)
    known = [begun.strategy, *begun.compare] if begun is not None and begun.strategy is not None else []
    first, *others = [*known, *(each for each in task.scored if each not in known)] or ["periodic"]
    ratio = (begun and begun.lazy_layer_ratio) or task.grid.ratios[0]  # no score depends on it
    return [
        f"name={name}",
        *("hybrid.layers=null", "hybrid.streaming_kv_heads=null", "hybrid.granularity=layer"),
        *(f"hybrid.strategy={first}", f"hybrid.compare=[{', '.join(others)}]"),
        f"hybrid.lazy_layer_ratio={ratio}",
        *UNTRAINED,
        *_variants(task.recipe, [BASE]),
    ]


def _cell_overrides(task: Task, cell: Cell) -> list[str]:
    if cell.strategy == PER_PROMPT:
        return _by_prompt(task.recipe, cell)
    spec, recipe = cell.trained_as or cell.spec, task.recipe
    chosen = [f"hybrid.layers={list(spec.lazy_layers)}", "hybrid.streaming_kv_heads=null", "hybrid.granularity=layer"]
    if spec.split_layers:
        heads_L = [list(heads) for heads in spec.streaming_heads(task.kv_heads)]
        chosen = ["hybrid.layers=null", f"hybrid.streaming_kv_heads={heads_L}", "hybrid.granularity=kv_head"]
    changes = [f"name={cell.run.name}", *chosen, "hybrid.strategy=null", "hybrid.compare=[]", "hybrid.lazy_layer_ratio=null"]
    if cell.training == "sft":
        changes.append("train.distill={}")
    if cell.strategy == FULL:  # a window as long as the context hides nothing
        return [*changes, f"hybrid.w_recent={context_length(task.base_config)}", *_variants(recipe, [TRAINED])]
    variants = [CONVERTED] if cell.training == task.trainings[0] else []  # untrained all are one
    return [*changes, *_variants(recipe, [*variants, TRAINED] if task.trains else variants)]


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
    """The chosen layers; none where prompts choose."""
    if strategy == PER_PROMPT:
        return ()
    if strategy in ("periodic", "random"):
        return unscored_layers(strategy, count, base, seed)
    assert profile is not None, "the base's run scores by every strategy that scores"
    return profile.choose(strategy, count)
