"""The ranks of a stage on one machine: their processes, their signals, and what is said when one of them fails."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipelines.progress import get_logger

log = get_logger("training")

# Names a folder for the message of a rank that fails, so that one line is printed and not one per rank.
ERROR_FOLDER = "ATELIER_RANK_ERRORS"
LOST_CONTACT = "lost contact with another rank"
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0


class _Signals:
    """Passes SIGINT and SIGTERM on to the ranks as SIGTERM: they save and end."""

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks
        self.received: signal.Signals | None = None

    def __enter__(self) -> "_Signals":
        self._former = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            log.info("stopping after this step, with a checkpoint")
        self.received = signal.Signals(number)
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM)


def run_ranks(arguments: Sequence[str], *, num_ranks: int, threads_per_rank: int, directory: Path) -> bool:
    """Run `python -m training.worker` on every rank; returns whether they ran to the end, and not to a SIGTERM.

    Raises:
        ValueError: a rank failed, with its message; or another command is training in `directory`.
        KeyboardInterrupt: Ctrl-C was pressed; the ranks have saved.
    """
    with _exclusive(directory) as lock, tempfile.TemporaryDirectory(prefix="ranks-") as errors:
        environment = _environment(num_ranks, threads_per_rank=threads_per_rank, errors=errors)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "training.worker", *arguments],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                # Its end tells a rank that this process is gone. The lock is held until the last rank is.
                stdin=subprocess.PIPE,
                pass_fds=(lock,),
                # Ctrl-C in a terminal goes to a whole group; here it comes through `_Signals` alone.
                start_new_session=True,
            )
            for rank in range(num_ranks)
        ]
        with _Signals(ranks) as signals:
            try:
                _wait(ranks)
            finally:
                _end(ranks)
        if signals.received is None or any(rank.returncode not in (0, -signal.SIGTERM) for rank in ranks):
            _raise_failure(ranks, Path(errors))
    if signals.received == signal.SIGINT:
        raise KeyboardInterrupt
    return signals.received is None


def _environment(num_ranks: int, *, threads_per_rank: int, errors: str) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads_per_rank),
        ERROR_FOLDER: errors,
    }
    if sys.platform == "linux":
        # gloo looks the host's name up otherwise, which fails on many laptops.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all ranks have ended; once one has failed, the others get a few seconds to notice."""
    deadline_seconds = float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline_seconds:
        if deadline_seconds == float("inf") and any(rank.returncode for rank in ranks):
            deadline_seconds = time.monotonic() + GRACE_SECONDS
        time.sleep(POLL_SECONDS)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()
        if rank.stdin is not None:
            rank.stdin.close()


def _raise_failure(ranks: Sequence[subprocess.Popen[bytes]], errors: Path) -> None:
    """Raise the message of the rank that failed first in cause; the others only lost contact with it."""
    if not any(rank.returncode for rank in ranks):
        return
    messages = {int(path.name): path.read_text() for path in sorted(errors.iterdir())}
    causes = {rank: message for rank, message in messages.items() if message != LOST_CONTACT}
    if causes:
        rank = min(causes)
        raise ValueError(causes[rank] if len(causes) == len(ranks) else f"rank {rank}: {causes[rank]}")
    for number, rank in enumerate(ranks):
        if rank.returncode < 0:
            name = signal.Signals(-rank.returncode).name
            reason = "; the machine may be out of memory" if name == "SIGKILL" else ""
            raise ValueError(f"rank {number} was ended by {name}{reason}. The same command continues")
    failed = [number for number, rank in enumerate(ranks) if rank.returncode]
    raise ValueError(f"rank {failed[0]} ended with status {ranks[failed[0]].returncode}; its traceback is above")


@contextmanager
def _exclusive(directory: Path) -> Iterator[int]:
    """Hold the directory's lock; ranks inherit it, so it is free only when nothing writes there any more."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline_seconds = time.monotonic() + GRACE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_seconds:
                    message = f"{directory} is being trained by another process; wait for it or stop it"
                    raise ValueError(message) from None
                time.sleep(POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)
