"""The stages on the shipped tiny reasoner, in this process, each shrunk to seconds."""

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lt_train.evaluation.plan import make_plan
from lt_train.evaluation.scores import read_scores
from lt_train.inference.loading import load_for_inference
from lt_train.pipeline import evaluations
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.evaluations import _time_left
from lt_train.pipeline.run_folder import RunFolder
from lt_train.pipeline.time_left import time_left
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.runtime.devices import release_memory
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json, write_json
from lt_train.runtime.processes import Process
from tests.support.repository import REPOSITORY
from tests.support.runs import run_in_folder
from tests.support.tiny_exports import exports_are_not_checked
from tests.support.tiny_run import REASONER, write_recipe

PERIODIC = ("hybrid.strategy=periodic",)
NEW_EACH_TIME = (".lock", "recipe.yaml", "inputs.json")
TRAINING_FREE = (*PERIODIC, "train=null", "lora=null")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, str]:
    """The folder that holds a whole run, and what the run printed. Tests work on copies of it."""
    runs = tmp_path_factory.mktemp("runs")
    return runs, run_in_folder(load_recipe(inputs / "recipe.yaml"), runs)


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "runs"))


@pytest.fixture
def recipe(inputs) -> Recipe:
    return load_recipe(inputs / "recipe.yaml")


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, and what it says."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in NEW_EACH_TIME]
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def marked(run: Path) -> list[str]:
    """The stages done, in the order in which they were finished."""
    return [marker.stem for marker in sorted((run / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)]


def test_a_run_leaves_what_each_stage_makes_in_their_order(finished):
    run = finished[0] / "tiny"
    assert marked(run) == ["profile", "hybrid", "train", "eval", "export"]
    for made in (
        "profile/profile.json",
        "profile/profile.png",
        "hybrid/layers.json",
        "hybrid/config.json",
        "train/log.jsonl",
        "train/final",
        "eval/trained/ledger/scores.json",
        "eval/trained/heldout_loss/scores.json",
        "eval/trained/heldout_kl/scores.json",
        "export/config.json",
        "export/model.safetensors",
        "export/README.md",
    ):
        assert (run / made).exists(), made


def test_a_run_shows_what_it_does_and_found(finished):
    _, printed = finished
    for line in (
        "reach: the halves of the samples choose",
        "4 of 8 layers stream, chosen by reach",
        "rows 16",
        "train 12",
        "heldout 4",
        "reach, trained",
    ):
        assert line in printed


def test_a_run_reports_once_what_computes_attention_and_why(finished):
    _, printed = finished
    assert printed.count("attention ") == 1 and "attention blocked: " in printed


def test_each_stage_is_announced_with_its_number_and_from_the_second_on_with_the_time_left(finished):
    heads = re.findall(r"run +stage (\d) of 5: (\w+)(.*)", finished[1])
    assert [(int(number), name) for number, name, _ in heads] == list(
        enumerate(("profile", "convert", "train", "eval", "export"), 1)
    )
    assert [bool(re.search(r"; about .* left, evaluation aside$", rest)) for *_, rest in heads] == [False, True, True, False, False]


def test_the_time_left_is_the_operations_left_at_the_measured_rate(recipe, runs):
    context = RunContext(recipe, RunFolder(recipe, runs), Console(quiet=True), Process(0, 1, launched=False))
    marker, left = context.paths.marker("profile"), {}
    for hours in (1, 2):
        write_json(marker, {**read_json(marker, "stage marker"), "seconds": 3600 * hours})
        line = time_left(context, ["profile"], ["convert", "train", "eval"])
        number, unit = re.fullmatch(r"about ([\d.]+) (hours|minutes) left, evaluation aside", line).groups()
        left[hours] = float(number) * {"hours": 60, "minutes": 1}[unit]
    assert left[2] == pytest.approx(2 * left[1], rel=0.02)
    assert time_left(context, [], ["profile", "train"]) == time_left(context, ["profile", "train"], ["eval"]) == ""


def test_the_rest_of_an_evaluation_follows_from_the_variants_measured_now_and_not_from_those_of_before():
    pending = ["converted", "trained"]  # base was measured before
    assert _time_left(5.0, pending, "base") == _time_left(5.0, pending, "converted") == ""
    assert _time_left(60.0, pending, "trained") == "about 60 seconds left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU flash attention can train")
