"""Layers that PixArt and the class-conditional DiT share."""

# B batch, N image tokens, L text tokens, D width, H heads, E head width, P patch size, C channels

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.attention import Packing, attend, attend_to_text, lay_out

KeyValue = tuple[Tensor, Tensor]  # keys and values of texts, each as `pixart.attention.lay_out` gives them
FREQUENCY_CHANNELS = 256
MAX_PERIOD = 10_000
COMPRESSED_SIDE = 2  # of the square of tokens that a compressed attention sees as one


def frequency_embedding(values: Tensor, *, shift: int = 0) -> Tensor:
    """Sinusoids of a scalar, cosines first: [B] -> fp32 [B, 256] (Dhariwal & Nichol 2021; PixArt A.5).

    `shift` 0 spaces the periods over [1, 10000), 1 over [1, 10000].
    """
    half = FREQUENCY_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / (half - shift)
    angles = values.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)  # [B, 128]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(
    height: int, width: int, *, channels: int, base_size: int, scale: float, device: torch.device | None = None
) -> Tensor:
    """Sin-cos positions of a height x width grid of tokens: fp32 [N, D], row by row, first half for the column.

    Whatever its size, the grid spans [0, base_size / scale), so a model keeps its sense of place when resolution
    or aspect ratio change (the trick of DiffFit, PixArt A.5).
    """

    def axis(size: int) -> Tensor:
        positions = torch.arange(size, dtype=torch.float64, device=device) * (base_size / size / scale)
        exponents = torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels // 4)
        angles = positions[:, None] * MAX_PERIOD**-exponents  # [size, D/4]
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # [size, D/2]

    columns = axis(width)[None, :, :].expand(height, -1, -1)
    rows = axis(height)[:, None, :].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then the shift and scale of adaLN: x [B, N, D], both others [B, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give a view [..., H, E] of x [..., H*E]."""
    return x.unflatten(-1, (num_heads, -1))


def join_heads(x: Tensor) -> Tensor:
    """Give [..., H*E] of x [..., H, E]; a view of what fused attention gives."""
    return x.flatten(-2)


def unpatchify(patches: Tensor, grid: tuple[int, int], *, patch_size: int) -> Tensor:
    """Turn patches [B, N, P*P*C], rows of `grid` (height, width) one after the other, into the image [B, C, h, w]."""
    patches = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # [B, h/P, w/P, P, P, C]
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def xavier_(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for all linear layers and patch convolutions inside `module`.

    Layers that read one input for an attention (query, key, value; key, value) are drawn as the one matrix they are in
    the original code, so the width of their distribution is that of three or two times as many outputs.
    """
    num_drawn_as_one: dict[nn.Module, int] = {}
    for attention in module.modules():
        if isinstance(attention, SelfAttention):
            num_drawn_as_one |= dict.fromkeys((attention.query, attention.key, attention.value), 3)
        elif isinstance(attention, CrossAttention):
            num_drawn_as_one |= dict.fromkeys((attention.key, attention.value), 2)
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight.data.flatten(1)
            num_outputs, num_inputs = weight.shape
            num_outputs *= num_drawn_as_one.get(layer, 1)
            limit = math.sqrt(3) * math.sqrt(2 / (num_inputs + num_outputs))
            nn.init.uniform_(weight, -limit, limit)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class AdaLNSingle(nn.Module):
    """Shifts, scales and gates that all blocks share, plus an embedding of one's own (PixArt-alpha, section 2.3)."""

    def __init__(self, channels: int, num_vectors: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_vectors, channels) / channels**0.5)  # E of the paper

    def forward(self, shared: Tensor) -> Tensor:
        """Give [B, num_vectors, D] for the shared ones [B, num_vectors, D] or one for all of them [B, 1, D]."""
        return self.embedding + shared


