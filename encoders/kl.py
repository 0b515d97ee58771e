"""The codec of the paper: a VAE whose latents are normal distributions (LDM, arXiv 2112.10752), diffusers' class."""

# B batch, C latent channels, H W pixels, h w latent height and width

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from encoders.compilation import compile_modules
from encoders.latents import DiffusersCodec, LatentSpec
from errors import UserError

if TYPE_CHECKING:
    import torch

    from encoders.latents import Latents

# What diffusers assumes for a config without these keys, as older VAEs have.
CONFIG_DEFAULTS = {"scaling_factor": 0.18215, "shift_factor": None, "latent_channels": 4, "block_out_channels": (64,)}
# Means and deviations by channel that some pipelines scale with; PixArt's do not, and neither do we.
UNSUPPORTED = ("latents_mean", "latents_std")
# The VAE of the paper, for planning before it is downloaded.
PUBLISHED_VAE = LatentSpec(channels=4, factor=8, scale=0.18215, shift=0.0, has_std=True, identity="")


class KLCodec(DiffusersCodec):
    """An `AutoencoderKL`, see `LatentCodec`."""

    class_name: ClassVar[str] = "AutoencoderKL"

    @staticmethod
    def read_spec(config: Mapping[str, Any], *, identity: str) -> LatentSpec:
        """Return the spec of an `AutoencoderKL` with this `config.json`; UserError if it scales channel by channel."""
        config = CONFIG_DEFAULTS | dict(config)
        for name in UNSUPPORTED:
            if config.get(name) is not None:
                raise UserError(f"{name} is {config[name]}, but latents are scaled by scaling_factor alone")
        return LatentSpec(
            channels=config["latent_channels"],
            factor=2 ** (len(config["block_out_channels"]) - 1),
            scale=config["scaling_factor"],
            shift=config["shift_factor"] or 0.0,
            has_std=True,
            identity=identity,
        )

    @staticmethod
    def model_class() -> Any:
        """Return diffusers' class."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL

    def moments(self, images: torch.Tensor) -> Latents:
        """Return mean and standard deviation of the latents [B, C, h, w]."""
        distribution = self.model.encode(images).latent_dist
        return distribution.mean, distribution.std

    @property
    def can_tile(self) -> bool:
        """Whether the decoder is made of plain blocks, as all published ones are."""
        from encoders.vae_tiles import can_tile_kl

        return can_tile_kl(self.model.decoder)

    def tiled_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what the model decodes [B, C, h, w] to, a tile at a time."""
        from encoders.vae_tiles import kl_pixels

        model = self.model
        return kl_pixels(model.decoder, latents if model.post_quant_conv is None else model.post_quant_conv(latents))

    def adapt_to_gpu(self) -> None:
        """Compute the attention of wide heads in parts; channels come last in what is compiled, see `_compile_half`."""
        from encoders.vae_attention import widen_attention

        widen_attention(self.model)

    def compile_blocks(self) -> None:
        """Compile the residual blocks of the encoder, one code for all of a shape, and for images of any size."""
        self._compile_half(self.model.encoder)

    def compile_decoder(self) -> None:
        """Compile the residual blocks of the decoder in the same way."""
        self._compile_half(self.model.decoder)

    def _compile_half(self, half: Any) -> None:
        import torch
        from diffusers.models.resnet import ResnetBlock2D

        from encoders.vae_attention import WideAttention

        self.is_compiled = True
        # Convolutions of a GPU want channels last, torch's own group norms want them first: uncompiled ones would copy
        # what they read and what they give, a third of the time to decode an image (docs/BENCHMARKS.md).
        half.to(memory_format=torch.channels_last)
        compile_modules([module for module in half.modules() if isinstance(module, ResnetBlock2D)])
        for module in half.modules():
            if isinstance(processor := getattr(module, "processor", None), WideAttention):
                processor.compile_kernels()
