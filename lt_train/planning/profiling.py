"""Memory and time of scoring the layers (selection/): one process loads the base over all GPUs of its machine, the others wait."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.partial_logits import LOGITS_PER_CALL
from lt_train.planning.activations import FP32, ElementBytes, backward_workspace_bytes, layer_bytes
from lt_train.planning.compute import HOUR, MULTIPLY_ADD, TERA, causal_pairs, streaming_pairs
from lt_train.planning.options import shorter_lengths
from lt_train.planning.setup import Machine, inference_itemsize
from lt_train.planning.shape import Layer, Linear, ModelShape
from lt_train.recipe.schema import Recipe
from lt_train.selection.profile import SCORED
from lt_train.selection.quadrature import MOST_POINTS, POINTS
from lt_train.selection.token_losses import TOKENS_PER_CALL

GPUS_OF_A_MACHINE = 8
"""The usual number; GPUs of other machines cannot hold layers of this process."""

ONE_AT_A_TIME = {"reach", "nll", "kl"}
"""Strategies that let one layer stream at a time. They share their passes."""


@dataclass(frozen=True)
class ProfileMemory:
    """Bytes of the GPU that holds the most, by the strategy that needs the most.

    Attributes:
        gpus: over which the weights are distributed.
        length: most tokens of a calibration sample.
        states: hidden states: of all variants of the model (full, one streaming layer each, all streaming), or for `gates` the
            input of every layer.
        workspace: one layer's forward pass and a chunk of logits; for `gates` the larger of a layer's backward pass and the chunk.
    """

    gpus: int
    length: int
    weights: int
    states: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.states + self.workspace


@dataclass(frozen=True)
class Passes:
    """The cost of scoring one sample, in forward passes through one layer, and through the head.

    Attributes:
        linear: of the layer's linear modules; a backward pass through frozen weights counts as one.
        full, streaming, sliding: of attention; a backward pass counts as two.
        head: over all tokens.
    """

    linear: float
    full: float
    streaming: float
    sliding: float
    head: float


def passes(strategy: str, base: HybridSpec, long_reach_fraction: float, gate_points: float = len(POINTS)) -> Passes:
    """The cost of scoring one sample of a base by `strategy` alone.

    Args:
        gate_points: at which `gates` takes gradients, as a mean over samples: more where these miss the rise of a sample.
    """
    layers, scored, sliding = base.num_layers, len(base.full_in_base), len(base.sliding_layers)
    if strategy == "lazy_ratio":
        return Passes(linear=layers, full=scored, streaming=0, sliding=sliding, head=0)
    if strategy == "gates":  # the full and the all-streaming model, then at each point forward, forward again, backward
        of_points = 1 + 4 * gate_points
        head = 2 + 2 * gate_points * long_reach_fraction
        both = scored * of_points
        return Passes((2 + 3 * gate_points) * layers, both, both, sliding * (1 + of_points), head)
    full = scored * (scored + 1) / 2  # a layer runs for the full model and the variants of the layers before it
    of_sliding = sum(2 + sum(other < layer for other in base.full_in_base) for layer in base.sliding_layers)  # and for the last
    return Passes(linear=full + 2 * scored + of_sliding, full=full, streaming=2 * scored, sliding=of_sliding, head=scored + 2)


def profile_hours(recipe: Recipe, shape: ModelShape, machine: Machine) -> tuple[float, float]:
    """Least and most hours of scoring samples of the greatest length; the GPUs that hold the layers compute one after the other.

    They differ by strategy `gates`, which takes gradients of every sample at `len(POINTS)` to `MOST_POINTS` points.
    """
    lengths = [_length(recipe)] * recipe.hybrid.calibration.samples
    least, most = (profile_operations(recipe, shape, lengths, gate_points=points) for points in (len(POINTS), MOST_POINTS))
    an_hour = machine.tflops * TERA * machine.efficiency * HOUR
    return least / an_hour, most / an_hour


def profile_operations(recipe: Recipe, shape: ModelShape, lengths: Sequence[int], gate_points: float = len(POINTS)) -> float:
    """Floating-point operations of scoring samples of these lengths by all strategies of the recipe (see `passes`)."""
    layers, tokens = len(shape.layers), sum(lengths)
    full = sum(causal_pairs(length) for length in lengths)
    streaming = sum(streaming_pairs(length, shape.spec.window) for length in lengths)
    sliding = sum(streaming_pairs(length, shape.spec.sliding_window) for length in lengths)
    operations = 0.0
    for strategy in _without_shared(_scored(recipe)):
        needed = passes(strategy, shape.spec.all_full, recipe.hybrid.calibration.long_reach_fraction, gate_points)
        linear = needed.linear * shape.used_linears / layers + needed.head * shape.head
        seen = needed.full * full + needed.streaming * streaming + needed.sliding * sliding
        attention = 2 * shape.queries * seen
        operations += MULTIPLY_ADD * (linear * tokens + attention)
    return operations


def profile_memory(recipe: Recipe, shape: ModelShape, machine: Machine) -> ProfileMemory | None:
    """The memory, or None where no strategy scores the layers."""
    scored = _scored(recipe)
    if not scored:
        return None
    itemsize = inference_itemsize(recipe, machine)
    gpus = 1 if machine.cpu else min(machine.gpus, GPUS_OF_A_MACHINE)
    weights = -(-shape.base_parameters // gpus)
    if gpus > 1:  # a layer is on one GPU
        weights += max(layer.parameters for layer in shape.layers)
    needed = []
    for strategy in scored:
        states, workspace = _states_and_workspace(strategy, shape, itemsize, _length(recipe))
        needed.append(ProfileMemory(gpus, _length(recipe), weights * itemsize, states, workspace))
    return max(needed, key=lambda memory: memory.peak)


def _scored(recipe: Recipe) -> list[str]:
    return [name for name in SCORED if name in (recipe.hybrid.strategy, *recipe.hybrid.compare)]


def _without_shared(scored: list[str]) -> list[str]:
    """Of the strategies that let one layer stream at a time, one: they share their passes through the layers."""
    shared = [name for name in scored if name in ONE_AT_A_TIME]
    return [name for name in scored if name not in shared[1:]]


def _length(recipe: Recipe) -> int:
    return min(recipe.hybrid.calibration.max_length or recipe.data.max_length, recipe.data.max_length)


def _states_and_workspace(strategy: str, shape: ModelShape, itemsize: int, length: int) -> tuple[int, int]:
    state, layers = length * shape.hidden * itemsize, len(shape.layers)
    # The input, its sum with attention, the norm of that, the output; in the MLP silu(gate), up and their product
    forward = (4 * shape.hidden + 3 * shape.mlp) * itemsize
    logits = min(length * shape.vocab_size, LOGITS_PER_CALL)
    if strategy == "lazy_ratio":
        return state, length * (forward + 2 * shape.hidden * itemsize)
    if strategy == "gates":
        return layers * state, max(length * _gated_layer_bytes(shape, itemsize), logits * (itemsize + 3 * FP32))
    # Two variants stream in one call, and their outputs are held beside those of the others.
    at_once = max(2 * length, TOKENS_PER_CALL)
    of_logits = itemsize + (3 if strategy == "kl" else 2) * FP32
    return (len(shape.spec.full_in_base) + 2) * state, at_once * (forward + 2 * shape.hidden * itemsize) + logits * of_logits


def _gated_layer_bytes(shape: ModelShape, itemsize: int) -> int:
    """Bytes per token of one layer's backward pass by `gates`: weights are frozen, and full and streaming attention both run."""
    element = ElementBytes(itemsize, itemsize, itemsize, autocast=False)
    frozen = _frozen(shape.layers[0])
    saved = layer_bytes(shape, frozen, element, gathered=False, dense=False, length=0)
    second_attention = itemsize * shape.queries + FP32 * shape.heads
    mixed_in_fp32 = 2 * FP32 * shape.queries if itemsize != FP32 else 0
    kept_as_input = FP32 * shape.hidden if itemsize == FP32 else 0  # what the first norm saves is then the checkpoint itself
    return saved - kept_as_input + second_attention + mixed_in_fp32 + backward_workspace_bytes(shape, frozen, element)


