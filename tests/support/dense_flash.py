"""Stand-ins for flash attention on a CPU, in any dtype: dense, written from flash attention's own definition.

`DenseFlash` is a kernel of hybrid/flash.py. The others put it where the real ones look for their operators, under the signatures
of those: flash-attn 2.8.3 and the operators of flash-attn 3 and of torch.

Shapes: n queries and m keys of documents laid end to end, H query heads, G key/value heads, D head size.
"""

import dataclasses
import sys
from contextlib import contextmanager
from types import ModuleType

import torch

from lt_train.hybrid.flash import Varlen


class DenseFlash:
    name = "dense stand-in"

    def forward(self, q_nHD, k_mGD, v_mGD, varlen):
        out_nHD, lse_Hn = torch.empty_like(q_nHD), q_nHD.new_empty(q_nHD.shape[1], q_nHD.shape[0], dtype=precise(q_nHD))
        for queries, keys in documents(q_nHD, k_mGD, varlen):
            scores_Hnm, v_mHD = scores(q_nHD[queries], k_mGD[keys], varlen), heads_of(v_mGD[keys], q_nHD)
            lse_Hn[:, queries] = scores_Hnm.logsumexp(-1)
            out_nHD[queries] = torch.einsum("hnm,mhd->nhd", scores_Hnm.softmax(-1).to(q_nHD.dtype), v_mHD)
        return out_nHD, lse_Hn

    def backward(self, dout_nHD, q_nHD, k_mGD, v_mGD, out_nHD, lse_Hn, varlen):
        assert all(x.is_contiguous() for x in (dout_nHD, out_nHD, lse_Hn)), "CUDA code reads these by their data pointers"
        assert {x.dtype for x in (dout_nHD, q_nHD, k_mGD, v_mGD, out_nHD)} == {q_nHD.dtype}
        assert lse_Hn.dtype == precise(q_nHD) and lse_Hn.shape == (q_nHD.shape[1], q_nHD.shape[0])
        dq_nHD, dk_mGD, dv_mGD = (torch.empty_like(x) for x in (q_nHD, k_mGD, v_mGD))
        for queries, keys in documents(q_nHD, k_mGD, varlen):
            q, k, v = q_nHD[queries], heads_of(k_mGD[keys], q_nHD), heads_of(v_mGD[keys], q_nHD)
            dout, out = (x[queries].to(precise(q)) for x in (dout_nHD, out_nHD))
            weight_Hnm = (scores(q, k_mGD[keys], varlen) - lse_Hn[:, queries, None]).exp()
            rise_Hnm = torch.einsum("nhd,mhd->hnm", dout, v.to(dout.dtype)) - (dout * out).sum(-1).T[..., None]
            dscores_Hnm = varlen.scaling * weight_Hnm * rise_Hnm
            dq_nHD[queries] = torch.einsum("hnm,mhd->nhd", dscores_Hnm, k.to(dout.dtype)).to(q.dtype)
            dk_mHD = torch.einsum("hnm,nhd->mhd", dscores_Hnm, q.to(dout.dtype))
            dv_mHD = torch.einsum("hnm,nhd->mhd", weight_Hnm, dout)
            for gradient, by_head in ((dk_mGD, dk_mHD), (dv_mGD, dv_mHD)):
                gradient[keys] = by_head.unflatten(1, (gradient.shape[1], -1)).sum(2).to(gradient.dtype)
        return dq_nHD, dk_mGD, dv_mGD


class OffByOne(DenseFlash):
    """A window of one key too few."""

    def forward(self, q_nHD, k_mGD, v_mGD, varlen):
        left, right = varlen.window
        shorter = varlen if left < 1 else dataclasses.replace(varlen, window=(left - 1, right))
        return super().forward(q_nHD, k_mGD, v_mGD, shorter)


class WrongGradient(DenseFlash):
    """Right in the forward pass; dv comes from the first key/value group alone."""

    def backward(self, *given):
        dq, dk, dv = super().backward(*given)
        return dq, dk, dv[:, :1].expand_as(dv)


class Unbuilt(DenseFlash):
    def forward(self, *given):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def precise(x):
    return torch.promote_types(x.dtype, torch.float32)


def documents(q_nHD, k_mGD, varlen):
    """The queries and the keys of each document, as slices, after checking what flash attention takes for granted."""
    ends_q, ends_k = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    assert varlen.cu_seqlens_q.dtype == varlen.cu_seqlens_k.dtype == torch.int32
    assert (ends_q[0], ends_k[0], ends_q[-1], ends_k[-1]) == (0, 0, len(q_nHD), len(k_mGD))
    spans = list(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False))
    assert all(q_end > q_start and k_end > k_start for q_start, q_end, k_start, k_end in spans), "a group of length zero"
    assert varlen.max_seqlen_q == max(end - start for start, end, _, _ in spans)
    assert varlen.max_seqlen_k == max(end - start for _, _, start, end in spans)
    return [(slice(q_start, q_end), slice(k_start, k_end)) for q_start, q_end, k_start, k_end in spans]


