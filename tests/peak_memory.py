"""The largest resident set of this process while something runs, as Linux counts it."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path


def resident(what: str) -> int:
    """Bytes: VmRSS, held now, or VmHWM, the most that was held since the last reset."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(run: Callable[[], None]) -> int:
    """Bytes that the process held at its peak while `run` ran, less what it held before.

    Libraries that a first run loads count too: run something small before.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; see proc(5)
    run()
    return resident("VmHWM") - before