def _frozen(layer: Layer) -> Layer:
    linears = {name: Linear(name, linear.weights, trained=False, used=linear.used) for name, linear in layer.linears.items()}
    return replace(layer, linears=linears, norms_trained=False)


def profile_suggestions(recipe: Recipe, shape: ModelShape, machine: Machine) -> Iterator[str]:
    """Changes that make the scoring of the layers fit, where it does not."""

    def fits(recipe: Recipe, machine: Machine) -> bool:
        needed = profile_memory(recipe, shape, machine)
        return needed is None or needed.peak <= machine.usable

    needed = profile_memory(recipe, shape, machine)
    if needed is None or needed.peak <= machine.usable:
        return
    shorter = shorter_lengths(needed.length)
    length = next((length for length in shorter if fits(shortened_calibration(recipe, length), machine)), None)
    if length is not None and length > recipe.hybrid.w_sink + recipe.hybrid.w_recent + 1:  # shorter samples fit into the window
        yield f"--set hybrid.calibration.max_length={length}"
    more = [] if machine.cpu else [replace(machine, gpus=gpus) for gpus in range(needed.gpus + 1, GPUS_OF_A_MACHINE + 1)]
    enough = next((larger.gpus for larger in more if fits(recipe, larger)), None)
    if enough is not None:
        yield f"{enough} GPUs of this size in one machine"
    yield "lt-train profile with this recipe on a machine with more memory, in the same run folder: the training reuses its scores"
    yield "layers without scores: hybrid.layers, or hybrid.strategy=periodic, with hybrid.compare=[]"


def shortened_calibration(recipe: Recipe, length: int) -> Recipe:
    """With at most `length` tokens of each calibration sample."""
    calibration = recipe.hybrid.calibration.model_copy(update={"max_length": length})
    return recipe.model_copy(update={"hybrid": recipe.hybrid.model_copy(update={"calibration": calibration})})
