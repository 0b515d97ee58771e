"""Which ranks run where: on one machine, as tasks of Slurm, or on the hosts of a hostfile."""

import contextlib
import os
import random
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Where ranks meet; below the ports that Linux hands out by itself.
FIRST_PORT, NUM_PORTS = 20_000, 12_000


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The ranks of one launcher: `first_rank` and the `num_ranks - 1` after it, of `world_size` on all machines.

    Attributes:
        first_local_rank: GPU of `first_rank`.
        ranks_on_machine: ranks that share this machine; under Slurm each has a launcher of its own.
        master_address, master_port: where rank 0 listens for the others.
    """

    first_rank: int
    num_ranks: int
    world_size: int
    first_local_rank: int
    ranks_on_machine: int
    master_address: str
    master_port: int

    @property
    def meeting_port(self) -> int:
        """Where the first task of Slurm tells the others whether there is something to do."""
        return self.master_port + 1

    @property
    def has_first(self) -> bool:
        """Whether rank 0 is among them: its launcher speaks for all."""
        return self.first_rank == 0


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


def on_this_machine(num_processes: int) -> Placement:
    """All ranks on this machine; 0 means one per GPU or, without a GPU, two (one on a single core)."""
    num_ranks = num_processes or _default_num_ranks()
    return Placement(
        first_rank=0,
        num_ranks=num_ranks,
        world_size=num_ranks,
        first_local_rank=0,
        ranks_on_machine=num_ranks,
        master_address="127.0.0.1",
        master_port=_free_port(),
    )


def _any_port() -> int:
    return FIRST_PORT + random.SystemRandom().randrange(NUM_PORTS)


def _free_port() -> int:
    """Return a port that nobody uses. It stays free: Linux gives connections other ports than these."""
    while True:
        port = _any_port()
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _default_num_ranks() -> int:
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def is_slurm_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several tasks of an `srun`; a batch script, which has no step, is not."""
    return "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1


def of_slurm_task(environment: Mapping[str, str] = os.environ) -> Placement:
    """The one rank of a Slurm task.

    Raises:
        UserError: `scontrol` does not say which hosts the step runs on.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"])
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise UserError(f"`scontrol show hostnames {nodes}` does not say where rank 0 is: {reason}") from None
    hosts = listed.stdout.split()
    world_size = int(environment["SLURM_NTASKS"])
    # Steps of one job that run side by side must not meet at one port.
    key = int(environment["SLURM_JOB_ID"]) + 1009 * int(environment["SLURM_STEP_ID"])
    return Placement(
        first_rank=int(environment["SLURM_PROCID"]),
        num_ranks=1,
        world_size=world_size,
        first_local_rank=int(environment["SLURM_LOCALID"]),
        ranks_on_machine=-(-world_size // len(hosts)),
        master_address=hosts[0],
        # Every other port: the one after it is `meeting_port`.
        master_port=FIRST_PORT + 2 * (key % (NUM_PORTS // 2)),
    )


def read_hostfile(path: Path) -> list[Host]:
    """Read lines `host slots=8` as DeepSpeed has them; blank lines and what follows # are left out.

    Raises:
        UserError: a line is not one, a host comes twice, or there is none; names file and line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"training.hostfile {path} cannot be read: {error}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.@:-]+)\s+slots=(\d+)", text)
        # What starts with a dash would be an option of ssh.
        if match is None or int(match[2]) < 1 or match[1].startswith("-"):
            raise UserError(f"{path}, line {number}: {text!r} is not `host slots=8`, a name and its number of ranks")
        if match[1] in hosts:
            raise UserError(f"{path}, line {number}: host {match[1]} comes twice; add its slots up")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise UserError(f"training.hostfile {path} names no host; a line is `host slots=8`")
    return list(hosts.values())


def on_hosts(hosts: list[Host]) -> list[Placement]:
    """The placement of each host, in the order of the hostfile; rank 0 is on the first."""
    port = _any_port()
    world_size = sum(host.slots for host in hosts)
    return [
        Placement(
            first_rank=sum(former.slots for former in hosts[:i]),
            num_ranks=host.slots,
            world_size=world_size,
            first_local_rank=0,
            ranks_on_machine=host.slots,
            master_address=hosts[0].name.rpartition("@")[2],
            master_port=port,
        )
        for i, host in enumerate(hosts)
    ]
