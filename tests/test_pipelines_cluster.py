"""The same command on a Ray cluster: two nodes on loopback, one of them killed, and one that sees other storage."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import UserError
from pipelines.engine.cluster import _rows
from tests.conftest import REPOSITORY
from tests.line_worker import command, contents, make_sources, run
from tests.processes import ray_workers
from tests.ray_nodes import SETTINGS, RayNode, start_head, wait_for_nodes

ENGINE = {"samples_per_slice": 8}


@pytest.fixture(scope="module")
def cluster():
    """A head node and its address. Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    head, address = start_head(folder)
    yield head, address
    head.kill()
    shutil.rmtree(folder)


def start_command(
    line: list[str], address: str, folder: Path = REPOSITORY, *, changed: Mapping[str, str] | None = None
) -> subprocess.Popen:
    environment = {**os.environ, **SETTINGS, "RAY_ADDRESS": address, **(changed or {})}
    return subprocess.Popen(
        line, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(is_true, process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + 90
    while not is_true():
        assert process.poll() is None, f"ended before {what}: {process.stderr.read() if process.stderr else ''}"
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.02)


@pytest.mark.faults
def test_a_node_killed_during_the_job_costs_only_time(tmp_path, cluster) -> None:
    """One worker per CPU of the cluster, of which each node has one; the second node goes while its worker is busy.

    Paths are relative, as typed; the nodes were started in another folder.
    """
    head, address = cluster
    second = RayNode(f"--address={address}", worker_ports=(27100, 27199))
    output = tmp_path / "a"
    # One shard and two workers: the work is cut inside the shard. Whoever comes first waits for the other, however long
    # a worker takes to start.
    both_are_there = tmp_path / "both"
    line = command(
        Path(os.path.relpath(output, REPOSITORY)),
        engine=ENGINE,
        count=1,
        num_samples=320,
        seconds_per_slice=0.15,
        waits_for=str(both_are_there),
    )
    try:
        wait_for_nodes(address, 2)
        process = start_command(line, address)
        for node in (head, second):
            wait_for(lambda pid=node.process.pid: ray_workers(pid), process, "work on both nodes")
        both_are_there.touch()
        wait_for(lambda: list(output.glob(".parts/*/*.report")), process, "a finished piece")
    finally:
        second.kill()
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    run(tmp_path / "undisturbed", make_sources(1, 320))
    assert contents(output) == contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_node_that_does_not_see_the_output_is_named(tmp_path, cluster) -> None:
    """The second node has the path, too, but another disk is mounted there."""
    _, address = cluster
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs "{tmp_path}" && exec "$@"', "sh"]
    probe = subprocess.run([*hidden, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no right to mount a tmpfs in a namespace of its own (unshare --mount): {probe.stderr.strip()}")
    second = RayNode(f"--address={address}", worker_ports=(27200, 27299), around=hidden)
    output = tmp_path / "a"
    try:
        wait_for_nodes(address, 2)
        line = command(output, engine=ENGINE, count=4, num_samples=64, seconds_per_slice=0.2)
        process = start_command(line, address)
        errors = process.communicate()[1]
    finally:
        second.kill()
    assert process.returncode == 2
    assert f"does not see {output}/.parts/.claim-" in errors and "RUN must be on storage that all nodes share" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_workers_find_the_house_and_no_module_of_the_folder_a_command_is_typed_in(tmp_path, cluster) -> None:
    """Nodes have neither on their path; the command keeps its folder from its own, as `atelier` does."""
    _, address = cluster
    for name in ("errors", "json", "pipelines", "numpy", "tests"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'taken from {__file__}')\n")
    line = command(Path("a"), engine=ENGINE, count=1, num_samples=8)
    process = start_command(line, address, tmp_path, changed={"PYTHONSAFEPATH": "1"})
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    run(tmp_path / "alone", make_sources(1, 8))
    assert contents(tmp_path / "a") == contents(tmp_path / "alone")


def test_a_worker_that_cannot_import_the_house_says_what_nodes_need() -> None:
    class Dead:
        exceptions = SimpleNamespace(RayError=RuntimeError)

        def iter_rows(self):
            raise RuntimeError("ModuleNotFoundError: No module named 'pipelines'")

    with pytest.raises(UserError, match=r"a worker cannot start: No module named 'pipelines'.*docs/CLUSTER\.md"):
        list(_rows(Dead(), Dead()))
