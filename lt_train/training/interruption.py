"""SIGTERM during a training: the step in progress ends, a checkpoint of it is saved, and the process stops.

SLURM, torchrun and DeepSpeed's launcher kill a process 30 s after they send it SIGTERM. If step and checkpoint take longer, the
training stops without a new checkpoint and resumes from the last one.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lt_train.runtime.interruption import Interrupted
from lt_train.runtime.processes import is_lost_connection
from lt_train.training.checkpoints import newest_checkpoint

GRACE_SECONDS = 25.0
"""From SIGTERM until the training stops without the checkpoint; the rest of the 30 s is for ending its processes."""

POLL_SECONDS = 0.1


class SaveOnSigterm(TrainerCallback):
    """Saves a checkpoint of the step during which any process receives SIGTERM. Add it after WriteManifest."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.requested = False
        self.stops_after_step = False
        self.saved_step: int | None = None

    @contextmanager
    def handling(self) -> Iterator[None]:
        """While the block runs, SIGTERM requests a checkpoint instead of stopping at once.

        Raises:
            Interrupted: after SIGTERM, once the checkpoint is saved, or after GRACE_SECONDS without it.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGALRM, self._give_up)
        try:
            with _ending_with_other_processes():
                yield
        except RuntimeError as error:
            if self.requested and is_lost_connection(error):  # the other process ended on the same SIGTERM
                raise self._interrupted() from error
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stops_after_step:
            raise self._interrupted()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self._is_requested_of_any():
            self.stops_after_step = True
            control.should_save = control.should_log = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stops_after_step:
            self.saved_step = state.global_step

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        if self.saved_step is not None:
            return Interrupted(signal.SIGTERM, f"the checkpoint of step {self.saved_step} is saved")
        last = newest_checkpoint(self.out)
        kept = f"the last one is {last}" if last else "there is none yet"
        return Interrupted(signal.SIGTERM, f"no checkpoint could be saved within {GRACE_SECONDS:.0f} s, {kept}")

    def _is_requested_of_any(self) -> bool:
        """Whether any process received SIGTERM: DeepSpeed's launcher sends it to one after the other."""
        state = PartialState()
        if state.num_processes == 1:
            return self.requested
        return bool(reduce(torch.tensor(float(self.requested), device=state.device)).item())


@contextmanager
def _ending_with_other_processes() -> Iterator[None]:
    """While the block runs, SIGTERM ends this process as soon as another process of the launch on this machine has ended.

    A launcher also sends SIGTERM when a process fails. The others may then wait for it in a collective. No Python signal handler
    runs during a collective, but a thread does.
    """
    others = _other_processes_here()
    if not others:
        yield
        return
    over = threading.Event()

    def watch(signals: socket.socket) -> None:
        while (received := signals.recv(1)) and received[0] != signal.SIGTERM:
            pass
        while received and not over.wait(POLL_SECONDS):
            if not all(map(_is_running, others)):
                os._exit(128 + signal.SIGTERM)

    receiver, sender = socket.socketpair()
    with closing(receiver), closing(sender):
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, args=(receiver,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            over.set()
            sender.close()
            watcher.join()


def _other_processes_here() -> list[int]:
    """The ids of the other processes of this launch on this machine."""
    state, me = PartialState(), (socket.gethostname(), os.getpid())
    everyone = gather_object([me]) if state.num_processes > 1 else [me]
    return [process for host, process in everyone if host == me[0] and process != me[1]]


def _is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
