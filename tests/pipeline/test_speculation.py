"""An evaluation with a draft leaves the records of one without."""

import json
from pathlib import Path

import pytest

from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from tests.support.runs import run_in_folder

LAYERS = ("train=null", "hybrid.strategy=periodic")
HEADS = ("train=null", "hybrid={streaming_kv_heads: [[1], [], [0, 1], [0], [1], [], [0], []], w_sink: 4, w_recent: 12}")
EVAL = "eval=[{{benchmark: ledger, path: {path}, limit: 3, max_new_tokens: 20, batch_size: 3, variants: {variants}, {more}}}]"
SAMPLED = "samples: 2, temperature: 0.9, top_p: 0.95, repetition_penalty: 1.1"


def evaluated(
    inputs: Path, runs: Path, variants: str, more: str, hybrid: tuple[str, ...] = LAYERS
) -> tuple[dict[str, list[dict]], str]:
    """The records of each variant but for their times, and what was printed."""
    evaluation = EVAL.format(path=inputs / "problems.jsonl", variants=variants, more=more)
    printed = run_in_folder(load_recipe(inputs / "recipe.yaml", (*hybrid, evaluation)), runs, "eval")
    records = {}
    for path in sorted((runs / "tiny/eval").rglob("samples.jsonl")):
        rows = [json.loads(line) | {"seconds": None} for line in path.read_text().splitlines()]
        records[path.parent.parent.name] = sorted(rows, key=lambda row: (row["problem"], row["sample"]))
    return records, printed


@pytest.mark.parametrize(
    ("hybrid", "variants", "sampling", "draft"),
    [
        (LAYERS, "[base, converted]", SAMPLED, "draft: streaming, draft_length: 4"),
        (LAYERS, "[base]", "temperature: 0", "draft: hybrid"),
        (LAYERS, "[converted]", "temperature: 0", "draft: streaming, draft_layers: [1, 5, 6]"),
        (HEADS, "[base]", SAMPLED, "draft: hybrid"),
        (HEADS, "[converted]", SAMPLED, "draft: streaming, draft_layers: [1, 6]"),
    ],
    ids=["all layers", "the run's hybrid", "layers by name", "the heads of the run's hybrid", "layers beside heads"],
)
def test_records_are_those_without_a_draft(inputs, tmp_path, hybrid, variants: str, sampling: str, draft: str) -> None:
    plain, _ = evaluated(inputs, tmp_path / "plain", variants, sampling, hybrid)
    drafted, printed = evaluated(inputs, tmp_path / "drafted", variants, f"{sampling}, {draft}", hybrid)
    assert drafted == plain and all(len(records) in (3, 6) for records in plain.values())
    assert printed.count("% of the draft's tokens accepted") == len(plain)


def test_a_draft_may_be_added_to_a_run_that_has_begun(inputs, tmp_path) -> None:
    plain, _ = evaluated(inputs, tmp_path, "[base]", "temperature: 0")
    again, printed = evaluated(inputs, tmp_path, "[base]", "temperature: 0, draft: streaming")
    assert again == plain and "accepted" not in printed, "every sample is there already"


LEDGER = "{{benchmark: ledger, path: {path}, limit: 1, max_new_tokens: 8, {more}}}"


@pytest.mark.parametrize(
    ("more", "overrides", "fault"),
    [
        ("draft: streaming, draft_length: 0", (), r"eval\.0\.draft_length: 0: less than 1\. Fix: set it to 1 or more"),
        (
            "draft: streaming, draft_length: 12",
            (),
            r"eval\.0\.draft_length \+ hybrid\.w_recent: 12 tokens are not within the window of 12\. Fix: .* at most 11",
        ),
        ("draft_length: 4", (), r"eval\.0\.draft_length \+ eval\.0\.draft: nothing drafts"),
        ("draft_layers: [1]", (), r"eval\.0\.draft_layers \+ eval\.0\.draft: nothing drafts"),
        ("draft: hybrid", (), r"eval\.0\.draft \+ eval\.0\.variants: the hybrid would draft for itself"),
        (
            "draft: hybrid, draft_layers: [1], variants: [base]",
            (),
            r"eval\.0\.draft_layers \+ eval\.0\.draft: the layers of the run's",
        ),
        (
            "draft: streaming, draft_layers: [1]",
            ("hybrid={layers: [1, 2]}",),
            r"eval\.0\.draft_layers \+ hybrid\.layers: .* would draft for itself",
        ),
        (
            "draft: streaming, variants: [converted]",
            ("hybrid.select=per_prompt",),
            r"eval\.0\.draft \+ hybrid\.select: each prompt chooses",
        ),
        (
            "draft: streaming, variants: [converted]",
            ("hybrid={lazy_layer_ratio: 0.5, sink: learned}",),
            r"eval\.0\.draft \+ hybrid\.sink: layers that stream in the draft alone have no learned sinks",
        ),
        (
            "draft: streaming, backend: openai, servers: [http://localhost:1]",
            (),
            r"eval\.0\.draft \+ eval\.0\.backend: a server decodes in its own way",
        ),
    ],
)
def test_what_cannot_draft_is_a_fault_of_the_recipe(inputs, more: str, overrides: tuple[str, ...], fault: str) -> None:
    variants = "" if "variants" in more else ", variants: [converted]"
    evaluation = LEDGER.format(path=inputs / "problems.jsonl", more=more + variants)
    with pytest.raises(UserError, match=fault):
        load_recipe(inputs / "recipe.yaml", ("train=null", f"eval=[{evaluation}]", *overrides))


def test_layers_that_the_model_lacks_are_refused_before_anything_is_measured(inputs, tmp_path) -> None:
    evaluation = LEDGER.format(path=inputs / "problems.jsonl", more="draft: streaming, draft_layers: [3, 8], variants: [base]")
    recipe = load_recipe(inputs / "recipe.yaml", ("train=null", f"eval=[{evaluation}]"))
    with pytest.raises(UserError, match=r"draft_layers: \[8\]: not in the model\. Fix: name layers from 0 to 7"):
        run_in_folder(recipe, tmp_path)
    assert not (tmp_path / "tiny/eval").exists()
