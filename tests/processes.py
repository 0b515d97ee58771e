"""Finding and killing processes that a test has started."""

import contextlib
import os
import signal
from pathlib import Path


def process_tree(pid: int) -> dict[int, str]:
    """The process and all that descend from it: pid -> command line."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        with contextlib.suppress(OSError):
            found[current] = Path(f"/proc/{current}/cmdline").read_text().replace("\0", " ").strip()
            waiting += children.get(current, [])
    return found


def kill(pid: int) -> None:
    """kill -9, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_tree(pid: int) -> None:
    """kill -9 of the process and of all that descend from it, as when its machine loses power."""
    for member in process_tree(pid):
        kill(member)


def ray_workers(pid: int) -> list[int]:
    """The actors of the engine's pool that are busy with a piece, among a process's descendants."""
    return [member for member, command in process_tree(pid).items() if command.startswith("ray::MapWorker")]
