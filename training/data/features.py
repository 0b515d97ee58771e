"""The features a stage trains on: which datasets, directories and shards, and whether they are what the recipe says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from encoders.text import DEFAULT_CLEANING
from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command, typed_path
from pipelines.columns.caption_columns import RunCaptions
from pipelines.command import Command
from pipelines.raw.patterns import select_names
from pipelines.store.families import (
    PIXELS,
    family_directory,
    image_directory,
    text_directory,
)
from pipelines.store.files import is_remote
from pipelines.store.manifest import require_same
from training.codec_keys import CODEC
from training.config import StageTraining
from training.data.cache import ShardCache
from training.data.choices import open_choice, require_all_encoded
from training.data.control import control_family
from training.data.datasets import Dataset, require_alike, require_apart
from training.data.directories import FeatureDirectory, open_directory
from training.data.feature_tables import FeatureTable, read_feature_table
from training.data.former import channels_of, directory_called, former_location, former_of, with_former_latents
from training.mixture import DatasetConfig

GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class StageFeatures:
    """Datasets of a stage, checked against the recipe and each other.

    `unused_shards` are those that the features table `table_name` names and no dataset reads. `control_family` leads
    the stage's control branch, where it has one.
    """

    table_name: str
    datasets: list[Dataset]
    unused_shards: list[str]
    control_family: str | None = None

    @property
    def held_out(self) -> list[Dataset]:
        """What is kept for validation."""
        return [dataset.held_out() for dataset in self.datasets if dataset.validation_shards]

    @property
    def resolution(self) -> int:
        """Base resolution in pixels."""
        return self.datasets[0].leading.fact("resolution")

    @property
    def vae(self) -> dict[str, Any]:
        """Model, revision, scaling_factor and shift_factor of the VAE; nothing where pixels lead, which have none."""
        leading = self.datasets[0].leading
        return {} if leading.family.name == PIXELS else leading.fact("vae")

    @property
    def former(self) -> FeatureDirectory | None:
        """Latents of a former VAE beside them, of a stage that reads some."""
        return former_of(self.datasets[0])

    @property
    def control(self) -> FeatureDirectory | None:
        """Latents of control images beside them, of a stage that trains a control branch."""
        return None if self.control_family is None else directory_called(self.datasets[0], self.control_family)

    @property
    def channels_beside(self) -> dict[str, int]:
        """Channels of the latents beside those that are trained on, by what batches call them."""
        beside = (each for each in (self.former, self.control) if each is not None)
        return {directory.family.name: channels_of(directory) for directory in beside}

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        """Model, revision, max_tokens and d_text of the text encoder."""
        extras = (directory.manifest.extra for directory in self.datasets[0].directories)
        return next((extra["text"] for extra in extras if "text" in extra), None)

    @property
    def shared_files(self) -> set[str]:
        """Fields of the fingerprint that are hashes of features of which a choice takes a part.

        Other choices of the same run add to these files.
        """
        is_one = len(self.datasets) == 1
        return {
            f"{'' if is_one else f'datasets.{number}.'}{directory.family.name}.files"
            for number, dataset in enumerate(self.datasets)
            if dataset.choice is not None
            for directory in dataset.directories
        }

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what identifies the data of all datasets, and how they are mixed; not where they lie."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint_fields()
        fields: dict[str, Any] = {}
        for number, dataset in enumerate(self.datasets):
            own = dataset.fingerprint_fields() | {"weight": dataset.weight}
            own |= {} if dataset.role == "instance" else {"role": dataset.role}
            fields |= {f"datasets.{number}.{name}": value for name, value in own.items()}
        return fields

    def fingerprint_defaults(self) -> dict[str, Any]:
        """Return what the settings are that `fingerprint_fields` lacks, as far as the features' manifests say."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint_defaults()
        return {
            f"datasets.{number}.{name}": value
            for number, dataset in enumerate(self.datasets)
            for name, value in dataset.fingerprint_defaults().items()
        }


