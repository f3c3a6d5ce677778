from dataclasses import replace

import pytest

from lt_train.inference.loading import load_base_config
from lt_train.planning.memory import Memory, Phase, training_memory
from lt_train.planning.options import SHARDINGS, sharding_options, suggestions
from lt_train.planning.setup import Machine, Setup, Sharding, TeacherSetup, setup_of, sharding_of
from lt_train.planning.shape import ModelShape, model_shape
from lt_train.recipe.schema import Recipe
from lt_train.runtime.units import GIB
from tests.support.public_models import public_recipe

BF16, FP32 = 2, 4


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return public_recipe("qwen3-8b")


@pytest.fixture(scope="module")
def shape(recipe: Recipe) -> ModelShape:
    return model_shape(recipe, load_base_config(recipe.model))


@pytest.fixture
def setup(recipe: Recipe) -> Setup:
    return setup_of(recipe, recipe.train, Machine(8, 80 * GIB), 18)


def size_of(memory: Memory, name: str) -> int:
    return sum(allocation.size for allocation in memory.allocations if allocation.name == name)


@pytest.mark.parametrize(("stage", "weights", "gradients", "optimizer"), [(0, 1, 1, 1), (1, 1, 1, 8), (2, 1, 8, 8), (3, 8, 8, 8)])
def test_each_zero_stage_shards_its_states(shape, setup, stage, weights, gradients, optimizer):
    """2 + 2 + 12 bytes a parameter in bf16, each over as many GPUs as share it."""
    memory = training_memory(shape, replace(setup, sharding=Sharding(stage), accumulates=False))
    for name, size, over in (("weights", 2, weights), ("gradients", 2, gradients), ("optimizer", 12, optimizer)):
        assert size_of(memory, name) == pytest.approx(size * shape.parameters / over, rel=1e-6)


@pytest.mark.parametrize(("stage", "size", "in_step"), [(1, 4 + 2, 0), (2, 4 / 8, 0), (3, 4 / 8, 4 / 8)])
def test_gradients_of_several_micro_batches_are_summed_up_in_fp32(shape, setup, stage, size, in_step):
    """Stage 1 keeps the bf16 ones beside the sum, stage 3 copies the sum for the optimizer."""
    summed = replace(setup, sharding=Sharding(stage, sub_group=shape.parameters))
    assert setup.accumulates
    assert size_of(training_memory(shape, summed), "gradients") == pytest.approx(size * shape.parameters, rel=1e-6)
    assert size_of(training_memory(shape, summed), "gradients in fp32") == pytest.approx(in_step * shape.parameters, rel=1e-6)
    for in_bf16 in (replace(summed, accumulates=False), replace(summed, sharding=replace(summed.sharding, sums_in_fp32=False))):
        over = 1 if stage == 1 else 8
        assert size_of(training_memory(shape, in_bf16), "gradients") == pytest.approx(2 * shape.parameters / over, rel=1e-6)
    assert size_of(training_memory(shape, replace(summed, bf16=False)), "gradients in fp32") == 0


def test_stage_2_sums_gradients_up_on_the_gpu_also_for_an_optimizer_in_host_memory(shape, setup):
    memory = training_memory(shape, replace(setup, sharding=Sharding(2, offload_optimizer=True)))
    assert size_of(memory, "gradients") == pytest.approx(4 * shape.parameters / 8, rel=1e-6)
    assert memory.host == (4 + 12) * shape.parameters


def test_without_deepspeed_weights_are_fp32_and_several_gpus_hold_a_second_copy_of_the_gradients(shape, setup):
    memory = training_memory(shape, setup)
    assert size_of(memory, "weights") == FP32 * shape.parameters
    assert size_of(memory, "optimizer") == 2 * FP32 * shape.parameters
    assert size_of(memory, "DDP's buckets") == size_of(memory, "gradients") == FP32 * shape.parameters
    alone = training_memory(shape, replace(setup, machine=Machine(1, 80 * GIB)))
    assert size_of(alone, "DDP's buckets") == 0


def test_what_is_offloaded_lies_in_host_memory(shape, setup):
    memory = training_memory(shape, replace(setup, sharding=Sharding(3, offload_optimizer=True, offload_parameters=True)))
    assert memory.host == (2 + 4 + 4 + 12) * shape.parameters  # weights, gradients twice, optimizer
    assert size_of(memory, "weights") == size_of(memory, "gradients") == size_of(memory, "optimizer") == 0


def test_lora_keeps_gradients_and_states_of_adapters_alone(setup):
    recipe = public_recipe("qwen3-8b", train={"method": "lora"}, lora={})
    shape = model_shape(recipe, load_base_config(recipe.model))
    memory = training_memory(shape, replace(setup, full=False))
    assert size_of(memory, "weights") == BF16 * shape.base_parameters + FP32 * shape.adapters
    assert size_of(memory, "optimizer") == 2 * FP32 * shape.adapters