@pytest.mark.parametrize("stage", ["profile", "train", "eval"])
@pytest.mark.parametrize("overrides", [(), PERIODIC])
def test_attention_that_the_device_cannot_compute_is_refused_before_weights_are_loaded(
    stage, overrides, inputs, tmp_path, monkeypatch
):
    if stage == "profile" and overrides == PERIODIC:
        pytest.skip("a choice without scores has nothing to profile")
    for load in ("lt_train.pipeline.stages.profile.load_for_inference", "lt_train.pipeline.stages.train.load_weights"):
        monkeypatch.setattr(load, lambda *given, **settings: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"model\.attention: flash: .* Fix: set auto"):
        run_in_folder(
            load_recipe(inputs / "recipe.yaml", ["model.attention=flash", "model.dtype=bf16", *overrides]), tmp_path, stage
        )


@pytest.mark.parametrize("stage", ["convert", "teacher"])
def test_a_model_on_all_gpus_is_gone_before_the_other_processes_that_wait_go_on(stage, inputs, tmp_path, monkeypatch):
    loaded, released = [], []

    def load(*given, others_wait):
        model = load_for_inference(*given, others_wait=others_wait)
        loaded.append(weakref.ref(model))
        assert others_wait
        return model

    def release():
        release_memory()
        released.append(all(model() is None for model in loaded))
        assert marked(tmp_path / "tiny") == []

    for loading_stage in ("profile", "teach"):
        monkeypatch.setattr(f"lt_train.pipeline.stages.{loading_stage}.load_for_inference", load)
        monkeypatch.setattr(f"lt_train.pipeline.stages.{loading_stage}.release_memory", release)
    distill = "train.distill={weight: 0.5, teacher: top_k, top_k: 4}"
    run_in_folder(load_recipe(inputs / "recipe.yaml", [distill] if stage == "teacher" else []), tmp_path, stage)
    assert released == [True] and len(loaded) == 1


def test_a_finished_run_does_nothing_again(recipe, runs):
    before = contents(runs / "tiny")
    assert "reach, trained" in run_in_folder(recipe, runs)
    assert contents(runs / "tiny") == before


def test_a_teacher_on_disk_is_written_once_and_trained_from(inputs, tmp_path):
    distill = "train.distill={weight: 0.5, teacher: top_k, top_k: 4}"
    recipe = load_recipe(inputs / "recipe.yaml", [*PERIODIC, distill])
    assert "the 4 likeliest next tokens of the base on 12 samples" in run_in_folder(recipe, tmp_path, "teacher")
    before = contents(tmp_path / "tiny")
    assert {"teacher/indices.npy", "teacher/log_probs.npy", "teacher/rest.npy", "teacher/progress.json"} <= before.keys()
    assert "likeliest" not in run_in_folder(recipe, tmp_path, "train")
    after = contents(tmp_path / "tiny")
    assert all(after[name] == before[name] for name in before)
    first = json.loads(after["train/log.jsonl"][1].splitlines()[0])
    assert first["kl"] > 0 and first["loss"] == pytest.approx(0.5 * first["sft_loss"] + 0.5 * first["kl"], abs=1e-5)


def test_a_teacher_that_nothing_learns_from_is_not_written(recipe, tmp_path):
    with pytest.raises(UserError, match="reads no teacher from disk"):
        run_in_folder(recipe, tmp_path, "teacher")


def test_a_changed_evaluation_is_measured_without_training_again(inputs, runs):
    before = contents(runs / "tiny")
    run_in_folder(load_recipe(inputs / "recipe.yaml", ["eval.0.limit=5"]), runs, "eval")
    after = contents(runs / "tiny")
    assert {name for name in before if before[name] != after.get(name)} == {
        "stages/eval.json",
        "eval/trained/ledger/samples.jsonl",
        "eval/trained/ledger/scores.json",
    }
    assert read_scores(runs / "tiny/eval/trained/ledger/scores.json").problems == 5


