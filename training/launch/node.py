"""The launcher of one host of a hostfile: `python -m training.launch.node`, led by `training.launch.hosts`."""

import json
import os
import signal
import sys
import threading
import traceback

from errors import ProgramFault, users_message
from pipelines.command import parse_command
from training.launch.hosts import DONE, FAILED, FAULT, LOST, REPORT_PREFIX, STARTED, STOP
from training.launch.memory import memory_advice
from training.launch.placement import Placement
from training.launch.ranks import LostContactError, run_ranks
from training.stages.stage import open_stage

MAX_MESSAGE_CHARACTERS = 4000  # fits a pipe that nobody reads before this process has ended


def main() -> int:
    """Take the placement from stdin and run its ranks; returns the exit status."""
    # A stop may come before the launcher listens to it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    order = json.loads(_read_line())
    os.environ.update(order["environment"])
    _report(STARTED)
    threading.Thread(target=_follow_head, daemon=True).start()
    try:
        job = open_stage(parse_command("training.launch.node", "The ranks of one host.", has_stages=True))
        run_ranks(
            sys.argv[1:],
            placement=Placement(**order["placement"]),
            threads_per_process=job.settings.threads_per_process,
            directory=job.directory,
            announce=lambda: None,
            memory_advice=memory_advice(job.settings),
        )
    except LostContactError as error:
        _report(LOST, str(error))
        return 2
    except Exception as error:  # noqa: BLE001 - said in full, here or by the head
        return _report_error(error)
    _report(DONE)
    return 0


def _report_error(error: Exception) -> int:
    """Tell the head how this host failed, and print what its report has no room for; returns the exit status."""
    message = users_message(error)
    is_of_rank = isinstance(error, ProgramFault)  # which has printed its traceback
    if not is_of_rank and (message is None or os.environ.get("ATELIER_TRACEBACK")):
        traceback.print_exception(error)
        sys.stderr.flush()
    if message is not None:
        _report(FAILED, message)
        return 2
    last_line = "".join(traceback.format_exception_only(error)).rstrip().rpartition("\n")[2]
    _report(FAULT, str(error) if is_of_rank else f"{last_line}; its traceback is above")
    return 1


def _read_line() -> bytes:
    """Read a line byte by byte: a buffered read would hold up the end of the interpreter."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            # The head is gone. So are the ranks, whose stdin ends with this process.
            os._exit(1)
        line += byte
    return line


def _follow_head() -> None:
    while True:
        if _read_line() == STOP:
            os.kill(os.getpid(), signal.SIGTERM)


def _report(kind: str, message: str = "") -> None:
    line = REPORT_PREFIX + json.dumps({"kind": kind, "message": message[:MAX_MESSAGE_CHARACTERS]}) + "\n"
    os.write(sys.stdout.fileno(), line.encode())


if __name__ == "__main__":
    sys.exit(main())
