"""The time that a decoding step cannot fall below on this machine, by what it reads and multiplies (doi 10.1145/1498765)."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.devices import compute_device, wait_for
from lt_train.runtime.units import GIB, MIB

RUNS = 3
COPIED, MATRIX = {"cpu": 256 * MIB, "cuda": GIB}, {"cpu": 2048, "cuda": 8192}
"""By type of device: bytes of a copy, rows of square matrices. Both are larger than a cache."""


@dataclass(frozen=True)
class Rates:
    """The highest rates of this machine. bandwidth: bytes per second, read and written. products: operations per second."""

    bandwidth: float
    products: float

    def seconds(self, moved_bytes: float, operations: float) -> float:
        return max(moved_bytes / self.bandwidth, operations / self.products)

    def step_seconds(self, model: HybridForCausalLM, rows: int, kv_bytes: int, tokens: int = 1) -> float:
        """One step of `rows` sequences, `tokens` of each: the products of the weights (not of experts), then attention.

        Args:
            kv_bytes: keys and values of all sequences. Each number takes two operations for every query head it serves.
        """
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        elements = sum(weight.numel() for weight in weights)
        config = model.config
        grouped = config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)
        attention = 2 * grouped * tokens * kv_bytes / model.dtype.itemsize
        products = self.seconds(sum(weight.nbytes for weight in weights), 2 * rows * tokens * elements)
        return products + self.seconds(kv_bytes, attention)


def measure_rates(dtype: torch.dtype) -> Rates:
    kind = compute_device().type
    return Rates(copy_rate(COPIED[kind]), product_rate(MATRIX[kind], dtype))


def copy_rate(size: int) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(size // 4, device=compute_device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source))


def product_rate(rows: int, dtype: torch.dtype) -> float:
    """Operations per second."""
    a, b = (torch.randn(rows, rows, device=compute_device(), dtype=dtype) for _ in range(2))
    return 2 * rows**3 / _least_seconds(lambda: a @ b)


def _least_seconds(run: Callable[[], object]) -> float:
    def seconds() -> float:
        started = time.perf_counter()
        run()
        wait_for(compute_device())
        return time.perf_counter() - started

    seconds()
    return min(seconds() for _ in range(RUNS))
