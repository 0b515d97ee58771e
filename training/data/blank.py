"""Micro-batches that have shapes and no values: what operations and memory of a step are counted with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixart.model import PackedText
from training.data.batch import PIXEL_TENSOR, Batch


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """Shape of a sample.

    Attributes:
        channels, height, width: of its latents.
        num_text_tokens: of its caption.
        text_width: of a token; None where there are class labels and no texts.
        channels_beside: of latents beside them, by what batches call those.
        is_pixels: whether they are no latents, but pixels.
    """

    channels: int
    height: int
    width: int
    num_text_tokens: int
    text_width: int | None
    channels_beside: Mapping[str, int] = field(default_factory=dict)
    is_pixels: bool = False


def blank_batch(shape: SampleShape, num_samples: int, *, device: torch.device, step: int = 0) -> Batch:
    """Return a micro-batch of equal samples on `device`, or on torch's `meta`, which keeps no values."""

    def blank(*sides: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(sides, dtype=dtype, device=device)

    has_labels = shape.text_width is None and not shape.is_pixels
    latents = (num_samples, 0, 0, 0) if shape.is_pixels else (num_samples, shape.channels, shape.height, shape.width)
    beside = {
        f"{family}.{name}": blank(num_samples, channels, shape.height, shape.width, dtype=torch.float16)
        for family, channels in shape.channels_beside.items()
        for name in ("mean", "std")
    }
    if shape.is_pixels:
        sides = (shape.channels, shape.height, shape.width)
        beside[PIXEL_TENSOR] = blank(num_samples, *sides, dtype=torch.uint8)
    text = None
    if shape.text_width is not None:
        values = blank(num_samples * shape.num_text_tokens, shape.text_width, dtype=torch.bfloat16)
        offsets = torch.arange(num_samples + 1, dtype=torch.int32, device=device) * shape.num_text_tokens
        text = PackedText(values, offsets, shape.num_text_tokens)
    return Batch(
        step=step,
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
        labels=blank(num_samples, dtype=torch.int64) if has_labels else None,
        tensors=beside,
    )
