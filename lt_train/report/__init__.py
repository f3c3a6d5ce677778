"""A report: one HTML file with what runs have found, to look at without a network.

contents.py reads runs, problems.py and samples.py what they asked and got, tables.py and charts.py (on svg.py) make figures of
it, page.py puts all into templates/.
"""

from collections.abc import Sequence
from pathlib import Path

from lt_train.report.contents import read_runs
from lt_train.report.page import render
from lt_train.runtime import files
from lt_train.runtime.errors import UserError

__all__ = ["write_report"]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of these run folders to `out`, in place of a former report; returns `out`.

    Raises:
        UserError: no run is given, one is none or has no scores, a file of it is damaged, or `out` cannot be written.
    """
    page = render(read_runs(runs))
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write, such as {out / 'report.html'}")
    try:
        files.write_text(out, page)
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written: {error.strerror}. Name another file") from error
    return out
