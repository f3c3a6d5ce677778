"""The plan of a recipe: `plan_recipe` computes it from the base's config. Only that config is downloaded, nothing is written."""

from dataclasses import dataclass
from pathlib import Path

from lt_train.hybrid.loading import is_declared
from lt_train.inference.loading import describe_proof, load_base_config
from lt_train.planning.compute import Compute, training_compute
from lt_train.planning.evaluation import KVCache, kv_cache
from lt_train.planning.memory import Memory, training_memory
from lt_train.planning.options import ShardingOption, sharding_options, suggestions
from lt_train.planning.profiling import ProfileMemory, profile_hours, profile_memory, profile_suggestions
from lt_train.planning.setup import Machine, Setup, setup_of
from lt_train.planning.shape import ModelShape, model_shape
from lt_train.planning.workload import Workload, training_samples, training_work
from lt_train.recipe.batch_size import accumulation_steps
from lt_train.recipe.schema import Recipe, Train
from lt_train.runtime.errors import UserError
from lt_train.training.sequence_parallel import check_heads


@dataclass(frozen=True)
class TrainingPlan:
    """
    Attributes:
        options: other shardings; none where the batch cannot be divided.
        undivided: why the batch cannot be divided among the processes; None where it can.
        suggestions: changes that make the training fit, where it does not.
        work, compute: None where the number of samples is unknown.
    """

    setup: Setup
    memory: Memory
    options: list[ShardingOption]
    undivided: str | None
    accumulation: int | None
    suggestions: list[str]
    work: Workload | None
    compute: Compute | None

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.setup.machine.usable


@dataclass(frozen=True)
class RecipePlan:
    recipe: Recipe
    machine: Machine
    shape: ModelShape
    training: TrainingPlan | None
    """None for a recipe without training."""
    profile: ProfileMemory | None
    """None where no strategy scores the layers."""
    profile_hours: tuple[float, float]
    """Least and most, of scoring the layers on GPUs."""
    profile_suggestions: list[str]
    cache: KVCache | None
    proof: str | None
    """What was proved of a base whose family is not declared; None for one that is."""

    @property
    def profile_fits(self) -> bool:
        return self.profile is None or self.profile.peak <= self.machine.usable

    @property
    def works(self) -> bool:
        """Whether scoring the layers fits, the training fits, and its batch can be divided."""
        return self.profile_fits and (self.training is None or (self.training.fits and self.training.undivided is None))


def plan_recipe(
    recipe: Recipe, machine: Machine, samples: int | None = None, mean_tokens: int | None = None, runs: Path = Path("runs")
) -> RecipePlan:
    """
    Args:
        samples, mean_tokens: of the data, where they are not local (see `training_samples`).
        runs: the folder of run folders.

    Raises:
        UserError: no config of the base, a base that cannot become a hybrid, or settings that do not fit it.
    """
    base_config = load_base_config(recipe.model)
    shape = model_shape(recipe, base_config)
    if recipe.data.max_length > shape.context:
        raise UserError(
            f"data.max_length: {recipe.data.max_length}: more than the model's context of {shape.context} tokens. "
            f"Fix: set it to at most {shape.context}"
        )
    training = None
    if recipe.train is not None:
        check_heads(recipe.train.sequence_parallel, shape.heads, shape.key_heads)
        found = training_samples(recipe, base_config, samples, mean_tokens, runs)
        work = None if found is None else training_work(recipe, recipe.train, found)
        training = _training(recipe, recipe.train, machine, shape, work)
    return RecipePlan(
        recipe,
        machine,
        shape,
        training,
        profile=profile_memory(recipe, shape, machine),
        profile_hours=profile_hours(recipe, shape, machine),
        profile_suggestions=list(profile_suggestions(recipe, shape, machine)),
        cache=kv_cache(recipe, base_config, shape, machine),
        proof=None if is_declared(base_config) else describe_proof(base_config),
    )


def _training(recipe: Recipe, train: Train, machine: Machine, shape: ModelShape, work: Workload | None) -> TrainingPlan:
    undivided, accumulation = None, None
    try:
        accumulation = accumulation_steps(train, recipe.data, machine.gpus)
    except UserError as error:
        undivided = str(error)
    setup = setup_of(recipe, train, machine, len(shape.spec.streaming_layers))
    memory = training_memory(shape, setup)
    return TrainingPlan(
        setup=setup,
        memory=memory,
        options=[] if undivided else sharding_options(recipe, train, shape, setup),
        undivided=undivided,
        accumulation=accumulation,
        suggestions=[] if memory.peak <= machine.usable else list(suggestions(recipe, train, shape, setup)),
        work=work,
        compute=None if work is None else training_compute(shape, train, work),
    )
