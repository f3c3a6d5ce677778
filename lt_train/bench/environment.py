"""The environment of a bug report: versions, devices, the attention kernels that train here, and the obstacles of the others."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lt_train.hybrid.attention_kernels import KERNELS, Use, choose
from lt_train.inference.block_attention import obstacle
from lt_train.runtime.devices import compute_device, compute_dtype
from lt_train.runtime.units import format_bytes

PACKAGES = (
    *("lt-train", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "tokenizers", "wandb"),
    *("flash-attn", "triton", "vllm", "openai", "math-verify"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "WANDB_MODE")
"""Environment variables that change what a command does. None of them is secret."""
HEAD_SIZE = 128


@dataclass(frozen=True)
class KernelReport:
    """Whether a kernel of `model.attention` trains on this device, and the obstacle if it does not."""

    name: str
    works: bool
    chosen: bool
    obstacle: str | None


@dataclass(frozen=True)
class Environment:
    """Memory and disk in bytes; `packages`: versions, None for one that is not installed."""

    python: str
    system: str
    packages: dict[str, str | None]
    devices: list[str]
    cpu_threads: int
    memory: int
    memory_free: int
    disk_free: int
    dtype: str
    kernels: list[KernelReport]
    decode_attention: str
    """What computes the attention of a decoding step here, and why."""
    variables: dict[str, str]


def read_environment() -> Environment:
    memory = psutil.virtual_memory()
    return Environment(
        python=sys.version.split()[0],
        system=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        devices=_devices(),
        cpu_threads=torch.get_num_threads(),
        memory=memory.total,
        memory_free=memory.available,
        disk_free=shutil.disk_usage(Path.cwd()).free,
        dtype=str(compute_dtype("auto")).removeprefix("torch."),
        kernels=_kernels(),
        decode_attention=_decode_attention(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def show_environment(found: Environment, console: Console) -> None:
    installed = [f"{name} {number}" for name, number in found.packages.items() if number]
    missing = [name for name, number in found.packages.items() if not number]
    lines = [
        ("python", f"{found.python} on {found.system}"),
        ("packages", ", ".join(installed)),
        *([("missing", ", ".join(missing))] if missing else []),
        *(("device", device) for device in found.devices),
        ("memory", f"{format_bytes(found.memory_free)} of {format_bytes(found.memory)} free"),
        ("disk", f"{format_bytes(found.disk_free)} free in {Path.cwd()}"),
        ("dtype", f"{found.dtype}, as `auto` chooses here"),
        ("decoding", found.decode_attention),
        *(("variable", f"{name}={value}") for name, value in found.variables.items()),
    ]
    for label, text in lines:
        console.print(f"{label:<11}{text}", markup=False, highlight=False, soft_wrap=True)
    table = Table("attention", "trains", "why", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for kernel in found.kernels:
        why = kernel.obstacle or ("what `auto` takes" if kernel.chosen else "")
        table.add_row(kernel.name, "yes" if kernel.works else "no", why)
    console.print(table, markup=False, highlight=False)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        device = compute_device()
        threads = torch.get_num_threads()
        cpu = f"CPU: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"
        return [cpu if device.type == "cpu" else f"{device.type}, and a {cpu}"]
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        devices.append(f"{device.name}, {format_bytes(device.total_memory)}, {capability}, CUDA {torch.version.cuda}")
    return devices


def _decode_attention() -> str:
    device = compute_device()
    problem = obstacle(device, compute_dtype("auto"))
    if problem is not None:
        return f"attention by torch's products: {problem}"
    return "attention compiled for this CPU" if device.type == "cpu" else "attention by kernels of our own in Triton"


def _kernels() -> list[KernelReport]:
    """A report for each kernel, for training in the dtype of `auto` with heads of HEAD_SIZE."""
    use = Use(compute_device(), compute_dtype("auto"), HEAD_SIZE, trains=True)
    chosen, reports = choose("auto", use).name, []
    for name, kernel in KERNELS.items():
        obstacle = kernel.obstacle(use)
        reports.append(KernelReport(name, obstacle is None, name == chosen, obstacle.reason if obstacle else None))
    return reports
