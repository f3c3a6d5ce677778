import dataclasses
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lt_train.bench import attention
from lt_train.bench.attention import ON_CPU, KernelTiming, attention_table, bench_attention, time_length
from lt_train.hybrid.attention_kernels import KERNELS, Use
from lt_train.hybrid.mask import streaming_visible

CPU = Use(torch.device("cpu"), torch.float32, 16, trains=True)
SMALL = dataclasses.replace(ON_CPU, heads=4, groups=2, head_size=16)


def printed(thing):
    console = Console(record=True, width=160)
    console.print(thing)
    return [line.split() for line in console.export_text().splitlines()]


def test_the_limit_is_the_ratio_of_pairs_that_see_each_other_and_reached_is_its_share():
    position = torch.arange(100)
    full, streaming = (int(streaming_visible(position[:, None], position, 4, w).sum()) for w in (100, 12))
    (row,) = [
        row
        for row in printed(attention_table([KernelTiming(100, 12, "blocked", milliseconds=2.0, full=5.0)], w_sink=4))
        if "12" in row
    ]
    assert row[-4:] == ["2.50x", f"{full / streaming:.2f}x", f"{250 * streaming / full:.0f}", "%"]


def test_every_kernel_and_window_is_run_forward_and_backward_at_the_length_requested(monkeypatch):
    seen = []

    def streaming(documents, q, k, v, *, w_sink, w_recent, scaling):
        seen.append((tuple(q.shape), tuple(k.shape), w_sink, w_recent, scaling))
        return q * k.sum() * v.sum()

    monkeypatch.setitem(KERNELS, "blocked", SimpleNamespace(streaming=streaming))
    ticks = []
    timings = time_length(SMALL, CPU, 48, ["blocked"], [5, 9], 3, runs=2, advance=lambda: ticks.append(1))
    assert [(t.length, t.w_recent, t.kernel) for t in timings] == [(48, 5, "blocked"), (48, 9, "blocked")]
    assert seen == 3 * [((1, 4, 48, 16), (1, 2, 48, 16), 3, w, 0.25) for w in (5, 9)]  # once to warm up, then two runs in turns
    assert len(ticks) == 2 and all(t.milliseconds > 0 and t.full > 0 for t in timings)


def test_by_default_all_kernels_that_train_on_the_device_are_timed(monkeypatch):
    monkeypatch.setattr(attention, "ON_CPU", dataclasses.replace(SMALL, lengths=(32,)))
    console = Console(record=True, width=160)
    bench_attention((), (), (8,), 4, 1, console)
    text = console.export_text()
    assert "4 query heads, 2 key/value heads, head size 16, float32 on cpu" in text
    assert [line.split()[2] for line in text.splitlines() if line.strip().startswith("32 ")] == ["blocked"]


@pytest.mark.gpu
def test_on_a_gpu_flash_is_timed_too():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    console = Console(record=True, width=160)
    bench_attention((), (4096,), (1020,), 4, 3, console)
    print(text := console.export_text())
    assert {"blocked", "flash"} <= set(text.split())