def open_features(command: Command, settings: StageTraining) -> StageFeatures:
    """Find the features of a command's stage and check them against the recipe and the captions they came from.

    Raises:
        MissingFileError: features of this stage have not been made.
        UserError: they were made with other settings, or from other captions, or two datasets share a shard; names
            the field and both values.
    """
    stage, name = command.stage_name, settings.features or command.stage_name
    names = dict.fromkeys([name, *(config.features or name for config in settings.datasets)])
    tables = {each: _read_table_of(command, each, settings=settings) for each in names}
    cache_dir = typed_path(settings.cache_dir.replace("{run}", str(command.run)))
    cache = ShardCache(cache_dir, int(settings.cache_gigabytes * GIGABYTE))
    datasets = [
        _open_dataset(
            config,
            tables[config.features or name],
            run=config.run.replace("{run}", str(command.run)).rstrip("/"),
            table_name=config.features or name,
            reads_text=settings.network == "pixart",
            cache=cache,
            recipe=command.recipe.path,
            key=f"training.{stage}.datasets.{number}",
        )
        for number, config in enumerate(settings.datasets)
    ]
    if settings.objective == "realign":
        key = f"training.{stage}.former_latents"
        if settings.former_latents is None:
            raise UserError(
                f"{key} names no latents of the former VAE, which training.{stage}.objective = 'realign' reads"
            )
        location = former_location(command, settings)
        datasets = [with_former_latents(dataset, location, key=key) for dataset in datasets]
    datasets = _hold_out(datasets, settings.validation_shards, key=f"training.{stage}.validation_shards")
    require_apart(datasets, key=f"training.{stage}.datasets")
    require_alike(datasets)
    return StageFeatures(
        table_name=name,
        datasets=datasets,
        unused_shards=_unused_shards(command, datasets, table=tables[name]),
        control_family=control_family(command, settings, datasets[0]) if settings.has_control else None,
    )


def _read_table_of(command: Command, name: str, *, settings: StageTraining) -> FeatureTable:
    stage, names = command.stage_name, command.recipe.names("features", keys=FeatureTable.model_fields)
    if name not in names:
        raise UserError(
            f"{command.recipe.path}: training.{stage} reads [features.{name}], which is missing; write it or set "
            f"training.{stage}.features to one of: {', '.join(names) or 'none'}"
        )
    table = read_feature_table(command.recipe, name)
    if (settings.network == CODEC) != table.has_pixels:
        reads = f"families.{PIXELS}" if settings.network == CODEC else "latents"
        has = f"families.{PIXELS} alone" if table.has_pixels else "latents"
        raise UserError(
            f"{command.recipe.path}: training.{stage}.network = {settings.network!r} reads {reads}, but "
            f"[features.{name}] has {has}"
        )
    if settings.network == "pixart" and not table.text:
        raise UserError(
            f"{command.recipe.path}: training.{stage}.network = 'pixart' reads text, but features.{name}.text = false"
        )
    return table


def _open_dataset(
    config: DatasetConfig,
    table: FeatureTable,
    *,
    run: str,
    table_name: str,
    reads_text: bool,
    cache: ShardCache,
    recipe: Path,
    key: str,
) -> Dataset:
    command = typed_command("features", {"stage": table_name, "run": run})
    name = PIXELS if table.has_pixels else "latent"
    folder = image_directory(Path(), name, table.resolution, variant=table.image_variant)
    try:
        leading = _open(run, folder, command=command, cache=cache)
    except MissingFileError as missing:
        raise (
            missing
            if config.role == "instance"
            else _without_prior(str(missing), run, table_name, recipe=recipe, key=key)
        ) from None
    _check_leading(leading, table=table, table_name=table_name, command=command)
    patterns, pattern_key = config.shards, f"{key}.shards"
    if patterns is None:
        patterns, pattern_key = table.shards, f"features.{table_name}.shards"
    shards = select_names(sorted(leading.manifest.shards), patterns, key=pattern_key)
    directories = [leading]
    if reads_text:
        columns = [caption.column for caption in table.captions]
        text = _open(run, text_directory(Path(), columns, variant=table.text_variant), command=command, cache=cache)
        _check_text(text, table=table, run=run, table_name=table_name, command=command)
        directories.append(text)
    for family, settings in table.families.items():
        is_leading = family == leading.family.name
        other = leading if is_leading else _open_family(run, family, table, command=command, cache=cache)
        _check_family(other, family, settings, leading=leading, table_name=table_name, command=command)
        directories += [] if is_leading else [other]
    choice = open_choice(run, table, table_name=table_name, reads_text=reads_text, cache=cache)
    for directory in directories if choice is None else [*directories, choice.directory]:
        for name in shards:
            if name not in directory.manifest.shards:
                raise UserError(f"{directory} lacks shard {name}, which {leading} has; run `{command}`")
    if choice is None:
        for directory in directories:
            require_all_encoded(directory, shards, table_name=table_name, command=command)
    return Dataset(
        run=run, directories=directories, shards=shards, weight=config.weight, role=config.role, choice=choice
    )


