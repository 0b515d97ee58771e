"""`make bench-remote`: requests a second to S3 and to a web server, against fsspec as this project used it before.

The server is on loopback, a process for each connection, and waits before each answer where a network would. Short
ranges are those of tar headers: 16 KB each, far from each other. Without a wait they show what a request costs the
client; with one, how many are under way. Whole files are read as the cache of training does, 8 MB at a time.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import re
import resource
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.config import conf, set_conf_env
from rich.console import Console
from rich.table import Table

import pipelines.raw.summaries
import pipelines.raw.tasks
import pipelines.store.remote
from dataset_stats.captions import Address, RawOpening, read_rows
from pipelines.raw.shards import describe_shards
from pipelines.store.files import open_ranges
from pipelines.store.remote import RemoteFile, open_file_system

RESULT = Path(__file__).parent / "results" / "remote.json"
LATENCY_SECONDS = 0.02  # of S3 from within its region, to the first byte
RANGE_BYTES = 16 << 10
CHUNK_BYTES = 8 << 20
FORMER_THREADS = 16
NUM_ROUNDS = 2
WHOLE_MEGABYTES = 128
NUM_MEMBERS = 40  # of a tar: images of which none is read, and a text each
IMAGE_BYTES = 600_000
TEXT = b"a small cactus with a happy face"


def serve(listener: socket.socket, folder: str, latency_seconds: float) -> None:
    """Answer GET and HEAD for ever, a process for each connection."""
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _answer_all(connection, folder, latency_seconds)
            os._exit(0)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _answer_all(connection: socket.socket, folder: str, latency_seconds: float) -> None:
    files: dict[bytes, tuple[int, int]] = {}
    request = b""
    while received := connection.recv(1 << 16):
        request += received
        while b"\r\n\r\n" in request:
            head, _, request = request.partition(b"\r\n\r\n")
            time.sleep(latency_seconds)
            _answer(connection, head, folder, files)


def _answer(connection: socket.socket, head: bytes, folder: str, files: dict[bytes, tuple[int, int]]) -> None:
    method, name = head.split(b" ", 2)[:2]
    if name not in files:
        descriptor = os.open(folder + name.decode(), os.O_RDONLY)
        files[name] = descriptor, os.fstat(descriptor).st_size
    descriptor, size = files[name]
    first, stop, status = 0, size, "200 OK"
    if found := re.search(rb"\r\nrange: bytes=(\d+)-(\d+)", head, re.IGNORECASE):
        first, stop, status = int(found[1]), min(int(found[2]) + 1, size), "206 Partial Content"
    connection.sendall(
        f"HTTP/1.1 {status}\r\nContent-Length: {stop - first}\r\nContent-Range: bytes {first}-{stop - 1}/{size}\r\n"
        'Accept-Ranges: bytes\r\nETag: "1"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n'.encode()
    )
    while method == b"GET" and first < stop:
        first += os.sendfile(connection.fileno(), descriptor, first, stop - first)


@contextlib.contextmanager
def served(folder: Path, latency_seconds: float) -> Iterator[dict[str, str]]:
    """Serve a folder; yields the address of its sub-folder `raw` by protocol."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(listener, str(folder), latency_seconds), daemon=False
        )
        server.start()
    # What users have of fsspec's options, and what processes that are started find.
    os.environ |= {"FSSPEC_S3_ENDPOINT_URL": url, "FSSPEC_S3_KEY": "k", "FSSPEC_S3_SECRET": "s"}
    set_conf_env(conf)
    try:
        yield {"s3": "s3://raw", "http": f"{url}/raw"}
    finally:
        server.terminate()
        server.join()


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Read through fsspec alone, with as many requests under way as there were."""
    settings = (
        (pipelines.store.remote, "open_object", lambda *_: None),
        (pipelines.raw.summaries, "NUM_REMOTE_THREADS", FORMER_THREADS),
        (pipelines.raw.tasks, "NUM_AHEAD", 1),
    )
    former = [(module, name, getattr(module, name)) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in former:
            setattr(module, name, value)


def write_files(folder: Path, *, num_tars: int) -> list[str]:
    """Write one large file, and tars of large images, as holes, with short texts; returns the names of the tars."""
    (folder / "raw").mkdir()
    (folder / "raw" / "whole.bin").write_bytes(os.urandom(1 << 20) * WHOLE_MEGABYTES)
    names = [f"tar_{number:05d}.tar" for number in range(num_tars)]
    for name in names:
        with (folder / "raw" / name).open("wb") as tar:
            for member in range(NUM_MEMBERS):
                _write_member(tar, f"{member:06d}.jpg", IMAGE_BYTES, b"")
                _write_member(tar, f"{member:06d}.txt", len(TEXT), TEXT)
            tar.truncate(tar.tell() + 20 * tarfile.BLOCKSIZE)
    return names


def _write_member(tar: BinaryIO, name: str, size: int, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    tar.write(info.tobuf() + data)
    tar.seek(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE - len(data), os.SEEK_CUR)


class Measured:
    """Requests and seconds of something that is read."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.wall_seconds = self.cpu_seconds = 0.0

    @property
    def per_second(self) -> float:
        """Requests a second."""
        return self.num_requests / self.wall_seconds

    def better(self, other: "Measured | None") -> "Measured":
        """The faster of two."""
        return self if other is None or self.wall_seconds < other.wall_seconds else other


