"""How a training is to be run: on which GPUs, in which numbers, and what DeepSpeed shards or moves to the host."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lt_train.planning.activations import FP32, Numbers
from lt_train.recipe.batch_size import batch_samples
from lt_train.recipe.deepspeed_file import deepspeed_settings
from lt_train.recipe.schema import Recipe, Train
from lt_train.runtime.errors import UserError

BF16 = 2

ZERO_DEFAULT = 10**9
"""Of both of Sharding's numbers (deepspeed/runtime/zero/config.py)."""

USABLE = 0.92
"""Share of a GPU's memory that a training can count on: the rest is the CUDA context, NCCL's buffers and fragmentation. A rule of
thumb."""


@dataclass(frozen=True)
class Machine:
    """
    Attributes:
        gpus: processes, one to a GPU.
        memory: bytes of each.
        cpu: they run on a CPU instead.
        tflops: peak of a GPU in dense matrix products, 10^12 operations a second.
        efficiency: share of that peak which a training reaches.
    """

    gpus: int
    memory: int
    cpu: bool = False
    tflops: float = 989.0
    efficiency: float = 0.4

    def __post_init__(self) -> None:
        for option, value in (("--gpus", self.gpus), ("--gpu-memory", self.memory), ("--tflops", self.tflops)):
            if not value > 0:
                raise UserError(f"{option}: {value:g} is not above 0")
        if not 0 < self.efficiency <= 1:
            raise UserError(
                f"--efficiency: {self.efficiency:g} is no share of the peak; it lies between 0 and 1, usually at 0.3 to 0.5"
            )

    @property
    def usable(self) -> int:
        return self.memory if self.cpu else int(self.memory * USABLE)


@dataclass(frozen=True)
class Sharding:
    """What of DeepSpeed's configuration decides where bytes lie. `stage` None: no DeepSpeed.

    Attributes:
        live_parameters: stage3_max_live_parameters, parameters of stage 3 that are gathered at once.
        sub_group: sub_group_size, parameters of stage 3 that one piece of the optimizer's step covers.
        sums_in_fp32: gradients of several micro-batches are summed up in fp32, not in the dtype of the weights.
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
        moved = [
            what for what, is_moved in (("optimizer", self.offload_optimizer), ("weights", self.offload_parameters)) if is_moved
        ]
        sums = "" if self.sums_in_fp32 else ", gradients summed up in bf16"
        return f"ZeRO-{self.stage}" + (f", {' and '.join(moved)} in host memory" if moved else "") + sums


@dataclass(frozen=True)
class TeacherSetup:
    """A teacher that is asked while the student trains.

    Attributes:
        copied: it is a second model in memory.
        layers: how many layers' outputs are compared.
    """

    copied: bool
    layers: int


@dataclass(frozen=True)
class Setup:
    """One way to run a recipe's training."""

    machine: Machine
    sharding: Sharding
    bf16: bool
    full: bool
    """train.method full."""
    micro_batch: int
    length: int
    """Tokens of a row: data.max_length, the longest there may be."""
    accumulates: bool
    """Gradients of former micro-batches are there when one begins."""
    checkpointing: bool
    packing: bool
    dense: bool
    """Streaming layers compute by attention: reference."""
    teacher: TeacherSetup | None = None
    sequence_parallel: int = 1

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one GPU."""
        return -(-self.micro_batch * self.length // self.sequence_parallel)

    @property
    def gathered(self) -> bool:
        """Attention works on copies: rows pack or pad documents, or several processes share them."""
        return self.packing or self.micro_batch > 1 or self.sequence_parallel > 1

    @property
    def sums_apart(self) -> bool:
        """Under DeepSpeed the gradients of a micro-batch are bf16, and are added to others in fp32."""
        return self.bf16 and bool(self.sharding.stage) and self.sharding.sums_in_fp32 and self.accumulates

    @property
    def numbers(self) -> Numbers:
        """As weights_dtype (training/settings.py) loads the weights, and accelerate casts: by autocast, but not under DeepSpeed."""
        if not self.bf16:
            return Numbers(FP32, FP32, FP32, autocast=False)
        if self.sharding.stage is not None:
            return Numbers(BF16, BF16, BF16, autocast=False)
        return Numbers(BF16, FP32, FP32, autocast=True) if self.full else Numbers(BF16, BF16, BF16, autocast=True)


def in_bf16(recipe: Recipe, machine: Machine) -> bool:
    """`model.dtype: auto` is bf16 on GPUs and fp32 on CPUs."""
    return recipe.model.dtype == "bf16" or (recipe.model.dtype == "auto" and not machine.cpu)


def inference_number(recipe: Recipe, machine: Machine) -> int:
    """Bytes of a weight, and of all that a forward pass makes of it, where nothing is trained."""
    return BF16 if in_bf16(recipe, machine) else FP32


def setup_of(recipe: Recipe, train: Train, machine: Machine, lazy_layers: int) -> Setup:
    """As the recipe says."""
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
        teacher=_teacher(recipe, train, lazy_layers),
        sequence_parallel=train.sequence_parallel,
    )


def sharding_of(path: str | None) -> Sharding:
    """Read off a DeepSpeed configuration, which the recipe's checks have found to be one."""
    if path is None:
        return Sharding()
    settings = deepspeed_settings(Path(path), accumulates=True)
    zero: dict[str, Any] = settings.get("zero_optimization", {})

    def moved(block: str) -> bool:
        return (zero.get(block) or {}).get("device", "none") not in (None, "none")

    def number(name: str) -> int:
        value = zero.get(name, "auto")
        return ZERO_DEFAULT if value == "auto" else int(value)

    return Sharding(
        zero.get("stage", 0),
        moved("offload_optimizer"),
        moved("offload_param"),
        number("stage3_max_live_parameters"),
        number("sub_group_size"),
        settings["data_types"]["grad_accum_dtype"] == "fp32",
    )


def _teacher(recipe: Recipe, train: Train, lazy_layers: int) -> TeacherSetup | None:
    distill = train.distill
    if distill.weight == 0 or distill.teacher == "top_k":  # files of top_k hold a few numbers for a token
        return None
    return TeacherSetup(
        copied=distill.teacher == "copy" or recipe.lora is None, layers=lazy_layers if distill.hidden_weight > 0 else 0
    )


def _accumulates(recipe: Recipe, train: Train, machine: Machine) -> bool:
    at_once = train.micro_batch_size * machine.gpus // train.sequence_parallel
    return batch_samples(train, recipe.data) > at_once
