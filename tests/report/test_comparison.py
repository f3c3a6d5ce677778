"""What the cells of a comparison show together, from run folders."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from lt_train.evaluation.scores import write_scores
from lt_train.hybrid.loading import hybrid_config
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.loading import load_recipe, resolved_yaml
from lt_train.report.comparison import findings, write_comparison
from lt_train.report.comparison_cells import Cell, Comparison, Entry, entries_of
from lt_train.report.comparison_chart import comparison_figure
from lt_train.report.results import read_results
from lt_train.runtime.drawing import note_of
from lt_train.runtime.files import write_json, write_text
from lt_train.selection.chosen import Chosen, spec_of
from tests.support.made_runs import TWO_KV_HEADS, gates_profile, loss_scores

RECIPE = """
name: NAME
model: {base: nobody/nothing}
hybrid: {layers: [0], w_sink: 2, w_recent: 6}
data: {source: nobody/traces, format: still, max_length: 64, heldout: 4}
train: {method: full, learning_rate: 1.0e-3, max_steps: 1, batch_size: 1}
eval: [{benchmark: heldout_loss, variants: [base, converted, trained]}]
"""
ALIKE = "minus full attention trained alike [95 %]"
BASE = (10.0, 12.0, 14.0, 16.0)


def made_cell(runs: Path, name: str, chosen: Chosen, **losses: Sequence[float]) -> Path:
    """A run with the loss of each of its variants, by sample of ten tokens."""
    folder = runs / name
    runs.mkdir(exist_ok=True)
    (runs / f"{name}.yaml").write_text(RECIPE.replace("NAME", name))
    write_text(folder / "recipe.yaml", resolved_yaml(load_recipe(runs / f"{name}.yaml")))
    write_json(folder / "hybrid/layers.json", {"converted": list(chosen)})
    hybrid_config(TWO_KV_HEADS, spec_of(chosen, 4, 2, w_sink=2, w_recent=6)).save_pretrained(folder / "hybrid")
    for variant, nll in losses.items():
        write_scores(folder / "eval" / variant / "heldout_loss/scores.json", loss_scores(nll))
    return folder


def above_base(*rises: float) -> list[float]:
    return [loss + rise for loss, rise in zip(BASE, rises, strict=True)]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """By reach nothing is lost, by periodic much, by lazy_ratio about as little as by reach; trained, all are equal."""
    runs = tmp_path / "runs"
    noise = above_base(1.0, -1.0, 1.5, -1.2)
    cells = {
        "reach": ((0, 2), above_base(0.1, 0.2, 0.1, 0.2), noise),
        "lazy_ratio": ((0, 1), above_base(0.3, 0.1, -0.1, 0.4), above_base(-1.0, 1.1, 0.9, -0.8)),
        "periodic": ((1, 2), above_base(3.0, 3.3, 3.1, 3.2), above_base(0.2, 0.1, 0.3, 0.2)),
    }
    made = [
        Cell(name, HybridSpec(4, layers), 2, made_cell(runs, name, layers, converted=untrained, trained=trained))
        for name, (layers, untrained, trained) in cells.items()
    ]
    return Comparison("mine", made_cell(runs, "base", (0, 2), base=BASE), tuple(made), None)


def entries(comparison: Comparison) -> list[Entry]:
    return entries_of([comparison], "heldout_loss")


def written(comparison: Comparison, out: Path) -> str:
    write_comparison([comparison], "mine", out)
    return (out / "comparison.md").read_text()


def test_a_strategy_is_called_better_only_where_the_difference_exceeds_its_error(comparison) -> None:
    untrained, trained = findings(entries(comparison))
    assert untrained == "2 of 4 layers, untrained: reach is better than periodic; no difference from lazy_ratio shows."
    assert trained.startswith("2 of 4 layers, trained: no strategy differs from the best of them, ")


def test_the_table_has_a_row_for_each_hybrid_with_its_difference_from_the_base(comparison, tmp_path) -> None:
    out = tmp_path / "out"
    text = written(comparison, out)
    rows = [line for line in text.splitlines() if line.startswith("| 2 of 4 | periodic")]
    assert len(rows) == 2 and "untrained" in rows[0] and "trained" in rows[1]
    assert "| +0.315 [+0.294, +0.336] |" in rows[0]
    assert text.count("| none | base |") == 1
    assert "- 2 of 4 layers, untrained: reach is better than periodic" in text
    assert imread(out / "heldout_loss.png").shape[1] > 1000
    page = (out / "comparison.html").read_text()
    assert "+0.315 [+0.294, +0.336]" in page and "<svg" in page


def test_predicted_rises_stand_beside_the_measured_ones(comparison, tmp_path) -> None:
    predicting = replace(comparison, profile=gates_profile())
    text = written(predicting, tmp_path)
    rises = {line.split(" | ")[1]: line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| 2 of 4")}
    assert rises == {"reach": "+1.500 |", "lazy_ratio": "+1.050 |", "periodic": "+0.550 |"}


def test_heads_stand_beside_the_layers_of_the_same_kv_cache(comparison, tmp_path) -> None:
    heads, runs = [[1], [0], [1], [1]], comparison.base.parent
    run = made_cell(runs, "heads", heads, converted=above_base(0.0, 0.1, 0.0, 0.1), trained=above_base(0.1, 0.1, 0.1, 0.1))
    spec = spec_of(heads, 4, 2, w_sink=2, w_recent=6)
    by_head = Cell("gates", spec, 2, run, by_head=True)
    both = replace(comparison, cells=(*comparison.cells, by_head), profile=gates_profile())
    text = written(both, tmp_path)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| 2 of 4")]
    (untrained,) = [row for row in rows if row[1:3] == ["gates by head", "untrained"]]
    assert untrained[-1] == "+0.330 |" and {row[-2] for row in rows} == {untrained[-2]}
    assert "- 2 of 4 layers, untrained: gates by head is better than reach" in text
    (axes,) = comparison_figure(read_results(both.base), entries(both), "nats per token").axes
    assert any("gates by head, trained: 4 of 8 KV heads stream in 4 layers" in (note_of(line) or "") for line in axes.lines)


def test_the_picture_has_a_line_a_strategy_the_base_and_a_ring_around_the_papers_choice(comparison) -> None:
    (base,) = read_results(comparison.base)
    (axes,) = comparison_figure([base], found := entries(comparison), "nats per token").axes
    labels = [text.get_text().replace("\n", " ") for text in axes.figure.legends[0].get_texts()]
    assert "the paper's choice" in labels and "base, 95 % interval" in labels
    assert {"reach, trained", "reach, untrained", "periodic, untrained"} <= set(labels)
    rings = [line for line in axes.lines if (note_of(line) or "").startswith("the paper's choice")]
    assert len(rings) == 2  # untrained and trained
    (untrained,) = (line for line in axes.lines if (note_of(line) or "").startswith("lazy_ratio, untrained: "))
    assert untrained.get_xydata().tolist() in [ring.get_xydata().tolist() for ring in rings]
    assert 50 < 100 * found[0].result.kv_bytes / base.kv_bytes < 51


def test_points_with_equal_values_stand_beside_each_other_and_one_apart_from_them_at_its_kv_cache(comparison) -> None:
    (base,) = read_results(comparison.base)
    runs, equal = comparison.base.parent, above_base(0.1, 0.2, 0.1, 0.2)
    far = [loss + 100.0 for loss in BASE]
    strategies = {"reach": equal, "periodic": equal, "random": equal, "kl": far}
    made = [
        Cell(name, HybridSpec(4, (0, 2)), 2, made_cell(runs, f"equal-{name}", (0, 2), converted=losses))
        for name, losses in strategies.items()
    ]
    (axes,) = comparison_figure([base], entries(replace(comparison, cells=tuple(made))), "nats per token").axes
    drawn = {name: line.get_xydata()[0] for line in axes.lines for name in strategies if (note_of(line) or "").startswith(name)}
    kept = 100 * read_results(made[0].run)[0].kv_bytes / base.kv_bytes
    assert drawn["kl"][0] == drawn["periodic"][0] == pytest.approx(kept)
    assert drawn["reach"][1] == drawn["periodic"][1] == drawn["random"][1]
    pixels = [axes.transData.transform(drawn[name])[0] for name in ("reach", "periodic", "random")]
    assert 7 < pixels[1] - pixels[0] == pytest.approx(pixels[2] - pixels[1]) and pixels[2] - pixels[0] < 24


def test_what_distillation_gains_over_sft_is_said_where_the_difference_exceeds_its_error(comparison, tmp_path) -> None:
    runs, cells = comparison.base.parent, []
    losses = {
        "reach": (above_base(0.5, 0.6, 0.5, 0.6), above_base(0.2, 0.3, 0.3, 0.2)),
        "periodic": (BASE, above_base(1, -1, 1, -1)),
    }
    for strategy, by_training in losses.items():
        for training, loss in zip(("sft", "distilled"), by_training, strict=True):
            made = {"trained": loss} | ({"converted": above_base(1, 1, 1, 1)} if training == "sft" else {})
            run = made_cell(runs, f"{strategy}-{training}", (0, 2), **made)
            cells.append(Cell(strategy, HybridSpec(4, (0, 2)), 2, run, training=training))
    both = replace(comparison, cells=tuple(cells))
    states = [(entry.cell.name, entry.state) for entry in entries(both)]
    expected = [("reach", "untrained"), ("periodic", "untrained"), ("reach", "SFT"), ("periodic", "SFT")]
    assert states == [*expected, ("reach", "distilled"), ("periodic", "distilled")]
    assert list(findings(entries(both)))[-2:] == [
        "2 of 4 layers, reach: distilled is better than SFT.",
        "2 of 4 layers, periodic: no difference between SFT and distilled shows.",
    ]
    (axes,) = comparison_figure(read_results(both.base), entries(both), "nats per token").axes
    dashes = {(note_of(line) or "").split(":")[0]: line.get_linestyle() for line in axes.lines}
    assert [dashes[f"reach, {state}"] for state in ("untrained", "SFT", "distilled")] == ["--", "-", ":"]


def test_each_cell_of_the_page_names_its_column_for_screens_too_narrow_for_a_header(comparison, tmp_path) -> None:
    written(comparison, tmp_path / "out")
    page = (tmp_path / "out/comparison.html").read_text()
    row = next(line for line in page.splitlines() if ">reach</td>" in line)
    assert re.findall(r'<td data-name="([^"]*)">', row)[:2] == ["streaming", "chosen by"] and "<td>" not in page


@pytest.fixture
def seeds(tmp_path: Path) -> list[Comparison]:
    """Trained with each of three seeds: reach stays 0.01 above full attention trained alike, periodic as near as noise."""
    runs, made = tmp_path / "runs", []
    for seed, noise in enumerate((0.0, 0.01, -0.01)):
        name = f"mine-seed{seed}"
        losses = {
            "reach": ((0, 2), above_base(*(0.6 + noise for _ in BASE))),
            "periodic": ((1, 2), above_base(*(0.5 + (-1) ** seed * 0.3 for _ in BASE))),
            "full": ((0, 2), above_base(*(0.5 for _ in BASE))),
        }
        cells = [
            Cell(
                strategy,
                HybridSpec(4, () if strategy == "full" else layers),
                2,
                made_cell(runs, f"{name}-{strategy}", layers, trained=trained),
                trained_as=HybridSpec(4, layers) if strategy == "full" else None,
            )
            for strategy, (layers, trained) in losses.items()
        ]
        made.append(Comparison(name, made_cell(runs, f"{name}-base", (0, 2), base=BASE), tuple(cells), gates_profile()))
    return made


def test_several_seeds_are_one_row_with_the_spread_between_them(seeds, tmp_path) -> None:
    (part,) = write_comparison(seeds, "mine", tmp_path / "out")
    text = (tmp_path / "out/comparison.md").read_text()
    assert part.subject == "4 held-out samples, 40 answer tokens; mean over 3 seeds"
    columns = dict(zip(part.columns, zip(*part.rows, strict=True), strict=True))
    assert columns["chosen by"] == ("base", "reach", "periodic", "full")
    assert columns["SD between seeds"] == ("0.000", "0.001", "0.035", "0.000")
    assert columns["minus base [95 %]"][1] == "+0.060 [+0.058, +0.062]"  # t of 2 degrees of freedom: 4.3 * 0.001 / 3^0.5 = 0.0025
    assert columns["predicted rise on long-reach tokens"] == ("", "+1.500", "+0.550", "")
    assert "Student's t over the seeds' means" in text


def test_hybrids_are_held_against_full_attention_trained_alike(seeds, tmp_path) -> None:
    (part,) = write_comparison(seeds, "mine", tmp_path / "out")
    minus_alike = dict(zip([row[1] for row in part.rows], [row[part.columns.index(ALIKE)] for row in part.rows], strict=True))
    assert minus_alike["base"] == minus_alike["full"] == "" and minus_alike["reach"].startswith("+0.010 [+0.008,")
    assert part.findings == (
        "2 of 4 layers, trained: no strategy differs from the best of them, reach, by more than its error.",
        "2 of 4 layers, trained: full attention trained alike is better than reach; no difference from periodic shows.",
    )
    (alone,) = write_comparison(seeds[:1], "mine-seed0", tmp_path / "one")
    assert "SD between seeds" not in alone.columns
    assert "full attention trained alike is better than reach and periodic" in alone.findings[-1]
