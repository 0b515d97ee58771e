"""Noise beyond what a batch brings: of each sample by seed, step and key, in whatever micro-batch it is."""

# B batch, C latent channels, h x w latent size

import zlib

import torch
from torch import Tensor

from training.data.batch import Batch


def more_noise(batch: Batch, name: str, *, seed: int, like: Tensor | None = None) -> Tensor:
    """Return normal numbers like the batch's own noise, or `like` another tensor, fp32 [B, C, h, w] on its device.

    They are others for each `name` and `seed`.
    """
    like = batch.noise if like is None else like
    if like.is_meta:
        return torch.empty_like(like)
    drawn = torch.empty(like.shape, dtype=torch.float32, pin_memory=like.is_cuda)
    for place, (shard, key) in enumerate(zip(batch.shards, batch.keys, strict=True)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {batch.step} {shard} {key} {name}".encode()))
        torch.randn(like.shape[1:], generator=generator, out=drawn[place])
    return drawn.to(like.device, non_blocking=True)
