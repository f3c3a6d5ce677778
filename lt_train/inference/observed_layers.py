"""A forward pass of the base in which the attention of its full layers is observed: queries and keys as the kernels get them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.views import FullView

View = TypeVar("View", bound=FullView)


@torch.no_grad()
def run_observed(model: HybridForCausalLM, input_ids: Sequence[int], view_of: Callable[[int, FullView], View]) -> list[View]:
    """Run one sample through all layers, none of them streaming. Returns the view of each layer that can stream.

    Args:
        model: a hybrid in evaluation mode; what streams in it does not matter.
        view_of: the view for a layer that can stream, from its index and the view of a full layer.
    """
    input_ids_1T = torch.tensor([list(input_ids)], device=model.device)
    views = model.model.attention_views(input_ids=input_ids_1T, attention_mask=None, position_ids=None)
    hidden_1TD = model.model.embed_tokens(input_ids_1T)
    embeddings_L = model.model.position_embeddings(hidden_1TD, views.position_ids)
    assert isinstance(views.full, FullView), "without a cache every layer sees the documents of the input"
    used = {index: view_of(index, views.full) for index in model.spec.full_in_base}
    for index, layer in enumerate(model.model.layers):
        hidden_1TD = layer(
            hidden_1TD,
            attention_mask=used.get(index, views.sliding),
            position_ids=views.position_ids,
            position_embeddings=embeddings_L[index],
        )
    return list(used.values())
