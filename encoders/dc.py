"""The deep compression autoencoder (DC-AE, arXiv 2410.10733): factor 32 and more, and latents without a deviation."""

# B batch, C latent channels, H W pixels, h w latent height and width

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from encoders.latents import DiffusersCodec, LatentSpec

if TYPE_CHECKING:
    import torch

    from encoders.latents import Latents

# What diffusers assumes for a config without these keys.
CONFIG_DEFAULTS = {"scaling_factor": 1.0, "latent_channels": 32, "encoder_block_out_channels": (128,) * 6}


class DCCodec(DiffusersCodec):
    """An `AutoencoderDC`, see `LatentCodec`."""

    class_name: ClassVar[str] = "AutoencoderDC"

    @staticmethod
    def read_spec(config: Mapping[str, Any], *, identity: str) -> LatentSpec:
        """Return the spec of an `AutoencoderDC` with this `config.json`."""
        config = CONFIG_DEFAULTS | dict(config)
        return LatentSpec(
            channels=config["latent_channels"],
            factor=2 ** (len(config["encoder_block_out_channels"]) - 1),
            scale=config["scaling_factor"],
            shift=0.0,
            has_std=False,
            identity=identity,
        )

    @staticmethod
    def model_class() -> Any:
        """Return diffusers' class."""
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

        return AutoencoderDC

    @property
    def can_tile(self) -> bool:
        """All of them."""
        return True

    def tiled_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what the model decodes [B, C, h, w] to, a tile at a time."""
        from encoders.vae_tiles import dc_pixels

        return dc_pixels(self.model.decoder, latents)

    def moments(self, images: torch.Tensor) -> Latents:
        """Return the latents [B, C, h, w], which have no standard deviation."""
        return self.model.encode(images).latent, None
