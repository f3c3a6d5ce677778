"""`lt-train serve` as a process: its address, its end, and what it refuses."""

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx2
import psutil
import pytest

from lt_train.runtime.errors import UserError
from lt_train.serving.address import listening
from lt_train.serving.draft_options import DraftOptions
from tests.support.processes import exit_code, free_port, start
from tests.support.repository import REPOSITORY
from tests.support.runs import call_lt_train
from tests.support.served import until

OLD = REPOSITORY / "tests/fixtures/run_before_the_folders"
EXPORT = OLD / "finished/old/export"


@contextmanager
def serving(folder: Path, output: Path, *more: str) -> Iterator[tuple[ForkServerProcess, str]]:
    """The process and its address."""
    output.touch()
    process = start(call_lt_train, ["serve", str(folder), "--port", "0", *more], output=output)
    try:
        until(lambda: "ready at" in output.read_text() or not process.is_alive(), seconds=120)
        assert process.is_alive(), output.read_text()
        yield process, output.read_text().split("ready at ")[1].split()[0]
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_server_and_its_streams_without_a_traceback(tmp_path: Path, number: int, code: int) -> None:
    output = tmp_path / "output.txt"
    with serving(EXPORT, output) as (process, url):
        with httpx2.stream(
            "POST", f"{url}/completions", json={"prompt": "12", "max_tokens": 200, "stream": True, "temperature": 1}, timeout=60
        ) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            psutil.Process(process.pid).send_signal(number)
            signalled = time.monotonic()
            list(lines)
        assert exit_code(process, 60) == code, output.read_text()
        assert time.monotonic() - signalled < 15
    assert output.read_text().count("\n") == 3, output.read_text()  # the lines of its beginning


@pytest.mark.slow
def test_a_run_is_served_as_its_trained_hybrid_with_the_answers_of_its_export(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(OLD)
    texts = []
    for number, folder in enumerate((Path("finished/old"), EXPORT)):
        output = tmp_path / f"{number}.txt"
        with serving(folder, output, "--kv-budget", "64MiB") as (_, url):
            chat = {"messages": [{"role": "user", "content": "12+34"}], "max_tokens": 40, "temperature": 0}
            texts.append(httpx2.post(f"{url}/chat/completions", json=chat, timeout=60).json()["choices"][0]["message"]["content"])
            assert "KV cache 64 MiB" in output.read_text()
    assert texts[0] == texts[1] and texts[0]
    assert ("trained hybrid" in (tmp_path / "0.txt").read_text()) and ("export" in (tmp_path / "1.txt").read_text())


def test_a_port_in_use_is_one_sentence_before_anything_is_loaded(lt_train, monkeypatch) -> None:
    monkeypatch.setattr("lt_train.serving.server.load_checkpoint", lambda folder: 1 / 0)
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, out, err = lt_train("serve", EXPORT, "--port", port)
    assert (code, out) == (2, "")
    assert err == f"error --port: {port}: in use at 127.0.0.1. Fix: name another, or stop what listens there\n"


def test_the_draft_is_as_the_options_say(lt_train, monkeypatch) -> None:
    requested = []
    monkeypatch.setattr("lt_train.serving.server.serve", lambda *given: requested.append(given[4]))
    monkeypatch.setattr("lt_train.serving.chat.chat", lambda *_, draft, **__: requested.append(draft))
    for command in (["serve", EXPORT, "--port", "0"], ["chat", EXPORT]):
        for options in ([], ["--draft", "streaming"], ["--draft", "streaming", "--draft-layers", "1,5", "--draft-length", "4"]):
            assert lt_train(*command, *options)[0] == 0
    assert requested == 2 * [None, DraftOptions(), DraftOptions((1, 5), 4)]


def test_it_listens_at_127_0_0_1_by_default(lt_train, monkeypatch) -> None:
    requested = []
    monkeypatch.setattr("lt_train.serving.server.serve", lambda folder, taken, *_: requested.append(taken.getsockname()))
    for host in ([], ["--host", "0.0.0.0"]):
        assert lt_train("serve", EXPORT, "--port", free_port(), *host)[0] == 0
    assert [host for host, _ in requested] == ["127.0.0.1", "0.0.0.0"]


@pytest.mark.parametrize(
    ("host", "message"), [("no.such.host.invalid", "--host: no.such.host.invalid: no address"), ("192.0.2.1", "--host: 192.0.2.1")]
)
def test_an_address_that_is_none_of_this_machines_is_refused(host: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        listening(host, 0)


def test_ipv6_is_served_where_it_is_named() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        taken = listening("::1", 0)
    except UserError as error:
        pytest.skip(f"no ::1 here: {error}")
    with taken:
        assert taken.family == socket.AF_INET6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder. Fix: name a run's folder, runs/<name>, or an export, runs/<name>/export"),
        ([REPOSITORY / "data"], "data: neither a run nor an export."),
        ([EXPORT, "--kv-budget", "many"], "--kv-budget: many: no size. Fix: write it as 8GiB"),
        ([EXPORT, "--kv-budget", "-1"], "--kv-budget: -1: no size"),
        ([EXPORT, "--kv-budget", "100"], "--kv-budget: 100 bytes do not hold one sequence. Fix: raise it"),
        (
            [EXPORT, "--draft-length", "4"],
            "--draft-length: 4: nothing drafts. Fix: add --draft streaming, or",
        ),
        (
            [EXPORT, "--draft", "streaming", "--draft-layers", "1;2"],
            "--draft-layers: 1;2: no list of layers. Fix: write",
        ),
        ([EXPORT, "--draft", "streaming", "--draft-layers", "1,99"], "error --draft-layers: [99]: not in the model."),
        ([EXPORT, "--draft", "streaming", "--draft-length", "0"], "error --draft-length: 0: not within the window"),
        ([EXPORT, "--host", "no.such.host.invalid"], "--host: no.such.host.invalid: no address"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(lt_train, arguments, message) -> None:
    code, out, err = lt_train("serve", "--port", "0", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1, out + err
