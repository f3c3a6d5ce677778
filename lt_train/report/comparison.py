"""The results of a comparison's cells together: tables (Markdown, HTML), and the picture of quality against KV cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, PackageLoader, StrictUndefined

from lt_train import __version__
from lt_train.evaluation.scores import AnswerScores, LossScores, Scores
from lt_train.evaluation.seeds import SeedMean, difference_over_seeds, mean_over_seeds
from lt_train.evaluation.statistics import Interval
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.report.comparison_cells import Comparison, Entry, entries_of, full_trained_alike, scores_of
from lt_train.report.comparison_chart import comparison_figure
from lt_train.report.formatting import problems_and_sampling
from lt_train.report.page import asset
from lt_train.report.results import Result, read_results
from lt_train.runtime.drawing import PALETTE, to_svg, write_png
from lt_train.runtime.files import write_text
from lt_train.runtime.units import format_bytes

ALIKE = "full attention trained alike"


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
    num_seeds: int


def write_comparison(comparisons: Sequence[Comparison], name: str, out: Path) -> list[Part]:
    """Write comparison.md, comparison.html and a picture for each evaluation into `out`.

    Args:
        comparisons: one for each seed.

    Raises:
        UserError: a run has no scores, or a file of it is damaged.
    """
    bases: dict[str, list[Result]] = {}
    for comparison in comparisons:
        for result in read_results(comparison.base):
            bases.setdefault(result.evaluation, []).append(result)
    parts = [_part(comparisons, results, out) for results in bases.values() if len(results) == len(comparisons)]
    write_text(out / "comparison.md", _markdown(name, parts))
    write_text(out / "comparison.html", _html(name, parts))
    return parts


def _part(comparisons: Sequence[Comparison], bases: Sequence[Result], out: Path) -> Part:
    base, entries = bases[0], entries_of(comparisons, bases[0].evaluation)
    table = Table(comparisons, scores_of(bases), entries)
    picture, what = f"{base.evaluation}.png", table.unit
    write_png(comparison_figure(bases, entries, what), out / picture)
    svg = to_svg(comparison_figure(bases, entries, what), f"{base.evaluation} against KV cache")
    return Part(
        base.evaluation, table.subject, table.columns, tuple(table.rows(bases)), tuple(findings(entries)), picture, svg, len(bases)
    )


@dataclass(frozen=True)
class Table:
    """Texts of one evaluation's table: a row for the base and for each entry."""

    comparisons: Sequence[Comparison]
    base: Sequence[Scores]
    entries: Sequence[Entry]

    @property
    def generated(self) -> bool:
        return isinstance(self.base[0], AnswerScores)

    @property
    def unit(self) -> str:
        return "accuracy, %" if self.generated else "nats per token"

    @property
    def digits(self) -> int:
        """Digits of a percentage or a loss; a loss near 0 has more."""
        return 1 if self.generated else 3 if self.base[0].mean.value >= 0.1 else 5

    @property
    def subject(self) -> str:
        scores, repeated = self.base[0], ""
        if len(self.base) > 1:
            repeated = f"; mean over {len(self.base)} seeds"
        if isinstance(scores, LossScores):
            return f"{scores.samples:,} held-out samples, {scores.tokens:,} answer tokens{repeated}"
        return f"{problems_and_sampling(scores)}; {scores.truncated_text}{repeated}"

    @property
    def shows_spread(self) -> bool:
        return len(self.base) > 1

    @property
    def shows_alike(self) -> bool:
        return any(full_trained_alike(entry, self.entries) for entry in self.entries)

    @property
    def shows_predicted(self) -> bool:
        return any(comparison.predicts for comparison in self.comparisons)

    @property
    def columns(self) -> tuple[str, ...]:
        return (
            *("streaming", "chosen by", "", f"{self.unit} ± SE"),
            *(["SD between seeds"] if self.shows_spread else []),
            *("95 %", "minus base [95 %]"),
            *([f"minus {ALIKE} [95 %]"] if self.shows_alike else []),
            f"KV at {KV_TOKENS // 1024}K",
            *(["predicted rise on long-reach tokens"] if self.shows_predicted else []),
        )

    def rows(self, bases: Sequence[Result]) -> Iterator[tuple[str, ...]]:
        yield self._row(("none", "base", ""), self.base, "", "", bases[0].kv_bytes, "")
        for entry in self.entries:
            alike = full_trained_alike(entry, self.entries)
            yield self._row(
                (entry.cell.streaming, entry.cell.name, entry.state),
                entry.scores,
                self._difference(entry.scores, self.base),
                self._difference(entry.scores, alike.scores) if alike else "",
                entry.result.kv_bytes,
                self._predicted(entry),
            )

    def _row(
        self, of: tuple[str, ...], scores: Sequence[Scores], minus_base: str, minus_alike: str, kv_bytes: int, predicted: str
    ) -> tuple[str, ...]:
        mean = mean_over_seeds(scores)
        return (
            *(*of, self._value(mean)),
            *([self._number(mean.spread or 0.0)] if self.shows_spread else []),
            *(self._interval(mean.interval), minus_base),
            *([minus_alike] if self.shows_alike else []),
            format_bytes(kv_bytes),
            *([predicted] if self.shows_predicted else []),
        )

    def _number(self, value: float, sign: str = "") -> str:
        return f"{100 * value if self.generated else value:{sign}.{self.digits}f}"

    def _value(self, mean: SeedMean) -> str:
        certain = mean.standard_error is None or (self.generated and mean.standard_error == 0)
        return self._number(mean.value) + ("" if certain else f" ± {self._number(mean.standard_error or 0.0)}")

    def _interval(self, span: Interval | None) -> str:
        return "–" if span is None else f"{self._number(span.low)} to {self._number(span.high)}"

    def _difference(self, first: Sequence[Scores], second: Sequence[Scores]) -> str:
        """The difference; none where the evaluation was changed between the two."""
        try:
            found = difference_over_seeds(first, second)
        except ValueError:
            return "not comparable"
        assert found.interval is not None, "a difference has an interval"
        return (
            f"{self._number(found.value, '+')} [{self._number(found.interval.low, '+')}, {self._number(found.interval.high, '+')}]"
        )

    def _predicted(self, entry: Entry) -> str:
        rises = [comparison.predicted_rise(cell) for comparison, cell in zip(self.comparisons, entry.cells, strict=True)]
        known = [rise for rise in rises if rise is not None]
        return f"{fmean(known):+.3f}" if known else ""


