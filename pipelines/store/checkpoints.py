"""Checkpoints of a training stage on disk: which folders are ours, which one is in force, and which are whole.

`training/<stage>/step-<k>/` holds DeepSpeed's state, the EMA weights as a diffusers folder `model/` or, of a stage that
trains adapters or a control branch, those alone as peft's folder `adapter/` or diffusers' `control/`, and
`trainer.json`. It is written under a temporary name,
fsynced and renamed, and `latest` moves last: a process that is killed at any time leaves the former checkpoint in
force. People keep copies beside them, so ours are folders of exactly that name; all else, such as `step-20-best`, a
file or a link, is read if `latest` names it, and never removed.
"""

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.store.deepspeed_files import STATE, state_files
from pipelines.store.files import atomic_write_bytes, fsync_directory
from pipelines.store.former_trainer import in_todays_words
from pipelines.store.state_files import read_state, state_damage
from pipelines.store.weight_files import weight_file_damage

LATEST = "latest"
TRAINER = "trainer.json"
MODEL = "model"
ADAPTER = "adapter"
CONTROL = "control"
# Of stages that keep up two averages: the one that is not exported, and in `trainer.json` the length of the other.
SECOND_AVERAGE = "second_average.safetensors"
AVERAGE_LENGTH = "average_length"
WEIGHTS = {
    MODEL: f"{MODEL}/diffusion_pytorch_model.safetensors",
    ADAPTER: f"{ADAPTER}/adapter_model.safetensors",
    CONTROL: f"{CONTROL}/diffusion_pytorch_model.safetensors",
}
CONFIGS = (
    f"{MODEL}/config.json",
    f"{ADAPTER}/adapter_config.json",
    f"{CONTROL}/config.json",
    "scheduler/scheduler_config.json",
)
# In `trainer.json` of adapters and control branches: the weights that they belong to. Of the latter `CONTROL` says what
# leads them.
BASE = "base"
# What `trainer.json` has had from the first version on, and the types.
TRAINER_KEYS = {
    **dict.fromkeys(("step", "num_steps", "zero_stage", "num_ranks", "resolution", "num_samples_seen"), int),
    **dict.fromkeys(("skipped_steps", "skipped_in_a_row"), int),
    **dict.fromkeys(("kind", "weights", "dtype", "plan_fingerprint"), str),
    **dict.fromkeys(("fingerprint", "vae"), dict),
    "stage": (int, str),
    "elapsed_seconds": (int, float),
    "text": (dict, NoneType),
    "buckets": list,
}
OURS = re.compile(r"step-([1-9][0-9]*)")
# What is being written, and with eight digits what is being removed.
UNFINISHED = re.compile(r"\.step-[1-9][0-9]*(\.[0-9a-f]{8})?\.tmp")
NEXT = re.compile(r"\.?step-([1-9][0-9]*)(?:\.tmp)?")
log = get_logger("checkpoints")


class DamagedCheckpointError(UserError):
    """A file of a checkpoint is gone, cut short or changed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its `trainer.json`; `note` says what a person should know of it."""

    path: Path
    trainer: dict[str, Any]
    note: str | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.trainer["step"]

    @property
    def weights(self) -> Path:
        """Folder of the EMA weights: of the whole network, of adapters, or of a control branch."""
        return self.path / kind_of_weights(self.trainer)

    @property
    def has_adapters(self) -> bool:
        """Whether its weights are adapters, and nothing without the weights that `trainer.json` names."""
        return kind_of_weights(self.trainer) == ADAPTER

    @property
    def has_control(self) -> bool:
        """Whether its weights are a control branch, and nothing without the weights that `trainer.json` names."""
        return kind_of_weights(self.trainer) == CONTROL

    @property
    def is_finished(self) -> bool:
        """Whether the stage had done all its steps."""
        return self.step >= self.trainer["num_steps"]


def find_checkpoint(stage_directory: Path, *, checks_files: bool = True) -> Checkpoint | None:
    """Return the checkpoint that `latest` names, or the newest whole one should that be gone; None if there is none.

    It can be drawn with; whether training can go on from it too, `require_whole` says. A checkpoint that `latest` names
    and that is damaged is never passed over: steps would be lost without a word.

    Args:
        stage_directory: `RUN/training/<stage>`; it need not exist.
        checks_files: looks at the files of what `latest` names, a few bytes of each; another process may have done so.

    Raises:
        DamagedCheckpointError: names the file, the newest intact checkpoint and how to go on.
    """
    latest = stage_directory / LATEST
    named = latest.read_bytes().decode(errors="replace").strip() if latest.is_file() else ""
    folder = next((path for path in _folders(stage_directory) if path.name == named and named[0] != "."), None)
    if folder is not None:
        if checks_files and (damage := weights_damage(folder)):
            raise DamagedCheckpointError(_refusal(folder, damage))
        return _opened(folder, checks_files=checks_files)
    damages = {path: damage_of(path) for path in reversed(checkpoint_folders(stage_directory))}
    if not damages:
        return None
    whole = [path for path in damages if damages[path] is None]
    folder = next(iter(whole or [path for path in damages if weights_damage(path) is None]), None)
    newest = next(iter(damages))
    if folder is None:
        raise DamagedCheckpointError(_refusal(newest, str(damages[newest])))
    reason = f"names {named!r}, which is not there" if named else "is empty" if latest.is_file() else "is gone"
    passed = [path for path in damages if _step_of(path) > _step_of(folder)]
    said = "".join(f"; {other.name} is damaged ({damages[other]})" for other in passed)
    kind = "the newest whole checkpoint" if whole else "the newest checkpoint of whole weights"
    return _opened(folder, note=f"{latest} {reason}{said}: {kind} is taken, {folder.name}")


