"""Two processes that train together, mostly under DeepSpeed: the losses of one process, complete weights, kills and resumes."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from rich.console import Console
from transformers import Qwen3ForCausalLM

from lt_train.hybrid.loading import load_hybrid
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.run_folder import RunFolder
from lt_train.pipeline.stages.export import hybrid_on_disk
from lt_train.recipe.evaluations import TRAINED
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process, leave
from lt_train.training.checkpoints import last_valid_checkpoint
from tests.support import tiny_training
from tests.support.launched_training import deepspeed_file, train_in_ranks
from tests.support.processes import exit_code, start_ranks
from tests.support.training_log import assert_same_course, steps

pytestmark = pytest.mark.slow

LORA: dict[str, Any] = {"method": "lora"}
MODES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "ddp": (None, {}),
    "zero2": ("zero2.json", {}),
    "zero2-lora": ("zero2.json", LORA),
    "zero3": ("zero3.json", {}),
    "zero3-offload-lora": ("zero3-offload.json", LORA),
}
DROPOUT: dict[str, Any] = {
    "train": {"method": "lora", "max_steps": 2, "batch_size": 4, "micro_batch_size": 1, "save_steps": 1},
    "lora": {"rank": 4, "dropout": 0.1},
}
IN_BF16 = ("zero2", "zero3", "zero3-bf16-sums")
EXAMPLES = 11
"""Odd: at the end of an epoch accelerate gives one of two processes a row again."""
COUNTED = ("epoch", "tokens", "num_tokens")
"""What counts this row as well, though it has no loss."""
FOUR_EPOCHS: dict[str, Any] = {"max_steps": None, "epochs": 4}  # of 3 steps each


def settings_of(mode: str, folder: Path, *, launched: bool) -> dict[str, Any]:
    """4 steps of 4 samples, 3 of them in the first epoch, whose last is short, for one process or several."""
    file, method = MODES[mode]
    train = {"max_steps": 4, "batch_size": 4, "micro_batch_size": 1, "save_steps": 2, **method}
    if launched and file is not None:
        train["deepspeed"] = str(deepspeed_file(file, folder))
    return {"train": train, "data": {"heldout": 5}, **({"lora": {"rank": 4}} if method else {})}


def bf16_settings(name: str, folder: Path) -> dict[str, Any]:
    """Steps of 4 samples, 2 one after the other in each of two processes."""
    train = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 1, "deepspeed": str(deepspeed_file(f"{name}.json", folder))}
    return {"model": {"dtype": "bf16"}, "train": train}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    Qwen3ForCausalLM(tiny_training.tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each mode, and a few trainings more, by two processes."""
    folder = tmp_path_factory.mktemp("two")
    trainings = {mode: settings_of(mode, folder, launched=True) for mode in MODES}
    trainings |= {"dropout": DROPOUT} | {f"{name}, bf16": bf16_settings(name, folder) for name in IN_BF16}
    train_in_ranks({folder / name: each for name, each in trainings.items()}, base, folder / "printed", EXAMPLES)
    return folder


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train a mode in this process, where one process accumulates what two share; returns its folder."""
    folder = tmp_path_factory.mktemp("one")

    @cache
    def train(mode: str) -> Path:
        train_alone(folder / mode, settings_of(mode, folder, launched=False), base)
        return folder / mode

    return train


def train_alone(folder: Path, settings: dict[str, Any], base: Path) -> None:
    tiny_training.train_in(folder, settings, tiny_training.NoTracker(), EXAMPLES, tiny_training.hybrid_from(base))


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_have_the_course_of_one_with_double_accumulation(mode: str, two: Path, one: Callable[[str], Path]) -> None:
    assert [row["step"] for row in steps(two / mode)] == [1, 2, 3, 4]
    # TRL takes the mean of the processes' own accuracies, of which each counts tokens of its own number
    alone = one(mode)
    assert_same_course(two / mode, alone, tolerance=1e-3, but=[*COUNTED, "token_accuracy", "grad_norm"])
    norms = [[row["grad_norm"] for row in steps(folder)] for folder in (two / mode, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)


@pytest.mark.parametrize("mode", ["zero3", "zero3-offload-lora"])
def test_an_export_of_what_zero3_trained_has_every_weight_as_one_process_trains_it(
    mode: str, two: Path, one: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    mine, alone = (exported_weights(mode, folder, base, tmp_path / folder.parent.name) for folder in (two / mode, one(mode)))
    untrained, changed = dict(load_hybrid(base, tiny_training.SPEC).named_parameters()), set()
    assert mine.keys() == alone.keys() == untrained.keys()
    for name, weight in mine.items():
        step = (alone[name] - untrained[name]).abs().max()
        assert (weight - alone[name]).abs().max() <= max(1e-6, 0.05 * step), name
        changed |= {name} if step > 1e-3 else set()
    assert len(changed) > 6


def exported_weights(mode: str, training: Path, base: Path, root: Path) -> dict[str, torch.Tensor]:
    """By name, as `lt-train export` reads them from the files of a finished training."""
    settings = {**settings_of(mode, root, launched=False), "model": {"base": str(base)}}
    recipe = tiny_training.tiny_recipe(settings)
    context = RunContext(recipe, RunFolder(recipe, root), Console(quiet=True), Process(0, 1, launched=False))
    context.variants.choose(None)
    shutil.copytree(training / "final", context.paths.trained)
    hybrid = hybrid_on_disk(context, TRAINED)
    return {name: hybrid.weight(name, torch.float32) for name in hybrid.parameters}


def test_a_model_that_is_loaded_after_a_training_with_zero3_is_not_sharded(base: Path, tmp_path: Path) -> None:
    settings = settings_of("zero3", tmp_path, launched=True)
    settings["train"] |= {"max_steps": 1, "batch_size": 1}
    (process,) = start_ranks(train_then_load, tmp_path / "zero3", settings, base, outputs=tmp_path, world_size=1)
    assert exit_code(process) == 0, (tmp_path / "0.txt").read_text()


def train_then_load(folder: Path, settings: dict[str, Any], base: Path) -> None:
    train_alone(folder, settings, base)
    load_hybrid(base, tiny_training.SPEC, device_map={"": "cpu"})  # as an evaluation does
    leave(0)


def test_a_process_killed_while_zero3_gathers_weights_leaves_the_checkpoint_before(base: Path, tmp_path: Path) -> None:
    settings = settings_of("zero3", tmp_path, launched=True)
    ranks = start_ranks(train_and_die_in_the_second_gathering, tmp_path / "killed", settings, base, outputs=tmp_path)
    codes, printed = [exit_code(process, seconds=90) for process in ranks], (tmp_path / "0.txt").read_text()
    assert codes[1] == -signal.SIGKILL and codes[0] > 0, printed
    assert "in _zero3_consolidated_16bit_state_dict" in printed, "the other process was gathering, too"
    found = last_valid_checkpoint(tmp_path / "killed", print)
    assert found is not None and found.step == 2
    assert not list((tmp_path / "killed").glob("*4")) and not (tmp_path / "killed/final").exists()


def train_and_die_in_the_second_gathering(folder: Path, settings: dict[str, Any], base: Path) -> None:
    gather, enter = DeepSpeedEngine._zero3_consolidated_16bit_state_dict, GatheredParameters.__enter__
    gatherings, modules = [], []

    def counted(engine: DeepSpeedEngine, *given: Any, **named: Any) -> Any:
        gatherings.append(engine)
        return gather(engine, *given, **named)

    def entered(parameters: GatheredParameters) -> Any:
        modules.extend([parameters] if len(gatherings) == 2 else [])
        if len(modules) > 8 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return enter(parameters)

    DeepSpeedEngine._zero3_consolidated_16bit_state_dict, GatheredParameters.__enter__ = counted, entered
    tiny_training.train_each({folder: settings}, base, EXAMPLES)


def test_without_deepspeed_another_number_of_processes_resumes_to_the_same_losses(two: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ddp"
    shutil.copytree(two / "ddp", folder)
    for later in ("final", "checkpoint-4"):
        shutil.rmtree(folder / later)
    train_alone(folder, settings_of("ddp", folder, launched=False), base)
    assert '"resumed_from": 2' in (folder / "log.jsonl").read_text()
    assert_same_course(folder, two / "ddp", tolerance=1e-3, but=[*COUNTED, "token_accuracy"])


def test_dropout_is_not_drawn_by_another_number_of_processes(two: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dropout"
    shutil.copytree(two / "dropout", folder)
    for later in ("final", "checkpoint-2"):
        shutil.rmtree(folder / later)
    with pytest.raises(UserError, match="each of which draws its own dropout: 2, 1"):
        train_alone(folder, DROPOUT, base)


def test_in_bf16_gradients_are_summed_up_in_fp32_unless_deepspeeds_file_sets_otherwise(two: Path) -> None:
    zero2, zero3, bf16_sums = (two / f"{name}, bf16" for name in IN_BF16)
    assert_same_course(zero2, zero3)
    for mine, theirs in zip(steps(zero3), steps(bf16_sums), strict=True):
        assert mine["grad_norm"] != theirs["grad_norm"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    for folder, dtype in ((zero2, "fp32"), (zero3, "fp32"), (bf16_sums, "bf16")):
        (states, _) = folder.glob("checkpoint-2/global_step2/*optim_states.pt")
        assert torch.load(states, weights_only=False)["ds_config"]["data_types"] == {"grad_accum_dtype": dtype}


def test_another_number_of_processes_is_refused_under_deepspeed(two: Path, base: Path, tmp_path: Path) -> None:
    trainings = {two / "zero2": settings_of("zero2", two, launched=True)}
    (process,) = start_ranks(tiny_training.train_each, trainings, base, outputs=tmp_path, world_size=1)
    assert exit_code(process) != 0
    assert "number of processes, among which DeepSpeed splits the optimizer's states: 2, 1" in (tmp_path / "0.txt").read_text()


def test_a_training_of_which_one_process_is_killed_resumes_to_the_same_losses(base: Path, tmp_path: Path) -> None:
    settings = {"train": {**settings_of("zero2", tmp_path, launched=True)["train"], **FOUR_EPOCHS}}
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    first, second = start_ranks(tiny_training.train_each, {killed: settings}, base, EXAMPLES, outputs=tmp_path / "output")
    while len(steps(killed)) < 4:
        assert first.is_alive(), (tmp_path / "output/0.txt").read_text()
        time.sleep(0.02)
    second.kill()
    assert exit_code(second) == -signal.SIGKILL
    assert exit_code(first, seconds=45) > 0, "it ends too"
    assert 4 <= len(steps(killed)) < 12, "after the first epoch"
    printed = train_in_ranks({killed: settings, uninterrupted: settings}, base, tmp_path / "printed", EXAMPLES)
    assert "resumed from checkpoint-" in printed
    assert_same_course(killed, uninterrupted)
