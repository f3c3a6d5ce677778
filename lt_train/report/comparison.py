"""What the cells of a comparison show together: tables (Markdown, HTML), and the picture of quality against KV cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from lt_train import __version__
from lt_train.evaluation.scores import AnswerScores, LossScores, Scores, difference
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.evaluations import CONVERTED, TRAINED
from lt_train.report.comparison_chart import Point, comparison_figure
from lt_train.report.formatting import difference_from, problems_and_sampling
from lt_train.report.page import asset
from lt_train.report.results import BY_HEAD, Result, full_kv_bytes, read_results
from lt_train.report.tables import interval_text, score_text, tendency
from lt_train.runtime.drawing import PALETTE, to_svg, write_png
from lt_train.runtime.files import write_text
from lt_train.runtime.units import format_bytes
from lt_train.selection.profile import LayerProfile

FULL = "full"
"""Stands for a strategy: full attention in every layer, with what a hybrid trains trained alike."""


@dataclass(frozen=True)
class Cell:
    """A run whose layers or KV heads a strategy chose. Two cells in which the same streams share a run.

    Attributes:
        spec: what streams; nothing where each prompt chooses.
        num_streaming: how many layers stream, or have the KV cache of the KV heads that do.
        by_head: whether single KV heads were chosen.
        trained_as: of full attention: the hybrid whose parameters are trained.
    """

    strategy: str
    spec: HybridSpec
    num_streaming: int
    run: Path
    by_head: bool = False
    trained_as: HybridSpec | None = None

    @property
    def streaming(self) -> str:
        return f"{self.num_streaming} of {len(self.spec.full_in_base)}"

    @property
    def name(self) -> str:
        return f"{self.strategy}{BY_HEAD if self.by_head else ''}"


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        base: the run that scored the layers and evaluated the base.
        profile: None where no strategy looked at the model.
    """

    name: str
    base: Path
    cells: tuple[Cell, ...]
    profile: LayerProfile | None


@dataclass(frozen=True)
class Entry:
    """One strategy's hybrid under one evaluation."""

    cell: Cell
    result: Result

    @property
    def trained(self) -> bool:
        return self.result.variant == TRAINED

    @property
    def state(self) -> str:
        return "trained" if self.trained else "untrained"


@dataclass(frozen=True)
class Part:
    """One evaluation: its table, the sentences on what differs, and the picture's file and SVG."""

    evaluation: str
    subject: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    findings: tuple[str, ...]
    picture: str
    svg: str


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """Write comparison.md, comparison.html and a picture for each evaluation into `out`; returns it.

    Raises:
        UserError: a run has no scores, or a file of it is damaged.
    """
    parts = [_part(comparison, base, out) for base in read_results(comparison.base)]
    write_text(out / "comparison.md", _markdown(comparison.name, parts))
    write_text(out / "comparison.html", _html(comparison.name, parts))
    return out


def _part(comparison: Comparison, base: Result, out: Path) -> Part:
    entries = list(_entries(comparison.cells, base.evaluation))
    predicts = comparison.profile is not None and "gates" in comparison.profile.strategies
    unit = "accuracy, % ± SE" if isinstance(base.scores, AnswerScores) else "nats per token ± SE"
    columns: tuple[str, ...] = ("streaming", "chosen by", "", unit, "95 %", "minus base [95 %]", f"KV at {KV_TOKENS // 1024}K")
    rows: list[tuple[str, ...]] = [
        ("none", "base", "", score_text(base.scores), interval_text(base.scores), "", format_bytes(base.kv_bytes))
    ]
    rows += [_row(entry, base.scores) for entry in entries]
    if predicts and comparison.profile is not None:
        columns += ("predicted rise on long-reach tokens",)
        specs = [entry.cell.spec for entry in entries]
        rises = [f"{comparison.profile.predicted_rise(spec):+.3f}" if spec.streams else "" for spec in specs]
        rows = [(*row, rise) for row, rise in zip(rows, ["", *rises], strict=True)]
    points = [
        Point(entry.cell.strategy, entry.cell.num_streaming, entry.trained, entry.result, entry.cell.by_head) for entry in entries
    ]
    figure, picture = comparison_figure(base, points, unit.split(" ± ")[0]), f"{base.evaluation}.png"
    write_png(figure, out / picture)
    svg = to_svg(comparison_figure(base, points, unit.split(" ± ")[0]), f"{base.evaluation} against KV cache")
    return Part(base.evaluation, _subject(base.scores), columns, tuple(rows), tuple(findings(entries)), picture, svg)


