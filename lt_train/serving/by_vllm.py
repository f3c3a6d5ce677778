"""`lt-train serve --vllm PYTHON`: vLLM in its own environment serves an export that it can compute."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from lt_train.runtime.files import read_json
from lt_train.runtime.run_paths import EXPORT_MANIFEST, RunPaths
from lt_train.vllm_plugin.checks import check_served


def export_in(folder: Path) -> Path | None:
    """The export that `folder` is, or that this run made; None: there is none yet."""
    return next((found for found in (folder, RunPaths(folder).export) if (found / EXPORT_MANIFEST).is_file()), None)


def obstacle(export: Path | None) -> str | None:
    """Why vLLM cannot serve it; None where it can."""
    if export is None:
        return "there is no export yet, and vLLM loads nothing else"
    try:
        check_served(SimpleNamespace(**read_json(export / "config.json", "config of a checkpoint")))
    except ValueError as error:
        return str(error)
    return None


def become_vllm(python: Path, export: Path, host: str, port: int, kv_budget: int | None, options: Sequence[str]) -> NoReturn:
    """This process becomes vLLM's server, which gets its signals."""
    budget = () if kv_budget is None else ("--kv-cache-memory-bytes", str(kv_budget))
    address = ("--host", host, "--port", str(port))
    command = [str(python), "-m", "lt_train.vllm_plugin.command", str(export), *address, *budget, *options]
    os.execv(python, command)
