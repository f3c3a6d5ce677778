"""Run by vLLM's python: imports vLLM once, and forks for each order, a line of JSON on stdin; its exit code is a line on stdout.

An order: {"command": [SCRIPT or -m MODULE, arguments], "environment": {...}, "folder": ..., "stdout": file, "stderr": file}
"""

import gc
import json
import multiprocessing
import os
import runpy
import sys

REPLIES = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints when it is imported is no reply

import vllm.v1.worker.cpu_worker  # noqa: E402
from vllm import LLM  # noqa: E402

import lt_train.vllm_plugin.model  # noqa: E402

IMPORTED = vllm, LLM, lt_train


def work(order: dict) -> None:
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    for stream in (sys.stdout, sys.stderr):
        with open(order[stream.name.strip("<>")], "ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    gc.freeze()  # or each engine looks several times for garbage in all that vLLM holds
    option, *rest = order["command"]
    if option == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *rest]
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    forking = multiprocessing.get_context("fork")
    for line in sys.stdin:
        process = forking.Process(target=work, args=(json.loads(line),))
        process.start()
        process.join()
        print(process.exitcode, file=REPLIES, flush=True)
