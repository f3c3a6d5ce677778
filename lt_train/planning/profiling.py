"""Memory of scoring the layers (selection/): one process loads the base over all GPUs of its machine, the other processes wait."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lt_train.planning.activations import FP32
from lt_train.planning.options import shorter_lengths
from lt_train.planning.setup import Machine, inference_itemsize
from lt_train.planning.shape import ModelShape
from lt_train.recipe.schema import Recipe
from lt_train.selection.profile import SCORED
from lt_train.selection.token_losses import LOGITS_PER_CALL, TOKENS_PER_CALL

GPUS_OF_A_MACHINE = 8
"""The usual number; GPUs of other machines cannot hold layers of this process."""


@dataclass(frozen=True)
class ProfileMemory:
    """Bytes of the GPU that holds the most.

    Attributes:
        gpus: over which the weights are distributed.
        length: most tokens of a calibration sample.
        states: hidden states of all variants of the model: full, one streaming layer each, all streaming.
        workspace: one layer's forward pass, and a chunk of logits.
    """

    gpus: int
    length: int
    weights: int
    states: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.states + self.workspace


def profile_memory(recipe: Recipe, shape: ModelShape, machine: Machine) -> ProfileMemory | None:
    """The memory, or None where no strategy scores the layers."""
    scored = {name for name in (recipe.hybrid.strategy, *recipe.hybrid.compare) if name in SCORED}
    if not scored:
        return None
    itemsize, length = inference_itemsize(recipe, machine), recipe.hybrid.calibration.max_length or recipe.data.max_length
    length = min(length, recipe.data.max_length)
    gpus = 1 if machine.cpu else min(machine.gpus, GPUS_OF_A_MACHINE)
    weights = -(-shape.base_parameters // gpus)
    if gpus > 1:  # a layer lies on one GPU
        weights += max(layer.parameters for layer in shape.layers)
    by_loss = scored != {"lazy_ratio"}
    variants = len(shape.layers) + 2 if by_loss else 1
    at_once = max(2 * length, TOKENS_PER_CALL) if by_loss else length  # two variants stream in one call
    logits = min(length * shape.vocab_size, LOGITS_PER_CALL) if by_loss else 0
    return ProfileMemory(
        gpus=gpus,
        length=length,
        weights=weights * itemsize,
        states=variants * length * shape.hidden * itemsize,
        # The input, its sum with attention, the norm of that, the output, and the outputs of the two streaming variants; in the
        # MLP silu(gate), up and their product
        workspace=at_once * (6 * shape.hidden + 3 * shape.mlp) * itemsize + logits * (itemsize + 2 * FP32),
    )


def profile_suggestions(recipe: Recipe, shape: ModelShape, machine: Machine) -> Iterator[str]:
    """Changes that make the scoring of the layers fit, where it does not."""

    def fits(recipe: Recipe, machine: Machine) -> bool:
        needed = profile_memory(recipe, shape, machine)
        return needed is None or needed.peak <= machine.usable

    needed = profile_memory(recipe, shape, machine)
    if needed is None or needed.peak <= machine.usable:
        return
    length = next((length for length in shorter_lengths(needed.length) if fits(_shortened(recipe, length), machine)), None)
    if length is not None and length > recipe.hybrid.w_sink + recipe.hybrid.w_recent + 1:  # shorter samples fit into the window
        yield f"--set hybrid.calibration.max_length={length}"
    more = [] if machine.cpu else [replace(machine, gpus=gpus) for gpus in range(needed.gpus + 1, GPUS_OF_A_MACHINE + 1)]
    enough = next((larger.gpus for larger in more if fits(recipe, larger)), None)
    if enough is not None:
        yield f"{enough} GPUs of this size in one machine"
    yield "lt-train profile with this recipe on a machine with more memory, in the same run folder: the training reuses its scores"
    yield "layers without scores: hybrid.layers, or hybrid.strategy=periodic, with hybrid.compare=[]"


def _shortened(recipe: Recipe, length: int) -> Recipe:
    calibration = recipe.hybrid.calibration.model_copy(update={"max_length": length})
    return recipe.model_copy(update={"hybrid": recipe.hybrid.model_copy(update={"calibration": calibration})})
