"""Bytes of one GPU in an optimizer step: what is held, by name, and in which phases of the step. The peak is the fullest phase."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from lt_train.planning.activations import FP32, after_layers_bytes, backward_work_bytes, checkpoint_bytes, layer_bytes
from lt_train.planning.setup import BF16, Setup
from lt_train.planning.shape import ModelShape

# TRL's fused head (trl/kernels/chunked_logprob.py, trl/trainer/utils.py): logits exist in tiles of so many tokens and words.
TILE_TOKENS, TILE_WORDS = 4096, 32768
TORCH_TILES = 8
"""fp32 tiles that its backward pass holds at once where there is no Triton (`_backward_tile`); with Triton it works in place."""


class Phase(Enum):
    LOSS = "at the start of the backward pass, in the head"
    LAST_LAYER = "in the backward pass of the last layer"
    FIRST_LAYER = "in the backward pass of the first layer"
    STEP = "in the optimizer's step"


ALWAYS = frozenset(Phase)
PASSES = ALWAYS - {Phase.STEP}
LAYERS = frozenset({Phase.LAST_LAYER, Phase.FIRST_LAYER})


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        size: bytes on each GPU.
        live: the phases in which they are there.
        how: where the figure comes from, in a few words.
    """

    name: str
    size: int
    live: frozenset[Phase]
    how: str


@dataclass(frozen=True)
class Memory:
    parts: tuple[Part, ...]
    host: int
    """Bytes in the memory of the hosts, of all processes together."""

    @property
    def phase(self) -> Phase:
        return max(Phase, key=self.at)

    @property
    def peak(self) -> int:
        return self.at(self.phase)

    def at(self, phase: Phase) -> int:
        return sum(part.size for part in self.parts if phase in part.live)


def training_memory(shape: ModelShape, setup: Setup) -> Memory:
    parts = [
        *_states(shape, setup),
        *_activations(shape, setup),
        *_head(shape, setup),
        *_teacher(shape, setup),
        *_sharding(shape, setup),
    ]
    return Memory(tuple(part for part in parts if part.size > 0), _host(shape, setup))


def _states(shape: ModelShape, setup: Setup) -> Iterator[Part]:
    """Weights, gradients, AdamW's two moments, and under DeepSpeed the fp32 weights that its optimizer keeps.

    ZeRO (Rajbhandari et al., arXiv 1910.02054): stage 1 shards the optimizer over all processes, 2 the gradients too, 3 the weights
    too. In bf16 that is 2 + 2 + 12 bytes for each trained parameter, and 2 + 4 + 12 where gradients of several micro-batches are
    summed up (deepspeed_file.py).
    """
    sharding, gpus = setup.sharding, setup.machine.gpus
    weights, gradients, moments = _bytes_of_states(shape, setup)
    stage = sharding.stage or 0
    held = 0 if sharding.offload_parameters else _share(weights, gpus if stage == 3 else 1)
    yield Part("weights", held, ALWAYS, _over("bf16" if setup.numbers.weight == BF16 else "fp32", gpus if stage == 3 else 1))
    moved = sharding.offload_optimizer and not _summed_up_on_gpu(setup)
    kept = 0 if moved else _share(gradients, gpus if stage >= 2 else 1)
    stays = sharding.stage is not None or setup.accumulates
    yield Part(
        "gradients",
        kept,
        ALWAYS if stays else frozenset({Phase.FIRST_LAYER, Phase.STEP}),
        _over(f"of {shape.trainable:,} parameters", gpus if stage >= 2 else 1)
        + ("" if stays else ", as they come")
        + (", summed up in fp32" if setup.sums_apart else ""),
    )
    if not stays and shape.head_trained:
        yield Part("gradient of the head", shape.head * FP32, frozenset({Phase.LAST_LAYER}), "the first that comes")
    optimizer = 0 if sharding.offload_optimizer else _share(moments, gpus if stage >= 1 else 1)
    what = "two moments in fp32" + ("" if sharding.stage is None else " and fp32 weights")
    yield Part("optimizer", optimizer, ALWAYS, _over(f"AdamW: {what}", gpus if stage >= 1 else 1))
    if sharding.stage is None and gpus > 1:
        yield Part("DDP's buckets", gradients, ALWAYS, "a second copy of the gradients, in which they are summed up")
    if setup.numbers.autocast and setup.full:
        cast = BF16 * (shape.layer_linears + shape.head)
        yield Part("bf16 copies of weights", cast, PASSES - {Phase.FIRST_LAYER}, "autocast keeps them during a forward pass")


def _bytes_of_states(shape: ModelShape, setup: Setup) -> tuple[int, int, int]:
    """Weights, gradients, optimizer, of all processes together if nothing is there twice."""
    frozen, weight = shape.parameters - shape.trainable, setup.numbers.weight
    # PEFT keeps adapters in fp32, but under ZeRO-3 TRL has them in the base's dtype; DeepSpeed casts all to its own
    trained = FP32 if setup.sharding.stage is None else weight
    moments = 2 * FP32 if setup.sharding.stage is None else 3 * FP32
    gradient = trained
    if setup.sums_apart:
        # stage 1 (deepspeed/runtime/bf16_optimizer.py) keeps those of the micro-batch as well, which the others reduce as they come
        gradient = FP32 + (weight if setup.sharding.stage == 1 else 0)
    return frozen * weight + shape.trainable * trained, shape.trainable * gradient, shape.trainable * moments


def _summed_up_on_gpu(setup: Setup) -> bool:
    """Stage 2 sums gradients up in fp32 on the GPU, also where it offloads the optimizer (`_build_compact_grad_partition_buffer` in
    deepspeed/runtime/zero/stage_1_and_2.py); stage 3 has them beside the optimizer.
    """
    return setup.sums_apart and setup.sharding.stage == 2


