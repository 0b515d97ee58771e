"""Ray: a local one or a cluster, how many workers fit it, and an actor pool that runs pieces."""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import ProgramFault, UserError, users_message
from pipelines.engine.pieces import JoinedParts, PieceReport
from pipelines.engine.runner import PieceOutcome, PieceRunner
from pipelines.store.remote import adopt_storage_environment, storage_environment

# How often the driver asks how far the pieces under way have come.
POLL_SECONDS = 1.0
CONNECT_SECONDS = 10.0
HOUSE = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """What Ray reserves for each worker."""

    cpus: float
    gpus: float
    memory_bytes: int


def is_cluster() -> bool:
    """Whether `RAY_ADDRESS` names a cluster, as it does in a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def start_ray() -> Any:
    """Connect to the cluster of `RAY_ADDRESS`, or start a local Ray; gives the `ray` module.

    Raises:
        UserError: there is no Ray at `RAY_ADDRESS`, or it refuses this driver.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray tells of a dead worker in twenty lines; the engine does in one.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed|There are infinite retries")
    import ray
    import ray.data
    import ray.exceptions

    if ray.is_initialized():
        return ray
    _require_reachable(os.environ.get("RAY_ADDRESS", ""))
    try:
        # Ray lets workers look for modules in the working folder, which is to be the house's and not the user's.
        with _quiet_banner(), contextlib.chdir(HOUSE):
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"RAY_ADDRESS = {os.environ.get('RAY_ADDRESS', '')!r}: {reason}") from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray Data logs an exception with its stack before it raises it.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _require_reachable(address: str) -> None:
    """Refuse an address where nothing listens: Ray would wait for minutes, and then end the process."""
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS = {address!r} is not the address of a cluster, such as 10.0.0.1:6379 or auto; "
            "from outside the cluster use `ray job submit`, see docs/CLUSTER.md"
        )
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS = {address!r}: no Ray answers there: {error}") from None


@contextlib.contextmanager
def _quiet_banner() -> Iterator[None]:
    # Ray's C++ core announces its log level on file descriptor 2, whatever the level is.
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def choose_num_workers(num_workers: int, resources: WorkerResources) -> int:
    """Return `num_workers` or, if it is 0, how many fit: by GPUs, or by CPU cores if workers need no GPU.

    Raises:
        UserError: no node has what one worker needs, and Ray would wait for ever for one that has.
    """
    nodes = [node["Resources"] for node in start_ray().nodes() if node["Alive"]]
    if resources.gpus:
        wanted, kind, key = resources.gpus, "GPU", "engine.gpus_per_worker"
    else:
        wanted, kind, key = resources.cpus, "CPU", "engine.cpus_per_worker"
    num_fitting = sum(int(node.get(kind, 0) / wanted) for node in nodes)
    if not num_fitting and not (is_cluster() and num_workers):
        largest = max((node.get(kind, 0) for node in nodes), default=0)
        raise UserError(f"{key} = {wanted:g}, but {_describe_lack(kind, key, largest=largest)}")
    return num_workers or num_fitting


def _describe_lack(kind: str, key: str, *, largest: float) -> str:
    """Say what there is where no node has what a worker needs, and which key helps."""
    if largest == 0 and kind == "GPU":
        lack = "Ray sees no GPU: set engine.gpus_per_worker=0 to work on the CPU"
    else:
        lack = f"Ray sees at most {largest:g} {kind}s on one node: lower {key} to that"
    return f"{lack}; where an autoscaler will add nodes, set engine.num_workers" if is_cluster() else lack


