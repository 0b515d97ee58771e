"""The control branch that a stage goes on from, named as weights are."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoders.branches import find_branch
from encoders.control_kinds import describe_other_maps
from encoders.weights import identity_of
from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.command import Command
from pipelines.engine.progress import get_logger
from pipelines.store.bases import adapter_identity
from pipelines.store.checkpoints import CONTROL, Checkpoint, named_checkpoint
from pipelines.store.files import sha256_file
from pixart.belonging import compare_base
from training.config import StageTraining, stage_names

log = get_logger("training")


def starting_branch(
    command: Command, settings: StageTraining, directory: Path
) -> tuple[Path | None, Checkpoint | None]:
    """Return the file of the branch that `control_starts_from` names, and the checkpoint if it names one.

    There is no file of a stage that begins a branch, or has none.

    Args:
        command: has the recipe and the run.
        settings: of the stage.
        directory: the stage's own folder.

    Raises:
        MissingFileError: there is nothing of that name.
        UserError: it is the stage's own, or a checkpoint of something else; names the recipe key.
    """
    wanted = settings.control_starts_from
    if wanted is None or not settings.has_control:
        return None, None
    key = f"training.{command.stage_name}.control_starts_from"
    path = typed_path(wanted.replace("{run}", str(command.run)))
    if wanted in stage_names(command.recipe):
        path = command.run / "training" / wanted
    if directory in (path, *path.parents):
        raise UserError(f"{key} = {wanted!r} is this stage's own folder; resuming is automatic and needs no key")
    return find_branch(str(path), key=key), named_checkpoint(path)


def branch_identity(file: Path) -> str:
    """Return the hash of a branch's file."""
    return f"sha256:{sha256_file(file)}"


def require_no_branch(checkpoint: Checkpoint, *, named: str) -> None:
    """Refuse a checkpoint that has a control branch alone where whole weights are `named`."""
    raise UserError(
        f"{named} is a checkpoint of a control branch ({checkpoint.weights}), and no network by itself: name the "
        f"weights that it was trained on, and to go on training it, say trains = 'control' and "
        f"control_starts_from = '{checkpoint.weights}'"
    )


def warn_of_others(
    file: Path,
    known: Mapping[str, Any],
    *,
    base: Path,
    adapters: Sequence[Path],
    process: Mapping[str, Any],
    maps: Mapping[str, Any],
) -> None:
    """Say on the first rank where a branch has learnt beside other weights, or by other maps, than a stage has.

    Args:
        file: of the branch.
        known: what it says that it belongs to, nothing of files of others.
        base, adapters: the weights that the stage starts from, and what is merged into them.
        process: of the stage.
        maps: how the manifest says that the stage's control images were drawn.

    Raises:
        UserError: it was trained with another process, on every rank; names both.
    """
    said = compare_base(
        file,
        known,
        title=str(base),
        location=str(base),
        identity=identity_of(base),
        adapters=set(map(adapter_identity, adapters)),
        process=process,
    )
    if CONTROL in known and (other := describe_other_maps(known[CONTROL], maps)) is not None:
        said.append(f"{file} {other}")
    if os.environ.get("RANK", "0") == "0":
        for line in said:
            log.warning(line)
