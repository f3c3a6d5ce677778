import json
from pathlib import Path
from typing import Any

import pytest

from lt_train.recipe.deepspeed_file import contradictions, deepspeed_settings, read_deepspeed_file
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.runtime.errors import UserError

LAUNCH = Path(__file__).parents[2] / "launch"

RECIPE = """
name: mine
model: {base: owner/model, dtype: DTYPE}
hybrid: {lazy_layer_ratio: 0.5}
data: {source: owner/data, format: still, max_length: 64}
train: {method: full, learning_rate: 1e-5, epochs: 1, batch_size: 96, micro_batch_size: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipe_in("bf16", tmp_path)


def recipe_in(dtype: str, tmp_path: Path) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.replace("DTYPE", dtype))
    return load_recipe(path)


def zero3(**settings: Any) -> dict[str, Any]:
    return {**read_deepspeed_file(LAUNCH / "zero3.json"), **settings}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.json")), ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp32"])
def test_every_shipped_configuration_goes_with_every_precision(path: Path, dtype: str, tmp_path: Path) -> None:
    message = list(contradictions(read_deepspeed_file(path), recipe_in(dtype, tmp_path)))
    if (path.name, dtype) == ("zero3-bf16-sums.json", "fp32"):
        assert "grad_accum_dtype" in message.pop()
    assert message == []


def test_the_shipped_configurations_are_found() -> None:
    shipped = {"zero2.json", "zero3.json", "zero3-bf16-sums.json", "zero3-offload.json"}
    assert {path.name for path in LAUNCH.glob("*.json")} == shipped


def test_the_file_with_bf16_sums_differs_from_the_other_in_these_alone() -> None:
    other = read_deepspeed_file(LAUNCH / "zero3-bf16-sums.json")
    assert other.pop("data_types") == {"grad_accum_dtype": "bf16"}
    assert other == read_deepspeed_file(LAUNCH / "zero3.json")


def test_gradients_are_summed_up_in_fp32_unless_the_file_sets_bf16() -> None:
    assert deepspeed_settings(LAUNCH / "zero3.json", accumulates=True) == zero3(data_types={"grad_accum_dtype": "fp32"})
    assert deepspeed_settings(LAUNCH / "zero3.json", accumulates=False) == zero3()
    file = LAUNCH / "zero3-bf16-sums.json"
    assert deepspeed_settings(file, accumulates=True) == read_deepspeed_file(file)


def test_values_equal_to_the_recipes_are_no_contradiction(recipe: Recipe) -> None:
    same = {"train_batch_size": 96, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1, "bf16": {"enabled": True}}
    assert list(contradictions(zero3(**same), recipe)) == []


def test_a_batch_in_rows_is_refused_where_processes_share_rows(recipe: Recipe) -> None:
    shared = recipe.model_copy(update={"train": recipe.train.model_copy(update={"sequence_parallel": 2})})
    (message,) = contradictions(zero3(train_batch_size=96), shared)
    assert "train_batch_size: 96: DeepSpeed counts each slice of a shared sequence as a row" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 64}, 'train_batch_size: 64: contradicts train.batch_size: 96. Fix: set it to "auto"'),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu: 1: contradicts train.micro_batch_size: 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5: contradicts train.max_grad_norm: 1.0"),
        ({"gradient_clipping": None}, "gradient_clipping: missing, so train.max_grad_norm would not reach DeepSpeed"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4: it follows from the batch"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps: missing: it follows from the batch"),
        ({"bf16": {"enabled": False}}, "bf16.enabled: false: contradicts model.dtype: bf16"),
        ({"bf16": None}, "bf16.enabled: missing, so model.dtype: bf16 would not reach DeepSpeed"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: model.dtype allows bf16 and fp32 only"),
        ({"data_types": "bf16"}, "data_types: 'bf16': not a block. Fix: remove it, or write"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "grad_accum_dtype: 'fp16': unknown. Fix: set it to \"fp32\""),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: the optimizer follows from train.learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: the schedule follows from train.lr_scheduler"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: processes share sequences by train.sequence_parallel"),
        ({"elasticity": {}}, "elasticity: it would change the batch"),
        ({"zero_optimization": None}, "zero_optimization: missing"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: 0: not a stage. Fix: set it to 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save: not true, so checkpoints would hold no"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "overlap_com: no setting of DeepSpeed; did you mean overlap_comm",
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param: stage 2 offloads no weights"),
    ],
)
def test_a_setting_that_contradicts_the_recipe_is_reported_once_with_its_fix(
    recipe: Recipe, settings: dict[str, Any], message: str
) -> None:
    (found,) = contradictions(zero3(**settings), recipe)
    assert message in found


def test_a_precision_may_not_be_fixed_where_the_recipe_leaves_it_to_the_device(tmp_path: Path) -> None:
    (found,) = contradictions(zero3(bf16={"enabled": True}), recipe_in("auto", tmp_path))
    assert "bf16.enabled: true: contradicts model.dtype: auto" in found


def test_all_contradictions_are_reported_at_once_when_a_recipe_is_checked(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(zero3(train_batch_size=8, gradient_clipping=9)))
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "mine.yaml", [f"train.deepspeed={path}"])
    lines = str(error.value).splitlines()[1:]
    assert [line.startswith(f"  train.deepspeed: {path}: ") for line in lines] == [True, True]
    assert "train_batch_size: 8" in lines[0] and "gradient_clipping: 9" in lines[1]


@pytest.mark.parametrize(("text", "message"), [("[1]", "not a JSON object"), ("{", "not JSON"), ("[" * 100_000, "not JSON")])
def test_a_file_that_is_not_a_configuration_is_reported(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "faulty.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_deepspeed_file(path)
