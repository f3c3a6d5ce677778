"""The evaluations of a run: every variant under every evaluation of the recipe.

Prompts are made once, before anything is trained; the models then answer them one after the other.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lt_train.dataset.examples import Example
from lt_train.evaluation.base_answers import BaseAnswers, base_answers
from lt_train.evaluation.heldout import evaluate_heldout_kl, evaluate_heldout_loss
from lt_train.evaluation.plan import EvaluationPlan, make_plan
from lt_train.evaluation.run import evaluate
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.backends import engine_for, servers_for
from lt_train.inference.engine import Engine
from lt_train.inference.per_prompt_store import check_read_at_once
from lt_train.inference.requests import Backend
from lt_train.inference.text import stop_tokens
from lt_train.pipeline.variants import Variants
from lt_train.recipe.evaluations import BASE
from lt_train.recipe.schema import Eval, HeldoutKL, HeldoutLoss, Recipe
from lt_train.runtime.fingerprints import hash_of
from lt_train.runtime.run_paths import SCORES, RunPaths
from lt_train.runtime.sources import resolve_model
from lt_train.runtime.units import format_duration


@dataclass
class Evaluations:
    """The plans of all evaluations, and their measurement for each variant.

    Attributes:
        heldout: reads the held-out samples when they are first needed.
        rank: this process's number among the `world_size` that share the samples; the first one scores, and reports.
        report: takes lines for the user.
    """

    recipe: Recipe
    paths: RunPaths
    variants: Variants
    base_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    heldout: Callable[[], Sequence[Example]]
    dtype: torch.dtype
    rank: int
    world_size: int
    report: Callable[[str], None]
    _plans: dict[str, EvaluationPlan] = field(default_factory=dict)
    _base_answers: dict[int | None, BaseAnswers] = field(default_factory=dict)  # by `limit` of a heldout_kl

    def check(self) -> None:
        """
        Raises:
            UserError: a benchmark that cannot be read, or whose prompts do not fit this model or, where they choose its layers,
                one forward pass.
        """
        for eval_config in self.recipe.eval:
            if isinstance(eval_config, Eval):
                plan = self.plan(eval_config)
                if any(self.variants.per_prompt(variant) for variant in self.variants.of(eval_config)):
                    check_read_at_once(max(plan.requests, key=lambda request: len(request.prompt_ids)), eval_config.prefill_chunk)

    def measure_all(self) -> None:
        variants = self.variants.to_evaluate()
        pending = [variant for variant in variants if not self.variants.is_measured(variant)]
        started = time.monotonic()
        try:
            for number, variant in enumerate(variants, start=1):
                if self.rank == 0:
                    named = ", ".join(str(eval_config.name) for eval_config in self._asking_for(variant))
                    left = _time_left(time.monotonic() - started, pending, variant)
                    self.report("; ".join(filter(None, [f"{number} of {len(variants)}: {variant}: {named}", left])))
                self.measure(variant)
        finally:
            while self._base_answers:
                self._base_answers.popitem()[1].close()

    def measure(self, variant: str) -> None:
        """All evaluations of this variant; results are in eval/<variant>/<evaluation>/."""
        eval_configs = self._asking_for(variant)
        outs = {eval_config.name: self.paths.evaluation(variant, str(eval_config.name)) for eval_config in eval_configs}
        for eval_config in eval_configs:
            if isinstance(eval_config, HeldoutKL) and self.rank == 0 and not (outs[eval_config.name] / SCORES).exists():
                self.base_answers(eval_config)  # before this variant takes the memory
        model = self.variants.load(variant, self.dtype)
        for eval_config in eval_configs:
            if isinstance(eval_config, Eval):
                self.measure_answers(eval_config, variant, model, outs[eval_config.name])
            elif self.rank == 0:
                self.measure_heldout(eval_config, variant, model, outs[eval_config.name])

    def _asking_for(self, variant: str) -> list[Eval | HeldoutLoss | HeldoutKL]:
        return [eval_config for eval_config in self.recipe.eval if variant in self.variants.of(eval_config)]

    def measure_heldout(self, eval_config: HeldoutLoss | HeldoutKL, variant: str, model: HybridForCausalLM, out: Path) -> None:
        identity = self.variants.fingerprint(variant)
        if isinstance(eval_config, HeldoutLoss):
            evaluate_heldout_loss(model, self.heldout(), eval_config, out, model_fingerprint=identity)
            return
        base, of_base = partial(self.base_answers, eval_config), self.variants.fingerprint(BASE)
        evaluate_heldout_kl(model, base, self.heldout(), eval_config, out, model_fingerprint=identity, base_fingerprint=of_base)

    def base_answers(self, eval_config: HeldoutKL) -> BaseAnswers:
        """The base's hidden states on the held-out samples; computed once for all variants."""
        if eval_config.limit not in self._base_answers:
            base = self.variants.load(BASE, self.dtype)
            chosen = self.heldout()[: eval_config.limit]
            self._base_answers[eval_config.limit] = base_answers(base, chosen, eval_config.batch_size, self.paths.root)
        return self._base_answers[eval_config.limit]

    def measure_answers(self, eval_config: Eval, variant: str, model: HybridForCausalLM, out: Path) -> EvaluationPlan:
        """Generate and score the samples of an evaluation; returns its plan."""
        stop_ids = stop_tokens(model, self.tokenizer)
        plan = self.plan(eval_config).for_model(self.variants.fingerprint(variant), stop_ids)
        backend = self._backend(plan, variant, model, stop_ids, out)
        evaluate(plan, backend, out, rank=self.rank, world_size=self.world_size)
        if self.rank == 0 and isinstance(backend, Engine) and backend.acceptance.compared:
            self.report(f"{variant}: {eval_config.name}: {backend.acceptance}")
        return plan

    def plan(self, eval_config: Eval) -> EvaluationPlan:
        """The samples of an evaluation, for any model; made once."""
        key = hash_of(eval_config)
        if key not in self._plans:
            context = context_length(self.base_config.to_dict())
            self._plans[key] = make_plan(eval_config, self.recipe.prompt, self.tokenizer, context=context, seed=self.recipe.seed)
        return self._plans[key]

    def _backend(
        self, plan: EvaluationPlan, variant: str, model: HybridForCausalLM, stop_ids: tuple[int, ...], out: Path
    ) -> Backend:
        eval_config = plan.eval_config
        if eval_config.backend == "hybrid":
            draft, per_prompt = self.variants.draft(variant, eval_config), self.variants.per_prompt(variant)
            return engine_for(eval_config, model, self.tokenizer, draft, per_prompt)
        served = Path(resolve_model(self.recipe.model.base)) if variant == BASE else self.paths.export
        prompt, questions = plan.prompt, plan.questions
        return servers_for(eval_config, model, served, self.tokenizer, prompt, questions, stop_ids, out, self.report)


def _time_left(seconds: float, pending: Sequence[str], variant: str) -> str:
    """Time of `variant` and those after it, where the `pending` ones before it took `seconds`; "" where none is measured yet."""
    measured = pending.index(variant) if variant in pending else 0
    return f"about {format_duration(seconds / measured * (len(pending) - measured))} left" if measured else ""
