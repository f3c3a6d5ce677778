"""Which kernel computes, and that one which cannot is refused, with the reason and the way out."""

import dataclasses
from functools import cache

import pytest
import torch
import torch.utils.checkpoint

from lt_train.hybrid import attention_kernels
from lt_train.hybrid.attention_kernels import KERNELS, Choice, Obstacle, Use, choose, computed_in
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridError, HybridSpec
from tests.support.dense_flash import DenseFlash, OffByOne, Unbuilt, WrongGradient
from tests.support.families import on_base
from tests.support.streaming_cases import Case, documents_of, expected_output, tensors_of

CPU = Use(torch.device("cpu"), torch.float32, head_size=64, trains=False)
GPU = Use(torch.device("cuda", 0), torch.bfloat16, head_size=128, trains=True)
SPEC = HybridSpec(4, (1, 3), w_sink=3, w_recent=7)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a GPU of compute capability 9.0 on which flash attention runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda capability: DenseFlash())
    monkeypatch.setattr(attention_kernels, "_self_test_fault", lambda name, use: None)


@pytest.fixture
def flash_on_a_cpu(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_flash_on", lambda device: DenseFlash())
    monkeypatch.setitem(KERNELS, "flash", dataclasses.replace(KERNELS["flash"], obstacle=lambda use: None))
    yield
    attention_kernels._chosen.cache_clear()


def without(use, **changes):
    return dataclasses.replace(use, **changes)


def test_auto_takes_blocked_on_a_cpu():
    assert choose("auto", CPU).name == choose("auto", without(CPU, trains=True)).name == "blocked"


def test_auto_takes_flash_on_a_gpu_and_reports_which(on_a_gpu):
    assert choose("auto", GPU) == Choice("flash", "the fastest for bf16 on this device (dense stand-in)")


def test_auto_reports_why_it_takes_no_faster_kernel(on_a_gpu, monkeypatch):
    assert choose("auto", without(GPU, dtype=torch.float32)).name == "blocked"
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda capability: None)
    choice = choose("auto", GPU)
    assert choice.name == "blocked" and "not flash: neither the flash-attn package" in choice.reason


def test_auto_takes_no_kernel_that_failed_its_trial(on_a_gpu, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_self_test_fault", lambda name, use: Obstacle("it is broken"))
    assert choose("auto", GPU) == Choice("blocked", "not flash: it is broken")


def test_what_flash_cannot_do_is_refused_with_the_fix(on_a_gpu, monkeypatch):
    assert choose("flash", GPU).name == "flash"
    for wrong, message in [
        (dict(device=torch.device("cpu")), "needs an NVIDIA GPU.*Fix: set auto"),
        (dict(dtype=torch.float32), "bf16 or fp16 only, not in fp32. Fix: set dtype to bf16"),
        (dict(head_size=60), "this model has 60. Fix: set auto"),
        (dict(head_size=512), "this model has 512. Fix: set auto"),
    ]:
        with pytest.raises(HybridError, match=message):
            choose("flash", without(GPU, **wrong))


def test_a_missing_or_broken_flash_package_is_named(on_a_gpu, monkeypatch):
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda capability: None)
    with pytest.raises(HybridError, match=r"capability 9\.0.*pip install 'lt-train\[flash\]'"):
        choose("flash", GPU)

    def undefined_symbol(capability):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(attention_kernels, "flash_kernel", undefined_symbol)
    with pytest.raises(HybridError, match=r"installed but cannot be loaded \(undefined symbol: _ZN3c10\)"):
        choose("flash", GPU)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(HybridError, match="auto, reference, blocked, flash"):
        choose("eager", CPU)


def test_a_kernel_that_works_passes_its_trial(flash_on_a_cpu):
    assert attention_kernels._self_test_fault("flash", without(CPU, dtype=torch.bfloat16, trains=True)) is None


