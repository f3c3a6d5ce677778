"""What prompts that choose their layers should give: the choice among all layers, and answers without a cache."""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from lt_train.hybrid.mask import full_visible, streaming_visible
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.hybrid.views import AttentionView
from lt_train.selection.fingerprint import Sizes
from lt_train.selection.lazy_ratio import lazy_ratios

SPEC = HybridSpec(num_layers=6, lazy_layers=(), w_sink=2, w_recent=9)
W_LAST = 5


def chosen_offline(model: HybridForCausalLM, prompt: Sequence[int], keep: int) -> set[int]:
    """All but the `keep` smallest of all layers' ratios; the lower of equal layers streams."""
    ratios = lazy_ratios(model, prompt, Sizes(SPEC.w_sink, SPEC.w_recent, W_LAST, long_reach_share=0.1))
    return set(sorted(range(SPEC.num_layers), key=lambda layer: (-ratios[layer], layer))[: SPEC.num_layers - keep])


class AnswerStreams(AttentionView):
    """Queries of the prompt see all keys, later ones what streaming attention shows: without a cache."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def attend(self, module, q_1HTD, k_1GTD, v_1GTD, scaling, dropout):
        position_T = torch.arange(q_1HTD.shape[2])
        streamed_TT = streaming_visible(position_T[:, None], position_T, SPEC.w_sink, SPEC.w_recent)
        visible_TT = full_visible(position_T[:, None], position_T) & (streamed_TT | (position_T[:, None] < self.prompt))
        return scaled_dot_product_attention(q_1HTD, k_1GTD, v_1GTD, attn_mask=visible_TT, scale=scaling, enable_gqa=True).transpose(
            1, 2
        )


@torch.inference_mode()
def likeliest(model: HybridForCausalLM, streaming: set[int], prompt: Sequence[int], ids: Sequence[int]) -> list[int]:
    """What would be chosen in place of each token of an answer after those before it, by one forward pass without a cache."""
    ids_1T = torch.tensor([[*prompt, *ids]])
    views = model.model.attention_views(input_ids=ids_1T, attention_mask=None, position_ids=None)
    hidden = model.model.embed_tokens(ids_1T)
    rotary = model.model.rotary_emb(hidden, views.position_ids)
    for index, layer in enumerate(model.model.layers):
        view = AnswerStreams(len(prompt)) if index in streaming else views.full
        hidden = layer(hidden, attention_mask=view, position_ids=views.position_ids, position_embeddings=rotary)
    return model.lm_head(model.model.norm(hidden))[0, len(prompt) - 1 : -1].argmax(-1).tolist()
