"""The attention of a decoding step to blocks of keys is that of a dense mask, for every type of cache.

In C as on a CPU, for this processor and for those without AVX-512, and in Triton: on a GPU, elsewhere in Triton's interpreter.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from lt_train.hybrid.mask import streaming_visible
from lt_train.hybrid.reference import masked_attention
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference import compiled_attention, compiled_c, triton_attention
from lt_train.inference.block_attention import obstacle
from lt_train.inference.key_blocks import KeyBlocks, ring_blocks
from lt_train.inference.kv_store import RingLayer
from tests.support.avx2 import RUNS_AVX2, compiled_for_avx2

CPU = torch.device("cpu")
BLOCK = 128
HEADS, REST, SIZE, SCALING = 2, 3, 24, 24**-0.5
SEEN_BT = torch.tensor([[5, 6], [127, 128], [128, 129], [300, 301], [1, 2]])

NO_COMPILER = compiled_attention.obstacle(torch.float32)


@pytest.fixture(params=["C", "C for AVX2", pytest.param("Triton", marks=pytest.mark.gpu)])
def attend_blocks(request, monkeypatch):
    if request.param == "Triton":
        monkeypatch.setattr(triton_attention, "_PROGRAMS", 40)  # which its interpreter runs one after the other
        return on_triton_device
    if NO_COMPILER is not None:
        pytest.skip(NO_COMPILER)
    if request.param == "C for AVX2":
        if not RUNS_AVX2:
            pytest.skip("this processor has no AVX2")
        monkeypatch.setattr(compiled_attention, "compiled", compiled_for_avx2)
    return compiled_attention.attend_blocks


def on_triton_device(q_BGQD, keys, values, blocks, scaling, sinks_GQ):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q_BGQD, keys, values = (x.to(device) for x in (q_BGQD, keys, values))
    sinks_GQ = None if sinks_GQ is None else sinks_GQ.to(device)
    return triton_attention.attend_blocks(q_BGQD, keys, values, blocks.to(device), scaling, sinks_GQ).cpu()


def drawn(dtype, scale=1.0, size=SIZE):
    """Pages of all rows in a random order, and the queries of two new tokens of each row."""
    pages_B = [-(-int(seen) // BLOCK) for seen in SEEN_BT[:, -1]]
    rng = torch.Generator().manual_seed(0)
    page_N = torch.randperm(sum(pages_B), generator=rng)
    kv_2NGPD = scale * torch.randn(2, len(page_N), HEADS, BLOCK, size, generator=rng)
    q_BGQD = scale * torch.randn(len(pages_B), HEADS, REST * 2, size, generator=rng)
    first_B = torch.tensor([0, *pages_B]).cumsum(0)
    blocks = KeyBlocks.of_one_length(page_N * HEADS * BLOCK * size, BLOCK, first_B, SEEN_BT, BLOCK * size)
    return q_BGQD.to(dtype), *kv_2NGPD.to(dtype), blocks, page_N


def by_mask(q_BGQD, keys, values, first_B, page_N, sinks_GQ=None):
    outs = []
    for row, q_GQD in enumerate(q_BGQD):
        k_GKD, v_GKD = (x[page_N[first_B[row] : first_B[row + 1]]].transpose(0, 1).flatten(1, 2) for x in (keys, values))
        visible_QK = torch.arange(k_GKD.shape[1]) < SEEN_BT[row].repeat(REST)[:, None]
        q_as_heads = q_GQD.flatten(0, 1)[None, :, None]
        heads = [x.repeat_interleave(q_GQD.shape[1], 0)[None] for x in (k_GKD, v_GKD)]
        outs += [
            masked_attention(q, k, v, visible[None, None], SCALING, sink)
            for q, k, v, visible, sink in zip(
                q_as_heads.split(1, 1),
                heads[0].split(1, 1),
                heads[1].split(1, 1),
                visible_QK.repeat(HEADS, 1),
                [None] * q_as_heads.shape[1] if sinks_GQ is None else sinks_GQ.flatten().split(1),
                strict=True,
            )
        ]
    return torch.cat(outs).reshape(q_BGQD.shape)


@pytest.mark.parametrize(
    "dtype, scale, size",
    [
        (torch.float32, 1.0, SIZE),
        (torch.float32, 4.0, SIZE),
        (torch.float32, 1.0, 80),  # dimensions beyond those whose sums stay in registers
        (torch.bfloat16, 1.0, 20),  # no multiple of a vector
        (torch.bfloat16, 4.0, SIZE),
        (torch.float16, 4.0, SIZE),
    ],
)
def test_each_query_attends_to_the_keys_that_it_sees(attend_blocks, dtype, scale, size):
    if attend_blocks is on_triton_device and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter has no products in bfloat16")
    q, keys, values, blocks, page_N = drawn(dtype, scale, size)
    found = attend_blocks(q, keys, values, blocks, SCALING, None)
    exact = by_mask(*(x.double() for x in (q, keys, values)), blocks.first_B, page_N)
    rounded = attend_blocks is on_triton_device and dtype != torch.float32  # the weights are, for a product with the values
    assert float((found - exact).norm() / exact.norm()) < (4e-3 if rounded else 3e-6)


def test_learned_sinks_take_their_share(attend_blocks):
    q, keys, values, blocks, page_N = drawn(torch.float32)
    sinks_GQ = torch.randn(HEADS, REST * 2, generator=torch.Generator().manual_seed(1))
    exact = by_mask(*(x.double() for x in (q, keys, values)), blocks.first_B, page_N, sinks_GQ.double())
    torch.testing.assert_close(attend_blocks(q, keys, values, blocks, SCALING, sinks_GQ), exact.float())


def test_a_row_is_the_same_to_the_last_bit_whatever_shares_the_batch():
    attend_blocks = compiled_attention.attend_blocks
    q, keys, values, blocks, _ = drawn(torch.float32)
    together = attend_blocks(q, keys, values, blocks, SCALING, None)
    for row in range(len(q)):
        start_N = blocks.start_N[blocks.first_B[row] : blocks.first_B[row + 1]]
        first_B = torch.tensor([0, len(start_N)])
        alone = KeyBlocks.of_one_length(start_N, BLOCK, first_B, SEEN_BT[row : row + 1], blocks.head_stride)
        assert torch.equal(attend_blocks(q[row : row + 1], keys, values, alone, SCALING, None)[0], together[row])


@pytest.mark.parametrize(
    ("w_sink", "w_recent", "spare", "tokens"),
    [(4, 200, 0, 1), (4, 200, 0, 5), (4, 200, 7, 1), (0, 30, 4, 1), (3, 6, 5, 5), (150, 40, 0, 5)],
)
def test_new_tokens_see_sinks_and_window_in_a_ring_that_holds_more(attend_blocks, w_sink, w_recent, spare, tokens):
    """Rows in which the ring is being filled, is full, and has turned, with what it holds beyond the window of a token."""
    spare = max(spare, tokens - 1)
    spec, first = HybridSpec(1, (0,), w_sink, w_recent), [0, 1, 2, 5, 33, 203, 204, 205, 611]
    rng = torch.Generator().manual_seed(0)
    layer = RingLayer(torch.full((2, len(first), HEADS, w_sink + w_recent + spare, SIZE), torch.nan), spec)
    q_BGQD = torch.randn(len(first), HEADS, REST * tokens, SIZE, generator=rng)
    expected = torch.empty_like(q_BGQD)
    position_BT = torch.tensor(first)[:, None] + torch.arange(tokens)
    for row, position_T in enumerate(position_BT):
        k_GKD, v_GKD = torch.randn(2, HEADS, int(position_T[-1]) + 1, SIZE, generator=rng)
        layer.write(row, k_GKD, v_GKD, 0)
        visible_TK = streaming_visible(position_T[:, None], torch.arange(k_GKD.shape[1]), w_sink, w_recent)
        scores_GQK = SCALING * q_BGQD[row].double() @ k_GKD.double().mT
        scores_GQK.masked_fill_(~visible_TK.repeat(REST, 1), float("-inf"))
        expected[row] = (scores_GQK.softmax(-1) @ v_GKD.double()).float()
    found = attend_blocks(q_BGQD, layer.keys, layer.values, ring_blocks(layer, position_BT), SCALING, None)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


def test_a_profile_of_operators_shows_it():
    q, keys, values, blocks, _ = drawn(torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        compiled_attention.attend_blocks(q, keys, values, blocks, SCALING, None)
    assert "compiled attention" in {event.name for event in profiled.events()}


def test_the_sums_of_other_code_are_not_changed_by_loading_it():
    """Options such as -ffast-math would switch denormal numbers off for the process."""
    assert obstacle(CPU, torch.float32) is None
    assert float(torch.tensor(1e-39) * 1) > 0


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_a_later_process_loads_what_was_compiled_for_this_processor_by_this_compiler(tmp_path, monkeypatch):
    def compiled(*flags):
        return compiled_c.compiled.__wrapped__("decode_attention.c", *flags)._name

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled()
    (kept,) = (tmp_path / "lt_train").iterdir()
    kept.write_bytes(b"damaged")
    assert compiled() != str(kept) == compiled()
    assert compiled("-DBF16") != str(kept) != compiled("-march=x86-64-v3" if RUNS_AVX2 else "-O2")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # nothing can be written there
    assert compiled() != str(kept)
    monkeypatch.setenv("XDG_CACHE_HOME", "~")  # nor is there a home
    assert compiled() != str(kept) and not Path("~").exists()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C compiler"), (sys.executable, "fails: "), ("true", "cannot be loaded")],
)
def test_without_a_compiler_that_works_it_says_why(compiler, reason, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(compiled_attention, "compiled", compiled_attention.compiled.__wrapped__)  # nothing is kept
    assert reason in compiled_attention.obstacle.__wrapped__(torch.float32)


def test_what_it_does_not_compute_has_an_obstacle():
    assert obstacle(CPU, torch.float64) == "the cache is in float64"
    assert obstacle(torch.device("cuda"), torch.float64) == "the cache is in float64"
    assert obstacle(torch.device("xpu"), torch.float32) == "the model is on xpu"


def test_where_triton_fails_it_says_why(monkeypatch):
    def fails(*arguments, **sizes):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    assert triton_attention.obstacle(CPU, torch.float32) is None
    monkeypatch.setattr(triton_attention, "_attend_part", defaultdict(lambda: fails))
    assert triton_attention.obstacle(CPU, torch.float32) == "Triton fails: Failed to find C compiler."


def test_without_triton_a_gpu_has_an_obstacle(monkeypatch):
    monkeypatch.delattr("lt_train.inference.triton_attention")
    monkeypatch.setitem(sys.modules, "lt_train.inference.triton_attention", None)
    assert "Triton cannot be imported" in obstacle.__wrapped__(torch.device("cuda"), torch.bfloat16)