def _entries(cells: Sequence[Cell], evaluation: str) -> Iterator[Entry]:
    """By training, then by the number of streaming layers, then in the order of the strategies."""
    found = [Entry(cell, result) for cell in cells for result in _results(cell) if result.evaluation == evaluation]
    order = (CONVERTED, TRAINED)
    yield from sorted(found, key=lambda entry: (order.index(entry.result.variant), entry.cell.num_streaming))


def _results(cell: Cell) -> list[Result]:
    """With full attention's KV cache where a window as long as the context hides nothing."""
    results = read_results(cell.run)
    if cell.trained_as is None:
        return results
    return [replace(result, kv_bytes=full_kv_bytes(cell.run), streaming="nothing streams") for result in results]


def _row(entry: Entry, base: Scores) -> tuple[str, ...]:
    scores = entry.result.scores
    apart, kv = difference_from(scores, base)[0], format_bytes(entry.result.kv_bytes)
    return (entry.cell.streaming, entry.cell.name, entry.state, score_text(scores), interval_text(scores), apart, kv)


def _subject(scores: Scores) -> str:
    if isinstance(scores, LossScores):
        return f"{scores.samples:,} held-out samples, {scores.tokens:,} answer tokens"
    return f"{problems_and_sampling(scores)}; {scores.truncated_text}"


def findings(entries: Sequence[Entry]) -> Iterator[str]:
    """At each number of streaming layers, which strategies differ from the best by more than the error."""
    for (streaming, state), found in groupby(entries, key=lambda entry: (entry.cell.streaming, entry.state)):
        group = list(found)
        if len(group) < 2:
            continue
        best = _best(group)
        below = {entry.cell.name: _is_worse(entry.result.scores, best.result.scores) for entry in group if entry is not best}
        worse, equal = ([name for name, is_worse in below.items() if is_worse is wanted] for wanted in (True, False))
        where = f"{streaming} layers, {state}"
        if worse:
            text = f"{where}: {best.cell.name} is better than {_listed(worse)}"
            yield text + (f"; no difference from {_listed(equal)} shows." if equal else ".")
        else:
            yield f"{where}: no strategy differs from the best of them, {best.cell.name}, by more than its error."


def _best(group: Sequence[Entry]) -> Entry:
    sign = -1 if isinstance(group[0].result.scores, AnswerScores) else 1
    return min(group, key=lambda entry: sign * entry.result.scores.mean.value)


def _is_worse(scores: Scores, best: Scores) -> bool:
    """Whether the 95 % interval of the paired difference lies on the worse side of 0."""
    return tendency(difference(scores, best), less_is_better=isinstance(scores, LossScores)) == "worse"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


HOW = (
    "Differences are paired by problem or sample. A strategy is called better only where the 95 % interval of its difference "
    "from the other leaves out 0; these intervals are not corrected for the number of comparisons. KV heads are compared with as "
    "many layers as have their KV cache."
)


def _markdown(name: str, parts: Sequence[Part]) -> str:
    blocks = [f"# {name}: what streams", HOW]
    for part in parts:
        blocks += [f"## {part.evaluation}", f"{part.subject}.", f"![{part.evaluation} against KV cache]({part.picture})"]
        lines = [part.columns, tuple("---" for _ in part.columns), *part.rows]
        blocks += ["\n".join(f"| {' | '.join(line)} |" for line in lines), "\n".join(f"- {each}" for each in part.findings)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _html(name: str, parts: Sequence[Part]) -> str:
    environment = Environment(
        loader=PackageLoader("lt_train.report", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("comparison.html")
    return template.render(title=name, how=HOW, parts=parts, palette=PALETTE, style=asset("style.css"), version=__version__)
