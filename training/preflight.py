"""What a stage will do and need, printed before it starts; and what cannot work, refused before it starts."""

import os
import shutil
from dataclasses import dataclass

from pipelines.progress import console
from training.config import StageTraining
from training.index import FeatureIndex, Survey, load_survey, save_survey
from training.stage import SURVEY, StageJob

GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Sizes of a stage on this machine; bytes are of weights and optimizer alone, activations come on top."""

    survey: Survey
    num_parameters: int
    num_ranks: int
    threads_per_rank: int
    rank_bytes: int
    checkpoint_bytes: int
    free_bytes: int


def inspect_stage(job: StageJob) -> Preflight:
    """Count samples, parameters and bytes of a stage.

    Raises:
        ValueError: the batch cannot be cut evenly; labels or shapes do not fit; the disk has no room for checkpoints.
    """
    from training.networks import count_parameters, network_config

    settings = job.settings
    num_ranks = settings.num_processes or default_num_ranks()
    num_parts = num_ranks * settings.gradient_accumulation_steps
    if settings.global_batch_size % num_parts:
        raise ValueError(
            f"training.global_batch_size {settings.global_batch_size} is not a multiple of {num_parts}: "
            f"{num_ranks} ranks times training.gradient_accumulation_steps {settings.gradient_accumulation_steps}"
        )
    survey = make_survey(job)
    num_parameters = count_parameters(network_config(job, survey))
    job.directory.mkdir(parents=True, exist_ok=True)
    preflight = Preflight(
        survey=survey,
        num_parameters=num_parameters,
        num_ranks=num_ranks,
        threads_per_rank=settings.threads_per_process or max(1, (os.cpu_count() or 1) // num_ranks),
        rank_bytes=rank_bytes(settings, num_parameters, num_ranks=num_ranks),
        checkpoint_bytes=checkpoint_bytes(settings, num_parameters),
        free_bytes=shutil.disk_usage(job.directory).free,
    )
    needed = preflight.checkpoint_bytes * (settings.keep_checkpoints + 1)
    if needed > preflight.free_bytes:
        raise ValueError(
            f"{job.directory} has {preflight.free_bytes / GIGABYTE:.1f} GB free, but {settings.keep_checkpoints + 1} "
            f"checkpoints (training.keep_checkpoints and one being written) need {needed / GIGABYTE:.1f} GB"
        )
    return preflight


def make_survey(job: StageJob) -> Survey:
    """Return the survey of the stage's samples, made once and kept beside its checkpoints."""
    path, identity = job.directory / SURVEY, job.fingerprint.digest
    survey = load_survey(path, identity=identity)
    if survey is None:
        survey = FeatureIndex(job.features.latents, job.features.text, job.features.shards).survey()
        save_survey(survey, path, identity=identity)
    return survey


def default_num_ranks() -> int:
    """One rank per GPU; without a GPU two where there are two cores."""
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def rank_bytes(settings: StageTraining, num_parameters: int, *, num_ranks: int) -> int:
    """Return the bytes of weights, gradients, optimizer and average on one rank, as ZeRO shards them."""
    stage, width = settings.zero_stage, 2 if settings.dtype == "bf16" else 4
    weights = width / (num_ranks if stage >= 3 else 1)
    gradients = width / (num_ranks if stage >= 2 else 1)
    # Adam's two moments and the average; and a master copy unless the model itself is that.
    sharded = 4 * (3 + (0 if stage == 0 and settings.dtype == "fp32" else 1))
    return int(num_parameters * (weights + gradients + sharded / (num_ranks if stage >= 1 else 1)))


def checkpoint_bytes(settings: StageTraining, num_parameters: int) -> int:
    """Return the bytes of a checkpoint: weights, masters, Adam's moments, and the EMA weights as fp32."""
    width = 2 if settings.dtype == "bf16" else 4
    return num_parameters * (width + 4 + 8 + 4)


def print_preflight(job: StageJob, preflight: Preflight) -> None:
    """Print the plan of a stage in a few lines."""
    settings, survey = job.settings, preflight.survey
    num_samples = sum(map(sum, survey.counts))
    num_epochs = settings.num_steps * settings.global_batch_size / num_samples
    num_parts = preflight.num_ranks * settings.gradient_accumulation_steps
    buckets = survey.buckets[0] if len(survey.buckets) == 1 else f"{len(survey.buckets)} buckets"
    kind = "class-conditional DiT" if job.stage == 1 else "PixArt"
    lines = {
        "model": f"{kind}, {preflight.num_parameters / 1e6:,.2f}M parameters, from {job.start.folder or 'scratch'}",
        "data": f"{num_samples:,} samples in {len(survey.shards)} shards, {buckets}",
        "steps": f"{settings.num_steps:,} of {settings.global_batch_size:,} samples = {num_epochs:,.2f} epochs; "
        f"{preflight.num_ranks} ranks x {settings.gradient_accumulation_steps} micro-batches x "
        f"{settings.global_batch_size // num_parts}",
        "precision": f"{settings.dtype} over fp32 masters, ZeRO {settings.zero_stage}, "
        f"{preflight.threads_per_rank} CPU threads a rank",
        "memory": f"{preflight.rank_bytes / GIGABYTE:,.2f} GB a rank, and activations",
        "disk": f"{preflight.checkpoint_bytes / GIGABYTE:,.2f} GB a checkpoint, {settings.keep_checkpoints} kept, "
        f"{preflight.free_bytes / GIGABYTE:,.0f} GB free",
    }
    if job.resume is not None:
        lines["resume"] = f"after step {job.resume.step:,}, from {job.resume.path}"
    console.print(f"[bold]training {job.command.stage_name}[/] · {job.directory}")
    for name, line in lines.items():
        console.print(f"  {name:<10}{line}", markup=False, soft_wrap=True)
