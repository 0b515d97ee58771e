"""A stage on the hosts of a hostfile: one launcher on each, started over a remote shell, led from here.

The placement goes over a connection's stdin, and one more line for a stop. When stdin ends, because this process did,
the launcher there ends, and its ranks with it. What became of them comes back over stdout.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import ProgramFault, UserError
from pipelines.store.remote import storage_environment
from training.launch.placement import Host, on_hosts
from training.launch.ranks import GRACE_SECONDS, StopSignals, wait_all

STOP = b"stop\n"
STARTED, DONE, FAILED, FAULT, LOST = "started", "done", "failed", "fault", "lost contact"
REPORT_PREFIX = "ATELIER_NODE "  # a login shell may write to stdout too
ENVIRONMENT_PREFIXES = ("NCCL_", "GLOO_", "TORCH", "HF_", "DS_", "WANDB_", "ATELIER_", "PYTHONPATH")
# Where Python looks for modules, from its start.
PATH_NAMES = ("PYTHONPATH", "PYTHONSAFEPATH")
# A host's own launcher waits GRACE_SECONDS for its ranks before it reports.
HOST_GRACE_SECONDS = 3 * GRACE_SECONDS
NO_FOLDER, NO_PYTHON, NO_CONNECTION = 97, 98, 255


@dataclass(frozen=True)
class _HostEnd:
    """How the launcher of a host ended: its exit status, and what it reported last."""

    host: Host
    status: int
    kind: str | None
    message: str

    @property
    def reason(self) -> str:
        """What to tell the user."""
        folder = shlex.quote(str(Path.cwd()))
        if self.kind in (FAILED, FAULT, LOST):
            return self.message
        if self.kind == STARTED:
            return "the connection was lost or its launcher was killed. The same command continues"
        known = {
            NO_FOLDER: f"has no folder {folder}; the repository must be there, on storage that all hosts share",
            NO_PYTHON: f"has no {sys.executable}; the environment must be there, on storage that all hosts share",
            NO_CONNECTION: "cannot be reached; what training.remote_shell says about it is above",
        }
        return known.get(self.status, f"training.remote_shell ended with status {self.status}; what it says is above")


def run_hosts(arguments: Sequence[str], *, hosts: Sequence[Host], remote_shell: str) -> None:
    """Run the ranks of all hosts until they are done; at a SIGTERM they save and end.

    Raises:
        UserError: a host cannot be reached or its ranks failed; names the host.
        ProgramFault: the program has a fault there; names the host, whose stderr has the traceback.
        KeyboardInterrupt: Ctrl-C was pressed; the ranks have saved.
    """
    shell = shlex.split(remote_shell)
    if not shell:
        raise UserError("training.remote_shell is empty; it is a command such as 'ssh -p 2222'")
    forwarded = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_PREFIXES)}
    nodes: list[subprocess.Popen[bytes]] = []
    with StopSignals(lambda: _say(nodes, STOP)) as signals:
        try:
            for host, placement in zip(hosts, on_hosts(list(hosts)), strict=True):
                nodes.append(_connect([*shell, host.name, _remote_command(arguments)]))
                order = {
                    "placement": dataclasses.asdict(placement),
                    "environment": forwarded | storage_environment(),
                }
                _say(nodes[-1:], json.dumps(order).encode() + b"\n")
            if signals.received is not None:
                _say(nodes, STOP)
            wait_all(nodes, grace_seconds=HOST_GRACE_SECONDS)
        finally:
            # A host that had to be ended from here is not the one that failed.
            statuses = [node.poll() for node in nodes]
            _end(nodes)
    ended = zip(hosts, nodes, statuses, strict=True)
    outcomes = [_outcome(host, node, status) for host, node, status in ended if status is not None]
    for node in nodes:
        assert node.stdout is not None
        node.stdout.close()
    _raise_failure([outcome for outcome in outcomes if outcome.kind != DONE], num_hosts=len(hosts))
    signals.raise_interrupt()


def _connect(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        # Ctrl-C in a terminal goes to a whole group; here it comes through `StopSignals` alone.
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise UserError(f"training.remote_shell {command[0]!r} cannot be started: {error.strerror}") from None


def _remote_command(arguments: Sequence[str]) -> str:
    """Return the command as any login shell takes it."""
    folder, python = shlex.quote(str(Path.cwd())), shlex.quote(sys.executable)
    path = " ".join(f"{name}={shlex.quote(os.environ[name])}" for name in PATH_NAMES if name in os.environ)
    script = (
        f"cd {folder} 2>/dev/null || exit {NO_FOLDER}; test -x {python} || exit {NO_PYTHON}; "
        f"exec {'env ' if path else ''}{path} {python} -m training.launch.node {shlex.join(arguments)}"
    )
    return shlex.join(["sh", "-c", script])


def _say(nodes: Sequence[subprocess.Popen[bytes]], line: bytes) -> None:
    for node in nodes:
        assert node.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            node.stdin.write(line)
            node.stdin.flush()


def _end(nodes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Close every connection, which ends what runs at its other end, and then the remote shells."""
    for node in nodes:
        assert node.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            node.stdin.close()
    for node in nodes:
        try:
            node.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()


def _outcome(host: Host, node: subprocess.Popen[bytes], status: int) -> _HostEnd:
    reports = _reports(node)
    last = reports[-1] if reports else {}
    return _HostEnd(host, status, last.get("kind"), last.get("message", ""))


def _reports(node: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    assert node.stdout is not None
    # A grandchild that lives on would keep the pipe open; what was written before the end is in it.
    os.set_blocking(node.stdout.fileno(), False)
    said = (node.stdout.read() or b"").decode(errors="replace")
    return [json.loads(line[len(REPORT_PREFIX) :]) for line in said.splitlines() if line.startswith(REPORT_PREFIX)]


def _raise_failure(outcomes: Sequence[_HostEnd], *, num_hosts: int) -> None:
    """Raise the first cause: a failure that a host reported, else a host that is gone; the others lost contact."""
    if not outcomes:
        return
    reasons = {outcome.reason for outcome in outcomes}
    if len(outcomes) == num_hosts and len(reasons) == 1 and outcomes[0].kind == FAILED:
        raise UserError(outcomes[0].message)
    order = {FAILED: 0, FAULT: 1, None: 2, STARTED: 2, LOST: 3}
    first = min(outcomes, key=lambda outcome: order[outcome.kind])
    kind = ProgramFault if first.kind == FAULT else UserError
    raise kind(f"host {first.host.name}: {first.reason}")
