"""Run by vLLM's python: a script with Triton's kernels in its interpreter: python in_interpreter.py SCRIPT [ARGUMENTS]"""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace


def forget_triton() -> None:
    """The process that this one is forked from has imported it, and what vLLM has of it, without the interpreter."""
    for name in list(sys.modules):
        if "triton" in name and name.startswith(("triton", "vllm.")) and not name.startswith("triton._C"):
            del sys.modules[name]


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    forget_triton()
    from triton.backends import backends

    # vLLM's CPU build goes without Triton where Triton has no backend for CPUs, which its interpreter does not need.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    sys.argv = sys.argv[1:]
    runpy.run_path(str(Path(__file__).with_name(sys.argv[0])), run_name="__main__")