def require_whole(folder: Path, *, is_thorough: bool = False) -> None:
    """Refuse a checkpoint in force from which training cannot go on: names the file, and the way to go on."""
    if damage := damage_of(folder, is_thorough=is_thorough):
        raise DamagedCheckpointError(_refusal(folder, damage))


def open_checkpoint(folder: Path, *, checks_files: bool = True) -> Checkpoint:
    """Return the checkpoint in a folder that is named for its weights; `checks_files` as in `find_checkpoint`.

    Raises:
        DamagedCheckpointError: names the file.
    """
    if checks_files and (damage := weights_damage(folder)):
        intact = _newest_intact(folder)
        other = "" if intact is None else f"; the newest intact checkpoint beside it is {intact}, name that instead"
        raise DamagedCheckpointError(f"{folder} is damaged: {damage}{other}")
    return _opened(folder, checks_files=checks_files)


def named_checkpoint(path: Path, *, checks_files: bool = True) -> Checkpoint | None:
    """Return the checkpoint that a path is, or that is in force in the stage's folder that it is; None of all else.

    Raises as `open_checkpoint` and `find_checkpoint` do.
    """
    opens = open_checkpoint if (path / TRAINER).is_file() else find_checkpoint
    return opens(path, checks_files=checks_files)


def _opened(folder: Path, *, note: str | None = None, checks_files: bool = True) -> Checkpoint:
    """Return a checkpoint of whole weights; its note says, too, what is damaged of the state that training needs."""
    # A person who has removed all of the state knows what the rest is good for.
    if checks_files and (folder / STATE).is_dir() and (damage := damage_of(folder)):
        said = f"{folder} is damaged: {damage}; its weights are whole and are taken, but training cannot go on from it"
        note = said if note is None else f"{note}; {said}"
    return Checkpoint(folder, read_trainer(folder), note)


