"""A job in a process of its own: forked from one that has imported much, ended when its time is over.

The parent may import what touches CUDA and must not touch it itself: a forked process could not use it then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from benchmarks.gpu.parts import Figures

ENDED = "ended"
TRACEBACK_LINES = 16
Job = Callable[[Callable[[Figures], None]], Figures]


@dataclass
class Outcome:
    """What a job gave: its figures, or those it had kept before `error`; `trace` has the end of its traceback."""

    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    trace: str = ""


def run_job(job: Job, *, limit_seconds: float) -> Outcome:
    """Run `job` in a forked process for at most `limit_seconds`; it and all that it has started are ended then.

    `job` gets a function that hands figures over early. Nothing it does takes the caller along, not even its death.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, sender))
    start_seconds = time.perf_counter()
    process.start()
    sender.close()
    outcome = Outcome()
    try:
        _receive(receiver, outcome, deadline_seconds=start_seconds + limit_seconds, limit_seconds=limit_seconds)
    finally:
        outcome.seconds = time.perf_counter() - start_seconds
        _end_group(process.pid)
        process.join()
    if outcome.error == ENDED:
        outcome.error = f"its process ended by itself with status {process.exitcode}"
    return outcome


def _receive(receiver: Connection, outcome: Outcome, *, deadline_seconds: float, limit_seconds: float) -> None:
    while receiver.poll(max(0.0, deadline_seconds - time.perf_counter())):
        try:
            figures, error, trace, is_last = receiver.recv()
        except EOFError:
            outcome.error = ENDED
            return
        outcome.figures |= figures
        outcome.error, outcome.trace = error, trace
        if is_last:
            return
    outcome.error = f"not ready after {limit_seconds:.3g} s"


def _end_group(pid: int | None) -> None:
    if pid is None:
        return
    for target in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL)):
        try:
            target()
        except ProcessLookupError:
            continue


def _work(job: Job, sender: Connection) -> None:
    """Run the job as the head of a process group, and send what it gives."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    figures: Figures = {}
    error, trace = None, ""
    try:
        figures = job(lambda early: sender.send((early, None, "", False)))
    except ModuleNotFoundError as missing:
        error = f"needs the package {missing.name}, which is not here"
    except BaseException as problem:  # noqa: BLE001 - whatever it is: it is sent to the parent, and the process ends
        error = f"{type(problem).__name__}: {problem}".strip()
        trace = "\n".join("".join(traceback.format_exception(problem)).rstrip().splitlines()[-TRACEBACK_LINES:])
    sender.send((figures, error, trace, True))