def _hold_out(datasets: Sequence[Dataset], patterns: Sequence[str], *, key: str) -> list[Dataset]:
    """Take the shards that `patterns` name out of what is trained on.

    Raises:
        UserError: a pattern matches nothing, or a dataset has nothing left.
    """
    if not patterns:
        return list(datasets)
    names = {name for dataset in datasets for name in dataset.shards}
    chosen = set(select_names(sorted(names), patterns, key=key))
    for dataset in datasets:
        if chosen.issuperset(dataset.shards):
            raise UserError(f"{key} {list(patterns)} leaves nothing to train on of {dataset.leading}")
    return [
        replace(
            dataset,
            shards=[name for name in dataset.shards if name not in chosen],
            validation_shards=[name for name in dataset.shards if name in chosen],
        )
        for dataset in datasets
    ]


def _without_prior(missing: str, run: str, table_name: str, *, recipe: Path, key: str) -> MissingFileError:
    """Return what is said of a run without features of prior images, which the model has to draw first."""
    draw = typed_command("sample", {"recipe": recipe, "stage": table_name, "run": run, "prompt": "…", "n": 200})
    drawn = f"{run}/samples/{table_name}-prompt/samples.parquet"
    read = typed_command("features", {"stage": table_name, "run": run, "shards": drawn})
    return MissingFileError(
        f"{key}: there are no prior images, {missing.partition(': ')[0]}: let the model that the stage starts from "
        f"draw them, with its weights as sampling.checkpoint: `{draw}`; then `{read}`"
    )


def _unused_shards(command: Command, datasets: Sequence[Dataset], *, table: FeatureTable) -> list[str]:
    own = [dataset for dataset in datasets if dataset.run == str(command.run)]
    if not own:
        return []
    named = select_names(sorted(own[0].leading.manifest.shards), table.shards, key="features.shards")
    used = {name for dataset in own for name in [*dataset.shards, *dataset.validation_shards]}
    return [name for name in named if name not in used]


def _open(run: str, relative: Path, *, command: str, cache: ShardCache) -> FeatureDirectory:
    location = f"{run}/{relative.as_posix()}"
    if not is_remote(location) and not Path(location).is_dir():
        raise MissingFileError(f"{location} does not exist: features have not been made; run `{command}` first")
    return open_directory(location, cache)


def _open_family(run: str, family: str, table: FeatureTable, *, command: str, cache: ShardCache) -> FeatureDirectory:
    """Open a family beside text and latents: of the images at this resolution, or of no resolution."""
    try:
        folder = image_directory(Path(), family, table.resolution, variant=table.image_variant)
        return _open(run, folder, command=command, cache=cache)
    except MissingFileError as missing:
        try:
            return _open(run, family_directory(Path(), family), command=command, cache=cache)
        except MissingFileError:
            raise missing from None


def _ways_on(key: str, found: Any, command: str) -> str:
    """Return how to read features that are there, and how to make them anew."""
    keep = f"leave {key} out" if found is None else f"set {key} = {json.dumps(found)}"
    return f"to read what is there, {keep}; to make it anew, `{command}`, with another run to keep both"


