"""Control branches that a recipe puts beside the weights that it draws from: `sampling.control_branch`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from encoders.branches import find_branch
from errors import UserError
from pipelines.store.bases import RUN
from pipelines.store.files import sha256_file
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
    file = find_branch(location.replace(RUN, str(run)), key=KEY)
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


def _read(file: Path, trained: TrainedModel) -> StoredBranch:
    from pixart.control_files import read_branch
    from pixart.model import PixArt

    network = trained.blank()
    assert isinstance(network, PixArt)
    try:
        return read_branch(file, network.config)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None
