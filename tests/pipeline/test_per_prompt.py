"""A run whose prompts choose the layers that stream, from recipe to report."""

import json
from pathlib import Path

import pytest
import torch

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.loading import load_for_inference
from lt_train.inference.per_prompt_store import PerPrompt
from lt_train.inference.tokenizer import load_tokenizer
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.run_folder import RunFolder
from lt_train.recipe.evaluations import BASE, CONVERTED, Eval
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.report.contents import read_runs
from lt_train.report.page import summary
from lt_train.report.provenance import provenance
from lt_train.report.results import read_results
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from lt_train.serving.checkpoint import load_checkpoint
from tests.support.runs import run_in_folder

PER_PROMPT = ("hybrid.select=per_prompt", "train=null", "hybrid.compare=[periodic]")
EVAL = "eval=[{{benchmark: ledger, path: {path}, limit: 4, max_new_tokens: 24, batch_size: 4, variants: [base, converted]}}]"


@pytest.fixture(scope="module")
def recipe(inputs) -> Recipe:
    return load_recipe(inputs / "recipe.yaml", (*PER_PROMPT, EVAL.format(path=inputs / "problems.jsonl")))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("runs")
    return runs, run_in_folder(recipe, runs)


def test_the_converted_hybrid_answers_as_the_engine_does_when_prompts_choose(finished, recipe) -> None:
    samples = [json.loads(line) for line in (finished[0] / "tiny/eval/converted/ledger/samples.jsonl").read_text().splitlines()]
    context = RunContext(recipe, RunFolder(recipe, finished[0]), None, Process(0, 1, launched=False))
    (eval_config,) = recipe.eval
    assert isinstance(eval_config, Eval)
    plan = context.evaluations.plan(eval_config)
    model = load_for_inference(recipe.model, HybridSpec(8, (), 4, 12), torch.float32)
    engine = Engine(model, load_tokenizer(recipe.model, None), per_prompt=PerPrompt(4, 64))
    expected = {answer.request.problem: answer.text for answer in engine.answers(plan.requests, plan.sampling)}
    assert {sample["problem"]: sample["text"] for sample in samples} == expected
    full = {answer.request.problem: answer.text for answer in Engine(model, engine.tokenizer).answers(plan.requests, plan.sampling)}
    assert full != expected


def test_results_and_report_give_the_kv_cache_of_the_layers_that_stream_and_who_chose(finished) -> None:
    runs, printed = finished
    assert "4 of 8 layers stream in each answer, chosen by its prompt" in printed
    by_variant = {result.variant: result for result in read_results(runs / "tiny")}
    assert [by_variant[name].label for name in ("base", "converted-by-periodic", CONVERTED)] == [
        "base",
        "periodic, untrained",
        "per_prompt, untrained",
    ]
    assert by_variant[CONVERTED].kv_bytes == by_variant["converted-by-periodic"].kv_bytes < by_variant[BASE].kv_bytes
    (run,) = read_runs([runs / "tiny"])
    assert not run.missing
    assert ("streams", "4 of 8 layers, chosen by each prompt") in summary(run)
    assert ("streaming layers", "chosen by each prompt") in provenance(run)


def test_its_scores_are_not_those_of_the_base_or_of_another_w_last(recipe, finished) -> None:
    def fingerprint(recipe: Recipe, variant: str) -> str:
        return RunContext(recipe, RunFolder(recipe, finished[0]), None, None).variants.fingerprint(variant)

    calibration = recipe.hybrid.calibration.model_copy(update={"w_last": 8})
    other = recipe.model_copy(update={"hybrid": recipe.hybrid.model_copy(update={"calibration": calibration})})
    assert len({fingerprint(recipe, BASE), fingerprint(recipe, CONVERTED), fingerprint(other, CONVERTED)}) == 3


def test_export_is_refused_and_a_run_ends_without_one(finished, recipe) -> None:
    assert not (finished[0] / "tiny/export").exists()
    with pytest.raises(UserError, match=r"hybrid\.select: per_prompt: a checkpoint .*Fix: set hybrid\.select to static"):
        run_in_folder(recipe, finished[0], "export")


def test_chat_and_serve_do_not_take_it_for_a_full_model(finished) -> None:
    with pytest.raises(UserError, match=r"hybrid\.select: per_prompt: .*Fix: measure with lt-train eval"):
        load_checkpoint(finished[0] / "tiny")


def test_a_prompt_longer_than_a_chunk_is_refused_before_anything_is_measured(inputs, tmp_path) -> None:
    short = EVAL.format(path=inputs / "problems.jsonl").replace("limit: 4", "limit: 4, prefill_chunk: 9")
    with pytest.raises(UserError, match=r"prefill_chunk: 9: prompt .* is read in one pass. Fix: set prefill_chunk to at least \d+"):
        run_in_folder(load_recipe(inputs / "recipe.yaml", (*PER_PROMPT, short)), tmp_path)
    assert not (tmp_path / "tiny/eval").exists()


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (
            "eval=[{benchmark: heldout_loss}]",
            r"eval\.0\.benchmark \+ hybrid\.select: heldout_loss generates nothing.*Fix: remove it",
        ),
        (
            "eval=[{benchmark: needle, backend: openai, servers: [http://localhost:1]}]",
            r"eval\.0\.backend \+ hybrid\.select: servers serve an export.*Fix: set backend to hybrid",
        ),
        ("hybrid.strategy=reach", r"hybrid\.select \+ hybrid\.strategy: each prompt keeps .*Fix: set strategy to null"),
        ("hybrid.layers=[1]", r"hybrid\.select \+ hybrid\.layers: each prompt keeps .*Fix: set layers to null"),
        ("hybrid.max_rise=0.1", r"hybrid\.select \+ hybrid\.max_rise: each prompt keeps .*Fix: set max_rise to null"),
        ("hybrid={lazy_layer_ratio: 0.5, select: per_prompt, sink: learned}", r"hybrid\.select \+ hybrid\.sink: learned sinks"),
    ],
)
def test_what_chooses_or_needs_layers_before_a_prompt_is_a_fault(inputs, override: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        load_recipe(inputs / "recipe.yaml", (*PER_PROMPT, "eval=[]", override))
