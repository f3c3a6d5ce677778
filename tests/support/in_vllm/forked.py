"""Run by vLLM's python: imports vLLM once, and forks for each order of tests/support/warm_python.py: python forked.py LISTENER

LISTENER is the number of an open Unix socket. It ends when its stdin does.
"""

import atexit
import fcntl
import gc
import json
import multiprocessing
import os
import runpy
import selectors
import socket
import sys

WARM_PYTHON = os.environ["WARM_PYTHON"]
FIRST_FREE = 4096
"""Of numbers of open files: far above those that a client has."""

import vllm.entrypoints.openai.api_server  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402
from vllm import LLM  # noqa: E402

import lt_train.vllm_plugin.model  # noqa: E402

IMPORTED = vllm, LLM, lt_train


def work(order: dict, files: list[int]) -> None:
    """Do what a new interpreter does with these arguments, and with the open files of the client under their numbers."""
    atexit._clear()
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    apart = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for file in files]
    for file, number in zip(apart, order["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.executable = WARM_PYTHON  # whatever it starts is forked, too
    multiprocessing.set_executable(WARM_PYTHON)
    gc.freeze()  # or each engine looks several times for garbage in all that vLLM holds
    option, *rest = (argument for argument in order["arguments"] if argument != "-u")
    try:
        if option == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif option == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [option, *rest]
            runpy.run_path(option, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without


def received(connection: socket.socket) -> tuple[dict, list[int]]:
    text, files, *_ = socket.recv_fds(connection, 2**20, 253)
    while not text.endswith(b"\n"):
        text += connection.recv(2**20)
    return json.loads(text), files


def serve(listener: socket.socket) -> None:
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    forking = multiprocessing.get_context("fork")
    while True:
        for key, _ in waiting.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                order, files = received(connection)
                process = forking.Process(target=work, args=(order, files))
                process.start()
                for file in files:
                    os.close(file)
                connection.sendall(f"{process.pid}\n".encode())
                ended = os.pidfd_open(process.pid)  # `process.sentinel` is closed by an exec, too
                for each in (connection, ended):
                    waiting.register(each, selectors.EVENT_READ, (process, connection))
                continue
            process, connection = key.data
            if key.fileobj is connection:  # its client has ended
                process.kill()
                waiting.unregister(connection)
                continue
            process.join()
            waiting.unregister(key.fd)
            os.close(key.fd)
            if connection in waiting.get_map():
                waiting.unregister(connection)
                connection.sendall(f"{process.exitcode}\n".encode())
            connection.close()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        serve(listener)
    for process in multiprocessing.active_children():
        process.kill()
