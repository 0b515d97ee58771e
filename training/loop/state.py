"""The state of training on disk and back: DeepSpeed's, the average of what trains, and how to draw with it."""

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from errors import UserError
from pipelines.store.checkpoints import (
    MODEL,
    SECOND_AVERAGE,
    TRAINER,
    Checkpoint,
    drop_old,
    put_in_force,
    remove_unfinished,
    require_whole,
)
from pipelines.store.deepspeed_files import STATE, conversion_damage
from pipelines.store.files import atomic_write_json
from pixart.processes.make import process_of
from pixart.processes.specs import SCHEDULER_FILE, SCHEDULER_FOLDER, spec_of_trainer
from training.codec_keys import CODEC
from training.loop.conversions import loadable_state
from training.loop.disk import fsync_tree, saying_a_full_disk
from training.loop.ema import EMA
from training.loop.former_layout import LAYOUT, LAYOUT_KEY
from training.loop.zero import ZeroModel
from training.stages.critics import without_critic
from training.stages.trainable import trainable_of


def save_checkpoint(
    stage_directory: Path,
    *,
    model: ZeroModel,
    ema: EMA,
    trainer: dict[str, Any],
    num_kept: int,
    second: EMA | None = None,
    measure: Callable[[Path], Mapping[str, Any]] | None = None,
) -> None:
    """Write the checkpoint of `trainer["step"]` and drop all but the newest `num_kept`; all ranks must call it.

    `ema` is the average that is exported, `second` another one. `measure` completes the folder of the weights on rank
    0, and returns what `trainer.json` is to say of that.

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
    with saying_a_full_disk(stage_directory, f"{final.name} was not saved and the checkpoint before it stays in force"):
        _write(temporary, model=model, ema=ema, second=second, trainer=trainer, measure=measure)
        if is_writer:
            put_in_force(temporary, final)
    if is_writer:
        drop_old(final, num_kept)


def _write(
    folder: Path,
    *,
    model: ZeroModel,
    ema: EMA,
    second: EMA | None,
    trainer: dict[str, Any],
    measure: Callable[[Path], Mapping[str, Any]] | None,
) -> None:
    """Write the files of a checkpoint and bring them to the disk."""
    model.save_state(folder, STATE)
    weights = ema.gather()
    others = {} if second is None else without_critic(second.gather())
    if dist.get_rank() == 0:
        trainable, config = trainable_of(model.settings), model.engine.module.config
        trainable.save(config, model.frozen | weights, folder, trainer=trainer)
        if others:
            save_file(others, folder / SECOND_AVERAGE)
        if model.settings.network != CODEC:
            scheduler = process_of(spec_of_trainer(trainer)).scheduler_config()
            atomic_write_json(folder / SCHEDULER_FOLDER / SCHEDULER_FILE, scheduler)
        measured = {} if measure is None else measure(folder / MODEL)
        atomic_write_json(folder / TRAINER, trainer | {LAYOUT_KEY: LAYOUT, **measured})
        fsync_tree(folder)


def load_checkpoint(checkpoint: Checkpoint, *, model: ZeroModel, ema: EMA, second: EMA | None = None) -> None:
    """Put weights, optimizer and averages back as they were; all ranks must call it.

    Raises:
        UserError: there is no training state, or what cannot be loaded; names the file.
        StorageError: the disk is full, and the state must be converted.
    """
    if not (checkpoint.path / STATE).is_dir():
        require_whole(checkpoint.path)
    with _naming_damage(checkpoint, STATE):
        tag = loadable_state(checkpoint, dist.get_world_size())
    dist.barrier()
    with _naming_damage(checkpoint, tag):
        model.load_state(checkpoint.path, tag)
        ema.load(trainable_of(model.settings).load(checkpoint.path, model.engine.module.config))
        if second is not None:
            second.load(load_file(checkpoint.path / SECOND_AVERAGE))


@contextlib.contextmanager
def _naming_damage(checkpoint: Checkpoint, tag: str) -> Iterator[None]:
    """Inside, an error on loading the state `tag` says which file is damaged, if one is: all are read to their end."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        require_whole(checkpoint.path, is_thorough=True)
        folder = checkpoint.path / tag
        if tag != STATE and (damage := conversion_damage(folder, is_thorough=True)):
            raise UserError(
                f"{checkpoint.path / damage}; remove {folder} and type the command again: it is made anew from {STATE}/"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder} holds what no training has written, and it is not loaded: {reason}") from error
        raise
