"""The denoising objective: what a batch's features become before the model, and the loss of each of its samples."""

# B batch, C latent channels, h x w latent size, L text tokens, D text width

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixart.processes.process import Process, ProcessLoss
from training.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """Predict what a process asks for of noisy latents of a class (stage 1) or a caption (stages 2 and 3).

    Attributes:
        process: what noise does to latents, and the loss.
        scaling_factor, shift_factor: of the VAE; a model sees (latent - shift) * scale.
        null_label: class label of the null condition; None for text.
        dtype: compute precision of the model; losses are fp32.
    """

    process: Process
    scaling_factor: float
    shift_factor: float
    null_label: int | None
    dtype: torch.dtype

    def times(self, batch: Batch) -> Tensor:
        """Return the times that the network is told of a batch's samples [B]."""
        return self.process.times(batch.timestep_draws)

    def loss(self, model: nn.Module, batch: Batch) -> ProcessLoss:
        """Return the process' loss of each sample [B]."""
        times = self.times(batch)
        # the VAE's posterior is sampled anew each time a latent is seen
        latents = batch.draw_latents()  # [B, C, h, w]
        latents = (latents - self.shift_factor) * self.scaling_factor
        noisy = self.process.noisy(latents, batch.noise, times).to(self.dtype)
        if self.null_label is None:
            assert batch.text is not None
            output = model(noisy, times, batch.text.to(self.dtype), batch.text_mask)
        else:
            assert batch.labels is not None
            output = model(noisy, times, batch.labels.masked_fill(batch.is_dropped, self.null_label))
        return self.process.loss(output, latents, batch.noise, times)
