"""Recipes with model.family: auto: what is reported, planned and refused before a model is loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, DiffLlamaConfig, HeliumConfig

from lt_train.hybrid.spec import HybridError, HybridSpec
from lt_train.inference.loading import load_base_config, load_weights
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.run import run_command
from lt_train.pipeline.run_folder import RunFolder
from lt_train.planning.plan import plan_recipe
from lt_train.planning.setup import Machine
from lt_train.planning.table import show_plan
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Model, Recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from lt_train.runtime.units import GIB
from tests.support.families import HELIUM
from tests.support.repository import REPOSITORY
from tests.support.tiny_run import write_inputs
from tests.support.toy_family import toy_config

SPEC = HybridSpec(4, (1, 3), 4, 12)
TOKENS = 268
"""Of the tokenizer beside a base, which must have as many embeddings."""
HELIUM_OF_TOKENS = HeliumConfig(**{**HELIUM.to_dict(), "vocab_size": TOKENS})


@pytest.fixture
def recipe_of(tmp_path):
    """A recipe on a base of this config, with the tokenizer of the tiny reasoner beside it."""

    def make(config, *overrides: str) -> Recipe:
        write_inputs(tmp_path)
        base = tmp_path / "base"
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        for file in (REPOSITORY / "data/tiny-reasoner").iterdir():
            if file.name != "config.json" and file.suffix != ".safetensors":
                shutil.copy(file, base)
        return load_recipe(tmp_path / "recipe.yaml", (f"model.base={base}", "model.family=auto", *overrides))

    return make


def context_of(recipe: Recipe, runs: Path) -> RunContext:
    return RunContext(recipe, RunFolder(recipe, runs), Console(width=400), Process(0, 1, launched=False))


def test_a_run_reports_what_was_proved_before_it_does_anything(recipe_of, tmp_path, capsys):
    context = context_of(recipe_of(HELIUM_OF_TOKENS), tmp_path / "runs")
    assert context.base_config.model_type == "helium"
    printed = capsys.readouterr().out
    assert "family    auto: a hybrid of helium was made, and proved on a small model: with full attention it is the base" in printed


def test_a_base_that_mixes_its_heads_is_refused_for_kv_heads_before_it_is_scored(recipe_of, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = DiffLlamaConfig(vocab_size=512, **sizes)
    by_head = ("hybrid.granularity=kv_head", "train=null", "eval=[]")
    with pytest.raises(HybridError, match=r"model_type: 'diffllama': not proved to stream: .* Fix: let entire layers stream"):
        run_command(context_of(recipe_of(config, *by_head), tmp_path / "runs"), "convert")
    assert not (tmp_path / "runs/tiny/profile").exists()


def test_a_base_that_proves_nothing_is_refused_by_runs_and_plans_and_the_message_names_what_differed(recipe_of, tmp_path):
    recipe = recipe_of(toy_config("no interface"))
    found = r"model\.base: .*: not proved to stream: model\.layers\.2\.self_attn \(ToyAttention\): token 12 sees token 2"
    with pytest.raises(UserError, match=found):
        run_command(context_of(recipe, tmp_path / "runs"), "profile")
    with pytest.raises(UserError, match=found):
        plan_recipe(recipe, Machine(1, 8 * GIB))
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_without_auto_a_base_is_refused_even_where_an_earlier_recipe_proved_it(recipe_of):
    recipe = recipe_of(toy_config(vocab_size=TOKENS))
    load_base_config(recipe.model)
    with pytest.raises(UserError, match=r"model_type: 'toy': no hybrid class\. Fix: set model\.family to auto"):
        load_base_config(Model(base=recipe.model.base))


def test_auto_leaves_a_family_that_is_declared_as_it_is(tmp_path):
    model = Model(base=str(REPOSITORY / "data/tiny-reasoner"), family="auto")
    hybrid = load_weights(model, HybridSpec(load_base_config(model).num_hidden_layers, ()), torch.float32)
    assert not type(hybrid).__module__.endswith("auto_family")


@pytest.mark.parametrize("config", [HELIUM_OF_TOKENS, toy_config(vocab_size=TOKENS)], ids=["helium", "toy"])
def test_a_plan_counts_a_made_family_and_reports_what_was_proved(config, recipe_of, capsys):
    recipe = recipe_of(config, "lora.targets=[q_proj]")
    plan = plan_recipe(recipe, Machine(1, 8 * GIB))
    assert plan.shape.base_parameters == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    show_plan(plan, Console(width=400))
    assert f"family     auto: a hybrid of {config.model_type} was made, and proved" in capsys.readouterr().out


def test_a_run_whose_export_would_lack_its_code_is_refused_before_anything_runs(recipe_of, tmp_path):
    recipe = recipe_of(toy_config(vocab_size=TOKENS))
    with pytest.raises(UserError, match=r"ToyForCausalLM: its code is in .* Fix: train and measure without an export"):
        run_command(context_of(recipe, tmp_path / "runs"), "run")
    assert not list((tmp_path / "runs").rglob("*.json"))
