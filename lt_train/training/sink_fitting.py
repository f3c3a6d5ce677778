"""The first values of learned sinks: from where the scores of the first tokens are, then fitted to the loss of answers.

Only the logits are trained, a few hundred numbers; the weights stay the base's.

Shapes: B = 1, H query heads, G key/value heads, R = H / G, T tokens, F first tokens, A answer tokens, D head or hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lt_train.dataset.examples import Example
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.views import FullView
from lt_train.inference.observed_layers import run_observed
from lt_train.inference.partial_logits import tokens_per_part
from lt_train.inference.sinks_file import learned_sinks
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress

FIRST_TOKENS = 4
"""Tokens at the start of a sequence whose scores a sink takes over: the paper's number of sink tokens."""

SAMPLES_OF_START = 8
"""Samples over which the scores of the first tokens are averaged."""


@dataclass(frozen=True)
class Fitted:
    """Mean loss of the answers in the first and in the last quarter of the steps, in nats a token; None without steps."""

    logits: int
    first: float | None
    last: float | None


def fit_sinks(
    model: HybridForCausalLM, examples: Sequence[Example], *, steps: int, learning_rate: float, progress: bool = True
) -> Fitted:
    """Give every learned sink of `model` a value, in place.

    Args:
        examples: calibration samples longer than the window. One a step, in their order, again from the first after the last.
        learning_rate: of Adam.

    Raises:
        UserError: a loss is not finite.
    """
    model.eval()
    start_from_first_tokens(model, examples[:SAMPLES_OF_START])
    losses: list[float] = []
    with _logits_alone_trained(model) as logits, show_progress("fitting sinks", done=0, total=steps, shown=progress) as bar:
        optimizer = torch.optim.Adam(logits, lr=learning_rate)
        for step in range(steps):
            example = examples[step % len(examples)]
            loss = answer_loss(model, example.prompt_ids, example.answer_ids)
            if not torch.isfinite(loss):
                raise UserError(
                    f"hybrid.sink: learned: the loss of sample {example.id} is {loss.item()} in {model.dtype}. Fix: lower "
                    "hybrid.calibration.sink_learning_rate; if that does not help, set model.dtype to fp32"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.advance()
    quarter = math.ceil(steps / 4)
    first, last = (sum(part) / quarter if part else None for part in (losses[:quarter], losses[steps - quarter :]))
    return Fitted(sum(x.numel() for x in logits), first, last)


@torch.no_grad()
def start_from_first_tokens(model: HybridForCausalLM, examples: Sequence[Example]) -> None:
    """Set each sink to the mean log-sum-exp of the first tokens' scores, over the queries from whose window they have gone."""

    def view_of(index: int, full: FullView) -> FullView:
        streams = model.spec.is_lazy(index)
        return FirstTokensView(full.documents, full.kernel, w_recent=model.spec.w_recent) if streams else full

    views_of_samples = [run_observed(model, example.input_ids, view_of) for example in examples]
    for layer in model.spec.lazy_layers:
        mean_BH = torch.stack([views[layer].mean_H for views in views_of_samples])
        model.model.layers[layer].self_attn.sinks.weight.copy_(mean_BH.mean(0))


@dataclass
class FirstTokensView(FullView):
    """Full attention that also computes the log-sum-exp of the scores of the first tokens."""

    w_recent: int = field(kw_only=True)
    mean_H: Tensor | None = None

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        q_GRTD = q_BHTD[0, :, self.w_recent + FIRST_TOKENS - 1 :].unflatten(0, (k_BGKD.shape[1], -1)).float()
        scores_GRTF = scaling * q_GRTD @ k_BGKD[0, :, None, :FIRST_TOKENS].float().transpose(-1, -2)
        self.mean_H = scores_GRTF.logsumexp(-1).mean(-1).flatten()
        return super().attend(module, q_BHTD, k_BGKD, v_BGKD, scaling, dropout)


def answer_loss(model: HybridForCausalLM, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
    """Mean loss of the answer's tokens, in nats, with gradients; the logits are never in memory together."""
    ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
    hidden_AD = model.model(ids_1T, use_cache=False).last_hidden_state[0, len(prompt_ids) - 1 : -1]
    targets_A = ids_1T[0, len(prompt_ids) :].to(hidden_AD.device)
    size = tokens_per_part(model)
    total = hidden_AD.new_zeros((), dtype=torch.float32)
    for hidden, targets in zip(hidden_AD.split(size), targets_A.split(size), strict=True):
        total = total + checkpoint(_summed_loss, model.lm_head, hidden, targets, use_reentrant=False)
    return total / len(answer_ids)


def _summed_loss(lm_head: nn.Module, hidden_AD: Tensor, targets_A: Tensor) -> Tensor:
    return cross_entropy(lm_head(hidden_AD).float(), targets_A, reduction="sum")


@contextmanager
def _logits_alone_trained(model: HybridForCausalLM) -> Iterator[list[nn.Parameter]]:
    """The logits in fp32, which Adam's steps need, and activations computed again in the backward pass."""
    sinks = learned_sinks(model)
    model.requires_grad_(False)
    for logits_H in sinks.values():
        logits_H.data = logits_H.data.float()
        logits_H.requires_grad_(True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()  # without it transformers computes nothing again
    try:
        yield list(sinks.values())
    finally:
        model.activation_checkpointing_disable()
        model.eval().requires_grad_(False)
