"""Micro-batches that have shapes and no values: what operations and memory of a step are counted with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pixart.model import PackedText
from training.data.batch import Batch
from training.data.former import FORMER_LATENTS


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """Shape of a sample.

    Attributes:
        channels, height, width: of its latents.
        num_text_tokens: of its caption.
        text_width: of a token; None where there are class labels and no texts.
        former_channels: of the latents of a former VAE beside them; None where there are none.
    """

    channels: int
    height: int
    width: int
    num_text_tokens: int
    text_width: int | None
    former_channels: int | None = None


def blank_batch(shape: SampleShape, num_samples: int, *, device: torch.device) -> Batch:
    """Return a micro-batch of equal samples on `device`, or on torch's `meta`, which keeps no values."""

    def blank(*sides: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(sides, dtype=dtype, device=device)

    latents = (num_samples, shape.channels, shape.height, shape.width)
    former = {}
    if shape.former_channels is not None:
        sides = (num_samples, shape.former_channels, shape.height, shape.width)
        former = {f"{FORMER_LATENTS}.{name}": blank(*sides, dtype=torch.float16) for name in ("mean", "std")}
    text = None
    if shape.text_width is not None:
        values = blank(num_samples * shape.num_text_tokens, shape.text_width, dtype=torch.bfloat16)
        offsets = torch.arange(num_samples + 1, dtype=torch.int32, device=device) * shape.num_text_tokens
        text = PackedText(values, offsets, shape.num_text_tokens)
    return Batch(
        step=0,
        bucket="",
        keys=[""] * num_samples,
        shards=[""] * num_samples,
        mean=blank(*latents, dtype=torch.float16),
        std=blank(*latents, dtype=torch.float16),
        posterior_noise=blank(*latents),
        noise=blank(*latents),
        timestep_draws=blank(num_samples, dtype=torch.float64),
        is_dropped=blank(num_samples, dtype=torch.bool),
        is_prior=blank(num_samples, dtype=torch.bool),
        size=blank(num_samples, 3),
        text=text,
        labels=blank(num_samples, dtype=torch.int64) if shape.text_width is None else None,
        tensors=former,
    )