def read_trainer(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `trainer.json` in today's words; raises as `read_state` does."""
    mend = "restore it from a copy, or take another checkpoint"
    return in_todays_words(read_state(folder / TRAINER, mend=mend, keys=TRAINER_KEYS))


def kind_of_weights(trainer: Mapping[str, Any]) -> str:
    """Return the folder of a checkpoint's weights, by its `trainer.json`: `MODEL`, `ADAPTER` or `CONTROL`."""
    if BASE not in trainer:
        return MODEL
    return CONTROL if CONTROL in trainer else ADAPTER


def checkpoint_folders(stage_directory: Path) -> list[Path]:
    """Return the folders of a stage that are ours, oldest first, whole or not."""
    return sorted(filter(_is_ours, _folders(stage_directory)), key=_step_of)


def damage_of(folder: Path, *, is_thorough: bool = False) -> str | None:
    """Return what is wrong with a checkpoint, the file first, such as "deepspeed/... is empty"; None if it is whole.

    Args:
        folder: of the checkpoint.
        is_thorough: reads all of every file, and compares checksums where there are any.

    Raises:
        OSError: a file cannot be read.
    """
    if damage := weights_damage(folder, is_thorough=is_thorough):
        return damage
    if not (folder / STATE).is_dir():
        return f"{STATE}/ does not exist"
    trainer = read_trainer(folder)
    second = [SECOND_AVERAGE] if AVERAGE_LENGTH in trainer else []
    return _file_damage(folder, [*second, *state_files(trainer)], is_thorough=is_thorough)


def weights_damage(folder: Path, *, is_thorough: bool = False) -> str | None:
    """Return what is wrong with what drawing needs of a checkpoint; arguments and errors as of `damage_of`."""
    if damage := state_damage(folder / TRAINER, keys=TRAINER_KEYS):
        return f"{TRAINER} {damage}"
    for name in CONFIGS:
        if (folder / name).parent.is_dir() and (damage := state_damage(folder / name)):
            return f"{name} {damage}"
    return _file_damage(folder, [WEIGHTS[kind_of_weights(read_trainer(folder))]], is_thorough=is_thorough)


def _file_damage(folder: Path, names: list[str], *, is_thorough: bool) -> str | None:
    for name in names:
        if damage := weight_file_damage(folder / name, is_thorough=is_thorough):
            return f"{name} {damage}"
    return None


def _refusal(folder: Path, damage: str) -> str:
    """Return what to say of a damaged checkpoint that is in force."""
    intact = _newest_intact(folder)
    start = ""
    if not weights_damage(folder):
        weights = Checkpoint(folder, read_trainer(folder)).weights
        start = f"start another stage with training.<stage>.starts_from = '{weights}'"
    if intact is None:
        return (
            f"{folder} is damaged: {damage}; no intact checkpoint is beside it: restore the file from a copy, "
            f"{start and f'{start}, '}or `mv {shlex.quote(str(folder))} {shlex.quote(f'{folder}.damaged')}` and train "
            "the stage anew"
        )
    command = f"echo {shlex.quote(intact.name)} > {shlex.quote(str(folder.parent / LATEST))}"
    return (
        f"{folder} is damaged: {damage}; the newest intact checkpoint beside it is {intact.name}: to go on from that, "
        f"type `{command}` and then the same command again{start and f'; its weights are whole: or {start}'}"
    )


def _newest_intact(damaged: Path) -> Path | None:
    """Return the whole checkpoint of most steps beside a damaged one, also a copy that a user has made."""
    others = [path for path in _folders(damaged.parent) if path.name != damaged.name and path.name[0] != "."]
    intact = [path for path in others if damage_of(path) is None]
    return max(intact, key=lambda path: (read_trainer(path)["step"], _is_ours(path)), default=None)


def require_free_names(stage_directory: Path, *, after_step: int) -> None:
    """Refuse files and links that have the names of checkpoints after a step: they are not ours to replace.

    Raises:
        UserError: names the first of them.
    """
    if not stage_directory.is_dir():
        return
    for path in sorted(stage_directory.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        step = NEXT.fullmatch(path.name)
        is_later = step is not None and int(step[1]) > after_step
        if is_folder if path.name == LATEST else is_later and not is_folder:
            raise UserError(_in_the_way(path))


def _in_the_way(path: Path) -> str:
    return (
        f"{path} was not made by training, which needs that name for a checkpoint: "
        "move it away and type the command again; what is saved stays in force"
    )


def put_in_force(temporary: Path, final: Path) -> None:
    """Give a whole folder its final name, and `latest` last; a former folder of ours of that name goes.

    Raises:
        UserError: something has that name that is not ours, or cannot be removed.
    """
    if final.is_dir() and _is_ours(final):
        if not _discard(final):
            raise UserError(
                f"{final} is a former checkpoint and in the way of the one that was to be saved: remove it by hand and "
                "type the command again; the checkpoint in force stays so"
            )
    elif os.path.lexists(final):
        raise UserError(_in_the_way(final))
    temporary.rename(final)
    fsync_directory(final.parent)
    atomic_write_bytes(final.parent / LATEST, f"{final.name}\n".encode())


def drop_old(newest: Path, num_kept: int) -> None:
    """Remove all but `num_kept` of ours: first those of later steps, abandoned when `latest` was set back, then old.

    Those of later steps are named in a line; what cannot be removed is a warning.
    """
    step = _step_of(newest)
    others = [path for path in checkpoint_folders(newest.parent) if path != newest]
    others.sort(key=lambda path: (_step_of(path) < step, _step_of(path)))
    removed = [path for path in others[: max(0, len(others) + 1 - num_kept)] if _discard(path)]
    if later := [path.name for path in removed if _step_of(path) > step]:
        log.info(f"removed {', '.join(later)}: abandoned when {LATEST} was set back to train on to {newest.name}")


def remove_unfinished(stage_directory: Path) -> None:
    """Remove what a save that did not end has left; no rank may be saving. What cannot be removed is a warning."""
    for path in _folders(stage_directory):
        if UNFINISHED.fullmatch(path.name) and not path.is_symlink():
            _discard(path)


def _discard(folder: Path) -> bool:
    """Remove a folder of ours, which at once loses the name that would make it a checkpoint; returns whether it has."""
    step = folder.name.strip(".").split(".")[0]
    doomed = folder.with_name(f".{step}.{secrets.token_hex(4)}.tmp")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        left = doomed if doomed.exists() else folder
        log.warning(f"{left} cannot be removed ({error.strerror or error}): remove it by hand")
        return left != folder
    return True


def _folders(directory: Path) -> list[Path]:
    """Return the folders in a directory by name, links to some too; none if there is no such directory."""
    return sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


def _is_ours(folder: Path) -> bool:
    return OURS.fullmatch(folder.name) is not None and not folder.is_symlink()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
