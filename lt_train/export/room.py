"""Whether the check of an export has room: it holds the model in memory, and a process of its own holds a second copy."""

import resource
from pathlib import Path

import psutil
import torch

from lt_train.export.weights import ExportedHybrid
from lt_train.runtime.devices import compute_device
from lt_train.runtime.units import format_bytes

BESIDE_WEIGHTS = 2**29
"""Bytes for activations, and for the libraries of the second process."""

_LIMITS = {resource.RLIMIT_AS: "VmSize", resource.RLIMIT_DATA: "VmData"}
_CGROUP = Path("/sys/fs/cgroup")


def lacking_room(hybrid: ExportedHybrid, dtype: torch.dtype) -> str | None:
    """Why the check cannot hold the weights; None: it can."""
    count = sum(parameter.numel() for parameter in hybrid.parameters.values())
    exported = count * dtype.itemsize
    loaded = count * hybrid.loaded_dtype.itemsize if hybrid.loaded_dtype else 0
    needed, free = max(loaded, exported * (2 if loaded else 1)) + BESIDE_WEIGHTS, free_host_memory()
    if needed > free:
        return f"it needs {format_bytes(needed)} of memory, and {format_bytes(free)} are free"
    on_gpu = sum(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))
    if loaded and compute_device().type == "cuda" and max(loaded, exported) > on_gpu:
        return f"it needs {format_bytes(max(loaded, exported))} on the GPUs, and {format_bytes(on_gpu)} are free"
    return None


def free_host_memory() -> int:
    """Bytes that this process may still take: what is free, and what limits of the process and of its container leave."""
    free = [psutil.virtual_memory().available]
    used = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()) if Path("/proc").is_dir() else {}
    for limit, name in _LIMITS.items():
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and name in used:
            free.append(soft - int(used[name].split()[0]) * 1024)
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        if most != "max":
            free.append(int(most) - int(stat["anon"]))  # what files hold is given back where it is needed
    except (OSError, KeyError, ValueError):
        pass  # no container, or one of another kind
    return max(min(free), 0)
