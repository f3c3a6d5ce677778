"""Probes of saved checkpoints during training: one process at a time, started and watched by the main process.

The process reads hard links of the weights, so that no rotation of checkpoints deletes them. It writes samples one by one, then its
result; the weights are deleted after the result is read. So a resumed training finds the unfinished probes from the folders alone.
A probe that fails is reported, and training continues.
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
    """The environment of a single process, outside the launch, on the device of `train.probes.device`.

    Args:
        given: the environment of the training's main process.
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
class ProbeLauncher:
    """
    Attributes:
        out: the folder of the checkpoints.
        every: optimizer steps between probes.
        command: the command line of the process that probes the checkpoint of a step.
        environment: its environment.
        on_result: called with each result and the probed weights.
        report: prints a line for the user.
    """

    out: Path
    every: int
    command: Callable[[int], list[str]]
    environment: Mapping[str, str]
    on_result: Callable[[ProbeResult, Checkpoint], None]
    report: Callable[[str], None]
    _waiting: list[int] = field(default_factory=list)
    _running: tuple[int, subprocess.Popen[bytes]] | None = None

    def is_due(self, step: int, last_step: int) -> bool:
        return step % self.every == 0 or step == last_step

    def resume(self, step: int, last_step: int) -> None:
        """Continue the unfinished probes of a training that resumes from `step`, and delete probes of later steps.

        Probes of existing checkpoints without a result are due again, including those that failed.
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
        """Link the checkpoint's weights for a probe, which starts when no other probe runs."""
        place = probe_folder(self.out, checkpoint.step)
        shutil.rmtree(place, ignore_errors=True)
        with reporting_write_errors(self.out, f"the weights for the probe of step {checkpoint.step}"):
            publish_weights(checkpoint, place / WEIGHTS)
        self._waiting.append(checkpoint.step)

    def is_busy(self) -> bool:
        """Read the result of a finished probe and start the next one. Returns whether a probe is running."""
        if self._running is not None and self._running[1].poll() is not None:
            self._finish(*self._running)
            self._running = None
        while self._running is None and self._waiting:
            self._begin(self._waiting.pop(0))
        return self._running is not None

    def wait(self) -> None:
        """Wait in all processes of the training until no probe is running."""
        if decided_by_main(self.is_busy):
            self.report("waiting for the running probe")
            wait_while_main(self.is_busy)

    def stop(self) -> None:
        """Kill the running process, if there is one; a resumed training starts its probe again."""
        if self._running is not None:
            step, process = self._running
            process.kill()  # safe at any moment
            process.wait()
            self._waiting.insert(0, step)
            self._running = None

    def _begin(self, step: int) -> None:
        if read_result(self.out, step) is not None:  # finished, but the result was not read before a kill
            self._finish(step, None)
            return
        with open(self._output(step), "ab") as output:
            process = subprocess.Popen(
                self.command(step),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches only the training, which kills the probe
            )
        self._running = step, process

    def _finish(self, step: int, process: subprocess.Popen[bytes] | None) -> None:
        weights = probe_folder(self.out, step) / WEIGHTS
        result = read_result(self.out, step)
        if result is None:
            self.report(f"the probe of step {step} failed, training continues: {self._failure(step, process)}")
        else:
            self.report(f"probe of step {step}: {', '.join(map(str, result.scores))}")
            self.on_result(result, read_checkpoint(weights))
        shutil.rmtree(weights)

    def _failure(self, step: int, process: subprocess.Popen[bytes] | None) -> str:
        lines = self._output(step).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        code = "" if process is None else f"exit code {process.returncode}, "
        return f"{last} ({code}full output in {self._output(step)})"

    def _output(self, step: int) -> Path:
        return probe_folder(self.out, step) / "output.txt"
