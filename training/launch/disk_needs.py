"""What a stage writes to the disk, and whether it is there."""

import shutil

from errors import UserError
from pipelines.store.checkpoints import checkpoint_folders
from training.config import StageTraining
from training.stages.stage import TrainingJob
from training.stages.weights import WeightCounts

GIGABYTE = 1e9


def require_disk(job: TrainingJob, weights: WeightCounts) -> None:
    """Refuse to start where the checkpoints, and averages that are kept for other lengths, would not fit.

    Raises:
        UserError: says what is free and what is needed.
    """
    settings, kept = job.settings, job.settings.keep_checkpoints
    num_checkpoints = max(1, kept + 1 - len(checkpoint_folders(job.directory)))
    step = 0 if job.resume is None else job.resume.step
    num_averages = num_averages_kept(settings) - num_averages_kept(settings, num_steps=step)
    needed = checkpoint_bytes(settings, weights) * num_checkpoints + averages_bytes(settings, weights) * num_averages
    free = shutil.disk_usage(job.directory).free
    if needed <= free:
        return
    averages = lower = ""
    if num_averages > 0:
        every = settings.ema_snapshot_every
        averages = f" and averages {num_averages:,} times (training.ema_snapshot_every = {every:,})"
        lower = ", raise training.ema_snapshot_every"
    raise UserError(
        f"{job.directory} has {free / GIGABYTE:,.2f} GB free, but {num_checkpoints} more checkpoints "
        f"(training.keep_checkpoints = {kept} and the one being written){averages} need {needed / GIGABYTE:,.2f} GB; "
        f"make room, lower training.keep_checkpoints{lower}, or put RUN on another disk"
    )


def checkpoint_bytes(settings: StageTraining, weights: WeightCounts) -> int:
    """Return the bytes of a checkpoint: weights, masters and moments of what trains, and the average as fp32.

    With the average is the rest of the network, but where adapters or a branch train, and no critic.
    """
    width = 2 if settings.dtype == "bf16" else 4
    averaged = weights.trained - weights.critic
    kept = averaged + (0 if settings.keeps_base else weights.frozen)
    second = (settings.num_averages - 1) * averaged * 4
    return weights.trained * (width + 4 + 8) + kept * 4 + second


def averages_bytes(settings: StageTraining, weights: WeightCounts) -> int:
    """Return the bytes of what is kept of both averages at a time, in fp16."""
    return 2 * settings.num_averages * (weights.trained - weights.critic)


def num_averages_kept(settings: StageTraining, *, num_steps: int | None = None) -> int:
    """Return how many times averages are kept in the first `num_steps` of a stage, null = all of them."""
    if not settings.keeps_averages:
        return 0
    if num_steps is None:
        return -(-settings.num_steps // settings.ema_snapshot_every)
    return num_steps // settings.ema_snapshot_every
