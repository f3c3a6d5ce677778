"""The loss of every answer token when all layers are full, when one of them streams, and when all of them stream.

`nll`, `reach` and `kl` are computed from these variants. Running each separately would cost L forward passes. Below
the layer that streams, a variant equals the full model, so these hidden states are computed once: a single pass through
the layers computes the full model and every variant that already differs from it, about L/2 forward passes in all.

Shape legend: V variants of the model, T tokens of one sample, A answer tokens, D hidden size, L layers,
W vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.partial_logits import tokens_per_part

# Variants run through a layer together up to this many tokens: enough to use a device fully with short samples, while a
# long sample runs one variant at a time, with the activations of one forward pass.
TOKENS_PER_CALL = 4096

ALL_TOKENS = slice(None)


@dataclass(frozen=True)
class EndpointLosses:
    """Negative log-likelihood, in nats, of each answer token of one sample when no layer streams, and when all do; on the CPU."""

    full_A: Tensor
    all_streaming_A: Tensor

    def rise_of_all(self, tokens: Tensor | slice = ALL_TOKENS) -> float:
        """Rise of the mean loss over these answer tokens when every layer streams."""
        return (self.all_streaming_A - self.full_A)[tokens].double().mean().item()


@dataclass(frozen=True)
class TokenLosses(EndpointLosses):
    """The same losses, and those when one layer streams."""

    one_streaming_LA: Tensor
    """Row i: the i-th of the layers that can stream does, all others are as in the base."""

    def rise(self, tokens: Tensor | slice = ALL_TOKENS) -> tuple[list[float], float]:
        """Rise of the mean loss over these answer tokens, in nats: for each layer streaming alone, and for all streaming."""
        rise_L = (self.one_streaming_LA - self.full_A)[:, tokens].double().mean(dim=1)
        return rise_L.tolist(), self.rise_of_all(tokens)


@dataclass(frozen=True)
class TokenDivergences:
    """KL(full || variant), in nats, over the vocabulary at each answer token of one sample; on the CPU."""

    all_streaming_A: Tensor
    one_streaming_LA: Tensor


class Variants:
    """One sample, question and answer as one input, run through every variant; (L + 2) x T x D values stay on the model's device.

    `model` is a hybrid in evaluation mode; of its spec only `w_sink` and `w_recent` matter, not its lazy layers.
    """

    @torch.no_grad()
    def __init__(self, model: HybridForCausalLM, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        self.model = model
        input_ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
        first = len(prompt_ids)
        self.target_A = input_ids_1T[0, first:]
        # The hidden state at position t - 1 predicts the token at position t.
        self.predicting_VAD = _variants_after_last_layer(model, input_ids_1T)[:, first - 1 : -1]

    @torch.no_grad()
    def losses(self) -> TokenLosses:
        loss_VA = _losses(self.model, self.predicting_VAD, self.target_A)
        return TokenLosses(full_A=loss_VA[0], one_streaming_LA=loss_VA[1:-1], all_streaming_A=loss_VA[-1])

    @torch.no_grad()
    def divergences(self) -> TokenDivergences:
        """KL = sum p log p - sum p z + logsumexp z, of the full model's p and a variant's logits z: few passes over logits."""
        found = []
        for hidden_VAD in self.predicting_VAD.split(tokens_per_part(self.model), dim=1):
            full_AW = _logits(self.model, hidden_VAD[0]).log_softmax(dim=-1)
            p_AW = full_AW.exp()
            negentropy_A = torch.linalg.vecdot(p_AW, full_AW)
            del full_AW
            parts = [negentropy_A + _cross_entropies(p_AW, _logits(self.model, hidden_AD)) for hidden_AD in hidden_VAD[1:]]
            found.append(torch.stack(parts).cpu())
        divergence_VA = torch.cat(found, dim=1)
        return TokenDivergences(one_streaming_LA=divergence_VA[:-1], all_streaming_A=divergence_VA[-1])


@torch.no_grad()
def endpoint_losses(model: HybridForCausalLM, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> EndpointLosses:
    """The losses of one sample without the variants in which one layer streams: two forward passes."""
    input_ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
    embedded_1TD = model.model.embed_tokens(input_ids_1T)
    full_1TD = streaming_1TD = embedded_1TD
    for index in range(len(model.model.layers)):
        full_1TD = _run_layer(model, index, input_ids_1T, full_1TD, streaming=False)
        streaming_1TD = _run_layer(model, index, input_ids_1T, streaming_1TD, streaming=True)
    predicting_2AD = torch.cat([full_1TD, streaming_1TD])[:, len(prompt_ids) - 1 : -1]
    full_A, all_streaming_A = _losses(model, predicting_2AD, input_ids_1T[0, len(prompt_ids) :])
    return EndpointLosses(full_A, all_streaming_A)


def _variants_after_last_layer(model: HybridForCausalLM, input_ids_1T: Tensor) -> Tensor:
    """Hidden states after the last layer, `[L + 2, T, D]`: nothing streams; the first, second, ... of the layers that can stream
    does; all of them do."""
    can_stream = model.spec.full_in_base
    embedded_1TD = model.model.embed_tokens(input_ids_1T)
    hidden_VTD = embedded_1TD.expand(len(can_stream) + 2, -1, -1).clone()
    full, last = 0, len(can_stream) + 1
    new = 1  # the variant in which the next layer streams
    for index in range(len(model.model.layers)):
        if index not in can_stream:
            for variants in [*_groups(new, tokens=input_ids_1T.shape[1]), slice(last, last + 1)]:
                hidden_VTD[variants] = _run_layer(model, index, input_ids_1T, hidden_VTD[variants], streaming=False)
            continue
        streamed_2TD = _run_layer(model, index, input_ids_1T, hidden_VTD[[full, last]], streaming=True)
        for variants in _groups(new, tokens=input_ids_1T.shape[1]):
            hidden_VTD[variants] = _run_layer(model, index, input_ids_1T, hidden_VTD[variants], streaming=False)
        hidden_VTD[[new, last]] = streamed_2TD
        new += 1
    return hidden_VTD


def _groups(count: int, tokens: int) -> list[slice]:
    """Split `count` variants of `tokens` tokens each into slices of at most `TOKENS_PER_CALL` tokens, or of one variant."""
    size = max(1, TOKENS_PER_CALL // tokens)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _run_layer(model: HybridForCausalLM, index: int, input_ids_1T: Tensor, hidden_VTD: Tensor, *, streaming: bool) -> Tensor:
    input_ids_VT = input_ids_1T.expand(hidden_VTD.shape[0], -1)
    views = model.model.attention_views(input_ids=input_ids_VT, attention_mask=None, position_ids=None)
    view = views.streaming if streaming else views.full
    output_VTD = model.model.layers[index](
        hidden_VTD,
        attention_mask=view if index in model.spec.full_in_base else views.sliding,
        position_ids=views.position_ids,
        position_embeddings=model.model.position_embeddings(hidden_VTD, views.position_ids)[index],
    )
    return output_VTD.to(hidden_VTD.device)  # of a model on several devices, the output is on the layer's device


def _losses(model: HybridForCausalLM, hidden_VAD: Tensor, target_A: Tensor) -> Tensor:
    """Losses `[V, A]` on the CPU."""
    size = tokens_per_part(model)
    rows = []
    for hidden_AD in hidden_VAD:
        parts = zip(hidden_AD.split(size), target_A.split(size), strict=True)
        rows.append(torch.cat([next_token_losses(model, hidden, target).cpu() for hidden, target in parts]))
    return torch.stack(rows)


def next_token_losses(model: HybridForCausalLM, hidden_AD: Tensor, target_A: Tensor) -> Tensor:
    """Losses `[A]`, in fp32 or better, of the tokens that hidden states after the last layer predict."""
    logits_AW = _logits(model, hidden_AD)
    return nn.functional.cross_entropy(logits_AW, target_A.to(logits_AW.device), reduction="none")


def _logits(model: HybridForCausalLM, hidden_AD: Tensor) -> Tensor:
    logits_AW = model.lm_head(model.model.norm(hidden_AD))
    return logits_AW.to(torch.promote_types(logits_AW.dtype, torch.float32))


def _cross_entropies(p_AW: Tensor, logits_AW: Tensor) -> Tensor:
    return logits_AW.logsumexp(dim=-1) - torch.linalg.vecdot(p_AW, logits_AW)
