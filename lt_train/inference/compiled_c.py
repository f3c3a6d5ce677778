"""C files of this folder as libraries for this processor, compiled when they are first needed and kept for later processes."""

import os
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext, suppress
from ctypes import CDLL
from functools import cache
from pathlib import Path

import torch
from torch.profiler import record_function

from lt_train.runtime.files import replacing
from lt_train.runtime.fingerprints import sha256_of

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-trapping-math", "-fno-math-errno", "-fPIC")
_SECONDS = 60


@cache
def compiled(source: str, *flags: str) -> CDLL:
    """The library of a file: one that an earlier process has left in the user's cache, or else made by a second of the compiler.

    Raises:
        RuntimeError: the compiler is missing or fails, in its words.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, or what CC names)")
    code, command = Path(__file__).with_name(source), [compiler, *_FLAGS, *flags]
    # What the compiler would run names its version and, for "native", all that this processor has: homes are shared by machines.
    made_of = code.read_bytes(), _run([*command, "-###", "-S", str(code), "-o", os.devnull]).encode()
    kept = _cache_folder() / f"{code.stem}-{sha256_of(made_of)}.so"
    with suppress(OSError):  # there is none yet
        return CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        objects, library = Path(folder, "compiled.o"), Path(folder, "compiled.so")
        _run([*command, "-c", str(code), "-o", str(objects)])
        _run([compiler, "-shared", str(objects), "-o", str(library)])  # without OpenMP's library: torch has loaded its own
        try:
            loaded = CDLL(str(library))
        except OSError as error:
            raise RuntimeError(f"what the compiler made cannot be loaded ({error})") from error
        with suppress(OSError), replacing(kept) as copy:  # a home that is full or only read costs each process that second
            shutil.copyfile(library, copy)
        return loaded


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return folder / "lt_train" if folder.is_absolute() else Path(os.devnull)  # a user without a home, of whom nothing is kept


def shown_as(name: str) -> AbstractContextManager[object]:
    """While the block runs, a profile that is being made shows it as an operator, not as the time between two."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


def _run(command: list[str]) -> str:
    """What it writes about its work."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} fails: {next(iter(done.stderr.splitlines()), f'exit code {done.returncode}')}")
    return done.stderr
