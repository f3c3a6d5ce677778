"""The block mask of FlexAttention: what it looks at, and that it is made and compiled once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lt_train.hybrid import flex
from lt_train.hybrid.flex import TILE, block_mask, flex_streaming_attention, rounded_length, tiles_seen
from lt_train.hybrid.mask import streaming_visible
from tests.support.streaming_cases import CASES, Case, documents_of, expected_output, tensors_of

packs = st.builds(
    Case,
    rows=st.lists(st.lists(st.integers(1, 700), min_size=1, max_size=4).map(tuple), min_size=1, max_size=2).map(tuple),
    w_sink=st.sampled_from([0, 1, 4, 128, 300, 3000]),
    w_recent=st.sampled_from([1, 20, 128, 250, 500, 3000]),
    pad_left=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(case=packs)
def test_tiles_with_a_visible_pair_are_looked_at_and_no_others(case):
    """Against a mask of all pairs. A tile marked as fully visible is fully visible; no tile of the window is missed."""
    documents = documents_of(case)
    document_BS, position_BS = flex._places(documents, torch.device("cpu"))
    near = streaming_visible(position_BS[:, :, None], position_BS[:, None, :], case.w_sink, case.w_recent)
    visible_BSS = near & (document_BS[:, :, None] == document_BS[:, None, :])
    tiles = visible_BSS.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).transpose(2, 3)
    some_BQK, all_BQK = tiles_seen(position_BS, case.w_sink, case.w_recent)
    assert torch.equal(some_BQK, tiles.flatten(3).any(-1))
    whole_BQK = tiles.flatten(3).all(-1)
    assert not (all_BQK & ~whole_BQK).any()
    if case.w_sink == 0:
        assert torch.equal(all_BQK, whole_BQK)


@pytest.mark.parametrize("name", ["packed, rows of unequal length", "left-padded", "longer than two tiles"])
def test_the_block_mask_is_the_one_that_torch_makes_from_all_pairs(name):
    case = CASES[name]
    made = block_mask(documents_of(case), case.w_sink, case.w_recent, torch.device("cpu"))
    rows, (_, columns) = len(case.rows), made.seq_lengths
    expected = create_block_mask(made.mask_mod, rows, 1, columns, columns, device="cpu", BLOCK_SIZE=TILE)
    assert torch.equal(made.to_dense(), expected.to_dense())
    for looked_at in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(made, looked_at), getattr(expected, looked_at)), looked_at


def test_all_layers_of_a_kind_share_one_block_mask(monkeypatch):
    made = []
    monkeypatch.setattr(flex, "block_mask", lambda *given: made.append(given) or block_mask(*given))
    case = CASES["packed"]
    documents = documents_of(case)
    q, k, v, _ = tensors_of(case, torch.float32)
    for _ in range(3):
        flex_streaming_attention(documents, q, k, v, **case.sizes)
        flex.flex_full_attention(documents, q, k, v, scaling=0.3)
    assert len(made) == 2


@given(length=st.integers(1, 200_000))
def test_lengths_are_rounded_up_by_a_quarter_at_most(length):
    rounded = rounded_length(length)
    assert length <= rounded <= max(TILE, length * 1.25 + 1) or rounded - length < TILE
    assert rounded % TILE == 0


def test_lengths_are_rounded_to_four_sizes_for_each_doubling():
    assert len({rounded_length(length) for length in range(8193, 16385)}) == 4
    assert rounded_length(32768) == 32768


def test_new_batches_lengths_and_windows_compile_no_new_kernels(monkeypatch):
    """With dynamo's own counter in place of the compiler: one for the first length, one for all others, one for a single tile."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend=counter, fullgraph=True)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    for length in (600, 300, 310, 900, 100, 700, 1000, 450):
        for w_sink, w_recent in ((4, 20), (0, 2000), (3, 100)):
            case = Case(((length - 20, 20),), w_sink=w_sink, w_recent=w_recent)
            q, k, v, _ = tensors_of(case, torch.float32)
            flex_streaming_attention(documents_of(case), q, k, v, **case.sizes)
    assert counter.frame_count <= 3


def test_more_kinds_of_batches_than_torchs_limit_of_kernels_can_be_computed():
    """Head sizes, one row or several, gradients or none: each compiles a kernel, and torch's own limit is 8."""
    torch._dynamo.reset()
    flex.compiled_flex_attention.cache_clear()
    compiled = flex.compiled_flex_attention(backend="eager")
    for size in (16, 24, 32, 40, 48):
        for rows in (1, 2):
            case = Case(rows * ((200, 20),))
            q, k, v, _ = tensors_of(case, torch.float32, size=size)
            documents = documents_of(case)
            mask = flex.block_mask(documents, case.w_sink, case.w_recent, q.device)
            inputs = [torch.nn.functional.pad(x, (0, 0, 0, rounded_length(220) - 220)) for x in (q, k, v)]
            found = compiled(*inputs, block_mask=mask, scale=0.3, enable_gqa=True)[:, :, :220]
            torch.testing.assert_close(found, expected_output(case, documents, q, k, v), atol=1e-5, rtol=1e-4)
