"""The family of pixels: crops of the raw images as they are, in `features/pixels-<resolution>/<shard>.tar`.

A codec is trained on them, as a network of latents is on those: crops and buckets are the same, and so plan, reader,
choices and verify. They have no condition, neither a text nor a class, and no model makes them.
"""

# H W pixels

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic

from errors import UserError
from features.config import DECIDES_IMAGES
from features.cropping import Cropping, geometry
from features.jobs import FamilyPlan, FeatureFamily, FeatureInputs, FeatureJob, count_samples, member_bytes
from features.writer import SampleToWrite, write_samples
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.images import aspect_buckets
from pipelines.raw.reading import Reading
from pipelines.recipe import Decides, TableConfig
from pipelines.store.families import PIXELS as NAME
from pipelines.store.families import image_directory, pixel_schema
from pipelines.store.feature_store import join_shards
from pipelines.store.manifest import Fingerprint, ShardDirectory

# Raised when a change of code changes what is made of unchanged images.
CODE_VERSION = 1
CHANNELS = 3


class PixelSettings(TableConfig):
    """Keys of `families.pixels`."""

    multiple: Decides[int] = pydantic.Field(
        default=32, ge=1, le=512, description="Sides of crops are multiples of so many pixels: of the codec's factor"
    )


@dataclass(frozen=True, kw_only=True)
class PixelWorkerConfig:
    """What a `PixelWorker` needs; `run` is where the headers of the raw shards are remembered."""

    cropping: Cropping
    reading: Reading
    run: Path


class PixelWorker:
    """Crops the images of a shard; one tar member per image kept, one index row per sample."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: PixelWorkerConfig) -> None:
        self._config = config
        self._family = pixel_schema()

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        config = self._config
        return write_samples(piece, self._store, family=self._family, reading=config.reading, run=config.run, row={})

    def _store(self, item: SampleToWrite) -> None:
        cut = self._config.cropping.cut(item.raw.image_bytes(item.sample))
        item.row.update(geometry(cut))
        pixels = np.ascontiguousarray(cut.pixels.transpose(2, 0, 1))  # [3, H, W]
        self._family.write(item.tar, [item.row], [(pixels,)])


def pixel_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the cropping of the stage's images.

    Raises:
        UserError: the resolution is no multiple of what sides are multiples of; names both keys.
    """
    features, settings = inputs.features, _settings(inputs)
    output = ShardDirectory(image_directory(inputs.run, NAME, features.resolution, variant=features.image_variant))
    decided = {**features.fingerprint_fields(DECIDES_IMAGES), **inputs.data.fingerprint_fields()}
    defaults = {
        **features.fingerprint_defaults(DECIDES_IMAGES),
        **inputs.data.fingerprint_defaults(),
        **settings.fingerprint_defaults(),
    }
    made_of = {"family": NAME, "code_version": CODE_VERSION, **decided, **settings.fingerprint_fields()}
    return FeatureJob(
        family=CROPS,
        worker_class=PixelWorker,
        worker_config=PixelWorkerConfig(
            cropping=Cropping(
                resolution=features.resolution,
                multiple=settings.multiple if features.buckets else None,
                max_upscale=features.max_upscale,
                max_pixels=inputs.data.max_pixels,
            ),
            reading=inputs.data.reading,
            run=inputs.run.absolute(),
        ),
        sources=inputs.raw,
        output=output,
        fingerprint=Fingerprint.of(made_of),
        defaults=defaults,
        upstream={},
        model=None,
        model_key="",
        dtype="uint8",
        dtype_key="",
        memory_settings={"data.max_pixels": inputs.data.max_pixels},
        choice=inputs.choice,
    )


def _settings(inputs: FeatureInputs) -> PixelSettings:
    settings, resolution = CROPS.read_settings(inputs), inputs.features.resolution
    assert isinstance(settings, PixelSettings)
    if resolution % settings.multiple:
        key = f"features.{inputs.stage_name}"
        raise UserError(
            f"{key}.resolution {resolution} is not a multiple of {key}.families.{NAME}.multiple {settings.multiple}"
        )
    return settings


def _plan(inputs: FeatureInputs) -> FamilyPlan:
    job, features = pixel_job(inputs), inputs.features
    crop = "aspect buckets" if features.buckets else "centre crop"
    return FamilyPlan(
        family=NAME,
        directory=job.output.path,
        model="no model",
        num_samples=count_samples(job.sources),
        pending_samples=count_samples(job.pending()),
        # Every bucket has about the area of the square.
        bytes_per_sample=member_bytes(CHANNELS * features.resolution**2, num_tensors=1, num_rows=1),
        basis=f"{features.resolution} x {features.resolution} pixels, {crop}: uint8",
        job=job,
    )


def _facts(job: FeatureJob, inputs: FeatureInputs) -> dict[str, Any]:
    features, settings = inputs.features, _settings(inputs)
    sizes = ((features.resolution, features.resolution),)
    if features.buckets:
        sizes = aspect_buckets(features.resolution, multiple=settings.multiple)
    return {"resolution": features.resolution, "buckets": [f"{height}x{width}" for height, width in sizes]}


CROPS = FeatureFamily(
    name=NAME,
    is_wanted=lambda features: features.has_pixels,
    job=pixel_job,
    plan=_plan,
    schema=lambda job, inputs: pixel_schema(),
    facts=_facts,
    probe=lambda config, folder: config,
    settings=PixelSettings,
    encodes=False,
)
