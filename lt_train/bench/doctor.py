"""`lt-train doctor`: whether the machine at hand computes correctly, and how fast, in under 3 minutes. Checks are independent."""

import dataclasses
import time
from dataclasses import dataclass
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lt_train import __version__
from lt_train.bench import speed
from lt_train.bench.checks import CheckResult, run_check
from lt_train.bench.correctness import kernel_checks, model_checks
from lt_train.bench.environment import Environment, read_environment
from lt_train.bench.printing import print_lines
from lt_train.bench.processes import process_checks
from lt_train.bench.speed import speed_checks
from lt_train.runtime.devices import compute_device, device_name
from lt_train.runtime.progress import show_progress
from lt_train.runtime.units import format_duration

STYLES = {"pass": "green", "fail": "bold red"}


@dataclass(frozen=True)
class Diagnosis:
    """As `--json` prints it."""

    version: str
    device: str
    passed: bool
    """No check failed. One that could not run does not count."""
    seconds: float
    checks: list[CheckResult]
    environment: Environment


def diagnose(shape: str | None) -> Diagnosis:
    """
    Args:
        shape: of the model that decodes (see `random_base`). None: by the kind of device.

    Raises:
        UserError: there is no such shape.
    """
    started, device = time.perf_counter(), compute_device()
    sizes = speed.ON_CPU if device.type == "cpu" else speed.ON_GPU
    if shape is not None:
        sizes = dataclasses.replace(sizes, shape=shape)
    checks = [*kernel_checks(), *model_checks(), *speed_checks(sizes), *process_checks()]
    results: list[CheckResult] = []
    with show_progress("checks", total=len(checks)) as bar:
        for check in checks:
            results.append(run_check(check))
            bar.advance(check.title)
    passed = all(result.outcome != "fail" for result in results)
    return Diagnosis(__version__, device_name(device), passed, time.perf_counter() - started, results, read_environment())


def show_diagnosis(found: Diagnosis, console: Console) -> None:
    print_lines(console, f"lt_train {found.version} on {found.device}, {format_duration(found.seconds)}")
    table = Table("check", "result", "", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for (title, outcome, text), _ in groupby(found.checks, _row):
        table.add_row(title, Text(outcome, STYLES.get(outcome, "")), Text(text))
    console.print(table, highlight=False)
    counts = [sum(result.outcome == outcome for result in found.checks) for outcome in ("pass", "fail", "measured", "not run")]
    print_lines(console, "{} passed, {} failed, {} measured, {} could not run here".format(*counts))


def _row(result: CheckResult) -> tuple[str, str, str]:
    """Checks of one kernel that cannot run for one reason are one row."""
    title = result.title.partition(":")[0] if result.outcome == "not run" else result.title
    return title, result.outcome, result.text
