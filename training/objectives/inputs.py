"""What a batch's features become before a network sees them."""

# B batch, C latent channels, h x w latent size

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixart.control import Control
from pixart.reuse import BlockRecord
from training.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class NetworkInputs:
    """Latents, and the condition beside them: a class or a caption.

    Attributes:
        scaling_factor, shift_factor: of the VAE; a network sees (latent - shift) * scale.
        null_label: class label of the null condition; None where the condition is text.
        control: family of features that leads a network with a control branch; None where none does.
        dtype: compute precision of the networks.
    """

    scaling_factor: float
    shift_factor: float
    null_label: int | None
    dtype: torch.dtype
    control: str | None = None

    @property
    def families(self) -> tuple[str, ...]:
        """Families of features that are read."""
        condition = "text" if self.null_label is None else "labels"
        return ("latents", condition) if self.control is None else ("latents", condition, self.control)

    def latents(self, batch: Batch) -> Tensor:
        """Return a sample of the VAE's posterior, drawn anew each time a latent is seen, fp32 [B, C, h, w]."""
        return self._scaled(batch.draw_latents())

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
            # A teacher beside what is led may have no branch.
            led = {} if self.control is None or network.control is None else {"control": self._control(batch)}
            return network(noisy, times, text, size=size, **told, **led, **watch)
        assert batch.labels is not None
        return network(noisy, times, batch.labels.masked_fill(batch.is_dropped, self.null_label), **watch)

    def _control(self, batch: Batch) -> Control:
        """Return what leads a network: the mean of the posterior, as a map has no part that is left open."""
        return Control(self._scaled(batch.tensors[f"{self.control}.mean"].float()).to(self.dtype))

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.shift_factor) * self.scaling_factor
