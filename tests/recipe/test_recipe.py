import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_train.recipe.loading import load_recipe, load_recipe_and_remarks, recorded_recipe, resolved_yaml
from lt_train.recipe.messages import NAMES_ELSEWHERE, all_settings
from lt_train.recipe.schema import Recipe, identity_of, settings_that_may_change
from lt_train.recipe.yaml_text import read_recipe_text
from lt_train.runtime.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"

COMPLETE = {
    "name": "mine",
    "model": {"base": "owner/model"},
    "hybrid": {"lazy_layer_ratio": 0.5},
    "data": {"source": "owner/data", "format": "still", "max_length": 1024, "heldout": 8},
    "train": {"method": "lora", "learning_rate": 0.001, "max_steps": 10, "batch_size": 4},
    "eval": [{"benchmark": "aime24", "max_new_tokens": 512}, {"benchmark": "heldout_loss"}],
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(COMPLETE, sort_keys=False))
    return path


def faults(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def faults_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "faulty.yaml"
    path.write_text(text)
    return faults(path)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_extra_that_brings_it(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setattr("lt_train.recipe.checks.find_spec", lambda name: None)
    said = faults(recipe_file, f"track.{tracker}=true")
    assert f"track.{tracker}: {tracker} is not installed. Fix: pip install 'lt-train[{tracker}]', or set it to false" in said
    monkeypatch.setattr("lt_train.recipe.checks.find_spec", lambda name: name)
    assert getattr(load_recipe(recipe_file, [f"track.{tracker}=true"]).track, tracker)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_opens_with_its_launch_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)  # relative paths count from the working directory
    assert load_recipe(path).name == path.stem
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"  lt-train run recipes/{path.name}" in header
    if load_recipe(path).train.deepspeed:
        assert f"--module lt_train train recipes/{path.name}" in header


@pytest.mark.parametrize("path", sorted(RECIPES.glob("evidence/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_evidence_describes_a_comparison(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    recipe = load_recipe(path)
    assert recipe.name == path.stem and recipe.grid is not None
    assert f"#   lt-train compare recipes/evidence/{path.name}\n" in path.read_text()


def test_a_grid_may_be_added_to_a_run_that_is_done(recipe_file: Path) -> None:
    assert "grid" in settings_that_may_change() and "grid" not in identity_of(load_recipe(recipe_file))
    assert load_recipe(recipe_file, ["grid.seeds=[1]"]).grid.strategies == ["reach", "lazy_ratio", "periodic", "random"]


def test_the_shipped_recipes_are_found() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} >= {"quickstart", "smollm2-135m", "qwq-still-32b", "qwq-32b"}


def test_defaults_are_filled_in_where_they_depend_on_other_parts(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.lora is not None and recipe.lora.rank == 16
    assert recipe.hybrid.strategy == "reach"
    assert [(evaluation.name, evaluation.variants) for evaluation in recipe.eval] == [
        ("aime24", ["trained"]),
        ("heldout_loss", ["trained"]),
    ]
    untrained = load_recipe(recipe_file, ["train=null"])
    assert untrained.lora is None
    assert {tuple(evaluation.variants) for evaluation in untrained.eval} == {("converted",)}
    assert load_recipe(recipe_file, ["hybrid={layers: [1, 3]}"]).hybrid.strategy is None
    assert load_recipe(recipe_file, ["hybrid.granularity=kv_head"]).hybrid.strategy == "gates"
    named = load_recipe(recipe_file, ["hybrid={streaming_kv_heads: [[], [0, 2]]}"]).hybrid
    assert (named.granularity, named.strategy) == ("kv_head", None)


def test_the_resolved_recipe_reads_back_to_the_same_recipe(recipe_file: Path, tmp_path: Path) -> None:
    needle = "{benchmark: needle, recall: {lengths: [512], keys: 2}, kv_budget: 1GiB}"
    for overrides in (
        [],
        ["train=null"],
        ["hybrid={layers: [0, 2]}"],
        ["hybrid={streaming_kv_heads: [[], [0, 2], [1]]}"],
        ["hybrid={max_rise: 0.1, granularity: kv_head, compare: [gates, reach]}"],
        ["track.wandb=off", "train.learning_rate=1e-5"],
        [f"eval=[{needle}]", f"train.probes={{steps: 5, evals: [{needle}]}}", "train.keep_best=needle", "train.final_weights=best"],
    ):
        recipe = load_recipe(recipe_file, overrides)
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(resolved_yaml(recipe))
        assert load_recipe(resolved) == recipe


def test_a_missing_file_is_looked_for_in_the_working_directory_and_beside_the_recipe(recipe_file: Path, tmp_path: Path) -> None:
    reported = faults(recipe_file, "data.source=none.jsonl")
    assert str(Path("none.jsonl").absolute()) in reported
    assert f"nor is it in the recipe's folder {recipe_file.parent}" in reported
    assert "recipe's folder" not in faults(recipe_file, f"data.source={tmp_path}/none.jsonl")


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.distill={weight: 0.5, temperature: 2.0, hidden_weight: 0.1}"],
        ["train.distill={weight: 0.5, teacher: copy}", "lora.peft.bias=all"],
        ["train.method=full", "train.distill={weight: 1, teacher: top_k, top_k: 32}", "train.restore_query_key=true"],
        ["train.method=full", "train.parameters=lazy_projections", "train.distill.weight=0.5"],
        ["train.restore_query_key=true", "lora.layers=all"],
    ],
)
def test_distillation_and_restored_queries_and_keys_can_be_set(recipe_file: Path, overrides: list[str]) -> None:
    assert load_recipe(recipe_file, overrides).train is not None


FORMER_NAMES = [
    ("hybrid.calibration.long_reach_share=0.2", "hybrid.calibration.long_reach_share", "long_reach_fraction"),
    ("eval.0.of=[base]", "eval.0.of", "variants"),
    ("sample={benchmark: aime24, max_new_tokens: 5, of: [trained]}", "sample.of", "variants"),
    ("train={method: full, learning_rate: 1, epochs: 1, batch_size: 1, publish: last}", "train.publish", "final_weights"),
]


@pytest.mark.parametrize(("override", "former", "name"), FORMER_NAMES)
def test_a_former_name_of_a_setting_is_accepted_with_a_remark(recipe_file: Path, override: str, former: str, name: str) -> None:
    recipe, remarks = load_recipe_and_remarks(recipe_file, [override])
    assert [str(remark) for remark in remarks] == [f"{former}: former name of a setting. Fix: write {name} (--set)"]
    assert (recipe, []) == load_recipe_and_remarks(recipe_file, [override.replace(former.rpartition(".")[2], name)])


def test_that_few_servers_load_an_export_of_kv_heads_is_a_remark(recipe_file: Path) -> None:
    served = "eval=[{benchmark: needle, backend: openai, servers: [http://localhost:1], variants: [VARIANT]}]"
    by_head = ["hybrid.granularity=kv_head"]
    _, remarks = load_recipe_and_remarks(recipe_file, [*by_head, served.replace("VARIANT", "trained")])
    (remark,) = map(str, remarks)
    assert remark.startswith("eval.0.backend + hybrid.granularity: of servers, lt-train serve and vLLM with its plugin alone load")
    assert remark.endswith("Fix: serve it with lt-train serve, with --vllm or without")
    for overrides in ([*by_head, served.replace("VARIANT", "base")], [served.replace("VARIANT", "trained")]):
        assert load_recipe_and_remarks(recipe_file, overrides)[1] == []


def test_an_override_under_a_former_name_takes_the_place_of_the_setting_in_the_file(tmp_path: Path) -> None:
    text = yaml.safe_dump(COMPLETE).replace("max_new_tokens: 512", "max_new_tokens: 512\n  variants: [trained]")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert load_recipe(path, ["eval.0.of=[base]"]).eval[0].variants == ["base"]


def test_a_setting_given_under_both_of_its_names_is_reported(recipe_file: Path) -> None:
    reported = faults(recipe_file, "eval.0={benchmark: aime24, max_new_tokens: 5, of: [base], variants: [trained]}")
    assert "eval.0.variants: given twice" in reported


def test_the_record_of_a_run_is_read_without_the_files_that_it_names(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    moved = resolved_yaml(recipe).replace("owner/data", "gone.jsonl").replace("variants:", "of:")
    assert recorded_recipe(moved) == recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": "gone.jsonl"})})
    for text in ("name: [", "- a", "name: mine"):
        with pytest.raises(ValueError):
            recorded_recipe(text)


def test_a_name_that_looks_like_a_number_survives_the_resolved_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["name='1e5'", "prompt.system='012'", "track.project='1:30'"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(recipe))
    assert load_recipe(resolved) == recipe
    assert yaml.safe_load(resolved_yaml(recipe)) == recipe.model_dump()


def test_a_recipe_cannot_be_changed_after_loading(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file).hybrid.w_recent = 3


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.0e-5", "0.00001", "1.e-5", ".1e-4", "+1e-5"])
def test_a_learning_rate_may_be_written_in_every_usual_way(recipe_file: Path, number: str) -> None:
    text = recipe_file.read_text().replace("learning_rate: 0.001", f"learning_rate: {number}")
    recipe_file.write_text(text)
    assert load_recipe(recipe_file).train.learning_rate == pytest.approx(1e-5, rel=1e-12)
    assert load_recipe(recipe_file, [f"train.learning_rate={number}"]).train.learning_rate == pytest.approx(1e-5, rel=1e-12)


def test_what_looks_like_a_number_but_is_a_name_stays_text(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["model.base=owner/1e5"]).model.base == "owner/1e5"
    assert read_recipe_text("a: [e5, 1e, 1-e5, 0x1f]").values == {"a": ["e5", "1e", "1-e5", 31]}


def test_wandb_may_be_a_bare_off(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["track.wandb=off"]).track.wandb == "off"
    assert "track.wandb: true: unknown. Fix: use one of online, offline, off" in faults(recipe_file, "track.wandb=on")


def test_all_faults_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    reported = faults_of(
        tmp_path,
        "name: mine\n"
        "nam: x\n"
        "model: {base: owner/model, dtype: bf61}\n"
        "hybrid: {lazy_layer_ratio: 0.5, layers: [1], w_recnt: 3}\n"
        "data: {source: owner/data, format: still}\n"
        "train:\n"
        "  method: full\n"
        "  learning_rate: fast\n"
        "  epochs: 1\n"
        "  max_steps: 3\n"
        "  batch_size: 4\n"
        "  micro_batch_size: 3\n"
        "eval: [{benchmark: aime24, samples: 4}]\n",
    )
    assert reported.splitlines()[0] == f"{tmp_path / 'faulty.yaml'}: not a valid recipe"
    for fault in (
        "  nam: unknown setting; did you mean name? (line 2)",
        "  model.dtype: 'bf61': unknown. Fix: use one of auto, bf16, fp32 (line 3)",
        "  hybrid.w_recnt: unknown setting; did you mean w_recent? (line 4)",
        "  data.max_length: missing. Fix: set it to the longest trace to train on, in tokens; TRL's own default",
        "  train.learning_rate: 'fast': not a number. Fix: write a number, such as 0.5 (line 8)",
        "  eval.0.max_new_tokens: missing; aime24 has no limit of its own. Fix: set the tokens of the longest answer (line 13)",
        "  hybrid.layers + hybrid.lazy_layer_ratio: ",
        "  train.epochs + train.max_steps: both",
        "  train.batch_size + train.micro_batch_size: 4 is not a multiple of 3. Fix: set batch_size to 3 or 6",
        "  eval.0.samples + eval.0.temperature: greedy",
    ):
        assert f"\n{fault}" in reported, fault
    assert len(reported.splitlines()) == 11


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.bass=x", "model.bass: unknown setting; did you mean base?"),
        ("w_recent=3", "w_recent: unknown setting here; did you mean hybrid.w_recent?"),
        ("train.num_train_epochs=3", "train.num_train_epochs: unknown setting; here it is train.epochs"),
        ("train.per_device_train_batch_size=3", "unknown setting; here it is train.micro_batch_size"),
        ("lora.r=8", "lora.r: unknown setting; here it is lora.rank"),
        ("model.attn_implementation=sdpa", "unknown setting; here it is model.attention"),
        ("eval.0.max_gen_toks=5", "eval.0.max_gen_toks: unknown setting; here it is eval.*.max_new_tokens"),
        ("hybrid.calibration.sample=3", "hybrid.calibration.sample: unknown setting; did you mean samples?"),
        (
            "eval.1.samples=3",
            "eval.1.samples: unknown setting of this benchmark. Fix: remove it; there are batch_size, limit, variants, name",
        ),
        ("eval.0.benchmark=aime42", "eval.0.benchmark: 'aime42': unknown; did you mean aime25?"),
        ("eval.0={max_new_tokens: 3}", "eval.0.benchmark: missing. Fix: name what is measured"),
        ("hybrid.w_recent='16'", "hybrid.w_recent: '16': not a whole number. Fix: write digits alone, such as 16"),
        ("hybrid.w_recent=16.0", "hybrid.w_recent: 16.0: not a whole number. Fix: write digits alone, such as 16"),
        ("hybrid.w_recent=true", "hybrid.w_recent: true: not a whole number. Fix: write digits alone, such as 16"),
        ("hybrid.w_recent=012", "hybrid.w_recent: '012': not a whole number. Fix: write digits alone, such as 16"),
        ("train.save_steps=1:30", "train.save_steps: '1:30': not a whole number. Fix: write digits alone, such as 16"),
        ("data.max_length=1e31", "data.max_length: 1e+31: not a whole number. Fix: write digits alone, such as 16"),
        (f"data.max_length={10**31}", f"data.max_length: {10**31}: more than 1e+12. Fix: set it to 1e+12 or less"),
        ("train.learning_rate=1e31", "train.learning_rate: 1e+31: more than 1. Fix: set it to 1 or less"),
        ("eval.0.temperature=1e31", "eval.0.temperature: 1e+31: more than 100. Fix: set it to 100 or less"),
        ("eval.0.kv_budget=0", "eval.0.kv_budget: 0: less than 1. Fix: set it to 1 or more"),
        ("eval.0.kv_budget=0GiB", "eval.0.kv_budget: '0GiB': less than 1. Fix: set it to 1 or more"),
        (
            "train.trl.optim=[adamw_torch]",
            "train.trl.optim: ['adamw_torch']: not a value for SFTConfig. Fix: set it to 'adamw_torch'",
        ),
        ("lora.peft.rank_pattern=4", "lora.peft.rank_pattern: 4: not a value for LoraConfig. Fix: set it to a mapping"),
        (
            "lora.peft.rank_pattern.q_proj=0",
            "lora.peft.rank_pattern.q_proj: 0: not a whole number above 0. Fix: write a whole",
        ),
        ("lora.peft.alpha_pattern={q_proj: x}", "lora.peft.alpha_pattern.q_proj: 'x': not a number above 0. Fix: write a number"),
        ("eval.0={benchmark: needle, recall: {lenths: [64]}}", "eval.0.recall.lenths: unknown setting; did you mean lengths?"),
        ("train.benchmark=needle", "train.benchmark: unknown setting here; did you mean sample.benchmark?"),
        ("hybrid.w_recent=0", "hybrid.w_recent: 0: less than 1. Fix: set it to 1 or more"),
        ("hybrid.w_sink=-1", "hybrid.w_sink: -1: less than 0. Fix: set it to 0 or more"),
        ("hybrid.lazy_layer_ratio=0", "hybrid.lazy_layer_ratio: 0: not above 0. Fix: set it above 0"),
        ("hybrid.lazy_layer_ratio=1", "hybrid.lazy_layer_ratio: 1: not below 1. Fix: set it below 1"),
        (
            "hybrid.lazy_layer_ratio=null",
            "hybrid.lazy_layer_ratio + hybrid.layers: neither is set, so no layer streams. Fix: set lazy_layer_ratio (0.5 in",
        ),
        (
            "hybrid.layers=[1, 2]",
            "hybrid.layers + hybrid.lazy_layer_ratio: both choose the layers that stream. Fix: set layers or lazy_layer_ratio",
        ),
        (
            "hybrid.kv_budget=0.5",
            "hybrid.lazy_layer_ratio + hybrid.kv_budget: each sets how many layers stream. Fix: set one of them, and the others",
        ),
        ("hybrid={max_rise: 0.1}", "hybrid.max_rise + hybrid.strategy: reach predicts no rise. Fix: set strategy to gates"),
        ("hybrid={lazy_layer_ratio: 0.5, max_rise: 0}", "hybrid.max_rise: 0: not above 0. Fix: set it above 0"),
        (
            "hybrid={layers: [1], kv_budget: 0.5}",
            "hybrid.layers + hybrid.kv_budget: both choose the layers that stream. Fix: set layers or kv_budget to null",
        ),
        (
            "hybrid={layers: [1], strategy: nll}",
            "hybrid.layers + hybrid.strategy: both choose the layers that stream. Fix: set layers or strategy to null",
        ),
        (
            "hybrid={lazy_layer_ratio: 0.5, select: per_prompt}",
            "train + hybrid.select: each prompt chooses the layers that stream, so none can be trained for it. Fix: remove train",
        ),
        (
            "hybrid={lazy_layer_ratio: 0.5, granularity: kv_head, strategy: reach}",
            "hybrid.granularity + hybrid.strategy: reach scores entire layers, not KV heads. Fix: set strategy to gates, or gran",
        ),
        (
            "hybrid={granularity: kv_head, layers: [1]}",
            "hybrid.granularity + hybrid.layers: layers are named, not KV heads. Fix: name them in streaming_kv_heads, or set gran",
        ),
        (
            "hybrid={lazy_layer_ratio: 0.5, granularity: kv_head, sink: learned}",
            "hybrid.granularity + hybrid.sink: layers of which some KV heads stream have no learned sinks. Fix: set sink to tokens",
        ),
        (
            "hybrid={granularity: layer, streaming_kv_heads: [[], [1]]}",
            "hybrid.granularity + hybrid.streaming_kv_heads: single KV heads are named. Fix: set granularity to kv_head, or str",
        ),
        (
            "hybrid={lazy_layer_ratio: 0.5, streaming_kv_heads: [[], [1]]}",
            "hybrid.streaming_kv_heads + hybrid.lazy_layer_ratio: both choose the KV heads that stream. Fix: set streaming",
        ),
        (
            "hybrid={streaming_kv_heads: [[], [1, 1]]}",
            "hybrid.streaming_kv_heads.1: [1, 1]: 1 is listed twice. Fix: list it once",
        ),
        ("hybrid.kv_heads=[[], [1]]", "hybrid.kv_heads: unknown setting; here it is hybrid.streaming_kv_heads"),
        ("hybrid={layers: [1, 2, 1]}", "hybrid.layers: [1, 2, 1]: 1 is listed twice. Fix: list it once"),
        ("hybrid={layers: []}", "hybrid.layers: []: empty. Fix: list at least 1 item"),
        ("hybrid={layers: [-1]}", "hybrid.layers.0: -1: less than 0. Fix: set it to 0 or more"),
        ("hybrid={layers: [0, x, 2]}", "hybrid.layers.1: 'x': not a whole number. Fix: write digits alone, such as 16"),
        (
            "hybrid.compare=[reach]",
            "hybrid.compare + hybrid.strategy: reach is the strategy of this recipe; compare lists others. Fix: remove reach",
        ),
        ("hybrid.compare=[nll, nll]", "hybrid.compare: ['nll', 'nll']: nll is listed twice. Fix: list it once"),
        ("hybrid.compare=nll", "hybrid.compare: 'nll': not a list. Fix: write a list, such as [a, b]"),
        ("data.packing=1", "data.packing: 1: neither true nor false. Fix: write true or false"),
        ("data.source=5", "data.source: 5: not text. Fix: put it in quotes"),
        ("data.source=''", "data.source: '': empty. Fix: write at least 1 character"),
        (
            "data.limit=8",
            "data.heldout + data.limit: 8 of 8 rows are held out, so none is left to train on. Fix: lower heldout, or raise limit",
        ),
        ("data=5", "data: 5: not a mapping. Fix: write settings by name, such as {name: value}"),
        ("data=null", "data: missing. Fix: name the training data: data.source, data.format and data.max_length"),
        (
            "data.heldout=0",
            "eval.1.benchmark + data.heldout: no samples are held out for heldout_loss. Fix: set data.heldout above 0",
        ),
        (
            "eval.1={benchmark: heldout_kl, variants: [base, trained]}",
            "eval.1.variants: heldout_kl compares with the base, whose divergence from itself is 0. Fix: remove base",
        ),
        ("train.learning_rate=.nan", "train.learning_rate: nan: not a finite number. Fix: write a finite number"),
        ("train.learning_rate=.inf", "train.learning_rate: inf: not a finite number. Fix: write a finite number"),
        ("train.learning_rate=0", "train.learning_rate: 0: not above 0. Fix: set it above 0"),
        ("train.max_steps=null", "train.epochs + train.max_steps: neither is set. Fix: set one of them"),
        ("train.epochs=2", "train.epochs + train.max_steps: both are set. Fix: keep one and set the other to null"),
        (
            "train.micro_batch_size=3",
            "train.batch_size + train.micro_batch_size: 4 is not a multiple of 3. Fix: set batch_size to 3 or 6",
        ),
        (
            "train.micro_batch_size=5",
            "train.batch_size + train.micro_batch_size: 4 is not a multiple of 5. Fix: set batch_size to 5",
        ),
        ("train.batch_size=null", "train.batch_size + train.batch_tokens: neither is set. Fix: set one of them"),
        ("train.batch_size=0", "train.batch_size: 0: less than 1. Fix: set it to 1 or more"),
        ("train.batch_tokens=1024", "train.batch_size + train.batch_tokens: both are set. Fix: keep one and set the other to null"),
        ("train.lr_scheduler=cosin", "train.lr_scheduler: 'cosin': no scheduler of transformers; did you mean cosine?"),
        (
            "train.deepspeed=launch/none.json",
            f"train.deepspeed: launch/none.json: no such file (looked at {Path('launch/none.json').absolute()})",
        ),
        ("train.trl.otpim=x", "train.trl.otpim: no argument of SFTConfig; did you mean optim?"),
        ("train.trl.learning_rate=1", "train.trl.learning_rate: not set here. Fix: use train.learning_rate"),
        ("train.trl={max_length: 3}", "train.trl.max_length: not set here. Fix: use data.max_length"),
        (
            "train.probes={steps: 2}",
            "train.probes.evals: missing. Fix: list what to evaluate, such as [{benchmark: needle, recall: {lengths: [2048]}}]",
        ),
        ("train.probes={evals: [{benchmark: needle}]}", "train.probes.steps: missing"),
        (
            "train.probes={steps: 2, evals: [{benchmark: needel}]}",
            "train.probes.evals.0.benchmark: 'needel': unknown; did you mean needle?",
        ),
        ("train.probes={steps: 2, evals: [{benchmark: needle, limt: 3}]}", "limt: unknown setting; did you mean limit?"),
        ("train.probes={steps: 2, evals: []}", "train.probes.evals: []: empty. Fix: list at least 1 item"),
        ("lora.rnk=3", "lora.rnk: unknown setting; did you mean rank?"),
        ("lora.peft.use_dorra=true", "lora.peft.use_dorra: no argument of LoraConfig; did you mean use_dora?"),
        ("lora.peft.r=3", "lora.peft.r: not set here. Fix: use lora.rank"),
        ("prompt.user=Solve this.", "prompt.user: 'Solve this.': no place for the question. Fix: write {question} where it goes"),
        ("prompt.user={question}", "prompt.user: {'question': null}: not text. Fix: put it in quotes"),
        ("prompt.chat_template=none.jinja", "prompt.chat_template: none.jinja: no such file (looked at "),
        (
            "eval.0.samples=4",
            "eval.0.samples + eval.0.temperature: greedy answers are all equal. Fix: set samples to 1 instead of 4, or set",
        ),
        (
            "eval.0.top_p=0.9",
            "eval.0.top_p + eval.0.temperature: greedy decoding ignores top_p. Fix: remove top_p, or set temperature above 0",
        ),
        ("eval.0.variants=[]", "eval.0.variants: []: empty. Fix: list at least 1 item"),
        ("eval.0.variants=[base, base]", "eval.0.variants: ['base', 'base']: base is listed twice. Fix: list it once"),
        ("eval.1.name=aime24", "eval.1.name + eval.0.name: two items are named aime24. Fix: give one of them another name"),
        (
            "eval.0.name=a/b",
            "eval.0.name: 'a/b': not usable as the name of a folder. Fix: start with a letter or digit, and continue with",
        ),
        (
            "name=..",
            "name: '..': not usable as the name of a folder. Fix: start with a letter or digit, and continue with letters,",
        ),
        ("name=2024-01-01", "name: 2024-01-01: not text. Fix: put it in quotes"),
        ("seed=-1", "seed: -1: less than 0. Fix: set it to 0 or more"),
        ("model.base=../none/model", f"there is no folder {Path('../none/model').absolute()}"),
        ("data.source=none.jsonl", f"there is no file or folder {Path('none.jsonl').absolute()}"),
        ("eval.0.path=none.jsonl", f"eval.0.path: none.jsonl: there is no file or folder {Path('none.jsonl').absolute()}"),
        ("eval=5", "eval: 5: not a list. Fix: write a list, such as [a, b]"),
        ("eval.2.limit=3", "eval.2.limit: the list eval has the items 0 to 1. Fix: name one of its items"),
        ("eval.first.limit=3", "eval.first.limit: the list eval has the items 0 to 1. Fix: name one of its items"),
        ("name.x=3", "name.x: name is 'mine', which has no settings inside. Fix: set all of it"),
        ("hybrid.w_recent", "write it as --set part.setting=value"),
        ("=3", "write it as --set part.setting=value"),
        ("hybrid..w_recent=3", "write it as --set part.setting=value"),
        (
            "hybrid.w_recent=[",
            "hybrid.w_recent: '[': not YAML: while parsing a flow node; expected the node content, but found '<stream end>'",
        ),
        ("hybrid.w_recent=2024-13-45", "hybrid.w_recent: '2024-13-45': month must be in 1..12"),
    ],
)
def test_a_faulty_setting_is_reported_with_its_fix(recipe_file: Path, override: str, message: str) -> None:
    reported = faults(recipe_file, override)
    assert message in reported
    assert len(reported.splitlines()) == 2, "one fault, reported once"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hybrid.sink=learned", "hybrid.w_sink=4"], "hybrid.sink + hybrid.w_sink: learned sinks take the place of tokens"),
        (
            ["hybrid={select: per_prompt, lazy_layer_ratio: 0.5, granularity: kv_head}", "train=null"],
            "hybrid.granularity + hybrid.select: prompts choose entire layers. Fix: set granularity to layer, or select to static",
        ),
        (
            ["hybrid={layers: [1], streaming_kv_heads: [[0]]}", "hybrid.granularity=kv_head"],
            "hybrid.layers + hybrid.streaming_kv_heads: each names what streams. Fix: set one of them, and the others to null",
        ),
        (["hybrid.calibration.sink_steps=3"], "hybrid.calibration.sink_steps + hybrid.sink: no sinks are fitted"),
        (["train.sink_learning_rate=0.1"], "train.sink_learning_rate + hybrid.sink: there are no learned sinks"),
        (
            ["hybrid.sink=learned", "train.sequence_parallel=2", "train.deepspeed=launch/zero3.json"],
            "train.sequence_parallel + hybrid.sink: processes that share sequences divide the heads",
        ),
        (["train=null", "lora={}"], "lora + train: this recipe trains nothing. Fix: set lora to null"),
        (
            ["model.attention=flash", "model.dtype=fp32"],
            "model.attention + model.dtype: flash attention computes in bf16 only. Fix: set dtype to bf16, or attention to auto",
        ),
        (
            ["train.batch_size=null", "train.batch_tokens=2048"],
            "train.batch_tokens + data.packing: without packing, rows differ in length. Fix: set data.packing to true, or count",
        ),
        (
            ["train.sequence_parallel=2"],
            "train.sequence_parallel + train.deepspeed: sequence parallelism runs under DeepSpeed alone. Fix: name a",
        ),
        (
            ["train.sequence_parallel=2", "train.micro_batch_size=2"],
            "train.sequence_parallel + train.micro_batch_size: processes that share sequences take one row at a time. Fix: set",
        ),
        (
            ["train.sequence_parallel=2", "train.distill={weight: 0.5}"],
            "train.sequence_parallel + train.distill.weight: a teacher reads complete sequences, not slices. Fix: set",
        ),
        (
            ["train.sequence_parallel=2", "train.trl={pad_to_multiple_of: 64}"],
            "train.sequence_parallel + train.trl.pad_to_multiple_of: rows are padded to slices of equal length already. Fix:",
        ),
        (
            ["train.batch_size=null", "train.batch_tokens=5000", "train.micro_batch_size=2", "data.packing=true"],
            "train.batch_tokens + data.max_length + train.micro_batch_size: 5,000 is not a multiple of 1,024 x 2. Fix: set",
        ),
        (
            ["data.heldout=0", "eval=[{benchmark: heldout_kl}]"],
            "eval.0.benchmark + data.heldout: no samples are held out for heldout_kl. Fix: set data.heldout above 0",
        ),
        (["train.distill.weight=1.5"], "train.distill.weight: 1.5: more than 1. Fix: set it to 1 or less"),
        (
            ["train.distill.temperature=2.0"],
            "train.distill.temperature + train.distill.weight: weight is 0, so temperature has no effect. Fix: set weight above",
        ),
        (
            ["train.distill={weight: 0.5, teacher: top_k, hidden_weight: 1.0}"],
            "train.distill.hidden_weight + train.distill.teacher: files of teacher top_k hold no hidden states",
        ),
        (
            ["train.distill.weight=0.5", "train.trl.label_smoothing_factor=0.1"],
            "train.distill.weight + train.trl.label_smoothing_factor: the teacher's distribution is soft already. Fix: remove",
        ),
        (
            ["train.distill.weight=0.5", "lora.peft.bias=all"],
            "train.distill.teacher + lora.peft.bias: with bias: 'all' the model with its adapters off is not the base. Fix: set",
        ),
        (
            ["train.distill.weight=0.5", "lora.peft.init_lora_weights=pissa"],
            "train.distill.teacher + lora.peft.init_lora_weights: with init_lora_weights: 'pissa' the model with its adapters",
        ),
        (["train.distill.weight=0.5", "lora.peft.modules_to_save=[lm_head]"], "set teacher to copy"),
        (
            ["train.method=full", "train.distill.weight=0.5", f"train.deepspeed={RECIPES.parent / 'launch/zero3.json'}"],
            "train.distill.teacher + train.deepspeed: ZeRO-3 does not shard a frozen copy of the base",
        ),
        (
            ["train.parameters=lazy_projections"],
            "train.parameters + train.method: with LoRA, lora.layers and lora.targets choose what is trained. Fix: remove",
        ),
        (
            ["train.method=full", "train.parameters=lazy_projections", "train.restore_query_key=true"],
            "train.restore_query_key + train.parameters: the full-attention layers are not trained",
        ),
        (
            ["train.probes={steps: 2, evals: [{benchmark: needle}, {benchmark: needle}]}"],
            "train.probes.evals.1.name + train.probes.evals.0.name: two items are named needle. Fix: give one of them another name",
        ),
        (
            ["train.probes={steps: 2, evals: [{benchmark: needle, variants: [base]}]}"],
            "train.probes.evals.0.variants: a probe evaluates the checkpoint of a training. Fix: remove it",
        ),
        (
            ["train.probes={steps: 2, evals: [{benchmark: needle, backend: openai, servers: [a]}]}"],
            "train.probes.evals.0.backend: no server holds the checkpoint of a training. Fix: remove it",
        ),
        (
            ["train.probes={steps: 2, evals: [{benchmark: needle, name: eval_loss}]}"],
            "train.probes.evals.0.name: eval_loss is the name of the held-out loss. Fix: give the probe another name",
        ),
        (
            ["train.probes={steps: 2, evals: [{benchmark: needle, samples: 3}]}"],
            "train.probes.evals.0.samples + train.probes.evals.0.temperature: greedy answers are all equal. Fix: set samples to",
        ),
        (
            ["train.probes={steps: 2, device: gpu, evals: [{benchmark: needle}]}"],
            "train.probes.device: 'gpu': not a device. Fix: use same, cpu, or GPUs such as cuda:7 or cuda:6,7",
        ),
        (["data.heldout=0", "eval=[]", "train.eval_steps=null", "train.keep_best=eval_loss"], "train.keep_best + data.heldout"),
        (["train.keep_best=nedle"], "train.keep_best + train.probes.evals: 'nedle' is not measured. Fix: use one of eval_loss"),
        (
            ["train.keep_best=nedle", "train.probes={steps: 2, evals: [{benchmark: needle}]}"],
            "train.keep_best + train.probes.evals: 'nedle' is not measured. Fix: use one of eval_loss, needle",
        ),
        (
            ["train.final_weights=best"],
            "train.final_weights + train.keep_best: no metric defines the best weights. Fix: set keep_best to eval_loss or to the",
        ),
        (["train.restore_query_key=true"], "train.restore_query_key + lora.layers: the full-attention layers have no adapters"),
        (
            ["train.restore_query_key=true", "lora={layers: all, targets: [v_proj, o_proj]}"],
            "train.restore_query_key + lora.targets: no query or key projection has an adapter",
        ),
        (
            ["train.method=full", "lora={}"],
            "lora + train.method: method full trains no adapters. Fix: set lora to null, or train.method to lora",
        ),
        (
            ["hybrid.w_sink=0", "hybrid.w_recent=1"],
            "hybrid.w_recent + hybrid.w_sink: transformers caches every token of a window of one, so an export would generate "
            "others. Fix: set w_recent to at least 2",
        ),
        (["eval.0.benchmark=custom"], "eval.0.path: missing; custom has no data of its own. Fix: name a file"),
        (["eval.0.recall.keys=2"], "eval.0.recall: the problems of aime24 are read, not generated. Fix: remove it"),
        (["eval.0.benchmark=passkey", "eval.0.recall.keys=2"], "eval.0.recall.keys: unknown setting of passkey. Fix: remove it"),
        (
            ["eval.0.columns.answer=Answer"],
            "eval.0.columns + eval.0.benchmark: aime24 has columns of its own. Fix: remove columns, or set benchmark to custom",
        ),
        (["eval.0.max_prompt_tokens=99"], "eval.0.max_prompt_tokens: problems of aime24 are never truncated. Fix: remove it"),
        (
            ["eval.0.benchmark=needle", "eval.0.max_new_tokens=null", "eval.0.thinking_budget=4096"],
            "eval.0.thinking_budget + eval.0.max_new_tokens: no tokens are left for the answer behind the reasoning. Fix: raise",
        ),
        (
            ["eval.0.thinking_budget=99999999"],
            "eval.0.thinking_budget + eval.0.max_new_tokens: no tokens are left for the answer behind the reasoning. Fix: raise",
        ),
        (
            ["eval.0.temperature=0", "eval.0.samples=1", "eval.0.min_p=0.1"],
            "eval.0.min_p + eval.0.temperature: greedy decoding ignores min_p. Fix: remove min_p, or set temperature above 0",
        ),
        (
            ["eval.0.backend=openai"],
            "eval.0.servers + eval.0.backend: no server is named. Fix: list them, such as [http://localhost:8000]",
        ),
        (
            ["eval.0.servers=[http://a:1]"],
            "eval.0.servers + eval.0.backend: the built-in engine queries no servers. Fix: set backend to openai",
        ),
        (
            ["eval.0.backend=openai", "eval.0.servers=[http://a:1]", "eval.0.variants=[base, converted]"],
            "eval.0.variants + eval.0.backend: servers serve one model. Fix: evaluate each variant in an item of its own",
        ),
        (
            ["eval.0.backend=openai", "eval.0.servers=[http://a:1]", "eval.0.thinking_budget=5"],
            "eval.0.thinking_budget + eval.0.backend: a server cannot close the reasoning. Fix: set backend to hybrid",
        ),
        (
            ["sample={benchmark: custom, max_new_tokens: 5}"],
            "sample.path: missing; custom has no data of its own. Fix: name a file",
        ),
        (["sample={benchmark: aime24, max_new_tokens: 5, samples: 2}"], "sample.samples + sample.temperature: greedy answers"),
        (
            ["sample={benchmark: aime24, max_new_tokens: 5, min_tokens: 5, max_tokens: 4}"],
            "sample.max_tokens + sample.min_tokens: max_tokens is below min_tokens. Fix: swap them",
        ),
        (["sample={benchmark: aime24, max_new_tokens: 5, variants: [base, trained]}"], "sample.variants"),
        (["eval.0.kv_budget=8GXB"], "eval.0.kv_budget: '8GXB': not a size in bytes. Fix: write a number and a unit, such as 8GiB"),
        (
            ["train=null", "eval.0.variants=[trained]"],
            "eval.0.variants + train: this recipe trains nothing. Fix: evaluate converted instead of trained, or add a train part",
        ),
        (
            ["data.heldout=0", "eval.1.benchmark=gsm8k", "eval.1.max_new_tokens=4", "train.eval_steps=5"],
            "train.eval_steps + data.heldout: no samples are held out to measure the loss on. Fix: set data.heldout above 0, or",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_reported(recipe_file: Path, overrides: list[str], message: str) -> None:
    assert message in faults(recipe_file, *overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "the file holds a list"),
        ("name: [\n", "not YAML"),
        ("name: mine\n\tseed: 1\n", "not YAML"),
        ("name: mine\nseed: 1\nseed: 2\n", "seed: given twice, first on line 2. Fix: keep one (line 3)"),
        ("name: mine\nmodel:\n  base: a/b\n  base: c/d\n", "model.base: given twice, first on line 3. Fix: keep one (line 4)"),
        ("name: !!python/object/apply:os.getcwd []\n", "name: tag !!python/object/apply:os.getcwd is not read. Fix: remove it"),
        ("name: mine\n? [1]\n: 2\n", "?: the name of a setting is not text. Fix: put it in quotes (line 2)"),
        ("name: mine\n5: 6\n", "5: the name of a setting is not text. Fix: put it in quotes (line 2)"),
        ("name: mine\ntrain: &here {trl: *here}\n", "nested too deeply"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_reported(tmp_path: Path, text: str, message: str) -> None:
    assert message in faults_of(tmp_path, text)


def test_several_faults_in_one_list_are_reported_by_their_own_indices(recipe_file: Path) -> None:
    reported = faults(recipe_file, "hybrid={layers: [-1, 5, x, y]}").splitlines()[1:]
    assert [line.split(":")[0].strip() for line in reported] == ["hybrid.layers.0", "hybrid.layers.2", "hybrid.layers.3"]


def test_a_recipe_that_does_not_exist_or_is_not_text_is_reported(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in faults(tmp_path / "none.yaml")
    assert "cannot be read" in faults(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "not UTF-8" in faults(tmp_path / "binary.yaml")


def test_later_overrides_win_and_absent_parts_are_made(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["hybrid.w_recent=8", "hybrid.w_recent=16", "lora.rank=4", "eval.0.limit=4"])
    assert (recipe.hybrid.w_recent, recipe.lora.rank, recipe.eval[0].limit) == (16, 4, 4)
    recipe = load_recipe(recipe_file, ["prompt.user=a=b {question}", "train.trl.optim=sgd", "prompt.system="])
    assert (recipe.prompt.user, recipe.train.trl, recipe.prompt.system) == ("a=b {question}", {"optim": "sgd"}, None)


def test_an_override_of_one_alias_leaves_its_duplicates_alone(tmp_path: Path) -> None:
    text = "eval:\n- &one {benchmark: aime24, name: a}\n- {<<: *one, name: b}\n- *one\n"
    values = read_recipe_text(text, ["eval.0.name=c"]).values
    assert [evaluation["name"] for evaluation in values["eval"]] == ["c", "b", "a"]
    assert not read_recipe_text(text).faults


# PyYAML writes "0E0" bare, by the rules of YAML 1.1; to a recipe it is a number, as in 1.2.
TEXT = st.text().filter(lambda text: not re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", text))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT


@settings(max_examples=40, deadline=None)
@given(st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=6))
def test_an_override_holds_any_value_that_yaml_can_write(value: object) -> None:
    written = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=False).removesuffix("...\n")
    text = read_recipe_text("a: {b: [0, 1]}", [f"a.b.1={written}"])
    assert text.faults == []
    assert text.values == {"a": {"b": [0, value]}}


@given(st.text(max_size=40), st.lists(st.text(max_size=12), max_size=3))
def test_no_text_and_no_override_breaks_the_reader(text: str, overrides: list[str]) -> None:
    recipe = read_recipe_text(text, [*overrides, *(f"a.b={override}" for override in overrides)])
    assert isinstance(recipe.values, dict) or recipe.faults


def test_loading_a_recipe_is_fast_and_imports_nothing_heavy() -> None:
    heavy = "torch", "transformers", "trl", "peft", "datasets", "numpy", "pyarrow"
    code = (
        "import sys; from pathlib import Path; from lt_train.recipe.loading import load_recipe; "
        f"load_recipe(Path({str(RECIPES / 'smollm2-135m.yaml')!r})); "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=RECIPES.parent)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5, "measured at 0.4 s; room for a machine under load"


def test_faults_of_a_rope_scaling_are_named_one_by_one(recipe_file: Path) -> None:
    reported = faults(recipe_file, "model.rope_scaling={rope_type: dynamic, factor: 0.5}")
    assert "model.rope_scaling.rope_type: 'dynamic'" in reported and "model.rope_scaling.factor: 0.5: not above 1" in reported
    assert "model.rope_scaling.factor: missing. Fix: set it to" in faults(recipe_file, "model.rope_scaling={rope_type: yarn}")
    assert load_recipe(recipe_file, ["model.rope_scaling={rope_type: yarn, factor: 4}"]).model.rope_scaling.factor == 4


def test_names_of_other_trainers_lead_to_settings_that_exist_and_are_none_of_ours() -> None:
    settings = all_settings(Recipe)
    names = [name for others in NAMES_ELSEWHERE.values() for name in others]
    assert NAMES_ELSEWHERE.keys() <= set(settings)
    assert len(set(names)) == len(names)
    assert not set(names) & {setting.rpartition(".")[2] for setting in settings}
