import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lt_train.bench.growth import time_decoding
from lt_train.evaluation.scores import AnswerScores, LossScores, Scores, write_scores
from lt_train.evaluation.statistics import Interval, TokenLoss, accuracy_interval, mean_loss, mean_over_problems, paired_difference
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.hybrid.loading import build_hybrid, hybrid_config
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.loading import load_recipe, resolved_yaml
from lt_train.report.results import TRACKED_COLUMNS, cache_bytes, read_results, show_results, summary_values, tracked_rows
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import write_json, write_text
from tests.support.families import BASES, on_base
from tests.support.made_runs import TWO_KV_HEADS

RECIPE = """
name: tiny
model: {base: nobody/nothing}
hybrid: {lazy_layer_ratio: 0.5, strategy: reach, compare: [periodic], w_sink: 2, w_recent: 6}
data: {source: nobody/traces, format: still, max_length: 64, heldout: 4}
train: {method: full, learning_rate: 1.0e-3, max_steps: 1, batch_size: 1}
eval:
  - {benchmark: ledger, max_new_tokens: 8, variants: [base, converted, trained]}
  - {benchmark: heldout_loss, variants: [base, converted, trained]}
"""
LAYERS = {"converted": [0, 2], "converted-by-periodic": [0, 1]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose hybrid is decided on and that has no scores yet."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    folder = tmp_path / "runs/tiny"
    write_text(folder / "recipe.yaml", resolved_yaml(load_recipe(path)))
    write_json(folder / "hybrid/layers.json", LAYERS)
    hybrid_config(BASES["qwen3"], HybridSpec(4, (0, 2), w_sink=2, w_recent=6)).save_pretrained(folder / "hybrid")
    return folder


def answers(shares: list[float], samples: int = 1, available: int | None = None, truncated: float = 0.0) -> AnswerScores:
    accuracy = mean_over_problems(shares)
    return AnswerScores(
        benchmark="ledger",
        problems=len(shares),
        available=available or len(shares),
        samples=samples,
        accuracy=accuracy.value,
        standard_error=accuracy.standard_error,
        majority=0.75,
        majority_standard_error=None,
        ties=0,
        truncated=truncated,
        unanswered=0.0,
        grading_errors=0,
        tokens=80,
        tokens_per_sample=8.0,
        tokens_per_second=20.0,
        fingerprint={"temperature": 0.0 if samples == 1 else 0.6},
        by_problem={f"p{number}": share for number, share in enumerate(shares)},
        interval=accuracy_interval(shares),
    )


def losses(*nll: float, tokens: int = 10) -> LossScores:
    by_sample = {f"s{number}": TokenLoss(value, tokens) for number, value in enumerate(nll)}
    mean = mean_loss(list(by_sample.values()))
    return LossScores("heldout_loss", len(nll), tokens * len(nll), mean.value, mean.standard_error, {}, by_sample)


def score(run: Path, variant: str, scores: Scores) -> None:
    write_scores(run / "eval" / variant / scores.benchmark / "scores.json", scores)


def shown(run: Path, width: int = 200) -> list[str]:
    console = Console(record=True, width=width)
    show_results(run, console)
    return [line.rstrip() for line in console.export_text().splitlines()]


def row(run: Path, label: str) -> str:
    (line,) = [line for line in shown(run) if line.startswith(label)]
    return line


def test_rows_go_from_the_base_over_the_untrained_hybrids_to_the_trained_one(run):
    for variant in ("trained", "converted", "base", "converted-by-periodic"):
        score(run, variant, answers([1.0, 0.0]))
        score(run, variant, losses(3.0, 4.0))
    found = [(result.evaluation, result.variant) for result in read_results(run)]
    order = ["base", "converted-by-periodic", "converted", "trained"]
    assert found == [*(("ledger", variant) for variant in order), *(("heldout_loss", variant) for variant in order)]
    labels = ("base", "periodic, untrained", "reach, untrained", "reach, trained")
    printed = [line for line in shown(run) if line.startswith(("base ", "periodic", "reach"))]
    assert all(line.startswith(label) for line, label in zip(printed, labels * 2, strict=True))


def test_a_hybrid_whose_layers_the_recipe_names_needs_no_further_name(run):
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("strategy: reach", "strategy: null"))
    score(run, "trained", answers([1.0, 0.0]))
    assert row(run, "hybrid, trained")


