"""The state of training on disk and back: DeepSpeed's, the average as `model/`, how to draw with it, `trainer.json`."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from errors import StorageError, UserError
from pipelines.store.checkpoints import (
    MODEL,
    STATE,
    TRAINER,
    Checkpoint,
    drop_old,
    put_in_force,
    remove_unfinished,
)
from pipelines.store.files import atomic_write_json, fsync_directory
from pixart.processes.make import process_of
from pixart.processes.specs import SCHEDULER_FILE, SCHEDULER_FOLDER, spec_of_trainer
from training.loop.ema import EMA
from training.loop.former_layout import LAYOUT, LAYOUT_KEY, has_former_layout, separate_state
from training.loop.zero import ZeroModel, deepspeed_records
from training.stages.trainable import load_weights, save_weights

UNIVERSAL_STATE = "deepspeed-universal"
SEPARATE_STATE = "deepspeed-separate"
# What is left when a write has failed for want of room.
SMALLEST_FREE_BYTES = 1 << 20


def save_checkpoint(
    stage_directory: Path, *, model: ZeroModel, ema: EMA, trainer: dict[str, Any], num_kept: int
) -> None:
    """Write the checkpoint of `trainer["step"]` and drop all but the newest `num_kept`; all ranks must call it.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the former checkpoint stays in force.
    """
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
            put_in_force(temporary, final)
    except Exception as error:
        if not _is_disk_full(error, stage_directory):
            raise
        raise StorageError(
            f"{stage_directory}: the disk is full, {final.name} was not saved and the checkpoint before it stays in "
            "force; make room and type the command again"
        ) from error
    if is_writer:
        drop_old(final, num_kept)


def _write(folder: Path, *, model: ZeroModel, ema: EMA, trainer: dict[str, Any]) -> None:
    """Write the files of a checkpoint and bring them to the disk."""
    model.save_state(folder, STATE)
    weights = ema.gather()
    if dist.get_rank() == 0:
        save_weights(model.engine.module.config, model.frozen | weights, folder / MODEL)
        scheduler = process_of(spec_of_trainer(trainer)).scheduler_config()
        atomic_write_json(folder / SCHEDULER_FOLDER / SCHEDULER_FILE, scheduler)
        atomic_write_json(folder / TRAINER, trainer | {LAYOUT_KEY: LAYOUT})
        _fsync_tree(folder)


def needs_universal(checkpoint: Checkpoint, num_ranks: int) -> bool:
    """Whether DeepSpeed loads the sharded state only after a conversion: of other ranks, or of another layout."""
    is_sharded = checkpoint.trainer["zero_stage"] > 0
    return is_sharded and (checkpoint.trainer["num_ranks"] != num_ranks or has_former_layout(checkpoint))


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
            raise UserError(f"{folder} cannot be converted to DeepSpeed's universal form:\n{done.stdout[-2000:]}")
        output.rename(folder / UNIVERSAL_STATE)


def _convert_to_separate(folder: Path, source: str) -> None:
    """Write the state `source` anew in today's layout, in `deepspeed-separate/`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".separate-") as temporary:
        output = Path(temporary) / SEPARATE_STATE
        with torch.serialization.safe_globals(deepspeed_records()):
            separate_state(folder / source, output)
        output.rename(folder / SEPARATE_STATE)


def load_checkpoint(checkpoint: Checkpoint, *, model: ZeroModel, ema: EMA) -> None:
    """Put weights, optimizer and average back as they were; all ranks must call it.

    Raises:
        UserError: the folder holds weights but no training state.
    """
    state = checkpoint.path / STATE
    if not state.is_dir():
        raise UserError(
            f"{checkpoint.path} holds weights but no optimizer state, so training cannot be resumed from it; "
            "start from it with training.<stage>.starts_from and another RUN"
        )
    tag = STATE
    if needs_universal(checkpoint, dist.get_world_size()):
        tag = UNIVERSAL_STATE
        if dist.get_rank() == 0 and not (checkpoint.path / tag).is_dir():
            _convert_to_universal(checkpoint.path)
    if has_former_layout(checkpoint):
        source, tag = tag, SEPARATE_STATE
        if dist.get_rank() == 0 and not (checkpoint.path / tag).is_dir():
            _convert_to_separate(checkpoint.path, source)
    dist.barrier()
    model.load_state(checkpoint.path, tag)
    ema.load(load_weights(checkpoint.path / MODEL))


def _is_disk_full(error: Exception, directory: Path) -> bool:
    """Whether a failed write is a full disk's or quota's; torch and safetensors have errors of their own for that."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    says_so = any(
        sign in str(error) for sign in ("os error 28", "os error 122", "PytorchStreamWriter", "unexpected pos")
    )
    return says_so or shutil.disk_usage(directory).free < SMALLEST_FREE_BYTES


def _fsync_tree(folder: Path) -> None:
    """Bring all files and folders in `folder` to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            fsync_directory(path)
    fsync_directory(folder)
