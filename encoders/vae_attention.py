"""The attention among all pixels of latents in a VAE's middle, whose one head is as wide as 512 channels, on a GPU.

No kernel of torch's but the memory-efficient one takes heads so wide, at a tenth of what products reach: of an image of
1024px it is a third of the time to encode it. Here it is two products and a softmax between them, a part of the queries
at a time, and the scores stay in float32.
"""

# B images, C channels, N places of an image (h * w), R queries at a time

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encoders.compilation import compile_pointwise

# Wider heads have no flash kernel that is worth it.
MAX_FLASH_WIDTH = 128
# Scores held at a time: 256 MiB in float32, which is enough rows to fill a GPU with each product.
MAX_SCORES = 2**26


class WideAttention:
    """A processor of diffusers' `Attention` of one head among the places of an image, added to it."""

    def __init__(self) -> None:
        self._shares = _shares

    @staticmethod
    def fits(attention: Any) -> bool:
        """Whether it computes what an `Attention` of diffusers does, and is of use."""
        others = (attention.spatial_norm, attention.norm_q, attention.norm_k)
        return (
            attention.heads == 1
            and attention.to_q.out_features > MAX_FLASH_WIDTH
            and attention.group_norm is not None
            and attention.residual_connection
            and all(other is None for other in others)
        )

    def compile_kernels(self) -> None:
        """Compile the softmax to one kernel."""
        self._shares = compile_pointwise(_shares)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> Tensor:
        """Return what an `Attention` makes of [B, C, h, w]; diffusers hands the others over, which it never uses."""
        tokens = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2).contiguous()  # [B, N, C]
        answers = self._attend(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
        answers = attn.to_out[0](answers).transpose(1, 2).reshape(hidden_states.shape)  # [B, C, h, w]
        return (answers + hidden_states) / attn.rescale_output_factor

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return softmax(queries keys^T / sqrt(C)) values, of [B, N, C] each."""
        num_images, num_places, width = queries.shape
        answers = torch.empty_like(queries)
        rows = max(1, MAX_SCORES // (num_images * num_places))
        for start in range(0, num_places, rows):
            scores = _float32_product(queries[:, start : start + rows], keys.transpose(1, 2))  # [B, R, N]
            shares = self._shares(scores, width**-0.5, queries.dtype)
            answers[:, start : start + rows] = torch.bmm(shares, values)
        return answers


def widen_attention(model: nn.Module) -> list[WideAttention]:
    """Give all attention of a diffusers model that it is of use to this processor; returns those of them."""
    from diffusers.models.attention_processor import Attention

    processors: list[WideAttention] = []
    for module in model.modules():
        if isinstance(module, Attention) and WideAttention.fits(module):
            processors.append(WideAttention())
            module.set_processor(processors[-1])  # type: ignore[arg-type]  # its union of classes is diffusers' own
    return processors


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the batched product in float32, of factors of any type; only a GPU makes it without copies of them."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def _shares(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.softmax(scores * scale, dim=-1).to(dtype)