def test_problems_that_changed_after_their_evaluation_are_an_error_and_their_scores_are_not_shown_as_new(inputs, runs, tmp_path):
    own = shutil.copy(inputs / "problems.jsonl", tmp_path)
    recipe = load_recipe(inputs / "recipe.yaml", [f"eval.0.path={own}"])
    run_in_folder(recipe, runs, "eval")
    before = contents(runs / "tiny")
    run_in_folder(recipe, runs, "eval")
    assert contents(runs / "tiny") == before
    damaged_row(tmp_path, "problems.jsonl", 1, answer="0")
    with pytest.raises(UserError, match=r"tiny/eval/trained/ledger: holds samples made in another way(.|\n)*problems: "):
        run_in_folder(recipe, runs, "eval")


def test_a_stage_first_does_those_before_it_and_none_after_it(recipe, tmp_path):
    run_in_folder(recipe, tmp_path, "convert")
    assert marked(tmp_path / "tiny") == ["profile", "hybrid"]
    run_in_folder(recipe, tmp_path, "train")
    assert marked(tmp_path / "tiny") == ["profile", "hybrid", "train"]


@pytest.mark.slow
def test_a_training_free_recipe_is_evaluated_and_exported_as_converted(inputs, tmp_path):
    printed = run_in_folder(load_recipe(inputs / "recipe.yaml", TRAINING_FREE), tmp_path)
    assert marked(tmp_path / "tiny") == ["hybrid", "eval", "export"]
    assert "periodic, untrained" in printed
    assert not (tmp_path / "tiny/train").exists()
    assert (tmp_path / "tiny/export/model.safetensors").is_file()


@pytest.mark.parametrize(("system", "shown"), [("null", "<|im_start|>system\n1 2 3<|im_end|>"), ("4 5", "4 5")])
def test_the_card_of_an_export_shows_where_its_prompts_are_not_those_of_the_template_alone(inputs, tmp_path, system, shown):
    base = shutil.copytree(REASONER, tmp_path / "base")
    template = base / "chat_template.jinja"
    default = r"{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\n1 2 3<|im_end|>\n' -}}{%- endif -%}"
    template.write_text(default + template.read_text(encoding="utf-8"), encoding="utf-8")
    with exports_are_not_checked():
        given = (*TRAINING_FREE, f"model.base={base}", "eval=[]", f"prompt.system={system}")
        run_in_folder(load_recipe(inputs / "recipe.yaml", given), tmp_path)
    assert f"```text\n{shown}\n```" in (tmp_path / "tiny/export/README.md").read_text(encoding="utf-8")


def test_the_plan_of_an_evaluation_is_made_once_for_all_models(inputs, tmp_path, monkeypatch):
    made = []

    def counted(entry, *args, **kwargs):
        made.append(entry.name)
        return make_plan(entry, *args, **kwargs)

    monkeypatch.setattr(evaluations, "make_plan", counted)
    compared = (*TRAINING_FREE, "eval.0.variants=[base, converted]", "eval.1.variants=[base]")
    run_in_folder(load_recipe(inputs / "recipe.yaml", compared), tmp_path, "eval")
    assert made == ["ledger"]
    scores = [read_scores(tmp_path / f"tiny/eval/{variant}/ledger/scores.json") for variant in ("base", "converted")]
    differing = {name for name in scores[0].fingerprint if scores[0].fingerprint[name] != scores[1].fingerprint[name]}
    assert differing == {"model"}


def test_layers_that_the_recipe_names_need_no_profile(inputs, tmp_path):
    named = ("hybrid.layers=[6, 1]", "hybrid.lazy_layer_ratio=null", "hybrid.strategy=null")
    printed = run_in_folder(load_recipe(inputs / "recipe.yaml", named), tmp_path, "convert")
    assert "2 of 8 layers stream, named in the recipe: 1, 6" in printed
    assert json.loads((tmp_path / "tiny/hybrid/layers.json").read_text()) == {"converted": [1, 6]}
    assert not (tmp_path / "tiny/profile").exists()


@pytest.mark.parametrize(
    ("made", "again"),
    [
        ("profile/profile.json", "profile"),
        ("hybrid/layers.json", "hybrid"),
        ("eval/trained/ledger/scores.json", "eval"),
        pytest.param("export/model.safetensors", "export", marks=pytest.mark.slow),
    ],
)
def test_what_was_deleted_is_made_again(recipe, runs, made, again):
    if again == "export":
        shutil.rmtree(runs / "tiny/export")
    else:
        (runs / "tiny" / made).unlink()
    run_in_folder(recipe, runs)
    assert (runs / "tiny" / made).is_file()
    assert marked(runs / "tiny")[-1] == again


