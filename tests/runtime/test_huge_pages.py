"""What the engine reads in every step lies in huge pages, where the system has them."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.kv_store import KVStore
from lt_train.inference.packed_weights import PackedLinear, obstacle_here
from lt_train.runtime import huge_pages
from lt_train.runtime.huge_pages import huge_zeros
from tests.support.tiny_engine import tiny_model

CPU = torch.device("cpu")
MAPPINGS = Path("/proc/self/smaps")

has_huge_pages = pytest.mark.skipif(
    not MAPPINGS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a Linux with huge pages"
)


def is_in_huge_pages(tensor: Tensor) -> bool:
    """Whether the system was requested to use huge pages where this tensor lies."""
    here = False
    for line in MAPPINGS.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and ":" not in first:
            start, end = (int(address, 16) for address in first.split("-"))
            here = start <= tensor.data_ptr() < end
        elif here and first == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError("the tensor lies nowhere")


@has_huge_pages
def test_large_tensors_are_in_huge_pages_and_small_ones_are_not() -> None:
    large = huge_zeros((3, 2**20), torch.float32, CPU)
    assert is_in_huge_pages(large)
    assert not is_in_huge_pages(torch.zeros(3, 2**20))
    assert not is_in_huge_pages(huge_zeros((3, 8), torch.float32, CPU))


@has_huge_pages
def test_keys_and_values_are_in_huge_pages() -> None:
    store = KVStore(tiny_model(HybridSpec(num_layers=3, lazy_layers=(1,), w_sink=2, w_recent=6)), slots=20_000, pages=600)
    assert all(is_in_huge_pages(held.values) for held in store.held)


@has_huge_pages
@pytest.mark.skipif(obstacle_here() is not None, reason="no weights are packed on this CPU")
def test_packed_weights_are_in_huge_pages() -> None:
    assert is_in_huge_pages(PackedLinear(torch.nn.Linear(1024, 1024)).packed)


@pytest.mark.parametrize("shape", [(3, 2**20), (5, 7), (2, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_zeros_of_the_shape(shape, dtype) -> None:
    zeros = huge_zeros(shape, dtype, CPU)
    assert zeros.shape == shape
    assert zeros.dtype == dtype
    assert zeros.is_contiguous()
    assert not zeros.any()


def test_where_the_system_has_none_they_are_zeros_of_torch(monkeypatch) -> None:
    def refuses(*arguments, **settings):
        raise OSError("Invalid argument")

    monkeypatch.setattr(huge_pages.mmap, "mmap", refuses)
    assert huge_zeros((3, 2**20), torch.float32, CPU).shape == (3, 2**20)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_zeros((3, 2**20), torch.float32, CPU).shape == (3, 2**20)
    assert huge_zeros((3, 2**20), torch.float32, torch.device("meta")).is_meta
