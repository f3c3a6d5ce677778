"""`lt-train doctor`: every check passes, is measured or says why it cannot run; nothing stops the rest."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lt_train.bench import correctness, doctor, processes, speed
from lt_train.bench.attention import Shape
from lt_train.bench.checks import CannotRun, Check, Finding, run_check
from lt_train.bench.processes import process_checks
from lt_train.hybrid import attention_kernels
from lt_train.hybrid.attention_kernels import KERNELS, Obstacle
from lt_train.inference import views
from lt_train.planning.compute import causal_pairs, streaming_pairs
from tests.support.dense_flash import DenseFlash, OffByOne, Unbuilt, WrongGradient
from tests.support.families import BASES
from tests.support.launches import WARM_PYTHON, new_pythons_are_forked

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what works on a CPU")
SMALL = speed.Sizes(2**20, 64, Shape((64, 2048), heads=2, groups=2, head_size=16), "config.json", 64, 2**20)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    BASES["qwen3"].save_pretrained(tmp_path)
    for sizes in ("ON_CPU", "ON_GPU"):
        monkeypatch.setattr(speed, sizes, dataclasses.replace(SMALL, shape=str(tmp_path / "config.json")))


@pytest.fixture
def forked_launch(monkeypatch):
    """Torch's launcher and the processes that it starts."""
    monkeypatch.setattr(processes, "sys", SimpleNamespace(executable=str(WARM_PYTHON)))
    with new_pythons_are_forked() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture
def without_processes(monkeypatch):
    monkeypatch.setattr(doctor, "process_checks", lambda: [])


def outcomes(lt_train, *given):
    code, out, err = lt_train("doctor", "--json", *given)
    assert "Traceback" not in out + err
    found = json.loads(out)
    return code, {check["key"]: check["outcome"] for check in found["checks"]}, found


@pytest.mark.slow
@on_a_cpu
def test_on_a_cpu_all_that_can_run_passes_and_the_rest_reports_why_not(lt_train, forked_launch):
    code, found, whole = outcomes(lt_train)
    assert code == 0 and whole["passed"]
    kernels = [f"kernel.blocked.{case}" for case in ("one_document", "packed", "learned_sinks", "bf16")]
    for key in (*kernels, "training_steps", "generation", "engine", "all_reduce", "deepspeed"):
        assert found[key] == "pass", key
    assert {found[key] for key in ("memory_bandwidth", "matmul", "streaming.64", "streaming.2048", "decode")} == {"measured"}
    checks = {check["key"]: check for check in whole["checks"]}
    assert checks["kernel.flash.packed"]["outcome"] == "not run" and "needs an NVIDIA GPU" in checks["kernel.flash.packed"]["text"]
    assert checks["all_reduce"]["numbers"]["processes"] == checks["deepspeed"]["numbers"]["processes"] == 2
    assert checks["streaming.2048"]["numbers"]["limit"] == causal_pairs(2048) / streaming_pairs(2048, 1024)
    assert whole.keys() == {"version", "device", "passed", "seconds", "checks", "environment"}
    assert checks["decode"].keys() == {"key", "title", "outcome", "text", "numbers", "seconds"}


@pytest.mark.gpu
def test_on_a_gpu_everything_passes_or_is_measured(lt_train):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    code, found, whole = outcomes(lt_train)
    print(json.dumps(whole, indent=2))
    assert code == 0 and set(found.values()) == {"pass", "measured"}


@on_a_cpu
def test_the_table_fits_80_columns_and_names_each_kernel_that_cannot_run_once(lt_train, without_processes):
    code, out, _ = lt_train("doctor")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split()[0] for line in out.splitlines() if "not run" in line]
    assert "flash" in rows and len(rows) == len(set(rows))
    assert "0 failed" in out.splitlines()[-1]


def flash_with(monkeypatch, flash, obstacle):
    monkeypatch.setattr(attention_kernels, "_flash_on", lambda device: flash)
    monkeypatch.setitem(KERNELS, "flash", dataclasses.replace(KERNELS["flash"], obstacle=obstacle))


@on_a_cpu
def test_a_broken_kernel_is_found_and_the_other_checks_go_on(lt_train, without_processes, monkeypatch):
    flash_with(monkeypatch, OffByOne(), lambda use: None)
    code, found, whole = outcomes(lt_train)
    assert code == 1 and not whole["passed"]
    assert {found[key] for key in found if key.startswith("kernel.flash.")} == {"fail"}
    assert found["kernel.blocked.packed"] == found["generation"] == "pass" and found["decode"] == "measured"


def flash_results():
    return [run_check(check) for check in correctness.kernel_checks() if check.key.startswith("kernel.flash.")]


