"""Processes that grade answers and are kept from one evaluation to the next: a new one imports sympy for two seconds."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lt_train.evaluation.grading.grader_process import Grader


class KeptGrader(Grader):
    def close(self) -> None:
        """Stays for the next evaluation."""


@contextmanager
def graders_are_kept() -> Iterator[None]:
    """Evaluations in this process share a grader for each pair of time limits."""
    kept: dict[tuple[int, ...], KeptGrader] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lt_train.evaluation.run.Grader", lambda *limits: kept.setdefault(limits, KeptGrader(*limits)))
        yield
    for grader in kept.values():
        Grader.close(grader)