def test_the_trained_hybrid_streams_the_layers_of_the_converted_one(run):
    for variant in ("base", "converted-by-periodic", "converted", "trained"):
        score(run, variant, answers([1.0, 0.0]))
    assert [result.layers for result in read_results(run)] == [(), (0, 1), (0, 2), (0, 2)]


def test_a_hybrid_of_kv_heads_has_their_cache_and_reports_what_streams(run):
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("strategy: reach", "strategy: gates\n  granularity: kv_head"))
    heads = [[0], [], [0, 1], [1]]
    write_json(run / "hybrid/layers.json", {"converted": heads, "converted-by-periodic": [0, 1]})
    spec = HybridSpec.from_streaming_heads(heads, kv_heads=2, w_sink=2, w_recent=6)
    hybrid_config(TWO_KV_HEADS, spec).save_pretrained(run / "hybrid")
    for variant in ("base", "converted-by-periodic", "converted", "trained"):
        score(run, variant, answers([1.0, 0.0]))
    base, by_layers, converted, trained = read_results(run)
    assert (converted.layers, converted.streaming_kv_heads) == ((2,), tuple(map(tuple, heads)))
    assert trained.label == "gates by head, trained" and by_layers.label == "periodic, untrained"
    assert converted.kv_bytes == by_layers.kv_bytes == base.kv_bytes * (4 * KV_TOKENS + 4 * 8) // (8 * KV_TOKENS)
    lines = shown(run)
    assert any(line.endswith("; 4 of 8 KV heads stream in 3 layers") for line in lines)
    assert any("hybrids" in line and "hybrid of KV heads" in line for line in lines if line.startswith("KV at 32K"))


def test_every_score_has_its_error_and_its_paired_difference_from_the_base(run):
    base, trained = answers([1.0, 1.0, 1.0, 0.0], truncated=0.25), answers([1.0, 0.0, 1.0, 0.0])
    score(run, "base", base)
    score(run, "trained", trained)
    paired = paired_difference(trained.by_problem, base.by_problem)
    assert row(run, "base").split() == ["base", "75.0", "[30.1,", "95.4]", "25.0%", "0.0%"]
    line = row(run, "reach, trained")
    assert "50.0 [15.0, 85.0]" in line
    assert f"-25.0 [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]" in line


def test_unanswered_and_ungraded_answers_are_counted_and_how_truncated_ones_count_is_named(run):
    score(run, "base", replace(answers([1.0, 0.0], truncated=0.25), unanswered=0.5))
    assert "truncated answers count as incorrect" in shown(run)[0]
    assert "25.0% 50.0%" in " ".join(row(run, "base").split()) and not any("graded" in line for line in shown(run)[1:])
    score(run, "trained", replace(answers([1.0, 0.0]), grading_errors=3, truncated_as="graded"))
    assert "graded" in shown(run)[2]
    assert row(run, "reach, trained").split()[-1] == "3"
    score(run, "base", replace(answers([1.0, 0.0], truncated=0.25), truncated_as="graded"))
    assert "truncated answers are graded by their text" in shown(run)[0]


def test_without_a_measured_base_there_is_no_difference(run):
    score(run, "trained", answers([1.0, 0.0]))
    figures = row(run, "reach, trained").removeprefix("reach, trained").split()
    assert figures == ["50.0", "[9.5,", "90.5]", "0.0%", "0.0%"]


