"""What scoring the layers needs on a GPU (selection/): one process has the whole base, over all GPUs of its machine, and the others
wait.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lt_train.planning.activations import FP32
from lt_train.planning.setup import Machine, inference_number
from lt_train.planning.shape import ModelShape
from lt_train.planning.ways import shorter_lengths
from lt_train.recipe.schema import Recipe
from lt_train.selection.profile import SCORED
from lt_train.selection.token_losses import LOGITS_PER_CALL, TOKENS_PER_CALL

GPUS_OF_A_MACHINE = 8
"""As usual; of more processes the others are elsewhere, where this one cannot put layers."""


@dataclass(frozen=True)
class ProfileMemory:
    """Bytes of the GPU that holds most.

    Attributes:
        gpus: that the weights are spread over.
        length: tokens of a calibration sample, at most.
        states: hidden states of all variants of the model: full, each layer streaming alone, all streaming.
        work: one layer's forward pass, and a chunk of logits.
    """

    gpus: int
    length: int
    weights: int
    states: int
    work: int

    @property
    def peak(self) -> int:
        return self.weights + self.states + self.work


def profile_memory(recipe: Recipe, shape: ModelShape, machine: Machine) -> ProfileMemory | None:
    """None where no strategy looks at the model."""
    scored = {name for name in (recipe.hybrid.strategy, *recipe.hybrid.compare) if name in SCORED}
    if not scored:
        return None
    number, length = inference_number(recipe, machine), recipe.hybrid.calibration.max_length or recipe.data.max_length
    length = min(length, recipe.data.max_length)
    gpus = 1 if machine.cpu else min(machine.gpus, GPUS_OF_A_MACHINE)
    weights = -(-shape.base_parameters // gpus)
    if gpus > 1:  # layers are not cut
        weights += max(layer.parameters for layer in shape.layers)
    by_loss = scored != {"lazy_ratio"}
    variants = len(shape.layers) + 2 if by_loss else 1
    at_once = max(2 * length, TOKENS_PER_CALL) if by_loss else length  # two variants stream in one call
    logits = min(length * shape.vocabulary, LOGITS_PER_CALL) if by_loss else 0
    return ProfileMemory(
        gpus=gpus,
        length=length,
        weights=weights * number,
        states=variants * length * shape.hidden * number,
        # What came in, that with attention, its norm, what comes out, and what the two streaming variants came out as; in the MLP
        # silu(gate), up and their product
        work=at_once * (6 * shape.hidden + 3 * shape.mlp) * number + logits * (number + 2 * FP32),
    )


def profile_remedies(recipe: Recipe, shape: ModelShape, machine: Machine) -> Iterator[str]:
    """Ways out, where the scoring of layers does not fit."""

    def fits(recipe: Recipe, machine: Machine) -> bool:
        return profile_memory(recipe, shape, machine).peak <= machine.usable

    needed = profile_memory(recipe, shape, machine)
    if needed is None or needed.peak <= machine.usable:
        return
    length = next((length for length in shorter_lengths(needed.length) if fits(_cut_to(recipe, length), machine)), None)
    if length is not None and length > recipe.hybrid.w_sink + recipe.hybrid.w_recent + 1:  # shorter samples tell nothing
        yield f"--set hybrid.calibration.max_length={length}"
    more = [] if machine.cpu else [replace(machine, gpus=gpus) for gpus in range(needed.gpus + 1, GPUS_OF_A_MACHINE + 1)]
    enough = next((larger.gpus for larger in more if fits(recipe, larger)), None)
    if enough is not None:
        yield f"{enough} GPUs of this size in one machine"
    yield "lt-train profile with this recipe where there is more memory, in the same run folder; training then takes its scores"
    yield "layers that need no scoring: hybrid.layers, or hybrid.strategy=periodic, with hybrid.compare=[]"


def _cut_to(recipe: Recipe, length: int) -> Recipe:
    calibration = recipe.hybrid.calibration.model_copy(update={"max_length": length})
    return recipe.model_copy(update={"hybrid": recipe.hybrid.model_copy(update={"calibration": calibration})})
