"""Out of memory is one line in every room, with what to lower: shown by allocations that really fail."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

from errors import (
    LoneItemError,
    MemoryShortageError,
    ProgramFault,
    UserError,
    describe_memory_shortage,
    is_out_of_memory,
    memory_for,
)
from pipelines.command import run_command

# Small enough to be written down, too large for any machine: what an allocator says to it is the real thing.
IMPOSSIBLE_BYTES = 1 << 50
ALLOCATIONS = {
    "python": lambda: bytearray(IMPOSSIBLE_BYTES),
    "numpy": lambda: np.empty(IMPOSSIBLE_BYTES, dtype=np.uint8),
    "arrow": lambda: pa.allocate_buffer(IMPOSSIBLE_BYTES),
    "torch": lambda: torch.empty(IMPOSSIBLE_BYTES, dtype=torch.uint8),
    "product": lambda: torch.zeros(1 << 24, 1) @ torch.zeros(1, 1 << 24),
    "cuda": lambda: torch.empty(IMPOSSIBLE_BYTES, dtype=torch.uint8, device="cuda"),
}
every_allocator = pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=list(ALLOCATIONS))


def fail(allocate) -> Exception:
    if allocate is ALLOCATIONS["cuda"] and not torch.cuda.is_available():
        pytest.skip("no GPU: its allocator cannot be asked for too much")
    try:
        allocate()
    except Exception as error:  # noqa: BLE001 - its kind is what is asked
        return error
    raise AssertionError("no machine has that much")


@every_allocator
def test_what_an_allocator_raises_is_known(allocate):
    assert is_out_of_memory(fail(allocate))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(28, "No space left on device"),
        ValueError("Cannot allocate memory"),
        UserError("out of memory"),
        ProgramFault("DefaultCPUAllocator: can't allocate memory"),
        KeyError("out of memory"),
    ):
        assert not is_out_of_memory(error)
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))


def test_ray_and_cuda_are_known_without_being_loaded():
    import ray.exceptions

    assert is_out_of_memory(ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    program = "import errors, sys; errors.is_out_of_memory(MemoryError()); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_what_to_lower_is_named_with_its_value():
    error = fail(ALLOCATIONS["torch"])
    settings = {"captioning.batch_size": 32, "engine.num_workers": 1, "sampling.size": "64x64"}
    said = describe_memory_shortage(error, what="shard a", settings=settings)
    assert said == (
        f"shard a: out of memory (can't allocate memory: you tried to allocate {IMPOSSIBLE_BYTES} bytes. Error code 12 "
        "(Cannot allocate memory)); lower captioning.batch_size = 32 or sampling.size = 64x64; what is done is kept"
    )
    # Of a single item no batch is to blame, and a bare MemoryError says nothing.
    said = describe_memory_shortage(LoneItemError(), what="shard a", settings=settings)
    assert said == "shard a: out of memory; lower sampling.size = 64x64; what is done is kept"
    said = describe_memory_shortage(MemoryError(), what="shard a", settings={"engine.num_workers": 1})
    assert "close other programs, or take a machine with more memory" in said


def test_a_command_that_runs_out_of_memory_ends_in_one_line(capsys):
    assert run_command("dataset_stats", ALLOCATIONS["arrow"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("dataset_stats: this command: out of memory (malloc of size 1125899906842624 failed); close")
    assert "\n" not in said and "Traceback" not in said


def test_rooms_say_what_did_not_fit():
    said = r"^the prompts: out of memory \(.*\); lower a\.batch_size = 4; what"
    with pytest.raises(MemoryShortageError, match=said), memory_for("the prompts", {"a.batch_size": 4}):
        ALLOCATIONS["numpy"]()
    with pytest.raises(RuntimeError, match="shapes"), memory_for("the prompts", {"a.batch_size": 4}):
        raise RuntimeError("shapes")


def test_a_process_with_little_memory_says_so_whatever_allocates():
    """A limit of the system's, as a container sets it: nothing here is asked for that a machine could not have."""
    program = (
        "import resource, sys, torch; from pipelines.command import run_command\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)\n"
        "sys.exit(run_command('features', lambda: torch.zeros(100_000_000)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert (
        "features: this command: out of memory (can't allocate memory: you tried to allocate 400000000 b" in done.stderr
    )
    assert "Traceback" not in done.stderr
