"""Every kernel on a GPU in bf16: output and gradients against the reference in fp32, and the time that they are worth."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from lt_train.hybrid.attention_kernels import KERNELS, LARGEST_ERROR, Use, choose
from lt_train.hybrid.documents import find_documents
from lt_train.hybrid.flash import attend_by_parts, streaming_parts
from lt_train.hybrid.flash_kernels import Flash2, Flash3, TorchFlash
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.hybrid.views import FullView, SplitView, StreamingView
from tests.support.families import BASES, SPLIT, on_base
from tests.support.streaming_cases import CASES, documents_of, expected_output, tensors_of, with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda")


def can(name, head_size=64):
    obstacle = KERNELS[name].obstacle(Use(GPU, torch.bfloat16, head_size, trains=True))
    if obstacle is not None:
        pytest.skip(f"{name}: {obstacle}")


def assert_is_the_reference(case, documents, attention, size=64):
    *qkv, dout = tensors_of(case, torch.bfloat16, GPU, size)
    found = with_gradients(attention, *qkv, dout)
    exact = [x.float() for x in qkv]
    expected = with_gradients(lambda *x: expected_output(case, documents, *x), *exact, dout.float())
    assert all(x.dtype == torch.bfloat16 for x in found)
    # A query that sees one key has no gradient at all: errors there are measured by what is usual, some 0.1 a number.
    usual = [0.1 * y.numel() ** 0.5 for y in expected]
    errors = [float((x.float() - y).norm() / max(y.norm(), least)) for x, y, least in zip(found, expected, usual, strict=True)]
    assert max(errors) < LARGEST_ERROR, errors


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_in_bf16_gives_what_the_reference_gives_in_fp32(name, case):
    can(name)
    documents = documents_of(case, GPU)
    assert_is_the_reference(case, documents, partial(KERNELS[name].streaming, documents, **case.sizes))


@pytest.mark.parametrize("size", [16, 80, 128, 256])
@pytest.mark.parametrize("name", ["blocked", "flash"])
def test_heads_of_every_usual_size(name, size):
    can(name, size)
    case = CASES["packed, rows of unequal length"]
    documents = documents_of(case, GPU)
    assert_is_the_reference(case, documents, partial(KERNELS[name].streaming, documents, **case.sizes), size)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kernel", [Flash3, Flash2, TorchFlash])
def test_every_flash_attention_that_is_installed_gives_what_the_reference_gives(kernel, case):
    try:
        flash = kernel()
    except ImportError as error:
        pytest.skip(str(error))
    if kernel is Flash3 and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("flash-attention 3 needs compute capability 9.x")
    documents = documents_of(case, GPU)
    parts = streaming_parts(documents.lengths, case.w_sink, case.w_recent, GPU)
    attention = partial(attend_by_parts, documents, parts=parts, scaling=case.sizes["scaling"], kernel=flash)
    assert_is_the_reference(case, documents, attention)


@pytest.mark.parametrize("case", ["packed, rows of unequal length", "left-padded", "all shorter than the window"])
def test_full_layers_in_bf16_see_their_own_document_alone(case):
    can("flash")
    documents = documents_of(CASES[case], GPU)
    full = replace(CASES[case], w_sink=0, w_recent=10_000)
    assert_is_the_reference(full, documents, partial(KERNELS["flash"].full, documents, scaling=full.sizes["scaling"]))


@pytest.mark.parametrize("case", ["packed, rows of unequal length", "left-padded", "longer than two tiles", "one group"])
@pytest.mark.parametrize("name", KERNELS)
def test_learned_sinks_in_bf16_give_what_the_reference_gives_in_fp32(name, case):
    """Output and the gradients of q, k, v and of the logits."""
    can(name)
    case = replace(CASES[case], w_sink=0)
    documents, (*qkv, dout) = documents_of(case, GPU), tensors_of(case, torch.bfloat16, GPU, 64)
    sinks = torch.linspace(-2, 3, case.heads[0], device=GPU)

    def computed(kernel, *tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = KERNELS[kernel].streaming(documents, *leaves[:3], **case.sizes, sinks_H=leaves[3])
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    found, expected = computed(name, *qkv, sinks), computed("reference", *(x.float() for x in qkv), sinks)
    errors = [float((x.float() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
    assert max(errors) < LARGEST_ERROR, errors


def test_auto_takes_flash_attention_for_bf16():
    choice = choose("auto", Use(GPU, torch.bfloat16, 128, trains=True))
    assert choice.name == "flash", choice.reason


SLIDING = on_base(BASES["olmo3"], HybridSpec(4, (1, 3), w_sink=3, w_recent=7))
MODELS = {
    "layers": ("qwen3", HybridSpec(4, (1, 3), w_sink=3, w_recent=7)),
    "KV heads": ("qwen3", SPLIT),
    "sliding layers": ("olmo3", SLIDING),
    "sliding layers and KV heads": ("olmo3", on_base(BASES["olmo3"], SPLIT)),
    "learned sinks of the base": ("gpt_oss", replace(SLIDING, sliding_window=BASES["gpt_oss"].sliding_window)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", KERNELS)
def test_whole_models_in_bf16_train_like_the_reference(name, kind):
    """Packed and padded rows, with gradient checkpointing."""
    can(name, head_size=16)
    family, spec = MODELS[kind]
    config = deepcopy(BASES[family])
    config.hidden_size = 16 * config.num_attention_heads
    hybrid = build_hybrid(config, spec).to(GPU, torch.bfloat16).train()
    hybrid.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(2, 96, (2, 60), device=GPU)
    mask, positions = torch.ones_like(ids), torch.zeros_like(ids)
    positions[0] = torch.cat([torch.arange(45), torch.arange(15)])
    mask[1, :40], positions[1, 40:] = 0, torch.arange(20)

    def gradients(kernel):
        hybrid.set_attention_kernel(kernel)
        hybrid.zero_grad()
        hybrid(ids, attention_mask=mask, position_ids=positions, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        return torch.cat([parameter.grad.flatten().float() for parameter in hybrid.parameters()])

    expected = gradients("reference")
    assert (gradients(name) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "case", ["packed, rows of unequal length", "left-padded", "longer than two tiles", "five heads to a group"]
)
@pytest.mark.parametrize("name", KERNELS)
def test_split_layers_in_bf16_are_the_reference_of_each_head(name, case):
    """Output and gradients: one of two KV heads streams, and the other sees all of its document."""
    can(name)
    case = CASES[case]
    documents, module = documents_of(case, GPU), torch.nn.Module()
    module.layer_idx, module.is_causal, module.num_key_value_groups = 0, True, case.heads[0] // case.heads[1]
    spec = HybridSpec.from_streaming_heads([(1,)], 2, case.w_sink, case.w_recent)
    view = SplitView(FullView(documents, name), StreamingView(documents, spec, name), (1,))
    scaling, queries = case.sizes["scaling"], case.heads[0] // 2

    def by_head(q, k, v):
        everything = replace(case, w_sink=0, w_recent=10_000)
        halves = zip((everything, case), q.split(queries, dim=1), k.split(1, dim=1), v.split(1, dim=1), strict=True)
        return torch.cat([expected_output(each, documents, *qkv) for each, *qkv in halves], dim=1)

    *qkv, dout = tensors_of(case, torch.bfloat16, GPU, 64)
    found = with_gradients(lambda *x: view.attend(module, *x, scaling, 0.0).transpose(1, 2), *qkv, dout)
    expected = with_gradients(by_head, *(x.float() for x in qkv), dout.float())
    errors = [float((x.float() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
    assert max(errors) < LARGEST_ERROR, errors


@pytest.mark.slow
def test_streaming_beats_full_causal_flash_attention_from_16k_tokens_on():
    """Forward and backward, 32 heads to 8 of keys and values, of 128 numbers, window 1,020; medians, one run. Prints the table."""
    can("flash", head_size=128)
    ratios = {}
    for length in (4096, 8192, 16384, 32768, 65536):
        shapes = [(1, heads, length, 128) for heads in (32, 8, 8, 32)]
        *qkv, dout = (torch.randn(shape, device=GPU, dtype=torch.bfloat16) for shape in shapes)
        documents = find_documents(1, length, GPU, None, None)
        streaming = partial(KERNELS["flash"].streaming, documents, w_sink=4, w_recent=1020, scaling=128**-0.5)
        full = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        times = []
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            for attention in (full, streaming):
                work = {"step": with_gradients, "given": (attention, *qkv, dout)}
                times.append(Timer("step(*given)", globals=work).blocked_autorange(min_run_time=1).median)
        ratios[length] = times[0] / times[1]
        full_ms, streaming_ms = (1e3 * time for time in times)
        print(f"{length:>6} tokens  full {full_ms:8.2f} ms  streaming {streaming_ms:8.2f} ms  {ratios[length]:5.2f}x")
    assert ratios[16384] > 1.5 and ratios[65536] > ratios[16384]
