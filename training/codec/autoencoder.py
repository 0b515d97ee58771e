"""The network of a codec stage: diffusers' AutoencoderKL, with what happens between its halves in plain sight."""

# B images, C latent channels, H x W pixels, h x w latent size

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from encoders.kl import CONFIG_DEFAULTS, KLCodec
from training.codec_keys import CodecShape

IMAGE_CHANNELS = 3
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0  # diffusers'


class Reconstruction(NamedTuple):
    """What a codec makes of images.

    Attributes:
        images: decoded, [B, 3, H, W].
        mean, log_variance: of the latents' normal distributions, fp32 [B, C, h, w].
    """

    images: Tensor
    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder: `diffusers` is the content of a `config.json`."""

    kind: ClassVar[Literal["vae"]] = "vae"

    diffusers: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What it is called."""
        return f"AutoencoderKL f{self.factor}c{self.latent_channels}"

    @property
    def in_channels(self) -> int:
        """Channels of what it reads."""
        return IMAGE_CHANNELS

    @property
    def latent_channels(self) -> int:
        """Channels of its latents, C."""
        return (CONFIG_DEFAULTS | dict(self.diffusers))["latent_channels"]

    @property
    def factor(self) -> int:
        """Pixels of one latent, each way."""
        return 2 ** (len((CONFIG_DEFAULTS | dict(self.diffusers))["block_out_channels"]) - 1)

    @property
    def patch_size(self) -> int:
        """Pixels of what counts as an image token, each way: of a latent."""
        return self.factor

    def alternatives(self) -> tuple["AutoencoderConfig", ...]:
        """Return shapes that it is compared with: none."""
        return ()

    def network(self) -> "Autoencoder":
        """Return a fresh network."""
        return Autoencoder(self)

    def model(self) -> Any:
        """Return diffusers' model of this shape, fresh."""
        return KLCodec.model_class().from_config(dict(self.diffusers))


class Autoencoder(nn.Module):
    """An AutoencoderKL; weights have diffusers' names. A discriminator may stand beside it as `critic`."""

    kind: ClassVar[Literal["vae"]] = "vae"

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        model = config.model()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.quant_conv, self.post_quant_conv = model.quant_conv, model.post_quant_conv

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Encode images [B, 3, H, W] in -1 to 1, draw latents with `noise` [B, C, h, w], and decode those."""
        mean, log_variance = self.moments(images)
        latents = mean + (0.5 * log_variance).exp() * noise
        return Reconstruction(self.decode(latents.to(images.dtype)), mean, log_variance)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latents of images, fp32 [B, C, h, w]."""
        moments = self.encoder(images)  # [B, 2C, h, w]
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def latent_shape(self, images: Sequence[int]) -> tuple[int, int, int, int]:
        """Return [B, C, h, w] of the latents of images of a shape [B, 3, H, W]."""
        num_images, _, height, width = images
        factor = self.config.factor
        return num_images, self.config.latent_channels, height // factor, width // factor

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] of unscaled latents [B, C, h, w]."""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))

    def list_blocks(self) -> list[nn.Module]:
        """Return the residual blocks, which may be computed again in the backward pass, and are compiled."""
        from diffusers.models.resnet import ResnetBlock2D

        return [module for module in self.modules() if isinstance(module, ResnetBlock2D)]


def config_of_shape(shape: CodecShape, *, sample_size: int) -> AutoencoderConfig:
    """Return the shape of a codec from scratch, for images of `sample_size` pixels a side."""
    num_levels = len(shape.block_channels)
    return AutoencoderConfig(
        {
            "_class_name": KLCodec.class_name,
            "down_block_types": ["DownEncoderBlock2D"] * num_levels,
            "up_block_types": ["UpDecoderBlock2D"] * num_levels,
            "block_out_channels": list(shape.block_channels),
            "layers_per_block": shape.layers_per_block,
            "latent_channels": shape.latent_channels,
            "norm_num_groups": shape.norm_groups,
            "mid_block_add_attention": shape.middle_attention,
            "sample_size": sample_size,
        }
    )