def test_checkpointing_keeps_one_input_a_layer(shape, setup):
    sharded = replace(setup, sharding=Sharding(3))
    memory = training_memory(shape, replace(sharded, checkpointing=True))
    assert size_of(memory, "activations") == 4096 * 36 * 4096 * BF16
    again = size_of(memory, "one layer again")
    assert size_of(training_memory(shape, sharded), "activations") == 36 * again


def test_activations_grow_with_the_micro_batch_and_shrink_by_sequence_parallelism(shape, setup):
    one = training_memory(shape, setup)
    assert size_of(training_memory(shape, replace(setup, micro_batch=3)), "activations") > 3 * size_of(one, "activations")
    whole = replace(setup, checkpointing=True)
    shared = training_memory(shape, replace(whole, sequence_parallel=8))
    assert 8 * size_of(shared, "activations") == size_of(training_memory(shape, whole), "activations")


def test_logits_are_never_tokens_by_vocabulary(shape, setup):
    long = training_memory(shape, replace(setup, length=32768))
    assert size_of(long, "logits chunk") == size_of(training_memory(shape, setup), "logits chunk") == 4096 * 32768 * BF16


def test_the_peak_is_the_fullest_phase(shape, setup):
    memory = training_memory(shape, replace(setup, sharding=Sharding(3)))
    assert memory.peak == max(memory.at(phase) for phase in Phase)
    assert memory.peak < sum(allocation.size for allocation in memory.allocations)


def test_accumulated_gradients_are_there_all_the_time(shape, setup):
    alone = replace(setup, machine=Machine(1, 80 * GIB))
    first = training_memory(shape, replace(alone, accumulates=False)).at(Phase.LOSS)
    later = training_memory(shape, replace(alone, accumulates=True)).at(Phase.LOSS)
    assert later - first == FP32 * shape.parameters


def test_a_copied_teacher_lies_whole_on_each_gpu(shape, setup):
    sharded = replace(setup, sharding=Sharding(3))
    with_copy = training_memory(shape, replace(sharded, teacher=TeacherSetup(copied=True, layers=0)))
    assert size_of(with_copy, "teacher") == BF16 * shape.parameters
    itself = training_memory(shape, replace(sharded, teacher=TeacherSetup(copied=False, layers=18)))
    assert size_of(itself, "teacher") == 0
    assert size_of(itself, "teacher's outputs") == 19 * 4096 * 4096 * BF16


def test_the_files_in_launch_are_read_as_deepspeed_reads_them(tmp_path):
    for sharding, file in SHARDINGS:
        assert sharding_of(None if file == "null" else file) == sharding
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 1e8}}')
    assert sharding_of(str(file)) == Sharding(3, offload_optimizer=True, sub_group=10**8)
    file.write_text('{"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}')
    assert sharding_of(str(file)) == Sharding(2, sums_in_fp32=False)


def test_an_option_names_the_largest_micro_batch_that_fits_and_divides(recipe, shape, setup):
    found = {option.file: option for option in sharding_options(recipe, recipe.train, shape, setup)}
    zero3 = found["launch/zero3.json"]
    assert zero3.micro_batch == 1  # of the 2 samples that each of 8 GPUs has in a batch of 16
    fitting = replace(setup, sharding=Sharding(3))
    assert training_memory(shape, fitting).peak == zero3.peak <= setup.machine.usable
    assert training_memory(shape, replace(fitting, micro_batch=2)).peak > setup.machine.usable
    assert found["null"].micro_batch is None


def test_remedies_are_single_changes_that_make_it_fit(recipe, shape, setup):
    assert training_memory(shape, setup).peak > setup.machine.usable
    assert list(suggestions(recipe, recipe.train, shape, setup)) == ["--set train.deepspeed=launch/zero2.json"]
    sharded = replace(replace(setup, sharding=Sharding(3)), length=16384)  # states are no trouble, activations are
    offered = list(suggestions(recipe, recipe.train, shape, sharded))
    assert "--set train.gradient_checkpointing=true" in offered
    for other in (replace(sharded, checkpointing=True), replace(sharded, length=4096)):
        assert training_memory(shape, other).peak <= setup.machine.usable
    (shorter,) = [suggestion for suggestion in offered if "max_length" in suggestion]
    length = int(shorter.split("=")[1].split(";")[0])
    assert training_memory(shape, replace(sharded, length=length)).peak <= setup.machine.usable
    assert training_memory(shape, replace(sharded, length=length + 1024)).peak > setup.machine.usable


def test_sharing_sequences_is_offered_where_heads_and_gpus_divide(shape, setup):
    recipe = public_recipe(
        "qwen3-8b", train={"deepspeed": "launch/zero3.json", "gradient_checkpointing": True}, data={"max_length": 40960}
    )
    long = setup_of(recipe, recipe.train, Machine(8, 40 * GIB), 18)
    (offered,) = [suggestion for suggestion in suggestions(recipe, recipe.train, shape, long) if "sequence_parallel" in suggestion]
    degree = int(offered.split("=")[1])
    assert degree in (2, 4, 8)
    assert training_memory(shape, replace(long, sequence_parallel=degree)).peak <= long.machine.usable
