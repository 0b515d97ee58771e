"""What goes wrong while checkpoints are written: a full disk, kill -9, a `latest` that was set back."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_run import REPOSITORY, arguments, finish, make_run, start, train

from pipelines.store.checkpoints import find_checkpoint

pytestmark = pytest.mark.slow
SETTINGS = {"starts_from": "scratch", "num_steps": 100_000, "log_every": 100, "checkpoint_every": 5}
ON_SMALL_DISK = """
mount -t tmpfs -o size=6m tmpfs "$FOLDER" || exit 99
"$@"; status=$?
echo "latest: $(cat "$FOLDER/latest")"; echo "left:" $(ls -A "$FOLDER")
exit $status
"""


@pytest.mark.faults
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_disk_that_fills_up_ends_training_in_one_line(tmp_path: Path, zero_stage: int) -> None:
    if (probe := subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)).returncode:
        pytest.skip(f"no right to mount a tmpfs in a namespace of its own (unshare --mount): {probe.stderr!r}")
    run = make_run(tmp_path)
    folder = run / "training" / "stage2"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "training", *arguments(run, 2, **SETTINGS, zero_stage=zero_stage)]
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", ON_SMALL_DISK, "sh", *command],
        env=os.environ | {"FOLDER": str(folder)},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    inside = Path(f"/proc/{process.pid}/root{folder}")
    wait_for(lambda: (inside / "latest").is_file())
    with (inside / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(1024))
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 2, errors
    assert "the disk is full, step-" in errors and "the checkpoint before it stays in force" in errors
    assert "Traceback" not in errors
    latest = output.split("latest: ")[1].split()[0]
    left = output.split("left:")[1].split()
    assert latest in left, "what `latest` names is there"
    assert not [name for name in left if name.endswith(".tmp")], "nothing half-written takes room"


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_kill_9_during_a_save_leaves_the_checkpoint_before_it(tmp_path: Path, zero_stage: int) -> None:
    run = make_run(tmp_path)
    folder = run / "training" / "stage2"
    process = start(run, 2, **SETTINGS, zero_stage=zero_stage)
    wait_for(lambda: (folder / "latest").is_file())
    ranks = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    wait_for(lambda: stopped_while_saving(folder, ranks))
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    finish(process, status=-signal.SIGKILL)
    assert any(folder.glob(".step-*.tmp/deepspeed"))
    whole = find_checkpoint(folder)
    assert whole is not None
    weights = load_file(whole.path / "model" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    more = whole.step + 3
    train(run, 2, **(SETTINGS | {"num_steps": more}), zero_stage=zero_stage)
    assert (folder / "latest").read_text() == f"step-{more}\n"
    assert not any(folder.glob(".step-*.tmp"))


def test_a_latest_that_was_set_back_is_continued_from(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    folder = run / "training" / "stage2"
    one_rank = SETTINGS | {"num_processes": 1, "checkpoint_every": 2}
    train(run, 2, **(one_rank | {"num_steps": 6, "keep_checkpoints": 3}))
    (folder / "latest").write_text("step-2\n")
    forget_what_older_checkpoints_lack(folder / "step-2" / "trainer.json")
    train(run, 2, **(one_rank | {"num_steps": 3, "keep_checkpoints": 2}))
    assert (folder / "latest").read_text() == "step-3\n"
    kept = {path.name: json.loads((path / "trainer.json").read_text()) for path in folder.glob("step-*")}
    assert kept.keys() == {"step-2", "step-3"}, "the abandoned go first"
    assert kept["step-3"]["device_seconds"] > kept["step-2"]["elapsed_seconds"]


def forget_what_older_checkpoints_lack(path: Path) -> None:
    trainer = json.loads(path.read_text())
    for record, name in (
        (trainer, "device_seconds"),
        (trainer, "starts_from"),
        (trainer["window"], "max_gradient_norm"),
    ):
        del record[name]
    path.write_text(json.dumps(trainer))


def stopped_while_saving(folder: Path, ranks: list[int]) -> bool:
    """Stop the ranks if a checkpoint is half-written, and let them go on if it was whole by then."""
    if not any(folder.glob(".step-*.tmp/deepspeed")):
        return False
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    time.sleep(0.05)
    if any(folder.glob(".step-*.tmp/deepspeed")):
        return True
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    return False


def wait_for(condition, *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)
