"""vLLM's own environment: its pins differ from ours, so its python is another one."""

import subprocess
from pathlib import Path

from lt_train.runtime.errors import UserError

NEEDED = ("vllm", "lt_train")


def check_vllm_environment(python: Path, option: str) -> None:
    """
    Args:
        option: the command line's, which names that python.

    Raises:
        UserError: no such python, or an environment without vLLM or our plugin.
    """
    look = f"from importlib.util import find_spec; print(*(name for name in {NEEDED} if find_spec(name) is None))"
    try:
        found = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True, cwd="/")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{option}: {python}: not a python that runs ({error}). Fix: name the python of vLLM's environment"
        ) from error
    if missing := found.stdout.split():
        raise UserError(
            f"{option}: {python}: its environment lacks {' and '.join(missing)}. Fix: pip install vllm==0.32.0 there (on a CPU as "
            "in launch/serve-vllm.sh), and pip install --no-deps lt-train"
        )
