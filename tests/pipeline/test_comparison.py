"""`lt-train compare`: a run for each way to choose the layers, and what they show together."""

import json
import time
from pathlib import Path

import pytest
import yaml

from lt_train.pipeline.comparison import compare, trains_any_alike
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process

ALONE = Process(0, 1, launched=False)
OVERRIDES = ("train=null", "lora=null", "eval=[{benchmark: heldout_loss, batch_size: 4, variants: [converted]}]")
GRID = ("grid={strategies: [reach, nll, periodic, random], ratios: [0.5]}",)  # nll chooses the layers that reach does


@pytest.fixture(scope="module")
def recipe(inputs) -> Path:
    return inputs / "recipe.yaml"


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    compare(recipe, (*OVERRIDES, *GRID), False, folder, ALONE)
    return folder


def test_every_cell_is_a_run_whose_recipe_names_the_layers_that_its_strategy_chose(runs) -> None:
    chosen = json.loads((runs / "tiny-periodic-4of8/hybrid/layers.json").read_text())
    assert chosen == {"converted": [0, 2, 4, 6]}
    recipe = yaml.safe_load((runs / "tiny-periodic-4of8/recipe.yaml").read_text())
    assert recipe["hybrid"]["layers"] == [0, 2, 4, 6] and recipe["hybrid"]["strategy"] is None
    assert not (runs / "tiny-periodic-4of8/profile").exists()
    assert sorted(each.name for each in (runs / "tiny-comparison").iterdir()) == [
        "comparison.html",
        "comparison.md",
        "heldout_loss.png",
    ]


def test_strategies_that_choose_the_same_layers_share_a_run(runs) -> None:
    assert sorted(path.name for path in runs.glob("tiny-*-4of8")) == ["tiny-periodic-4of8", "tiny-random-4of8", "tiny-reach-4of8"]
    text = (runs / "tiny-comparison/comparison.md").read_text()
    rows = {row.split(" | ")[1]: row.split(" | ")[2:] for row in text.splitlines() if row.startswith("| 4 of 8")}
    assert rows["reach"] == rows["nll"] != rows["random"]


