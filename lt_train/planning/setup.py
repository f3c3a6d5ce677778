"""The setup of a training: its GPUs, its dtypes, and what DeepSpeed shards or offloads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from lt_train.planning.activations import FP32, ElementBytes
from lt_train.recipe.batch_size import batch_samples
from lt_train.recipe.deepspeed_file import deepspeed_settings
from lt_train.recipe.schema import Recipe, Train
from lt_train.runtime.errors import UserError
from lt_train.runtime.units import GIB

BF16 = 2
GPU_GIB = 80
"""Memory of a GPU where this machine has none."""

MOST_GIB = 10**6
"""Of one GPU: more is a mistake."""

ZERO_DEFAULT = 10**9
"""DeepSpeed's default of `live_parameters` and `sub_group` (deepspeed/runtime/zero/config.py)."""

USABLE = 0.92
"""Fraction of a GPU's memory that a training can allocate; the rest is the CUDA context, NCCL's buffers and fragmentation. A rule
of thumb."""


@dataclass(frozen=True)
class Machine:
    """
    Attributes:
        gpus: processes, one per GPU.
        memory: bytes of each GPU.
        cpu: the processes run on a CPU instead.
        tflops: peak of a GPU in dense matrix products, 10^12 operations per second.
        efficiency: fraction of that peak that a training reaches.
    """

    gpus: int
    memory: int
    cpu: bool = False
    tflops: float = 989.0
    efficiency: float = 0.4

    def __post_init__(self) -> None:
        for option, value in (("--gpus", self.gpus), ("--gpu-memory", self.memory), ("--tflops", self.tflops)):
            if not value > 0:
                raise UserError(f"{option}: {value:g}: not above 0. Fix: set it to a positive number")
        if not 0 < self.efficiency <= 1:
            raise UserError(f"--efficiency: {self.efficiency:g}: not above 0 and at most 1. Fix: usually 0.3 to 0.5")

    @property
    def usable(self) -> int:
        return self.memory if self.cpu else int(self.memory * USABLE)


def gpu_memory_bytes(gib: float) -> int:
    """--gpu-memory in bytes.

    Raises:
        UserError: no memory of a GPU, such as NaN.
    """
    if not 0 < gib <= MOST_GIB:
        raise UserError(f"--gpu-memory: {gib:g}: not above 0 and at most {MOST_GIB:,}. Fix: set it to the GiB of one GPU")
    return int(gib * GIB)


def machine_here(gpus: int | None, gpu_memory: float | None) -> Machine:
    """The machine to plan for: GPUs as given, else those that are here, else this machine's CPU."""
    if gpus is None and gpu_memory is None and not torch.cuda.is_available():
        return Machine(1, psutil.virtual_memory().available, cpu=True)
    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else GPU_GIB * GIB
    count = (torch.cuda.device_count() or 1) if gpus is None else gpus
    return Machine(count, here if gpu_memory is None else gpu_memory_bytes(gpu_memory))


@dataclass(frozen=True)
class Sharding:
    """Settings of DeepSpeed's configuration that place weights, gradients and optimizer. `stage` None: no DeepSpeed.

    Attributes:
        live_parameters: stage3_max_live_parameters, most parameters that stage 3 gathers at once.
        sub_group: sub_group_size, parameters that the optimizer of stage 3 updates together.
        sums_in_fp32: gradients of several micro-batches are accumulated in fp32, not in the dtype of the weights.
    """

    stage: Literal[0, 1, 2, 3] | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    live_parameters: int = ZERO_DEFAULT
    sub_group: int = ZERO_DEFAULT
    sums_in_fp32: bool = True

    @property
    def name(self) -> str:
        if self.stage is None:
            return "no DeepSpeed"
        parts = (("optimizer", self.offload_optimizer), ("weights", self.offload_parameters))
        offloaded = [name for name, is_offloaded in parts if is_offloaded]
        sums = "" if self.sums_in_fp32 else ", gradients accumulated in bf16"
        return f"ZeRO-{self.stage}" + (f", {' and '.join(offloaded)} in host memory" if offloaded else "") + sums


@dataclass(frozen=True)
class TeacherSetup:
    """A teacher that computes its outputs during the training.

    Attributes:
        copied: a second model in memory.
        layers: number of layers whose outputs are compared.
    """

    copied: bool
    layers: int


