"""PixArt, the text-to-image diffusion transformer (PixArt-alpha, Chen et al. 2023, section 2.3)."""

# B batch, N image tokens, L text tokens, D width, H heads, E head width, C latent channels, P patch size,
# h x w latent size

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixart.layers import (
    MLP,
    CrossAttention,
    KeyValue,
    PatchEmbed,
    ScalarEmbedder,
    SelfAttention,
    modulate,
    unpatchify,
    xavier_,
)


@dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """Shape of a PixArt; the defaults are PixArt-XL/2 at 256 pixels."""

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

    def __post_init__(self) -> None:
        if self.width % 4:
            raise ValueError(f"num_heads {self.num_heads} x head_dim {self.head_dim} is not a multiple of 4")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim


PIXART_S_2 = PixArtConfig(num_layers=12, num_heads=6, head_dim=64)
PIXART_B_2 = PixArtConfig(num_layers=12, num_heads=12, head_dim=64)
PIXART_L_2 = PixArtConfig(num_layers=24, num_heads=16, head_dim=64)
PIXART_XL_2 = PixArtConfig()
PIXART_XL_2_512 = PixArtConfig(sample_size=64)
PIXART_XL_2_1024 = PixArtConfig(sample_size=128, interpolation_scale=2.0, has_size_condition=True)


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention over the text, MLP; modulated by adaLN-single."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.cross_attention = CrossAttention(width, num_heads)
        self.mlp = MLP(width, 4 * width, width, is_modulated=True)
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)  # E of the paper

    def forward(
        self, x: Tensor, text: Tensor | KeyValue, text_mask: Tensor | None, global_modulation: Tensor
    ) -> Tensor:
        """Give [B, N, D] from x [B, N, D], the text with its mask [B, 1, 1, L] and the shared S [B, 6, D].

        The text is [B, L, D], or what `cross_attention.read` gives of it.
        """
        key_value = self.cross_attention.read(text) if isinstance(text, Tensor) else text
        shifts_scales_gates = (self.modulation + global_modulation).chunk(6, dim=1)  # six [B, 1, D]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = shifts_scales_gates
        x = torch.addcmul(x, gate_attention, self.attention(x, shift_attention, scale_attention))
        x = x + self.cross_attention(x, key_value, text_mask)
        return torch.addcmul(x, gate_mlp, self.mlp(x, shift_mlp, scale_mlp))


class PixArt(nn.Module):
    """Predict the noise in latents that a text describes, and the variance of the reverse step.

    Set `checkpoint_activations` to recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
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
        self.global_modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(PixArtBlock(width, config.num_heads) for _ in range(config.num_layers))
        self.final_modulation = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final = nn.Linear(width, patch_size * patch_size * config.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        # the caption projection stays at Xavier: at std 0.02 the text is too faint to be learnt from early on
        self.apply(xavier_)
        for module in self.modules():
            if isinstance(module, ScalarEmbedder):
                nn.init.normal_(module.hidden.weight, std=0.02)
                nn.init.normal_(module.out.weight, std=0.02)
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.out.weight)  # the identity, so that a pretrained DiT is left as it is
        nn.init.normal_(self.global_modulation.weight, std=0.02)
        nn.init.zeros_(self.final.weight)

    def read_text(self, text: Tensor) -> list[KeyValue]:
        """Give each block's keys and values of the text encoder's output [B, L, caption_channels].

        `forward` takes them in its place: a sampler reads a text once, and not again at every step.
        """
        projected = self.caption_projection(text)  # [B, L, D]
        blocks = cast("list[PixArtBlock]", list(self.blocks))
        return [block.cross_attention.read(projected) for block in blocks]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | Sequence[KeyValue],
        text_mask: Tensor | None = None,
        size: Tensor | None = None,
    ) -> Tensor:
        """Give noise and variance [B, 2C, h, w] for noisy latents [B, C, h, w].

        timesteps [B] lie in [0, 1000); text [B, L, caption_channels] is the text encoder's output, or what `read_text`
        gives of it, and text_mask [B, L] is True at its real tokens (None: all are), of which each text needs one.
        `size` [B, 3], for models with `has_size_condition` and no other, holds height and width in pixels and the
        aspect ratio height / width.
        """
        x = self.patch_embed(latents)  # [B, N, D]
        condition = self.timestep_embed(timesteps)  # [B, D]
        if (size is not None) != self.config.has_size_condition:
            raise ValueError(f"has_size_condition is {self.config.has_size_condition}, size is {size}")
        if size is not None:
            sides = self.size_embed(size[:, :2].flatten()).unflatten(0, (-1, 2)).flatten(1)  # [B, 2D/3]
            condition = condition + torch.cat([sides, self.aspect_ratio_embed(size[:, 2])], dim=1)
        global_modulation = self.global_modulation(F.silu(condition)).unflatten(-1, (6, -1))  # [B, 6, D]
        # While training each block reads the text itself: recomputed keys and values need not be kept.
        texts = [self.caption_projection(text)] * len(self.blocks) if isinstance(text, Tensor) else text
        if text_mask is not None:
            text_mask = text_mask.bool()[:, None, None, :]  # [B, 1, 1, L]
        for block, block_text in zip(self.blocks, texts, strict=True):
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, block_text, text_mask, global_modulation, use_reentrant=False)
            else:
                x = block(x, block_text, text_mask, global_modulation)
        shift, scale = (self.final_modulation + condition[:, None]).chunk(2, dim=1)
        patches = self.final(modulate(x, shift, scale))  # [B, N, P*P*2C]
        return unpatchify(patches, height=latents.shape[-2], width=latents.shape[-1], patch_size=self.config.patch_size)
