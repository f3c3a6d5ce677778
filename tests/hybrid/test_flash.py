"""Attention merged from parts is the reference, in fp64, with a dense stand-in for the kernel that computes the parts."""

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lt_train.hybrid.flash import attend_by_parts, full_parts, streaming_parts
from lt_train.hybrid.flash_kernels import Flash2, Flash3, TorchFlash, flash_kernel
from tests.support.dense_flash import DenseFlash, flash_2_package, flash_3_package, flash_in_torch
from tests.support.streaming_cases import CASES, Case, documents_of, expected_output, tensors_of, with_gradients

CPU = torch.device("cpu")


def merged(case, documents, kernel=None):
    parts = streaming_parts(documents.lengths, case.w_sink, case.w_recent, CPU)
    return partial(attend_by_parts, documents, parts=parts, scaling=case.sizes["scaling"], kernel=kernel or DenseFlash())


def assert_is_the_reference(case, attention, documents, seed=0):
    *qkv, dout = tensors_of(case, torch.float64, size=4, seed=seed)
    out, *gradients = with_gradients(attention, *qkv, dout)
    expected, *expected_gradients = with_gradients(lambda *x: expected_output(case, documents, *x), *qkv, dout)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-10, rtol=1e-10)


packs = st.builds(
    Case,
    rows=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3).map(tuple),
    w_sink=st.integers(0, 9) | st.just(50),
    w_recent=st.integers(1, 15) | st.just(50),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    pad_left=st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(case=packs, seed=st.integers(0, 9))
def test_merged_parts_are_the_reference_in_output_and_gradients(case, seed):
    documents = documents_of(case)
    assert_is_the_reference(case, merged(case, documents), documents, seed)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("kernel", "present"), [(Flash2, flash_2_package), (Flash3, flash_3_package), (TorchFlash, flash_in_torch)]
)
def test_each_package_gets_its_arguments(case, kernel, present):
    documents = documents_of(case)
    with present():
        assert_is_the_reference(case, merged(case, documents, kernel()), documents)


def test_full_attention_is_one_part_that_keeps_documents_apart():
    case = Case(((30, 5), (20,)), w_sink=0, w_recent=99)
    documents = documents_of(case)
    parts = full_parts(documents.lengths, CPU)
    assert len(parts) == 1
    attention = partial(attend_by_parts, documents, parts=parts, scaling=case.sizes["scaling"], kernel=DenseFlash())
    assert_is_the_reference(case, attention, documents)


def test_one_long_document_is_cut_into_views_and_not_copied():
    head, body, sinks = streaming_parts((500,), 4, 100, CPU)
    assert (head.q_rows, head.k_rows) == (slice(0, 103), slice(0, 103))
    assert (body.q_rows, body.k_rows, body.window) == (slice(103, 500), slice(0, 500), (99, 0))
    assert (sinks.q_rows, sinks.k_rows, sinks.window) == (slice(103, 500), slice(0, 4), (-1, -1))


def test_documents_that_see_all_of_themselves_need_one_call():
    (part,) = streaming_parts((5, 103, 90), 4, 100, CPU)
    assert (part.q_rows, part.window, part.cu_seqlens_q.tolist()) == (slice(0, 198), (-1, 0), [0, 5, 108, 198])


def test_a_merge_in_bf16_stays_within_the_rounding_of_bf16():
    case = CASES["packed"]
    documents = documents_of(case)
    *qkv, dout = tensors_of(case, torch.bfloat16)
    found = with_gradients(merged(case, documents), *qkv, dout)
    exact = [x.float() for x in qkv]
    expected = with_gradients(lambda *x: expected_output(case, documents, *x), *exact, dout.float())
    assert all(x.dtype == torch.bfloat16 for x in found)
    assert all((x.float() - y).norm() < 0.01 * y.norm() for x, y in zip(found, expected, strict=True))


def test_the_operators_of_torch_take_the_arguments_given():
    """On fake tensors torch checks the arguments against the operators' schemas and its own shapes, without a GPU."""
    with FakeTensorMode():
        varlen = streaming_parts((96,), 4, 20, torch.device("cuda"))[1].varlen(0.3)
        q, k, v = (torch.empty(73, heads, 16, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        out, lse = TorchFlash().forward(q, k, v, varlen)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 73), torch.float32)
        gradients = TorchFlash().backward(out, q, k, v, out, lse, varlen)
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_the_newest_package_that_runs_on_the_device_is_taken(monkeypatch):
    """Hopper and flash-attn 3 there: that; else flash-attn 2, else torch's own, else none."""
    from lt_train.hybrid import flash_kernels

    choose = flash_kernel.__wrapped__
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)  # a torch built without CUDA
    assert choose((8, 0)) is None
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert isinstance(choose((8, 0)), TorchFlash)
    assert choose((7, 5)) is None
    packages = {"flash_attn"}
    monkeypatch.setattr(flash_kernels, "find_spec", lambda name: name in packages)
    with flash_2_package(), flash_3_package():
        assert isinstance(choose((9, 0)), Flash2)
        packages.add("flash_attn_interface")
        assert isinstance(choose((9, 0)), Flash3)
        assert isinstance(choose((8, 0)), Flash2)


def test_no_flash_package_is_imported_before_it_is_requested():
    assert not {"flash_attn", "flash_attn_interface"} & sys.modules.keys()