@dataclass(frozen=True)
class Setup:
    """Everything that decides the memory of a training, beside the model's shape."""

    machine: Machine
    sharding: Sharding
    bf16: bool
    full: bool
    """train.method full."""
    micro_batch: int
    length: int
    """Tokens of a row: data.max_length, the longest possible."""
    accumulates: bool
    """An optimizer step has several micro-batches, whose gradients are accumulated."""
    checkpointing: bool
    packing: bool
    dense: bool
    """Streaming layers use the reference kernel."""
    teacher: TeacherSetup | None = None
    sequence_parallel: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one GPU."""
        return -(-self.micro_batch * self.length // self.sequence_parallel)

    @property
    def gathered(self) -> bool:
        """Attention works on copies: rows pack or pad documents, or are divided among several processes."""
        return self.packing or self.micro_batch > 1 or self.sequence_parallel > 1

    @property
    def accumulates_in_fp32(self) -> bool:
        """DeepSpeed adds the bf16 gradients of each micro-batch to an fp32 sum."""
        return self.bf16 and bool(self.sharding.stage) and self.sharding.sums_in_fp32 and self.accumulates

    @property
    def element(self) -> ElementBytes:
        """As weights_dtype (training/settings.py) loads the weights and accelerate casts: by autocast, except under DeepSpeed."""
        if not self.bf16:
            return ElementBytes(FP32, FP32, FP32, autocast=False)
        if self.sharding.stage is not None:
            return ElementBytes(BF16, BF16, BF16, autocast=False)
        return ElementBytes(BF16, FP32, FP32, autocast=True) if self.full else ElementBytes(BF16, BF16, BF16, autocast=True)


def in_bf16(recipe: Recipe, machine: Machine) -> bool:
    """`model.dtype: auto` is bf16 on GPUs and fp32 on CPUs."""
    return recipe.model.dtype == "bf16" or (recipe.model.dtype == "auto" and not machine.cpu)


def inference_itemsize(recipe: Recipe, machine: Machine) -> int:
    """Bytes of one element of the weights and activations where nothing is trained."""
    return BF16 if in_bf16(recipe, machine) else FP32


def setup_of(recipe: Recipe, train: Train, machine: Machine, streaming_layers: int) -> Setup:
    """The setup that the recipe describes; `streaming_layers` stream wholly or in part."""
    return Setup(
        machine=machine,
        sharding=sharding_of(train.deepspeed),
        bf16=in_bf16(recipe, machine),
        full=train.method == "full",
        micro_batch=train.micro_batch_size,
        length=recipe.data.max_length,
        accumulates=_accumulates(recipe, train, machine),
        checkpointing=train.gradient_checkpointing,
        packing=recipe.data.packing,
        dense=recipe.model.attention == "reference",
        teacher=_teacher(recipe, train, streaming_layers),
        sequence_parallel=train.sequence_parallel,
    )


def sharding_of(path: str | None) -> Sharding:
    """The sharding of a DeepSpeed configuration, which the recipe's checks have validated."""
    if path is None:
        return Sharding()
    settings = deepspeed_settings(Path(path), accumulates=True)
    zero: dict[str, Any] = settings.get("zero_optimization", {})

    def offloads(block: str) -> bool:
        return (zero.get(block) or {}).get("device", "none") not in (None, "none")

    def number(name: str) -> int:
        value = zero.get(name, "auto")
        return ZERO_DEFAULT if value == "auto" else int(value)

    return Sharding(
        zero.get("stage", 0),
        offloads("offload_optimizer"),
        offloads("offload_param"),
        number("stage3_max_live_parameters"),
        number("sub_group_size"),
        settings["data_types"]["grad_accum_dtype"] == "fp32",
    )


def _teacher(recipe: Recipe, train: Train, streaming_layers: int) -> TeacherSetup | None:
    distill = train.distill
    if distill.weight == 0 or distill.teacher == "top_k":  # the teacher's files exist before the training
        return None
    return TeacherSetup(
        copied=distill.teacher == "copy" or recipe.lora is None, layers=streaming_layers if distill.hidden_weight > 0 else 0
    )


def _accumulates(recipe: Recipe, train: Train, machine: Machine) -> bool:
    at_once = train.micro_batch_size * machine.gpus // train.sequence_parallel
    return batch_samples(train, recipe.data) > at_once
