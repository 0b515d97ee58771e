"""The latent family: images of the raw tars to VAE latents in `features/latent-<resolution>/<shard>.tar`.

Other families that are made of the images, such as an edge map for a control branch, go through the same codec with the
same crops: a subclass of `LatentWorker` says what it makes of an image, and `image_job` describes its job.
"""

# B batch, C latent channels, H W pixels, h w latent height and width

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from encoders.batches import Batches
from encoders.devices import choose_device
from encoders.latents import LatentSpec
from encoders.opening import latent_spec, open_codec
from encoders.weights import resolve_model
from features.config import DECIDES_IMAGES
from features.jobs import (
    CODE_VERSION,
    FamilyPlan,
    FeatureFamily,
    FeatureInputs,
    FeatureJob,
    bucket_sizes,
    codec_of,
    count_samples,
    member_bytes,
)
from features.overflow import NON_FINITE_LATENT
from features.preview import write_preview
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject, decode_image, nearest_bucket, resize_and_crop
from pipelines.raw.shards import RawSample, RawShard, open_shard
from pipelines.recipe import ModelConfig, TableConfig
from pipelines.store.families import FamilySchema, image_directory, latent_schema
from pipelines.store.feature_store import FeatureTarWriter, join_shards, write_index
from pipelines.store.files import atomic_file
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory

log = get_logger("features")

DEFAULT_PATCH_SIZE = ModelConfig.fingerprint_defaults()["patch_size"]
# What the fingerprint had before defaults were left out of it. Keys that came later have no place here.
WRITTEN_OUT = ("buckets", "vae_dtype", "dialect", "max_pixels")
SUSPICIOUS_PSNR_DB = 20.0  # reconstructions of the right VAE have 25 dB and more


@dataclass(frozen=True, kw_only=True)
class LatentWorkerConfig:
    """What a `LatentWorker` needs; it writes `preview_path` when it comes by the start of `preview_shard`.

    Attributes:
        family: that it makes; `leads` as `FamilySchema` has it, and `settings` as the family does.
        run: where the headers of the raw shards are remembered.
    """

    family: str
    leads: bool
    settings: TableConfig
    model: str
    revision: str | None
    dtype: str
    batch_size: int
    device: str
    num_threads: int
    decode_threads: int
    resolution: int
    is_bucketed: bool
    patch_size: int
    dialect: str
    max_pixels: int
    run: Path
    preview_shard: str
    preview_path: Path
    num_preview_images: int


@dataclass
class _Picture:
    """An image cropped to its bucket, [H, W, 3] until it is encoded, then its latent: mean and maybe std, [C, h, w].

    Of a reject there is only the index row.
    """

    row: dict[str, Any]
    pixels: np.ndarray | None = None
    latent: tuple[np.ndarray, ...] | None = None


