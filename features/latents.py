"""The latent family: images of the raw tars to VAE latents in `features/latent-<resolution>/<shard>.tar`.

Other families that are made of the images, such as the edges that a control branch is shown (`features/control.py`), go
through the same codec with the same crops: a subclass of `LatentWorker` says what it makes of an image, and `image_job`
describes its job.
"""

# B batch, C latent channels, H W pixels, h w latent height and width

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from encoders.latents import LatentSpec
from encoders.opening import latent_spec
from encoders.weights import resolve_model
from features.config import DECIDES_IMAGES
from features.jobs import (
    FamilyPlan,
    FeatureFamily,
    FeatureInputs,
    FeatureJob,
    bucket_sizes,
    codec_of,
    count_samples,
    member_bytes,
)
from features.latent_worker import NUM_SOFT, LatentWorker, LatentWorkerConfig
from features.speed import count_workers
from pipelines.engine.cluster import is_cluster
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SOFT_SCALE
from pipelines.recipe import ModelConfig, TableConfig
from pipelines.store.families import FamilySchema, image_directory, latent_schema
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory

log = get_logger("features")

# Raised when a change of code changes what is made of unchanged images; 3: pictures have the colours a browser shows.
CODE_VERSION = 3

DEFAULT_PATCH_SIZE = ModelConfig.fingerprint_defaults()["patch_size"]
# What the fingerprint had before defaults were left out of it. Keys that came later have no place here.
WRITTEN_OUT = ("buckets", "vae_dtype", "dialect", "max_pixels")
# A GPU encodes so many in about five minutes; compiling takes half of one, and saves a fifth.
LONG_RUN_PIXELS = 20_000_000_000
SUSPICIOUS_PSNR_DB = 20.0  # reconstructions of the right VAE have 25 dB and more


def latent_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the encoding of the stage's images."""
    return image_job(inputs, LATENTS)


def image_job(
    inputs: FeatureInputs,
    family: FeatureFamily,
    *,
    worker_class: type[LatentWorker] = LatentWorker,
    also_decided_by: Mapping[str, Any] = {},
) -> FeatureJob:
    """Describe what a latent worker makes of the stage's images, in `features/<family>-<resolution>`.

    Latents themselves lie in `features/latent-<resolution>`. A family's settings are part of its fingerprint, as is
    what else decides it, such as the identity of a model of its own.
    """
    leads, settings = family is LATENTS, family.read_settings(inputs)
    features = inputs.features
    model = resolve_model(features.vae_model, features.vae_revision)
    if latent_spec(model) is not None:
        codec_of(model, inputs)
    name = "latent" if leads else family.name
    output = ShardDirectory(image_directory(inputs.run, name, features.resolution, variant=features.image_variant))
    fields, defaults = _decided(inputs, family, settings=settings)
    fields |= {"vae_model": model.identity, **also_decided_by}
    job = FeatureJob(
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
            # Of all samples, done or not: a resumed run rounds as the first one did.
            is_long_run=count_samples(inputs.raw) * features.resolution**2 >= LONG_RUN_PIXELS,
            device=features.device,
            num_threads=inputs.num_threads,
            decode_threads=features.decode_threads,
            num_workers_here=None,
            resolution=features.resolution,
            is_bucketed=features.buckets,
            max_upscale=features.max_upscale,
            patch_size=inputs.patch_size,
            reading=inputs.data.reading,
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
        dtype=features.vae_dtype,
        choice=inputs.choice,
        dtype_key="features.vae_dtype",
        memory_settings={
            "features.vae_batch_size": features.vae_batch_size or "null (32 on a CPU, by pixels on a GPU)",
            f"features.{inputs.stage_name}.resolution": features.resolution,
            "features.decode_threads": features.decode_threads or "null (CPU cores per worker, at most 16)",
            "data.max_pixels": inputs.data.max_pixels,
        },
    )
    return _with_neighbours(job, inputs)


def _decided(
    inputs: FeatureInputs, family: FeatureFamily, *, settings: TableConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that decide a family's numbers, for its fingerprint, and what those left out are."""
    features = inputs.features
    fields = {
        "family": family.name,
        "code_version": CODE_VERSION,
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
    return fields, defaults


def _with_neighbours(job: FeatureJob, inputs: FeatureInputs) -> FeatureJob:
    """Return the job with workers that know how many they are on this machine; those of a cluster cannot know."""
    # Counting GPUs takes torch: who has nothing to do needs none.
    if is_cluster() or not job.pending():
        return job
    num_workers = count_workers(inputs, count_samples(inputs.raw))
    return replace(job, worker_config=replace(job.worker_config, num_workers_here=num_workers))


def plan_images(job: FeatureJob, inputs: FeatureInputs) -> FamilyPlan:
    """Return what a job of `image_job` will take."""
    spec = codec_of(job.encoder, inputs)
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
    spec = latent_spec(job.encoder)
    assert spec is not None, f"{job.encoder.location} has been loaded, but its config.json is not in the cache"
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
    """Say how well the codec gives the images of the preview back, and how many images were too small."""
    soft = {name: report.details.get(NUM_SOFT, 0) for name, report in manifest.shards.items()}
    if num_soft := sum(soft.values()):
        first = next(name for name, number in soft.items() if number)
        log.warning(
            f"{job.output.path}: {num_soft:,} images were scaled up by more than {SOFT_SCALE - 1:.0%}, {soft[first]:,} "
            f"of them in {first}: they are too small for {inputs.features.resolution} pixels and look soft; "
            f"features.max_upscale = {SOFT_SCALE} makes them rejects"
        )
    path = job.worker_config.preview_path
    psnr_db = manifest.shards[job.sources[0].name].details.get("preview_psnr_db")
    if psnr_db is None:
        return
    log.info(f"{path}: the VAE reconstructs images with {psnr_db:.1f} dB")
    if psnr_db < SUSPICIOUS_PSNR_DB:
        log.warning(f"{path}: {psnr_db:.1f} dB is too low for the right VAE; look at the picture before training")


LATENTS = FeatureFamily(
    name="latents",
    is_wanted=lambda features: features.latents_from is None and not features.has_pixels,
    job=latent_job,
    plan=lambda inputs: plan_images(latent_job(inputs), inputs),
    schema=image_schema,
    facts=image_facts,
    probe=lambda config, folder: replace(config, preview_shard=""),
    report=report_preview,
)
