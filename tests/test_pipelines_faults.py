"""kill -9 at random moments, and Ctrl-C: the command typed again ends with the bytes of an undisturbed run."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.line_worker import command, contents, make_sources, run
from tests.processes import kill, kill_tree, ray_workers
from tests.terminal import run_in_terminal, visible_lines

SEED = 20261121
ON_RAY = {"num_workers": 2, "samples_per_slice": 8, "max_shard_attempts": 50}
IN_PROCESS = {"in_process": True, "samples_per_slice": 8}


def has_begun(output: Path) -> bool:
    return Path(f"{output}.calls").exists()


def start(line: list[str], output: Path) -> subprocess.Popen:
    """Start the command, and return when its first piece of work of this run has begun, or all is done."""
    Path(f"{output}.calls").unlink(missing_ok=True)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not has_begun(output):
        time.sleep(0.005)
    return process


def finish(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("seed", [SEED])
def test_twelve_drivers_killed_at_random_moments(tmp_path, seed: int) -> None:
    """Most of the time of this job goes into files: joined parts, renames, markers, the manifest."""
    moments = random.Random(seed)
    output = tmp_path / "a"
    line = command(output, engine=IN_PROCESS, count=150, num_samples=400, seconds_per_slice=0.0003)
    for _ in range(12):
        process = start(line, output)
        time.sleep(moments.uniform(0, 0.25))
        kill(process.pid)
        assert process.wait() == -9, "the job is too short: it has ended before the driver could be killed"
    finish(line)
    run(tmp_path / "undisturbed", make_sources(150, 400))
    assert contents(output) == contents(tmp_path / "undisturbed")


@pytest.mark.faults
@pytest.mark.parametrize("seed", [SEED])
def test_ten_kills_at_random_moments_on_ray(tmp_path, seed: int) -> None:
    """Eight workers; the driver, whose orphans may still be writing when the next one starts; and all at one moment."""
    moments = random.Random(seed)
    output = tmp_path / "a"
    line = command(output, engine=ON_RAY, count=6, num_samples=160, seconds_per_slice=0.1)
    victims = ["driver", "machine", *["worker"] * 8]
    moments.shuffle(victims)
    process = start(line, output)
    for victim in victims:
        time.sleep(moments.uniform(0.1, 0.8))
        if victim == "worker":
            while process.poll() is None and not (workers := ray_workers(process.pid)):
                time.sleep(0.01)
            assert process.poll() is None, "the job is too short: it has ended before a worker could be killed"
            kill(moments.choice(workers))
            continue
        kill(process.pid) if victim == "driver" else kill_tree(process.pid)
        assert process.wait() == -9, "the job is too short: it has ended before the driver could be killed"
        process = start(line, output)
    assert process.wait() == 0
    run(tmp_path / "undisturbed", make_sources(6, 160))
    assert contents(output) == contents(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [IN_PROCESS, ON_RAY], ids=["in_process", "on_ray"])
def test_ctrl_c_ends_in_one_line_and_the_same_command_continues(tmp_path, engine) -> None:
    output = tmp_path / "a"
    line = command(output, engine=engine, count=8, num_samples=40, seconds_per_slice=0.1)
    status, written = run_in_terminal(
        line, columns=100, interrupt_when=lambda: len(list((output / ".done").glob("*.json"))) >= 2
    )
    assert status == 130
    assert visible_lines(written)[-1].strip() == "test: interrupted; the same command continues"
    assert "Traceback" not in written
    assert not (output / "manifest.json").exists()
    assert not list((output / ".parts").glob(".claim-*"))
    finish(command(output, engine=IN_PROCESS, count=8, num_samples=40))
    run(tmp_path / "undisturbed", make_sources(8, 40))
    assert contents(output) == contents(tmp_path / "undisturbed")
