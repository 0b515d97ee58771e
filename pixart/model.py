"""PixArt, the text-to-image diffusion transformer (PixArt-alpha, Chen et al. 2023, section 2.3)."""

# B batch, N image tokens, L text tokens, D width, H heads, E head width, C latent channels, P patch size,
# h x w latent size

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from pixart.layers import (
    MLP,
    AdaLNSingle,
    CrossAttention,
    KeyValue,
    PatchEmbed,
    ScalarEmbedder,
    SelfAttention,
    modulate,
    unpatchify,
    xavier_,
)
from pixart.reuse import BlockReuse


@dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """Shape of a PixArt; the defaults are PixArt-XL/2 at 256 pixels."""

    kind: ClassVar[Literal["pixart"]] = "pixart"
    # What weights were trained with and the recipe does not say.
    inherited_fields: ClassVar[tuple[str, ...]] = ()
    # What may change between trainings, as no weight depends on it.
    position_fields: ClassVar[tuple[str, ...]] = ("sample_size", "interpolation_scale")

    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8  # noise and, with twice as many channels as in, its learned variance
    caption_channels: int = 4096  # of the text encoder's tokens, here T5-XXL
    sample_size: int = 32  # latent side at which positions are 0, 1, 2, ... divided by interpolation_scale
    interpolation_scale: float = 1.0
    has_size_condition: bool = False  # told image size and aspect ratio, as the released 1024px model is
    adaln: Literal["single", "per-block"] = "single"  # per-block: as in DiT, the ablation of Figure 6

    def __post_init__(self) -> None:
        if self.width % 4:
            raise UserError(f"num_heads {self.num_heads} x head_dim {self.head_dim} is not a multiple of 4")
        if self.sample_size % self.patch_size:
            raise UserError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    @property
    def title(self) -> str:
        """What people call it."""
        return f"PixArt with {'adaLN-single' if self.adaln == 'single' else 'per-block adaLN'}"

    def alternatives(self) -> tuple["PixArtConfig", ...]:
        """Return the shapes that the paper compares it with: that of Figure 6 with the other adaLN."""
        return (replace(self, adaln="per-block" if self.adaln == "single" else "single"),)

    def network(self) -> "PixArt":
        """Return a network of this shape with random weights."""
        return PixArt(self)


PIXART_S_2 = PixArtConfig(num_layers=12, num_heads=6, head_dim=64)
PIXART_B_2 = PixArtConfig(num_layers=12, num_heads=12, head_dim=64)
PIXART_L_2 = PixArtConfig(num_layers=24, num_heads=16, head_dim=64)
PIXART_XL_2 = PixArtConfig()
PIXART_XL_2_1024 = PixArtConfig(sample_size=128, interpolation_scale=2.0, has_size_condition=True)


