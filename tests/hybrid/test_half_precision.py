"""In bf16 and fp16 attention is as near to fp64 as scaled_dot_product_attention is: scores keep fp32 until after the softmax."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lt_train.hybrid.blocked import blocked_streaming_attention
from lt_train.hybrid.mask import streaming_visible
from lt_train.hybrid.reference import reference_streaming_attention
from tests.support.streaming_cases import Case, tensors_of, with_gradients

CASE = Case(((400,),), w_sink=4, w_recent=100)
KERNELS = {"blocked": blocked_streaming_attention, "reference": reference_streaming_attention}
AS_SDPA = 1.05
"""Errors are at most this many times SDPA's."""


def sdpa(q, k, v):
    position = torch.arange(q.shape[2])
    visible = streaming_visible(position[:, None], position, CASE.w_sink, CASE.w_recent)
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=CASE.sizes["scaling"], enable_gqa=True)


def drawn(dtype, largest):
    """q, k, v and the gradient of the output, with scores up to about `largest`."""
    q, k, v, dout = tensors_of(CASE, torch.float64)
    factor = (largest / (CASE.sizes["scaling"] * (q @ k.repeat_interleave(2, 1).mT).abs().max())) ** 0.5
    return [x.to(dtype) for x in (q * factor, k * factor, v, dout)]


def errors(attention, tensors):
    """Relative, against fp64: of the output and of the gradients of q, k and v."""
    exact = with_gradients(lambda *x: reference_streaming_attention(*x, **CASE.sizes), *(x.double() for x in tensors))
    found = with_gradients(attention, *tensors)
    assert {x.dtype for x in found} == {tensors[0].dtype}
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("largest_score", [5, 30, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KERNELS)
def test_errors_are_no_larger_than_those_of_sdpa(name, dtype, largest_score):
    tensors = drawn(dtype, largest_score)
    of_sdpa = errors(sdpa, tensors)
    found = errors(lambda *x: KERNELS[name](*x, **CASE.sizes), tensors)
    assert all(ours <= AS_SDPA * theirs for ours, theirs in zip(found, of_sdpa, strict=True)), (found, of_sdpa)


@pytest.mark.parametrize("name", KERNELS)
def test_errors_are_no_larger_under_autocast(name):
    """Which casts the operands of every matrix product to bf16."""
    tensors = drawn(torch.bfloat16, largest=30)

    def under_autocast(*qkv):
        with torch.autocast("cpu", torch.bfloat16):
            return KERNELS[name](*qkv, **CASE.sizes)

    found, of_sdpa = errors(under_autocast, tensors), errors(sdpa, tensors)
    assert all(ours <= AS_SDPA * theirs for ours, theirs in zip(found, of_sdpa, strict=True)), (found, of_sdpa)
