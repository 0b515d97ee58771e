"""Commands in a real pseudo-terminal of a given width."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence

CONTROL_C = b"\x03"
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_in_terminal(
    command: Sequence[str],
    *,
    columns: int,
    interrupt_when: Callable[[], bool] | None = None,
    timeout_seconds: float = 120,
) -> tuple[int, str]:
    """Run a command in the foreground of a terminal; returns its exit status and all it wrote there.

    With `interrupt_when`, Ctrl-C is typed once it is true.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(command, env=environment, preexec_fn=lambda: os.login_tty(slave))
    os.close(slave)
    written, deadline = b"", time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if interrupt_when is not None and interrupt_when():
            os.write(master, CONTROL_C)
            interrupt_when = None
        if not select.select([master], [], [], 0.05)[0]:
            continue
        try:
            written += os.read(master, 65536)
        except OSError:  # the last process that had the terminal has ended
            break
    else:
        process.kill()
    os.close(master)
    return process.wait(), written.decode()


def visible_lines(written: str) -> list[str]:
    """What was written, line by line, without colours and cursor moves."""
    return [line for line in re.split(r"[\r\n]+", CONTROL_SEQUENCE.sub("", written)) if line.strip()]
