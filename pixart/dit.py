"""DiT, the class-conditional transformer that stage 1 trains (Peebles & Xie 2023, adaLN-Zero)."""

# B batch, N image tokens, D width, C channels, P patch size, h x w latent size

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from pixart.layers import (
    MLP,
    PatchEmbed,
    ScalarEmbedder,
    SelfAttention,
    modulate,
    unpatchify,
    xavier_,
)
from pixart.reuse import BlockRecord, BlockReuse


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a DiT; the defaults are DiT-XL/2 at 256 pixels.

    `timestep_shift` is 0 in the official code and 1 in diffusers, see `frequency_embedding`: weights work well only
    with the one they were trained with.
    """

    kind: ClassVar[Literal["dit"]] = "dit"
    # What weights were trained with and the recipe does not say.
    inherited_fields: ClassVar[tuple[str, ...]] = ("timestep_shift",)
    # What may change between trainings, as no weight depends on it.
    position_fields: ClassVar[tuple[str, ...]] = ()

    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8  # noise and, with twice as many channels as in, its learned variance
    num_classes: int = 1000
    sample_size: int = 32  # latent side at which positions are 0, 1, 2, ...
    timestep_shift: int = 0

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
        return "class-conditional DiT"

    def alternatives(self) -> tuple["DiTConfig", ...]:
        """Return the shapes that the paper compares it with: none."""
        return ()

    def network(self) -> "DiT":
        """Return a network of this shape with random weights."""
        return DiT(self)


class DiTBlock(nn.Module):
    """Self-attention and MLP, both scaled, shifted and gated by the block's own adaLN layer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.mlp = MLP(width, 4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        grid: tuple[int, int],
    ) -> Tensor:
        """Give [B, N, D] from x [B, N, D], rows of `grid` (height, width) tokens, and SiLU(condition) [B, D]."""
        shifts_scales_gates = self.modulation(condition).view(len(x), 6, -1).chunk(6, dim=1)  # six [B, 1, D]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = shifts_scales_gates
        x = x + gate_attention * self.attention(modulate(x, shift_attention, scale_attention), grid)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class DiT(nn.Module):
    """Predict the noise in latents of a class, and the variance of the reverse step."""

    kind: ClassVar[Literal["dit"]] = "dit"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_size = config.width, config.patch_size
        self.patch_embed = PatchEmbed(
            config.in_channels, width, patch_size=patch_size, base_size=config.sample_size // patch_size
        )
        self.timestep_embed = ScalarEmbedder(width, frequency_shift=config.timestep_shift)
        self.label_embed = nn.Embedding(config.num_classes + 1, width)  # the last is the null class
        self.blocks = nn.ModuleList(DiTBlock(width, config.num_heads) for _ in range(config.num_layers))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch_size * patch_size * config.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        xavier_(self)
        for layer in (self.timestep_embed.hidden, self.timestep_embed.out, self.label_embed):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-Zero: every block begins as the identity, and the output as zero (biases are zero already)
        nn.init.zeros_(self.final.weight)
        for layer in (*(block.get_submodule("modulation") for block in self.blocks), self.final_modulation):
            nn.init.zeros_(layer.get_parameter("weight"))

    @property
    def null_label(self) -> int:
        """Label of the null class, which stands for a dropped label in classifier-free guidance."""
        return self.config.num_classes

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        *,
        reuse: BlockReuse | BlockRecord | None = None,
    ) -> Tensor:
        """Give noise and variance [B, 2C, h, w] for noisy latents [B, C, h, w].

        timesteps [B] lie in [0, 1000); labels [B] are classes, `null_label` where dropped. Without labels (None) the
        condition is the timestep alone, c = 0, as re-parameterisation needs it (PixArt section 2.3). `reuse` says which
        blocks are computed, and stands for the others.
        """
        x = self.patch_embed(latents)  # [B, N, D]
        grid = latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size
        condition = self.timestep_embed(timesteps)  # [B, D]
        if labels is not None:
            condition = condition + self.label_embed(labels)
        condition = F.silu(condition)
        for number, block in enumerate(self.blocks):
            if reuse is None or not reuse.skips(number):
                x = block(x, condition, grid=grid)
            x = x if reuse is None else reuse.after(number, x)
        shift, scale = self.final_modulation(condition).view(len(x), 2, -1).chunk(2, dim=1)  # two [B, 1, D]
        patches = self.final(modulate(x, shift, scale))  # [B, N, P*P*2C]
        return unpatchify(patches, grid, patch_size=self.config.patch_size)
