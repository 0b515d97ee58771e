"""What a checkpoint's codec makes of the stage's own images: scale and shift of its latents, and each channel's."""

# B images, C latent channels, H x W pixels, h w latent size

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.weights import resolve_model
from pipelines.store.families import PIXELS
from pipelines.store.files import atomic_write_json
from training.codec.autoencoder import Autoencoder
from training.codec.files import CONFIG, load_codec, scaling_of
from training.data.datasets import Dataset
from training.data.index import FeatureIndex
from training.objectives.reconstruction import levels
from training.stages.stage import TrainingJob

STATISTICS = "latent_statistics.json"
# Images are taken from so many shards at most, and encoded so many at a time.
MAX_SHARDS, BATCH_SIZE = 16, 8


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Of latents as they are drawn: mean and deviation of all values, and of those of each channel, [C]."""

    num_images: int
    mean: float
    std: float
    channel_mean: list[float]
    channel_std: list[float]


@torch.no_grad()
def measure_latents(network: Autoencoder, images: Iterator[Tensor]) -> LatentStatistics:
    """Return the statistics of latents of images, uint8 [B, 3, H, W] on any device.

    What the posterior leaves open is reckoned with, and nothing is drawn.
    """
    device = next(network.parameters()).device
    count, num_images = 0, 0
    channels = network.config.latent_channels
    sums, squares = torch.zeros(2, channels, dtype=torch.float64, device=device)
    for batch in images:
        mean, log_variance = (each.double() for each in network.moments(levels(batch.to(device))))
        sums += mean.sum((0, 2, 3))
        squares += (mean.square() + log_variance.exp()).sum((0, 2, 3))
        count += mean[:, 0].numel()
        num_images += len(batch)
    means = sums / count
    deviations = (squares / count - means.square()).sqrt()
    whole = float(means.mean())
    return LatentStatistics(
        num_images=num_images,
        mean=whole,
        std=math.sqrt(float(squares.sum()) / (count * channels) - whole**2),
        channel_mean=means.tolist(),
        channel_std=deviations.tolist(),
    )


def stage_crops(datasets: Sequence[Dataset], num_images: int) -> Iterator[Tensor]:
    """Yield crops of a stage, uint8 [B, 3, H, W], the same every time: the first of some shards, so many in all."""
    index = FeatureIndex(datasets)
    shards = range(0, len(index), -(-len(index) // MAX_SHARDS))
    num_left = num_images
    for place, number in enumerate(shards):
        shard = index.open(number)
        try:
            tar, rows = shard.tars[PIXELS], shard.table.families[PIXELS]
            # What a shard lacks the next ones give.
            num_taken = min(len(rows.numbers), -(-num_left // (len(shards) - place)))
            num_left -= num_taken
            yield from _stacked(tar, rows.columns, rows.numbers[:num_taken])
        finally:
            shard.close()


def _stacked(tar: Any, columns: Sequence[str], numbers: Any) -> Iterator[Tensor]:
    """Yield crops of one size together."""
    waiting: list[Tensor] = []
    for row in (dict(zip(columns, each, strict=True)) for each in numbers.tolist()):
        shape = row["channels"], row["height"], row["width"]
        start = row["pixels_offset"]
        crop = torch.from_numpy(tar[start : start + math.prod(shape)].copy()).view(shape)
        if waiting and (waiting[0].shape != crop.shape or len(waiting) == BATCH_SIZE):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(crop)
    if waiting:
        yield torch.stack(waiting)


def write_statistics(job: TrainingJob, folder: Path, *, device: torch.device) -> dict[str, Any]:
    """Measure the codec in a folder, write what its latents are scaled by into its config, and all else beside it.

    A config that says it already keeps that: its latents are those of the weights that the stage started from.

    Returns what `trainer.json` says of the codec, as manifests of features do.
    """
    settings = job.settings.reconstruction
    network = load_codec(resolve_model(str(folder)), key=str(folder)).to(device).eval()
    measured = measure_latents(network, stage_crops(job.features.datasets, settings.num_statistics_samples))
    config = network.config
    if "scaling_factor" in config.diffusers:
        scaled = scaling_of(config)
    else:
        scaled = {"scaling_factor": round(1 / measured.std, 6)}
        scaled |= {"shift_factor": round(measured.mean, 6)} if settings.writes_shift else {}
        atomic_write_json(folder / CONFIG, dict(config.diffusers) | scaled)
    atomic_write_json(folder / STATISTICS, asdict(measured))
    return {"vae": {"channels": config.latent_channels, "factor": config.factor, "has_std": True, **scaled}}
