"""A check of `lt-train doctor`: what it finds, and how a check that fails or cannot run is kept from stopping the others."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

Outcome = Literal["pass", "fail", "measured", "not run"]


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        text: for the table.
        numbers: the same for programs.
        passed: None for a measurement that has no limit.
    """

    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    passed: bool | None = None


class CannotRun(Exception):
    """The machine lacks what the check needs; the text names it."""


@dataclass(frozen=True)
class Check:
    """`key` is stable, `title` is for the table."""

    key: str
    title: str
    find: Callable[[], Finding]


@dataclass(frozen=True)
class CheckResult:
    key: str
    title: str
    outcome: Outcome
    text: str
    numbers: Mapping[str, float]
    seconds: float


def run_check(check: Check) -> CheckResult:
    """Any exception is a failure of this check alone."""
    started = time.perf_counter()
    outcome: Outcome
    try:
        finding = check.find()
        outcome = "measured" if finding.passed is None else "pass" if finding.passed else "fail"
    except CannotRun as reason:
        finding, outcome = Finding(str(reason)), "not run"
    except torch.OutOfMemoryError:
        finding, outcome = Finding("the device has too little free memory for it"), "not run"
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        finding, outcome = Finding(f"{type(error).__name__}: {lines[0][:300]}"), "fail"
    return CheckResult(check.key, check.title, outcome, finding.text, finding.numbers, time.perf_counter() - started)


def within(error: float, limit: float) -> Finding:
    """A relative error with the limit that it has to stay below."""
    return Finding(f"relative error {error:.1e}, limit {limit:.0e}", {"error": error, "limit": limit}, error < limit)  # NaN fails