class ReadText(NamedTuple):
    """What the network takes of a text: keys and values of each block, and with per-block adaLN its feature [B, D]."""

    key_values: list[KeyValue]
    feature: Tensor | None


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention over the text, MLP; modulated by adaLN-single or by an adaLN of its own."""

    def __init__(self, width: int, num_heads: int, *, adaln: str) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.cross_attention = CrossAttention(width, num_heads)
        self.mlp = MLP(width, 4 * width, width)
        self.modulation = AdaLNSingle(width, 6) if adaln == "single" else nn.Linear(width, 6 * width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        text: Tensor | KeyValue,
        text_mask: Tensor | None,
        grid: tuple[int, int],  # of no use to plain attention, which needs no neighbours
    ) -> Tensor:
        """Give [B, N, D] from x [B, N, D], rows of `grid` (height, width) tokens one after the other.

        The condition is S [B, 6, D] with adaLN-single, and SiLU(condition) [B, D] with the block's own adaLN. The text
        is [B, L, D], or what `cross_attention.read` gives of it; its mask [B, 1, 1, L] is added to the scores.
        """
        key_value = self.cross_attention.read(text) if isinstance(text, Tensor) else text
        shifts_scales_gates = self.modulation(condition).view(len(x), 6, -1).chunk(6, dim=1)  # six [B, 1, D]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = shifts_scales_gates
        x = x + gate_attention * self.attention(modulate(x, shift_attention, scale_attention))
        x = x + self.cross_attention(x, key_value, text_mask)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class PixArt(nn.Module):
    """Predict the noise in latents that a text describes, and the variance of the reverse step."""

    kind: ClassVar[Literal["pixart"]] = "pixart"

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_size = config.width, config.patch_size
        self.patch_embed = PatchEmbed(
            config.in_channels,
            width,
            patch_size=patch_size,
            base_size=config.sample_size // patch_size,
            scale=config.interpolation_scale,
        )
        self.timestep_embed = ScalarEmbedder(width)
        if config.has_size_condition:
            self.size_embed = ScalarEmbedder(width // 3)
            self.aspect_ratio_embed = ScalarEmbedder(width // 3)
        self.caption_projection = MLP(config.caption_channels, width, width)
        self.blocks = nn.ModuleList(
            PixArtBlock(width, config.num_heads, adaln=config.adaln) for _ in range(config.num_layers)
        )
        if config.adaln == "single":
            self.global_modulation = nn.Linear(width, 6 * width)
            self.final_modulation = AdaLNSingle(width, 2)
        else:
            self.text_feature = nn.Linear(config.caption_channels, width)
            self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch_size * patch_size * config.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        # the caption projection stays at Xavier: at std 0.02 the text is too faint to be learnt from early on
        xavier_(self)
        for module in self.modules():
            if isinstance(module, ScalarEmbedder):
                nn.init.normal_(module.hidden.weight, std=0.02)
                nn.init.normal_(module.out.weight, std=0.02)
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.out.weight)  # the identity, so that a pretrained DiT is left as it is
        if self.config.adaln == "single":
            nn.init.normal_(self.global_modulation.weight, std=0.02)
        else:
            for layer in (*(block.get_submodule("modulation") for block in self.blocks), self.final_modulation):
                nn.init.zeros_(layer.get_parameter("weight"))  # adaLN-Zero, as in DiT
            nn.init.zeros_(self.text_feature.weight)  # again leaves a pretrained DiT as it is
        nn.init.zeros_(self.final.weight)

    def read_text(self, text: Tensor, text_mask: Tensor | None = None) -> ReadText:
        """Read the text encoder's output [B, L, caption_channels], of which `text_mask` [B, L] keeps the real tokens.

        `forward` takes what is read in its place: a sampler reads a text once, and not again at every step.
        """
        projected = self.caption_projection(text)  # [B, L, D]
        blocks = cast("list[PixArtBlock]", list(self.blocks))
        key_values = [block.cross_attention.read(projected) for block in blocks]
        return ReadText(key_values, self._text_feature(text, text_mask))

    def _text_feature(self, text: Tensor, text_mask: Tensor | None) -> Tensor | None:
        """Give the mean of the real tokens, projected to [B, D]; None with adaLN-single, which sees the time alone."""
        if self.config.adaln == "single":
            return None
        if text_mask is None:
            return self.text_feature(text.mean(dim=1))
        is_real = text_mask.bool()[:, :, None]  # [B, L, 1]
        return self.text_feature(torch.where(is_real, text, 0).sum(dim=1) / is_real.sum(dim=1))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | ReadText,
        text_mask: Tensor | None = None,
        size: Tensor | None = None,
        *,
        reuse: BlockReuse | None = None,
    ) -> Tensor:
        """Give noise and variance [B, 2C, h, w] for noisy latents [B, C, h, w].

        timesteps [B] lie in [0, 1000); text [B, L, caption_channels] is the text encoder's output, or what `read_text`
        gives of it, and text_mask [B, L] is True at its real tokens (None: all are), of which each text needs one.
        `size` [B, 3], for models with `has_size_condition` and no other, holds height and width in pixels and the
        aspect ratio height / width. `reuse` says which blocks are computed, and stands for the others.
        """
        x = self.patch_embed(latents)  # [B, N, D]
        grid = latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size
        condition = self.timestep_embed(timesteps)  # [B, D]
        if (size is not None) != self.config.has_size_condition:
            raise ValueError(f"has_size_condition is {self.config.has_size_condition}, size is {size}")
        if size is not None:
            sides = self.size_embed(size[:, :2].flatten()).unflatten(0, (-1, 2)).flatten(1)  # [B, 2D/3]
            condition = condition + torch.cat([sides, self.aspect_ratio_embed(size[:, 2])], dim=1)
        texts: Sequence[Tensor | KeyValue]
        if isinstance(text, Tensor):
            # Each block reads the text itself: where blocks are recomputed, its keys and values need not be kept.
            texts, feature = [self.caption_projection(text)] * len(self.blocks), self._text_feature(text, text_mask)
        else:
            texts, feature = text
        if self.config.adaln == "single":
            block_condition = self.global_modulation(F.silu(condition)).unflatten(-1, (6, -1))  # [B, 6, D]
            final_condition = condition[:, None]
        else:
            block_condition = final_condition = F.silu(condition + feature)
        if text_mask is not None:
            # once for all blocks: attention would turn booleans into numbers in each
            text_mask = torch.zeros(text_mask.shape, dtype=x.dtype, device=x.device).masked_fill(
                ~text_mask.bool(), -torch.inf
            )[:, None, None, :]  # [B, 1, 1, L]
        for number, (block, block_text) in enumerate(zip(self.blocks, texts, strict=True)):
            if reuse is None or not reuse.skips(number):
                x = block(x, block_condition, text=block_text, text_mask=text_mask, grid=grid)
            x = x if reuse is None else reuse.after(number, x)
        shift, scale = self.final_modulation(final_condition).view(len(x), 2, -1).chunk(2, dim=1)  # two [B, 1, D]
        patches = self.final(modulate(x, shift, scale))  # [B, N, P*P*2C]
        return unpatchify(patches, grid, patch_size=self.config.patch_size)
