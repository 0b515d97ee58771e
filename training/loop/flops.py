"""Floating point operations of the network, and how much of the device they keep busy (MFU, Chowdhery et al. 2022)."""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from training.data.batch import PackedBatch

# A backward pass multiplies once for the inputs and once for the weights.
FORWARD_PASSES_PER_STEP = 3
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


class StepFlops:
    """Operations that training needs for a sample: those of the mathematics, whatever is computed twice or padded."""

    def __init__(self, config: DiTConfig | PixArtConfig) -> None:
        self._config = config
        with torch.device("meta"):
            self._network = PixArt(config) if isinstance(config, PixArtConfig) else DiT(config)
        self._forward = lru_cache(maxsize=256)(self._count_forward)

    def of_samples(self, num_samples: int, *, height: int, width: int, num_text_tokens: int = 0) -> int:
        """Return the operations of a training step, forward and backward.

        Args:
            num_samples: of latents of height x width.
            num_text_tokens: of all their captions together, without padding; 0 for class labels.
        """
        one, two = self._forward(height, width, 1), self._forward(height, width, 2)
        # Each token of text costs the same: projection, keys, values, and its part of the attention.
        per_token = two - one  # 0 for class labels
        forward = num_samples * (one - per_token) + num_text_tokens * per_token
        return FORWARD_PASSES_PER_STEP * forward

    def of_batch(self, batch: PackedBatch) -> int:
        """Return the operations of a micro-batch."""
        num_samples, _, height, width = batch.mean.shape
        num_text_tokens = 0 if batch.text is None else int(batch.text.lengths.sum())
        return self.of_samples(num_samples, height=height, width=width, num_text_tokens=num_text_tokens)

    def _count_forward(self, height: int, width: int, num_text_tokens: int) -> int:
        config = self._config
        latents = torch.empty(1, config.in_channels, height, width, device="meta")
        timesteps = torch.empty(1, dtype=torch.int64, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if isinstance(config, PixArtConfig):
                size = torch.empty(1, 3, device="meta") if config.has_size_condition else None
                text = torch.empty(1, num_text_tokens, config.caption_channels, device="meta")
                self._network(latents, timesteps, text, size=size)
            else:
                self._network(latents, timesteps, timesteps)
        return counter.get_total_flops()
