"""Checks of a training stage: its checkpoints have all their files, and `latest` names one of them."""

from collections.abc import Iterator

from errors import UserError
from pipelines.store.checkpoints import LATEST, TRAINER, checkpoint_folders, damage_of, find_checkpoint, weights_damage
from pipelines.store.deepspeed_files import STATE
from pipelines.store.state_files import state_damage
from pipelines.store.verify.findings import Check, Problem, Unfinished
from pipelines.store.verify.folders import Folder
from pipelines.store.verify.kinds import RESTORE


def checkpoint_checks(folder: Folder) -> Iterator[Check]:
    """Check that no file of a checkpoint is missing; what is wrong with those there are, is checked file by file."""

    def look() -> Problem | None:
        if state_damage(folder.path / TRAINER) not in (None, "does not exist"):
            return None  # which the check of that file tells
        # One whose state was removed, to save room, can still be drawn with.
        damage = damage_of(folder.path) if (folder.path / STATE).is_dir() else weights_damage(folder.path)
        if damage is None or not ("does not exist" in damage or "it lacks" in damage):
            return None
        return folder.problem(damage, mend=folder.mend(RESTORE, folder.path))

    yield Check(directory=folder.path, look=look)


def latest_checks(folder: Folder) -> Iterator[Check]:
    """Check that `latest` names a checkpoint that is there."""

    def look() -> Problem | str | None:
        folders = checkpoint_folders(folder.path)
        newest = folders[-1].name if folders else None
        if LATEST not in folder.files:
            return newest and f"{folder.path}: there is no {LATEST}; commands take the newest whole checkpoint"
        path = folder.files[LATEST]
        name = path.read_bytes().decode(errors="replace").strip()
        if name and "/" not in name and (folder.path / name / TRAINER).is_file():
            return None
        text = f"{LATEST} names {name!r}, which is not there" if name else f"{LATEST} is empty"
        return folder.problem(
            text, mend=folder.mend("`rm {path}`: commands then take the newest whole checkpoint", path)
        )

    files = tuple(folder.files[name] for name in (LATEST,) if name in folder.files)
    yield Check(directory=folder.path, files=files, look=look)


def unfinished_training(folder: Folder) -> Unfinished | None:
    """Say how far a stage is whose checkpoint in force has not done all its steps."""
    try:
        checkpoint = find_checkpoint(folder.path, checks_files=False)
    except (UserError, OSError):  # the checks of its files tell
        return None
    if checkpoint is None:
        return Unfinished(directory=folder.path, text="no checkpoint has been saved yet", command=folder.command)
    if checkpoint.is_finished:
        return None
    text = f"{checkpoint.step:,} of {checkpoint.trainer['num_steps']:,} steps are done"
    return Unfinished(directory=folder.path, text=text, command=folder.command)
