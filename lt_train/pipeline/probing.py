"""A probe: the evaluations of `train.probes` on one checkpoint of a running training, in a process of its own.

training/probes/ starts it and reads what it leaves. Under DeepSpeed ZeRO-3 a model cannot generate inside the training.
"""

from pathlib import Path

from lt_train.evaluation.plan import EvaluationPlan, make_plan
from lt_train.evaluation.records import RecordFolder
from lt_train.evaluation.run import evaluate
from lt_train.evaluation.scores import AnswerScores
from lt_train.hybrid.context_length import context_length
from lt_train.inference.backends import engine_for
from lt_train.inference.loading import load_base_config
from lt_train.inference.text import stop_tokens
from lt_train.inference.tokenizer import load_checked_tokenizer
from lt_train.pipeline.variants import Variants
from lt_train.recipe.evaluations import TRAINED
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import RunPaths
from lt_train.training.probes.launching import WEIGHTS
from lt_train.training.probes.results import ProbeResult, ProbeSample, ProbeScore, probe_folder, write_result

SAMPLES_SHOWN = 8
"""Of each probe, in the tables."""

CHARACTERS_SHOWN = 2000
"""Of an answer, from its end."""


def probe_checkpoint(run: Path, step: int) -> None:
    """Evaluate the weights in train/probes/step-<step>/weights; answers that are there already are not generated again.

    Raises:
        UserError: no such probe, or one of its evaluations cannot be done.
    """
    paths = RunPaths(run)
    recipe, train = load_recipe(paths.recipe), paths.train
    place = probe_folder(train, step)
    if recipe.train is None or recipe.train.probes is None or not (place / WEIGHTS).is_dir():
        raise UserError(
            f"{place}: holds no weights to probe. A training with train.probes leaves them there and starts this itself"
        )
    base_config = load_base_config(recipe.model)
    tokenizer = load_checked_tokenizer(recipe.model, base_config, recipe.prompt)
    variants = Variants(recipe, paths, base_config)
    model = variants.load_from(place / WEIGHTS, compute_dtype(recipe.model.dtype))
    fingerprint, stop_ids = variants.fingerprint_of(place / WEIGHTS), stop_tokens(model, tokenizer)
    scores, samples = [], []
    for eval_config in recipe.train.probes.evals:
        context = context_length(base_config.to_dict())
        plan = make_plan(eval_config, recipe.prompt, tokenizer, context=context, seed=recipe.seed)
        name = str(eval_config.name)
        plan, out = plan.for_model(fingerprint, stop_ids), place / "evals" / name
        engine = engine_for(eval_config, model, tokenizer, variants.draft(TRAINED, eval_config))
        found = evaluate(plan, engine, out, progress=False)
        assert found is not None, "a process that is alone gets the scores"
        scores.append(_score(name, found))
        samples += _shown(name, plan, out)
    write_result(train, ProbeResult(step, tuple(scores), tuple(samples)))


def _score(name: str, found: AnswerScores) -> ProbeScore:
    return ProbeScore(name, found.accuracy, found.standard_error, found.problems, found.truncated)


def _shown(name: str, plan: EvaluationPlan, out: Path) -> list[ProbeSample]:
    records = RecordFolder(out, plan.fingerprint).read()
    requested = [(request.problem, request.sample) for request in plan.requests[:SAMPLES_SHOWN]]
    shown = [records[key] for key in requested if key in records]  # with allow_partial some may be missing
    return [ProbeSample(name, each.problem, each.text[-CHARACTERS_SHOWN:], each.extracted, each.score) for each in shown]
