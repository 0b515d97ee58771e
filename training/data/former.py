"""Latents that a former VAE made of the pictures a stage reads, joined to those that it trains on."""

from dataclasses import replace

from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.command import Command
from pipelines.store.feature_store import load_index
from pipelines.store.files import is_remote
from pipelines.store.manifest import require_same
from training.config import StageTraining
from training.data.datasets import Dataset
from training.data.directories import FeatureDirectory, open_directory

# What batches call them: `former_latents.mean` and `former_latents.std`.
FORMER_LATENTS = "former_latents"


def former_location(command: Command, settings: StageTraining) -> str:
    """Return the folder that `former_latents` names."""
    assert settings.former_latents is not None
    return str(typed_path(settings.former_latents.replace("{run}", str(command.run))))


def former_of(dataset: Dataset) -> FeatureDirectory | None:
    """Return where a dataset's latents of a former VAE are, if it has some."""
    return directory_called(dataset, FORMER_LATENTS)


def directory_called(dataset: Dataset, name: str) -> FeatureDirectory | None:
    """Return the directory of a dataset that batches call so, if it has one."""
    return next((each for each in dataset.directories if each.family.name == name), None)


def channels_of(directory: FeatureDirectory) -> int:
    """Return the channels of a folder's latents, as the index of its first shard says."""
    first = min(directory.manifest.shards)
    with directory.open(first, ".parquet") as file:
        channels = load_index(file.path.parent, [first], columns=["channels"])["channels"]
    return max(channels.drop_null().to_pylist())


def with_former_latents(dataset: Dataset, location: str, *, key: str) -> Dataset:
    """Return the dataset with a former VAE's latents in the folder `location`, of samples that have them.

    Raises:
        MissingFileError: there are no finished features.
        UserError: they are not of the dataset's shards and resolution, or behind a URL; names the recipe `key`.
    """
    if is_remote(location) or is_remote(dataset.leading.location):
        raise UserError(f"{key} = {location!r}: latents of both VAEs are read from folders, and one is behind a URL")
    former = FeatureDirectory(location=location, manifest=open_directory(location).manifest, called=FORMER_LATENTS)
    mend = f"name latents of the same images in {key}"
    require_same("resolution", dataset.leading.fact("resolution"), former.fact("resolution"), where=location, mend=mend)
    for name in [*dataset.shards, *dataset.validation_shards]:
        if name not in former.manifest.shards:
            raise UserError(f"{key} = {location!r} lacks shard {name}, which {dataset.leading} has: {mend}")
    return replace(dataset, directories=[*dataset.directories, former])
