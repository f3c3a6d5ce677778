"""C files of this folder as libraries for this processor, compiled when they are first needed."""

import os
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from ctypes import CDLL
from functools import cache
from pathlib import Path

import torch
from torch.profiler import record_function

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-trapping-math", "-fno-math-errno", "-fPIC")
_SECONDS = 60


@cache
def compiled(source: str, *flags: str) -> CDLL:
    """The library of a file, in about a second of the compiler.

    Raises:
        RuntimeError: the compiler is missing or fails, in its words.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, or what CC names)")
    with tempfile.TemporaryDirectory() as folder:
        objects, library = Path(folder, "compiled.o"), Path(folder, "compiled.so")
        _run([compiler, *_FLAGS, *flags, "-c", str(Path(__file__).with_name(source)), "-o", str(objects)])
        _run([compiler, "-shared", str(objects), "-o", str(library)])  # without OpenMP's library: torch has loaded its own
        try:
            return CDLL(str(library))
        except OSError as error:
            raise RuntimeError(f"what the compiler made cannot be loaded ({error})") from error


def shown_as(name: str) -> AbstractContextManager[object]:
    """While the block runs, a profile that is being made shows it as an operator, not as the time between two."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} fails: {next(iter(done.stderr.splitlines()), f'exit code {done.returncode}')}")
