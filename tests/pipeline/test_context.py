"""What the stages share."""

import io

from rich.console import Console

from lt_train.pipeline.context import RunContext
from lt_train.runtime.processes import Process


def test_a_line_is_printed_verbatim_though_it_holds_brackets():
    """A server's own words may: [/INST] would otherwise be read as the end of a style, and stop the run."""
    printed = io.StringIO()
    context = RunContext(recipe=None, folder=None, console=Console(file=printed), process=Process(0, 1, False))
    context.report("evaluate", "http://x: HTTP 500: [/INST] [red]")
    assert printed.getvalue() == "evaluate  http://x: HTTP 500: [/INST] [red]\n"