def measure(read: Callable[[], object]) -> Measured:
    """Count the ranges that `read` asks for, and its wall and CPU seconds in this process."""
    found, true_fetch = Measured(), RemoteFile._fetch

    def counted(self: RemoteFile, offset: int, size: int) -> bytes:
        found.num_requests += 1
        return true_fetch(self, offset, size)

    RemoteFile._fetch = counted
    usage, start_seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    try:
        read()
    finally:
        RemoteFile._fetch = true_fetch
    found.wall_seconds = time.perf_counter() - start_seconds
    after = resource.getrusage(resource.RUSAGE_SELF)
    found.cpu_seconds = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return found


def read_ranges(url: str, num_requests: int) -> None:
    """Read short ranges that are far from each other, in as many threads as there were before."""
    with open_ranges(url) as file:
        step = (file.size - RANGE_BYTES) // num_requests
        with ThreadPoolExecutor(FORMER_THREADS) as pool:
            # In an order in which none is a neighbour of the last ones.
            places = [(number * 7919) % num_requests * step for number in range(num_requests)]
            sizes = pool.map(lambda place: len(file.read(place, RANGE_BYTES)), places)
            assert set(sizes) == {RANGE_BYTES}


def read_whole(url: str) -> None:
    """Read a file from its beginning to its end, as the cache of training does."""
    with open_ranges(url) as file:
        for offset in range(0, file.size, CHUNK_BYTES):
            file.read(offset, CHUNK_BYTES)


def read_texts(url: str, run: Path) -> None:
    """Read the texts of a tar whose headers a run remembers, as `make stats` does."""
    address = Address(layout="raw", column="", path=url)
    texts = [row.text for rows in read_rows(address, 0, 1 << 30, opening=RawOpening(run=run)) for row in rows]
    assert set(texts) == {TEXT.decode()}


def compare(read: Callable[[], object]) -> tuple[Measured, Measured]:
    """The best of some rounds in turns, as it is and as it was before."""
    now: Measured | None = None
    before: Measured | None = None
    for _ in range(NUM_ROUNDS):
        with as_before():
            before = measure(read).better(before)
        now = measure(read).better(now)
    assert now is not None and before is not None
    return now, before


def compare_http_clients(url: str, num_requests: int) -> float:
    """How many times as fast obstore's own client of web servers is as fsspec's, on the same short ranges."""
    from obstore.store import HTTPStore

    folder, _, name = url.rpartition("/")
    store = HTTPStore.from_url(folder, client_options={"allow_http": True})
    file_system, path = open_file_system(url)
    readers: dict[str, Callable[[int], int]] = {
        "obstore": lambda place: len(store.get_range(name, start=place, end=place + RANGE_BYTES)),
        "fsspec": lambda place: len(file_system.cat_file(path, start=place, end=place + RANGE_BYTES)),
    }
    best: dict[str, float] = {}
    for _ in range(NUM_ROUNDS):
        for client, reader in readers.items():
            start_seconds = time.perf_counter()
            with ThreadPoolExecutor(FORMER_THREADS) as pool:
                list(pool.map(reader, [number * RANGE_BYTES for number in range(num_requests)]))
            best[client] = min(time.perf_counter() - start_seconds, best.get(client, float("inf")))
    return best["fsspec"] / best["obstore"]


def compare_all(folder: Path, *, num_requests: int, num_tars: int) -> dict[str, Any]:
    """Return ratios of times, and requests a second of each thing, now and before."""
    names = write_files(folder, num_tars=num_tars)
    found: dict[str, tuple[Measured, Measured]] = {}
    with served(folder, 0.0) as urls:
        for protocol, url in urls.items():
            found[f"{protocol}_ranges"] = compare(functools.partial(read_ranges, f"{url}/whole.bin", num_requests))
            found[f"{protocol}_whole"] = compare(functools.partial(read_whole, f"{url}/whole.bin"))
        clients = compare_http_clients(f"{urls['http']}/whole.bin", num_requests)
    with served(folder, LATENCY_SECONDS) as urls:
        for protocol, url in urls.items():
            tars = [f"{url}/{name}" for name in names]
            found[f"{protocol}_headers"] = compare(functools.partial(describe_shards, tars))
            describe_shards(tars[:1], run=folder / "run")
            found[f"{protocol}_texts"] = compare(functools.partial(read_texts, tars[0], folder / "run"))
    ratios = {
        f"ratio_{name}": round(before.wall_seconds / now.wall_seconds, 2) for name, (now, before) in found.items()
    }
    return {
        **ratios,
        "http_obstore_against_fsspec": round(clients, 2),
        "requests_per_second": {name: round(now.per_second) for name, (now, _) in found.items()},
        "requests_per_second_before": {name: round(before.per_second) for name, (_, before) in found.items()},
        "cpu_microseconds": {
            name: [round(1e6 * way.cpu_seconds / way.num_requests) for way in ways] for name, ways in found.items()
        },
        "latency_seconds": LATENCY_SECONDS,
        "server": "Python, a process for each connection",
        "num_cores": os.cpu_count(),
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/remote.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4_000, help="short ranges")
    parser.add_argument("--tars", type=int, default=120, help="tars whose headers are read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-remote-") as folder:
        result = compare_all(Path(folder), num_requests=options.requests, num_tars=options.tars)
    result |= {name: version(name) for name in ("obstore", "fsspec", "s3fs", "aiohttp")}
    table = Table("what is read", "requests/s", "before", "times as fast", "CPU µs a request", "before")
    for name, cpu in result["cpu_microseconds"].items():
        now, before = result["requests_per_second"][name], result["requests_per_second_before"][name]
        table.add_row(name, f"{now:,}", f"{before:,}", f"{result[f'ratio_{name}']}", f"{cpu[0]:,}", f"{cpu[1]:,}")
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
