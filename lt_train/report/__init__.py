"""A report: one HTML file with the results of runs, complete without a network.

contents.py reads runs, problems.py and samples.py the problems and the answers; tables.py, charts.py and run_charts.py show them;
page.py fills in templates/.
"""

from collections.abc import Sequence
from pathlib import Path

from lt_train.report.contents import read_runs
from lt_train.runtime import files
from lt_train.runtime.errors import UserError

__all__ = ["write_report"]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of these run folders to `out`, in place of a former report; returns `out`.

    Raises:
        UserError: no run is given, a folder is no run or has no scores, a file of it is damaged, or `out` cannot be written.
    """
    from lt_train.report.page import render  # loads matplotlib, which readers of results do without

    page = render(read_runs(runs))
    if out.is_dir():
        raise UserError(f"--out: {out}: a folder. Fix: name the file to write, such as {out / 'report.html'}")
    try:
        files.write_text(out, page)
    except OSError as error:
        raise UserError(f"--out: {out}: the report cannot be written: {error.strerror}. Fix: name another file") from error
    return out