def damaged_row(inputs: Path, file: str, number: int, **fields: str | None) -> None:
    """Change fields of a row, counted from 1; None takes one out."""
    lines = (inputs / file).read_text().splitlines()
    row = {**json.loads(lines[number - 1]), **fields}
    lines[number - 1] = json.dumps({name: value for name, value in row.items() if value is not None})
    (inputs / file).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("damage", "overrides", "reported"),
    [
        (("traces.jsonl", 3, {"combined_text": None}), (), r"traces\.jsonl:3: no field 'combined_text'"),
        (("traces.jsonl", 16, {"combined_text": " "}), (), r"traces\.jsonl:16: the answer is empty"),
        (("problems.jsonl", 6, {"answer": None}), (), r"problems\.jsonl:6: field 'answer' is missing"),
        (None, ("hybrid.w_recent=1020",), r"hybrid\.w_recent: 1020: 2 of 2 calibration samples fit inside the window"),
        (None, ("data.heldout=16",), r"data\.heldout: 16 samples cannot be set aside"),
        (None, ("hybrid.lazy_layer_ratio=0.01", *PERIODIC), r"hybrid\.lazy_layer_ratio: 0\.01: of 8 layers 0 would stream"),
        (None, ("hybrid.lazy_layer_ratio=0.99", *PERIODIC), r"hybrid\.lazy_layer_ratio: 0\.99: of 8 layers 8 would stream"),
        (None, ("hybrid.layers=[8]", "hybrid.lazy_layer_ratio=null", "hybrid.strategy=null"), r"hybrid\.layers: layer 8"),
        (None, ("eval.0.max_new_tokens=65536",), r"65536"),
        (None, ("lora.targets=[c_attn]",), r"lora\.targets: c_attn: no linear module of a layer has this name"),
        (None, ("lora.peft.modules_to_save=[score]", *PERIODIC), r"lora\.peft\.modules_to_save: score: no module has this name"),
    ],
)
def test_a_run_that_cannot_be_done_stops_before_it_has_made_anything(inputs, tmp_path, damage, overrides, reported):
    own = Path(shutil.copytree(inputs, tmp_path / "inputs"))
    write_recipe(own)
    if damage is not None:
        damaged_row(own, damage[0], damage[1], **damage[2])
    with pytest.raises(UserError, match=reported):
        run_in_folder(load_recipe(own / "recipe.yaml", overrides), tmp_path)
    assert {name for name in contents(tmp_path / "tiny") if not name.startswith("data/")} == set()  # data/: its tokens, a cache


def test_a_setting_fixed_after_a_refusal_resumes_under_the_same_name(inputs, tmp_path):
    wrong = load_recipe(inputs / "recipe.yaml", ["hybrid.w_recent=1020"])
    with pytest.raises(UserError, match=r"hybrid\.w_recent"):
        run_in_folder(wrong, tmp_path, "profile")
    run_in_folder(load_recipe(inputs / "recipe.yaml"), tmp_path, "profile")
    with pytest.raises(UserError, match=r"hybrid\.w_recent: 12, 1020"):
        run_in_folder(wrong, tmp_path, "profile")


@pytest.mark.slow
def test_an_export_with_other_settings_is_written_beside_the_former_one(inputs, runs):
    changed = load_recipe(inputs / "recipe.yaml", ["export.dtype=bf16"])
    assert "the previous export is now in" in run_in_folder(changed, runs, "export")
    dtypes = [json.loads((runs / "tiny" / name / "config.json").read_text())["dtype"] for name in ("export-1", "export")]
    assert dtypes == ["float32", "bfloat16"]


def test_a_ratio_that_does_not_fit_the_model_is_refused_before_layers_are_scored(inputs, tmp_path):
    recipe = load_recipe(inputs / "recipe.yaml", ["hybrid.lazy_layer_ratio=0.01"])
    with pytest.raises(UserError, match="of 8 layers 0 would stream"):
        run_in_folder(recipe, tmp_path, "profile")
    assert not list((tmp_path / "tiny").glob("profile/*"))