@pytest.mark.parametrize(
    ("broken", "printed"),
    [
        (OffByOne, "results differ from the reference"),
        (WrongGradient, "results differ from the reference"),
        (Unbuilt, "no kernel image is available"),
    ],
)
def test_a_kernel_that_does_not_work_on_its_device_is_found_out(broken, printed, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_flash_on", lambda device: broken())
    assert printed in str(attention_kernels._self_test_fault.__wrapped__("flash", without(CPU, dtype=torch.bfloat16, trains=True)))


def test_a_trial_leaves_the_rng_of_the_run_as_it_is(flash_on_a_cpu):
    before = torch.get_rng_state()
    attention_kernels._self_test_fault.__wrapped__("flash", without(CPU, dtype=torch.bfloat16, trains=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_first_use_under_gradient_checkpointing_leaves_nothing_in_the_layers_graph(flash_on_a_cpu):
    """The trial runs in the first pass alone; recomputation would miss the tensors that it saved. Seen on an H200."""
    trial = cache(attention_kernels._self_test_fault.__wrapped__)

    def layer(x):
        assert trial("flash", without(CPU, dtype=torch.bfloat16, trains=True)) is None
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3).cos())


def test_attention_is_computed_in_the_dtype_of_autocast():
    x = torch.zeros(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert computed_in(x) == torch.bfloat16
    assert computed_in(x) == torch.float32


# In entire models


def packed_and_padded():
    """Token ids, padding mask and positions of three rows: packed, left-padded, shorter than the sinks."""
    ids = torch.randint(2, 96, (3, 40))
    mask, positions = torch.ones(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    positions[0] = torch.cat([torch.arange(25), torch.arange(15)])
    for row, length in ((1, 30), (2, 2)):
        mask[row, :-length] = 0
        positions[row, -length:] = torch.arange(length)
    return dict(input_ids=ids, attention_mask=mask, position_ids=positions)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flash", "blocked"])
def test_whole_models_give_the_logits_of_the_reference(name, base_config, flash_on_a_cpu):
    hybrid = build_hybrid(base_config, on_base(base_config, SPEC)).eval()
    batch = packed_and_padded()
    real = batch["attention_mask"].bool()
    hybrid.set_attention_kernel("reference")
    expected = hybrid(**batch).logits[real]
    hybrid.set_attention_kernel(name)
    torch.testing.assert_close(hybrid(**batch).logits[real], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_continues_from_a_prompt_that_any_kernel_read(qwen3_config, flash_on_a_cpu):
    hybrid = build_hybrid(qwen3_config, SPEC).eval()
    prompt = torch.randint(2, 96, (1, 30))
    answers = []
    for name in ("reference", "blocked", "flash"):
        hybrid.set_attention_kernel(name)
        answers.append(hybrid.generate(prompt, max_new_tokens=20, do_sample=False))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_full_layers_of_rows_that_are_one_document_let_torch_choose_the_kernel(monkeypatch):
    """As the unconverted model does, so that no full layer is slower than there."""
    case = Case(((40,), (40,)))
    q, k, v, _ = tensors_of(case, torch.float32)
    monkeypatch.setattr(attention_kernels, "_flash_on", lambda device: pytest.fail("flash attention was requested"))
    found = KERNELS["flash"].full(documents_of(case), q, k, v, scaling=0.3)
    whole = dataclasses.replace(case, w_sink=0, w_recent=99)
    torch.testing.assert_close(found, expected_output(whole, documents_of(case), q, k, v), atol=1e-5, rtol=1e-5)


def test_flash_trains_with_the_gradients_of_the_reference(qwen3_config, flash_on_a_cpu):
    """With padding, packs and gradient checkpointing, in full and in streaming layers."""
    hybrid = build_hybrid(qwen3_config, SPEC).train()
    batch = packed_and_padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients(name):
        hybrid.set_attention_kernel(name)
        hybrid.zero_grad()
        hybrid(**batch, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in hybrid.parameters()]

    expected = gradients("reference")
    torch.testing.assert_close(gradients("flash"), expected, atol=1e-5, rtol=1e-4)
    hybrid.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients("flash"), expected, atol=1e-5, rtol=1e-4)


def test_flash_trains_under_autocast_with_weights_in_fp32(qwen3_config, flash_on_a_cpu):
    """Rotary embedding hands fp32 queries over there, beside bf16 values; the stand-in refuses to mix them."""
    hybrid = build_hybrid(qwen3_config, SPEC).train()
    hybrid.set_attention_kernel("flash")
    ids = torch.randint(2, 96, (1, 40))
    with torch.autocast("cpu", torch.bfloat16):
        loss = hybrid(ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in hybrid.parameters())
