from lt_train.recipe.commented_yaml import WIDTH, commented_yaml
from lt_train.recipe.yaml_text import read_recipe_text

VALUES = {
    "name": "mine",
    "model": {"base": "Qwen/Qwen3-8B", "dtype": None},
    "hybrid": {"calibration": {"samples": 64, "w_last": 3}, "compare": ["lazy_ratio", "kl"], "lazy_layer_ratio": 0.5},
    "train": {"learning_rate": 1e-5, "trl": {"optim": "adamw: torch"}},
    "eval": [{"benchmark": "heldout_loss", "variants": ["base", "trained"]}, {"benchmark": "math500", "name": "1e5"}],
    "track": {"wandb": "off"},
}


def test_what_is_written_reads_back_equal():
    reasons = {"model.base": "qwen3", "eval": "why: {not} a setting", "hybrid.compare": "long " * 40, "name": "a # b"}
    text = read_recipe_text(commented_yaml(VALUES, reasons))
    assert text.values == VALUES and not text.faults


def test_a_reason_stands_behind_its_setting_where_it_fits_and_else_above_it():
    lines = commented_yaml(VALUES, {"model.base": "qwen3", "hybrid.compare": "long " * 40, "eval": "benchmarks"}).splitlines()
    assert "  base: Qwen/Qwen3-8B  # qwen3" in lines
    at = lines.index("  compare: [lazy_ratio, kl]")
    assert lines[at - 1].startswith("  # long long") and max(map(len, lines)) <= WIDTH
    assert lines[lines.index("eval:") - 1] == "# benchmarks"
