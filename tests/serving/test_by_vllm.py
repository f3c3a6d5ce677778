"""What `lt-train serve --vllm` starts, leaves to the built-in engine, and refuses. Real servers: inference/servers/."""

import json
import sys
from pathlib import Path

import pytest

from lt_train.inference.servers import vllm_environment
from lt_train.runtime.run_paths import EXPORT_MANIFEST, RunPaths
from lt_train.serving import by_vllm

LEARNED = {"model_type": "lt_hybrid_qwen3", "w_sink": 0, "learned_sinks": True}
GRANITE_SWA = {"model_type": "granite_swa"}
TOKENS = {"model_type": "lt_hybrid_qwen3", "w_sink": 4}
HEADS = {"model_type": "lt_hybrid_qwen3", "w_sink": 4, "streaming_kv_heads": [[0], []]}
OTHER_FAMILY = {"model_type": "lt_hybrid_glm4", "w_sink": 4}
TWO_WINDOWS = HEADS | {"sliding_window": 9, "w_recent": 8}


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """What this process would become, and "built-in" where the engine would serve."""
    found: list[list[str]] = []
    monkeypatch.setattr(by_vllm.os, "execv", lambda python, command: found.append(command))
    monkeypatch.setattr("lt_train.serving.server.serve", lambda *given: found.append(["built-in"]))
    monkeypatch.setattr(vllm_environment, "NEEDED", ("json",))  # an environment that has what vLLM's needs
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    return found


def export(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    (folder / EXPORT_MANIFEST).write_text("{}")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [LEARNED, GRANITE_SWA, TOKENS, HEADS])
def test_an_export_that_vllm_computes_is_served_by_it_with_the_options_given(lt_train, tmp_path, started, config) -> None:
    folder = export(tmp_path / "export", config)
    lt_train("serve", folder, "--vllm", sys.executable, "--port", "0", "--kv-budget", "2GiB", "--", "--dtype", "float32")
    command = started[0]
    assert command[:4] == [sys.executable, "-m", "lt_train.vllm_plugin.command", str(folder)]
    assert command[command.index("--host") + 1] == "127.0.0.1" and int(command[command.index("--port") + 1]) > 0
    assert command[-4:] == ["--kv-cache-memory-bytes", str(2 * 2**30), "--dtype", "float32"]


def test_of_a_run_its_export_is_served(lt_train, tmp_path, started, monkeypatch) -> None:
    made = export(RunPaths(tmp_path / "run").export, LEARNED)
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    lt_train("serve", tmp_path / "run", "--port", "0")
    assert str(made) in started[0]


def test_what_vllm_cannot_compute_is_reported_and_served_by_the_built_in_engine(lt_train, tmp_path, started) -> None:
    for folder, reason in (
        (export(tmp_path / "export", OTHER_FAMILY), "model_type: lt_hybrid_glm4: "),
        (export(tmp_path / "windows", TWO_WINDOWS), "w_recent: 8: "),
        (tmp_path / "run", "there is no export yet"),
    ):
        code, out, _ = lt_train("serve", folder, "--vllm", sys.executable, "--port", "0")
        assert code == 0 and out.startswith(f"not by vLLM: {reason}")
    assert started == 3 * [["built-in"]]


def test_a_draft_is_refused_where_vllm_serves(lt_train, tmp_path, started) -> None:
    arguments = ("--vllm", sys.executable, "--port", "0", "--draft", "streaming")
    code, _, err = lt_train("serve", export(tmp_path / "learned", LEARNED), *arguments)
    assert code == 2 and "--draft: vLLM serves this export, and decodes in its own way. Fix: remove it, or --vllm" in err
    assert lt_train("serve", export(tmp_path / "other", OTHER_FAMILY), *arguments)[0] == 0
    assert started == [["built-in"]]


def test_a_python_without_vllm_and_options_without_a_server_for_them_are_refused(lt_train, tmp_path, started, monkeypatch) -> None:
    folder = export(tmp_path / "export", LEARNED)
    monkeypatch.setattr(vllm_environment, "NEEDED", ("json", "no_such_package"))
    for arguments, message in [
        (["--vllm", sys.executable], "its environment lacks no_such_package. Fix: pip install vllm==0.32.0 there"),
        (["--vllm", tmp_path / "nowhere"], "not a python that runs"),
        (["--", "--dtype", "float32"], "serve: --dtype float32: options of vLLM, which is not used. Fix: add --vllm PYTHON"),
    ]:
        code, out, err = lt_train("serve", folder, "--port", "0", *arguments)
        assert code == 2 and message in err and err.count("\n") == 1, out + err
    assert started == []
