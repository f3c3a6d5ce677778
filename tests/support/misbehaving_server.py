"""An OpenAI-compatible server in this process that answers as it should, unless a test sets what it does instead."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Misbehaviour = Callable[["Handler", dict], bool]
"""Handles a request by itself and returns True, or returns False to have it answered normally."""


class MisbehavingServer:
    """`http://127.0.0.1:<port>`; answers a prompt given as token ids with the text "answer to <ids>".

    Attributes:
        misbehave: called with each completion request that is no probe (max_tokens > 1).
        known: fields outside the standard that it takes; a wrong type there is refused, others are ignored.
        accepts: the ways in which it takes prompts. bodies: of all requests that were no probes.
    """

    def __init__(self, port: int = 0) -> None:
        self.misbehave: Misbehaviour = lambda handler, body: False
        self.known = {"top_k": int, "min_p": float, "repetition_penalty": float}
        self.accepts = {"tokens", "text", "messages"}
        self.models = ["tiny"]
        self.count_prompt: Callable[[dict], int] = lambda body: len(body["prompt"])
        self.text: Callable[[dict], str] = lambda body: f"answer to {body['prompt']}"
        self.extra_choice: dict = {}
        self.streams = True
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self._http = PatientHTTPServer(("127.0.0.1", port), type("BoundHandler", (Handler,), {"server_state": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def die(self) -> None:
        """For good: connections are refused from now on."""
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> "MisbehavingServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.die()


class PatientHTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a connection that finds the queue full, of five by default, is tried again after a second


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: MisbehavingServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.send_json(200, {"data": [{"id": name} for name in self.server_state.models]})
        else:
            self.send_json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        refusal = self.refusal(body)
        if refusal:
            self.send_json(400, {"error": refusal})
            return
        if body["max_tokens"] == 1:
            self.answer(body)
            return
        with state.lock:
            state.bodies.append(body)
            state.in_flight += 1
            state.most_in_flight = max(state.most_in_flight, state.in_flight)
        try:
            if not state.misbehave(self, body):
                self.answer(body)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with state.lock:
                state.in_flight -= 1

    def refusal(self, body: dict) -> str | None:
        way = "messages" if "messages" in body else "text" if isinstance(body.get("prompt"), str) else "tokens"
        if way not in self.server_state.accepts:
            return f"{way}: not supported"
        for name, kind in self.server_state.known.items():
            if name in body and not isinstance(body[name], kind):
                return f"{name} is not of type {kind.__name__}"
        return None

    def answer(self, body: dict) -> None:
        state = self.server_state
        text = state.text(body)
        usage = {"prompt_tokens": state.count_prompt(body), "completion_tokens": len(text.split())}
        if body["stream"] and state.streams:
            self.begin_stream()
            for word in text.split(" "):
                self.send_event({"choices": [{"text": word if text.startswith(word) else f" {word}"}]})
            self.send_event({"choices": [{"text": "", "finish_reason": "stop"}]})
            self.send_event({"choices": [], "usage": usage})
            self.send_chunk(b"data: [DONE]\n\n")
            self.send_chunk(b"")
        else:
            part = {"message": {"content": text, "role": "assistant"}} if "messages" in body else {"text": text}
            self.send_json(200, {"choices": [{**part, **state.extra_choice, "finish_reason": "stop"}], "usage": usage})

    def send_json(self, status: int, value: object, **headers: str) -> None:
        self.send_bytes(status, json.dumps(value).encode(), **headers)

    def send_bytes(self, status: int, data: bytes, *, claim: int | None = None, **headers: str) -> None:
        """claim: the content length that the header states; None: the true one."""
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data) if claim is None else claim))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def send_event(self, value: dict) -> None:
        self.send_chunk(f"data: {json.dumps(value)}\n\n".encode())

    def send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        """Clients that go away are expected here."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *arguments: object) -> None:
        pass


def first(times: int, misbehaviour: Callable[[Handler, dict], None]) -> Misbehaviour:
    """Misbehave this number of times, then no more."""
    left = [times]
    lock = threading.Lock()

    def once(handler: Handler, body: dict) -> bool:
        with lock:
            if left[0] == 0:
                return False
            left[0] -= 1
        misbehaviour(handler, body)
        return True

    return once


def stall(handler: Handler, body: dict) -> None:
    handler.begin_stream()
    handler.send_event({"choices": [{"text": "half an"}]})
    time.sleep(5)


def hang(handler: Handler, body: dict) -> None:
    time.sleep(5)
    handler.cut()


def cut_in_the_middle(handler: Handler, body: dict) -> None:
    handler.begin_stream()
    handler.send_event({"choices": [{"text": "half an"}]})
    handler.cut()


def end_early(handler: Handler, body: dict) -> None:
    """A stream that ends in good form, but the answer in it does not."""
    handler.begin_stream()
    handler.send_event({"choices": [{"text": "half an"}]})
    handler.send_chunk(b"")


def cut_json(handler: Handler, body: dict) -> None:
    handler.send_bytes(200, b'{"choices": [{"text": "half', claim=5000)
    handler.cut()


def error_500(handler: Handler, body: dict) -> None:
    handler.send_json(500, {"error": "CUDA error: device-side assert triggered"})
