"""What a stage will do and need, printed before it starts; and what cannot work, refused before it starts.

The launcher knows the data; weights are counted where torch is loaded anyway, in the ranks or for `--plan`.
"""

import os
import shutil
from dataclasses import dataclass

from pipelines.progress import console
from training.config import StageTraining
from training.data.index import FeatureIndex, Survey, load_survey, save_survey
from training.stage import SURVEY, StageJob

GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """How a stage is spread over this machine."""

    survey: Survey
    num_ranks: int
    threads_per_rank: int

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(map(sum, self.survey.counts))


def inspect_stage(job: StageJob) -> Preflight:
    """Count the samples of a stage and cut its batches.

    Raises:
        ValueError: the batch cannot be cut evenly, or no sample has all its features.
    """
    settings = job.settings
    num_ranks = settings.num_processes or default_num_ranks()
    require_even_batches(settings, num_ranks)
    job.directory.mkdir(parents=True, exist_ok=True)
    return Preflight(
        survey=make_survey(job),
        num_ranks=num_ranks,
        threads_per_rank=settings.threads_per_process or max(1, (os.cpu_count() or 1) // num_ranks),
    )


def require_even_batches(settings: StageTraining, num_ranks: int) -> None:
    """Refuse a batch that ranks and micro-batches cannot share evenly."""
    num_parts = num_ranks * settings.gradient_accumulation_steps
    if settings.global_batch_size % num_parts:
        raise ValueError(
            f"training.global_batch_size {settings.global_batch_size} is not a multiple of {num_parts}: "
            f"{num_ranks} ranks times training.gradient_accumulation_steps {settings.gradient_accumulation_steps}"
        )


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


def print_plan(job: StageJob, preflight: Preflight) -> None:
    """Print what the stage reads and does."""
    settings, survey, num_ranks = job.settings, preflight.survey, preflight.num_ranks
    num_micro_batches = settings.gradient_accumulation_steps
    micro_batch_size = settings.global_batch_size // (num_ranks * num_micro_batches)
    buckets = survey.buckets[0] if len(survey.buckets) == 1 else f"{len(survey.buckets)} buckets"
    num_epochs = settings.num_steps * settings.global_batch_size / preflight.num_samples
    split = f"{num_ranks} ranks x {num_micro_batches} micro-batches x {micro_batch_size}"
    console.print(f"[bold]training {job.command.stage_name}[/] · {job.directory}")
    _print("data", f"{preflight.num_samples:,} samples in {len(survey.shards)} shards, {buckets}")
    _print("steps", f"{settings.num_steps:,} of {settings.global_batch_size:,} = {split}; {num_epochs:,.2f} epochs")
    _print("compute", f"{settings.dtype}, ZeRO {settings.zero_stage}, {preflight.threads_per_rank} CPU threads a rank")
    if job.resume is not None:
        _print("resume", f"after step {job.resume.step:,}, from {job.resume.path}")


def print_weights(job: StageJob, *, num_parameters: int, num_ranks: int) -> None:
    """Print what the stage's weights need."""
    settings = job.settings
    kind = "class-conditional DiT" if job.stage == 1 else "PixArt"
    needed_gigabytes = checkpoint_bytes(settings, num_parameters) / GIGABYTE
    free_gigabytes = shutil.disk_usage(job.directory).free / GIGABYTE
    _print("model", f"{kind}, {num_parameters / 1e6:,.2f}M parameters, from {job.start.folder or 'scratch'}")
    rank_gigabytes = rank_bytes(settings, num_parameters, num_ranks=num_ranks) / GIGABYTE
    _print("memory", f"{rank_gigabytes:,.2f} GB a rank, and activations")
    kept = f"{settings.keep_checkpoints} kept, {free_gigabytes:,.0f} GB free"
    _print("disk", f"{needed_gigabytes:,.2f} GB a checkpoint, {kept}")


def require_disk(job: StageJob, num_parameters: int) -> None:
    """Refuse to start where the checkpoints would not fit.

    Raises:
        ValueError: says what is free and what is needed.
    """
    num_checkpoints = job.settings.keep_checkpoints + 1
    needed = checkpoint_bytes(job.settings, num_parameters) * num_checkpoints
    free = shutil.disk_usage(job.directory).free
    if needed > free:
        raise ValueError(
            f"{job.directory} has {free / GIGABYTE:.2f} GB free, but {num_checkpoints} checkpoints "
            f"(training.keep_checkpoints and the one being written) need {needed / GIGABYTE:.2f} GB"
        )


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


def _print(name: str, line: str) -> None:
    console.print(f"  {name:<9}{line}", markup=False, soft_wrap=True)
