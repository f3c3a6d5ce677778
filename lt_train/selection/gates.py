"""Strategy `gates`: each KV head's share of the rise of the loss on long-reach tokens when every layer streams.

A gate g on each (layer, KV head) mixes its two outputs, streaming + g (full - streaming): all gates at 1 give the full model, all
at 0 the model whose every layer streams. Integrated gradients (arXiv 1703.01365) along the path on which all gates have one value
divide the rise between the two among the gates; a layer's score is the sum over its heads. The integral is taken at three
Gauss-Legendre points, so a sample costs three forward and backward passes whatever the number of layers, and two forward passes
that find its long-reach tokens. Where the loss rises within a small part of the path, three points miss it, and the shares do not
add up to the rise: the path of such a sample is divided into three parts with three points each, eight further passes.

Shapes: T tokens, R long-reach tokens, D hidden size, L layers, G key/value heads, H query heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.views import AttentionView
from lt_train.inference.partial_logits import tokens_per_part
from lt_train.runtime.errors import UserError
from lt_train.selection.quadrature import FINER_POINTS, POINTS
from lt_train.selection.reach import long_reach_tokens
from lt_train.selection.token_losses import endpoint_losses, next_token_losses

ACCEPTED_GAP = 0.1
"""The largest relative difference of one sample between the sum of its shares by `POINTS` and its measured rise."""

LARGEST_GAP = 0.15
"""The largest relative difference between the sum of the shares and the measured rise, both averaged over samples."""
SMALLEST_RISE = 0.05
"""Nats per long-reach token. The gap is relative to at least this rise: where streaming costs next to nothing, it means nothing."""


@dataclass(frozen=True)
class GateShares:
    """The shares of one sample, in nats per long-reach token.

    Attributes:
        heads: `heads[layer][kv_head]`; 0 in layers that slide in the base.
        measured_rise: of the loss when every layer streams, of which the shares are parts.
        points: of the path at which gradients were taken.
    """

    heads: tuple[tuple[float, ...], ...]
    measured_rise: float
    points: int

    @property
    def layers(self) -> list[float]:
        return [math.fsum(head_G) for head_G in self.heads]


def relative_gap(sum_of_shares: float, measured_rise: float) -> float:
    """How far the sum of the shares is from the measured rise, as a fraction of it, or of `SMALLEST_RISE` if that is larger."""
    return abs(sum_of_shares - measured_rise) / max(measured_rise, SMALLEST_RISE)


def describe_sum_of_shares(sum_of_shares: float, measured_rise: float, points: Sequence[int]) -> str:
    """The two, averages over samples, and what they cost, as a line for the log.

    Args:
        points: of each sample.
    """
    gap = relative_gap(sum_of_shares, measured_rise)
    return (
        f"gates: with every layer streaming the loss on long-reach tokens rises by {measured_rise:.3g} nats; the shares add up to "
        f"{sum_of_shares:.3g}, {gap:.1%} apart" + _describe_cost(points)
    )


def _describe_cost(points: Sequence[int]) -> str:
    finer = [count for count in points if count > len(POINTS)]
    if not finer:
        return ""
    return f"; in {len(finer)} of {len(points)} samples it took gradients at {finer[0]} points instead of {len(POINTS)}"


def check_sum_of_shares(sum_of_shares: float, measured_rise: float, samples: int) -> None:
    """
    Raises:
        UserError: the gap between the two, averages over samples, is larger than `LARGEST_GAP`.
    """
    gap = relative_gap(sum_of_shares, measured_rise)
    if gap > LARGEST_GAP:
        raise UserError(
            f"hybrid.strategy: gates: over {samples} samples the shares of the KV heads add up to {sum_of_shares:.3g} nats per "
            f"long-reach token, and the loss rises by {measured_rise:.3g} when every layer streams: {gap:.0%} apart, more than "
            f"{LARGEST_GAP:.0%}, so the shares do not show what each layer loses. Fix: use reach instead of gates in "
            "hybrid.strategy and hybrid.compare; it measures each layer by itself. Or raise hybrid.calibration.samples: the gap "
            "of a mean over more samples is smaller; or set model.dtype to fp32 if it is bf16"
        )


@dataclass
class GatedView(AttentionView):
    """Mixes full and streaming attention: `gate_G` is 1 for full attention of a KV head and its queries, 0 for streaming."""

    full: AttentionView
    streaming: AttentionView
    gate_G: Tensor

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        full_BTHD = self.full.attend(module, q_BHTD, k_BGKD, v_BGKD, scaling, dropout)
        streaming_BTHD = self.streaming.attend(module, q_BHTD, k_BGKD, v_BGKD, scaling, dropout)
        gate_H1 = self.gate_G.repeat_interleave(q_BHTD.shape[1] // k_BGKD.shape[1])[:, None].to(q_BHTD.device)
        mixed_BTHD = torch.lerp(streaming_BTHD.to(gate_H1.dtype), full_BTHD.to(gate_H1.dtype), gate_H1)
        return mixed_BTHD.to(full_BTHD.dtype)


def gate_shares(
    model: HybridForCausalLM, prompt_ids: Sequence[int], answer_ids: Sequence[int], long_reach_fraction: float
) -> GateShares:
    """The shares of one sample, question and answer as one input.

    `model` is a hybrid in evaluation mode whose weights require no gradients (with gradients the result is the same, the memory is
    not); of its spec only `w_sink` and `w_recent` matter, not its lazy layers. L x T x D hidden values stay on the model's device.
    """
    losses = endpoint_losses(model, prompt_ids, answer_ids)
    token_R = long_reach_tokens(losses, long_reach_fraction)
    input_ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
    rise, gradient_LG = losses.rise_of_all(token_R), dict[float, Tensor]()

    def integrated(points: Sequence[tuple[float, float]]) -> Tensor:
        share_LG = torch.zeros(len(model.model.layers), model.config.num_key_value_heads, dtype=torch.float64)
        for value, weight in points:
            if value not in gradient_LG:
                gate_LG = torch.full_like(share_LG, value, dtype=torch.promote_types(model.dtype, torch.float32))
                gradient_LG[value] = gate_gradients(model, input_ids_1T, len(prompt_ids) + token_R, gate_LG).double()
            share_LG -= weight * gradient_LG[value]
        return share_LG

    share_LG = integrated(POINTS)
    if relative_gap(share_LG.sum().item(), rise) > ACCEPTED_GAP:
        share_LG = integrated(FINER_POINTS)
    return GateShares(tuple(map(tuple, share_LG.tolist())), rise, len(gradient_LG))


def gate_gradients(model: HybridForCausalLM, input_ids_1T: Tensor, position_R: Tensor, gate_LG: Tensor) -> Tensor:
    """Gradient `[L, G]` of the mean loss of the tokens at `position_R` with respect to the gates, by autograd."""
    with torch.enable_grad():
        gate_LG = gate_LG.detach().requires_grad_()
        predicting_RD = gated_hidden_states(model, input_ids_1T, gate_LG)[0, position_R - 1]
        d_predicting_RD = _loss_gradients(model, predicting_RD.detach(), input_ids_1T[0, position_R])
        return torch.autograd.grad(predicting_RD, gate_LG, d_predicting_RD)[0]


def gated_hidden_states(model: HybridForCausalLM, input_ids_1T: Tensor, gate_LG: Tensor) -> Tensor:
    """Hidden states `[1, T, D]` after the last layer. Each layer is checkpointed: the backward pass holds the graph of one."""
    views = model.model.attention_views(input_ids=input_ids_1T)
    hidden_1TD = model.model.embed_tokens(input_ids_1T)
    embeddings_L = model.model.position_embeddings(hidden_1TD, views.position_ids)
    for index, (layer, embeddings) in enumerate(zip(model.model.layers, embeddings_L, strict=True)):
        view = GatedView(views.full, views.streaming, gate_LG[index]) if index in model.spec.full_in_base else views.sliding
        given = {"attention_mask": view, "position_ids": views.position_ids, "position_embeddings": embeddings}
        hidden_1TD = checkpoint(layer, hidden_1TD, **given, use_reentrant=False, preserve_rng_state=False)
    return hidden_1TD


def _loss_gradients(model: HybridForCausalLM, hidden_RD: Tensor, target_R: Tensor) -> Tensor:
    """Gradient `[R, D]` of the mean loss with respect to hidden states after the last layer, for a part of the logits at a time."""
    found = []
    size = tokens_per_part(model)
    for hidden, target in zip(hidden_RD.split(size), target_R.split(size), strict=True):
        hidden.requires_grad_()
        found += torch.autograd.grad(next_token_losses(model, hidden, target).sum(), hidden)
    return torch.cat(found) / len(target_R)
