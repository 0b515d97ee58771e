"""The control branch that a stage goes on from, named as weights are."""

from pathlib import Path

from encoders.weights import cached_hub_file
from errors import MissingFileError, UserError
from pipelines.as_typed import typed_path
from pipelines.command import Command
from pipelines.store.checkpoints import TRAINER, Checkpoint, find_checkpoint, open_checkpoint
from pipelines.store.files import sha256_file
from pixart.weight_files import is_original_name
from training.config import StageTraining, stage_names


def find_branch(command: Command, settings: StageTraining, directory: Path) -> Path | None:
    """Return the file of the branch that `control_starts_from` names; None of a stage that begins one, or has none.

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
        return None
    key = f"training.{command.stage_name}.control_starts_from"
    path = typed_path(wanted.replace("{run}", str(command.run)))
    if wanted in stage_names(command.recipe):
        path = command.run / "training" / wanted
    if directory in (path, *path.parents):
        raise UserError(f"{key} = {wanted!r} is this stage's own folder; resuming is automatic and needs no key")
    if is_original_name(wanted) and not path.exists():
        return cached_hub_file(wanted, key=key)
    from pixart.control_files import find_branch_file  # with torch, of which what is done needs none

    opens = open_checkpoint if (path / TRAINER).is_file() else find_checkpoint
    checkpoint: Checkpoint | None = opens(path) if path.is_dir() else None
    if checkpoint is not None and not checkpoint.has_control:
        raise UserError(f"{key} = {wanted!r} is a checkpoint of no control branch: name one that trains = 'control'")
    try:
        return find_branch_file(path if checkpoint is None else checkpoint.weights)
    except MissingFileError as error:
        raise MissingFileError(f"{key}: {error}") from None


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
