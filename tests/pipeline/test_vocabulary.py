"""Bases whose embeddings and tokenizer differ in number: more embeddings than tokens, and fewer."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, Qwen3Config

from lt_train.inference.requests import Request, Sampling
from lt_train.serving.checkpoint import load_checkpoint
from tests.support.families import SIZES
from tests.support.runs import run_in_folder
from tests.support.tiny_run import REASONER, add_base, recipe_on_base

TOKENS = AutoConfig.from_pretrained(REASONER).vocab_size
ROUNDED_UP = 384
BASE = Qwen3Config(**SIZES | {"vocab_size": ROUNDED_UP, "eos_token_id": 3, "tie_word_embeddings": True}, head_dim=16)


@pytest.fixture(scope="module")
def inputs(inputs: Path) -> Path:
    add_base(inputs, BASE)
    return inputs


def test_a_base_with_more_embeddings_than_tokens_is_scored_trained_evaluated_exported_and_served(inputs, tmp_path) -> None:
    """All of its parameters are trained, by distillation, so its logits of no token are compared with those of the base."""
    overrides = ("train.method=full", "train.max_steps=1", "lora=null", "train.distill={weight: 0.5}", "hybrid.compare=[]")
    answers = f"{{benchmark: ledger, path: {inputs / 'problems.jsonl'}, limit: 2, max_new_tokens: 8, temperature: 1.0}}"
    evaluations = f"eval=[{{benchmark: heldout_kl, batch_size: 4}}, {answers}]"
    run_in_folder(recipe_on_base(inputs, *overrides, evaluations), tmp_path)
    export = tmp_path / "tiny/export"
    embeddings, before = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (export, inputs / "base")
    )
    assert embeddings.shape == (ROUNDED_UP, SIZES["hidden_size"]) and not embeddings[:TOKENS].equal(before[:TOKENS])
    checkpoint, prompt = load_checkpoint(export), Request("any", 0, 0, tuple(range(TOKENS - 9, TOKENS)))
    (answer,) = checkpoint.engine(None, 1).answers([prompt], Sampling(1.0, 1.0, 32))
    assert answer.tokens == 32 and checkpoint.tokenizer.decode([TOKENS, ROUNDED_UP - 1]) == ""


@pytest.mark.parametrize("command", ["run", "plan", "eval"])
def test_a_base_with_fewer_embeddings_than_tokens_is_refused_before_anything_runs(command, inputs, tmp_path, lt_train) -> None:
    """Also where answers alone are generated, and no sample is read."""
    base = tmp_path / "base"
    shutil.copytree(inputs / "base", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(ROUNDED_UP - TOKENS + 2)])
    tokenizer.save_pretrained(base)
    settings = [f"model.base={base}"]
    if command == "eval":
        settings += [
            *("data.source=null", "data.heldout=0", "train=null", "lora=null", "hybrid.layers=[1]", "hybrid.lazy_layer_ratio=null")
        ]
        settings += ["hybrid.strategy=null", f"eval=[{{benchmark: ledger, path: {inputs / 'problems.jsonl'}, max_new_tokens: 8}}]"]
    options = [word for each in settings for word in ("--set", each)]
    code, _, err = lt_train(command, inputs / "recipe.yaml", *options, "--runs", tmp_path / "runs")
    missing = f"<extra{ROUNDED_UP - TOKENS}> (token {ROUNDED_UP})"
    reported = " ".join(err.split())
    assert code == 2 and f"needs 386 embeddings, and the model has 384, none for {missing}. Fix: remove the tokens" in reported
    assert "model.resize_token_embeddings(386)" in reported
    assert not list(tmp_path.glob("runs/tiny/*/**/*.json"))
