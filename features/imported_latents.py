"""Latents that were made elsewhere: `.npy` files [2C, h, w] of mean and standard deviation, as PixArt has them.

They are unscaled there as they are here. They become the latent family of a table; which codec made them is what the
recipe says of `vae_model`. An image is read for its size alone.
"""

# C latent channels, h w latent height and width

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from encoders.weights import resolve_model
from errors import UserError
from features.config import DECIDES_IMAGES
from features.imported_files import (
    CORRUPT,
    IMPORTED_DTYPE,
    WRONG_SHAPE,
    FeatureFiles,
    FeaturePlaces,
    find_places,
    import_piece,
    imported_sources,
)
from features.jobs import (
    FamilyPlan,
    FeatureFamily,
    FeatureInputs,
    FeatureJob,
    bucket_sizes,
    codec_of,
    count_samples,
)
from features.latents import DEFAULT_PATCH_SIZE, image_facts, latent_bytes
from features.overflow import NON_FINITE_LATENT
from features.writer import SampleToWrite
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard
from pipelines.raw.sizes import measure_image
from pipelines.store.families import latent_directory, latent_schema
from pipelines.store.feature_store import join_shards
from pipelines.store.manifest import Fingerprint, ShardDirectory

# Raised when a change of code changes what is imported of unchanged files.
IMPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LatentImportConfig:
    """What a `LatentImporter` needs; `sizes` are the (height, width) in pixels of the buckets."""

    places: FeaturePlaces
    channels: int
    factor: int
    sizes: tuple[tuple[int, int], ...]
    is_bucketed: bool
    reading: Reading
    max_pixels: int


class LatentImporter:
    """Writes the files of a shard's samples as latents; one tar member per sample kept, one index row each."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: LatentImportConfig) -> None:
        self._config = config
        self._family = latent_schema()

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        config = self._config
        return import_piece(
            piece,
            self._store,
            family=self._family,
            places=config.places,
            reading=config.reading,
            row={"label": None},
        )

    def _store(self, item: SampleToWrite, files: FeatureFiles) -> None:
        raw, sample = item.raw, item.sample
        item.row["label"] = raw.label(sample)
        if item.row["label"] is None and raw.has_labels:
            raise SampleReject("no_label")
        mean, std = read_latent(files.read(sample.key), channels=self._config.channels)  # [C, h, w] each
        height, width = (side * self._config.factor for side in mean.shape[1:])
        if (height, width) not in self._config.sizes:
            raise SampleReject(WRONG_SHAPE, f"{height} x {width} pixels are no bucket")
        item.row.update({"bucket": f"{height}x{width}"} | self._geometry(raw, sample, height, width))
        self._family.write(item.tar, [item.row], [(mean, std)])

    def _geometry(self, raw: RawShard, sample: RawSample, height: int, width: int) -> dict[str, int]:
        """Return sizes and crop of PixArt's extraction; nothing where the image is not there or cannot be read."""
        try:
            original = measure_image(raw, sample, max_pixels=self._config.max_pixels)
        except SampleReject:
            return {}
        resized, corner = (width, height), (0, 0)  # to the size of the bucket, whatever becomes of the aspect ratio
        if not self._config.is_bucketed:
            resized, corner = official_crop(original, height)
        return {
            **dict(zip(("original_width", "original_height"), original, strict=True)),
            **dict(zip(("resized_width", "resized_height"), resized, strict=True)),
            **dict(zip(("crop_x", "crop_y"), corner, strict=True)),
        }


def official_crop(original: tuple[int, int], side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return size (width, height) and corner (x, y) of torchvision's `Resize(side)` and `CenterCrop(side)`."""
    width, height = original
    resized = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    return resized, (round((resized[0] - side) / 2.0), round((resized[1] - side) / 2.0))


def read_latent(data: bytes, *, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation, float16 [channels, h, w] each, of an `.npy` [2 x channels, h, w].

    Raises:
        SampleReject: `corrupt_feature`, `wrong_shape`, or `non_finite_latent`.
    """
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise SampleReject(CORRUPT, str(error)) from None
    if not isinstance(values, np.ndarray):
        raise SampleReject(CORRUPT, "it is no array")
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim != 3 or len(values) != 2 * channels or values.dtype.kind != "f":
        raise SampleReject(WRONG_SHAPE, f"{values.dtype} {values.shape}, not {2 * channels} channels")
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise SampleReject(NON_FINITE_LATENT)
    if (halves[channels:] < 0).any():
        raise SampleReject(CORRUPT, "a standard deviation is below zero, as the logarithm of a variance may be")
    return halves[:channels], halves[channels:]


def imported_latent_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the import of the stage's latents."""
    features, key = inputs.features, f"features.{inputs.stage_name}.latents_from"
    assert features.latents_from is not None
    places = find_places(features.latents_from, suffixes=("npy",), run=inputs.run, key=key)
    model = resolve_model(features.vae_model, features.vae_revision)
    codec = codec_of(model, inputs)
    if not codec.has_std:
        raise UserError(f"{key}: features.vae_model {features.vae_model} has no std, which these files hold")
    output = ShardDirectory(latent_directory(inputs.run, features.resolution, variant=features.image_variant))
    fields = {
        "family": "latents",
        "imported": IMPORT_VERSION,
        "vae_model": model.identity,
        **features.fingerprint_fields(DECIDES_IMAGES),
        **inputs.data.fingerprint_fields(),
    }
    defaults = {
        **features.fingerprint_defaults(DECIDES_IMAGES),
        **inputs.data.fingerprint_defaults(),
        "model.patch_size": DEFAULT_PATCH_SIZE,
    }
    # Which buckets there are.
    if features.buckets and inputs.patch_size != DEFAULT_PATCH_SIZE:
        fields["model.patch_size"] = inputs.patch_size
    return FeatureJob(
        family=IMPORTED_LATENTS,
        worker_class=LatentImporter,
        worker_config=LatentImportConfig(
            places=places,
            channels=codec.channels,
            factor=codec.factor,
            sizes=bucket_sizes(inputs, codec),
            is_bucketed=features.buckets,
            reading=inputs.data.reading,
            max_pixels=inputs.data.max_pixels,
        ),
        sources=imported_sources(places, inputs, key=key),
        output=output,
        fingerprint=Fingerprint.of(fields),
        defaults=defaults,
        upstream={},
        model=model,
        model_key="features.vae_model",
        dtype=IMPORTED_DTYPE,
        choice=inputs.choice,
        dtype_key="features.vae_dtype",
        memory_settings={"engine.samples_per_slice": inputs.engine.samples_per_slice},
    )


def _plan(inputs: FeatureInputs) -> FamilyPlan:
    job, features = imported_latent_job(inputs), inputs.features
    codec = codec_of(job.encoder, inputs)
    return FamilyPlan(
        family="latents",
        directory=job.output.path,
        model=f"imported from {features.latents_from}, of {features.vae_model}",
        num_samples=count_samples(job.sources),
        pending_samples=count_samples(job.pending()),
        bytes_per_sample=latent_bytes(features.resolution**2, codec),
        basis=f"{codec.channels} channels, mean and std fp16",
        job=job,
    )


IMPORTED_LATENTS = FeatureFamily(
    name="latents",
    is_wanted=lambda features: features.latents_from is not None,
    job=imported_latent_job,
    plan=_plan,
    schema=lambda job, inputs: latent_schema(),
    facts=lambda job, inputs: {**image_facts(job, inputs), "imported": True},
    probe=lambda config, folder: config,
    encodes=False,
)
