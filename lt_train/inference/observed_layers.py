"""A forward pass of the full model in which each layer's attention is observed: queries and keys as the kernels get them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.views import FullView

View = TypeVar("View", bound=FullView)


@torch.no_grad()
def run_observed(model: HybridForCausalLM, input_ids: Sequence[int], view_of: Callable[[int, FullView], View]) -> list[View]:
    """Run one sample through all layers, every layer full. Returns the view of each layer.

    Args:
        model: a hybrid in evaluation mode; what streams in it does not matter.
        view_of: the view for a layer, from its index and the view of a full layer.
    """
    input_ids_1T = torch.tensor([list(input_ids)], device=model.device)
    views = model.model.attention_views(input_ids=input_ids_1T, attention_mask=None, position_ids=None)
    hidden_1TD = model.model.embed_tokens(input_ids_1T)
    position_embeddings = model.model.rotary_emb(hidden_1TD, views.position_ids)
    assert isinstance(views.full, FullView), "without a cache every layer sees the documents of the input"
    used = [view_of(index, views.full) for index in range(len(model.model.layers))]
    for layer, view in zip(model.model.layers, used, strict=True):
        hidden_1TD = layer(
            hidden_1TD,
            attention_mask=view,
            position_ids=views.position_ids,
            position_embeddings=position_embeddings,
        )
    return used
