"""vLLM's server for an export, in vLLM's own environment: python -m lt_train.vllm_plugin.command EXPORT [options of vLLM]

vLLM's own class for an export without sinks is not enough: its Qwen2 does not know `layer_types` and runs full attention in every
layer, silently. So the class of every export is named, but of GraniteSWA, which vLLM's own class computes.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from lt_train.hybrid.spec import GRANITE_SWA
from lt_train.vllm_plugin.checks import check_served

CHUNK = 1024
"""Tokens that a step computes at most (`--max-num-batched-tokens`): streaming layers hold as many beside their window, and vLLM's
own default, up to 8,192, would leave little of the gain."""


def server_command(export: Path, options: Sequence[str]) -> list[str]:
    """vLLM's server and its arguments; later `options` override ours.

    Raises:
        ValueError: an export that the plugin does not compute, or none at all.
    """
    try:
        config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{export}: no checkpoint: {error.strerror}: config.json. Fix: name an export") from error
    check_served(SimpleNamespace(**config))
    ours = ["--max-num-batched-tokens", str(CHUNK)]
    if config["model_type"] != GRANITE_SWA:
        family = config["model_type"].removeprefix("lt_hybrid_").capitalize()
        ours += ["--hf-overrides", json.dumps({"architectures": [f"Hybrid{family}ForCausalLM"]})]
    # Not the command `vllm`: the CPU build's does not start, for it looks for a package named vllm.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export), *ours, *options]


if __name__ == "__main__":
    try:
        command = server_command(Path(sys.argv[1]), sys.argv[2:])
    except (IndexError, ValueError) as error:
        sys.exit(f"error: {error}" if isinstance(error, ValueError) else __doc__)
    os.execv(command[0], command)
