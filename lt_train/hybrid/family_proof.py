"""Proof that a hybrid made from a base's own classes computes streaming attention, on a small model with all layers of the base.

Full attention must be the base to the last bit, in rows that fit in the window that layers have in the base; of each layer, what
its queries see is read off its gradients; streaming layers are compared with the base's layers under a dense mask, and caches,
packing and padding with documents alone. Products are in fp64, so that a router's choice of experts does not hang on rounding.

Shapes: B rows, T columns, H query heads, G key/value heads, D hidden size, V vocab_size.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .auto_family import auto_family, stock_classes
from .base_spec import base_spec
from .cache import CACHE_ARGUMENT, HybridCache
from .conversion import config_in
from .kv_size import head_size, kv_heads
from .mask import full_visible, streaming_visible
from .modeling import HybridForCausalLM, attention_at
from .spec import HybridError, HybridSpec
from .unsupported_bases import OTHER, small_config

LENGTH, W_SINK, W_RECENT, SLIDING = 24, 2, 5, 9
SEEDS = (0, 1)
"""Of the batches."""

ROUNDING = 1e-5
"""Relative difference of hidden states that rounding causes, where a family's norms or routers compute in fp32."""

OF_FILES = ("architectures", "dtype", "transformers_version")
"""Settings that do not change what a model computes."""


