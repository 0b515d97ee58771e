"""A dataset of a stage: its directories of features, and whether several can be mixed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.store.families import PIXELS
from pipelines.store.files import is_remote
from pipelines.store.manifest import Fingerprint, require_same
from training.data.choices import DatasetChoice
from training.data.directories import FeatureDirectory
from training.mixture import DatasetRole


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Feature directories of a dataset, one a family, and the shards read of them.

    The first directory leads: it says which samples there are and in which buckets; the others are joined to it by
    key. `validation_shards` are read for the validation loss alone. `role` is what its samples are to the objective.
    Of a dataset with a `choice` the samples are those that it chose.
    """

    run: str
    directories: list[FeatureDirectory]
    shards: list[str]
    validation_shards: list[str] = field(default_factory=list)
    weight: float = 1.0
    role: DatasetRole = "instance"
    choice: DatasetChoice | None = None

    @property
    def leading(self) -> FeatureDirectory:
        """The directory that says which samples there are."""
        return self.directories[0]

    @property
    def has_labels(self) -> bool:
        """Whether the condition is a class label: where there are no captions, and images that may have one."""
        is_captioned = any(directory.family.is_ragged for directory in self.directories)
        return not is_captioned and "label" in self.leading.family.columns.names

    def held_out(self) -> "Dataset":
        """Return the part that is kept for validation: chosen as the rest is, but each sample counts alike."""
        choice = None if self.choice is None else replace(self.choice, has_weights=False)
        return replace(self, shards=self.validation_shards, validation_shards=[], choice=choice)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what identifies the data: the settings they were made with, and a hash over every tar and index."""
        shards = [*self.shards, *self.validation_shards]
        fields = {} if self.choice is None else self.choice.fingerprint_fields(shards)
        for directory in self.directories:
            family, manifest = directory.family.name, directory.manifest
            fields |= {f"{family}.{name}": value for name, value in manifest.fingerprint.fields.items()}
            files = {name: manifest.shards[name].files for name in shards}
            fields[f"{family}.files"] = Fingerprint.of(files).digest
        return fields

    def fingerprint_defaults(self) -> dict[str, Any]:
        """Return what the settings are that the features' fingerprints leave out, as their manifests say."""
        return {
            f"{directory.family.name}.{name}": value
            for directory in self.directories
            for name, value in directory.manifest.extra.get("defaults", {}).items()
        }


def require_apart(datasets: Sequence[Dataset], *, key: str) -> None:
    """Refuse a shard that two datasets read: it would be drawn twice in an epoch.

    Raises:
        UserError: names the recipe `key` of both, and the shard.
    """
    owners: dict[tuple[str, str], int] = {}
    for number, dataset in enumerate(datasets):
        for name in [*dataset.shards, *dataset.validation_shards]:
            folder = dataset.leading.location
            folder = folder if is_remote(folder) else str(Path(folder).resolve())
            other = owners.setdefault((folder, name), number)
            if other != number:
                raise UserError(
                    f"{key}.{other} and {key}.{number} both read shard {name} of {dataset.run}; "
                    "narrow the shards of one of them"
                )


def require_alike(datasets: Sequence[Dataset]) -> None:
    """Refuse datasets that one network cannot be trained on; names and revisions have been compared with the recipe.

    Raises:
        UserError: names what differs, and both values.
    """
    first, *others = datasets
    for other in others:
        mend = (
            f"leave one of {first.run} and {other.run} out of `datasets`, or make the features of both with one encoder"
        )
        for name in ("channels", "scaling_factor", "shift_factor"):
            values = [dataset.leading.manifest.extra.get("vae", {}).get(name) for dataset in (first, other)]
            require_same(f"vae.{name}", *values, where=str(other.leading), mend=mend)
        # A codec is the same at any size; of latents positions are not.
        if first.leading.family.name != PIXELS:
            resolutions = [dataset.leading.fact("resolution") for dataset in (first, other)]
            require_same("resolution", *resolutions, where=str(other.leading), mend=mend)
        for name in ("model", "revision", "cleaning"):
            encoders = [_text_encoder(dataset).get(name) for dataset in (first, other)]
            require_same(f"text.{name}", *encoders, where=str(other.leading), mend=mend)
        families = [[directory.family.name for directory in dataset.directories] for dataset in (first, other)]
        require_same("families", *families, where=other.run, mend=mend)
        for one, another in zip(first.directories, other.directories, strict=True):
            made = [directory.manifest.extra.get("settings") for directory in (one, another)]
            require_same(f"{one.family.name}.settings", *made, where=str(another), mend=mend)
            tensors = [list(map(str, directory.family.tensors)) for directory in (one, another)]
            require_same(f"{one.family.name}.tensors", *tensors, where=str(another), mend=mend)


def _text_encoder(dataset: Dataset) -> dict[str, Any]:
    extras = (directory.manifest.extra for directory in dataset.directories)
    return next((extra["text"] for extra in extras if "text" in extra), {})
