"""Nodes of a Ray cluster on loopback, each with its own processes, ports and folders."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.processes import kill_tree

# A dead node is noticed after about two seconds, not ten. Without a mode, `ray start` would look for a token of other
# clusters in the home folder.
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


# A node whose raylet runs is not yet one that the head counts.
COUNT_NODES = """
import logging, sys, time, ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.1)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayNode:
    """A node of one CPU, started by `ray start`; `around` goes in front of the command."""

    def __init__(
        self,
        *arguments: str,
        worker_ports: tuple[int, int],
        around: Sequence[str] = (),
    ) -> None:
        ray = Path(sys.executable).with_name("ray")
        low, high = worker_ports
        line = [*around, str(ray), "start", "--block", *arguments, "--node-ip-address=127.0.0.1", "--num-cpus=1"]
        line += ["--object-store-memory=80000000", f"--min-worker-port={low}", f"--max-worker-port={high}"]
        line += ["--disable-usage-stats"]
        environment = {**os.environ, **SETTINGS, "RAY_BACKEND_LOG_LEVEL": "fatal"}
        # What workers import is found where the driver has found it.
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            line,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=REPOSITORY.anchor,
        )

    def kill(self) -> None:
        """kill -9 of everything that runs on the node."""
        kill_tree(self.process.pid)
        self.process.wait()


def start_head(folder: Path) -> tuple[RayNode, str]:
    """Start the node that holds the cluster together; returns it and the cluster's address, once it answers."""
    port = free_port()
    line = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
    head = RayNode(*line, worker_ports=(27000, 27099))
    deadline = time.monotonic() + 60
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):
            assert head.process.poll() is None and time.monotonic() < deadline, "the head node has not come up"
            time.sleep(0.05)
    return head, f"127.0.0.1:{port}"


def wait_for_nodes(address: str, count: int) -> None:
    """Wait until that many nodes are part of the cluster."""
    line = [sys.executable, "-c", COUNT_NODES, address, str(count)]
    subprocess.run(line, env={**os.environ, **SETTINGS}, check=True, timeout=90)
