"""The codec of the paper: a VAE whose latents are normal distributions (LDM, arXiv 2112.10752), diffusers' class."""

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

# What diffusers assumes for a config without these keys, as older VAEs have.
CONFIG_DEFAULTS = {"scaling_factor": 0.18215, "shift_factor": None, "latent_channels": 4, "block_out_channels": (64,)}
# The VAE of the paper, for planning before it is downloaded.
PUBLISHED_VAE = LatentSpec(channels=4, factor=8, scale=0.18215, shift=0.0, has_std=True, identity="")


@dataclass
class KLCodec:
    """An `AutoencoderKL`, see `LatentCodec`."""

    class_name: ClassVar[str] = "AutoencoderKL"

    spec: LatentSpec
    model: Any

    @staticmethod
    def read_spec(config: Mapping[str, Any], *, identity: str) -> LatentSpec:
        """Return the spec of an `AutoencoderKL` with this `config.json`."""
        config = CONFIG_DEFAULTS | dict(config)
        return LatentSpec(
            channels=config["latent_channels"],
            factor=2 ** (len(config["block_out_channels"]) - 1),
            scale=config["scaling_factor"],
            shift=config["shift_factor"] or 0.0,
            has_std=True,
            identity=identity,
        )

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype) -> Any:
        """Load the weights of an `AutoencoderKL`, on the CPU.

        Raises:
            ValueError: the checkpoint lacks weights of the VAE.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        loaded: Any = AutoencoderKL.from_pretrained(
            source.location,
            revision=source.revision,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        model, loading = loaded
        require_complete(loading, f"{source.location} does not hold the weights of an AutoencoderKL")
        return model

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the latents [B, C, h, w]."""
        import torch

        with torch.inference_mode():
            distribution = self.model.encode(to_model_input(images, self.model)).latent_dist
        return distribution.mean.float().cpu(), distribution.std.float().cpu()

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Return one image per latent of [B, C, h, w]."""
        import torch

        with torch.inference_mode():
            pixels = self.model.decode(latents.to(self.model.device, self.model.dtype)).sample  # [B, 3, H, W]
        return to_images(pixels)
