"""What one `make features STAGE=…` has to do: a text job and a latent job, each with its sources and fingerprint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.opening import latent_spec, text_spec
from encoders.weights import ModelSource, resolve_model
from features.captions import caption_sources, remember_identities, require_unchanged
from features.config import FeaturesConfig, feature_table
from features.latents import LatentWorker, LatentWorkerConfig
from features.text import TextWorker, TextWorkerConfig
from pipelines.command import Command
from pipelines.engine.pieces import ShardWorker, Source, forget_pieces
from pipelines.engine.run import EngineConfig
from pipelines.raw.images import aspect_buckets
from pipelines.raw.shards import describe_shards, recall_shards, select_shards
from pipelines.recipe import DataConfig
from pipelines.store.families import NULL_CAPTION_FILE, latent_directory, text_directory, texts_digest
from pipelines.store.manifest import MANIFEST_NAME, Fingerprint, ShardDirectory, read_manifest

# Raised when a change of code changes the features of unchanged inputs.
CODE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A command's settings, and the raw shards that its features table names."""

    run: Path
    stage_name: str
    features: FeaturesConfig
    engine: EngineConfig
    data: DataConfig
    raw: list[Source]

    @property
    def num_threads(self) -> int:
        """Threads torch may use in a worker."""
        return max(1, int(self.engine.cpus_per_worker))


@dataclass(frozen=True, kw_only=True)
class FeatureJob:
    """One family of features to compute; `model_key` is the recipe key that names its encoder."""

    family: str
    worker_class: type[ShardWorker]
    worker_config: Any
    sources: list[Source]
    output: ShardDirectory
    fingerprint: Fingerprint
    upstream: dict[str, str]
    model: ModelSource
    model_key: str

    def pending(self) -> list[Source]:
        """Return the sources that are not done yet."""
        return [
            source for source in self.sources if not self.output.is_done(source.name, source.identity, self.fingerprint)
        ]

    def changed_settings(self) -> list[str]:
        """Return `field: old -> new` of each setting by which what is in `output` differs from this job."""
        if not (self.output.path / MANIFEST_NAME).is_file():
            return []
        found, wanted = read_manifest(self.output.path).fingerprint.fields, self.fingerprint.fields
        names = sorted(found.keys() | wanted.keys())
        return [
            f"{name}: {found.get(name)} -> {wanted.get(name)}" for name in names if found.get(name) != wanted.get(name)
        ]

    def is_done(self) -> bool:
        """Whether nothing is pending and the manifest is that of these settings."""
        if self.pending() or not (self.output.path / MANIFEST_NAME).is_file():
            return False
        return read_manifest(self.output.path).fingerprint.digest == self.fingerprint.digest


def read_inputs(command: Command) -> Inputs:
    """Validate the recipe's tables and describe the raw shards of the stage.

    Raises:
        ValueError, FileNotFoundError: a key is wrong or a shard pattern matches nothing; names it.
    """
    features = feature_table(command.recipe, command.stage_name)
    data = command.recipe.table("data", DataConfig)
    paths = select_shards(_raw_shards(command, data), features.shards, key=f"features.{command.stage_name}.shards")
    return Inputs(
        run=command.run,
        stage_name=command.stage_name,
        features=features,
        engine=command.recipe.table("engine", EngineConfig),
        data=data,
        raw=[shard.source for shard in describe_shards(paths, dialect=data.dialect, run=command.run)],
    )


def _raw_shards(command: Command, data: DataConfig) -> list[str]:
    """Return the shards that `[data]` names or, if it names none, those that captioning read."""
    try:
        return data.paths(command.run)
    except FileNotFoundError:
        if remembered := recall_shards(command.run):
            return remembered
        raise


