"""The most that is held while something runs: the process's resident set, as Linux counts it, or the tensors alone.

The resident set has what the C library keeps of freed memory, so it depends on what ran in the process before; tensors do not.
"""

import ctypes
import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def resident(what: str) -> int:
    """Bytes: VmRSS, held now; RssAnon, of that what no file holds; or VmHWM, the most that was held since the last reset."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(run: Callable[[], None]) -> int:
    """Bytes that the process held at its peak while `run` ran, less what it held before.

    Libraries that a first run loads count too: run something small before.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; see proc(5)
    run()
    return resident("VmHWM") - before


def cuda_peak_of(run: Callable[[], None]) -> int:
    """Bytes of tensors on the GPU at the peak while `run` ran, less those that were there before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def anonymous_peak_of(run: Callable[[], object]) -> int:
    """As `peak_of`, without the pages of mapped files, which the kernel drops when it needs memory. It looks every 5 ms."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = most = resident("RssAnon")
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        over.set()
        watcher.join()
    return max(most, resident("RssAnon")) - before


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, from when they are made until they are freed.

    `held`: tensors that were there before, and do not count where an operation gives a view of them.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, size: int) -> None:
        self.now -= size