def heads_of(x_mGD, q_nHD):
    return x_mGD.repeat_interleave(q_nHD.shape[1] // x_mGD.shape[1], dim=1)


def scores(q_nHD, k_mGD, varlen):
    """-inf where a key is out of the window, counted from the end of the queries and of the keys."""
    place_n1 = torch.arange(len(q_nHD))[:, None] + len(k_mGD) - len(q_nHD)
    place_m = torch.arange(len(k_mGD))
    left, right = (10**9 if size < 0 else size for size in varlen.window)
    visible_nm = (place_m >= place_n1 - left) & (place_m <= place_n1 + right)
    scores_Hnm = varlen.scaling * torch.einsum("nhd,mhd->hnm", q_nHD, heads_of(k_mGD, q_nHD)).to(precise(q_nHD))
    return scores_Hnm.masked_fill(~visible_nm, float("-inf"))


def window(causal, left, right):
    """As flash attention reads its arguments: `causal` closes the window on the right."""
    return (left, 0 if causal else right)


@contextmanager
def flash_2_package():
    """The package flash-attn 2.8.3 as sys.modules has it."""

    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors=False,
    ):
        assert (dropout_p, softcap, alibi_slopes, block_table, leftpad_k, seqused_k) == (0.0, 0.0, None, None, None, None)
        sizes = window(causal, window_size_left, window_size_right)
        varlen = Varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sizes, softmax_scale)
        return *DenseFlash().forward(q, k, v, varlen), torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
        zero_tensors=False,
    ):
        assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
        sizes = window(causal, window_size_left, window_size_right)
        varlen = Varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sizes, softmax_scale)
        for given, computed in zip((dq, dk, dv), DenseFlash().backward(dout, q, k, v, out, softmax_lse, varlen), strict=True):
            given.copy_(computed)
        return torch.empty(0)

    module = ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    names = {"flash_attn": ModuleType("flash_attn"), "flash_attn.flash_attn_interface": module}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextmanager
def flash_3_package():
    """The package of flash-attn 3 and its operators, by the schema that torch 2.13 calls them by (torch/nn/attention/_fa3.py)."""
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
        "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
        "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float? softmax_scale, bool is_causal, "
        "int window_size_left, int window_size_right, int attention_chunk, float softcap, bool is_rotary_interleaved, "
        "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq, Tensor(b!)? dk, "
        "Tensor(c!)? dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
        "int? max_seqlen_k, float? softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, "
        "bool deterministic, int sm_margin) -> Tensor"
    )

    def fwd(q, k, v, *rest):
        absent, sizes = [rest[i] for i in (0, 1, 2, 3, 6, 7, 8, *range(11, 20))], rest[20:]
        assert absent == [None] * 16 and sizes[4:6] == (0, 0.0)
        varlen = Varlen(*rest[4:6], *rest[9:11], window(*sizes[1:4]), sizes[0])
        return *DenseFlash().forward(q, k, v, varlen), torch.empty(0), torch.empty(0)

    def bwd(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, used_q, used_k, max_q, max_k, scale, causal, left, right, *rest):
        assert (used_q, used_k, rest[0]) == (None, None, 0.0)
        varlen = Varlen(cu_q, cu_k, max_q, max_k, window(causal, left, right), scale)
        for given, computed in zip((dq, dk, dv), DenseFlash().backward(dout, q, k, v, out, lse, varlen), strict=True):
            given.copy_(computed)
        return torch.empty(0)

    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")
    sys.modules["flash_attn_interface"] = ModuleType("flash_attn_interface")
    try:
        yield
    finally:
        del sys.modules["flash_attn_interface"]
        library._destroy()


@contextmanager
def flash_in_torch():
    """torch's own flash-attention operators, which have no code for CPUs, with some."""
    library = torch.library.Library("aten", "IMPL")

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, return_debug_mask, *, scale, window_size_left, **rest):
        assert dropout == 0.0 and not return_debug_mask
        sizes = window(causal, window_size_left, rest.pop("window_size_right"))
        assert not any(value is not None for value in rest.values())
        out, lse = DenseFlash().forward(q, k, v, Varlen(cu_q, cu_k, max_q, max_k, sizes, scale))
        return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale, **sizes):
        assert dropout == 0.0 and rng_state.dtype == torch.uint64 and rng_state.shape == (2,)
        varlen = Varlen(cu_q, cu_k, max_q, max_k, window(causal, sizes["window_size_left"], sizes["window_size_right"]), scale)
        return DenseFlash().backward(dout, q, k, v, out, lse, varlen)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
