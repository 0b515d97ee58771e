"""Checkpoints: `step-<k>/` with DeepSpeed's state, the EMA weights as a diffusers folder, and `trainer.json`.

A folder is written under a temporary name, fsynced and renamed; `latest` moves last. So a process killed at any time
leaves the former checkpoint in force. The EMA is kept once: the fp32 weights of `model/` are its state.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.store.files import atomic_write_bytes, atomic_write_json, fsync_directory

if TYPE_CHECKING:
    from training.loop.ema import EMA
    from training.loop.zero import ZeroModel

LATEST = "latest"
TRAINER = "trainer.json"
MODEL = "model"
STATE = "deepspeed"
UNIVERSAL_STATE = "deepspeed-universal"
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
    return Checkpoint(path, json.loads((path / TRAINER).read_text()))


def _step_of(name: str) -> int:
    suffix = name.removeprefix("step-")
    return int(suffix) if suffix.isdigit() else -1


def save_checkpoint(
    stage_directory: Path, *, model: "ZeroModel", ema: "EMA", trainer: dict[str, Any], num_kept: int
) -> None:
    """Write the checkpoint of `trainer["step"]` and drop all but the newest `num_kept`; all ranks must call it.

    Raises:
        OSError: the disk is full or the folder cannot be written; the former checkpoint stays in force.
    """
    import torch.distributed as dist

    is_writer = dist.get_rank() == 0
    final = stage_directory / f"step-{trainer['step']}"
    temporary = stage_directory / f".{final.name}.tmp"
    if is_writer:
        remove_unfinished(stage_directory)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        _write(temporary, model=model, ema=ema, trainer=trainer)
        if is_writer:
            _put_in_force(temporary, final)
    except Exception as error:
        if not is_disk_full(error, stage_directory):
            raise
        raise OSError(
            f"{stage_directory}: the disk is full, {final.name} was not saved and the checkpoint before it stays in "
            "force; make room and type the command again"
        ) from error
    if is_writer:
        _drop_old(final, num_kept)


def remove_unfinished(stage_directory: Path) -> None:
    """Remove what a save that did not end has left; no rank may be saving."""
    for unfinished in stage_directory.glob(".step-*.tmp"):
        shutil.rmtree(unfinished)


def _put_in_force(temporary: Path, final: Path) -> None:
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_directory(final.parent)
    atomic_write_bytes(final.parent / LATEST, f"{final.name}\n".encode())


def _drop_old(newest: Path, num_kept: int) -> None:
    """Remove all but `num_kept`: first those of later steps, abandoned when `latest` was set back, then the oldest."""
    step = _step_of(newest.name)
    others = [path for path in newest.parent.glob("step-*") if path != newest]
    others.sort(key=lambda path: (_step_of(path.name) < step, _step_of(path.name)))
    for old in others[: max(0, len(others) + 1 - num_kept)]:
        shutil.rmtree(old)


def _write(folder: Path, *, model: "ZeroModel", ema: "EMA", trainer: dict[str, Any]) -> None:
    """Write the files of a checkpoint and bring them to the disk."""
    import torch.distributed as dist

    from training.loop.zero import UNIVERSAL_CHECKPOINT_INFO

    model.engine.save_checkpoint(
        str(folder), tag=STATE, client_state=dict(UNIVERSAL_CHECKPOINT_INFO), save_latest=False
    )
    weights = ema.gather()
    if dist.get_rank() == 0:
        _save_model(model.engine.module, weights, folder / MODEL)
        atomic_write_json(folder / TRAINER, trainer)
        _fsync_tree(folder)


def is_disk_full(error: Exception, directory: Path) -> bool:
    """Whether a failed write is a full disk's or quota's; torch and safetensors have errors of their own for that."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    says_so = any(
        sign in str(error) for sign in ("os error 28", "os error 122", "PytorchStreamWriter", "unexpected pos")
    )
    return says_so or shutil.disk_usage(directory).free < SMALLEST_FREE_BYTES


def _save_model(module: Any, weights: dict[str, Any], folder: Path) -> None:
    from pixart.convert import save_diffusers
    from training.stages.networks import blank_network

    model = blank_network(module.config)
    model.load_state_dict(weights, assign=True)
    save_diffusers(model, folder)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            fsync_directory(path)
    fsync_directory(folder)


def needs_universal(checkpoint: Checkpoint, num_ranks: int) -> bool:
    """Whether the state is in shards of another number of ranks, which DeepSpeed loads only after a conversion."""
    return checkpoint.trainer["zero_stage"] > 0 and checkpoint.trainer["num_ranks"] != num_ranks


def _convert_to_universal(folder: Path) -> None:
    """Write the shards in `deepspeed/` anew as one file per weight, in `deepspeed-universal/`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".universal-") as temporary:
        output = Path(temporary) / UNIVERSAL_STATE
        done = subprocess.run(
            [
                *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
                *("--input_folder", str(folder / STATE), "--output_folder", str(output)),
                *("--num_extract_workers", "1", "--num_merge_workers", "1"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise ValueError(f"{folder} cannot be converted for another number of ranks:\n{done.stdout[-2000:]}")
        output.rename(folder / UNIVERSAL_STATE)


def load_checkpoint(checkpoint: Checkpoint, *, model: "ZeroModel", ema: "EMA") -> None:
    """Put weights, optimizer and average back as they were; all ranks must call it.

    Raises:
        ValueError: the folder holds weights but no training state.
    """
    import torch.distributed as dist

    from pixart.convert import load_diffusers

    state = checkpoint.path / STATE
    if not state.is_dir():
        raise ValueError(
            f"{checkpoint.path} holds weights but no optimizer state, so training cannot be resumed from it; "
            "start from it with training.init_from and another RUN"
        )
    tag = STATE
    if needs_universal(checkpoint, dist.get_world_size()):
        tag = UNIVERSAL_STATE
        if dist.get_rank() == 0 and not (checkpoint.path / tag).is_dir():
            _convert_to_universal(checkpoint.path)
        dist.barrier()
    model.load_state(checkpoint.path, tag)
    ema.load(load_diffusers(checkpoint.path / MODEL).state_dict())
