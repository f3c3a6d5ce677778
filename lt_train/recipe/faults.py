"""Faults of a recipe: `settings: problem. Fix: action`."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lt_train.runtime.errors import LONGEST, shortened


@dataclass(frozen=True)
class Fault:
    """A fault of one setting, or of several that contradict each other.

    Attributes:
        settings: dotted paths such as "eval.0.limit"; empty for the file.
        problem: the fault. It starts with the value where there is one: "'16': not a whole number".
        fix: what to change, in the imperative; empty where the problem has it already.
        origin: where the setting was written: "line 7", "--set".
    """

    settings: tuple[str, ...]
    problem: str
    fix: str = ""
    origin: str = ""

    def __str__(self) -> str:
        name, fix = " + ".join(map(shortened, self.settings)), f". Fix: {self.fix}" if self.fix else ""
        return (f"{name}: " if name else "") + self.problem + fix + (f" ({self.origin})" if self.origin else "")


def did_you_mean(given: Any, names: Iterable[str]) -> str:
    """`"; did you mean cosine?"` where one of the names is close to the given one, else ""."""
    close = difflib.get_close_matches(str(given)[:LONGEST], list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def nearest_multiples(number: int, of: int) -> str:
    """The multiples of `of` around `number`: "91 or 98"."""
    below = number // of * of
    return f"{below:,} or {below + of:,}" if below else f"{of:,}"
