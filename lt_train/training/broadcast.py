"""What the main process of a training finds out, all of its processes know."""

import time
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from lt_train.runtime.errors import UserError

T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 1.0


def decided_by_main(decide: Callable[[], T]) -> T:
    """Let the main process look at (and tidy) the run's folder, and tell all what it found; an error is raised in all of them."""
    outcome: list[tuple[T | None, UserError | None]] = [(None, None)]
    if PartialState().is_main_process:
        try:
            outcome = [(decide(), None)]
        except UserError as error:
            outcome = [(None, error)]
    ((value, error),) = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return value


def wait_while_main(is_busy: Callable[[], bool]) -> None:
    """Wait in all processes until the main one says that it is not busy any more.

    They talk all the while: a process that waits in silence for another is given up after some minutes (torch's timeout of a
    collective).
    """
    while decided_by_main(is_busy):
        time.sleep(SECONDS_BETWEEN_LOOKS)
