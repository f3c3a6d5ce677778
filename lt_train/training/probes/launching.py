"""Probes of saved checkpoints while training goes on: one process at a time, started and watched by the main process.

The process reads weights that are held for it (hard links), so that no rotation of checkpoints takes them away. It leaves samples
one by one and at last its result; the weights are let go when the result was taken in. So from the folders alone a resumed training
sees which probes are still to finish. A probe that fails is reported, and training goes on.
"""

import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lt_train.training.broadcast import decided_by_main, wait_while_main
from lt_train.training.checkpoints import (
    Checkpoint,
    finished_checkpoints,
    publish_weights,
    read_checkpoint,
    reporting_write_errors,
)
from lt_train.training.probes.results import ProbeResult, probe_folder, probed_steps, read_result

WEIGHTS = "weights"

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "CROSS_", "ACCELERATE_", "FSDP_", "DEEPSPEED_", "OMPI_", "PMI_", "MV2_")


def environment_for(device: str, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is alone, on the device of `train.probes.device`.

    Args:
        given: that of the main process of the training.
    """
    kept = {
        name: value for name, value in given.items() if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    if device == "cpu":
        return {**kept, "CUDA_VISIBLE_DEVICES": ""}
    if device != "same":
        return {**kept, "CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:")}
    if not torch.cuda.is_available():
        return kept
    visible = [name for name in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    own = int(given.get("LOCAL_RANK", "0"))
    return {**kept, "CUDA_VISIBLE_DEVICES": visible[own] if visible else str(own)}


@dataclass
class Probes:
    """
    Attributes:
        out: the folder of the checkpoints.
        every: optimizer steps between probes.
        command: the command line of the process that probes the checkpoint of a step.
        environment: its environment.
        take_in: gets each result, and the weights it is about.
        report: takes lines for the user.
    """

    out: Path
    every: int
    command: Callable[[int], list[str]]
    environment: Mapping[str, str]
    take_in: Callable[[ProbeResult, Checkpoint], None]
    report: Callable[[str], None]
    _waiting: list[int] = field(default_factory=list)
    _running: tuple[int, subprocess.Popen[bytes]] | None = None

    def is_due(self, step: int, last_step: int) -> bool:
        return step % self.every == 0 or step == last_step

    def resume(self, step: int, last_step: int) -> None:
        """Take up what a training that goes on from `step` has left unfinished; forget probes of a course that did not survive.

        Probes of checkpoints that are still there and have no result are due again: those that failed, too.
        """
        for probed in probed_steps(self.out):
            place = probe_folder(self.out, probed)
            if probed > step:
                shutil.rmtree(place)
            elif (place / WEIGHTS).is_dir():
                self._waiting.append(probed)
        for checkpoint in map(read_checkpoint, finished_checkpoints(self.out)):
            done = (probe_folder(self.out, checkpoint.step) / WEIGHTS).is_dir() or read_result(
                self.out, checkpoint.step
            ) is not None
            if self.is_due(checkpoint.step, last_step) and not done:
                self.add(checkpoint)
        self._waiting.sort()

    def add(self, checkpoint: Checkpoint) -> None:
        """Hold the checkpoint's weights for a probe, which begins when no other is under way."""
        place = probe_folder(self.out, checkpoint.step)
        shutil.rmtree(place, ignore_errors=True)
        with reporting_write_errors(self.out, f"what the probe of step {checkpoint.step} reads"):
            publish_weights(checkpoint, place / WEIGHTS)
        self._waiting.append(checkpoint.step)

    def is_busy(self) -> bool:
        """Take in what has ended, begin what waits; says whether a probe is under way."""
        if self._running is not None and self._running[1].poll() is not None:
            self._finish(*self._running)
            self._running = None
        while self._running is None and self._waiting:
            self._begin(self._waiting.pop(0))
        return self._running is not None

    def wait(self) -> None:
        """Wait in all processes of the training until no probe is under way."""
        if decided_by_main(self.is_busy):
            self.report("waiting for the probe that is under way")
            wait_while_main(self.is_busy)

    def stop(self) -> None:
        """End the process under way, if there is one; a resumed training goes on with it."""
        if self._running is not None:
            step, process = self._running
            process.kill()  # it may be cut off at any moment
            process.wait()
            self._waiting.insert(0, step)
            self._running = None

    def _begin(self, step: int) -> None:
        if read_result(self.out, step) is not None:  # it ended, and was not taken in any more
            self._finish(step, None)
            return
        with open(self._output(step), "ab") as output:
            process = subprocess.Popen(
                self.command(step),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the training, which ends it
            )
        self._running = step, process

    def _finish(self, step: int, process: subprocess.Popen[bytes] | None) -> None:
        weights = probe_folder(self.out, step) / WEIGHTS
        result = read_result(self.out, step)
        if result is None:
            self.report(f"the probe of step {step} failed, training goes on: {self._last_words(step, process)}")
        else:
            self.report(f"probe of step {step}: {', '.join(map(str, result.scores))}")
            self.take_in(result, read_checkpoint(weights))
        shutil.rmtree(weights)

    def _last_words(self, step: int, process: subprocess.Popen[bytes] | None) -> str:
        lines = self._output(step).read_text(encoding="utf-8", errors="replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        code = "" if process is None else f"exit code {process.returncode}, "
        return f"{said} ({code}all of it in {self._output(step)})"

    def _output(self, step: int) -> Path:
        return probe_folder(self.out, step) / "output.txt"