class NotANumber(DenseFlash):
    def backward(self, *given):
        dq, dk, dv = super().backward(*given)
        return dq, dk * float("nan"), dv


@on_a_cpu
@pytest.mark.parametrize("broken", [WrongGradient, NotANumber, Unbuilt])
def test_a_wrong_gradient_or_a_kernel_that_does_not_run_is_a_failure(broken, monkeypatch):
    flash_with(monkeypatch, broken(), lambda use: None)
    assert {result.outcome for result in flash_results()} == {"fail"}


@on_a_cpu
@pytest.mark.parametrize("broken", [OffByOne, Unbuilt])
def test_a_fault_that_the_kernels_own_trial_finds_is_a_failure(broken, monkeypatch):
    """Then `auto` takes another kernel; that this one is broken is still reported."""
    flash_with(monkeypatch, broken(), partial(attention_kernels._self_test_fault.__wrapped__, "flash"))
    assert {result.outcome for result in flash_results()} == {"fail"}


@on_a_cpu
@pytest.mark.parametrize("only_bf16", [False, True])
def test_a_kernel_that_works_passes(only_bf16, monkeypatch):
    """The stand-in in which the faults above are planted; in bf16 alone, as flash attention computes."""
    flash_with(monkeypatch, DenseFlash(), lambda use: Obstacle("bf16 only") if only_bf16 and use.dtype == torch.float32 else None)
    assert {result.outcome for result in flash_results()} == {"pass"}


@on_a_cpu
def test_a_window_too_short_changes_the_losses_of_training_steps(monkeypatch):
    blocked = KERNELS["blocked"].streaming

    def shorter(documents, q, k, v, *, w_recent, **settings):
        return blocked(documents, q, k, v, w_recent=w_recent - 1, **settings)

    monkeypatch.setitem(KERNELS, "blocked", dataclasses.replace(KERNELS["blocked"], streaming=shorter))
    (training, *_) = correctness.model_checks()
    assert run_check(training).outcome == "fail"


def test_a_wrong_cache_changes_what_is_generated(monkeypatch):
    from lt_train.hybrid.modeling import HybridForCausalLM

    generate = HybridForCausalLM.generate

    def skewed(self, ids, **given):
        return generate(self, ids + (0 if given["generation_config"].use_cache else 1), **given)

    monkeypatch.setattr(HybridForCausalLM, "generate", skewed)
    (_, generation, _) = correctness.model_checks()
    assert run_check(generation).outcome == "fail"


def test_a_window_that_is_off_by_one_changes_what_the_engine_decodes(monkeypatch):
    ring_blocks = views.ring_blocks
    monkeypatch.setattr(views, "ring_blocks", lambda layer, position_BT: ring_blocks(layer, position_BT + 1))
    (*_, engine) = correctness.model_checks()
    assert run_check(engine).outcome == "fail"
    monkeypatch.undo()
    assert run_check(engine).outcome == "pass"


def test_a_check_fails_alone_or_reports_why_it_cannot_run():
    def fails():
        raise KeyError("anything")

    def lacks():
        raise CannotRun("no GPU")

    results = [run_check(Check(name, name, find)) for name, find in (("a", fails), ("b", lacks), ("c", lambda: Finding("1 s")))]
    assert [(result.outcome, result.text) for result in results] == [
        ("fail", "KeyError: 'anything'"),
        ("not run", "no GPU"),
        ("measured", "1 s"),
    ]


def test_processes_that_fail_or_are_not_installed_are_reported(monkeypatch, forked_launch):
    _, deepspeed = process_checks()
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    assert run_check(deepspeed).outcome == "not run"
    monkeypatch.setattr(processes, "ON_CPU", 1)
    failed = run_check(Check("x", "x", partial(processes._launch, "no such check")))
    assert failed.outcome == "fail" and "1 processes: KeyError: 'no such check'" in failed.text


def test_processes_that_hang_are_ended(monkeypatch):
    monkeypatch.setattr(processes, "SECONDS", 0.5)
    all_reduce, _ = process_checks()
    assert "hung for 0.5 seconds" in run_check(all_reduce).text


def test_a_shape_without_room_is_not_measured(monkeypatch):
    monkeypatch.setattr(speed, "free_memory", lambda device: 2**20)
    (*_, decode) = speed.speed_checks(dataclasses.replace(SMALL, shape="8b"))
    found = run_check(decode)
    assert found.outcome == "not run" and "GiB of weights, and 1 MiB of memory are free" in found.text


def test_an_unknown_shape_is_refused_before_any_check(lt_train):
    code, out, err = lt_train("doctor", "--shape", "7b")
    assert code == 2 and "--shape: 7b: no such shape" in err and not out