def test_scores_over_other_problems_than_the_bases_are_shown_and_not_compared(run):
    score(run, "base", answers([1.0, 0.0, 1.0]))  # measured again with a greater limit; the trained model is still to come
    score(run, "trained", answers([1.0, 0.0]))
    assert "50.0 [9.5, 90.5]" in row(run, "reach, trained")
    assert "not comparable" in row(run, "reach, trained")
    assert shown(run)[0].startswith("ledger: 3 problems, ")
    assert any(line.startswith("measured otherwise: reach, trained: 2 problems, ") for line in shown(run))


def test_several_answers_to_a_problem_are_shown_with_their_majority(run):
    score(run, "base", answers([0.5, 1.0], samples=2))
    lines = shown(run)
    assert "ledger: 2 problems, 2 answers each at temperature 0.6 (avg@n, maj@n)" in lines
    assert "75.0 [50.0, 100.0], maj 75.0" in row(run, "base")


def test_a_partial_score_reports_how_many_samples_are_missing(run):
    score(run, "base", replace(answers([0.5, 1.0], samples=2), partial=True, missing=3))
    assert "PARTIAL: 3 samples missing" in row(run, "base")


def test_the_interval_shown_is_that_of_scores_json_also_where_none_is_correct(run):
    score(run, "base", answers([0.0] * 30))
    assert read_results(run)[0].scores.interval == Interval(0.0, pytest.approx(0.1135, abs=1e-4))  # Wilson's: z² / (n + z²)
    assert "0.0 [0.0, 11.4]" in row(run, "base")


def test_a_console_too_narrow_for_the_names_of_hybrids_still_shows_every_figure(run):
    score(run, "base", answers([1.0, 1.0, 1.0, 0.0]))
    score(run, "trained", answers([1.0, 0.0, 1.0, 0.0]))
    narrow, wide = (" ".join(shown(run, width)).split() for width in (80, 200))
    assert set(wide) - {line for line in wide if "─" in line} <= set(narrow)


def test_a_single_problem_has_no_error_to_show(run):
    score(run, "base", answers([1.0]))
    assert " 100.0 " in row(run, "base") and "[" not in row(run, "base")


def test_it_is_reported_which_weights_of_the_training_the_trained_model_has(run):
    assert not any(line.startswith("trained model") for line in shown(run))
    write_json(run / "train/final/manifest.json", {"step": 1200, "settings": {}, "files": {}})
    assert "trained model weights of step 1,200, the last" in shown(run)
    write_json(run / "train/final/measured.json", {"metric": "needle", "value": 0.75, "step": 1200})
    assert "trained model weights of step 1,200, the best by needle (0.75)" in shown(run)


def test_losses_are_shown_in_nats_a_token_with_their_difference(run):
    score(run, "base", losses(10.0, 12.0, 14.0))
    score(run, "trained", losses(11.0, 13.0, 15.0))
    lines = shown(run)
    assert "heldout_loss: 3 samples, 30 answer tokens; hybrids stream 2 of 4 layers" in lines
    assert any("nats per token ± SE" in line for line in lines)
    assert not any("truncated" in line for line in lines)
    assert "1.200 ± 0.115" in row(run, "base")
    assert "1.300 ± 0.115" in row(run, "reach, trained") and "+0.100 [+0.100, +0.100]" in row(run, "reach, trained")


def test_divergences_from_the_base_have_no_difference_from_it_and_a_name_of_their_own(run):
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("eval:\n", "eval:\n- {benchmark: heldout_kl, name: heldout_kl}\n"))
    score(run, "trained", replace(losses(0.1, 0.3), benchmark="heldout_kl"))
    assert "heldout_kl: KL(base || model) over 2 samples, 20 answer tokens; hybrids stream 2 of 4 layers" in shown(run)
    assert "0.0200 ± 0.0100" in row(run, "reach, trained") and "[" not in row(run, "reach, trained")
    assert summary_values(read_results(run))["trained/heldout_kl/kl"] == pytest.approx(0.02)
    score(run, "trained", replace(losses(0.001, 0.003), benchmark="heldout_kl"))
    assert "0.000200 ± 0.000100" in row(run, "reach, trained")


