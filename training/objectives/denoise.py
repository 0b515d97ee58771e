"""The denoising objective: what a batch's features become before the model, and the loss of each of its samples."""

# B batch, C latent channels, h x w latent size, L text tokens, D text width

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixart.processes.ddpm import Diffusion, DiffusionLoss
from training.data.batch import Batch

# The noise schedule of DiT and PixArt, in the words of diffusers' schedulers.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """Predict the noise in latents of a class (stage 1) or a caption (stages 2 and 3).

    Attributes:
        diffusion: forward process and hybrid loss.
        scaling_factor, shift_factor: of the VAE; a model sees (latent - shift) * scale.
        null_label: class label of the null condition; None for text.
        dtype: compute precision of the model; losses are fp32.
    """

    diffusion: Diffusion
    scaling_factor: float
    shift_factor: float
    null_label: int | None
    dtype: torch.dtype
    min_snr_gamma: float | None

    def timesteps(self, batch: Batch) -> Tensor:
        """Return the timesteps of a batch's samples, int64 [B]."""
        return (batch.timestep_draws * self.diffusion.num_train_timesteps).long()

    def loss(self, model: nn.Module, batch: Batch) -> DiffusionLoss:
        """Return the hybrid loss of each sample [B] (IDDPM eq. 16)."""
        timesteps = self.timesteps(batch)
        # the VAE's posterior is sampled anew each time a latent is seen
        latents = batch.mean.float() + batch.std.float() * batch.posterior_noise  # [B, C, h, w]
        latents = (latents - self.shift_factor) * self.scaling_factor
        noisy = self.diffusion.q_sample(latents, batch.noise, timesteps).to(self.dtype)
        if self.null_label is None:
            assert batch.text is not None
            output = model(noisy, timesteps, batch.text.to(self.dtype), batch.text_mask)
        else:
            assert batch.labels is not None
            output = model(noisy, timesteps, batch.labels.masked_fill(batch.is_dropped, self.null_label))
        return self.diffusion.loss(output, batch.noise, timesteps, min_snr_gamma=self.min_snr_gamma)