def prove_family(config: PreTrainedConfig, *, split_layers: bool = False) -> None:
    """
    Args:
        config: the base's, which `refuse_unsupported` has passed.
        split_layers: prove layers of which one KV head streams, too. A family that mixes heads does not have them.

    Raises:
        HybridError: names what differed, and the module where one can be named.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in OF_FILES}
    _prove(config.model_type, json.dumps(settings, sort_keys=True, default=str), split_layers)


@cache
def _prove(model_type: str, settings: str, split_layers: bool) -> None:
    small = small_config(stock_classes(model_type)[0](**json.loads(settings)))
    if base_spec(small.to_dict()).sliding_layers:
        small.sliding_window = SLIDING
    fix = "Fix: let entire layers stream" if split_layers else OTHER
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            _compare(small, _spec_for(small, split_layers))
    except HybridError as error:
        raise _refused(model_type, str(error).partition(". Fix: ")[0], fix) from error
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise _refused(model_type, f"its forward pass fails in a hybrid ({type(error).__name__}: {error})", fix) from error


def _spec_for(small: PreTrainedConfig, split_layers: bool) -> HybridSpec:
    """Every second of the layers that can stream, or in turn: one head of it, all of them, none."""
    base, heads = base_spec(small.to_dict(), W_SINK, W_RECENT), kv_heads(small.to_dict())
    if not split_layers:
        return replace(base, lazy_layers=base.full_in_base[1::2] or base.full_in_base)
    return replace(
        base, lazy_layers=base.full_in_base[1::3], split_layers=tuple((layer, (heads - 1,)) for layer in base.full_in_base[::3])
    )


def _refused(model_type: str, found: str, fix: str) -> HybridError:
    return HybridError(f"model_type: {model_type!r}: not proved to stream: {found}. {fix}")


def _compare(small: PreTrainedConfig, spec: HybridSpec) -> None:
    family = auto_family(small.model_type)
    config = config_in(family, small, spec)
    small._experts_implementation = config._experts_implementation = "eager"  # others have no products in fp64
    small._attn_implementation = "sdpa"
    base = stock_classes(small.model_type)[1](small).eval()
    for weight in base.parameters():
        if weight.dim() > 1:
            weight.data.mul_(3)  # so that a key more or less changes the logits
    hybrid = family.model_class(config).eval()
    hybrid.load_state_dict(base.state_dict())
    for seed in SEEDS:
        ids_BT = torch.randint(3, small.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), hybrid.full_attention():
            within_BT = ids_BT[:, : SLIDING - 1] if spec.sliding_layers else ids_BT  # beyond a window kernels round differently
            _same("full attention differs from the base", _logits(hybrid, within_BT), _logits(base, within_BT), tolerance=0.0)
    base, hybrid = base.double(), hybrid.double()
    for seed in SEEDS:
        ids_BT = torch.randint(3, small.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
        _check_what_layers_see(hybrid, ids_BT)
        with torch.no_grad():
            _compare_logits(base, hybrid, spec, ids_BT)


def _compare_logits(base: PreTrainedModel, hybrid: HybridForCausalLM, spec: HybridSpec, ids_BT: Tensor) -> None:
    expected = _logits(hybrid, ids_BT)
    with hybrid.full_attention():
        full = _logits(hybrid, ids_BT)
    effect = (expected - full).abs().max().item()
    if effect < 1e-6:
        raise HybridError("layers that stream compute what they compute with full attention")
    same = partial(_same, tolerance=1e-3 * effect)
    with hybrid.full_attention():
        _compare_layers(base, hybrid, ids_BT)
    same("nothing streams, and beyond the window of sliding layers logits differ from the base", full, _logits(base, ids_BT))
    with _under_masks(base, spec):
        same("streaming layers differ from the base under a dense mask", expected, _logits(base, ids_BT))
    same("cached tokens differ from recomputation", _logits_by_cache(hybrid, ids_BT), expected)
    first_B, second_B = ids_BT[:1], ids_BT[1:, : LENGTH // 2]
    positions = torch.cat([torch.arange(row.shape[1]) for row in (first_B, second_B)])[None]
    packed = _logits(hybrid, torch.cat([first_B, second_B], dim=1), position_ids=positions)
    apart = torch.cat([expected[:1], expected[1:, : LENGTH // 2]], dim=1)
    same("packed documents differ from each alone", packed, apart)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, : LENGTH // 2] = 0
    padded_BT = torch.cat([ids_BT[:1], torch.cat([torch.zeros_like(second_B), second_B], dim=1)])
    padded = _logits(hybrid, padded_BT, attention_mask=mask_BT)
    same("a padded row differs from the row alone", padded[1, LENGTH // 2 :], expected[1, : LENGTH // 2])
    one_by_one = "layers run one by one, as the built-in engine and the layer profile do, differ from forward"
    same(one_by_one, _layer_by_layer(hybrid, ids_BT), expected)


def _compare_layers(base: PreTrainedModel, hybrid: HybridForCausalLM, ids_BT: Tensor) -> None:
    """
    Raises:
        HybridError: names the first layer whose output is not that of the base, in rows longer than the window of sliding layers.
    """
    outputs = zip(_outputs_of_layers(hybrid, ids_BT), _outputs_of_layers(base, ids_BT), strict=True)
    for index, (found_BTD, expected_BTD) in enumerate(outputs):
        gap = ((found_BTD - expected_BTD).norm() / expected_BTD.norm()).item()
        if not gap < ROUNDING:  # also true of a NaN
            at = attention_at(index, hybrid.model.layers[index].self_attn)
            raise HybridError(f"{at}: with full attention it differs from the base beyond the window, by {gap:.2g}")


def _outputs_of_layers(model: PreTrainedModel, ids_BT: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda layer, given, output: found.append(output)) for layer in model.model.layers]
    try:
        _logits(model, ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _logits(model: PreTrainedModel, ids_BT: Tensor, **given: Tensor) -> Tensor:
    return model(ids_BT, use_cache=False, **given).logits


def _logits_by_cache(hybrid: HybridForCausalLM, ids_BT: Tensor) -> Tensor:
    """Logits by a cache: of a first part, a second one of several tokens, and the rest token by token."""
    cache, parts = HybridCache(hybrid.spec), []
    for part_BT in ids_BT.split([LENGTH // 2, 4, *[1] * (LENGTH - LENGTH // 2 - 4)], dim=1):
        parts.append(hybrid(part_BT, **{CACHE_ARGUMENT: cache}).logits)
    expected = (hybrid.config.kv_heads, head_size(hybrid.config.to_dict()))
    for index, layer in enumerate(cache.layers):
        for kind in ("keys", "values"):
            held = [getattr(part, kind) for part in layer.parts]
            if (found := (sum(x.shape[1] for x in held), held[0].shape[3])) != expected:
                at = attention_at(index, hybrid.model.layers[index].self_attn)
                raise HybridError(f"{at}: it caches {kind} of {found} (heads, size), and by the config it is {expected}")
    return torch.cat(parts, dim=1)


def _layer_by_layer(hybrid: HybridForCausalLM, ids_BT: Tensor) -> Tensor:
    body = hybrid.model
    views = body.attention_views(input_ids=ids_BT)
    hidden_BTD = body.embed_tokens(ids_BT)
    position_embeddings = body.position_embeddings(hidden_BTD, views.position_ids)
    for index, layer in enumerate(body.layers):
        view = views.of_layer(index, hybrid.spec)
        hidden_BTD = layer(
            hidden_BTD, attention_mask=view, position_ids=views.position_ids, position_embeddings=position_embeddings[index]
        )
    return hybrid.lm_head(body.norm(hidden_BTD))


def _same(difference: str, found: Tensor, expected: Tensor, *, tolerance: float) -> None:
    gap = (found - expected).abs().max().item()
    if not gap <= tolerance:  # also true of a NaN
        raise HybridError(f"{difference}: logits by up to {gap:.2g}, of at most {expected.abs().max().item():.2g}")


# What each layer's queries see


def _check_what_layers_see(hybrid: HybridForCausalLM, ids_BT: Tensor) -> None:
    """
    Raises:
        HybridError: names the first layer of which a query sees another key than its kind of attention shows it.
    """
    position_T = torch.arange(LENGTH)
    causal_TT = full_visible(position_T[:, None], position_T[None])
    streaming_TT = streaming_visible(position_T[:, None], position_T[None], W_SINK, W_RECENT)
    sliding_TT = streaming_visible(position_T[:, None], position_T[None], 0, SLIDING)
    views, sliding = hybrid.model.attention_views(input_ids=ids_BT[:1]), hybrid.spec.sliding_layers
    for kind, view, visible_TT in (("full", views.full, causal_TT), ("streaming", views.streaming, streaming_TT)):
        view_L = [views.sliding if layer in sliding else view for layer in range(hybrid.spec.num_layers)]
        for index, seen_TT in enumerate(_seen(hybrid, view_L, ids_BT[:1])):
            kind_of_layer, visible = ("sliding", sliding_TT) if index in sliding else (kind, visible_TT)
            differing = (seen_TT != visible[QUERIES]).nonzero()
            if len(differing):
                row, key = differing[0].tolist()
                query, sees = QUERIES[row], bool(seen_TT[row, key])
                at = attention_at(index, hybrid.model.layers[index].self_attn)
                found, wanted = ("sees", "hides") if sees else ("does not see", "shows")
                raise HybridError(f"{at}: token {query} {found} token {key}, which {kind_of_layer} attention {wanted}")


QUERIES = [LENGTH // 2, LENGTH - 1]


def _seen(hybrid: HybridForCausalLM, view_L: list[Any], ids_1T: Tensor) -> Iterator[Tensor]:
    """The tokens [queries, T] of each layer's input on which its outputs at QUERIES depend."""
    body = hybrid.model
    hidden_1TD = body.embed_tokens(ids_1T).detach()
    position_ids = torch.arange(LENGTH)[None]
    position_embeddings = body.position_embeddings(hidden_1TD, position_ids)
    for layer, view, embeddings in zip(body.layers, view_L, position_embeddings, strict=True):
        hidden_1TD = hidden_1TD.detach().requires_grad_()
        given = {"attention_mask": view, "position_ids": position_ids, "position_embeddings": embeddings}
        output_1TD = layer(hidden_1TD, **given)
        weights_D = torch.linspace(0.5, 1.5, output_1TD.shape[-1], dtype=output_1TD.dtype)
        rows = []
        for query in QUERIES:
            (gradient,) = torch.autograd.grad((output_1TD[0, query] * weights_D).sum(), hidden_1TD, retain_graph=True)
            rows.append(gradient[0].abs().amax(-1) > 0)
        yield torch.stack(rows)
        hidden_1TD = output_1TD


@contextmanager
def _under_masks(base: PreTrainedModel, spec: HybridSpec) -> Iterator[None]:
    """While the block runs, each layer of the base gets a dense mask of what each of its heads sees in `spec`."""
    position_T = torch.arange(LENGTH)
    full_TT = full_visible(position_T[:, None], position_T[None])
    streaming_TT = streaming_visible(position_T[:, None], position_T[None], spec.w_sink, spec.w_recent)
    sliding_TT = streaming_visible(position_T[:, None], position_T[None], 0, max(spec.sliding_window, 1))
    heads = kv_heads(base.config.to_dict())

    def masked(mask_1HTT: Tensor, layer: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, given | {"attention_mask": mask_1HTT}

    hooks = []
    for index, streaming in enumerate(spec.streaming_heads(heads)):
        layer, other_TT = base.model.layers[index], sliding_TT if spec.slides(index) else full_TT
        mask_GTT = torch.stack([streaming_TT if head in streaming else other_TT for head in range(heads)])
        mask_1HTT = mask_GTT.repeat_interleave(base.config.num_attention_heads // heads, dim=0)[None]
        hooks.append(layer.register_forward_pre_hook(partial(masked, mask_1HTT), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
