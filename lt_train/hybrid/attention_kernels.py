"""What may compute attention (`model.attention`), what each can do, and what `auto` takes: decided here and nowhere else.

A kernel computes streaming layers, and full layers where it is the better choice for those too. All give the same numbers.
A fast one is compared with the reference on its device, on a small problem, before it is used there.

Shapes: B rows, T columns, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from .blocked import blocked_streaming_attention
from .documents import Documents, find_documents
from .flash import FlashKernel, attend_by_parts, full_parts, streaming_parts
from .flash_kernels import flash_kernel
from .flex import flex_full_attention, flex_streaming_attention
from .reference import reference_streaming_attention
from .spec import HybridError

AUTO = "auto"
_HALF = (torch.bfloat16, torch.float16)
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Use:
    """What attention is to be computed: where, in which numbers, for heads of which size, with gradients or without."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    trains: bool


@dataclass(frozen=True)
class Choice:
    """The kernel that computes, and why it is this one, in words for a log."""

    name: str
    reason: str


class StreamingAttention(Protocol):
    def __call__(
        self, documents: Documents, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, w_sink: int, w_recent: int, scaling: float
    ) -> Tensor:
        """Streaming attention within each document; padding gets zeros. Returns out_BHTD."""
        ...


class FullAttention(Protocol):
    def __call__(self, documents: Documents, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, scaling: float) -> Tensor:
        """Full causal attention within each document; padding gets zeros. Returns out_BHTD."""
        ...


@dataclass(frozen=True)
class Kernel:
    """
    Attributes:
        streaming: computes streaming layers.
        full: computes full layers; None: scaled_dot_product_attention does, one document at a time.
        obstacle: why it cannot do what is asked, and what can; None where it can.
    """

    streaming: StreamingAttention
    full: FullAttention | None
    obstacle: Callable[[Use], str | None]


def choose(name: str, use: Use) -> Choice:
    """The kernel for `use`, by the name in a recipe.

    Raises:
        HybridError: there is no such kernel, or it cannot do what is asked.
    """
    if name == AUTO:
        return _best(use)
    if name not in KERNELS:
        raise HybridError(f"attention: {name}: there are {', '.join([AUTO, *KERNELS])}")
    obstacle = KERNELS[name].obstacle(use)
    if obstacle is not None:
        raise HybridError(f"attention: {name}: {obstacle}")
    return Choice(name, f"as asked{_from(name, use)}")


def kernel_for(name: str, q_BHTD: Tensor, dtype: torch.dtype) -> Kernel:
    """The kernel for these queries, computed in `dtype`. Raises HybridError: see `choose`."""
    trains = torch.is_grad_enabled() and q_BHTD.requires_grad
    return KERNELS[_chosen(name, Use(q_BHTD.device, dtype, q_BHTD.shape[-1], trains)).name]


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of attention on `x`: its own, or autocast's. Rotary embedding hands over fp32 under autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


_chosen = cache(choose)  # once for each device, dtype and head size; all layers and batches ask


def _best(use: Use) -> Choice:
    where, precision = use.device.type, _PRECISIONS.get(use.dtype, str(use.dtype))
    if where != "cuda":
        return Choice("blocked", f"the others are slower, or cannot train, on a device of type {where}")
    if use.dtype not in _HALF:
        return Choice("blocked", f"exact in {precision}; flash attention computes in bf16 and fp16")
    passed_over = []
    for name in ("flash", "flex"):
        obstacle = KERNELS[name].obstacle(use)
        if obstacle is None:
            return Choice(name, "; ".join([f"the fastest for {precision} on this device{_from(name, use)}", *passed_over]))
        passed_over.append(f"not {name}: {obstacle}")
    return Choice("blocked", "; ".join(passed_over))


def _from(name: str, use: Use) -> str:
    kernel = _flash_on(use.device) if name == "flash" else None
    return "" if kernel is None else f" ({kernel.name})"


# The kernels


def _by_document(attention: Callable[..., Tensor]) -> StreamingAttention:
    """A kernel that knows rows of one document each, for any documents."""

    def streaming(documents, q_BHTD, k_BGTD, v_BGTD, *, w_sink, w_recent, scaling):
        one_by_one = partial(attention, w_sink=w_sink, w_recent=w_recent, scaling=scaling)
        return documents.attend(one_by_one, q_BHTD, k_BGTD, v_BGTD)

    return streaming


def _none(use: Use) -> None:
    return None


def _flash_streaming(documents, q_BHTD, k_BGTD, v_BGTD, *, w_sink, w_recent, scaling):
    device = q_BHTD.device
    parts = documents.once(
        ("streaming parts", device, w_sink, w_recent), lambda: streaming_parts(documents.lengths, w_sink, w_recent, device)
    )
    return attend_by_parts(documents, q_BHTD, k_BGTD, v_BGTD, parts=parts, scaling=scaling, kernel=_flash_on(device))


def _flash_full(documents, q_BHTD, k_BGTD, v_BGTD, *, scaling):
    device = q_BHTD.device
    parts = documents.once(("full parts", device), lambda: full_parts(documents.lengths, device))
    return attend_by_parts(documents, q_BHTD, k_BGTD, v_BGTD, parts=parts, scaling=scaling, kernel=_flash_on(device))


def _flash_on(device: torch.device) -> FlashKernel | None:
    return flash_kernel(torch.cuda.get_device_capability(device))


def _flash_obstacle(use: Use) -> str | None:
    if use.device.type != "cuda":
        return f"flash attention needs an NVIDIA GPU, and this runs on {use.device.type}. Set auto"
    if use.dtype not in _HALF:
        return "flash attention computes in bf16 or fp16 only, not in fp32. Set dtype to bf16, or attention to auto"
    if use.head_size % 8 or use.head_size > 256:
        return f"flash attention takes heads of 8, 16, … 256 numbers, this model has {use.head_size}. Set auto"
    try:
        kernel = _flash_on(use.device)
    except ImportError as error:
        return f"the flash-attn package is installed but cannot be loaded ({error}). Build it anew for this torch, or set auto"
    if kernel is None:
        return (
            "neither the flash-attn package nor a flash attention in this torch works on this device (compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(use.device)))}; 8.0 is needed). On a newer device: "
            "pip install 'lt-train[flash]'; else set auto"
        )
    return _fails("flash", use)


def _flex_obstacle(use: Use) -> str | None:
    if use.device.type == "cpu":
        if use.trains:
            return "FlexAttention has no gradients on a CPU. To train, set blocked or auto"
        return None
    if use.device.type != "cuda" or find_spec("triton") is None:
        return f"FlexAttention is compiled by triton, which is not here for {use.device.type}. Set auto"
    if use.dtype not in (*_HALF, torch.float32):
        return "FlexAttention computes in bf16, fp16 or fp32. Set auto"
    if use.head_size < 16:
        return f"FlexAttention takes heads of 16 numbers or more, this model has {use.head_size}. Set auto"
    return _fails("flex", use)


@cache
def _fails(name: str, use: Use) -> str | None:
    """How a compiled kernel fails at a small problem on its device, seen here and not in the middle of a training; None: it works.

    Two packed documents, one shorter than the sinks, one longer than sinks and window; four query heads to two of keys and values.
    """
    w_sink, w_recent, scaling = 5, 40, use.head_size**-0.5
    lengths = (3, 253)
    position_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = find_documents(1, sum(lengths), use.device, None, position_1T)
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, sum(lengths), use.head_size, generator=random) for heads in (4, 2, 2, 4)]
    *qkv, dout = (x.to(use.device, use.dtype) for x in drawn)

    def computed(streaming: StreamingAttention, full: FullAttention, *qkv: Tensor) -> list[Tensor]:
        """Both kinds of layers, output and gradients."""
        found = []
        for attention in (partial(streaming, w_sink=w_sink, w_recent=w_recent), full):
            leaves = [x.detach().requires_grad_(use.trains) for x in qkv]
            out = attention(documents, *leaves, scaling=scaling)
            found += [out.detach(), *(torch.autograd.grad(out, leaves, dout.to(out.dtype)) if use.trains else ())]
        return found

    reference = KERNELS["reference"].streaming
    all_of_it = partial(reference, w_sink=0, w_recent=sum(lengths))
    kernel = KERNELS[name]
    assert kernel.full is not None, "only kernels that compute both kinds of layers are tried"
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(use.trains), torch.autocast(use.device.type, enabled=False):
            found = computed(kernel.streaming, kernel.full, *qkv)
            exact = computed(reference, all_of_it, *(x.float() for x in qkv))
    except RuntimeError as error:  # what torch's operators and compiler raise
        return f"it does not run on this device ({' '.join(str(error).split())[:200]}). Set auto"
    errors = [float((x.float() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]
    if not max(errors) < _WORST:  # a NaN is no smaller
        return f"on this device it gives other numbers than the reference (relative errors {errors}). Set auto"
    return None


_WORST = 0.02
"""Relative error of a kernel that works; rounding to bf16 makes 0.002 to 0.005, a key too many or too few 0.1."""

KERNELS: dict[str, Kernel] = {
    "reference": Kernel(_by_document(reference_streaming_attention), None, _none),
    "blocked": Kernel(_by_document(blocked_streaming_attention), None, _none),
    "flex": Kernel(flex_streaming_attention, flex_full_attention, _flex_obstacle),
    "flash": Kernel(_flash_streaming, _flash_full, _flash_obstacle),
}
