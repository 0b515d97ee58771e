"""What one `make features STAGE=…` has to do: a job for each family of features, with its sources and fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pydantic

from encoders.kl import PUBLISHED_VAE
from encoders.latents import LatentSpec, require_whole_patches
from encoders.opening import latent_spec
from encoders.weights import ModelSource
from errors import UserError
from features.choosing import WantedSamples
from features.config import FeaturesConfig, feature_table, table_of_stage
from features.patches import patch_size
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.columns.choices import Choice
from pipelines.command import Command
from pipelines.engine.pieces import ShardWorker, Source
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig
from pipelines.raw.images import aspect_buckets
from pipelines.raw.patterns import select_shards
from pipelines.raw.shards import describe_shards
from pipelines.recipe import DataConfig, TableConfig
from pipelines.store.families import FamilySchema
from pipelines.store.feature_store import TAR_BLOCK_BYTES
from pipelines.store.manifest import MANIFEST_NAME, Fingerprint, Manifest, ShardDirectory, read_manifest

# safetensors header of one tensor and of one more, and a row of the index.
HEADER_BYTES, TENSOR_HEADER_BYTES, INDEX_ROW_BYTES = 128, 64, 64
# The toy world's encoders take so many in about eight seconds, in which Ray's workers would hardly have started.
FEW_SAMPLES = 500

log = get_logger("features")


@dataclass(frozen=True, kw_only=True)
class FeatureInputs:
    """A command's settings, the raw shards that its features table names, and its choice of their samples, if any."""

    run: Path
    stage_name: str
    features: FeaturesConfig
    engine: EngineConfig
    data: DataConfig
    patch_size: int
    raw: list[Source]
    choice: Choice | None = None

    @property
    def num_threads(self) -> int:
        """Threads torch may use in a worker."""
        return max(1, int(self.engine.cpus_per_worker))

    @property
    def few_samples(self) -> int:
        """So many are done in the command's process; none with GPUs, as the work is theirs and they share it."""
        return 0 if self.engine.gpus_per_worker else FEW_SAMPLES


@dataclass(frozen=True, kw_only=True)
class FeatureJob:
    """One family of features to compute; `model_key` and `dtype_key` are the recipe keys of its encoder.

    `model` is None where none makes it; `dtype` is what its values are computed in; `defaults` are what the settings
    are that `fingerprint` leaves out, by name; `memory_settings` what to lower where the memory is too small, as keys
    of the recipe with their values; `choice` says which samples are wanted, None all.
    """

    family: FeatureFamily
    worker_class: type[ShardWorker]
    worker_config: Any
    sources: list[Source]
    output: ShardDirectory
    fingerprint: Fingerprint
    defaults: Mapping[str, Any]
    upstream: dict[str, str]
    model: ModelSource | None
    model_key: str
    dtype: str
    dtype_key: str
    memory_settings: Mapping[str, Any]
    choice: Choice | None = None

    @property
    def encoder(self) -> ModelSource:
        """The model, of a family that one makes."""
        assert self.model is not None, f"no model makes {self.family.name}"
        return self.model

    @cached_property
    def wanted(self) -> WantedSamples:
        """The samples that are wanted of the sources."""
        return WantedSamples(output=self.output, sources=self.sources, fingerprint=self.fingerprint, choice=self.choice)

    def pending(self) -> list[Source]:
        """Return the sources that are not done yet, or lack samples that are wanted."""
        return [
            source
            for source in self.sources
            if source.name in self.wanted.incomplete
            or not self.output.is_done(source.name, source.identity, self.fingerprint)
        ]

    def changed_settings(self) -> list[str]:
        """Return `field: old -> new` of each setting by which what is in `output` differs from this job."""
        return self.output.changes(self.fingerprint, defaults=self.defaults)

    def is_done(self) -> bool:
        """Whether nothing is pending and the manifest is that of these settings."""
        if self.pending() or not (self.output.path / MANIFEST_NAME).is_file():
            return False
        return read_manifest(self.output.path).fingerprint.digest == self.fingerprint.digest


@dataclass(frozen=True, kw_only=True)
class FamilyPlan:
    """One line of the plan; `pending_samples` are what this run would add to `directory`.

    `job` is None as long as what it reads is not there.
    """

    family: str
    directory: Path
    model: str
    num_samples: int
    pending_samples: int
    bytes_per_sample: int
    basis: str
    job: FeatureJob | None

    @property
    def pending_bytes(self) -> int:
        """Bytes this run would write."""
        return self.pending_samples * self.bytes_per_sample


