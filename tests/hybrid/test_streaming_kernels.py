"""Every kernel is the reference, and the reference is the predicate."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_train.hybrid.attention_kernels import KERNELS
from lt_train.hybrid.blocked import blocked_streaming_attention
from lt_train.hybrid.documents import find_documents
from lt_train.hybrid.mask import streaming_visible
from lt_train.hybrid.reference import reference_streaming_attention
from tests.support.dense_flash import DenseFlash
from tests.support.streaming_cases import CASES, documents_of, expected_output, tensors_of, with_gradients


def random_qkv(batch, length, heads, seed, dtype=torch.float32, size=8):
    generator = torch.Generator().manual_seed(seed)
    query_heads, groups = heads
    shapes = [(batch, query_heads, length, size), (batch, groups, length, size), (batch, groups, length, size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype).requires_grad_() for shape in shapes]


def output_and_gradients(attention, q, k, v):
    out = attention(q, k, v)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)  # a loss under which every output counts differently
    return out, torch.autograd.grad((out * weights).sum(), (q, k, v))


def test_a_query_sees_the_sinks_itself_and_the_keys_just_before_it():
    position = torch.arange(8)
    visible = streaming_visible(position[:, None], position[None, :], w_sink=2, w_recent=3)
    seen = [row.nonzero().flatten().tolist() for row in visible]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 3, 4, 5], [0, 1, 4, 5, 6], [0, 1, 5, 6, 7]]


def test_padding_and_empty_slots_are_never_seen():
    assert not streaming_visible(torch.tensor(5), torch.tensor([-1, -3]), w_sink=4, w_recent=9).any()


@pytest.fixture
def flash_on_a_cpu(monkeypatch):
    """A dense stand-in for the flash kernels, which need a GPU."""
    monkeypatch.setattr("lt_train.hybrid.attention_kernels._flash_on", lambda device: DenseFlash())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_gives_what_the_reference_gives(name, case, flash_on_a_cpu):
    documents, kernel = documents_of(case), KERNELS[name]
    *qkv, dout = tensors_of(case, torch.float32)
    expected = with_gradients(lambda *x: expected_output(case, documents, *x), *qkv, dout)
    found = with_gradients(lambda *x: kernel.streaming(documents, *x, **case.sizes), *qkv, dout)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["one document", "packed, rows of unequal length", "left-padded", "all shorter than the window"])
def test_full_layers_see_all_of_their_own_document_and_nothing_else(case, flash_on_a_cpu):
    documents = documents_of(CASES[case])
    q, k, v, _ = tensors_of(CASES[case], torch.float32)
    full = dataclasses.replace(CASES[case], w_sink=0, w_recent=q.shape[2])
    found = KERNELS["flash"].full(documents, q, k, v, scaling=full.sizes["scaling"])
    torch.testing.assert_close(found, expected_output(full, documents, q, k, v), atol=1e-5, rtol=1e-4)


@st.composite
def batches(draw):
    """Rows of packed documents with padding on the left or the right, as lists of document lengths."""
    rows = draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=3))
    return rows, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(batch=batches(), w_sink=st.integers(0, 8), w_recent=st.integers(1, 12), seed=st.integers(0, 9))
def test_documents_are_attended_to_as_if_alone_whatever_shares_their_row(batch, w_sink, w_recent, seed):
    rows, pad_left = batch
    width = max(sum(lengths) for lengths in rows)
    mask, positions, places = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long), []
    for row, lengths in enumerate(rows):
        column = width - sum(lengths) if pad_left else 0
        for length in lengths:
            mask[row, column : column + length] = 1
            positions[row, column : column + length] = torch.arange(length)
            places.append((row, slice(column, column + length)))
            column += length
    documents = find_documents(len(rows), width, torch.device("cpu"), mask, positions)
    q, k, v = random_qkv(len(rows), width, (4, 2), seed)
    sizes = dict(w_sink=w_sink, w_recent=w_recent, scaling=0.3)

    out, gradients = output_and_gradients(
        lambda *x: documents.attend(lambda *y: blocked_streaming_attention(*y, **sizes), *x), q, k, v
    )

    expected = torch.zeros_like(q)
    for row, columns in places:
        expected[row, :, columns] = reference_streaming_attention(*(x[row : row + 1, :, columns] for x in (q, k, v)), **sizes)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)
