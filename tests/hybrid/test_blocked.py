"""The blocked kernel: exact in fp64, in memory linear in length, and plain about what it cannot do."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lt_train.hybrid import blocked
from lt_train.hybrid.blocked import blocked_streaming_attention
from lt_train.hybrid.reference import reference_streaming_attention
from lt_train.hybrid.spec import HybridError
from tests.support.streaming_cases import CASES, Case, documents_of, expected_output, tensors_of, with_gradients

LONG = {
    "several blocks": Case(((700,),), w_recent=150),
    "a block longer than the window": Case(((400,), (400,)), w_recent=7),
    "sinks in the middle of a block": Case(((600,),), w_sink=200, w_recent=50),
    "one query after the sinks leave": Case(((505,),), w_sink=4, w_recent=500),
    "packed, lengths around sinks and window": Case(((203, 204, 205, 333),), w_sink=4, w_recent=200),
}
SIZES = dict(w_sink=4, w_recent=60, scaling=0.3)


def assert_exact(case, size=16):
    documents = documents_of(case)
    *qkv, dout = tensors_of(case, torch.float64, size=size)
    expected = with_gradients(lambda *x: expected_output(case, documents, *x), *qkv, dout)
    found = with_gradients(lambda *x: documents.attend(lambda *y: blocked_streaming_attention(*y, **case.sizes), *x), *qkv, dout)
    torch.testing.assert_close(found[0], expected[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1:], expected[1:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", [*CASES, *LONG])
def test_it_is_the_reference_to_twelve_digits_and_its_gradients_to_ten(case):
    assert_exact((CASES | LONG)[case])


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 600),
    w_sink=st.integers(0, 40) | st.integers(100, 700),
    w_recent=st.integers(1, 130) | st.integers(130, 700),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
)
@example(length=400, w_sink=4, w_recent=124, heads=(4, 2))
@example(length=133, w_sink=0, w_recent=1, heads=(4, 2))
@example(length=385, w_sink=129, w_recent=255, heads=(1, 1))
def test_it_is_the_reference_for_all_lengths_sinks_windows_and_heads(length, w_sink, w_recent, heads):
    assert_exact(Case(((length,),), w_sink, w_recent, heads), size=8)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 500),
    queries=st.integers(1, 300),
    w_sink=st.integers(0, 40) | st.integers(100, 300),
    w_recent=st.integers(1, 130) | st.integers(130, 600),
    heads=st.sampled_from([(1, 1), (4, 2)]),
)
@example(length=200, queries=72, w_sink=4, w_recent=124, heads=(4, 2))
def test_queries_of_the_last_tokens_alone_get_what_they_get_among_all(length, queries, w_sink, w_recent, heads):
    """Their outputs and gradients, and those of keys and values, are those of a whole row whose first outputs nobody uses."""
    case, last = Case(((length,),), w_sink, w_recent, heads), min(queries, length)
    q, k, v, dout = tensors_of(case, torch.float64, size=8)
    expected = with_gradients(lambda *x: reference_streaming_attention(*x, **case.sizes)[:, :, -last:], q, k, v, dout[:, :, -last:])
    found = with_gradients(
        lambda q, k, v: blocked_streaming_attention(q[:, :, -last:], k, v, **case.sizes), q, k, v, dout[:, :, -last:]
    )
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_heads_that_do_not_fit_together_are_computed_one_after_another(monkeypatch):
    monkeypatch.setattr(blocked, "_SCORES_ON_CPU", 3 * 32 * (4 + 59 + 32))  # three heads' scores of five
    monkeypatch.setattr(blocked, "_ROWS_ON_CPU", 32)
    assert_exact(Case(((300,),), w_recent=60, heads=(5, 5)))


@pytest.mark.parametrize("length", [50, 300])
def test_in_bf16_it_is_as_near_as_bf16_allows(length):
    case = Case(((length,),), w_sink=3)
    *qkv, dout = tensors_of(case, torch.bfloat16)
    found = with_gradients(lambda *x: blocked_streaming_attention(*x, **case.sizes), *qkv, dout)
    assert {x.dtype for x in found} == {torch.bfloat16}
    expected = with_gradients(lambda *x: reference_streaming_attention(*x, **case.sizes), *(x.float() for x in (*qkv, dout)))
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.float() - exact).norm() < 0.01 * exact.norm()


def test_under_autocast_it_computes_in_autocasts_dtype_whatever_it_is_given():
    """Rotary embedding hands over fp32 queries and keys beside bf16 values."""
    q, k, v, dout = tensors_of(Case(((150,),)), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(lambda q, k, v: blocked_streaming_attention(q, k, v.bfloat16(), **SIZES), q, k, v, dout.bfloat16())
    expected = with_gradients(lambda *x: blocked_streaming_attention(*x, **SIZES), q, k, v, dout)
    assert found[0].dtype == torch.bfloat16
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.float() - exact).norm() < 0.01 * exact.norm()


def test_a_batch_of_no_rows_has_an_output_and_gradients_of_no_rows():
    *qkv, dout = (x[:0] for x in tensors_of(Case(((150,),)), torch.float32))
    assert [len(x) for x in with_gradients(lambda *x: blocked_streaming_attention(*x, **SIZES), *qkv, dout)] == [0, 0, 0, 0]


def test_gradients_are_the_same_under_checkpointing():
    *qkv, dout = tensors_of(Case(((300,),)), torch.float64)
    plain = with_gradients(lambda *x: blocked_streaming_attention(*x, **SIZES), *qkv, dout)
    again = with_gradients(
        lambda *x: checkpoint(lambda *y: blocked_streaming_attention(*y, **SIZES), *x, use_reentrant=False), *qkv, dout
    )
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_a_second_derivative_is_refused_though_it_be_hidden_in_a_sum():
    *qkv, dout = tensors_of(Case(((150,),)), torch.float64)
    qkv = [x.requires_grad_() for x in qkv]
    out = blocked_streaming_attention(*qkv, **SIZES)
    with pytest.raises(HybridError, match="no second derivative"):
        torch.autograd.grad(out, qkv[0], dout, create_graph=True)


def peak_bytes(attention, length):
    """Most bytes that forward and backward hold at a time beyond their input, as torch's allocator counts them."""
    q, k, v, dout = tensors_of(Case(((length,),)), torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        with_gradients(lambda *x: attention(*x, **SIZES), q, k, v, dout)
    held = peak = 0
    # run.events() books what an operator frees to the time of its start
    for event in sorted(run.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        held += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, held)
    return peak


def test_peak_memory_is_linear_in_length():
    assert peak_bytes(blocked_streaming_attention, 8192) < 2.2 * peak_bytes(blocked_streaming_attention, 4096)
    assert peak_bytes(reference_streaming_attention, 1024) > 3.5 * peak_bytes(reference_streaming_attention, 512)  # and can tell
