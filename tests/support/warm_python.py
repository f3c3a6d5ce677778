#!/usr/bin/env -S python3 -ES
"""What starts in place of python: requests a process that is forked with its libraries imported (launches.py, in_vllm/forked.py).

That one gets the arguments, the environment, the folder, the open files and the signals; this one ends as it ends.
"""

import contextlib
import json
import os
import signal
import socket
import sys

files = []
for number in map(int, os.listdir("/proc/self/fd")):
    with contextlib.suppress(OSError):  # that of the listing
        os.fstat(number)
        files.append(number)

with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["LT_TRAIN_WARM_PYTHON"])
    order = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
        "client": os.getpid(),
        "parent": os.getppid(),
    }
    socket.send_fds(server, [f"{json.dumps(order)}\n".encode()], files)
    with server.makefile() as lines:
        forked = int(lines.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: os.kill(forked, number))
        code = int(lines.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
