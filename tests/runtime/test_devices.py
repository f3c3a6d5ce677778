import pytest
import torch

from lt_train.runtime.devices import compute_device, compute_dtype


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_precision_that_the_recipe_names_is_taken_on_every_device(precision, dtype):
    assert compute_dtype(precision) == dtype


@pytest.mark.parametrize(("in_hardware", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_only_where_the_device_computes_in_it(monkeypatch, in_hardware, dtype):
    monkeypatch.setattr("lt_train.runtime.devices.computes_in_bf16", lambda: in_hardware)
    assert compute_dtype("auto") == dtype


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_without_an_accelerator_models_run_on_the_cpu_in_fp32():
    assert compute_device() == torch.device("cpu")
    assert compute_dtype("auto") == torch.float32


@pytest.mark.parametrize(("local_rank", "device"), [(None, "cuda:0"), ("0", "cuda:0"), ("3", "cuda:3")])
def test_each_process_of_a_machine_has_the_accelerator_of_its_own_number(monkeypatch, local_rank, device):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda", 0))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert compute_device() == torch.device(device)


def test_torch_for_cuda_on_a_machine_without_a_gpu_computes_on_the_cpu(monkeypatch):
    """What PyPI gives on Linux: its accelerator is cuda, whether there is one or not (torch 2.13)."""
    monkeypatch.setattr(
        "torch.accelerator.current_accelerator", lambda check_available=False: None if check_available else torch.device("cuda")
    )
    assert compute_device() == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_is_used_where_there_is_one():
    assert compute_device().type == "cuda"
    if torch.cuda.get_device_capability() >= (8, 0):
        assert compute_dtype("auto") == torch.bfloat16
