"""Run by vLLM's python: a script with Triton's kernels in its interpreter: python in_interpreter.py SCRIPT [ARGUMENTS]"""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
from triton.backends import backends

if __name__ == "__main__":
    # vLLM's CPU build goes without Triton where Triton has no backend for CPUs, which its interpreter does not need.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    sys.argv = sys.argv[1:]
    runpy.run_path(str(Path(__file__).with_name(sys.argv[0])), run_name="__main__")
