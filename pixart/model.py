"""PixArt, the text-to-image diffusion transformer (PixArt-alpha, Chen et al. 2023, section 2.3)."""

# B batch, N image tokens, L text tokens with padding, T tokens of all texts, D width, H heads, E head width,
# C latent channels, P patch size, h x w latent size

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from pixart.attention import Packing, pack
from pixart.block import PixArtBlock
from pixart.control import Control, ControlBranch, ControlPass
from pixart.layers import (
    MLP,
    AdaLNSingle,
    CrossAttention,
    KeyValue,
    PatchEmbed,
    ScalarEmbedder,
    TokenCompression,
    modulate,
    unpatchify,
    xavier_,
)
from pixart.reuse import BlockRecord, BlockReuse

TOLD_PER_GUIDANCE = 1000.0


@dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """Shape of a PixArt; the defaults are PixArt-XL/2 at 256 pixels."""

    kind: ClassVar[Literal["pixart"]] = "pixart"
    # What weights were trained with and the recipe does not say.
    inherited_fields: ClassVar[tuple[str, ...]] = ("kv_compressed_blocks",)
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
    kv_compressed_blocks: tuple[int, ...] = ()  # whose image tokens attend to a quarter of their number (PixArt-Sigma)
    has_guidance_condition: bool = False  # told the guidance that it was distilled with, see `guidance_condition.py`

    def __post_init__(self) -> None:
        if self.width % 4:
            raise UserError(f"num_heads {self.num_heads} x head_dim {self.head_dim} is not a multiple of 4")
        if self.sample_size % self.patch_size:
            raise UserError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")
        blocks = self.kv_compressed_blocks
        if blocks and self.adaln != "single":
            raise UserError(f"kv_compressed_blocks {list(blocks)} need adaLN-single, but adaln is {self.adaln}")
        if list(blocks) != sorted({block for block in blocks if 0 <= block < self.num_layers}):
            raise UserError(
                f"kv_compressed_blocks {list(blocks)} are not blocks from 0 to {self.num_layers - 1}, in order and "
                "each once"
            )

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
        if self.kv_compressed_blocks:
            return ()
        return (replace(self, adaln="per-block" if self.adaln == "single" else "single"),)

    def network(self) -> "PixArt":
        """Return a network of this shape with random weights."""
        return PixArt(self)


PIXART_S_2 = PixArtConfig(num_layers=12, num_heads=6, head_dim=64)
PIXART_B_2 = PixArtConfig(num_layers=12, num_heads=12, head_dim=64)
PIXART_L_2 = PixArtConfig(num_layers=24, num_heads=16, head_dim=64)
PIXART_XL_2 = PixArtConfig()
PIXART_XL_2_1024 = PixArtConfig(sample_size=128, interpolation_scale=2.0, has_size_condition=True)


def told_guidance(scale: Tensor) -> Tensor:
    """Give what a guidance embedding is told of scales [B], [B]: 0 for none, as diffusers' embedding of LCM has it."""
    return TOLD_PER_GUIDANCE * (scale - 1)


class PackedText(NamedTuple):
    """The text encoder's output for a batch of texts, end to end without padding between them.

    Attributes:
        values: [T, caption_channels]; rows behind the last text are no text's and count for nothing.
        offsets: text i is values[offsets[i] : offsets[i + 1]], int32 [B + 1]; each has a token or more.
        max_length: no text is longer.
        has_equal_lengths: whether all texts have max_length tokens and there are no other rows.
    """

    values: Tensor
    offsets: Tensor
    max_length: int
    has_equal_lengths: bool = False


class ReadText(NamedTuple):
    """What the network takes of texts: keys and values of each block, and with per-block adaLN their feature [B, D].

    `copies` are those of the copies in a control branch; none without one.
    """

    key_values: list[KeyValue]
    packing: Packing
    feature: Tensor | None
    copies: Sequence[KeyValue] = ()


