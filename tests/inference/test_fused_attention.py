"""Attention in parts that are joined by log-sum-exps is that of a dense mask; the log-sum-exps are those of the scores."""

import math

import pytest
import torch
from torch import nn

from lt_train.hybrid.documents import find_documents
from lt_train.hybrid.mask import full_visible
from lt_train.hybrid.reference import masked_attention
from lt_train.hybrid.views import FullView
from lt_train.inference.fused_attention import full_attention, later_tokens_attention
from lt_train.inference.lazy_ratio import lazy_ratio

HEADS, GROUPS, SIZE, SCALING = 6, 2, 24, 0.2


LAYER = nn.Identity()
LAYER.num_key_value_groups = HEADS // GROUPS


def drawn(queries, keys, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = (1, HEADS, queries, SIZE), (1, GROUPS, keys, SIZE), (1, GROUPS, keys, SIZE)
    return [(2 * torch.randn(shape, generator=rng)).to(dtype) for shape in shapes]


def heads_of(x_BGKD):
    return x_BGKD.repeat_interleave(HEADS // GROUPS, 1)


def view_of(lengths):
    position_ids_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    return FullView(find_documents(1, sum(lengths), torch.device("cpu"), None, position_ids_1T))


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2.5e-3)])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("queries, keys", [(1, 40), (37, 101), (64, 65)])
def test_later_tokens_see_all_tokens_up_to_themselves(queries, keys, has_sinks, dtype, off):
    q, k, v = drawn(queries, keys, dtype)
    sinks_H = torch.linspace(-2, 3, HEADS, dtype=torch.promote_types(dtype, torch.float32)) if has_sinks else None
    visible_QK = full_visible(torch.arange(keys - queries, keys)[:, None], torch.arange(keys))
    exact = masked_attention(
        q.double(),
        heads_of(k).double(),
        heads_of(v).double(),
        visible_QK[None, None],
        SCALING,
        None if sinks_H is None else sinks_H.double(),
    )
    found = later_tokens_attention(q, k, v, SCALING, sinks_H)
    assert found.dtype == dtype
    assert float((found - exact).norm() / exact.norm()) < off


def test_packed_documents_have_the_attention_of_a_full_view_and_log_sum_exps_of_their_own():
    lengths = [70, 30, 1]
    q, k, v = drawn(sum(lengths), sum(lengths))
    view = view_of(lengths)
    out_1THD, lses = full_attention(view, LAYER, q, k, v, SCALING, 0.0)
    assert torch.equal(out_1THD, view.attend(LAYER, q, k, v, SCALING, 0.0))
    for q_1HSD, k_1GSD, lse_1HS in zip(q.split(lengths, 2), k.split(lengths, 2), lses, strict=True):
        position_S = torch.arange(q_1HSD.shape[2])
        later_SS = ~full_visible(position_S[:, None], position_S)
        scores = SCALING * q_1HSD.double() @ heads_of(k_1GSD).double().transpose(-1, -2)
        exact = scores.masked_fill(later_SS, float("-inf")).logsumexp(-1)
        torch.testing.assert_close(lse_1HS, exact.float())


@pytest.mark.parametrize("w_last", [1, 16, 200])
def test_a_lazy_ratio_needs_only_the_keys_in_sight_where_the_log_sum_exps_are_there(w_last):
    q, k, v = drawn(150, 150)
    _, (lse_1HT,) = full_attention(view_of([150]), LAYER, q, k, v, SCALING, 0.0)
    sizes = (SCALING, 4, 30, w_last)
    assert lazy_ratio(q, k, *sizes, lse_BHT=lse_1HT) == pytest.approx(lazy_ratio(q, k, *sizes), abs=1e-6)
    beyond = k.index_fill(2, torch.arange(4, 150 - 30 - min(w_last, 150)), float("nan")) if w_last < 100 else k
    assert lazy_ratio(q, beyond, *sizes, lse_BHT=lse_1HT) == lazy_ratio(q, k, *sizes, lse_BHT=lse_1HT)


def test_a_lazy_ratio_of_nan_is_no_number():
    q, k, _ = drawn(150, 150)
    q[..., -1, 0] = float("nan")
    for lse_1HT in (None, torch.zeros(1, HEADS, 150)):
        assert math.isnan(lazy_ratio(q, k, SCALING, 4, 30, 8, lse_BHT=lse_1HT))