@dataclass(frozen=True, kw_only=True)
class FeatureFamily:
    """How one family of features is made: all that `make features` and its plan know of it.

    Attributes:
        name: as `FamilySchema` has it.
        is_wanted: whether a table of the recipe asks for it.
        job: what is to be computed of it; raises what is wrong with its inputs.
        plan: what that will take, as far as it can be known beforehand.
        schema: what its directory holds; asked for when the job's model is here, as `facts`.
        facts: the numbers later stages read from its manifest, so that no recipe types them a second time.
        probe: its worker's configuration for measuring, which writes into a folder alone.
        settings: its own keys in the recipe, `families.<name>` of a table; those marked `Decides` decide its numbers.
        check: refuses what a pending job is about to read and is not what it should be.
        prepare: repeats what a lost file needs, before a job runs.
        report: says what a finished job should be judged by.
        encodes: whether a worker runs its model; what is imported needs none, nor a GPU.
    """

    name: str
    is_wanted: Callable[[FeaturesConfig], bool]
    job: Callable[[FeatureInputs], FeatureJob]
    plan: Callable[[FeatureInputs], FamilyPlan]
    schema: Callable[[FeatureJob, FeatureInputs], FamilySchema]
    facts: Callable[[FeatureJob, FeatureInputs], Mapping[str, Any]]
    probe: Callable[[Any, Path], Any]
    settings: type[TableConfig] = TableConfig
    check: Callable[[FeatureJob, FeatureInputs], None] = lambda job, inputs: None
    prepare: Callable[[FeatureJob, FeatureInputs], None] = lambda job, inputs: None
    report: Callable[[FeatureJob, Manifest, FeatureInputs], None] = lambda job, manifest, inputs: None
    encodes: bool = True

    def read_settings(self, inputs: FeatureInputs) -> TableConfig:
        """Return its own keys of the recipe.

        Raises:
            UserError: one is unknown or wrong; names it.
        """
        try:
            return self.settings.model_validate(inputs.features.families.get(self.name, {}))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, ("features", inputs.stage_name, "families", self.name, *first["loc"])))
            raise UserError(f"{key} = {first['input']!r}: {first['msg']}") from None

    def manifest_extra(self, job: FeatureJob, inputs: FeatureInputs) -> dict[str, Any]:
        """Return what its manifest says beyond the counts: the record of its family, its settings, and its facts.

        `defaults` are for training, which knows none of them and compares what it was begun with.
        """
        settings = self.settings.fingerprint_defaults() | self.read_settings(inputs).fingerprint_fields()
        return {
            "family": self.schema(job, inputs).spec(),
            "defaults": dict(job.defaults),
            **({"settings": settings} if self.settings.model_fields else {}),
            **self.facts(job, inputs),
        }


def member_bytes(payload_bytes: int, *, num_tensors: int, num_rows: int) -> int:
    """Return the bytes a sample takes in tar and index: its payloads, and what goes around them."""
    content_bytes = HEADER_BYTES + TENSOR_HEADER_BYTES * (num_tensors - 1) + payload_bytes
    padded = -(-content_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    return TAR_BLOCK_BYTES + padded + num_rows * INDEX_ROW_BYTES


def count_samples(sources: Sequence[Source]) -> int:
    """Return the samples of all sources."""
    return sum(source.num_samples for source in sources)


def read_inputs(command: Command) -> FeatureInputs:
    """Validate the recipe's tables and describe the raw shards of the stage.

    Raises:
        UserError, MissingFileError: a key is wrong, a shard pattern matches nothing, or a column of the choice is not
            there for some shard; names it.
    """
    name = table_of_stage(command.recipe, command.stage_name)
    features = feature_table(command.recipe, name)
    if name != command.stage_name:
        log.info(f"training.{command.stage_name} reads the features of [features.{name}]")
    data = command.recipe.table("data", DataConfig)
    key = f"features.{name}.shards"
    origin = command.recipe.blame(f"features.{name}", "shards")
    paths = select_shards(command.raw_shards, features.shards, key=f"{origin}: {key}")
    settings = ChoiceSettings.of(name, features.model_dump())
    raw = [shard.source for shard in describe_shards(paths, data.reading, run=command.run)]
    choice = None if settings is None else Choice(command.run, settings)
    if choice is not None:
        choice.check([source.name for source in raw])
    return FeatureInputs(
        run=command.run,
        stage_name=name,
        features=features,
        engine=command.recipe.table("engine", EngineConfig),
        data=data,
        patch_size=patch_size(command, name),
        raw=raw,
        choice=choice,
    )


def codec_of(model: ModelSource, inputs: FeatureInputs) -> LatentSpec:
    """Return the spec of the stage's codec; one of the hub that is not in the cache yet is taken for the paper's.

    Raises:
        UserError: the resolution is not a whole number of patches of its latents; names both.
    """
    spec = latent_spec(model) or PUBLISHED_VAE
    key = f"features.{inputs.stage_name}.resolution"
    require_whole_patches(inputs.features.resolution, spec, patch_size=inputs.patch_size, key=key)
    return spec


def bucket_sizes(inputs: FeatureInputs, codec: LatentSpec) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) in pixels that images of the stage are cut to."""
    resolution = inputs.features.resolution
    if not inputs.features.buckets:
        return ((resolution, resolution),)
    return aspect_buckets(resolution, multiple=codec.factor * inputs.patch_size)
