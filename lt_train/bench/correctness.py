"""Whether attention is computed correctly on this device: kernels, training steps and generation against slow, exact computations.

Shapes: B rows, T columns, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config

from lt_train.bench.base import RandomBase
from lt_train.bench.checks import CannotRun, Check, Finding, within
from lt_train.hybrid.attention_kernels import KERNELS, LARGEST_ERROR, Kernel, Use, choose
from lt_train.hybrid.documents import Documents, find_documents
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.kv_store import KVStore, pages_for
from lt_train.inference.runner import ModelRunner
from lt_train.inference.step_graphs import STEPS_BEFORE_CAPTURE
from lt_train.runtime.devices import compute_device, compute_dtype, dtype_name

HEAD_SIZE = 64
W_SINK, W_RECENT = 5, 40
LIMITS = {torch.float32: 1e-4, torch.bfloat16: LARGEST_ERROR}
"""Relative errors that a correct kernel stays below."""

SPEC = HybridSpec(4, (0, 2), W_SINK, W_RECENT)
MODEL = Qwen3Config(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=SPEC.num_layers,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_SIZE,
    initializer_range=0.1,  # attention that is nearly uniform would hide an incorrect window
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


@dataclass(frozen=True)
class KernelCase:
    """Documents in one row, shorter and longer than sinks and window. dtype None: fp32 where the kernel computes in it."""

    key: str
    title: str
    lengths: tuple[int, ...] = (253,)
    learned_sinks: bool = False
    dtype: torch.dtype | None = None


CASES = (
    KernelCase("one_document", "one document"),
    KernelCase("packed", "packed documents", lengths=(3, 153, 30, 67)),
    KernelCase("learned_sinks", "learned sinks", learned_sinks=True),
    KernelCase("bf16", "packed, bf16", lengths=(3, 153, 30, 67), dtype=torch.bfloat16),
)


def kernel_checks() -> Iterator[Check]:
    """Outputs and gradients of every kernel against the reference in fp32."""
    for name, kernel in KERNELS.items():
        if name != "reference":
            for case in CASES:
                yield Check(f"kernel.{name}.{case.key}", f"{name}: {case.title}", partial(_compare_kernel, kernel, case))


def _compare_kernel(kernel: Kernel, case: KernelCase) -> Finding:
    device = compute_device()
    dtypes = (torch.float32, torch.bfloat16) if case.dtype is None else (case.dtype,)
    obstacles = {dtype: kernel.obstacle(Use(device, dtype, HEAD_SIZE, trains=True)) for dtype in dtypes}
    dtype = next((dtype for dtype in dtypes if obstacles[dtype] is None), dtypes[-1])
    if (obstacle := obstacles[dtype]) is not None:
        if obstacle.faulty:
            return Finding(obstacle.reason, passed=False)
        raise CannotRun(obstacle.reason)
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, sum(case.lengths), HEAD_SIZE, generator=rng) for heads in (4, 2, 2, 4)]
    *qkv, dout_BHTD = (x.to(device, dtype) for x in drawn)
    sinks_H = [torch.randn(4, generator=rng).to(device)] if case.learned_sinks else []
    position_1T = torch.cat([torch.arange(length) for length in case.lengths])[None]
    documents = find_documents(1, sum(case.lengths), device, None, position_1T)
    inputs = [*qkv, *sinks_H]
    compared = partial(_outputs_and_gradients, documents, dout_BHTD)
    found = compared(partial(kernel.streaming, w_sink=W_SINK, w_recent=W_RECENT), inputs)
    reference = KERNELS["reference"].streaming
    exact = compared(partial(reference, w_sink=W_SINK, w_recent=W_RECENT), [x.float() for x in inputs])
    if kernel.full is not None:
        found += compared(kernel.full, qkv)
        exact += compared(partial(reference, w_sink=0, w_recent=sum(case.lengths)), [x.float() for x in qkv])
    errors = torch.stack([(x.float() - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)])
    return within(float(errors.max()), LIMITS[dtype])  # a NaN is the largest


def _outputs_and_gradients(
    documents: Documents, dout_BHTD: Tensor, attention: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The output and the gradients of queries, keys, values and, where there is a fourth input, learned sinks."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    sinks = {"sinks_H": leaves[3]} if len(leaves) > 3 else {}
    out_BHTD = attention(documents, *leaves[:3], scaling=HEAD_SIZE**-0.5, **sinks)
    return [out_BHTD.detach(), *torch.autograd.grad(out_BHTD, leaves, dout_BHTD.to(out_BHTD.dtype))]


def model_checks() -> Iterator[Check]:
    yield Check("training_steps", "training steps", _compare_training)
    yield Check("generation", "generation with cache", _compare_generation)
    yield Check("engine", "decoding by the engine", _compare_engine)


def _compare_training(steps: int = 4) -> Finding:
    """A few steps of AdamW on packed documents, by the kernel of `auto` and by the reference, from the same weights."""
    dtype = compute_dtype("auto")
    kernel = choose("auto", Use(compute_device(), dtype, HEAD_SIZE, trains=True)).name
    ours, exact = (_training_losses(name, steps) for name in (kernel, "reference"))
    error = float((torch.tensor(ours) / torch.tensor(exact) - 1).abs().max())
    finding = within(error, LIMITS[dtype])
    return Finding(f"{kernel}, {dtype_name(dtype)}, {steps} steps: {finding.text} of the losses", finding.numbers, finding.passed)


def _training_losses(kernel: str, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = RandomBase("", MODEL).for_inference(SPEC).train()
    model.set_attention_kernel(kernel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lengths, losses = (3, 100, 153), []
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(2, MODEL.vocab_size, (1, sum(lengths)), device=model.device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(model.device),
    }
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _compare_generation(new_tokens: int = 24) -> Finding:
    """Greedy tokens of left-padded rows, in fp32, by the sink and ring cache and by recomputing each step."""
    torch.manual_seed(0)
    model = RandomBase("", MODEL, dtype="fp32").for_inference(SPEC)
    lengths = (3, 60, 90)
    mask_BT = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long().to(model.device)
    ids_BT = torch.randint(2, MODEL.vocab_size, mask_BT.shape, device=model.device) * mask_BT
    greedy = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, "eos_token_id": None}
    cached, recomputed = (
        model.generate(ids_BT, attention_mask=mask_BT, generation_config=GenerationConfig(**greedy, use_cache=use_cache))
        for use_cache in (True, False)
    )
    return _equal_tokens(cached[:, mask_BT.shape[1] :], recomputed[:, mask_BT.shape[1] :])


@torch.inference_mode()
def _compare_engine(captured_steps: int = 8) -> Finding:
    """Greedy tokens, in fp32, by the engine's steps, on a GPU the last of them by a CUDA graph, and by reading all at once."""
    torch.manual_seed(0)
    model = RandomBase("", MODEL, dtype="fp32").for_inference(SPEC)
    prompts = [torch.randint(2, MODEL.vocab_size, (length,)).tolist() for length in (3, 60, 150)]
    steps = STEPS_BEFORE_CAPTURE + captured_steps
    store = KVStore(model, len(prompts), sum(pages_for(len(prompt) + steps) for prompt in prompts))
    for prompt in prompts:
        store.admit(len(prompt) + steps)
    runner = ModelRunner(model, store, prefill_chunk=64)
    tokens = [runner.prefill(list(enumerate(prompts))).argmax(-1).tolist()]
    for _ in range(steps):
        tokens.append(runner.step(tokens[-1]).argmax(-1).tolist())
    found_BT = torch.tensor(tokens).T
    read = [torch.tensor([prompt + new.tolist()], device=model.device) for prompt, new in zip(prompts, found_BT, strict=True)]
    expected = [model(ids_1T).logits[0, -steps - 2 : -1].argmax(-1).cpu() for ids_1T in read]
    finding = _equal_tokens(found_BT, torch.stack(expected))
    if runner.graphs is None:
        return finding
    failure = runner.graphs.failure
    how = "the last by a CUDA graph" if failure is None else f"Python starts every kernel: {failure}"
    return Finding(f"{finding.text}; {how}", finding.numbers, finding.passed)


def _equal_tokens(found_BT: Tensor, expected_BT: Tensor) -> Finding:
    equal, count = int((found_BT == expected_BT).sum()), found_BT.numel()
    return Finding(f"{equal} of {count} tokens are those without cache", {"equal": equal, "tokens": count}, equal == count)