def _activations(shape: ModelShape, setup: Setup) -> Iterator[Part]:
    numbers, tokens = setup.numbers, setup.tokens
    layers = [
        layer_bytes(
            shape,
            layer,
            numbers,
            gathered=setup.gathered,
            dense=setup.dense and layer.streams,
            length=setup.length,
        )
        for layer in shape.layers
    ]
    begun = next((index for index, layer in enumerate(shape.layers) if layer.trains), len(shape.layers))
    early = PASSES - {Phase.FIRST_LAYER}
    streaming = sum(layer.streams for layer in shape.layers)
    if setup.checkpointing:
        yield Part(
            "activations", tokens * len(layers) * checkpoint_bytes(shape, numbers), early, f"{tokens:,} tokens, each layer's input"
        )
        yield Part("one layer again", tokens * max(layers), LAYERS, "gradient checkpointing computes it anew")
    else:
        count = f"{len(layers) - streaming} full, {streaming} streaming layers"
        yield Part("activations", tokens * sum(layers[begun:]), early, f"{tokens:,} tokens, {count}")
        yield Part(
            "first layer",
            tokens * layers[begun] if begun < len(layers) else 0,
            frozenset({Phase.FIRST_LAYER}),
            "the last that is left",
        )
    work = max(backward_work_bytes(shape, layer, numbers) for layer in shape.layers)
    yield Part("a layer's gradients", tokens * work, LAYERS, "of what passes through its MLP")


def _head(shape: ModelShape, setup: Setup) -> Iterator[Part]:
    """TRL's fused head: never tokens x vocabulary, but tiles of it; the gradients of the hidden states and of the head in fp32."""
    tokens, numbers = setup.tokens, setup.numbers
    tile = min(tokens, TILE_TOKENS) * min(shape.vocabulary, TILE_WORDS)
    buffer = tile * numbers.product + (tile * FP32 * TORCH_TILES if setup.machine.cpu else 0)
    yield Part(
        "logits chunk",
        buffer,
        frozenset({Phase.LOSS}),
        f"{min(tokens, TILE_TOKENS):,} tokens x {min(shape.vocabulary, TILE_WORDS):,} words at a time",
    )
    hidden = tokens * (after_layers_bytes(shape, numbers) + FP32 * shape.hidden)
    yield Part("hidden states", hidden, frozenset({Phase.LOSS}), "last norm, its output, and the gradient of it in fp32")
    if shape.head_trained:
        sum_up = shape.head * (FP32 + (numbers.weight if numbers.weight != FP32 else 0))
        yield Part("head's gradient", sum_up, frozenset({Phase.LOSS}), "summed up in fp32 over the tiles")
    if shape.tied and shape.embedding_trained:
        yield Part(
            "embedding's gradient", shape.head * numbers.weight, frozenset({Phase.FIRST_LAYER}), "before it is added to the head's"
        )


def _teacher(shape: ModelShape, setup: Setup) -> Iterator[Part]:
    """Distillation from the base (training/teacher.py): a frozen copy, where the trained model is not its own teacher, and what it
    says about the batch before the student is asked.
    """
    teacher, numbers, tokens = setup.teacher, setup.numbers, setup.tokens
    if teacher is None:
        return
    if teacher.copied:
        size = shape.base_parameters * (BF16 if setup.bf16 else FP32)
        yield Part("teacher", size, ALWAYS, "a frozen copy of the base, whole on each GPU")
    yield Part(
        "teacher's answers",
        tokens * shape.hidden * numbers.residual * (1 + teacher.layers),
        PASSES,
        "its last hidden states" + (f", and those of {teacher.layers} layers" if teacher.layers else ""),
    )
    tile = min(tokens, TILE_TOKENS) * min(shape.vocabulary, TILE_WORDS) * FP32
    yield Part("teacher's logits chunk", tile, frozenset({Phase.LOSS}), "beside the student's")


def _sharding(shape: ModelShape, setup: Setup) -> Iterator[Part]:
    """What ZeRO needs on top of the shards."""
    sharding, gpus = setup.sharding, setup.machine.gpus
    if sharding.stage is None:
        return
    weight = setup.numbers.weight
    if sharding.stage == 3:
        gathered = min(shape.parameters, max(sharding.live_parameters, shape.head))
        yield Part("gathered weights", gathered * weight, PASSES, "stage3_max_live_parameters, of all GPUs together")
    sums_are_the_piece = setup.sums_apart and sharding.stage < 3  # stage 3 copies them once more, into one flat tensor
    if setup.bf16 and not sharding.offload_optimizer and not sums_are_the_piece:
        piece = _share(shape.trainable, gpus if sharding.stage >= 1 else 1)
        piece = min(piece, sharding.sub_group) if sharding.stage == 3 else piece
        yield Part("gradients in fp32", piece * FP32, frozenset({Phase.STEP}), "of the piece that the optimizer works on")


def _host(shape: ModelShape, setup: Setup) -> int:
    """An optimizer in host memory keeps the gradients that it works on, in fp32, beside those that are summed up for it
    (`initialize_optimizer_states` in deepspeed/runtime/zero/stage3.py and stage_1_and_2.py).
    """
    weights, gradients, moments = _bytes_of_states(shape, setup)
    summed_up = 0 if _summed_up_on_gpu(setup) else gradients
    moved = summed_up + FP32 * shape.trainable + moments if setup.sharding.offload_optimizer else 0
    return moved + (weights if setup.sharding.offload_parameters else 0)


def _share(size: int, gpus: int) -> int:
    return -(-size // gpus)


def _over(what: str, gpus: int) -> str:
    return what if gpus == 1 else f"{what}, over {gpus} GPUs"
