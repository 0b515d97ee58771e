"""Floating point operations of an objective, and how much of the device they keep busy (MFU, Chowdhery et al. 2022)."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from encoders.living_bytes import KnownShapes
from training.data.batch import PackedBatch
from training.data.blank import SampleShape, blank_batch
from training.objectives.objective import Objective

META = torch.device("meta")
# Dense bf16 matrix operations of a device in teraflops, from the makers' data sheets, by a part of its name.
PEAK_TERAFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
}


def device_peak_teraflops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a device; None for one that is not known, such as a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TERAFLOPS.items() if part in name), None)


def _convolution_backward_flops(
    gradient: torch.Size, inputs: torch.Size, weight: torch.Size, *settings: Any, out_shape: Any = None
) -> int:
    """Count what torch counts of the backward pass of a convolution, but by groups: each sees its own channels alone.

    Arguments are those of the operator, shapes in place of tensors.
    """
    output_mask = settings[-1]
    forward = 2 * gradient.numel() * weight[1:].numel()
    return forward * sum(output_mask[:2])


class StepFlops:
    """Operations that training needs for a sample: those of the mathematics, whatever is computed twice or padded.

    Counted are the objective's forward passes and what autograd does behind them, so that what is frozen costs no more
    than it does, and a teacher its forward pass.
    """

    def __init__(
        self,
        objective: Objective,
        networks: Mapping[str, nn.Module],
        *,
        in_channels: int,
        text_width: int | None,
        channels_beside: Mapping[str, int] | None = None,
        is_pixels: bool = False,
        last_step: int = 0,
    ) -> None:
        """Take an objective and its networks, all on the meta device; the others are those of `SampleShape`.

        Counted is `last_step`, by which all parts of an objective have begun.
        """
        self._objective = objective
        self._networks = networks
        self._in_channels = in_channels
        self._text_width = text_width
        self._channels_beside = dict(channels_beside or {})
        self._is_pixels, self._last_step = is_pixels, last_step
        self._count = lru_cache(maxsize=256)(self._count_step)

    def of_samples(self, num_samples: int, *, height: int, width: int, num_text_tokens: int = 0) -> int:
        """Return the operations of a training step, forward and backward.

        Args:
            num_samples: of latents of height x width.
            num_text_tokens: of all their captions together, without padding; 0 for class labels.
        """
        one, two = self._count(height, width, 1), self._count(height, width, 2)
        # Each token of text costs the same: projection, keys, values, and its part of the attention.
        per_token = two - one  # 0 for class labels
        return num_samples * (one - per_token) + num_text_tokens * per_token

    def of_batch(self, batch: PackedBatch) -> int:
        """Return the operations of a micro-batch."""
        num_samples, (height, width) = len(batch.keys), batch.sides
        num_text_tokens = 0 if batch.text is None else int(batch.text.lengths.sum())
        return self.of_samples(num_samples, height=height, width=width, num_text_tokens=num_text_tokens)

    def _count_step(self, height: int, width: int, num_text_tokens: int) -> int:
        sample = SampleShape(
            channels=self._in_channels,
            height=height,
            width=width,
            num_text_tokens=num_text_tokens,
            text_width=self._text_width,
            channels_beside=self._channels_beside,
            is_pixels=self._is_pixels,
        )
        # The CPU's fused attention is not among the operations that torch counts.
        mapping = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with sdpa_kernel(SDPBackend.MATH), KnownShapes(), counter:
            losses = self._objective.loss(self._networks, blank_batch(sample, 1, device=META, step=self._last_step))
            losses.minimised.sum().backward()
        return counter.get_total_flops()
