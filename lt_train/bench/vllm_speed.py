"""vLLM's decoding speed on the base, measured by a process in vLLM's own environment (vllm_plugin/decode_speed.py)."""

import json
import os
import random
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lt_train.bench.base import Base, RandomBase
from lt_train.hybrid.context_length import context_length
from lt_train.inference.servers.vllm_environment import check_vllm_environment
from lt_train.runtime.devices import compute_dtype, dtype_name
from lt_train.runtime.errors import UserError
from lt_train.runtime.sources import resolve_model
from lt_train.runtime.units import format_bytes

STEPS = 16
OPTION = "--against vllm"


@dataclass(frozen=True)
class VllmStep:
    """A step of vLLM's: its sequences, and its milliseconds."""

    slots: int
    milliseconds: float

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.slots / self.milliseconds


def check_vllm(base: Base, python: Path, lengths: Sequence[int]) -> None:
    """
    Args:
        lengths: tokens of each context.

    Raises:
        UserError: random weights, which are in no folder, a length beyond the model's context, which vLLM refuses, or an
            environment without vLLM or our plugin.
    """
    if isinstance(base, RandomBase):
        raise UserError(f"{OPTION}: {base.name}: vLLM loads a folder, and random weights are in none. Fix: name a MODEL")
    context, most = context_length(base.config().to_dict()), max(lengths) + STEPS + 1
    if most > context:
        raise UserError(
            f"--at: {max(lengths):,}: with its new tokens beyond the model's context of {context:,}, and vLLM decodes within it. "
            f"Fix: set at most {context - STEPS - 1:,}, or leave out {OPTION}"
        )
    check_vllm_environment(python, OPTION)


def vllm_steps(base: Base, python: Path, slots: Mapping[int, int], budget: int, vocab_size: int) -> dict[int, VllmStep]:
    """vLLM's steps by length of context.

    Args:
        slots: sequences at a time, by length of context; vLLM, whose blocks round up, may hold fewer.
        budget: bytes of the KV cache.
        vocab_size: of the random prompts.

    Raises:
        UserError: vLLM ended without a result, or holds no sequence.
    """
    assert not isinstance(base, RandomBase)
    rng = random.Random(0)
    order = {
        "model": resolve_model(base.model.base),
        "dtype": dtype_name(compute_dtype(base.model.dtype)),
        "kv_bytes": budget,
        "steps": STEPS,
        "prompts": [[[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)] for length, count in slots.items()],
    }
    threads = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
    cores = {"OMP_NUM_THREADS": str(len(threads)), "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, threads))}
    with TemporaryDirectory() as folder:
        given, result = Path(folder, "order.json"), Path(folder, "result.json")
        given.write_text(json.dumps(order), encoding="utf-8")
        command = [str(python), "-m", "lt_train.vllm_plugin.decode_speed", str(given), str(result)]
        ended = subprocess.run(command, env={**os.environ, **cores}, cwd="/", capture_output=True, text=True, check=False)
        if not result.is_file():
            last = "\n".join((ended.stdout + ended.stderr).splitlines()[-20:])
            raise UserError(f"{OPTION}: {python}: ended with code {ended.returncode} and no result. Fix its error:\n{last}")
        found = json.loads(result.read_text(encoding="utf-8"))
    for length, (held, _) in zip(slots, found, strict=True):
        if held == 0:
            raise UserError(
                f"--kv-budget: {format_bytes(budget)}: vLLM holds no sequence of {length:,} tokens in it. Fix: set more, or leave "
                f"out {OPTION}"
            )
    return {length: VllmStep(held, 1000 * seconds) for length, (held, seconds) in zip(slots, found, strict=True)}