@pytest.mark.parametrize("command", ["profile", "convert", "train", "eval", "run"])
def test_adapters_on_modules_that_the_base_lacks_are_refused_before_data_and_weights_are_read(
    inputs, tmp_path, monkeypatch, command
):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("lt_train.dataset.loading.load_examples", never)
    monkeypatch.setattr("lt_train.inference.loading.load_weights", never)
    with pytest.raises(UserError, match=r"lora\.targets: c_attn: .*Fix: name some of down_proj, .*q_proj"):
        run_in_folder(load_recipe(inputs / "recipe.yaml", ["lora.targets=[q_proj, c_attn]"]), tmp_path, command)


def test_correct_answers_of_the_base_become_training_data(inputs, tmp_path):
    part = f"sample={{benchmark: ledger, path: {inputs / 'problems.jsonl'}, samples: 2, temperature: 1.0, max_new_tokens: 120}}"
    printed = run_in_folder(load_recipe(inputs / "recipe.yaml", [part]), tmp_path, "sample")
    rows = [json.loads(line) for line in (tmp_path / "tiny/sample/base/ledger/traces.jsonl").read_text().splitlines()]
    assert 4 <= len(rows) <= 6 and {row["prompt"][:7] for row in rows} == {"Ledger:"}
    assert "generated 12" in printed and "data.format: prompt_response" in printed
    assert not (tmp_path / "tiny/hybrid").exists()


def test_a_recipe_without_a_sample_part_draws_none(recipe, tmp_path):
    with pytest.raises(UserError, match="add a `sample` part"):
        run_in_folder(recipe, tmp_path, "sample")


def test_two_evaluations_of_one_kind_are_kept_apart_by_their_names(inputs, runs):
    second = "eval.1={benchmark: ledger, name: shorter, path: PATH, limit: 2, max_new_tokens: 4}"
    recipe = load_recipe(inputs / "recipe.yaml", [second.replace("PATH", str(inputs / "problems.jsonl"))])
    run_in_folder(recipe, runs, "eval")
    assert read_scores(runs / "tiny/eval/trained/shorter/scores.json").problems == 2
    assert read_scores(runs / "tiny/eval/trained/ledger/scores.json").problems == 4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def cut_in_the_middle(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:-20], *lines[1:]]) + "\n")


