"""Keys of a stage whose network is a codec: its shape, and what its objective weighs."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

import pydantic

from errors import UserError
from pipelines.recipe import Decides, TableConfig

CODEC, RECONSTRUCT, PERCEPTUAL = "vae", "reconstruct", "perceptual"
_WITH = {"optimizer": " and a discriminator, which has a rate of its own: set 'adamw'"}


class CodecShape(TableConfig):
    """Shape of an AutoencoderKL that starts from scratch; the defaults are those of LDM's f8 (arXiv 2112.10752)."""

    block_channels: Decides[list[Annotated[int, pydantic.Field(ge=1)]]] = pydantic.Field(
        default=[128, 256, 512, 512],
        min_length=1,
        description="Channels of each resolution; there is one halving of it less, so that four make a factor of 8",
    )
    layers_per_block: Decides[int] = pydantic.Field(
        default=2, ge=1, description="Residual blocks of a resolution of the encoder; the decoder has one more"
    )
    latent_channels: Decides[int] = pydantic.Field(default=4, ge=1, description="Channels of the latents")
    norm_groups: Decides[int] = pydantic.Field(default=32, ge=1, description="Groups of the group norms")
    middle_attention: Decides[bool] = pydantic.Field(
        default=True, description="Whether the lowest resolution has self-attention"
    )

    @pydantic.model_validator(mode="after")
    def _check_groups(self) -> Self:
        for channels in self.block_channels:
            if channels % self.norm_groups:
                raise ValueError(f"block_channels {channels} is not a multiple of norm_groups {self.norm_groups}")
        return self


class ReconstructionSettings(TableConfig):
    """Weights of the losses of `objective = "reconstruct"`, each a mean over what it is of; LDM's, at 256 pixels."""

    l1_weight: Decides[float] = pydantic.Field(default=1.0, ge=0, description="Of the absolute error of pixels")
    mse_weight: Decides[float] = pydantic.Field(default=0.0, ge=0, description="Of the squared error of pixels")
    kl_weight: Decides[float] = pydantic.Field(
        default=2e-8,
        ge=0,
        description="Of the divergence of a latent from a normal distribution, a value's mean (LDM's 1e-6 of sums)",
    )
    perceptual_weight: Decides[float] = pydantic.Field(
        default=0.0,
        ge=0,
        description="Of the distance of the features that networks.perceptual, a vision model, has of both images",
    )
    perceptual_layers: Decides[list[int] | None] = pydantic.Field(
        default=None, description="Hidden states that count, as transformers numbers them; null = all but the first"
    )
    discriminator_weight: Decides[float] = pydantic.Field(
        default=0.0, ge=0, description="Of what a discriminator of patches says of the reconstruction; 0 = it has none"
    )
    discriminator_from_step: Decides[int] = pydantic.Field(
        default=50_000, ge=0, description="Step from which on it trains and counts"
    )
    discriminator_learning_rate: Decides[float | None] = pydantic.Field(
        default=None, gt=0, description="Its peak learning rate; null = that of the codec"
    )
    discriminator_channels: Decides[int] = pydantic.Field(
        default=64,
        ge=8,
        multiple_of=8,
        description="Channels of its first layer; each of the next three has twice as many",
    )
    is_balanced: Decides[bool] = pydantic.Field(
        default=True,
        description="Whether the discriminator's gradient at each image is scaled to the size of the other losses' "
        "(VQGAN's adaptive weight, at the image) before discriminator_weight counts",
    )
    num_statistics_samples: Decides[int] = pydantic.Field(
        default=512, ge=2, description="Images of the stage of which a checkpoint measures scale and shift of latents"
    )
    writes_shift: Decides[bool] = pydantic.Field(
        default=False,
        description="Whether latents are shifted to a mean of 0, too (shift_factor, as SD3's): PixArt's pipelines of "
        "diffusers know a scale alone",
    )

    @property
    def has_discriminator(self) -> bool:
        """Whether there is one."""
        return self.discriminator_weight > 0


# Keys of `reconstruction` that say nothing without a weight.
PARTS_OF_RECONSTRUCTION = {
    "discriminator_weight": (
        *("discriminator_from_step", "discriminator_learning_rate", "discriminator_channels", "is_balanced"),
    ),
    "perceptual_weight": ("perceptual_layers",),
}


class CodecKeys(TableConfig):
    """Those of `[training.<stage>]` that are of codecs alone."""

    codec: Decides[CodecShape] = pydantic.Field(
        default=CodecShape(), description="Of network = 'vae' from scratch: shape of the AutoencoderKL"
    )
    reconstruction: Decides[ReconstructionSettings] = pydantic.Field(
        default=ReconstructionSettings(), description="What objective = 'reconstruct' weighs"
    )
    preview_crops: int = pydantic.Field(
        default=0,
        ge=0,
        le=64,
        description="Crops, the first that are held out or else trained on, beside which a vae's average draws what it "
        "makes of them while it trains; see previews/ in the stage's folder",
    )


def require_reconstruction(
    reconstruction: ReconstructionSettings,
    *,
    network: str,
    objective: str,
    trains: str | Sequence[str],
    optimizer: str,
    products: str,
    networks: Mapping[str, str],
    typed: Mapping[str, object],
    key: str,
) -> None:
    """Refuse what does not go with a codec, or with another network; `key` is the stage's.

    `typed` is what the stage's own table `reconstruction` has.

    Raises:
        UserError: names both keys.
    """
    if (network == CODEC) != (objective == RECONSTRUCT):
        raise UserError(
            f"{key}.network = {network!r} does not go with {key}.objective = {objective!r}: a {CODEC!r} is trained to "
            f"{RECONSTRUCT!r}, and nothing else is"
        )
    if network != CODEC:
        return
    for name, value, is_wrong in (
        ("trains", trains, isinstance(trains, str) and trains != "all"),
        ("products", products, products != "dtype"),
        ("optimizer", optimizer, optimizer == "muon" and reconstruction.has_discriminator),
    ):
        if is_wrong:
            raise UserError(f"{key}.{name} = {value!r} does not go with {key}.network = {CODEC!r}{_WITH.get(name, '')}")
    compared = ("l1_weight", "mse_weight", "perceptual_weight")
    if not any(getattr(reconstruction, name) for name in compared):
        raise UserError(
            f"{key}.reconstruction has {', '.join(compared)} = 0: nothing asks images to come back as they were"
        )
    for weight, names in PARTS_OF_RECONSTRUCTION.items():
        # A weight that is typed as 0 switches off what a recipe has.
        is_forgotten = getattr(reconstruction, weight) == 0 and weight not in typed
        for name in typed.keys() & set(names) if is_forgotten else ():
            raise UserError(f"{key}.reconstruction.{name} = {typed[name]!r} needs a {weight}, and that is 0")
    has_weight = reconstruction.perceptual_weight > 0
    if has_weight != (PERCEPTUAL in networks):
        named = f"networks.{PERCEPTUAL} = {networks.get(PERCEPTUAL)!r}"
        raise UserError(
            f"{key}.reconstruction.perceptual_weight = {reconstruction.perceptual_weight:g}, but {key}.{named}: name a "
            "vision model and give it a weight, or do neither"
        )