def findings(entries: Sequence[Entry]) -> Iterator[str]:
    """At each number of streaming layers, which strategies differ by more than the error from the best of them, and which from
    full attention trained alike; and which hybrids by one training from those by another."""
    for (streaming, state), found in groupby(entries, key=lambda entry: (entry.cell.streaming, entry.state)):
        group = list(found)
        hybrids, where = [entry for entry in group if not entry.is_full], f"{streaming} layers, {state}"
        if len(hybrids) > 1:
            best = _best(hybrids)
            yield f"{where}: {_compared(best, [entry for entry in hybrids if entry is not best])}"
        for alike in (entry for entry in group if entry.is_full):
            yield f"{where}: {_compared(alike, hybrids, name=ALIKE)}"
    yield from _by_training([entry for entry in entries if entry.trained and not entry.is_full])


def _by_training(entries: Sequence[Entry]) -> Iterator[str]:
    """Of each hybrid that was trained in two ways, which is better."""
    for hybrid in dict.fromkeys((entry.cell.streaming, entry.cell.name) for entry in entries):
        first, *others = [entry for entry in entries if (entry.cell.streaming, entry.cell.name) == hybrid]
        for other in others:
            found = {
                "better": f"{other.state} is better than {first.state}",
                "worse": f"{first.state} is better than {other.state}",
                "": f"no difference between {first.state} and {other.state} shows",
            }
            yield f"{hybrid[0]} layers, {hybrid[1]}: {found[_tendency(other, first)]}."


def _compared(best: Entry, others: Sequence[Entry], name: str | None = None) -> str:
    by_tendency = {
        each: [other.cell.name for other in others if _tendency(other, best) == each] for each in ("worse", "better", "")
    }
    worse, better, equal = by_tendency.values()
    texts = [
        *([f"{name or best.cell.name} is better than {_listed(worse)}"] if worse else []),
        *([f"{_listed(better)} {'is' if len(better) == 1 else 'are'} better than {name or best.cell.name}"] if better else []),
    ]
    if not texts:
        named = name or f"the best of them, {best.cell.name},"
        return f"no strategy differs from {named} by more than its error."
    return "; ".join([*texts, *([f"no difference from {_listed(equal)} shows"] if equal else [])]) + "."


def _best(group: Sequence[Entry]) -> Entry:
    sign = -1 if isinstance(group[0].scores[0], AnswerScores) else 1
    return min(group, key=lambda entry: sign * mean_over_seeds(entry.scores).value)


def _tendency(entry: Entry, other: Entry) -> str:
    """Whether the 95 % interval of the paired difference is on one side of 0: worse, better, or neither."""
    span = difference_over_seeds(entry.scores, other.scores).interval
    assert span is not None, "a difference has an interval"
    if span.low <= 0 <= span.high:
        return ""
    return "worse" if (span.low > 0) == isinstance(entry.scores[0], LossScores) else "better"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


HOW = (
    "Differences are paired by problem or sample. A strategy is called better only where the 95 % interval of its difference "
    "from the other leaves out 0; these intervals are not corrected for the number of comparisons. KV heads are compared with as "
    "many layers as have their KV cache. In the picture, points of one KV cache stand beside each other where they would overlap."
)


OVER_SEEDS = (
    "Differences are paired within each seed. Their 95 % interval joins that over samples, of the mean over seeds, and Student's t "
    "over the seeds' means: its half-width is the root of the sum of their squares (doi 10.1002/sim.3095), no less than either's."
)


def _how(parts: Sequence[Part]) -> str:
    return f"{HOW} {OVER_SEEDS}" if any(part.num_seeds > 1 for part in parts) else HOW


def _markdown(name: str, parts: Sequence[Part]) -> str:
    blocks = [f"# {name}: what streams", _how(parts)]
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
    return template.render(title=name, how=_how(parts), parts=parts, palette=PALETTE, style=asset("style.css"), version=__version__)