@pytest.mark.parametrize(
    ("name", "damage", "undone"),
    [
        ("profile/profile.json", cut, "hybrid"),
        ("profile/samples.jsonl", cut_in_the_middle, "profile"),
        ("hybrid/layers.json", cut, "eval"),
        ("eval/trained/ledger/samples.jsonl", cut_in_the_middle, "eval"),
        ("eval/trained/ledger/scores.json", cut, "eval"),
        ("stages/train.json", cut, "eval"),
        ("inputs.json", cut, "eval"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_and_nothing_is_changed(recipe, runs, name, damage, undone):
    run = runs / "tiny"
    (run / f"stages/{undone}.json").unlink()  # the run was killed in this stage
    if name.endswith("samples.jsonl"):
        (run / name).with_name("profile.json" if undone == "profile" else "scores.json").unlink()
    damage(run / name)
    before = contents(run)
    with pytest.raises(UserError, match=name):
        run_in_folder(recipe, runs)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("name", "made", "undone"),
    [
        ("profile/samples.jsonl", "profile/profile.json", "profile"),
        ("eval/trained/ledger/samples.jsonl", "eval/trained/ledger/scores.json", "eval"),
    ],
)
def test_a_truncated_last_line_is_made_again_and_the_result_is_the_same(recipe, runs, name, made, undone):
    run = runs / "tiny"
    whole = json.loads((run / made).read_text())
    (run / f"stages/{undone}.json").unlink()
    (run / made).unlink()
    lines = (run / name).read_text().splitlines()
    cut(run / name)
    run_in_folder(recipe, runs, "eval")
    assert (run / name).read_text().splitlines()[:-1] == lines[:-1]
    again = json.loads((run / made).read_text())
    for timing in ("started", "tokens_per_second"):
        whole.pop(timing, None)
        again.pop(timing, None)
    assert again == whole


def test_a_command_lists_the_earlier_stages_that_it_does_first(recipe, tmp_path):
    printed = run_in_folder(recipe, tmp_path, "eval")
    first = next(line for line in printed.splitlines() if line.startswith("eval"))
    assert first.endswith(
        "first: profile (8 layers by reach, 2 samples), convert (50% of the layers), train (lora, 2 steps, 4 samples a step)"
    )


def test_only_refuses_where_an_earlier_stage_is_not_done(recipe, tmp_path):
    with pytest.raises(UserError, match=r"export --only: not done yet: profile \(.*train \(.*eval \(ledger"):
        run_in_folder(recipe, tmp_path, "export", only=True)
    assert contents(tmp_path / "tiny").keys() == set()


def test_only_does_a_stage_whose_earlier_ones_are_done(recipe, runs):
    (runs / "tiny/stages/eval.json").unlink()
    assert "first:" not in run_in_folder(recipe, runs, "eval", only=True)
    assert marked(runs / "tiny")[-1] == "eval"


@pytest.mark.parametrize(
    "setting",
    [
        "train.keep_checkpoints=5",
        "train.gradient_checkpointing=true",
        "train.micro_batch_size=1",
        "train.deepspeed=DEEPSPEED",
        "train.keep_best=eval_loss",
    ],
)
def test_a_setting_that_shapes_no_weights_may_change_after_training_and_nothing_is_redone(inputs, runs, setting):
    before = contents(runs / "tiny")
    changed = setting.replace("DEEPSPEED", str(REPOSITORY / "launch/zero2.json"))
    run_in_folder(load_recipe(inputs / "recipe.yaml", [changed]), runs)
    assert contents(runs / "tiny") == before


@pytest.mark.slow
def test_the_best_weights_are_published_after_training_without_training_again(inputs, tmp_path):
    kept = ("train.keep_best=eval_loss", "train.save_steps=1", "train.learning_rate=0.5", *PERIODIC)  # the first step is the best
    kept += ("eval=[{benchmark: heldout_loss, batch_size: 4}]",)
    last, best = (load_recipe(inputs / "recipe.yaml", [*kept, f"train.final_weights={which}"]) for which in ("last", "best"))
    run_in_folder(last, tmp_path)
    run = tmp_path / "tiny"
    before = contents(run)
    printed = run_in_folder(best, tmp_path)
    after = contents(run)
    assert "the trained model has the weights of step 1, the best by eval_loss" in printed and "training 2/2" not in printed
    assert "the previous scores are now in" in printed and "the previous export is now in" in printed
    for name in ("train/final/adapter_model.safetensors", "eval/trained/heldout_loss/scores.json", "export/model.safetensors"):
        assert before[name][1] != after[name][1], name
    assert after["train/log.jsonl"] == before["train/log.jsonl"]
    assert after["eval-trained-1/heldout_loss/scores.json"][1] == before["eval/trained/heldout_loss/scores.json"][1]
    again = contents(run)
    run_in_folder(best, tmp_path)
    assert contents(run) == again


@pytest.mark.slow
def test_query_and_key_are_put_back_after_training_without_training_again_and_the_export_and_its_card_follow(inputs, tmp_path):
    full = ("train.method=full", "train.learning_rate=1e-3", "eval=[{benchmark: heldout_loss, batch_size: 4}]", *PERIODIC)
    run_in_folder(load_recipe(inputs / "recipe.yaml", full), tmp_path)
    run = tmp_path / "tiny"
    before = contents(run)
    run_in_folder(load_recipe(inputs / "recipe.yaml", [*full, "train.restore_query_key=true"]), tmp_path)
    after = contents(run)
    assert {name for name in before if name.startswith("train/") and before[name] != after[name]} == set()
    assert before["eval/trained/heldout_loss/scores.json"][1] != after["eval/trained/heldout_loss/scores.json"][1]
    base, trained, exported = (
        load_file(folder / "model.safetensors")
        for folder in (REPOSITORY / "data/tiny-reasoner", run / "train/final", run / "export")
    )
    full_layers = set(range(8)) - set(json.loads((run / "hybrid/layers.json").read_text())["converted"])
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in full_layers for part in "qk"]
    for name in names:
        assert torch.equal(exported[name], base[name].to(exported[name].dtype)) and not torch.equal(trained[name], base[name])
    kept = [name for name in exported if ".self_attn." in name and name not in names and name.endswith("proj.weight")]
    assert all(torch.equal(exported[name], trained[name].to(exported[name].dtype)) for name in kept)
    assert "put back after training" in after["export/README.md"][1].decode()
    assert "put back after training" not in before["export/README.md"][1].decode()