def _check_leading(leading: FeatureDirectory, *, table: FeatureTable, table_name: str, command: str) -> None:
    """Refuse latents, or crops of images, that were made otherwise than the recipe says."""
    wanted = {
        "resolution": (table.resolution, leading.fact("resolution")),
        "buckets": (table.buckets, leading.manifest.fingerprint.fields.get("buckets", False)),
    }
    if not table.has_pixels:
        vae = leading.fact("vae")
        wanted |= {
            "vae_model": (table.vae_model, vae.get("model")),
            "vae_revision": (table.vae_revision, vae.get("revision")),
        }
    for name, (expected, found) in wanted.items():
        mend = _ways_on(f"features.{table_name}.{name}", found, command)
        require_same(name, expected, found, where=str(leading), mend=mend)


def _check_family(
    directory: FeatureDirectory,
    family: str,
    settings: Mapping[str, Any],
    *,
    leading: FeatureDirectory,
    table_name: str,
    command: str,
) -> None:
    """Refuse a family that is not what the recipe asks for, or is made of images otherwise than the leading one is."""
    extra, where = directory.manifest.extra, str(directory)
    anew = f"`{command}` makes it anew"
    require_same("family", family, directory.family.name, where=where, mend=anew)
    for name in {"resolution", "buckets"} & extra.keys():
        require_same(name, leading.manifest.extra.get(name), extra[name], where=where, mend=anew)
    if "vae" in extra:
        for name in ("model", "revision"):
            require_same(
                f"vae_{name}", leading.fact("vae").get(name), directory.fact("vae").get(name), where=where, mend=anew
            )
    # Of its settings, those that decide numbers.
    found, defaults = extra.get("settings", {}), extra.get("defaults", {})
    for name in sorted(found):
        wanted = settings.get(name, defaults.get(name))
        mend = _ways_on(f"features.{table_name}.families.{family}.{name}", found[name], command)
        require_same(f"families.{family}.{name}", wanted, found[name], where=where, mend=mend)
    # A model decides by its weights, and is named as those of text and latents are.
    drew = extra.get("control", {}).get("settings", {})
    for name in {"model", "revision"} & drew.keys() & settings.keys():
        mend = _ways_on(f"features.{table_name}.families.{family}.{name}", drew[name], command)
        require_same(f"families.{family}.{name}", settings[name], drew[name], where=where, mend=mend)


def _check_text(directory: FeatureDirectory, *, table: FeatureTable, run: str, table_name: str, command: str) -> None:
    manifest, where = directory.manifest, str(directory)
    encoder = directory.fact("text")
    wanted = {
        "text_model": (table.text_model, encoder["model"]),
        "text_revision": (table.text_revision, encoder["revision"]),
        "text_storage": (table.text_storage, encoder.get("storage", "bfloat16")),
        "text_cleaning": (table.text_cleaning, encoder.get("cleaning", DEFAULT_CLEANING)),
    }
    if "captions" in manifest.extra:
        # A weight that is an expression is of the choice.
        captions = [caption.model_dump(exclude_none=True) for caption in table.captions]
        number_of = {each["column"]: each["weight"] for each in directory.fact("captions")}
        for caption in captions:
            if isinstance(caption["weight"], str):
                caption["weight"] = number_of.get(caption["column"])
        wanted["captions"] = (captions, directory.fact("captions"))
    if table.max_tokens is not None:
        wanted["max_tokens"] = (table.max_tokens, encoder["max_tokens"])
    for name, (expected, found) in wanted.items():
        mend = _ways_on(f"features.{table_name}.{name}", found, command)
        require_same(name, expected, found, where=where, mend=mend)
    # Imported features were made of no captions of this run.
    is_made_here = "captions" in manifest.upstream and not is_remote(run)
    columns = [caption.column for caption in table.captions]
    if is_made_here and (captions := RunCaptions(Path(run)).texts_digest(columns)) is not None:
        mend = f"the captions of {run} have changed since: `{command}` encodes them; to keep both, name another run"
        require_same("captions", captions, manifest.upstream["captions"], where=where, mend=mend)
