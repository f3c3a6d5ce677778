"""The evaluation stage of a run: every variant under every evaluation that the recipe asks for.

What is asked is settled once, before anything is trained; the models then answer it one after the other.
"""

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
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.backends import engine_for, servers_for
from lt_train.inference.requests import Backend
from lt_train.inference.text import stop_tokens
from lt_train.pipeline.run_folder import RunFolder
from lt_train.pipeline.variants import Variants
from lt_train.recipe.schema import BASE, Eval, HeldoutKL, HeldoutLoss, Recipe
from lt_train.runtime.fingerprints import hash_of
from lt_train.runtime.sources import resolve_model


@dataclass
class EvaluationStage:
    """
    Attributes:
        heldout: reads the held-out samples, where they are asked for.
        rank: this process's number among the `ranks` that share the samples; the first one scores, and reports.
        report: takes lines for the user.
    """

    recipe: Recipe
    folder: RunFolder
    variants: Variants
    base_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    heldout: Callable[[], Sequence[Example]]
    dtype: torch.dtype
    rank: int
    ranks: int
    report: Callable[[str], None]
    _plans: dict[str, EvaluationPlan] = field(default_factory=dict)
    _base_answers: dict[int | None, BaseAnswers] = field(default_factory=dict)  # by `limit` of a heldout_kl

    def check(self) -> None:
        """
        Raises:
            UserError: a benchmark that cannot be read, or whose prompts do not fit this model.
        """
        for entry in self.recipe.eval:
            if isinstance(entry, Eval):
                self.plan(entry)

    def measure_all(self) -> None:
        try:
            for variant in self.variants.to_evaluate():
                self.measure(variant)
        finally:
            while self._base_answers:
                self._base_answers.popitem()[1].close()

    def measure(self, variant: str) -> None:
        """All evaluations that ask for this variant; results lie in eval/<variant>/<evaluation>/."""
        entries = [entry for entry in self.recipe.eval if variant in self.variants.of(entry)]
        if self.rank == 0:
            self.report(f"{variant}: {', '.join(entry.name for entry in entries)}")
        outs = {entry.name: self.folder.stage("eval") / variant / entry.name for entry in entries}
        for entry in entries:
            if isinstance(entry, HeldoutKL) and self.rank == 0 and not (outs[entry.name] / "scores.json").exists():
                self.base_answers(entry)  # before this variant takes the memory
        model = self.variants.load(variant, self.dtype)
        for entry in entries:
            if isinstance(entry, Eval):
                self.ask(entry, variant, model, outs[entry.name])
            elif self.rank == 0:
                self.measure_heldout(entry, variant, model, outs[entry.name])

    def measure_heldout(self, entry: HeldoutLoss | HeldoutKL, variant: str, model: HybridForCausalLM, out: Path) -> None:
        identity = self.variants.fingerprint(variant)
        if isinstance(entry, HeldoutLoss):
            evaluate_heldout_loss(model, self.heldout(), entry, out, model_fingerprint=identity)
            return
        base, of_base = partial(self.base_answers, entry), self.variants.fingerprint(BASE)
        evaluate_heldout_kl(model, base, self.heldout(), entry, out, model_fingerprint=identity, base_fingerprint=of_base)

    def base_answers(self, entry: HeldoutKL) -> BaseAnswers:
        """What the base says on the held-out samples; asked once for all variants."""
        if entry.limit not in self._base_answers:
            base = self.variants.load(BASE, self.dtype)
            chosen = self.heldout()[: entry.limit]
            self._base_answers[entry.limit] = base_answers(base, chosen, entry.batch_size, self.folder.path)
        return self._base_answers[entry.limit]

    def ask(self, entry: Eval, variant: str, model: HybridForCausalLM, out: Path) -> EvaluationPlan:
        """Draw and score an entry's samples; returns what they are."""
        stop_ids = stop_tokens(model, self.tokenizer)
        plan = self.plan(entry).for_model(self.variants.fingerprint(variant), stop_ids)
        evaluate(plan, self._backend(plan, variant, model, stop_ids, out), out, rank=self.rank, world_size=self.ranks)
        return plan

    def plan(self, entry: Eval) -> EvaluationPlan:
        """What an entry asks, whoever answers; made once."""
        key = hash_of(entry)
        if key not in self._plans:
            context = self.base_config.max_position_embeddings
            self._plans[key] = make_plan(entry, self.recipe.prompt, self.tokenizer, context=context, seed=self.recipe.seed)
        return self._plans[key]

    def _backend(
        self, plan: EvaluationPlan, variant: str, model: HybridForCausalLM, stop_ids: tuple[int, ...], out: Path
    ) -> Backend:
        entry = plan.eval_config
        if entry.backend == "hybrid":
            return engine_for(entry, model, self.tokenizer)
        served = Path(resolve_model(self.recipe.model.base)) if variant == BASE else self.folder.stage("export")
        return servers_for(entry, model, served, self.tokenizer, plan.prompt, plan.questions, stop_ids, out, self.report)
