"""Write what a training with `train.distill.teacher: top_k` learns from: the base's likeliest next tokens on the training data."""

from lt_train.dataset.examples import examples_fingerprint
from lt_train.inference.loading import load_for_inference
from lt_train.pipeline.context import RunContext
from lt_train.recipe.evaluations import BASE
from lt_train.runtime.devices import release_memory

NAME = "teacher"
NEEDS: tuple[str, ...] = ()


def is_wanted(context: RunContext) -> bool:
    train = context.recipe.train
    return train is not None and train.distill.weight > 0 and train.distill.teacher == "top_k"


def is_done(context: RunContext) -> bool:
    return context.folder.is_done(NAME) or context.folder.is_done("train")  # nothing learns from it any more


def describe(context: RunContext) -> str:
    return "teacher (the base's likeliest next tokens on the training data)"


def check(context: RunContext) -> None:
    pass


def run(context: RunContext) -> None:
    from lt_train.training.distillation.top_k import write_top_k  # both load TRL
    from lt_train.training.settings import teacher_fingerprint

    train, examples = context.recipe.train, context.examples.train
    assert train is not None, "only a recipe that trains has a teacher"
    context.report(NAME, f"the {train.distill.top_k} likeliest next tokens of the base on {len(examples):,} samples")
    with context.folder.doing(NAME):
        write_top_k(
            load_for_inference(context.recipe.model, context.variants.spec(BASE), context.dtype, others_wait=True),
            examples,
            context.paths.teacher,
            k=train.distill.top_k,
            temperature=train.distill.temperature,
            fingerprint=teacher_fingerprint(context.recipe, examples_fingerprint(examples)),
            batch_size=train.micro_batch_size,
        )
        release_memory()
