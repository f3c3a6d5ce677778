"""Counts of the rows of a data set, and of those that are left out: reported or refused."""

from collections import Counter
from collections.abc import Iterator

from lt_train.dataset.faults import FaultyRows, RowFault
from lt_train.dataset.row_tokenizer import TokenizedAnswer, TokenizedRow
from lt_train.recipe.schema import Data
from lt_train.runtime.errors import UserError

MUCH = 0.2
"""More than this fraction of the rows dropped is a warning."""

ENOUGH = 512
"""Where this many first rows are all faulty, the others are not read: their fields are not those that the recipe names."""


class Tally:
    """Counts the rows of a data set, by what became of them."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.counts = Counter(dict.fromkeys(("rows", "too_long", "dropped", "truncated", "train", "heldout"), 0))
        self.faulty = FaultyRows()
        self.kept_answers = 0
        self.longest, self.longest_where = 0, ""

    def kept(self, row: TokenizedRow) -> Iterator[TokenizedAnswer]:
        """The answers of a row that are trained on.

        Raises:
            UserError: no row can be trained on so far; reading on would find nothing new.
        """
        if row.fault is not None:
            self.add_fault(row.where, row.fault)
            if self.data.faulty == "error" and self.faulty.count == self.counts["rows"] == ENOUGH:
                raise self.error(f"the first {ENOUGH} rows")
            return
        self.counts["rows"] += 1
        if not row.answers:
            self.counts["unverified"] += 1
        for answer in row.answers:
            if self._fits(answer, row.where):
                yield answer

    def add_fault(self, where: str, fault: RowFault) -> None:
        self.counts["rows"] += 1
        self.counts["faulty"] += 1
        self.faulty.add(where, fault)

    def check(self) -> None:
        """
        Raises:
            UserError: rows that the recipe does not allow, or nothing left.
        """
        data, counts = self.data, self.counts
        if self.faulty.count and data.faulty == "error":
            raise self.error()
        if counts["too_long"] and data.overlong == "error":
            raise UserError(
                f"data.overlong: error, and {counts['too_long']} of {counts['rows']} samples are longer than data.max_length "
                f"{data.max_length} (longest: {self.longest} tokens, {self.longest_where}); raise it, or set overlong to drop or "
                "truncate"
            )
        if not self.kept_answers:
            fix = f"; raise data.max_length, now {data.max_length}" if counts["too_long"] else ""
            listed = "".join(f"\n  {line}" for line in self.faulty.lines())
            raise UserError(f"{data.source}: no sample is left to train on ({self}){fix}{listed}")

    def error(self, rows: str = "") -> UserError:
        return self.faulty.error(self.data.traces, rows or f"{self.counts['rows']:,} rows")

    def warnings(self) -> list[str]:
        found = [f"data.faulty: drop: left out {line}" for line in self.faulty.lines()]
        rows, dropped = self.counts["rows"], self.counts["dropped"] + self.faulty.count
        if dropped <= MUCH * rows:
            return found
        fixes = []
        if self.counts["dropped"]:
            fixes.append(f"raise data.max_length (the longest sample has {self.longest:,} tokens) or set data.overlong: truncate")
        if self.faulty.count:
            fixes.append("correct the faulty rows")
        share = f"{dropped:,} of {rows:,} rows were dropped: {self.counts['dropped']:,} too long, {self.faulty.count:,} faulty"
        return [*found, f"data.source: {self.data.source}: {share}. Fix: {', and '.join(fixes)}"]

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.counts.items() if count)

    def _fits(self, answer: TokenizedAnswer, where: str) -> bool:
        length, longest = len(answer.input_ids), self.data.max_length
        if length > self.longest:
            self.longest, self.longest_where = length, where
        if length > longest:
            self.counts["too_long"] += 1
            if self.data.overlong != "truncate" or answer.prompt_length >= longest:
                self.counts["dropped"] += 1
                return False
            self.counts["truncated"] += 1
        self.kept_answers += 1
        return True
