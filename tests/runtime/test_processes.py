"""Two processes of a launch: one prints, and the failure of one ends both with its own message."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lt_train import __version__, cli
from lt_train.runtime import processes
from lt_train.runtime.processes import Process, is_lost_connection, this_process, wait_for_the_launcher, wait_until
from tests.support import failing_ranks
from tests.support.processes import exit_code, start_ranks
from tests.support.repository import REPOSITORY


def test_a_process_knows_its_place_from_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert this_process() == Process(0, 1, launched=False)
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert this_process() == Process(9, 16, launched=True)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_lost_process_is_distinguished_from_other_errors(error: Exception, lost: bool) -> None:
    assert is_lost_connection(error) == lost


def test_a_taken_port_is_reported_with_the_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(torch.distributed.DistNetworkError) as refused:
            torch.distributed.TCPStore("127.0.0.1", port, is_master=True)
    assert not is_lost_connection(refused.value)
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert cli._report(refused.value, Process(0, 2, True)) == 2
    assert f"port {port}, at which the processes meet, is in use" in capsys.readouterr().err


def test_the_first_process_reports_its_error_at_once_and_the_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    wait_for_the_launcher(Process(0, 2, True), ValueError())
    assert waited == []
    wait_for_the_launcher(Process(1, 2, True), ValueError())
    wait_for_the_launcher(Process(0, 2, True), RuntimeError("gloo: closed"))
    assert len(waited) == 2


@pytest.mark.parametrize(("comes_after", "seen_after"), [(0.0, 0.0), (0.25, 0.3), (3.0, 3.6), (60.0, 62.0)])
def test_what_another_process_does_is_seen_after_a_fifth_more_of_the_time_or_two_seconds(
    monkeypatch: pytest.MonkeyPatch, comes_after: float, seen_after: float
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", pauses.append)
    monkeypatch.setattr(processes.time, "monotonic", lambda: 1000.0 + sum(pauses))
    wait_until(lambda: sum(pauses) >= comes_after)
    assert comes_after <= sum(pauses) <= seen_after + 1e-9
    assert len(pauses) < 60


def test_an_abort_while_the_interpreter_ends_does_not_fail_a_finished_process_of_several() -> None:
    program = "import atexit, os; from lt_train import cli; atexit.register(os.abort); cli.main()"
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for arguments, code in ((["--version"], 0), (["validate"], 2)):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, env={**os.environ, **place, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert (__version__ in done.stdout) == (code == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "failing", "code", "reported"),
    [("bug", "1", 1, "ZeroDivisionError: a bug"), ("mistake", "01", 2, "this recipe is spoilt")],
)
def test_what_one_or_both_processes_find_ends_both_and_is_reported_once(
    tmp_path: Path, kind: str, failing: str, code: int, reported: str
) -> None:
    """A bug in one with its traceback, a mistake in both without. Launchers end the others when the first process fails."""
    ranks = start_ranks(failing_ranks.validate, kind, failing, outputs=tmp_path)
    first, other = ranks[int(failing[0])], ranks[1 - int(failing[0])]
    assert exit_code(first, seconds=60) == code
    other.join(0.5)  # launchers look about once a second
    other.terminate()
    assert exit_code(other, seconds=60) != 0
    said = "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert said.count(reported) == 1, said
    assert said.count("Traceback") == (kind == "bug") and "another process was lost" not in said, said
