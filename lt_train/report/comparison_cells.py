"""The cells of a comparison, one for each hybrid, and their results, one for each seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from lt_train.evaluation.scores import Scores
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.evaluations import TRAINED
from lt_train.recipe.schema import FULL
from lt_train.report.results import BY_HEAD, Result, full_kv_bytes, read_results
from lt_train.selection.profile import LayerProfile

STATES = {None: "trained", "sft": "SFT", "distilled": "distilled"}
"""Training of a cell -> what the trained hybrid is called."""


@dataclass(frozen=True)
class Cell:
    """A run whose layers or KV heads a strategy chose. Two cells in which the same streams share a run.

    Attributes:
        spec: what streams; nothing where each prompt chooses.
        num_streaming: how many layers stream, or have the KV cache of the KV heads that do.
        by_head: whether single KV heads were chosen.
        trained_as: of full attention: the hybrid whose parameters are trained.
        training: of the grid's `trainings`; None where it lists none, or nothing is trained.
    """

    strategy: str
    spec: HybridSpec
    num_streaming: int
    run: Path
    by_head: bool = False
    trained_as: HybridSpec | None = None
    training: str | None = None

    @property
    def streaming(self) -> str:
        return f"{self.num_streaming} of {len(self.spec.full_in_base)}"

    @property
    def name(self) -> str:
        return f"{self.strategy}{BY_HEAD if self.by_head else ''}"


@dataclass(frozen=True)
class Comparison:
    """The measurements with one seed.

    Attributes:
        base: the run that scored the layers and evaluated the base.
        profile: None where no strategy looked at the model.
    """

    name: str
    base: Path
    cells: tuple[Cell, ...]
    profile: LayerProfile | None

    @property
    def predicts(self) -> bool:
        """Whether gates scored the layers."""
        return self.profile is not None and "gates" in self.profile.strategies

    def predicted_rise(self, cell: Cell) -> float | None:
        """The rise that gates predicts for long-reach tokens; None where it did not score, or nothing streams."""
        return self.profile.predicted_rise(cell.spec) if self.profile is not None and self.predicts and cell.spec.streams else None


@dataclass(frozen=True)
class Entry:
    """One way to choose what streams, at one ratio, under one evaluation: a cell and a result for each seed."""

    cells: tuple[Cell, ...]
    results: tuple[Result, ...]

    @property
    def cell(self) -> Cell:
        """The cell of the first seed; the others differ from it in run and spec alone."""
        return self.cells[0]

    @property
    def result(self) -> Result:
        return self.results[0]

    @property
    def scores(self) -> tuple[Scores, ...]:
        return scores_of(self.results)

    @property
    def trained(self) -> bool:
        return self.result.variant == TRAINED

    @property
    def state(self) -> str:
        return STATES[self.cell.training] if self.trained else "untrained"

    @property
    def is_full(self) -> bool:
        return self.cell.strategy == FULL


def scores_of(results: Sequence[Result]) -> tuple[Scores, ...]:
    return tuple(result.scores for result in results)


def entries_of(comparisons: Sequence[Comparison], evaluation: str) -> list[Entry]:
    """Entries by state, then by the number of streaming layers, then by strategy; without what a seed lacks."""
    found: dict[tuple[str, int, str, str | None], list[tuple[Cell, Result]]] = {}
    for cell in chain.from_iterable(comparison.cells for comparison in comparisons):
        for result in _results(cell):
            if result.evaluation == evaluation:
                training = cell.training if result.variant == TRAINED else None
                found.setdefault((cell.name, cell.num_streaming, result.variant, training), []).append((cell, result))
    order = ("untrained", *STATES.values())
    entries = [Entry(*zip(*each, strict=True)) for each in found.values() if len(each) == len(comparisons)]
    return sorted(entries, key=lambda entry: (order.index(entry.state), entry.cell.num_streaming))


def _results(cell: Cell) -> list[Result]:
    """With full attention's KV cache where a window as long as the context hides nothing."""
    results = read_results(cell.run)
    if cell.trained_as is None:
        return results
    return [replace(result, kv_bytes=full_kv_bytes(cell.run), streaming="nothing streams") for result in results]


def full_trained_alike(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The model with full attention that was trained as this hybrid was."""
    alike: Iterator[Entry] = (
        other
        for other in entries
        if other.is_full and other.state == entry.state and other.cell.num_streaming == entry.cell.num_streaming
    )
    return None if entry.is_full else next(alike, None)
