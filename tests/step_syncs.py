"""Trains one rank and notes, step by step, where the host asks for what a device would have to finish first.

Usage: python step_syncs.py [arguments of `python -m training`]; prints JSON: for each step, the operations that wait.
`test_training_syncs.py` starts it. On a CPU nothing waits, so operations are counted that would on a GPU; those on what
lies in host memory on a GPU, too, the reader's batches, are left out.
"""

import json
import sys
import threading
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.command import parse_command
from training.launch.rank import run_rank
from training.loop import loop
from training.loop.zero import initialize_ranks
from training.stages.stage import open_stage

# Reading a scalar, a shape that depends on values, and making a tensor of numbers of the host.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh", "repeat_interleave"}
HOST_MEMORY = ("training/data/", "training/loop/flops.py")


class Waits(TorchDispatchMode):
    """Notes operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        """Note an operation by its name, and the nearest caller that is not torch's."""
        if name not in WAITING and name != "tolist":
            return
        frame = sys._getframe(1)
        while frame.f_back and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        caller = frame.f_code.co_filename
        if not any(place in caller for place in HOST_MEMORY):
            self.seen.append(f"{name} at {caller}:{frame.f_lineno}")


def watch(waits: list[list[str]]) -> None:
    """Let each step of the loop add what waits in it to `waits`."""
    launch, as_list = loop._step, Tensor.tolist

    def watched(session: loop.Session) -> None:
        with Waits() as mode:

            def tolist(tensor: Tensor) -> Any:
                mode.note("tolist")
                return as_list(tensor)

            Tensor.tolist = tolist  # pyright: ignore[reportAttributeAccessIssue]
            try:
                launch(session)
            finally:
                Tensor.tolist = as_list
        waits.append(mode.seen)

    loop._step = watched


if __name__ == "__main__":
    job = open_stage(parse_command("training", "", argv=sys.argv[1:], has_stages=True))
    initialize_ranks()
    found: list[list[str]] = []
    watch(found)
    run_rank(job, threading.Event())
    sys.stdout.write(json.dumps(found))
    dist.destroy_process_group()
