#!/usr/bin/env -S python3 -ES
"""What launchers start in place of python: requests a process that is forked with its libraries imported (launches.py).

That one gets the arguments, the environment, the folder, both outputs and the signals; this one ends as it ends.
"""

import json
import os
import signal
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["LT_TRAIN_WARM_PYTHON"])
    order = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd(), "client": os.getpid()}
    with server.makefile("rw") as lines:
        print(json.dumps(order), file=lines, flush=True)
        forked = int(lines.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: os.kill(forked, number))
        code = int(lines.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
