"""What wandb's client asks of a server, answered by one in this process, which keeps the rows of a single run's history."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class WandbServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.rows: dict[int, dict[str, Any]] = {}
        """By their place, which the client names: one that names a taken place replaces its row."""

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self.rows[place] for place in sorted(self.rows)]


@contextmanager
def serving() -> Iterator[WandbServer]:
    with WandbServer() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            self._reply({"data": self._answer(request.get("operationName"), request.get("variables"))})
            return
        if self.path.endswith("/file_stream"):
            added = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            self.server.rows.update(enumerate(map(json.loads, added["content"]), start=added["offset"]))
        self._reply({})

    def _answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        history = self.server.history
        project = {"name": "tests", "entity": {"id": "e", "name": "e"}}
        run = {"id": "r", "name": "r", "displayName": "r", "config": "{}", "project": project, "historyLineCount": len(history)}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": run, "inserted": not history}}
        if operation == "RunResumeStatus":
            tail = {"historyTail": json.dumps([json.dumps(row) for row in history[-1:]]), "eventsTail": "[]"}
            counts = {"logLineCount": 0, "eventsLineCount": 0, "summaryMetrics": "{}", "wandbConfig": '{"t": 1}', "tags": []}
            return {"model": {"id": "m", **project, "bucket": {**run, **tail, **counts} if history else None}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.server.url}/files/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": "e", "username": "v", "flags": "{}", "teams": {"edges": []}}}
        return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
