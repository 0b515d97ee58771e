"""The deep compression autoencoder (DC-AE, arXiv 2410.10733): factor 32 and more, and latents without a deviation."""

# B batch, C latent channels, H W pixels, h w latent height and width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from encoders.latents import LatentSpec, to_images, to_model_input
from encoders.weights import ModelSource, require_complete

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass
class DCCodec:
    """An `AutoencoderDC`, see `LatentCodec`."""

    class_name: ClassVar[str] = "AutoencoderDC"

    spec: LatentSpec
    model: Any

    @staticmethod
    def read_spec(config: Mapping[str, Any], *, identity: str) -> LatentSpec:
        """Return the spec of an `AutoencoderDC` with this `config.json`."""
        return LatentSpec(
            channels=config["latent_channels"],
            factor=2 ** (len(config["encoder_block_out_channels"]) - 1),
            scale=config["scaling_factor"],
            shift=0.0,
            has_std=False,
            identity=identity,
        )

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype) -> Any:
        """Load the weights of an `AutoencoderDC`, on the CPU.

        Raises:
            ValueError: the checkpoint lacks weights of the autoencoder.
        """
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

        loaded: Any = AutoencoderDC.from_pretrained(
            source.location,
            revision=source.revision,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        model, loading = loaded
        require_complete(loading, f"{source.location} does not hold the weights of an AutoencoderDC")
        return model

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the latents [B, C, h, w], which have no standard deviation."""
        import torch

        with torch.inference_mode():
            latents = self.model.encode(to_model_input(images, self.model)).latent
        return latents.float().cpu(), None

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Return one image per latent of [B, C, h, w]."""
        import torch

        with torch.inference_mode():
            pixels = self.model.decode(latents.to(self.model.device, self.model.dtype)).sample  # [B, 3, H, W]
        return to_images(pixels)
