"""Layers that PixArt and the class-conditional DiT share."""

# B batch, N image tokens, L text tokens, D width, H heads, E head width, P patch size, C channels

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]  # keys and values of a text, each [B, H, L, E]
FREQUENCY_CHANNELS = 256
MAX_PERIOD = 10_000


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
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


gelu = partial(F.gelu, approximate="tanh")


def unpatchify(patches: Tensor, *, height: int, width: int, patch_size: int) -> Tensor:
    """Turn patches [B, N, P*P*C] into the image [B, C, height, width]."""
    rows, columns = height // patch_size, width // patch_size
    grid = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (rows, columns))  # [B, h/P, w/P, P, P, C]
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def xavier_(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for a linear layer or a patch convolution; other modules stay."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class AdaLN(nn.Linear):
    """Shifts, scales and gates that a linear layer of one's own projects from the condition (adaLN of DiT)."""

    def __init__(self, channels: int, num_vectors: int) -> None:
        super().__init__(channels, num_vectors * channels)
        self.num_vectors = num_vectors

    def forward(self, input: Tensor) -> Tensor:
        """Give [B, num_vectors, D] for a condition [B, D]."""
        return super().forward(F.silu(input)).unflatten(-1, (self.num_vectors, -1))


class AdaLNSingle(nn.Module):
    """Shifts, scales and gates that all blocks share, plus an embedding of one's own (PixArt-alpha, section 2.3)."""

    def __init__(self, channels: int, num_vectors: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_vectors, channels) / channels**0.5)  # E of the paper

    def forward(self, shared: Tensor) -> Tensor:
        """Give [B, num_vectors, D] for the shared ones [B, num_vectors, D] or one for all of them [B, 1, D]."""
        return self.embedding + shared


class _RecomputedLinear(torch.autograd.Function):
    """`F.linear(prepare(*inputs), weight, bias)`, keeping the inputs and not what is prepared of them."""

    @staticmethod
    def forward(ctx: Any, prepare: Callable[..., Tensor], weight: Tensor, bias: Tensor, *inputs: Tensor) -> Tensor:
        ctx.prepare = prepare
        ctx.save_for_backward(weight, *inputs)
        return F.linear(prepare(*inputs), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        (gradient,) = gradients
        with torch.enable_grad():
            inputs = [value.detach().requires_grad_() for value in inputs]
            prepared = ctx.prepare(*inputs)
        input_gradients = torch.autograd.grad(prepared, inputs, gradient @ weight)
        rows = gradient.flatten(0, -2)  # [B*N, D]
        return None, rows.T @ prepared.detach().flatten(0, -2), rows.sum(0), *input_gradients


class RecomputedLinear(nn.Linear):
    """A linear layer after a cheap function, whose result is computed again in the backward pass and not kept.

    A module and not a function of a layer's weights, because ZeRO 3 gathers weights around modules.
    """

    def __init__(self, in_channels: int, out_channels: int, *, prepare: Callable[..., Tensor]) -> None:
        super().__init__(in_channels, out_channels)
        self.prepare = prepare

    def forward(self, input: Tensor, *others: Tensor) -> Tensor:
        """Give linear(prepare(input, *others))."""
        if torch.compiler.is_compiling():  # the compiler chooses by itself what to keep
            return super().forward(self.prepare(input, *others))
        return _RecomputedLinear.apply(self.prepare, self.weight, self.bias, input, *others)


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
        return patches.flatten(2).transpose(1, 2) + positions.to(patches.dtype)


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


class SelfAttention(nn.Module):
    """Multi-head attention among the modulated image tokens."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = RecomputedLinear(channels, 3 * channels, prepare=modulate)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Give [B, N, D] for x [B, N, D] and the shift and scale [B, 1, D] that modulate it."""
        qkv = self.qkv(x, shift, scale).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, E]
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # each [B, H, N, E]
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of the image tokens over the text tokens that `mask` keeps."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = RecomputedLinear(channels, channels, prepare=torch.addcmul)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def read(self, text: Tensor) -> KeyValue:
        """Give the keys and values, each [B, H, L, E], of text [B, L, D]."""
        key, value = self.key_value(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # each [B, L, H, E]
        return key.transpose(1, 2), value.transpose(1, 2)

    def forward(self, parts: tuple[Tensor, Tensor, Tensor], text: KeyValue, mask: Tensor | None) -> Tensor:
        """Give [B, N, D] from the image tokens x + gate * y as their parts x [B, N, D], gate [B, 1, D], y [B, N, D].

        The text is as `read`, the boolean mask [B, 1, 1, L] (None keeps all).
        """
        query = self.query(*parts).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, E]
        attended = F.scaled_dot_product_attention(query, *text, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with tanh-approximated GELU between them, modulated by adaLN before them if so asked."""

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, *, is_modulated: bool = False
    ) -> None:
        super().__init__()
        self.hidden = (
            RecomputedLinear(in_channels, hidden_channels, prepare=modulate)
            if is_modulated
            else nn.Linear(in_channels, hidden_channels)
        )
        self.out = RecomputedLinear(hidden_channels, out_channels, prepare=gelu)

    def forward(self, x: Tensor, *shift_scale: Tensor) -> Tensor:
        """Give [B, N, out_channels] for x [B, N, in_channels]; shift and scale [B, 1, in_channels] if modulated."""
        return self.out(self.hidden(x, *shift_scale))
