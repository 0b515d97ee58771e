"""Control branches that a recipe puts beside the weights that it draws from: `sampling.control_branch`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from encoders.weights import cached_hub_file, fetch_files, resolve_model
from errors import MissingFileError, UserError
from pipelines.as_typed import typed_path
from pipelines.store.checkpoints import TRAINER, Checkpoint, find_checkpoint, open_checkpoint
from pipelines.store.files import sha256_file
from pixart.weight_files import is_original_name
from sampling.adapters import compare_belonging
from sampling.trained_model import LeadingBranch, TrainedModel

if TYPE_CHECKING:
    from pixart.control_files import StoredBranch

KEY = "sampling.control_branch"


def add_branch(trained: TrainedModel, location: str | None, *, run: Path) -> TrainedModel:
    """Return the model with a control branch beside its weights, which is looked at here; as it is without any.

    Args:
        trained: what is drawn from.
        location: a file, a folder, a checkpoint or stage of training that has a branch, or what the hub calls it;
            `{run}` is the run's folder.
        run: the run's folder.

    Raises:
        MissingFileError: it is not there.
        UserError: it is no control branch or another model's, or the model has one.
    """
    if location is None:
        return trained
    if trained.kind != "pixart":
        raise UserError(f"{KEY} is set, but {trained.name} is a class-conditional DiT: branches are for a PixArt")
    if trained.branch is not None:
        raise UserError(
            f"{KEY} is set, but {trained.name} has a control branch of its own: leave it out, or name the weights that "
            f"this one belongs to as sampling.checkpoint = '{trained.model_path}'"
        )
    file = find_branch(location, run=run)
    stored = _read(file, trained)
    compare_belonging(file, stored.belongs_to, trained)
    identity = f"sha256:{sha256_file(file)}"
    branch = LeadingBranch(
        path=file,
        location=location,
        identity=identity,
        num_copies=stored.num_copies,
        maps=stored.belongs_to.get("control"),
    )
    return replace(
        trained, name=f"{trained.name} + {branch.title}", identity=f"{trained.identity}+{identity}", branch=branch
    )


def find_branch(location: str, *, run: Path) -> Path:
    """Return the file of a control branch; raises as `add_branch` does."""
    from pixart.control_files import find_branch_file

    path = typed_path(location.replace("{run}", str(run)))
    try:
        if not path.exists():
            return find_branch_file(_of_hub(location))
        opens = open_checkpoint if (path / TRAINER).is_file() else find_checkpoint
        checkpoint: Checkpoint | None = opens(path) if path.is_dir() else None
        if checkpoint is not None and not checkpoint.has_control:
            kind = "adapters" if checkpoint.has_adapters else "a whole network"
            raise UserError(f"{KEY} {path} is a checkpoint of {kind}, and no control branch")
        return find_branch_file(path if checkpoint is None else checkpoint.weights)
    except MissingFileError as error:
        said = str(error)
        raise MissingFileError(said if said.startswith(KEY) else f"{KEY}: {said}") from None


def _of_hub(location: str) -> Path:
    """Return a file or folder of the hub's, from its cache or fetched into it."""
    from pixart.control_files import CONFIG_NAME, FILE_NAMES

    if is_original_name(location):
        return cached_hub_file(location, key=KEY)
    source = resolve_model(location)
    if (folder := Path(source.location)).is_dir():
        return folder
    names = (CONFIG_NAME, *FILE_NAMES)
    return fetch_files(source, [*names, *(f"controlnet/{name}" for name in names)], key=KEY)


def _read(file: Path, trained: TrainedModel) -> StoredBranch:
    from pixart.control_files import read_branch
    from pixart.model import PixArt

    network = trained.blank()
    assert isinstance(network, PixArt)
    try:
        return read_branch(file, network.config)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None
