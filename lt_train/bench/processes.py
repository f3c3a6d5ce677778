"""Whether several processes train together here: NCCL over all GPUs, or gloo by two processes on a CPU, and a step of DeepSpeed.

Each check is a launch of its own, `torchrun … -m lt_train.bench.processes CHECK`, whose first process prints what it found as JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch

from lt_train.bench.checks import CannotRun, Check, Finding
from lt_train.runtime.devices import compute_device, release_memory, wait_for

ON_CPU = 2
"""Processes where there is no GPU."""
SECONDS = 90
"""Time after which a launch counts as hung."""


def process_checks() -> Iterator[Check]:
    yield Check("all_reduce", "all-reduce", partial(_launch, "all_reduce"))
    yield Check("deepspeed", "a step of DeepSpeed", partial(_launch, "deepspeed"))


def _launch(name: str) -> Finding:
    """
    Raises:
        CannotRun: torch or DeepSpeed is not made for it here.
        RuntimeError: the processes failed, or hung.
    """
    if not torch.distributed.is_available():
        raise CannotRun("this torch has no torch.distributed")
    if name == "deepspeed" and find_spec("deepspeed") is None:
        raise CannotRun("the package deepspeed is not installed. Fix: pip install deepspeed, to train with ZeRO")
    release_memory()  # of the checks before, on GPUs that the processes share with this one
    count = torch.cuda.device_count() or ON_CPU
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN")}
    command = [*launcher, "-m", __name__, name]
    with subprocess.Popen(
        command, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as launch:
        try:
            out, err = launch.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{count} processes hung for {SECONDS} seconds. Fix: run again with NCCL_DEBUG=INFO") from error
        finally:
            if launch.poll() is None:  # also after Ctrl-C
                os.killpg(launch.pid, signal.SIGKILL)
    found = [line for line in out.splitlines() if line.startswith("{")]
    if launch.returncode or not found:
        reasons = [line.split("]:", 1)[-1].strip() for line in err.splitlines() if "Error" in line and "ChildFailed" not in line]
        raise RuntimeError(f"{count} processes: {(reasons or ['no reason given'])[-1]}")
    return Finding(**json.loads(found[-1]))


def all_reduce() -> Finding:
    device = compute_device()
    backend = "gloo" if device.type == "cpu" else "nccl"
    torch.distributed.init_process_group(backend)
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x = torch.ones((4 if device.type == "cpu" else 64) * 2**20, device=device)
    seconds: list[float] = []
    for _ in range(4):
        x.fill_(rank + 1)
        wait_for(device)
        started = time.perf_counter()
        torch.distributed.all_reduce(x)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    rate = x.nbytes / min(seconds)
    correct = bool((x == count * (count + 1) / 2).all())
    text = f"{backend}, {count} process{'es' if count > 1 else ''}: {'' if correct else 'incorrect sums, '}{rate / 1e9:,.2f} GB/s"
    return Finding(text, {"processes": count, "bytes_per_second": rate}, correct)


def deepspeed() -> Finding:
    """ZeRO-2 takes a step from gradients that differ by process; afterwards all have the same, changed weights."""
    import deepspeed as library

    from lt_train.training.launch import start_deepspeed

    start_deepspeed()
    device = compute_device()
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    before = model.weight.detach().clone()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": device.type == "cuda"},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = library.initialize(model=model, optimizer=optimizer, config=settings)
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x = torch.full((1, 64), rank + 1.0, device=engine.device, dtype=engine.module.weight.dtype)
    engine.backward(engine(x).square().mean())
    engine.step()
    weight = engine.module.weight.detach().float()
    highest, lowest = weight.clone(), weight.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    stepped = bool(weight.isfinite().all() and (weight.cpu() != before).any())
    passed = stepped and torch.equal(highest, lowest)
    problem = "" if passed else ": weights differ between processes" if stepped else ": the weights did not change"
    text = f"DeepSpeed {library.__version__}, ZeRO-2, {count} process{'es' if count > 1 else ''}{problem}"
    return Finding(text, {"processes": count}, passed)


CHECKS: dict[str, Callable[[], Finding]] = {"all_reduce": all_reduce, "deepspeed": deepspeed}

if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(compute_device())
    result = CHECKS[sys.argv[1]]()
    if torch.distributed.get_rank() == 0:
        print("\n" + json.dumps({"text": result.text, "numbers": dict(result.numbers), "passed": result.passed}), flush=True)
    torch.distributed.destroy_process_group()
