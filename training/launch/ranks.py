"""The ranks of a stage that one launcher starts: their processes, their signals, and what is said when one fails."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from errors import ProgramFault, UserError
from pipelines.engine.progress import get_logger
from pipelines.store.checkpoints import remove_unfinished
from training.launch.placement import LOOPBACK, Placement

log = get_logger("training")

# Names a folder for the message of a rank that fails, so that one line is printed and not one per rank.
ERROR_FOLDER = "ATELIER_RANK_ERRORS"
LOST_CONTACT = "lost contact with another rank"
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0


class LostContactError(UserError):
    """The ranks here lost contact with one elsewhere, whose launcher says why."""


class StopSignals:
    """While inside, SIGINT and SIGTERM call `stop`, which lets the ranks save and end."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._former = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        # The launcher of a host starts with it blocked, as ranks do.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            log.info("stopping after this step, with a checkpoint")
        self.received = signal.Signals(number)
        self._stop()

    def raise_interrupt(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was what stopped the ranks."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt


def run_ranks(
    arguments: Sequence[str],
    *,
    placement: Placement,
    threads_per_process: int,
    directory: Path,
    announce: Callable[[], None],
    memory_advice: str,
) -> None:
    """Run the ranks of `placement` (`training.launch.rank`) until they are done; at a SIGTERM they save and end.

    `announce` is called when nothing is left to refuse, just before they start; `memory_advice` is what to change in
    the recipe where the machine ends a rank for lack of memory.

    Raises:
        LostContactError: the ranks here lost contact with one elsewhere.
        UserError: a rank failed, with its message; or another command is training in `directory`.
        ProgramFault: a rank ended without a message; it has printed its traceback.
        KeyboardInterrupt: Ctrl-C was pressed; the ranks have saved.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_exclusive(directory)) if placement.has_first else None
        errors = stack.enter_context(tempfile.TemporaryDirectory(prefix="ranks-"))
        threads = threads_per_process or max(1, (os.cpu_count() or 1) // placement.ranks_on_machine)
        environment = rank_environment(placement, threads_per_rank=threads, errors=errors)
        ranks: list[subprocess.Popen[bytes]] = []
        signals = stack.enter_context(StopSignals(lambda: _terminate(ranks)))
        try:
            announce()
            with _sigterm_blocked():
                ranks += [_start(arguments, environment | numbers, lock) for numbers in _rank_numbers(placement)]
            if signals.received is not None:
                _terminate(ranks)
            wait_all(ranks, grace_seconds=GRACE_SECONDS)
        finally:
            # A rank that had to be killed here is not the one that failed.
            statuses = {placement.first_rank + i: rank.poll() for i, rank in enumerate(ranks)}
            _end(ranks)
            if placement.has_first:
                remove_unfinished(directory)
        _raise_failure(statuses, Path(errors), placement, memory_advice=memory_advice)
    signals.raise_interrupt()


def _start(arguments: Sequence[str], environment: dict[str, str], lock: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "training.launch.rank", *arguments],
        env=environment,
        # Its end tells a rank that this process is gone. The lock is held until the last rank is.
        stdin=subprocess.PIPE,
        # What a launcher on another host says to its head on stdout is its own.
        stdout=2,
        pass_fds=() if lock is None else (lock,),
        # Ctrl-C in a terminal goes to a whole group; here it comes through `StopSignals` alone.
        start_new_session=True,
    )


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in ranks that start here until they can save; one that comes earlier waits for them."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def rank_environment(placement: Placement, *, threads_per_rank: int, errors: str) -> dict[str, str]:
    """Return the environment that all ranks of `placement` share."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(placement.world_size),
        "LOCAL_WORLD_SIZE": str(placement.ranks_on_machine),
        "MASTER_ADDR": placement.master_address,
        "MASTER_PORT": str(placement.master_port),
        "OMP_NUM_THREADS": str(threads_per_rank),
        ERROR_FOLDER: errors,
    }
    if sys.platform == "linux" and placement.master_address in LOOPBACK:
        # gloo looks the host's name up otherwise, which fails on many laptops.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _rank_numbers(placement: Placement) -> list[dict[str, str]]:
    return [
        {"RANK": str(placement.first_rank + i), "LOCAL_RANK": str(placement.first_local_rank + i)}
        for i in range(placement.num_ranks)
    ]


def _terminate(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)


def wait_all(processes: Sequence[subprocess.Popen[bytes]], *, grace_seconds: float) -> None:
    """Wait until all processes have ended; once one has failed, the others get a few seconds to notice."""
    deadline_seconds = float("inf")
    while time.monotonic() < deadline_seconds:
        # All are asked: one that fails must be seen although the first of them runs.
        statuses = [process.poll() for process in processes]
        if None not in statuses:
            return
        if deadline_seconds == float("inf") and any(statuses):
            deadline_seconds = time.monotonic() + grace_seconds
        time.sleep(POLL_SECONDS)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()
        if rank.stdin is not None:
            rank.stdin.close()


def _raise_failure(statuses: dict[int, int | None], errors: Path, placement: Placement, *, memory_advice: str) -> None:
    """Raise the message of the rank that is the cause; the others lost contact with it."""
    failed = {rank: status for rank, status in statuses.items() if status}
    if not failed:
        return
    messages = {int(path.name): path.read_text() for path in sorted(errors.iterdir())}
    causes = {rank: message for rank, message in messages.items() if message != LOST_CONTACT}
    if causes:
        rank = min(causes)
        raise UserError(causes[rank] if len(causes) == placement.world_size else f"rank {rank}: {causes[rank]}")
    for rank, status in failed.items():
        if status < 0:
            name = signal.Signals(-status).name
            reason = f"; the machine may be out of memory: {memory_advice}" if name == "SIGKILL" else ""
            raise UserError(f"rank {rank} was ended by {name}{reason}. The same command continues")
    for rank, status in failed.items():
        if rank not in messages:
            raise ProgramFault(f"rank {rank} ended with status {status}; its traceback is above")
    raise LostContactError(f"rank {min(messages)} {LOST_CONTACT}, which has failed or whose machine is gone")


@contextmanager
def _exclusive(directory: Path) -> Iterator[int]:
    """Hold the directory's lock; ranks inherit it, so it is free only when nothing writes there any more."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline_seconds = time.monotonic() + GRACE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_seconds:
                    message = f"{directory} is being trained by another process; wait for it or stop it"
                    raise UserError(message) from None
                time.sleep(POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)