def test_the_title_has_the_number_of_problems_and_stays_on_one_line_however_narrow_the_console(run):
    score(run, "converted", answers([1.0, 0.0], available=1500))
    title = "ledger: 2 of 1,500 problems, greedy; hybrids stream 2 of 4 layers"
    assert title in shown(run, width=40)


def test_an_evaluation_named_like_markup_is_shown_by_its_name(run):
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("name: ledger", "name: '[red]'"))
    write_scores(run / "eval/base/[red]/scores.json", answers([1.0, 0.0]))
    assert "[red]: 2 problems, greedy" in shown(run)


def test_what_else_a_run_has_made_is_named_with_its_place(run):
    write_text(run / "train/log.jsonl", "")
    (run / "export").mkdir()
    assert shown(run, width=20) == [
        f"{run}: no scores yet",
        f"training log  {run / 'train/log.jsonl'}",
        f"checkpoint    {run / 'export'}",
    ]


def test_a_folder_that_is_no_run_is_an_error_with_the_way_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"no run: .*recipe\.yaml.*lt-train run RECIPE"):
        read_results(tmp_path)


def test_a_run_whose_hybrid_is_not_decided_on_has_no_scores_yet(run):
    (run / "hybrid/config.json").unlink()
    (run / "hybrid/layers.json").unlink()
    assert shown(run) == [f"{run}: no scores yet"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"kind": "answers"}', '{"kind": "votes"}', "\x00\x00"])
def test_damaged_scores_are_an_error_with_a_fix(run, damage):
    score(run, "base", answers([1.0, 0.0]))
    (run / "eval/base/ledger/scores.json").write_text(damage)
    with pytest.raises(UserError, match=r"eval/base/ledger/scores\.json: not a .*[Dd]elete it and run again"):
        read_results(run)


@pytest.mark.parametrize("damage", ["{", "name: [", "\x00", "", "[]", "name: tiny"])
def test_a_damaged_recipe_of_a_run_is_an_error_that_names_it(run, damage):
    (run / "recipe.yaml").write_text(damage)
    with pytest.raises(UserError, match=r"recipe\.yaml: not a valid recipe"):
        read_results(run)


@pytest.mark.parametrize("name", ["hybrid/layers.json", "hybrid/config.json"])
def test_a_cut_choice_of_layers_is_an_error_that_names_it(run, name):
    whole = (run / name).read_text()
    (run / name).write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{name}: not a complete"):
        read_results(run)


def test_tracking_gets_every_final_figure_by_variant_and_evaluation(run):
    score(run, "base", answers([1.0, 0.0]))
    score(run, "trained", losses(10.0, 12.0, 14.0))
    values = summary_values(read_results(run))
    assert values == {
        "base/ledger/accuracy": 0.5,
        "base/ledger/standard_error": pytest.approx(0.5),
        "base/ledger/majority": 0.75,
        "base/ledger/truncated": 0.0,
        "base/ledger/unanswered": 0.0,
        "base/ledger/tokens_per_second": 20.0,
        "base/kv_bytes_at_32768": 4 * 256 * 32768,
        "trained/heldout_loss/loss": pytest.approx(1.2),
        "trained/heldout_loss/standard_error": pytest.approx(0.2 / math.sqrt(3)),
        "trained/kv_bytes_at_32768": 2 * 256 * (32768 + 8),
    }