def text_job(inputs: Inputs) -> FeatureJob:
    """Describe the encoding of the stage's captions.

    Raises:
        FileNotFoundError: captioning has not finished.
        ValueError: a shard has no captions, they were made from another tar than the one there is now, or lack a
            column.
    """
    features = inputs.features
    columns = features.caption_columns
    captions = read_manifest(inputs.run / "captions")
    output = ShardDirectory(text_directory(inputs.run, columns))
    model = resolve_model(features.text_model, features.text_revision)
    return FeatureJob(
        family="text",
        worker_class=TextWorker,
        worker_config=TextWorkerConfig(
            model=features.text_model,
            revision=features.text_revision,
            dtype=features.text_dtype,
            storage=features.text_storage,
            max_tokens=features.max_tokens,
            batch_tokens=features.text_batch_tokens,
            device=features.device,
            num_threads=inputs.num_threads,
            caption_weights={caption.column: caption.weight for caption in features.captions},
            directory=output.path,
        ),
        sources=caption_sources(inputs.run, inputs.raw, columns, captions=captions, directory=output.path),
        output=output,
        # Batch and slice sizes are left out: they move embeddings by less than bfloat16 resolves.
        fingerprint=Fingerprint.of(
            {
                "family": "text",
                "code_version": CODE_VERSION,
                "text_model": model.identity,
                "text_dtype": features.text_dtype,
                "text_storage": features.text_storage,
                "max_tokens": features.max_tokens,
                "caption_columns": columns,
                "caption_weights": [caption.weight for caption in features.captions],
                "captions": texts_digest(captions),
            }
        ),
        upstream={"captions": texts_digest(captions)},
        model=model,
        model_key="features.text_model",
    )


def latent_job(inputs: Inputs) -> FeatureJob:
    """Describe the encoding of the stage's images."""
    features = inputs.features
    model = resolve_model(features.vae_model, features.vae_revision)
    output = ShardDirectory(latent_directory(inputs.run, features.resolution))
    return FeatureJob(
        family="latents",
        worker_class=LatentWorker,
        worker_config=LatentWorkerConfig(
            model=features.vae_model,
            revision=features.vae_revision,
            dtype=features.vae_dtype,
            batch_size=features.vae_batch_size,
            device=features.device,
            num_threads=inputs.num_threads,
            decode_threads=features.decode_threads,
            resolution=features.resolution,
            is_bucketed=features.buckets,
            dialect=inputs.data.dialect,
            max_pixels=inputs.data.max_pixels,
            run=inputs.run.absolute(),
            preview_shard=inputs.raw[0].name,
            preview_path=output.path / f"preview-{inputs.stage_name}.png",
            num_preview_images=features.num_preview_images,
        ),
        sources=inputs.raw,
        output=output,
        fingerprint=Fingerprint.of(
            {
                "family": "latents",
                "code_version": CODE_VERSION,
                "vae_model": model.identity,
                "vae_dtype": features.vae_dtype,
                "resolution": features.resolution,
                "buckets": features.buckets,
                "dialect": inputs.data.dialect,
                "max_pixels": inputs.data.max_pixels,
            }
        ),
        upstream={},
        model=model,
        model_key="features.vae_model",
    )


def manifest_extra(job: FeatureJob, inputs: Inputs) -> dict[str, Any]:
    """Return the numbers later stages read from the manifest, so that no recipe types them a second time."""
    features = inputs.features
    missing = f"{job.model.location} has been loaded, but its config.json is not in the cache"
    if job.family == "text":
        encoder = text_spec(job.model, max_tokens=features.max_tokens)
        assert encoder is not None, missing
        text = {
            "model": features.text_model,
            "revision": features.text_revision,
            "dtype": features.text_dtype,
            "storage": features.text_storage,
            "max_tokens": encoder.max_tokens,
            "cleaning": encoder.cleaning,
            "d_text": encoder.width,
        }
        return {"text": text, "captions": [caption.model_dump() for caption in features.captions]}
    codec = latent_spec(job.model)
    assert codec is not None, missing
    vae = {
        "model": features.vae_model,
        "revision": features.vae_revision,
        "dtype": features.vae_dtype,
        "channels": codec.channels,
        "factor": codec.factor,
        "has_std": codec.has_std,
        "scaling_factor": codec.scale,
        "shift_factor": codec.shift,
    }
    sizes = aspect_buckets(features.resolution) if features.buckets else ((features.resolution, features.resolution),)
    return {"vae": vae, "resolution": features.resolution, "buckets": [f"{height}x{width}" for height, width in sizes]}


def prepare(job: FeatureJob, inputs: Inputs) -> None:
    """Check what a pending job is about to read, and repeat what a lost file needs.

    Raises:
        ValueError: a caption file is not the one its manifest describes; names it.
    """
    if job.family != "text":
        return
    captions = read_manifest(inputs.run / "captions")
    for source in job.pending():
        require_unchanged(source, captions)
    remember_identities(job.sources, captions=captions, directory=job.output.path)
    if not (job.output.path / NULL_CAPTION_FILE).is_file():
        # The workers write it, so one shard has to be done again, finished parts of it too.
        forget_pieces(job.sources[0].name, job.output)
        job.output.clear_marker(job.sources[0].name)
