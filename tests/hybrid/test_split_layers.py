"""Layers of which some KV heads stream, against a forward pass that masks each head by the predicate."""

import pytest
import torch

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.mask import full_visible, streaming_visible
from lt_train.hybrid.reference import masked_attention
from lt_train.hybrid.spec import HybridSpec
from lt_train.hybrid.views import AttentionView
from tests.support.families import FAMILIES, base_of

KV_HEADS = 2
SPEC = HybridSpec.from_streaming_heads([(1,), (), (0,), (0, 1)], KV_HEADS, w_sink=3, w_recent=7)


class MaskedHeads(AttentionView):
    """Each KV head with a dense mask of its own, by the slow reference."""

    def __init__(self, spec, position_BT):
        self.heads = spec.streaming_heads(KV_HEADS)
        q_BT1, k_B1T = position_BT[:, :, None], position_BT[:, None, :]
        document_BT = (position_BT == 0).cumsum(1)
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        self.full_BTT = full_visible(q_BT1, k_B1T) & same_BTT
        self.streaming_BTT = streaming_visible(q_BT1, k_B1T, spec.w_sink, spec.w_recent) & same_BTT

    def attend(self, module, q_BHTD, k_BGKD, v_BGKD, scaling, dropout):
        rest = q_BHTD.shape[1] // KV_HEADS
        outs = []
        for head in range(KV_HEADS):
            visible = self.streaming_BTT if head in self.heads[module.layer_idx] else self.full_BTT
            q, k, v = q_BHTD[:, head * rest : (head + 1) * rest], k_BGKD[:, head : head + 1], v_BGKD[:, head : head + 1]
            outs.append(masked_attention(q, k, v, visible, scaling))
        return torch.cat(outs, dim=1).transpose(1, 2)


def masked_hidden_states(model, ids_BT, position_BT):
    """The last hidden states of a hybrid's layers, each head masked."""
    body = model.model
    stock_forward = super(type(body).__mro__[1], body).forward
    return stock_forward(
        input_ids=ids_BT, position_ids=position_BT, use_cache=False, views=MaskedHeads(model.spec, position_BT)
    ).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_documents_are_those_of_masking_each_head(family):
    model = build_hybrid(base_of(family), SPEC).eval()
    ids_BT = torch.randint(2, 96, (2, 40))
    position_BT = torch.cat([torch.arange(11), torch.arange(29)]).expand(2, -1)
    expected = masked_hidden_states(model, ids_BT, position_BT)
    found = model.model(ids_BT, position_ids=position_BT, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