def test_the_tables_go_to_tracking_as_well(run):
    score(run, "base", answers([1.0, 1.0, 1.0, 0.0], truncated=0.25))
    score(run, "trained", answers([1.0, 1.0, 0.0, 0.0]))
    base, trained = tracked_rows(read_results(run))
    assert len(base) == len(trained) == len(TRACKED_COLUMNS)
    assert base[:4] == ["base", "75.0 [30.1, 95.4]", None, 0.25]
    assert trained[0].endswith(", trained") and trained[2].startswith("-25.0 [")
    assert base[4:7] == [8.0, 0.0, 0] and base[-1] > trained[-1] > 0


def test_tracking_gets_no_error_where_there_is_none(run):
    score(run, "base", answers([1.0]))
    score(run, "trained", losses(10.0))
    values = summary_values(read_results(run))
    assert {"base/ledger/accuracy", "trained/heldout_loss/loss"} <= values.keys()
    assert None not in values.values() and not any("standard_error" in name for name in values)


@pytest.mark.parametrize(
    ("sizes", "per_token"),
    [
        ({"num_key_value_heads": 2, "head_dim": 16, "dtype": "float32"}, 2 * 2 * 16 * 4),
        ({"num_key_value_heads": 2, "head_dim": 16, "dtype": None}, 2 * 2 * 16 * 4),
        ({"num_key_value_heads": 2, "head_dim": 16, "dtype": "bfloat16"}, 2 * 2 * 16 * 2),
        ({"num_key_value_heads": 1, "head_dim": None, "dtype": "float16"}, 2 * 1 * 12 * 2),
        ({"dtype": "bfloat16"}, 2 * 4 * 12 * 2),
    ],
)
def test_kv_bytes_follow_from_heads_head_size_and_dtype(sizes, per_token):
    config = {"num_attention_heads": 4, "hidden_size": 48, "layer_types": ["x"] * 5, "w_sink": 4, "sliding_window": 12, **sizes}
    spec = HybridSpec(5, (0, 1), w_sink=4, w_recent=12)
    assert cache_bytes(config, spec, tokens=100) == per_token * (3 * 100 + 2 * 16)
    assert cache_bytes(config, spec.all_full, tokens=100) == per_token * 5 * 100
    assert cache_bytes(config, spec, tokens=10) == per_token * 5 * 10  # the window is longer than the sequence


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_bytes_are_what_the_cache_of_that_model_holds(family, dtype, tmp_path):
    base = type(BASES[family])(**{**BASES[family].to_dict(), "dtype": dtype})
    spec = on_base(base, HybridSpec(4, (0, 2, 3), w_sink=2, w_recent=30))
    hybrid_config(base, spec).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    timings = time_decoding(build_hybrid(base, spec).to(getattr(torch, dtype)).eval(), [20, 40], progress=False)
    assert [timing.kv_bytes for timing in timings] == [cache_bytes(config, spec, 20), cache_bytes(config, spec, 40)]


def test_the_memory_named_below_the_tables_is_that_of_a_sequence_of_32k_tokens(run):
    for variant in ("base", "trained"):
        score(run, variant, answers([1.0, 0.0]))
    per_token = 2 * 2 * 16 * 4
    assert KV_TOKENS == 32768
    assert [result.kv_bytes for result in read_results(run)] == [per_token * 4 * 32768, per_token * (2 * 32768 + 2 * 8)]
    assert [line for line in shown(run) if line.startswith("KV at 32K")] == ["KV at 32K     base 32 MiB, hybrids 16 MiB"]


def test_the_widest_rows_fit_80_columns_and_no_name_is_broken(run):
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("strategy: reach", "strategy: lazy_ratio"))
    score(run, "base", answers([1.0] * 60))
    score(run, "converted", answers([0.0] * 60, truncated=1.0))
    printed = shown(run, width=80)[1:]  # the title stays on one line
    assert max(map(len, printed)) <= 80
    assert any(line.startswith("lazy_ratio, untrained ") for line in printed)
    assert " ".join(" ".join(printed[:2]).split()) == "no model accuracy, % [95 %] minus base [95 %] trunc. answer"
