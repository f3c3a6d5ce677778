"""Rows that cannot be trained on: found one by one, reported together, by kind and with their places."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lt_train.runtime.errors import UserError, more

PLACES = 3
"""Places named of each kind."""


class RowFault(Exception):
    """Why a row cannot be trained on. Faults of one `kind` are counted together; `fix` is the way out of that kind."""

    def __init__(self, problem: str, *, kind: str | None = None, fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.kind = kind or problem
        self.fix = fix


@dataclass
class FaultyRows:
    """The faulty rows of a data set, counted; of each kind the first places are kept."""

    kinds: dict[str, "Kind"] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(kind.count for kind in self.kinds.values())

    def add(self, where: str, fault: RowFault) -> None:
        kind = self.kinds.setdefault(fault.kind, Kind(fault.problem, fault.fix))
        kind.count += 1
        if len(kind.places) < PLACES:
            kind.places.append(where)

    def lines(self) -> list[str]:
        """One line a kind, the most frequent first."""
        return [str(kind) for kind in sorted(self.kinds.values(), key=lambda kind: -kind.count)]

    def error(self, source: str, rows: str) -> UserError:
        """`rows`: how many were read, in words."""
        listed = "".join(f"\n  {line}" for line in self.lines())
        return UserError(
            f"data.source: {source}: {self.count:,} of {rows} cannot be trained on:{listed}\n"
            "  Fix: correct these rows or the settings of data, or leave such rows out with data.faulty: drop"
            + more("cannot-be-trained-on")
        )


@dataclass
class Kind:
    problem: str
    fix: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        others = self.count - len(self.places)
        places = ", ".join(self.places) + (f" and {others:,} others" if others else "")
        return f"{places}: {self.problem}{f'. Fix: {self.fix}' if self.fix else ''}"


def texts_in(value: object) -> Iterable[str]:
    """Every text that a value holds, however deep, except names of fields and white space."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