def test_finished_cells_are_not_run_again_and_a_missing_one_is(runs, recipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/eval/*/*/scores.json")}
    gone = runs / "tiny-random-4of8/eval/converted/heldout_loss/scores.json"
    text = gone.read_text()
    gone.unlink()
    time.sleep(0.01)
    compare(recipe, (*OVERRIDES, *GRID), False, runs, ALONE)
    after = {path: path.stat().st_mtime_ns for path in runs.glob("*/eval/*/*/scores.json")}
    assert len(before) == 4 and [path for path in before if after[path] != before[path]] == [gone]
    assert json.loads(gone.read_text())["loss"] == json.loads(text)["loss"]


STEADY = ("hybrid.w_recent=32", "hybrid.calibration.samples=4", "hybrid.calibration.long_reach_fraction=0.5")
"""With these the shares of the tiny reasoner's KV heads add up to the measured rise."""


def test_kv_heads_by_gates_that_are_added_later_stand_beside_layers_with_the_same_kv_cache(recipe, tmp_path) -> None:
    compare(recipe, (*OVERRIDES, *STEADY, "grid={strategies: [periodic], ratios: [0.75]}"), True, tmp_path, ALONE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/eval/*/*/scores.json")}
    grid = "grid={strategies: [periodic], ratios: [0.5, 0.75], granularities: [layer, kv_head]}"
    out = compare(recipe, (*OVERRIDES, *STEADY, grid), True, tmp_path, ALONE)
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2  # the base and periodic layers
    assert [path.parents[1].name for path in tmp_path.glob("*/profile/profile.json")] == ["tiny-quick-base"]
    assert not (tmp_path / "tiny-quick-gates-8of16heads").exists()  # quick has heads at the largest ratio alone
    hybrid = yaml.safe_load((tmp_path / "tiny-quick-gates-12of16heads/recipe.yaml").read_text())["hybrid"]
    assert hybrid["granularity"] == "kv_head" and sum(map(len, hybrid["streaming_kv_heads"])) == 12
    assert not (tmp_path / "tiny-quick-gates-12of16heads/profile").exists()
    rows = [line.split(" | ") for line in (out / "comparison.md").read_text().splitlines() if line.startswith("| 6 of 8")]
    assert [row[1] for row in rows] == ["periodic", "gates by head"]
    assert rows[0][-2] == rows[1][-2] and float(rows[1][-1].strip(" |")) < float(rows[0][-1].strip(" |"))  # KV cache, predicted


def test_prompts_that_choose_stand_beside_static_choices_where_answers_are_generated(recipe, tmp_path) -> None:
    answers = f"{{benchmark: ledger, path: {recipe.parent / 'problems.jsonl'}, limit: 2, max_new_tokens: 8}}"
    overrides = (f"eval=[{{benchmark: heldout_loss, batch_size: 4}}, {answers}]", "train=null", "lora=null")
    grid = "grid={strategies: [periodic, per_prompt], ratios: [0.5]}"
    out = compare(recipe, (*overrides, grid), False, tmp_path, ALONE)
    cell = yaml.safe_load((tmp_path / "tiny-per_prompt-4of8/recipe.yaml").read_text())
    assert cell["hybrid"]["select"] == "per_prompt" and [each["benchmark"] for each in cell["eval"]] == ["ledger"]
    text = (out / "comparison.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| 4 of 8")]
    assert [row[1] for row in rows] == ["periodic", "periodic", "per_prompt"]  # of the loss, and of the answers
    assert len({row[-1] for row in rows}) == 1  # one KV cache
    with pytest.raises(UserError, match=r"--strategies: per_prompt: .* no evaluation does\. Fix: add one"):
        compare(recipe, (*OVERRIDES, "grid.strategies=[per_prompt]"), False, tmp_path, ALONE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Runs that two comparisons share: both train a hybrid and full attention by SFT."""
    return tmp_path_factory.mktemp("trained")


def test_full_attention_trained_alike_stands_beside_the_hybrids(recipe, trained, tmp_path) -> None:
    overrides = ("eval=[{benchmark: heldout_loss, batch_size: 4}]", "grid={strategies: [periodic, full], ratios: [0.5]}")
    out = compare(recipe, overrides, False, trained, ALONE)
    hybrid, full = (
        yaml.safe_load((trained / name / "recipe.yaml").read_text()) for name in ("tiny-periodic-4of8", "tiny-full-as-4of8")
    )
    assert full["hybrid"] == hybrid["hybrid"] | {"w_recent": 65536} and full["train"] == hybrid["train"]
    rows = [
        line.split(" | ") for line in (out / "comparison.md").read_text().splitlines() if line.startswith(("| 4 of 8", "| none"))
    ]
    assert [row[1:3] for row in rows] == [["base", ""], ["periodic", "untrained"], ["periodic", "trained"], ["full", "trained"]]
    base, _, of_hybrid, alike = rows
    assert base[-1] == alike[-1] != of_hybrid[-1]  # KV cache
    assert float(alike[3].split(" ± ")[0]) < float(of_hybrid[3].split(" ± ")[0])
    with pytest.raises(UserError, match=r"grid\.strategies: full: no hybrid that it is trained as\. Fix: name a strategy"):
        load_recipe(recipe, ["grid.strategies=[full, per_prompt]"])
    with pytest.raises(UserError, match=r"--strategies: full: nothing is trained"):
        compare(recipe, (*OVERRIDES, "grid.strategies=[periodic, full]"), False, tmp_path, ALONE)


def test_full_attention_whose_training_depends_on_no_layers_is_trained_once_whatever_else_is_compared(recipe, tmp_path) -> None:
    """In one folder for all ratios, strategies and granularities; also in one that an earlier version named after a ratio."""

    def full_rows(*grid: str) -> list[str]:
        evaluation = "eval=[{benchmark: heldout_loss, batch_size: 4, limit: 4}]"
        out = compare(recipe, (evaluation, "train.max_steps=1", "hybrid.calibration.samples=2", *grid), False, tmp_path, ALONE)
        return [row.split(" | ")[0] for row in (out / "comparison.md").read_text().splitlines() if " | full | " in row]

    first = ("grid={strategies: [periodic, full], ratios: [0.75]}", "lora.layers=all")
    assert full_rows(*first) == ["| 6 of 8"]
    trained = tmp_path / "tiny-full/stages/train.json"
    before = trained.stat().st_mtime_ns
    heads = "grid={strategies: [full], granularities: [kv_head], ratios: [0.5]}"
    assert full_rows("lora.layers=all", heads) == ["| 4 of 8"]
    assert trained.stat().st_mtime_ns == before

    old = (tmp_path / "tiny-full").rename(tmp_path / "tiny-full-as-6of8")
    as_begun = yaml.safe_load((old / "recipe.yaml").read_text()) | {"name": old.name}
    as_begun["hybrid"]["layers"] = [0, 1, 2, 3, 5, 7]
    (old / "recipe.yaml").write_text(yaml.safe_dump(as_begun))
    assert full_rows("lora.layers=all", heads) == ["| 4 of 8"]
    assert [path.name for path in tmp_path.glob("tiny-full*")] == [old.name]
    assert (old / "stages/train.json").stat().st_mtime_ns == before


def test_hybrids_trained_by_sft_and_distilled_stand_beside_each_other(recipe, trained, tmp_path, lt_train) -> None:
    overrides = ("eval=[{benchmark: heldout_loss, batch_size: 4}]", "train.distill={weight: 0.5, hidden_weight: 1.0}")
    grid = "grid={strategies: [periodic, full], ratios: [0.5]}"
    changes = [word for override in (*overrides, grid) for word in ("--set", override)]
    code, _, err = lt_train("compare", recipe, "--trainings", "sft,distilled", "--runs", trained, *changes)
    assert code == 0, err
    names = {"tiny-periodic-4of8": 0.0, "tiny-periodic-4of8-distilled": 0.5, "tiny-full-as-4of8-distilled": 0.5}
    recipes = {name: yaml.safe_load((trained / name / "recipe.yaml").read_text()) for name in names}
    assert {name: each["train"]["distill"]["weight"] for name, each in recipes.items()} == names
    sft, distilled, _ = recipes.values()
    assert sft["train"] == distilled["train"] | {"distill": sft["train"]["distill"]} and sft["hybrid"] == distilled["hybrid"]
    rows = [line.split(" | ") for line in (trained / "tiny-comparison/comparison.md").read_text().splitlines()]
    rows = [row for row in rows if row[0] == "| 4 of 8"]
    assert [" ".join(row[1:3]) for row in rows] == [
        "periodic untrained",
        "periodic SFT",
        "full SFT",
        "periodic distilled",
        "full distilled",
    ]
    assert rows[1][3] != rows[3][3]  # the losses
    with pytest.raises(UserError, match=r"grid\.trainings \+ train\.distill\.weight: distilled: the weight .* Fix: set the weight"):
        load_recipe(recipe, ["grid.trainings=[distilled]"])
    with pytest.raises(UserError, match=r"--trainings: the recipe trains nothing\. Fix: add a train part"):
        compare(recipe, (*OVERRIDES, "grid.trainings=[sft]"), False, tmp_path, ALONE)


def test_a_folder_of_recipes_with_grids_is_compared_over_their_seeds(recipe, tmp_path, lt_train) -> None:
    one_seed = ("seed=1", "name=tiny-seed1", "grid={strategies: [periodic], ratios: [0.5]}")
    compare(recipe, (*OVERRIDES, *one_seed), False, tmp_path / "runs", ALONE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/eval/*/*/scores.json")}
    (tmp_path / "evidence").mkdir()
    grid = "grid: {strategies: [random, reach], ratios: [0.75], seeds: [0, 1]}\n"
    (tmp_path / "evidence/mine.yaml").write_text(recipe.read_text() + grid)
    changes = [word for override in OVERRIDES for word in ("--set", override)]
    options = ("--strategies", "periodic", "--ratios", "0.5", "--runs", tmp_path / "runs", *changes)
    code, out, _ = lt_train("compare", tmp_path / "evidence", *options)
    assert code == 0 and "mean over 2 seeds" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2  # base and hybrid of seed 1
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    cells = ("base", "comparison", "periodic-4of8")
    assert names == ["tiny-comparison", *(f"tiny-seed{seed}-{cell}" for seed in (0, 1) for cell in cells)]
    assert yaml.safe_load((tmp_path / "runs/tiny-seed0-base/recipe.yaml").read_text())["grid"] is None
    assert "| 4 of 8 | periodic | untrained |" in (tmp_path / "runs/tiny-comparison/comparison.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "alike"),
    [
        (("lora.layers=all",), True),
        (("lora.layers=lazy",), False),
        (("train.method=full", "lora=null"), True),
        (("train.method=full", "lora=null", "train.parameters=lazy_projections"), False),
        (("train.method=full", "lora=null", "train.restore_query_key=true"), False),
        (("lora.layers=all", "train.distill={weight: 0.5, hidden_weight: 1.0}"), False),
        (("train=null", "lora=null"), False),
    ],
)
def test_full_attention_is_trained_once_where_its_training_depends_on_no_layers(recipe, overrides, alike) -> None:
    assert trains_any_alike(load_recipe(recipe, overrides)) is alike


def test_full_attention_is_trained_once_by_sft_though_it_is_distilled_for_each_choice_of_layers(recipe) -> None:
    distilled = load_recipe(recipe, ["lora.layers=all", "train.distill={weight: 0.5, hidden_weight: 1.0}"])
    assert trains_any_alike(distilled, "sft") and not trains_any_alike(distilled, "distilled")


def test_a_granularity_that_is_none_and_heads_with_learned_sinks_are_refused(recipe, tmp_path) -> None:
    with pytest.raises(UserError, match=r"grid\.granularities\.0: 'head': .* Fix: use one of layer, kv_head"):
        load_recipe(recipe, ["grid.granularities=[head]"])
    learned = (*OVERRIDES, "hybrid.sink=learned", "hybrid.w_sink=0", "grid.granularities=[kv_head]")
    with pytest.raises(UserError, match=r"hybrid\.sink: learned: .* Fix: add --granularities layer"):
        compare(recipe, learned, False, tmp_path, ALONE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("eval=[]",), "eval: empty, so there is nothing to compare"),
        (("hybrid.lazy_layer_ratio=null", "hybrid.kv_budget=0.5"), r"hybrid\.kv_budget: compare sets how many layers stream"),
    ],
)
def test_a_recipe_that_cannot_be_compared_is_refused(recipe, tmp_path, overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        compare(recipe, (*OVERRIDES, *GRID, *overrides), False, tmp_path, ALONE)


def test_unknown_strategies_are_refused_with_the_known_ones(recipe) -> None:
    with pytest.raises(UserError, match=r"grid\.strategies\.0: 'reech'.*reach"):
        load_recipe(recipe, ["grid.strategies=[reech]"])


@pytest.mark.slow
def test_the_tiny_reasoners_evidence_is_soon_compared_with_kv_heads_when_quick_and_on_few_samples(tmp_path, lt_train) -> None:
    started = time.process_time()
    fewer = ("hybrid.calibration.samples=2", "data.limit=80", "data.heldout=8", "eval.0.limit=8")
    fewer += ("eval.1.limit=6", "eval.1.max_new_tokens=40")
    few = ("--strategies", "reach,lazy_ratio", "--ratios", "0.5,0.875", *(word for each in fewer for word in ("--set", each)))
    code, out, err = lt_train("compare", "ledger-frontier", "--quick", "--runs", tmp_path, *few)
    assert code == 0, err
    assert time.process_time() - started < 60
    text = (tmp_path / "ledger-frontier-quick-comparison/comparison.md").read_text()
    assert "| 7 of 8 | gates by head | untrained |" in text and "| full |" not in text
    assert "4 of 8 layers, untrained: reach is better than lazy_ratio" in out
    assert "6 of " in text
    assert not list(tmp_path.glob("*/train"))
