"""Tasks of Slurm wait until the first one has checked the stage, so that a refusal is said once.

The first task listens and answers each of the others with a byte: start the rank, or there is nothing to do. A
connection that ends without a byte says that the first task has refused or died; the others then end, too.
"""

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

from errors import UserError
from training.launch.placement import Placement

START, NOTHING_TO_DO = b"s", b"n"
# Tasks of a large job come up one after the other.
WAIT_SECONDS = 600.0
# How long a task that has refused waits for others that were slower to come.
LEAVE_SECONDS = 30.0
RETRY_SECONDS = 0.2


class FirstTask:
    """The first task's side, a context manager. Left without `say`, nothing is to be done; by an error, all end."""

    def __init__(self, placement: Placement) -> None:
        self._server = socket.create_server(("", placement.meeting_port))
        self._num_missing = placement.world_size - 1
        self._waiting: list[socket.socket] = []
        self._verdict: bytes | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._receive, name="meeting", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._verdict is None:
            self.say(NOTHING_TO_DO if kind is None else b"")
            self._thread.join(LEAVE_SECONDS)

    def say(self, verdict: bytes) -> None:
        """Tell all tasks: those that wait, and those that come later."""
        with self._lock:
            self._verdict = verdict
            while self._waiting:
                _answer(self._waiting.pop(), verdict)

    def _receive(self) -> None:
        with self._server:
            for _ in range(self._num_missing):
                connection, _ = self._server.accept()
                with self._lock:
                    if self._verdict is None:
                        self._waiting.append(connection)
                    else:
                        _answer(connection, self._verdict)


def _answer(connection: socket.socket, verdict: bytes) -> None:
    with connection, contextlib.suppress(OSError):
        connection.sendall(verdict)


def ask_first_task(placement: Placement) -> bytes:
    """Return what the first task says, b"" if it has failed; waits for its checks, however long they take.

    Raises:
        UserError: there is no first task.
    """
    address = (placement.master_address, placement.meeting_port)
    deadline_seconds = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            connection = socket.create_connection(address, timeout=RETRY_SECONDS * 25)
            break
        except OSError as error:
            if time.monotonic() > deadline_seconds:
                raise UserError(f"the first task does not answer at {address[0]}:{address[1]}: {error}") from None
            time.sleep(RETRY_SECONDS)
    with connection, contextlib.suppress(ConnectionError):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection.recv(1)
    return b""
