"""The flash attentions that may be installed: the packages flash_attn_interface (3) and flash_attn (2), and the one inside torch.

Each is imported on first use, and called below its own autograd, because flash.py defines the backward pass.

Shapes: n queries and m keys of documents laid end to end, H query heads, G key/value heads, D head size.
"""

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .flash import FlashKernel, Varlen

# Named as strings, because transformers refuses remote code whose `import`s are not installed.
_FLASH_3, _FLASH_2 = "flash_attn_interface", "flash_attn"


class Flash3:
    """flash-attention 3 (`hopper/` of its repository), for compute capability 9.x.

    The order of its operators' arguments is that of its Python interface, which torch 2.13 relies on too
    (torch/nn/attention/_fa3.py).
    """

    name = "flash-attention 3"

    def __init__(self) -> None:
        importlib.import_module(_FLASH_3)  # registers the operators

    def forward(self, q_nHD: Tensor, k_mGD: Tensor, v_mGD: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        out_nHD, lse_Hn, *_ = torch.ops.flash_attn_3.fwd(
            *_last_dense(q_nHD, k_mGD, v_mGD),
            *(None, None, None, None),  # k_new, v_new, qv, out
            *(varlen.cu_seqlens_q, varlen.cu_seqlens_k),
            *(None, None, None),  # cu_seqlens_k_new, seqused_q, seqused_k
            *(varlen.max_seqlen_q, varlen.max_seqlen_k),
            *(None, None, None),  # page_table, kv_batch_idx, leftpad_k
            *(None, None, None),  # rotary_cos, rotary_sin, seqlens_rotary
            *(None, None, None),  # q_descale, k_descale, v_descale
            varlen.scaling,
            varlen.window == (-1, 0),  # causal
            *varlen.window,
            0,  # attention_chunk
            0.0,  # softcap
            True,  # rotary_interleaved
            None,  # scheduler_metadata
            1,  # num_splits
            None,  # pack_gqa
            0,  # sm_margin
        )
        return out_nHD, lse_Hn

    def backward(
        self,
        dout_nHD: Tensor,
        q_nHD: Tensor,
        k_mGD: Tensor,
        v_mGD: Tensor,
        out_nHD: Tensor,
        lse_Hn: Tensor,
        varlen: Varlen,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _gradients_of(q_nHD, k_mGD, v_mGD)
        torch.ops.flash_attn_3.bwd(
            dout_nHD,
            *_last_dense(q_nHD, k_mGD, v_mGD),
            out_nHD,
            lse_Hn,
            *gradients,
            *(varlen.cu_seqlens_q, varlen.cu_seqlens_k),
            *(None, None),  # seqused_q, seqused_k
            *(varlen.max_seqlen_q, varlen.max_seqlen_k),
            varlen.scaling,
            varlen.window == (-1, 0),  # causal
            *varlen.window,
            0.0,  # softcap
            torch.are_deterministic_algorithms_enabled(),
            0,  # sm_margin
        )
        return gradients


class Flash2:
    """The package flash-attn, 2.8 or later."""

    name = "flash-attention 2"

    def __init__(self) -> None:
        self._package: ModuleType = importlib.import_module(f"{_FLASH_2}.flash_attn_interface")

    def forward(self, q_nHD: Tensor, k_mGD: Tensor, v_mGD: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        out_nHD, lse_Hn, _, _ = self._package._flash_attn_varlen_forward(
            q_nHD, k_mGD, v_mGD, **_flash_2_arguments(varlen), return_softmax=False
        )
        return out_nHD, lse_Hn

    def backward(
        self,
        dout_nHD: Tensor,
        q_nHD: Tensor,
        k_mGD: Tensor,
        v_mGD: Tensor,
        out_nHD: Tensor,
        lse_Hn: Tensor,
        varlen: Varlen,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq_nHD, dk_mGD, dv_mGD = _gradients_of(q_nHD, k_mGD, v_mGD)
        self._package._flash_attn_varlen_backward(
            dout_nHD,
            q_nHD,
            k_mGD,
            v_mGD,
            out_nHD,
            lse_Hn,
            dq_nHD,
            dk_mGD,
            dv_mGD,
            **_flash_2_arguments(varlen),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq_nHD, dk_mGD, dv_mGD


class TorchFlash:
    """The flash-attention 2 inside torch, by its operators: its public `varlen_attn` has no grouped queries before torch 2.13."""

    name = f"flash attention of torch {torch.__version__}"

    def forward(self, q_nHD: Tensor, k_mGD: Tensor, v_mGD: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        out_nHD, lse_Hn, _, _, _ = torch.ops.aten._flash_attention_forward(
            *_last_dense(q_nHD, k_mGD, v_mGD),
            varlen.cu_seqlens_q,
            varlen.cu_seqlens_k,
            varlen.max_seqlen_q,
            varlen.max_seqlen_k,
            0.0,  # dropout
            varlen.window == (-1, 0),  # causal
            False,  # return_debug_mask
            scale=varlen.scaling,
            window_size_left=varlen.window[0],
            window_size_right=varlen.window[1],
        )
        return out_nHD, lse_Hn

    def backward(
        self,
        dout_nHD: Tensor,
        q_nHD: Tensor,
        k_mGD: Tensor,
        v_mGD: Tensor,
        out_nHD: Tensor,
        lse_Hn: Tensor,
        varlen: Varlen,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._flash_attention_backward(
            dout_nHD,
            *_last_dense(q_nHD, k_mGD, v_mGD),
            out_nHD,
            lse_Hn,
            varlen.cu_seqlens_q,
            varlen.cu_seqlens_k,
            varlen.max_seqlen_q,
            varlen.max_seqlen_k,
            0.0,  # dropout
            varlen.window == (-1, 0),  # causal
            torch.zeros(2, dtype=torch.uint64, device=q_nHD.device),  # state of the rng, which only dropout reads
            torch.empty(0, device=q_nHD.device),  # unused
            scale=varlen.scaling,
            window_size_left=varlen.window[0],
            window_size_right=varlen.window[1],
        )


@cache
def flash_kernel(capability: tuple[int, int]) -> FlashKernel | None:
    """The best installed flash attention for a CUDA device of this compute capability, or None.

    Raises:
        ImportError: a package is installed but cannot be loaded.
    """
    if capability[0] == 9 and find_spec(_FLASH_3):
        return Flash3()
    if capability >= (8, 0) and find_spec(_FLASH_2):
        return Flash2()
    if capability >= (8, 0) and torch.backends.cuda.is_flash_attention_available():
        return TorchFlash()
    return None


def _flash_2_arguments(varlen: Varlen) -> dict[str, Any]:
    return {
        "cu_seqlens_q": varlen.cu_seqlens_q,
        "cu_seqlens_k": varlen.cu_seqlens_k,
        "max_seqlen_q": varlen.max_seqlen_q,
        "max_seqlen_k": varlen.max_seqlen_k,
        "dropout_p": 0.0,
        "softmax_scale": varlen.scaling,
        "causal": varlen.window == (-1, 0),
        "window_size_left": varlen.window[0],
        "window_size_right": varlen.window[1],
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _last_dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with stride 1 along the last dimension, which the kernels require."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _gradients_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
