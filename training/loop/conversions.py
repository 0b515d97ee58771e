"""DeepSpeed's state converted for other ranks or of former layers, once, beside the state in a checkpoint."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from errors import ProgramFault, UserError
from pipelines.engine.progress import get_logger
from pipelines.store.checkpoints import Checkpoint
from pipelines.store.deepspeed_files import SEPARATE_STATE, STATE, UNIVERSAL_STATE, conversion_damage, list_files
from training.loop.disk import fsync_tree, saying_a_full_disk
from training.loop.former_layout import has_former_layout, separate_state
from training.loop.zero import deepspeed_records

# What a conversion that was killed leaves: the prefix, and eight characters of `tempfile`.
UNFINISHED = re.compile(r"\.(universal|separate)-[a-z0-9_]{8}")
log = get_logger("training")


def needs_universal(checkpoint: Checkpoint, num_ranks: int) -> bool:
    """Whether DeepSpeed loads the sharded state only after a conversion: of other ranks, or of another layout.

    Raises:
        UserError: it would be of other ranks, and moments are in 8 bits, whose blocks are a rank's own.
    """
    trainer = checkpoint.trainer
    is_sharded, former = trainer["zero_stage"] > 0, trainer["num_ranks"]
    if is_sharded and former != num_ranks and trainer["fingerprint"].get("training.optimizer") == "adamw8bit":
        raise UserError(
            f"{checkpoint.path} was trained by {former} ranks with training.optimizer = 'adamw8bit' under ZeRO "
            f"{trainer['zero_stage']}, whose blocks of 8 bits are not shared out anew, and there are {num_ranks} now: "
            f"go on with {former} ranks, or from its weights in another table of the recipe with starts_from"
        )
    return is_sharded and (former != num_ranks or has_former_layout(checkpoint))


def loadable_state(checkpoint: Checkpoint, num_ranks: int) -> str:
    """Return the folder in a checkpoint that DeepSpeed can load; all ranks must call it, and then wait for rank 0.

    It is `deepspeed`, or a conversion that rank 0 makes, if there is none or what there is has been damaged.

    Raises:
        StorageError: the disk is full.
        ProgramFault: DeepSpeed cannot convert the state.
    """
    folder, tag = checkpoint.path, STATE
    is_writer = dist.get_rank() == 0
    if is_writer:
        _remove_unfinished(folder)
    if needs_universal(checkpoint, num_ranks):
        tag = UNIVERSAL_STATE
        if is_writer:
            _make(folder / tag, lambda output: _make_universal(folder / STATE, output))
    if has_former_layout(checkpoint):
        source, tag = folder / tag, SEPARATE_STATE
        if is_writer:
            _make(folder / tag, lambda output: _make_separate(source, output))
    return tag


def _make(conversion: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a conversion, unless there is a whole one."""
    if conversion.is_dir():
        damage = conversion_damage(conversion)
        if damage is None:
            return
        log.warning(f"{conversion.parent / damage}: it is made anew from {STATE}/")
        shutil.rmtree(conversion)
    prefix = f".{conversion.name.removeprefix(f'{STATE}-')}-"
    with (
        saying_a_full_disk(conversion.parent, f"{conversion.name}/ was not made"),
        tempfile.TemporaryDirectory(dir=conversion.parent, prefix=prefix) as temporary,
    ):
        output = Path(temporary) / conversion.name
        write(output)
        list_files(output)
        fsync_tree(output)
        output.rename(conversion)


def _make_universal(source: Path, output: Path) -> None:
    """Write the shards of all ranks anew as one file per weight and moment."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
            *("--input_folder", str(source), "--output_folder", str(output)),
            *("--num_extract_workers", "1", "--num_merge_workers", "1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise ProgramFault(f"{source} cannot be converted to DeepSpeed's universal form:\n{done.stdout[-2000:]}")


def _make_separate(source: Path, output: Path) -> None:
    """Write a state anew in today's layout."""
    with torch.serialization.safe_globals(deepspeed_records()):
        separate_state(source, output)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