class _PieceActor:
    """What Ray Data puts into its actor pool."""

    def __init__(self, runner: PieceRunner, gauge: Any, directory: str, environment: dict[str, str]) -> None:
        adopt_storage_environment(environment)
        # Relative paths mean what they meant where the command was typed, on every node that has the folder.
        with contextlib.suppress(OSError):
            os.chdir(directory)
        self._runner = runner
        self._gauge = gauge

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run one piece; errors meant for the user travel as rows, as Ray would drop their type."""
        index = int(row["item"])
        empty = {"index": index, "outcome": "", "error": "", "traceback": ""}
        try:
            outcome = self._runner.run(index, on_slice=lambda num_done: self._gauge.note.remote(index, num_done))
        except Exception as error:  # noqa: BLE001 - told as what it is by the driver
            message = _users_message(error, self._runner.directory)
            return {**empty, "error": message or "", "traceback": traceback.format_exc()}
        finally:
            self._gauge.note.remote(index, 0)
        return {**empty, "outcome": json.dumps(asdict(outcome))}


def _users_message(error: Exception, directory: Path) -> str | None:
    """Return what to tell a user who can mend it, or None if the error is a fault of the program."""
    if isinstance(error, FileNotFoundError) and is_cluster():
        return f"{error} (on {socket.gethostname()}: do all nodes see the same storage?)"
    return users_message(error, directory)


class _Gauge:
    """Lives beside the driver: how many samples of each piece under way are done."""

    def __init__(self) -> None:
        self._num_done: dict[int, int] = {}

    def note(self, index: int, num_done: int) -> None:
        if num_done:
            self._num_done[index] = num_done
        else:
            self._num_done.pop(index, None)

    def read(self) -> int:
        return sum(self._num_done.values())


def run_on_ray(
    runner: PieceRunner,
    waiting: Sequence[int],
    *,
    num_workers: int,
    resources: WorkerResources,
    on_progress: Callable[[int], None],
) -> Iterator[tuple[int, PieceOutcome]]:
    """Run the pieces `waiting` in any order and yield what became of them; `on_progress` gets the samples under way.

    Raises:
        UserError: what a worker had to say to the user; its traceback is a note of the error.
        ProgramFault: any other exception of a worker's, with its traceback.
    """
    if not waiting:
        return
    ray = start_ray()
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    gauge = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(_Gauge).remote()
    # One block per piece: a worker that dies loses one piece, and Ray hands just that piece to another.
    dataset = ray.data.from_items(list(waiting), override_num_blocks=len(waiting)).map(
        _PieceActor,
        fn_constructor_args=(runner, gauge, str(Path.cwd()), storage_environment()),
        # One piece at a time: those that waited in a worker's queue would wait for its node to come back.
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(waiting)), max_tasks_in_flight_per_actor=1),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        memory=resources.memory_bytes or None,
    )
    with _polled(ray, gauge, on_progress):
        for row in _rows(ray, dataset):
            if row["error"]:
                error = UserError(row["error"])
                error.add_note(f"in a worker process:\n{row['traceback']}")
                raise error
            if row["traceback"]:
                raise ProgramFault(f"in a worker process:\n{row['traceback']}")
            yield int(row["index"]), _outcome(json.loads(row["outcome"]))


def _outcome(content: dict[str, Any]) -> PieceOutcome:
    report, joined = content.pop("report"), content.pop("joined")
    return PieceOutcome(
        report=PieceReport(**report) if report else None, joined=JoinedParts(**joined) if joined else None, **content
    )


def _rows(ray: Any, dataset: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayError as error:
        missing = re.search(r"No module named '[\w.]+'", str(error))
        if missing is None:
            raise
        raise UserError(
            f"a worker cannot start: {missing[0]}; every node needs the packages of requirements.lock, and the "
            "repository under the path that the command is typed in, see docs/CLUSTER.md"
        ) from error


@contextlib.contextmanager
def _polled(ray: Any, gauge: Any, on_progress: Callable[[int], None]) -> Iterator[None]:
    is_over = threading.Event()

    def poll() -> None:
        while not is_over.wait(POLL_SECONDS):
            # A gauge that died with its node is being restarted, and only the view depends on it.
            with contextlib.suppress(ray.exceptions.RayError):
                on_progress(ray.get(gauge.read.remote(), timeout=POLL_SECONDS))

    thread = threading.Thread(target=poll, name="gauge", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        on_progress(0)
        ray.kill(gauge)
