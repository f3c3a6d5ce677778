import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from lt_train.bench.base import StoredBase
from lt_train.bench.training_step import bench_training_step, compare_steps, step_recipe
from lt_train.hybrid.mask import streaming_visible
from lt_train.recipe.schema import Model
from lt_train.runtime.errors import UserError

TINY = "data/tiny-reasoner"
BASE = StoredBase(Model(base=TINY, dtype="fp32"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_both_trainings_take_the_same_step_while_the_window_holds_all(method):
    """Then the hybrid is the unconverted model, so its loss is the stock trainer's."""
    found = compare_steps(BASE, step_recipe(TINY, method, 0.5, 4, 60, 48, checkpointing=method == "full", dtype="fp32"), runs=1)
    assert found.hybrid_loss == pytest.approx(found.stock_loss, rel=1e-5)
    assert found.limit == 1 and found.stock > 0 and found.hybrid > 0


def test_a_hybrid_computes_with_a_window_and_its_limit_counts_linear_layers_and_the_pairs_seen():
    recipe = step_recipe(TINY, "full", 0.5, 2, 10, 64, checkpointing=False, dtype="fp32")
    found = compare_steps(BASE, recipe, runs=1)
    assert abs(found.hybrid_loss - found.stock_loss) > 1e-4
    position = torch.arange(64)
    seen, all_seen = (int(streaming_visible(position[:, None], position, 2, w).sum()) for w in (10, 64))
    config = AutoModelForCausalLM.from_pretrained(TINY).config
    pair = 3 * 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert found.compute.full_attention == pair * all_seen
    assert found.compute.attention == pair * (all_seen + seen) / 2
    assert found.limit == pytest.approx(
        (found.compute.linear + pair * all_seen) / (found.compute.linear + pair * (all_seen + seen) / 2)
    )


def test_the_two_times_their_ratio_and_the_limit_are_printed():
    console = Console(record=True, width=160)
    bench_training_step(BASE, step_recipe(TINY, "lora", 0.5, 4, 12, 40, checkpointing=False, dtype="fp32"), 1, console)
    lines = console.export_text().splitlines()
    assert "50% of layers stream" in lines[0] and "LoRA of rank 16" in lines[0] and "40 tokens" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["unconverted,", "hybrid", "faster", "limit"]


def test_fewer_steps_than_one_are_refused():
    with pytest.raises(UserError, match="--runs"):
        bench_training_step(BASE, step_recipe(TINY, "lora", 0.5, 4, 12, 40, checkpointing=False), 0, Console())
