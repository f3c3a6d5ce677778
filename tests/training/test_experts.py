"""Mixtures of experts: ZeRO-3 with processes that route differently, the router's loss, and what LoRA reaches."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lt_train.hybrid.loading import load_hybrid
from lt_train.inference.trained_weights import load_trained
from tests.support.expert_training import qwen3_moe, routed_by_rank, train_experts
from tests.support.launched_training import deepspeed_file
from tests.support.processes import exit_code, start_ranks
from tests.support.tiny_training import SPEC, tiny_recipe
from tests.support.training_log import assert_same_course, losses

SECONDS = 240
"""In which two processes that do not wait for each other have ended."""


def base_of(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_under_zero3_processes_whose_tokens_go_to_different_experts_train(tmp_path: Path) -> None:
    config = routed_by_rank()
    settings = {"train": {"max_steps": 2, "deepspeed": str(deepspeed_file("zero3.json", tmp_path))}}
    given = (tmp_path / "run", base_of(config, tmp_path / "base"), settings, config)
    ranks = start_ranks(train_experts, *given, outputs=tmp_path / "printed")
    try:
        assert [exit_code(rank, SECONDS) for rank in ranks] == [0, 0], (tmp_path / "printed/0.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_qwen3_moe_under_zero3_has_the_losses_of_one_process_and_saves_every_expert(tmp_path: Path) -> None:
    base = base_of(qwen3_moe(), tmp_path / "base")
    train = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 1}
    launched = {"train": train | {"deepspeed": str(deepspeed_file("zero3.json", tmp_path))}}
    ranks = start_ranks(train_experts, tmp_path / "two", base, launched, outputs=tmp_path / "printed")
    try:
        assert [exit_code(rank, SECONDS) for rank in ranks] == [0, 0], (tmp_path / "printed/0.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    train_experts(tmp_path / "one", base, {"train": train})
    assert_same_course(tmp_path / "two", tmp_path / "one", tolerance=1e-3, but=["token_accuracy", "grad_norm"])
    two, one = (
        load_trained(tiny_recipe({}), tmp_path / name / "final", lambda dtype: load_hybrid(base, SPEC), torch.float32).model
        for name in ("two", "one")
    )
    for (name, mine), theirs in zip(two.state_dict().items(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-2, msg=name)