def pack_text(text: Tensor, text_mask: Tensor | None) -> PackedText:
    """Pack texts [B, L, caption_channels], of which `text_mask` [B, L] keeps the real tokens (None: all)."""
    num_texts, max_length, _ = text.shape
    if text_mask is None:
        offsets = torch.arange(num_texts + 1, dtype=torch.int32, device=text.device) * max_length
        return PackedText(text.flatten(0, 1), offsets, max_length, has_equal_lengths=True)
    is_real = text_mask.bool()
    offsets = F.pad(is_real.sum(1).cumsum(0), (1, 0)).int()
    return PackedText(text[is_real], offsets, max_length)


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
        if config.has_guidance_condition:
            self.guidance_embed = ScalarEmbedder(width)
        self.caption_projection = MLP(config.caption_channels, width, width)
        self.blocks = nn.ModuleList(
            PixArtBlock(
                width, config.num_heads, adaln=config.adaln, is_compressed=number in config.kv_compressed_blocks
            )
            for number in range(config.num_layers)
        )
        if config.adaln == "single":
            self.global_modulation = nn.Linear(width, 6 * width)
            self.final_modulation = AdaLNSingle(width, 2)
        else:
            self.text_feature = nn.Linear(config.caption_channels, width)
            self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch_size * patch_size * config.out_channels)
        # beside the weights of this shape, where `pixart.branching.add_branch` puts one
        self.control: ControlBranch | None = None
        self._initialize()

    @property
    def has_size_condition(self) -> bool:
        """Whether `forward` is told the size of each image."""
        return self.config.has_size_condition

    def _initialize(self) -> None:
        # the caption projection stays at Xavier: at std 0.02 the text is too faint to be learnt from early on
        xavier_(self)
        for module in self.modules():
            if isinstance(module, ScalarEmbedder):
                nn.init.normal_(module.hidden.weight, std=0.02)
                nn.init.normal_(module.out.weight, std=0.02)
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.out.weight)  # the identity, so that a pretrained DiT is left as it is
            if isinstance(module, TokenCompression):
                module.average_()
        if self.config.has_size_condition:
            for embedder in (self.size_embed, self.aspect_ratio_embed):
                nn.init.zeros_(embedder.out.weight)  # again so
        if self.config.has_guidance_condition:
            nn.init.zeros_(self.guidance_embed.out.weight)  # leaves the weights that it is added to as they are
        if self.config.adaln == "single":
            nn.init.normal_(self.global_modulation.weight, std=0.02)
        else:
            for layer in (*(block.get_submodule("modulation") for block in self.blocks), self.final_modulation):
                nn.init.zeros_(layer.get_parameter("weight"))  # adaLN-Zero, as in DiT
            nn.init.zeros_(self.text_feature.weight)  # again leaves a pretrained DiT as it is
        nn.init.zeros_(self.final.weight)

    def read_text(self, text: Tensor | PackedText, text_mask: Tensor | None = None) -> ReadText:
        """Read the text encoder's output, packed or [B, L, caption_channels] with a mask, as `forward` takes it.

        `forward` takes what is read in its place: a sampler reads a text once, and not again at every step.
        """
        packed = text if isinstance(text, PackedText) else pack_text(text, text_mask)
        projected, packing = self._project(packed)
        blocks = cast("list[PixArtBlock]", [*self.blocks, *self._copies])
        key_values = [block.cross_attention.read(projected, packing) for block in blocks]
        own, copies = key_values[: len(self.blocks)], key_values[len(self.blocks) :]
        return ReadText(own, packing, self._text_feature(packed), copies)

    @property
    def _copies(self) -> Sequence[nn.Module]:
        """The copies of blocks in the control branch, of which there may be none."""
        return () if self.control is None else list(self.control.copies)

    def _project(self, text: PackedText) -> tuple[Tensor, Packing]:
        """Give the texts as blocks read them, [T, D], and where they lie."""
        projected = self.caption_projection(text.values)
        query = projected.new_empty(0, self.config.head_dim)
        return projected, pack(
            text.offsets,
            num_tokens=len(projected),
            max_length=text.max_length,
            has_equal_lengths=text.has_equal_lengths,
            query=query,
        )

    def _text_feature(self, text: PackedText) -> Tensor | None:
        """Give the projected mean of each text's tokens [B, D]; None with adaLN-single, which sees the time alone."""
        if self.config.adaln == "single":
            return None
        num_texts, tokens = len(text.offsets) - 1, torch.arange(len(text.values), device=text.values.device)
        owners = torch.searchsorted(text.offsets[1:].contiguous(), tokens, right=True)  # [T], B for padding
        # A product and no scattered sum, whose order a GPU leaves open: the same texts give the same bits.
        is_own = owners == torch.arange(num_texts, device=owners.device)[:, None]  # [B, T]
        sums = is_own.to(text.values.dtype) @ torch.where((owners < num_texts)[:, None], text.values, 0)
        return self.text_feature(sums / text.offsets.diff()[:, None])

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | PackedText | ReadText,
        text_mask: Tensor | None = None,
        size: Tensor | None = None,
        *,
        guidance: Tensor | None = None,
        control: Control | None = None,
        reuse: BlockReuse | BlockRecord | None = None,
    ) -> Tensor:
        """Give noise and variance [B, 2C, h, w] for noisy latents [B, C, h, w].

        timesteps [B] lie in [0, 1000). The text encoder's output is packed, or [B, L, caption_channels] with text_mask
        [B, L] True at its real tokens (None: all are), of which each text needs one; or it is what `read_text` gives.
        `size` [B, 3], for models with `has_size_condition` and no other, holds height and width in pixels and the
        aspect ratio height / width. `guidance` [B], for models with `has_guidance_condition` and no other, is the scale
        of the guidance that the output is to have by itself, 1 for none. `control` is what a network with a control
        branch is led by; without it the branch adds nothing. `reuse` says which blocks are computed, and stands for the
        others; or it records what is behind some.
        """
        x = self.patch_embed(latents)  # [B, N, D]
        grid = latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size
        condition = self.timestep_embed(timesteps)  # [B, D]
        if (size is not None) != self.config.has_size_condition:
            raise ValueError(f"has_size_condition is {self.config.has_size_condition}, size is {size}")
        if (guidance is not None) != self.config.has_guidance_condition:
            raise ValueError(f"has_guidance_condition is {self.config.has_guidance_condition}, guidance is {guidance}")
        if guidance is not None:
            condition = condition + self.guidance_embed(told_guidance(guidance))
        if size is not None:
            sides = self.size_embed(size[:, :2].flatten()).unflatten(0, (-1, 2)).flatten(1)  # [B, 2D/3]
            condition = condition + torch.cat([sides, self.aspect_ratio_embed(size[:, 2])], dim=1)
        texts: Sequence[Tensor | KeyValue]
        copied_texts: Sequence[Tensor | KeyValue]
        if isinstance(text, ReadText):
            texts, packing, feature, copied_texts = text
        else:
            # Each block reads the text itself: where blocks are recomputed, its keys and values need not be kept.
            packed = text if isinstance(text, PackedText) else pack_text(text, text_mask)
            projected, packing = self._project(packed)
            texts, copied_texts = [projected] * len(self.blocks), [projected] * len(self._copies)
            feature = self._text_feature(packed)
        if self.config.adaln == "single":
            block_condition = self.global_modulation(F.silu(condition)).unflatten(-1, (6, -1))  # [B, 6, D]
            final_condition = condition[:, None]
        else:
            block_condition = final_condition = F.silu(condition + feature)
        led = self._led(control, block_condition, texts=copied_texts, packing=packing, grid=grid)
        for number, (block, block_text) in enumerate(zip(self.blocks, texts, strict=True)):
            if reuse is None or not reuse.skips(number):
                x = x if led is None else led.before(number, x)
                x = block(x, block_condition, text=block_text, packing=packing, grid=grid)
            x = x if reuse is None else reuse.after(number, x)
        shift, scale = self.final_modulation(final_condition).view(len(x), 2, -1).chunk(2, dim=1)  # two [B, 1, D]
        patches = self.final(modulate(x, shift, scale))  # [B, N, P*P*2C]
        return unpatchify(patches, grid, patch_size=self.config.patch_size)

    def _led(
        self,
        control: Control | None,
        condition: Tensor,
        *,
        texts: Sequence[Tensor | KeyValue],
        packing: Packing,
        grid: tuple[int, int],
    ) -> ControlPass | None:
        """Begin the control branch's part of a pass; None where nothing leads it."""
        if control is None:
            return None
        if self.control is None:
            raise ValueError("control is given to a network without a control branch")
        tokens = self.patch_embed(control.latents)  # [B, N, D]
        return ControlPass(
            self.control,
            tokens,
            strength=control.strength,
            condition=condition,
            texts=texts,
            packing=packing,
            grid=grid,
        )