class LatentWorker:
    """Encodes the images of a shard; one tar member per image kept, one index row per sample."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: LatentWorkerConfig) -> None:
        import torch

        torch.set_num_threads(config.num_threads)
        self.config = config
        device = choose_device(config.device, key="features.device")
        self._codec = open_codec(config.model, config.revision, device=device, dtype=config.dtype)
        self._family = latent_schema(has_std=self._codec.spec.has_std, name=config.family, leads=config.leads)
        self._batches = Batches(config.batch_size)
        self._threads = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._wait_seconds = 0.0

    def depict(self, image: np.ndarray) -> np.ndarray:
        """Return the picture that is encoded of a cropped image, both uint8 [H, W, 3]: here the image itself."""
        return image

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        self._wait_seconds, start_seconds = 0.0, time.perf_counter()
        rows: list[dict[str, Any]] = []
        details: dict[str, Any] = {}
        source, run = piece.source, self.config.run
        with (
            open_shard(source.path, self.config.dialect, run=run, identity=source.identity) as raw,
            atomic_file(piece.output(".tar")) as tar_path,
            FeatureTarWriter(tar_path) as tar,
        ):
            for start, stop in piece.slices():
                pictures = self._encode_slice(raw, raw.samples[start:stop])
                rows += [self._store(picture, tar) for picture in pictures]
            if piece.start == 0 and raw.name == self.config.preview_shard:
                details = self._preview(raw)
        with atomic_file(piece.output(".parquet")) as index_path:
            write_index(index_path, rows, self._family.columns)
        rejected = Counter(row["reject"] for row in rows if row.get("reject") is not None)
        return PieceReport(
            num_read=len(rows),
            num_kept=len(rows) - rejected.total(),
            rejected=dict(rejected),
            details=details,
            wait_seconds=self._wait_seconds,
            busy_seconds=time.perf_counter() - start_seconds - self._wait_seconds,
        )

    def _encode_slice(self, raw: RawShard, samples: Sequence[RawSample]) -> list[_Picture]:
        """Return one picture per sample, in order; a batch holds images of one size, and never leaves the slice."""
        pictures: list[_Picture] = []
        waiting: dict[tuple[int, ...], list[_Picture]] = {}
        for picture in self._decode_ahead(raw, samples):
            pictures.append(picture)
            if picture.pixels is None:
                continue
            batch = waiting.setdefault(picture.pixels.shape, [])
            batch.append(picture)
            if len(batch) >= self._batches.size:
                self._encode(waiting.pop(picture.pixels.shape))
        for batch in waiting.values():
            self._encode(batch)
        return pictures

    def _decode_ahead(self, raw: RawShard, samples: Sequence[RawSample]) -> Iterator[_Picture]:
        """Decode in threads, two batches ahead of the device; the tar itself is read by this thread alone."""
        # Some samples of the shard have a class, so the others lack theirs.
        is_labelled = any("cls" in sample.members for sample in raw.samples)
        futures: deque[Future[_Picture]] = deque()
        for sample in samples:
            row = {"key": sample.key, "shard": raw.name, "label": None, "reject": sample.reject}
            data = b""
            if sample.reject is None:
                data = raw.image_bytes(sample)
                row["label"] = raw.label(sample)
                if row["label"] is None and is_labelled:
                    row["reject"] = "no_label"
            futures.append(self._threads.submit(self._prepare, row, data))
            if len(futures) > 2 * self._batches.size:
                yield self._wait(futures.popleft())
        while futures:
            yield self._wait(futures.popleft())

    def _wait(self, future: Future[_Picture]) -> _Picture:
        start_seconds = time.perf_counter()
        picture = future.result()
        self._wait_seconds += time.perf_counter() - start_seconds
        return picture

    def _encode(self, pictures: Sequence[_Picture]) -> None:
        for picture, latent in zip(pictures, self._batches.run(pictures, self._encode_batch), strict=True):
            picture.latent = latent
            picture.pixels = None

    def _encode_batch(self, pictures: Sequence[_Picture]) -> list[tuple[np.ndarray, ...]]:
        import torch

        images = np.stack([picture.pixels for picture in pictures if picture.pixels is not None])  # [B, H, W, 3]
        moments = self._codec.encode(torch.from_numpy(images).permute(0, 3, 1, 2))  # [B, C, h, w]
        arrays = [moment.half().numpy() for moment in moments if moment is not None]
        return list(zip(*arrays, strict=True))

    def _preview(self, raw: RawShard) -> dict[str, Any]:
        """Write originals above their reconstructions; returns the mean PSNR, and nothing if no image is usable."""
        originals: list[np.ndarray] = []
        for picture in self._decode_ahead(raw, raw.samples[: 2 * self.config.num_preview_images]):
            if picture.pixels is not None and len(originals) < self.config.num_preview_images:
                originals.append(picture.pixels)
        psnr_db = write_preview(self.config.preview_path, originals, self._codec)
        return {} if psnr_db is None else {"preview_psnr_db": psnr_db}

    def _prepare(self, row: dict[str, Any], data: bytes) -> _Picture:
        if row["reject"] is not None:
            return _Picture(row)
        resolution, max_pixels = self.config.resolution, self.config.max_pixels
        try:
            image = decode_image(data, max_pixels=max_pixels)
            height, width = resolution, resolution
            if self.config.is_bucketed:
                height, width = nearest_bucket(
                    image.width, image.height, resolution, multiple=self._codec.spec.factor * self.config.patch_size
                )
            cropped, crop = resize_and_crop(image, width, height, max_pixels=max_pixels)
        except SampleReject as reject:
            return _Picture(row | {"reject": reject.reason})
        geometry = {
            "bucket": f"{height}x{width}",
            "original_width": image.width,
            "original_height": image.height,
            "resized_width": crop.resized_width,
            "resized_height": crop.resized_height,
            "crop_x": crop.x,
            "crop_y": crop.y,
        }
        return _Picture(row | geometry, self.depict(np.array(cropped)))

    def _store(self, picture: _Picture, tar: FeatureTarWriter) -> dict[str, Any]:
        """Write one latent; returns its index row."""
        if picture.latent is None:
            return picture.row
        # float16 overflows at 65504, far beyond any sound latent; what does is inf here and rejected like nan.
        if not all(np.isfinite(array).all() for array in picture.latent):
            return picture.row | {"reject": NON_FINITE_LATENT}
        row = dict(picture.row)
        self._family.write(tar, [row], [picture.latent])
        return row


def latent_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the encoding of the stage's images."""
    return image_job(inputs, LATENTS)


