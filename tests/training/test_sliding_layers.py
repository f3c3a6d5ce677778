"""Training hybrids of bases in which some layers have a window from the start: alone, distilled, restored, and under ZeRO-3."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, Olmo3Config, PreTrainedConfig

from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.trained_weights import load_trained
from lt_train.runtime.tracking import NoTracker
from tests.support.expert_training import train_experts
from tests.support.families import on_base
from tests.support.launched_training import deepspeed_file
from tests.support.processes import exit_code, start_ranks
from tests.support.tiny_training import SPEC, tiny_recipe, tiny_sizes, train_in, write_teacher
from tests.support.training_log import assert_same_course, losses

SLIDING = {"layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"], "sliding_window": 5}
"""Layers 1 and 2 stream, layer 3 is full."""
BASES: dict[str, PreTrainedConfig] = {
    "olmo3": Olmo3Config(**tiny_sizes(), **SLIDING),
    "gpt_oss": GptOssConfig(
        **tiny_sizes(), **SLIDING, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default"}
    ),
}
FAST = {"max_steps": 8, "batch_size": 8}


def base_of(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BASES[family]).save_pretrained(folder)
    return folder


def train_olmo3(folder: Path, train: dict[str, Any]) -> tuple[HybridForCausalLM, HybridForCausalLM]:
    """The base and what a training with these settings leaves, as it is loaded."""
    base, spec, settings = base_of("olmo3", folder / "base"), on_base(BASES["olmo3"], SPEC), {"train": FAST | train}

    def load(dtype: torch.dtype) -> HybridForCausalLM:
        return load_hybrid(base, spec, dtype=dtype)

    if train.get("distill", {}).get("teacher") == "top_k":
        write_teacher(settings, folder / "teacher", load)
    trained = train_in(folder / "run", settings, NoTracker(), load=load, spec=spec)
    assert losses(folder / "run")[-1] < losses(folder / "run")[0]
    return load(torch.float32), load_trained(tiny_recipe(settings), trained.folder, load, torch.float32).model


def changed_layers(base: HybridForCausalLM, trained: HybridForCausalLM, name: str) -> set[int]:
    weights = trained.state_dict()
    changed = [key for key, weight in base.state_dict().items() if name in key and not torch.equal(weight, weights[key])]
    return {int(key.split(".layers.")[1].split(".")[0]) for key in changed}


@pytest.mark.slow
def test_full_training_changes_every_layer_and_restoring_gives_full_layers_alone_their_queries_and_keys_again(tmp_path) -> None:
    base, trained = train_olmo3(tmp_path / "full", {})
    assert changed_layers(base, trained, "q_proj") == {0, 1, 2, 3}
    base, restored = train_olmo3(tmp_path / "restored", {"restore_query_key": True})
    assert changed_layers(base, restored, "q_proj") == changed_layers(base, restored, "k_proj") == {0, 1, 2}
    assert changed_layers(base, restored, "v_proj") == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [{"teacher": "copy"}, {"teacher": "top_k", "top_k": 8}])
def test_it_learns_from_the_base_in_memory_or_from_files(teacher, tmp_path) -> None:
    base, trained = train_olmo3(tmp_path, {"distill": {"weight": 0.5, **teacher}})
    assert changed_layers(base, trained, "v_proj") == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("family", BASES)
def test_under_zero3_it_has_the_losses_of_one_process_and_the_same_weights(family, tmp_path: Path) -> None:
    base = base_of(family, tmp_path / "base")
    train = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 1}
    launched = {"train": train | {"deepspeed": str(deepspeed_file("zero3.json", tmp_path))}}
    ranks = start_ranks(train_experts, tmp_path / "two", base, launched, outputs=tmp_path / "printed")
    try:
        assert [exit_code(rank, 600) for rank in ranks] == [0, 0], (tmp_path / "printed/0.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    train_experts(tmp_path / "one", base, {"train": train})
    assert_same_course(tmp_path / "two", tmp_path / "one", tolerance=1e-3, but=["token_accuracy", "grad_norm"])
    spec = on_base(BASES[family], SPEC)
    two, one = (
        load_trained(tiny_recipe({}), tmp_path / name / "final", lambda dtype: load_hybrid(base, spec), torch.float32).model
        for name in ("two", "one")
    )
    for (name, mine), theirs in zip(two.state_dict().items(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-2, msg=name)
