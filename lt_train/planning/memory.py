"""Memory of one GPU in an optimizer step: each allocation with the phases of the step in which it exists, and the peak of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from lt_train.planning.activations import FP32, after_layers_bytes, backward_workspace_bytes, checkpoint_bytes, layer_bytes
from lt_train.planning.setup import BF16, Setup
from lt_train.planning.shape import ModelShape

# TRL's fused head (trl/kernels/chunked_logprob.py, trl/trainer/utils.py) computes logits in tiles of this size.
TILE_TOKENS, TILE_VOCAB = 4096, 32768
TORCH_TILES = 8
"""fp32 tiles that its backward pass allocates without Triton (`_backward_tile`); with Triton it works in place."""


class Phase(Enum):
    LOSS = "at the start of the backward pass, in the head"
    LAST_LAYER = "in the backward pass of the last layer"
    FIRST_LAYER = "in the backward pass of the first layer"
    STEP = "in the optimizer's step"


ALWAYS = frozenset(Phase)
PASSES = ALWAYS - {Phase.STEP}
LAYERS = frozenset({Phase.LAST_LAYER, Phase.FIRST_LAYER})


@dataclass(frozen=True)
class Allocation:
    """
    Attributes:
        size: bytes on each GPU.
        phases: those in which it exists.
        source: what the size consists of, for the table.
    """

    name: str
    size: int
    phases: frozenset[Phase]
    source: str


@dataclass(frozen=True)
class Memory:
    allocations: tuple[Allocation, ...]
    host: int
    """Bytes of host memory, summed over all processes."""

    @property
    def phase(self) -> Phase:
        return max(Phase, key=self.at)

    @property
    def peak(self) -> int:
        return self.at(self.phase)

    def at(self, phase: Phase) -> int:
        return sum(allocation.size for allocation in self.allocations if phase in allocation.phases)


def training_memory(shape: ModelShape, setup: Setup) -> Memory:
    allocations = [
        *_states(shape, setup),
        *_activations(shape, setup),
        *_head(shape, setup),
        *_teacher(shape, setup),
        *_sharding(shape, setup),
    ]
    return Memory(tuple(allocation for allocation in allocations if allocation.size > 0), _host(shape, setup))


def _states(shape: ModelShape, setup: Setup) -> Iterator[Allocation]:
    """Weights, gradients, AdamW's two moments, and under DeepSpeed the fp32 weights of its optimizer.

    ZeRO (Rajbhandari et al., arXiv 1910.02054): stage 1 shards the optimizer over all processes, stage 2 also the gradients, 3 also
    the weights. In bf16 that is 2 + 2 + 12 bytes per trained parameter, and 2 + 4 + 12 where the gradients of several
    micro-batches are accumulated (deepspeed_file.py).
    """
    sharding, gpus = setup.sharding, setup.machine.gpus
    weights, gradients, moments = _bytes_of_states(shape, setup)
    stage = sharding.stage or 0
    stored = 0 if sharding.offload_parameters else _shard(weights, gpus if stage == 3 else 1)
    yield Allocation(
        "weights", stored, ALWAYS, _over("bf16" if setup.element.weight == BF16 else "fp32", gpus if stage == 3 else 1)
    )
    offloaded = sharding.offload_optimizer and not _accumulates_on_gpu(setup)
    gradient_bytes = 0 if offloaded else _shard(gradients, gpus if stage >= 2 else 1)
    persistent = sharding.stage is not None or setup.accumulates
    yield Allocation(
        "gradients",
        gradient_bytes,
        ALWAYS if persistent else frozenset({Phase.FIRST_LAYER, Phase.STEP}),
        _over(f"of {shape.trainable:,} parameters", gpus if stage >= 2 else 1)
        + ("" if persistent else ", as the backward pass computes them")
        + (", accumulated in fp32" if setup.accumulates_in_fp32 else ""),
    )
    if not persistent and shape.head_trained:
        yield Allocation("gradient of the head", shape.head * FP32, frozenset({Phase.LAST_LAYER}), "computed first")
    optimizer = 0 if sharding.offload_optimizer else _shard(moments, gpus if stage >= 1 else 1)
    states = "two moments in fp32" + ("" if sharding.stage is None else " and fp32 weights")
    yield Allocation("optimizer", optimizer, ALWAYS, _over(f"AdamW: {states}", gpus if stage >= 1 else 1))
    if sharding.stage is None and gpus > 1:
        yield Allocation("DDP's buckets", gradients, ALWAYS, "a second copy of the gradients, for the all-reduce")
    if setup.element.autocast and setup.full:
        cast = BF16 * (shape.layer_linears + shape.head)
        yield Allocation("bf16 copies of weights", cast, PASSES - {Phase.FIRST_LAYER}, "autocast keeps them during a forward pass")


def _bytes_of_states(shape: ModelShape, setup: Setup) -> tuple[int, int, int]:
    """Weights, gradients and optimizer without replicas, summed over all shards."""
    frozen, weight = shape.parameters - shape.trainable, setup.element.weight
    # PEFT keeps adapters in fp32, but under ZeRO-3 TRL keeps them in the base's dtype; DeepSpeed casts all weights to its own
    trained = FP32 if setup.sharding.stage is None else weight
    moments = 2 * FP32 if setup.sharding.stage is None else 3 * FP32
    gradient = trained
    if setup.accumulates_in_fp32:
        # stage 1 (deepspeed/runtime/bf16_optimizer.py) also keeps those of the micro-batch; stages 2 and 3 reduce them at once
        gradient = FP32 + (weight if setup.sharding.stage == 1 else 0)
    return frozen * weight + shape.trainable * trained, shape.trainable * gradient, shape.trainable * moments


def _accumulates_on_gpu(setup: Setup) -> bool:
    """Stage 2 accumulates gradients in fp32 on the GPU, also with an offloaded optimizer (`_build_compact_grad_partition_buffer` in
    deepspeed/runtime/zero/stage_1_and_2.py); stage 3 accumulates them where the optimizer is.
    """
    return setup.accumulates_in_fp32 and setup.sharding.stage == 2


def _activations(shape: ModelShape, setup: Setup) -> Iterator[Allocation]:
    element, tokens = setup.element, setup.tokens
    layers = [
        layer_bytes(
            shape,
            layer,
            element,
            gathered=setup.gathered,
            dense=setup.dense and (layer.streaming > 0 or layer.slides),
            length=setup.length,
        )
        for layer in shape.layers
    ]
    first_trained = next((index for index, layer in enumerate(shape.layers) if layer.trains), len(shape.layers))
    before_first = PASSES - {Phase.FIRST_LAYER}
    streaming, split = sum(layer.streaming == 1 for layer in shape.layers), sum(layer.is_split for layer in shape.layers)
    if setup.checkpointing:
        yield Allocation(
            "activations",
            tokens * len(layers) * checkpoint_bytes(shape, element),
            before_first,
            f"{tokens:,} tokens, each layer's input",
        )
        yield Allocation("one layer again", tokens * max(layers), LAYERS, "gradient checkpointing recomputes it")
    else:
        sliding = len(shape.spec.sliding_layers)
        count = f"{len(layers) - streaming - split - sliding} full, {streaming} streaming" + f", {split} split" * bool(split)
        count += f", {sliding} sliding" * bool(sliding) + " layers"
        yield Allocation("activations", tokens * sum(layers[first_trained:]), before_first, f"{tokens:,} tokens, {count}")
        yield Allocation(
            "first layer",
            tokens * layers[first_trained] if first_trained < len(layers) else 0,
            frozenset({Phase.FIRST_LAYER}),
            "the last activations that are left",
        )
    workspace = max(backward_workspace_bytes(shape, layer, element) for layer in shape.layers)
    yield Allocation("a layer's gradients", tokens * workspace, LAYERS, "of the activations of its MLP")


def _head(shape: ModelShape, setup: Setup) -> Iterator[Allocation]:
    """TRL's fused head: tiles of the logits, never all of them; gradients of the hidden states and of the head in fp32."""
    tokens, element = setup.tokens, setup.element
    tile = min(tokens, TILE_TOKENS) * min(shape.vocab_size, TILE_VOCAB)
    buffer = tile * element.product + (tile * FP32 * TORCH_TILES if setup.machine.cpu else 0)
    yield Allocation(
        "logits chunk",
        buffer,
        frozenset({Phase.LOSS}),
        f"{min(tokens, TILE_TOKENS):,} tokens x {min(shape.vocab_size, TILE_VOCAB):,} vocabulary entries at a time",
    )
    hidden = tokens * (after_layers_bytes(shape, element) + FP32 * shape.hidden)
    yield Allocation("hidden states", hidden, frozenset({Phase.LOSS}), "last norm, its output, and the output's gradient in fp32")
    if shape.head_trained:
        head_gradient = shape.head * (FP32 + (element.weight if element.weight != FP32 else 0))
        yield Allocation("head's gradient", head_gradient, frozenset({Phase.LOSS}), "accumulated in fp32 over the tiles")
    if shape.tied and shape.embedding_trained:
        yield Allocation(
            "embedding's gradient",
            shape.head * element.weight,
            frozenset({Phase.FIRST_LAYER}),
            "then added to the head's",
        )