def image_job(
    inputs: FeatureInputs,
    family: FeatureFamily,
    *,
    worker_class: type[LatentWorker] = LatentWorker,
) -> FeatureJob:
    """Describe what a latent worker makes of the stage's images, in `features/<family>-<resolution>`.

    Latents themselves lie in `features/latent-<resolution>`. A family's settings are part of its fingerprint.
    """
    leads, settings = family is LATENTS, family.read_settings(inputs)
    features = inputs.features
    model = resolve_model(features.vae_model, features.vae_revision)
    if latent_spec(model) is not None:
        codec_of(model, inputs)
    output = ShardDirectory(image_directory(inputs.run, "latent" if leads else family.name, features.resolution))
    fields = {
        "family": family.name,
        "code_version": CODE_VERSION,
        "vae_model": model.identity,
        **features.fingerprint_fields(DECIDES_IMAGES),
        **inputs.data.fingerprint_fields(),
        **settings.fingerprint_fields(),
    }
    defaults = {
        **features.fingerprint_defaults(DECIDES_IMAGES),
        **inputs.data.fingerprint_defaults(),
        **settings.fingerprint_defaults(),
    }
    # A square crop is the same for patches of any size.
    if features.buckets and inputs.patch_size != DEFAULT_PATCH_SIZE:
        fields["model.patch_size"] = inputs.patch_size
    defaults["model.patch_size"] = DEFAULT_PATCH_SIZE
    return FeatureJob(
        family=family,
        worker_class=worker_class,
        worker_config=LatentWorkerConfig(
            family=family.name,
            leads=leads,
            settings=settings,
            model=features.vae_model,
            revision=features.vae_revision,
            dtype=features.vae_dtype,
            batch_size=features.vae_batch_size,
            device=features.device,
            num_threads=inputs.num_threads,
            decode_threads=features.decode_threads,
            resolution=features.resolution,
            is_bucketed=features.buckets,
            patch_size=inputs.patch_size,
            dialect=inputs.data.dialect,
            max_pixels=inputs.data.max_pixels,
            run=inputs.run.absolute(),
            preview_shard=inputs.raw[0].name,
            preview_path=output.path / f"preview-{inputs.stage_name}.png",
            num_preview_images=features.num_preview_images,
        ),
        sources=inputs.raw,
        output=output,
        fingerprint=output.known_as(Fingerprint.of(fields), defaults={name: defaults[name] for name in WRITTEN_OUT}),
        defaults=defaults,
        upstream={},
        model=model,
        model_key="features.vae_model",
        dtype_key="features.vae_dtype",
        memory_settings={
            "features.vae_batch_size": features.vae_batch_size,
            f"features.{inputs.stage_name}.resolution": features.resolution,
            "data.max_pixels": inputs.data.max_pixels,
        },
    )


def plan_images(job: FeatureJob, inputs: FeatureInputs) -> FamilyPlan:
    """Return what a job of `image_job` will take."""
    spec = codec_of(job.model, inputs)
    resolution = inputs.features.resolution
    tensors = "mean and std" if spec.has_std else "mean"
    crop = "aspect buckets" if inputs.features.buckets else "centre crop"
    return FamilyPlan(
        family=job.family.name,
        directory=job.output.path,
        model=inputs.features.vae_model,
        num_samples=count_samples(job.sources),
        pending_samples=count_samples(job.pending()),
        # Every bucket has about the area of the square.
        bytes_per_sample=latent_bytes(resolution**2, spec),
        basis=f"{resolution} x {resolution} pixels, {crop}: {spec.channels} channels, {tensors} fp16",
        job=job,
    )


def latent_bytes(num_pixels: int, spec: LatentSpec) -> int:
    """Return the bytes one image takes in tar and index: mean and, if the codec has one, std, in fp16."""
    num_tensors = 2 if spec.has_std else 1
    num_values = num_tensors * spec.channels * (num_pixels // spec.factor**2)
    return member_bytes(2 * num_values, num_tensors=num_tensors, num_rows=1)


def image_schema(job: FeatureJob, inputs: FeatureInputs) -> FamilySchema:
    """Return the record of a family that `image_job` makes; of latents, the one that leads."""
    return latent_schema(has_std=_spec(job).has_std, name=job.family.name, leads=job.family is LATENTS)


def _spec(job: FeatureJob) -> LatentSpec:
    spec = latent_spec(job.model)
    assert spec is not None, f"{job.model.location} has been loaded, but its config.json is not in the cache"
    return spec


def image_facts(job: FeatureJob, inputs: FeatureInputs) -> dict[str, Any]:
    """Return what later stages need to know of latents: the codec, and where images were cut."""
    features, codec = inputs.features, _spec(job)
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
    sizes = bucket_sizes(inputs, codec)
    return {"vae": vae, "resolution": features.resolution, "buckets": [f"{height}x{width}" for height, width in sizes]}


def report_preview(job: FeatureJob, manifest: Manifest, inputs: FeatureInputs) -> None:
    """Say how well the codec gives the images of the preview back."""
    path = job.worker_config.preview_path
    psnr_db = manifest.shards[job.sources[0].name].details.get("preview_psnr_db")
    if psnr_db is None:
        return
    log.info(f"{path}: the VAE reconstructs images with {psnr_db:.1f} dB")
    if psnr_db < SUSPICIOUS_PSNR_DB:
        log.warning(f"{path}: {psnr_db:.1f} dB is too low for the right VAE; look at the picture before training")


LATENTS = FeatureFamily(
    name="latents",
    is_wanted=lambda features: True,
    job=latent_job,
    plan=lambda inputs: plan_images(latent_job(inputs), inputs),
    schema=image_schema,
    facts=image_facts,
    probe=lambda config, folder: replace(config, preview_shard=""),
    report=report_preview,
)
