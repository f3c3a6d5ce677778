"""A stand-in for the Hugging Face hub: what its client asks of it to make a repository and to upload a folder, by LFS."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

TOKEN = "hf_good"


class StubHub:
    """`http://127.0.0.1:<port>`, with one repository at most.

    Attributes:
        repository: its name; None: there is none. private: as it was made. files: path -> content, as committed.
        blobs: LFS contents by SHA-256. uploaded: their hashes in the order in which they came. commits: their number.
        hold: an upload waits for it. holding: set while one waits.
    """

    def __init__(self) -> None:
        self.repository: str | None = None
        self.private = False
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.commits = 0
        self.free_uploads = 10**6
        self.hold, self.holding, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.hold.set()
        self._http.shutdown()
        self._http.server_close()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: StubHub

    def do_GET(self) -> None:
        if self._is_refused():
            return
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/main", self.path.partition("?")[0]):
            files = [{"type": "file", "path": name, "oid": "0", "size": len(text)} for name, text in self.hub.files.items()]
            self._answer(files)
        else:
            self._answer({"id": self.hub.repository, "private": self.hub.private, "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_refused():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            self._answer({"files": [self._upload_mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._upload_action(each) for each in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        content, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.rpartition("/")[2]
        with self.hub.lock:
            waits, self.hub.free_uploads = self.hub.free_uploads <= 0, self.hub.free_uploads - 1
        if waits:
            self.hub.holding.set()
            self.hub.hold.wait()
            return
        assert hashlib.sha256(content).hexdigest() == oid
        with self.hub.lock:
            self.hub.blobs[oid] = content
            self.hub.uploaded.append(oid)
        self._answer({})

    def _is_refused(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
            return True
        return False

    def _create(self, requested: dict[str, Any]) -> None:
        name = f"{requested['organization']}/{requested['name']}"
        if self.hub.repository is not None:
            self._answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repository, self.hub.private = name, requested["visibility"] == "private"
        self.hub.files[".gitattributes"] = b"*.safetensors filter=lfs\n"
        self._answer({"url": f"{self.hub.url}/{name}", "name": name})

    def _upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        """By name, with the hash of what is there: sha256 of a large file, git's of another."""
        content, is_large = self.hub.files.get(file["path"]), file["path"].endswith(".safetensors")
        oid = None if content is None else hashlib.sha256(content).hexdigest() if is_large else git_hash(content)
        return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

    def _upload_action(self, requested: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": requested["oid"], "size": requested["size"]}
        return (
            found
            if requested["oid"] in self.hub.blobs
            else found | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{requested['oid']}"}}}
        )

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.hub.files[value["path"]]
        self.hub.commits += 1
        oid = f"{self.hub.commits:040}"
        self._answer({"commitUrl": f"{self.hub.url}/{self.hub.repository}/commit/{oid}", "commitOid": oid})

    def _answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass
