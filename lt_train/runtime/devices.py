"""Devices and dtypes that models run with."""

import gc
import os

import psutil  # type: ignore[import-untyped]
import torch

from lt_train.runtime.errors import UserError


def compute_device() -> torch.device:
    """The accelerator of this process (of several processes each has its own), or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # a torch for CUDA names one without a GPU, too
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else accelerator


def device_name(device: torch.device) -> str:
    """Name of a device, such as "cpu, 2 threads" or "NVIDIA H100 80GB HBM3"."""
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work, before a clock is read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor could take there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def release_memory() -> None:
    """Give back what deleted tensors held on accelerators, on all of them: other processes may need it."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def computes_in_bf16() -> bool:
    """Whether the device multiplies bf16 in hardware. CPUs mostly convert instead, several times slower than fp32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as configs write it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of `model.dtype` (auto, bf16 or fp32) on this device; auto: bf16 where the device computes in it, else fp32.

    Raises:
        UserError: bf16 on a GPU that cannot compute in it. A CPU computes in it, slowly.
    """
    if precision == "bf16" and torch.cuda.is_available() and not computes_in_bf16():
        raise UserError(
            f"model.dtype: bf16: {torch.cuda.get_device_name()} does not compute in bf16. Set model.dtype to auto or fp32"
        )
    if precision == "auto":
        return torch.bfloat16 if computes_in_bf16() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
