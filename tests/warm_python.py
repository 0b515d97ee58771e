"""`python -m module` without the seconds of imports: a fork of a process that has made them, with a pid of its own.

For tests that need a command's process, its signals and its status, but not its start. Those that start a real one are
`test_training_launch.py` (ranks), `test_house_interruption.py` (the chain) and the demo itself.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import REPOSITORY

# Only what is slow to import. pytest is here as children look at the main module of their grandparent.
IMPORTED = (
    "pytest",
    "torch",
    "torch._dynamo",
    "deepspeed",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.serialization",
    "torch.utils.tensorboard",
    "training.launch.rank",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.t5.modeling_t5",
    "transformers.models.llava.modeling_llava",
    "diffusers.models.autoencoders.autoencoder_kl",
    "pixart.drawing.denoise",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
)
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(list(IMPORTED))


class WarmProcess:
    """Stands where `subprocess.Popen([sys.executable, "-m", module, ...], stderr=PIPE, text=True)` would."""

    def __init__(self, module: str, arguments: Sequence[str], *, changed: Mapping[str, str] | None = None) -> None:
        """Start it in the repository's folder; `changed` goes over the environment."""
        folder = Path(tempfile.mkdtemp(prefix="warm-"))
        self._written = [folder / "out", folder / "err"]
        paths = [str(path) for path in self._written]
        environment = {**os.environ, **(changed or {})}
        self._process = server.Process(target=_run_module, args=(module, list(arguments), environment, paths))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status; negative, as that of Popen, if a signal has ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns what it has written to stdout and stderr, once."""
        self.wait(timeout)
        output, errors = (path.read_text() for path in self._written)
        shutil.rmtree(self._written[0].parent)
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_module(module: str, arguments: Sequence[str], **changed: str) -> subprocess.CompletedProcess[str]:
    """Run a module to its end; returns its status and what it has written."""
    process = WarmProcess(module, arguments, changed=changed)
    output, errors = process.communicate(timeout=250)
    assert process.returncode is not None
    return subprocess.CompletedProcess([module, *arguments], process.returncode, output, errors)


def run_ranks(
    module: str, arguments: Sequence[str], *, num_ranks: int, errors: Path, timeout_seconds: float = 200
) -> None:
    """Run a module of the tests in ranks that find each other, to their end; `errors` is a folder for what they say."""
    from training.launch.placement import on_this_machine
    from training.launch.ranks import rank_environment

    environment = rank_environment(on_this_machine(num_ranks), threads_per_rank=1, errors=str(errors))
    ranks = [
        WarmProcess(module, arguments, changed=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_ranks)
    ]
    said = [rank.communicate(timeout=timeout_seconds)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, said


def _run_module(module: str, arguments: list[str], environment: dict[str, str], paths: list[str]) -> None:
    for descriptor, path in ((0, os.devnull), (1, paths[0]), (2, paths[1])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    # The server passes over a module that is not there.
    assert sys.modules.keys() >= set(IMPORTED), set(IMPORTED) - sys.modules.keys()
    _become(arguments, environment)
    os.chdir(REPOSITORY)
    if module == "training":
        import training.launch.ranks

        training.launch.ranks._start = ForkedRank
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # An end of a process by `multiprocessing` leaves them out.
        atexit._run_exitfuncs()


def _become(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments


class ForkedRank:
    """Stands where the launcher's `subprocess.Popen` of `python -m training.launch.rank` would; its child as well."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], lock: int | None) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = _run_rank(arguments, environment, stdin=read, lock=lock)
            except BaseException:  # noqa: BLE001 - or the fork would go on as a second launcher
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        os.close(read)
        self.stdin = os.fdopen(write, "wb", buffering=0)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_rank(arguments: Sequence[str], environment: Mapping[str, str], *, stdin: int, lock: int | None) -> int:
    import torch

    from training.launch import rank

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    os.dup2(stdin, 0)
    # `multiprocessing` has put another one in its place.
    sys.stdin = os.fdopen(0, closefd=False)
    os.dup2(2, 1)
    # The other rank's stdin, above all: it must end with the launcher.
    kept = 2 if lock is None else lock
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    _become(arguments, environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    return rank.run()
