"""Chat servers for tests: a real `transformers serve` process, and an HTTP server that fails on command."""

import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from captioning.config import DESCRIBE
from captioning.engines.protocol import Request
from tests.raw_shards import photo

Answer = tuple[int, dict[str, Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TransformersServe:
    """`transformers serve <folder>` on loopback; can be killed and started again at the same address."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.model = str(folder)
        self._port = free_port()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        program = str(Path(sys.executable).with_name("transformers"))
        command = [program, "serve", self.model, "--host", "127.0.0.1", "--port", str(self._port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self._process is not None and self._process.poll() is None, self._log.read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise TimeoutError(self._log.read_text()[-2000:])

    def kill(self) -> None:
        """Kill -9."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


class ScriptedServer:
    """A chat server whose answers are a function of the request; counts what it is asked.

    Attributes:
        requests: the bodies of all chat requests.
        most_in_flight: the largest number of requests that were being answered at a time.
    """

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer], *, seconds: float = 0.0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(200, {"object": "list", "data": []})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with script._lock:
                    script._in_flight += 1
                    script.most_in_flight = max(script.most_in_flight, script._in_flight)
                    script.requests.append(body)
                    script.keys.add(self.headers["Authorization"])
                    number = len(script.requests)
                time.sleep(seconds)
                status, content = answer(body, number)
                with script._lock:
                    script._in_flight -= 1
                self._reply(status, content)

            def _reply(self, status: int, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def image_of(body: dict[str, Any]) -> Image.Image:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def prompt_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][1]["text"]


def describe_pixels(body: dict[str, Any]) -> str:
    """A caption that depends on the pixels and on the prompt."""
    pixels = image_of(body).tobytes()
    words = hashlib.sha256(pixels + prompt_of(body).encode()).hexdigest()
    return "A picture of " + " ".join(words[start : start + 4] for start in range(0, 32, 4)) + "."


def say(text: str, *, finish_reason: str = "stop", num_tokens: int | None = 9) -> Answer:
    usage = {"prompt_tokens": 5, "completion_tokens": num_tokens, "total_tokens": 5} if num_tokens is not None else None
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return 200, {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "toy",
        "choices": [choice],
        **({"usage": usage} if usage else {}),
    }


def fail(status: int, message: str) -> Answer:
    return status, {"error": {"message": message, "type": "error", "code": status}}


def describe(body: dict[str, Any], number: int) -> Answer:
    """A server without faults."""
    return say(describe_pixels(body))


def requests(num: int) -> list[Request]:
    return [Request(image=photo(n, 96, 96), prompt=f"{DESCRIBE} {n % 3}", seed=2**60 + n) for n in range(num)]