def _teacher(shape: ModelShape, setup: Setup) -> Iterator[Allocation]:
    """Distillation from the base (training/distillation/): a frozen copy where the trained model is not its own teacher, and
    the teacher's outputs for the batch, which are computed before the student's.
    """
    teacher, element, tokens = setup.teacher, setup.element, setup.tokens
    if teacher is None:
        return
    if teacher.copied:
        size = shape.base_parameters * (BF16 if setup.bf16 else FP32)
        yield Allocation("teacher", size, ALWAYS, "a frozen copy of the base, all of it on each GPU")
    yield Allocation(
        "teacher's outputs",
        tokens * shape.hidden * element.residual * (1 + teacher.layers),
        PASSES,
        "its last hidden states" + (f", and those of {teacher.layers} layers" if teacher.layers else ""),
    )
    tile = min(tokens, TILE_TOKENS) * min(shape.vocab_size, TILE_VOCAB) * FP32
    yield Allocation("teacher's logits chunk", tile, frozenset({Phase.LOSS}), "beside the student's")


def _sharding(shape: ModelShape, setup: Setup) -> Iterator[Allocation]:
    """Buffers of ZeRO beside the shards."""
    sharding, gpus = setup.sharding, setup.machine.gpus
    if sharding.stage is None:
        return
    weight = setup.element.weight
    if sharding.stage == 3:
        gathered = min(shape.parameters, max(sharding.live_parameters, shape.head))
        yield Allocation("gathered weights", gathered * weight, PASSES, "stage3_max_live_parameters, gathered from all GPUs")
    already_fp32 = setup.accumulates_in_fp32 and sharding.stage < 3  # stage 3 copies them once more, into one flat tensor
    if setup.bf16 and not sharding.offload_optimizer and not already_fp32:
        sub_group = _shard(shape.trainable, gpus if sharding.stage >= 1 else 1)
        sub_group = min(sub_group, sharding.sub_group) if sharding.stage == 3 else sub_group
        yield Allocation("gradients in fp32", sub_group * FP32, frozenset({Phase.STEP}), "of parameters updated together")


def _host(shape: ModelShape, setup: Setup) -> int:
    """An optimizer in host memory keeps the gradients that it reads, in fp32, beside the accumulated ones
    (`initialize_optimizer_states` in deepspeed/runtime/zero/stage3.py and stage_1_and_2.py).
    """
    weights, gradients, moments = _bytes_of_states(shape, setup)
    accumulated = 0 if _accumulates_on_gpu(setup) else gradients
    optimizer = accumulated + FP32 * shape.trainable + moments if setup.sharding.offload_optimizer else 0
    return optimizer + (weights if setup.sharding.offload_parameters else 0)


def _shard(size: int, gpus: int) -> int:
    return -(-size // gpus)


def _over(what: str, gpus: int) -> str:
    return what if gpus == 1 else f"{what}, over {gpus} GPUs"
