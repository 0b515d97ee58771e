"""Checkpoints: `step-<k>/` with DeepSpeed's state, the EMA weights as a diffusers folder, and `trainer.json`.

A folder is written under a temporary name, fsynced and renamed; `latest` moves last. So a process killed at any time
leaves the former checkpoint in force. The EMA is kept once: the fp32 weights of `model/` are its state.
"""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.store.files import atomic_write_bytes, fsync_directory
from training.stages.former import in_todays_words

LATEST = "latest"
TRAINER = "trainer.json"
MODEL = "model"
STATE = "deepspeed"
# What is left when a write has failed for want of room.
SMALLEST_FREE_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder and its `trainer.json`."""

    path: Path
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.trainer["step"]

    @property
    def is_finished(self) -> bool:
        """Whether the stage had done all its steps."""
        return self.step >= self.trainer["num_steps"]


def find_checkpoint(stage_directory: Path) -> Checkpoint | None:
    """Return the checkpoint that `latest` names, or the newest complete one should that be gone; None if none is."""
    latest = stage_directory / LATEST
    names = [latest.read_text().strip()] if latest.is_file() else []
    names += sorted((path.name for path in stage_directory.glob("step-*")), key=_step_of, reverse=True)
    for name in names:
        if (stage_directory / name / TRAINER).is_file():
            return open_checkpoint(stage_directory / name)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in folder `path`."""
    return Checkpoint(path, in_todays_words(json.loads((path / TRAINER).read_text())))


def _step_of(name: str) -> int:
    suffix = name.removeprefix("step-")
    return int(suffix) if suffix.isdigit() else -1


def remove_unfinished(stage_directory: Path) -> None:
    """Remove what a save that did not end has left; no rank may be saving."""
    for unfinished in stage_directory.glob(".step-*.tmp"):
        shutil.rmtree(unfinished)


def put_in_force(temporary: Path, final: Path) -> None:
    """Give a whole folder its final name, and `latest` last."""
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_directory(final.parent)
    atomic_write_bytes(final.parent / LATEST, f"{final.name}\n".encode())


def drop_old(newest: Path, num_kept: int) -> None:
    """Remove all but `num_kept`: first those of later steps, abandoned when `latest` was set back, then the oldest."""
    step = _step_of(newest.name)
    others = [path for path in newest.parent.glob("step-*") if path != newest]
    others.sort(key=lambda path: (_step_of(path.name) < step, _step_of(path.name)))
    for old in others[: max(0, len(others) + 1 - num_kept)]:
        shutil.rmtree(old)


def is_disk_full(error: Exception, directory: Path) -> bool:
    """Whether a failed write is a full disk's or quota's; torch and safetensors have errors of their own for that."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    says_so = any(
        sign in str(error) for sign in ("os error 28", "os error 122", "PytorchStreamWriter", "unexpected pos")
    )
    return says_so or shutil.disk_usage(directory).free < SMALLEST_FREE_BYTES


def fsync_tree(folder: Path) -> None:
    """Bring all files and folders in `folder` to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            fsync_directory(path)
    fsync_directory(folder)
