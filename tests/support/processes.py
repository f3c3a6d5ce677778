"""Processes of a test that begin with their libraries imported: a new interpreter takes ten seconds for torch, TRL and DeepSpeed.

They are forked from a server that has imported those and nothing of lt_train, or from a second one that has imported lt_train as
well. All processes of pytest share the two. What is killed, what trains with others, what must not know lt_train and what is known
by its exit code starts here. Where the start itself is tested, or a variable of the environment that a library reads when it is
imported, there is `subprocess`.
"""

import atexit
import gc
import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import arbitrary_address, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import psutil
import pytest

from tests.support.repository import ENVIRONMENT, REPOSITORY

MODELS = (
    *("glm4", "gpt_oss", "granite", "granite_swa", "ministral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe"),
    *("seed_oss", "smollm3"),
)
IMPORTED = [
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles a function: the compiler's import takes four seconds
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in MODELS),
    "transformers.models.qwen2.tokenization_qwen2",
    "trl.trainer.sft_trainer",
    "trl.kernels.chunked_divergence",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "setuptools.dist",
    "peft",
    "wandb.sdk.launch.inputs.internal",  # wandb.init imports it, for some three seconds
    "requests",  # likewise
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_agg",
    "math_verify",
    "typer",
    "rich.progress",
    "pydantic",
    "pytest",
    "tests.support.first_calls",
]

OF_LT_TRAIN = [
    "lt_train.cli",
    "lt_train.commands.runs",
    "lt_train.dataset.loading",
    "lt_train.pipeline.run",
    "lt_train.selection.picture",
    "tests.support.tiny_training",
]

_ADDRESSES = ("LT_TRAIN_TESTS_FORK_SERVER", "LT_TRAIN_TESTS_SECOND_FORK_SERVER")
"""Variables of the environment."""

_SERVERS = "from tests.support.processes import serve_forks; serve_forks(*map(int, __import__('sys').argv[1:]))"

_forked = multiprocessing.get_context("forkserver")
_starting = threading.Lock()


class _Server(forkserver.ForkServer):
    """One that another process has."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def ensure_running(self) -> None:
        if self._forkserver_address is None:
            self._forkserver_address = os.environ[self._address]
            self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # it ends with the process that has it


_imports_libraries, _knows_lt_train = map(_Server, _ADDRESSES)


def offer_servers(*, at_once: bool) -> None:
    """Make the servers' addresses. They start now or when something first connects to either, and end when this process does."""
    listeners = []
    for variable in _ADDRESSES:
        listeners.append(listener := socket.socket(socket.AF_UNIX))
        listener.bind(address := arbitrary_address("AF_UNIX"))
        listener.listen()
        os.environ[variable] = ENVIRONMENT[variable] = address
    threading.Thread(target=_start_servers, args=(listeners, at_once), daemon=True).start()


def _start_servers(listeners: list[socket.socket], at_once: bool) -> None:
    if not at_once:
        wait(listeners)
    theirs, _ours = os.pipe()  # ours stays open
    given = [*(listener.fileno() for listener in listeners), theirs]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}  # where they find tests/
    command = [sys.executable, "-c", _SERVERS, *map(str, given)]
    subprocess.Popen(command, pass_fds=given, env=environment, stdout=subprocess.DEVNULL)  # DeepSpeed prints there
    for listener in listeners:
        listener.close()
    os.close(theirs)


def serve_forks(first: int, second: int, ends: int) -> None:
    """Listen at `first`, and a fork at `second`, until the other side of `ends` is closed."""
    for name in IMPORTED:
        importlib.import_module(name)
    if knows_lt_train := os.fork() == 0:
        for name in OF_LT_TRAIN:
            importlib.import_module(name)
    gc.freeze()
    os.close(first if knows_lt_train else second)
    forkserver.main(second if knows_lt_train else first, ends, [])


def start(function: Callable[..., Any], *arguments: Any, output: Path, **environment: str) -> ForkServerProcess:
    """Call a function that can be imported by its name. What it prints is appended to `output`, a traceback too."""
    return _start(True, function, arguments, (output, output), ENVIRONMENT | environment, os.getcwd())


