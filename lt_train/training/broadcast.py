"""Results of the main process of a training, broadcast to all of its processes."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from lt_train.runtime.errors import UserError

T = TypeVar("T")

POLL_SECONDS = 0.2


def decided_by_main(decide: Callable[[], T]) -> T:
    """`decide()`, called in the main process alone and returned in all of them; a UserError is raised in all of them."""
    outcome: list[tuple[T | None, UserError | None]] = [(None, None)]
    if PartialState().is_main_process:
        try:
            outcome = [(decide(), None)]
        except UserError as error:
            outcome = [(None, error)]
    ((value, raised),) = broadcast_object_list(outcome)
    if raised is not None:
        raise raised
    return value


def wait_while_main(is_busy: Callable[[], bool]) -> None:
    """Wait in all processes until `is_busy()` is false in the main one.

    Each poll is a collective, because torch stops a process that waits in one collective for several minutes (its timeout).
    """
    while decided_by_main(is_busy):
        time.sleep(POLL_SECONDS)


def check_shared(folder: Path) -> None:
    """
    Raises:
        UserError: another machine has a folder of its own there, so a checkpoint of all processes would lie in pieces.
    """
    if PartialState().num_processes == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(prefix=".shared-", dir=folder) as file:
        seen = (folder / decided_by_main(lambda: Path(file.name).name)).exists()
        blind = sorted({host for host, sees in gather_object([(socket.gethostname(), seen)]) if not sees})
    if blind:
        raise UserError(
            f"{folder.absolute()}: {', '.join(blind)} has another folder there than the first process, so checkpoints would lie in "
            "pieces. Fix: let --runs name a folder that all machines share"
        )
