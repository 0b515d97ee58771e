"""What a batch's features become before a network sees them."""

# B batch, C latent channels, h x w latent size

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixart.reuse import BlockRecord
from training.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class NetworkInputs:
    """Latents, and the condition beside them: a class or a caption.

    Attributes:
        scaling_factor, shift_factor: of the VAE; a network sees (latent - shift) * scale.
        null_label: class label of the null condition; None where the condition is text.
        dtype: compute precision of the networks.
    """

    scaling_factor: float
    shift_factor: float
    null_label: int | None
    dtype: torch.dtype

    @property
    def families(self) -> tuple[str, ...]:
        """Families of features that are read."""
        return ("latents", "text" if self.null_label is None else "labels")

    def latents(self, batch: Batch) -> Tensor:
        """Return a sample of the VAE's posterior, drawn anew each time a latent is seen, fp32 [B, C, h, w]."""
        return (batch.draw_latents() - self.shift_factor) * self.scaling_factor

    def output(
        self,
        network: nn.Module,
        noisy: Tensor,
        times: Tensor,
        *,
        batch: Batch,
        record: BlockRecord | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return what a network says of noisy latents [B, C, h, w] at `times` [B], given the batch's condition.

        `record` takes what is behind some of its blocks. `guidance` [B] is for networks that are told it.
        """
        noisy, watch = noisy.to(self.dtype), {} if record is None else {"reuse": record}
        told = {} if guidance is None else {"guidance": guidance}
        if self.null_label is None:
            assert batch.text is not None
            text = batch.text._replace(values=batch.text.values.to(self.dtype))
            # Whatever wraps a network says what the network says of itself.
            size = batch.size if network.has_size_condition else None
            return network(noisy, times, text, size=size, **told, **watch)
        assert batch.labels is not None
        return network(noisy, times, batch.labels.masked_fill(batch.is_dropped, self.null_label), **watch)