def start_python(
    command: Sequence[str],
    output: Path,
    *,
    errors: Path | None = None,
    env: Mapping[str, str] = ENVIRONMENT,
    cwd: Path | None = None,
    starter: int | None = None,
) -> ForkServerProcess:
    """As `subprocess.Popen` with `[sys.executable, …]`: a script, -m MODULE or -c CODE, and its arguments.

    Args:
        starter: the process that it takes for its parent; None: this one.
    """
    assert command[0] == sys.executable, command
    given = [*map(str, command[1:])], starter or os.getpid()
    is_ours = command[1:3] == ["-m", "lt_train"] or Path(command[1]).is_relative_to(REPOSITORY / "tests")
    return _start(is_ours, _run_python, given, (output, errors or output), dict(env), str(cwd or os.getcwd()))


def _start(knows_lt_train: bool, *given: Any) -> ForkServerProcess:
    process = _forked.Process(target=_call, args=given)
    server = _knows_lt_train if knows_lt_train else _imports_libraries
    with _starting, pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "connect_to_new_process", server.connect_to_new_process)
        process.start()
    return process


def run(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    **pipes: Any,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with `[sys.executable, …]`, text and both outputs captured."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "stdout"), Path(scratch, "stderr")
        process = start_python(command, written[0], errors=written[1], env=os.environ if env is None else env, cwd=cwd)
        code = exit_code(process, timeout)
        return subprocess.CompletedProcess(command, code, *(path.read_text(errors="replace") for path in written))


def popen(command: Sequence[str], output: Path, *, env: Mapping[str, str]) -> SimpleNamespace:
    """What waits for `subprocess.Popen` or ends it can do so with this."""
    process = start_python(command, output, env=env)
    return SimpleNamespace(poll=lambda: process.exitcode, kill=process.kill, terminate=process.terminate, wait=process.join)


@contextmanager
def checks_of_exports_are_forked() -> Iterator[None]:
    """The process that loads an export by its card's code is forked as well; it cannot import lt_train either way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lt_train.export.verify.subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
        yield


@contextmanager
def probes_are_forked() -> Iterator[None]:
    """A training in this process forks its probes, with the environment and the arguments that it gives them."""

    def forked(command: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: Any) -> SimpleNamespace:
        return popen(command, Path(stdout.name), env=env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lt_train.training.probes.launching.subprocess", SimpleNamespace(Popen=forked, DEVNULL=subprocess.DEVNULL))
        yield


def start_ranks(function: Callable[..., Any], *arguments: Any, outputs: Path, world_size: int = 2) -> list[ForkServerProcess]:
    """Call it in the processes of one launch, with the environment that launchers set; rank 0 prints into `outputs`/0.txt."""
    outputs.mkdir(parents=True, exist_ok=True)
    launch = dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"], str(world_size))  # the last one by deepspeed
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(function, *arguments, output=outputs / f"{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **launch)
        for rank in range(world_size)
    ]


def exit_code(process: ForkServerProcess, seconds: float = 600) -> int:
    """Wait for its end. That of a process which a signal ended is the signal's number below zero."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the process has not ended within {seconds} s")
    return process.exitcode


def call_in_ranks(function: Callable[..., Any], *arguments: Any, outputs: Path) -> list[tuple[int, str]]:
    """Exit code and output of each of two ranks."""
    ranks = start_ranks(function, *arguments, outputs=outputs)
    return [(exit_code(process), (outputs / f"{rank}.txt").read_text()) for rank, process in enumerate(ranks)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], outputs: tuple[Path, Path], environment: dict[str, str], folder: str
) -> None:
    gc.freeze()  # or each training looks twice for garbage in all that the libraries hold
    atexit._clear()  # what the server's libraries would do at its end, such as removing their temporary folders
    weakref.finalize._registered_with_atexit = False
    weakref.finalize._registry.clear()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the server's expect to seek, as in what it prints to itself
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without


def _run_python(command: list[str], starter: int) -> None:
    """Do what a new interpreter does with these arguments, and with what transformers reads when it is imported.

    Its parent is the server; code that ends with its parent is to look at `starter`.
    """
    own, parent_of = os.getpid(), os.getppid
    os.getppid = lambda: parent_of() if os.getpid() != own else starter if psutil.pid_exists(starter) else 1
    if "HF_MODULES_CACHE" in os.environ:
        import transformers.dynamic_module_utils as dynamic

        dynamic.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        from transformers.utils import logging

        logging.set_verbosity(logging.log_levels[os.environ["TRANSFORMERS_VERBOSITY"]])
    safe_path = command[0] == "-P"
    option, *rest = command[safe_path:]
    first = "" if option in ("-m", "-c") else str(Path(option).parent)
    sys.path[:] = [*([] if safe_path else [first]), *(path for path in sys.path if path)]
    if option == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *rest]
        runpy.run_path(option, run_name="__main__")
