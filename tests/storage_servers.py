"""Web servers for tests of remote storage: a folder over HTTP with range requests, without them, or as a hub."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class WebServer:
    """A running server; `ranges` has (name, first, stop) of every range sent, `num_whole` counts whole files sent."""

    url: str
    folder: Path
    has_ranges: bool
    num_drops: int = 0  # so many answers are cut in the middle
    num_busy: int = 0  # so many requests are told to come back later
    is_closed: bool = False  # every request is refused
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    bytes_sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str) -> bool:
        """Count one down, if there is one left."""
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return left > 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: WebServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        state, name = self.state, self.path.partition("?")[0].lstrip("/")
        path = state.folder / name
        if state.is_closed:
            return self._send(403, b"", with_body=with_body)
        if path.is_dir():
            links = "".join(f'<a href="{child.name}">{child.name}</a>' for child in sorted(path.iterdir()))
            return self._send(200, links.encode(), with_body=with_body, headers={"Content-Type": "text/html"})
        if not path.is_file():
            return self._send(404, b"", with_body=with_body)
        if with_body and state.take("num_busy"):
            return self._send(503, b"", with_body=True)
        size, first, status = path.stat().st_size, 0, 200
        last, headers = size - 1, {"ETag": f'"{path.stat().st_mtime_ns}"'}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and state.has_ranges:
            first, last = int(match[1]), min(int(match[2]), last)
            headers["Content-Range"], status = f"bytes {first}-{last}/{size}", 206
            state.ranges.append((name, first, last + 1))
        with path.open("rb") as file:
            file.seek(first)
            data = file.read(last + 1 - first)
        return self._send(status, data, with_body=with_body, headers=headers)

    def _send(self, status: int, data: bytes, *, with_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not with_body:
            return
        if len(data) > 1 and status == 206 and self.state.take("num_drops"):
            data = data[: len(data) // 2]
            self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that has read enough
            for start in range(0, len(data), 1 << 16):
                self.wfile.write(data[start : start + (1 << 16)])
                self.state.bytes_sent += len(data[start : start + (1 << 16)])


class _HubHandler(_Handler):
    """What a Hugging Face hub answers about the data set `user/name`, whose files are the folder's."""

    def do_GET(self) -> None:
        address, _, query = self.path.partition("?")
        if match := re.fullmatch(r"/datasets/user/name/resolve/main/(.+)", address):
            self.path = match[1]
            return self._answer(with_body=self.command == "GET")
        if match := re.fullmatch(r"/api/datasets/user/name/tree/main(?:/(.*))?", address):
            folder = self.state.folder / (match[1] or "")
            children = sorted(folder.rglob("*") if "recursive=true" in query.lower() else folder.iterdir())
            answer: object = [self._describe(child) for child in children]
        elif address == "/api/datasets/user/name":
            answer = {"id": "user/name", "sha": "a" * 40, "private": False, "siblings": [], "tags": [], "downloads": 0}
        else:
            return self._send(404, b"{}", with_body=True)
        return self._send(
            200, json.dumps(answer).encode(), with_body=True, headers={"Content-Type": "application/json"}
        )

    def _describe(self, path: Path) -> dict[str, object]:
        facts = {"path": str(path.relative_to(self.state.folder)), "oid": "0" * 40}
        return (
            {**facts, "type": "directory"} if path.is_dir() else {**facts, "type": "file", "size": path.stat().st_size}
        )


@contextlib.contextmanager
def serve_folder(folder: Path, *, has_ranges: bool = True, is_hub: bool = False) -> Iterator[WebServer]:
    """Serve a folder on loopback, as plain files or as a data set of a hub."""
    handler = type("Handler", (_HubHandler if is_hub else _Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        state = WebServer(f"http://127.0.0.1:{server.server_address[1]}", folder, has_ranges)
        handler.state = state
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
