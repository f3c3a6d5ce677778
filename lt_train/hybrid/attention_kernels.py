"""The attention kernels (`model.attention`), what each supports, and which one `auto` selects.

A kernel computes streaming layers, and full layers where it is faster for those too. All kernels give the same results. A fast one
is compared with the reference on its device, on a small input, before it is used there.

Shapes: B rows, T columns, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .blocked import blocked_streaming_attention
from .documents import Documents, find_documents
from .flash import AttentionPart, FlashKernel, attend_by_parts, full_parts, streaming_parts
from .flash_kernels import flash_kernel
from .reference import reference_streaming_attention
from .spec import HybridError

AUTO = "auto"
_HALF = (torch.bfloat16, torch.float16)
LARGEST_ERROR = 0.02
"""Relative error that a correct kernel stays below in bf16: rounding causes 0.002 to 0.005, one key too many or too few 0.1."""
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Use:
    """The attention to compute: device, dtype, head size, and whether it needs gradients."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    trains: bool


@dataclass(frozen=True)
class Choice:
    """The selected kernel, and the reason for a log."""

    name: str
    reason: str


class StreamingAttention(Protocol):
    def __call__(
        self,
        documents: Documents,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        w_sink: int,
        w_recent: int,
        scaling: float,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Streaming attention within each document; padding gets zeros. `sinks_H`: learned sinks. Returns out_BHTD."""
        ...


class FullAttention(Protocol):
    def __call__(self, documents: Documents, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, scaling: float) -> Tensor:
        """Full causal attention within each document; padding gets zeros. Returns out_BHTD."""
        ...


@dataclass(frozen=True)
class Obstacle:
    """Why a kernel cannot compute an attention, and the fix. `faulty`: it is here, and its self-test failed."""

    reason: str
    faulty: bool = False

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Kernel:
    """
    Attributes:
        streaming: computes streaming layers.
        full: computes full layers; None: scaled_dot_product_attention computes them, one document at a time.
        obstacle: what keeps it from computing this attention; None: nothing does.
    """

    streaming: StreamingAttention
    full: FullAttention | None
    obstacle: Callable[[Use], Obstacle | None]


def choose(name: str, use: Use) -> Choice:
    """The kernel for `use`, by the name in a recipe.

    Raises:
        HybridError: there is no such kernel, or it cannot compute this attention.
    """
    if name == AUTO:
        return _best(use)
    if name not in KERNELS:
        raise HybridError(unknown_kernel(name))
    obstacle = KERNELS[name].obstacle(use)
    if obstacle is not None:
        raise HybridError(f"attention: {name}: {obstacle}")
    return Choice(name, f"as set in the recipe{_package(name, use)}")


def unknown_kernel(name: str) -> str:
    return f"attention: {name}: no such kernel. Fix: set one of {', '.join([AUTO, *KERNELS])}"


def kernel_for(name: str, q_BHTD: Tensor, dtype: torch.dtype) -> Kernel:
    """The kernel for these queries, computed in `dtype`. Raises HybridError: see `choose`."""
    trains = torch.is_grad_enabled() and q_BHTD.requires_grad
    return KERNELS[_chosen(name, Use(q_BHTD.device, dtype, q_BHTD.shape[-1], trains)).name]


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of attention on `x`: its own, or autocast's. Rotary embedding returns fp32 under autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


_chosen = cache(choose)  # once for each device, dtype and head size; every layer calls it for every batch


def _best(use: Use) -> Choice:
    where, precision = use.device.type, _PRECISIONS.get(use.dtype, str(use.dtype))
    if where != "cuda":
        return Choice("blocked", f"on a device of type {where} the others are slower or have no gradients")
    if use.dtype not in _HALF:
        return Choice("blocked", f"exact in {precision}; flash attention computes in bf16 and fp16")
    obstacle = KERNELS["flash"].obstacle(use)
    if obstacle is None:
        return Choice("flash", f"the fastest for {precision} on this device{_package('flash', use)}")
    return Choice("blocked", f"not flash: {obstacle}")


def _package(name: str, use: Use) -> str:
    kernel = _flash_on(use.device) if name == "flash" else None
    return "" if kernel is None else f" ({kernel.name})"


# The kernels


def _by_document(attention: Callable[..., Tensor]) -> StreamingAttention:
    """A kernel for rows of one document each as one for any documents."""

    def streaming(documents: Documents, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, **settings: Any) -> Tensor:
        one_by_one = partial(attention, **settings)
        return documents.attend(one_by_one, q_BHTD, k_BGTD, v_BGTD)

    return streaming


def _none(use: Use) -> None:
    return None


def _flash_streaming(
    documents: Documents,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    w_sink: int,
    w_recent: int,
    scaling: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    device = q_BHTD.device
    parts = documents.once(
        ("streaming parts", device, w_sink, w_recent), lambda: streaming_parts(documents.lengths, w_sink, w_recent, device)
    )
    return _attend_by_flash(documents, q_BHTD, k_BGTD, v_BGTD, parts, scaling, sinks_H)


def _flash_full(documents: Documents, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, scaling: float) -> Tensor:
    """Where each row is one document torch chooses the kernel, as for the unconverted model: it may be a faster one (cuDNN's)."""
    if documents.fill_rows:
        grouped = q_BHTD.shape[1] != k_BGTD.shape[1]
        return scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, scale=scaling, enable_gqa=grouped)
    device = q_BHTD.device
    parts = documents.once(("full parts", device), lambda: full_parts(documents.lengths, device))
    return _attend_by_flash(documents, q_BHTD, k_BGTD, v_BGTD, parts, scaling)


def _attend_by_flash(
    documents: Documents,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    parts: tuple[AttentionPart, ...],
    scaling: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    kernel = _flash_on(q_BHTD.device)
    assert kernel is not None, "_flash_obstacle refuses a device without flash attention"
    return attend_by_parts(documents, q_BHTD, k_BGTD, v_BGTD, parts=parts, scaling=scaling, kernel=kernel, sinks_H=sinks_H)


def _flash_on(device: torch.device) -> FlashKernel | None:
    return flash_kernel(torch.cuda.get_device_capability(device))


def _flash_obstacle(use: Use) -> Obstacle | None:
    if use.device.type != "cuda":
        return Obstacle(f"flash attention needs an NVIDIA GPU, and the device is {use.device.type}. Fix: set auto")
    if use.dtype not in _HALF:
        return Obstacle("flash attention computes in bf16 or fp16 only, not in fp32. Fix: set dtype to bf16, or attention to auto")
    if use.head_size % 8 or use.head_size > 256:
        return Obstacle(f"flash attention takes head sizes of 8, 16, … 256, and this model has {use.head_size}. Fix: set auto")
    try:
        kernel = _flash_on(use.device)
    except ImportError as error:
        return Obstacle(
            f"the flash-attn package is installed but cannot be loaded ({error}). Fix: rebuild it for this torch, or set auto"
        )
    if kernel is None:
        return Obstacle(
            "neither the flash-attn package nor a flash attention in this torch works on this device (compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(use.device)))}; 8.0 is needed). Fix: on a newer device, "
            "pip install 'lt-train[flash]'; on this one, set auto"
        )
    return _self_test_fault("flash", use)


@cache
def _self_test_fault(name: str, use: Use) -> Obstacle | None:
    """The fault of a compiled kernel on a small input on its device, found before training and not during it; None: it works.

    The input is two packed documents, one shorter than the sinks, one longer than sinks and window, with four query heads and two
    key/value heads.
    """
    w_sink, w_recent, scaling = 5, 40, use.head_size**-0.5
    lengths = (3, 253)
    position_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = find_documents(1, sum(lengths), use.device, None, position_1T)
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, sum(lengths), use.head_size, generator=rng) for heads in (4, 2, 2, 4)]
    *qkv, dout = (x.to(use.device, use.dtype) for x in drawn)

    def computed(streaming: Callable[..., Tensor], full: Callable[..., Tensor], *qkv: Tensor) -> list[Tensor]:
        """Outputs and gradients of both kinds of layers."""
        found: list[Tensor] = []
        for attention in (partial(streaming, w_sink=w_sink, w_recent=w_recent), full):
            leaves = [x.detach().requires_grad_(use.trains) for x in qkv]
            out = attention(documents, *leaves, scaling=scaling)
            found += [out.detach(), *(torch.autograd.grad(out, leaves, dout.to(out.dtype)) if use.trains else ())]
        return found

    reference = KERNELS["reference"].streaming
    full_reference = partial(reference, w_sink=0, w_recent=sum(lengths))
    kernel = KERNELS[name]
    assert kernel.full is not None, "only kernels that compute both kinds of layers are tested"
    try:
        with _apart_from_the_callers_graph(use):
            found = computed(kernel.streaming, kernel.full, *qkv)
            exact = computed(reference, full_reference, *(x.float() for x in qkv))
    except RuntimeError as error:  # what torch's operators and compiler raise
        return Obstacle(f"it does not run on this device ({' '.join(str(error).split())[:200]}). Fix: set auto", faulty=True)
    errors = [float((x.float() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]
    if not max(errors) < LARGEST_ERROR:  # also true of a NaN
        return Obstacle(
            f"on this device its results differ from the reference's (relative errors {errors}). Fix: set auto", faulty=True
        )
    return None


@contextmanager
def _apart_from_the_callers_graph(use: Use) -> Iterator[None]:
    """The first call of a kernel may come from anywhere: under inference mode, autocast, or gradient checkpointing, which would
    count the tensors that the test saves as the layer's own."""
    own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.set_grad_enabled(use.trains), torch.autocast(use.device.type, enabled=False), own:
        yield


KERNELS: dict[str, Kernel] = {
    "reference": Kernel(_by_document(reference_streaming_attention), None, _none),
    "blocked": Kernel(_by_document(blocked_streaming_attention), None, _none),
    "flash": Kernel(_flash_streaming, _flash_full, _flash_obstacle),
}
