"""The control branch that a stage goes on from, named as weights are."""

from pathlib import Path

from encoders.branches import find_branch
from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.command import Command
from pipelines.store.checkpoints import Checkpoint
from pipelines.store.files import sha256_file
from training.config import StageTraining, stage_names


def starting_branch(command: Command, settings: StageTraining, directory: Path) -> Path | None:
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
    return find_branch(str(path), key=key)


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