class PatchEmbed(nn.Module):
    """Latents to tokens with positions, for any latent size that patches divide.

    Positions are computed for each input and never stored: `base_size` tokens span [0, base_size / scale).
    """

    def __init__(self, in_channels: int, channels: int, *, patch_size: int, base_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.base_size = base_size
        self.scale = scale
        self.projection = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """Give [B, N, D] for latents [B, C, h, w], row by row."""
        patches = self.projection(latents)  # [B, D, h/P, w/P]
        _, channels, height, width = patches.shape
        positions = position_embedding(
            height,
            width,
            channels=channels,
            base_size=self.base_size,
            scale=self.scale,
            device=latents.device,
        )
        # Positions first: a sum is laid out in memory as its first term is, and a norm copies what is not row by row.
        return positions.to(patches.dtype) + patches.flatten(2).transpose(1, 2)


class ScalarEmbedder(nn.Module):
    """Sinusoids of a scalar and a two-layer SiLU MLP: [B] -> [B, channels] (timesteps; sizes at 1024px)."""

    def __init__(self, channels: int, *, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.hidden = nn.Linear(FREQUENCY_CHANNELS, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, values: Tensor) -> Tensor:
        """Give [B, channels] for values [B]; the sinusoids are fp32 whatever the weights are."""
        frequencies = frequency_embedding(values, shift=self.frequency_shift)
        return self.out(F.silu(self.hidden(frequencies.to(self.hidden.weight.dtype))))


class TokenCompression(nn.Module):
    """One token in place of 2 x 2: a convolution of each channel by itself, and a norm (PixArt-Sigma, section 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, COMPRESSED_SIDE, stride=COMPRESSED_SIDE, groups=channels)
        self.norm = nn.LayerNorm(channels)

    def average_(self) -> None:
        """Set the weights to those it is trained from: the average of the tokens, normalised."""
        nn.init.constant_(self.convolution.weight, 1 / COMPRESSED_SIDE**2)
        nn.init.zeros_(self.convolution.get_parameter("bias"))
        self.norm.reset_parameters()

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give [B, N', D] for tokens [B, N, D] of a grid (height, width), whose last row or column may stand alone."""
        image = tokens.transpose(1, 2).unflatten(2, grid)  # [B, D, height, width]
        bottom, right = (-side % COMPRESSED_SIDE for side in grid)
        if bottom or right:  # the original code drops it; so its average is that of the tokens there are
            image = F.pad(image, (0, right, 0, bottom), mode="replicate")
        return self.norm(self.convolution(image).flatten(2).transpose(1, 2))


class SelfAttention(nn.Module):
    """Multi-head attention among the image tokens; where it compresses, to one key and value of 2 x 2 tokens."""

    def __init__(self, channels: int, num_heads: int, *, is_compressed: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.compression = TokenCompression(channels) if is_compressed else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give [B, N, D] for x [B, N, D], rows of `grid` (height, width) tokens one after the other."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.compression is not None:
            key, value = self.compression(key, grid), self.compression(value, grid)
        query, key, value = (split_heads(each, self.num_heads) for each in (query, key, value))
        return self.out(join_heads(attend(query, key, value)))


class CrossAttention(nn.Module):
    """Multi-head attention of the image tokens over the text tokens."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def read(self, text: Tensor, packing: Packing) -> KeyValue:
        """Give the keys and values of packed texts [T, D]."""
        key, value = split_heads(self.key(text), self.num_heads), split_heads(self.value(text), self.num_heads)
        return lay_out(key, packing), lay_out(value, packing)

    def forward(self, x: Tensor, text: KeyValue, packing: Packing) -> Tensor:
        """Give [B, N, D] for x [B, N, D] and the texts as `read` gave them."""
        query = split_heads(self.query(x), self.num_heads)
        return self.out(join_heads(attend_to_text(query, *text, packing)))


class MLP(nn.Module):
    """Two linear layers with tanh-approximated GELU between them."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_channels, hidden_channels)
        self.out = nn.Linear(hidden_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Give [B, N, out_channels] for x [B, N, in_channels]."""
        return self.out(F.gelu(self.hidden(x), approximate="tanh"))
