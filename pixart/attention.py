"""Which kernel computes attention, and how texts of different lengths lie in a batch."""

# B batch, N image tokens, H heads, E head width, L tokens of the longest text, T tokens of all texts

import os
import shutil
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# Triton makes its kernels' launchers with a C compiler.
HAS_TRITON = find_spec("triton") is not None and any(
    map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))
)
# What `pixart.attention_kernels` is written for and measured on: Hopper.
KERNEL_CAPABILITY_MAJOR = 9
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_CHANNELS_MULTIPLE = 8
KERNEL_HEAD_DIMS = range(24, 129)


class Packing(NamedTuple):
    """Where the texts of a batch lie among packed tokens.

    Attributes:
        offsets: text i has the tokens from offsets[i] to offsets[i + 1], int32 [B + 1].
        max_length: no text is longer.
        places: of each token in B x max_length rows, one behind them for a token of no text, int64 [T]; None where the
            kernel reads packed texts.
        bias: is added to the scores, 0 or -inf [B, 1, 1, max_length]; None where nothing is to be masked.
    """

    offsets: Tensor
    max_length: int
    places: Tensor | None
    bias: Tensor | None


def pack(offsets: Tensor, *, num_tokens: int, max_length: int, has_equal_lengths: bool, query: Tensor) -> Packing:
    """Return the packing of texts for attention of queries like `query` [..., E]."""
    if _has_kernel(query):
        return Packing(offsets, max_length, places=None, bias=None)
    num_texts = len(offsets) - 1
    tokens = torch.arange(num_tokens, device=offsets.device)
    if has_equal_lengths:
        return Packing(offsets, max_length, places=tokens, bias=None)
    owners = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)  # [T], B for padding
    places = torch.where(owners < num_texts, owners * max_length + tokens - F.pad(offsets, (0, 1))[owners], -1)
    places = torch.where(places < 0, num_texts * max_length, places)
    is_real = torch.arange(max_length, device=offsets.device) < offsets.diff()[:, None]  # [B, L]
    bias = torch.zeros(is_real.shape, dtype=query.dtype, device=query.device).masked_fill(~is_real, -torch.inf)
    return Packing(offsets, max_length, places, bias[:, None, None, :])


def lay_out(rows: Tensor, packing: Packing) -> Tensor:
    """Lay keys or values [T, H, E] of packed texts out as `attend_to_text` wants them: as they are, or [B, H, L, E]."""
    if packing.places is None:
        return rows
    num_rows = (len(packing.offsets) - 1) * packing.max_length
    if packing.bias is not None:
        rows = rows.new_zeros(num_rows + 1, *rows.shape[1:]).index_copy(0, packing.places, rows)[:-1]
    return rows.unflatten(0, (-1, packing.max_length)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend among the tokens of an image: query, key and value [B, N, H, E] to [B, N, H, E]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def attend_to_text(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """Attend from image tokens [B, N, H, E] to the texts whose keys and values `lay_out` gave; to [B, N, H, E].

    Raises:
        RuntimeError: forward derivatives are asked of the kernel, which has none.
    """
    if packing.places is None:
        if not torch.compiler.is_compiling() and any(
            forward_ad.unpack_dual(each).tangent is not None for each in (query, key, value)
        ):
            # torch would leave them out without a word.
            raise RuntimeError("attention to texts has no forward derivatives here: use sdpa_kernel(SDPBackend.MATH)")
        return torch.ops.pixart.text_attention(query, key, value, packing.offsets, packing.max_length)[0]
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=packing.bias).transpose(1, 2)


def _has_kernel(query: Tensor) -> bool:
    head_dim = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in KERNEL_DTYPES
        and head_dim % KERNEL_CHANNELS_MULTIPLE == 0
        and head_dim in KERNEL_HEAD_DIMS
        and _runs_kernels(query.device.index or 0)
    )


@torch.compiler.assume_constant_result
def _runs_kernels(device_index: int) -> bool:
    # `sdpa_kernel(SDPBackend.MATH)`, which asks for derivatives that kernels lack, means this one, too.
    is_wanted = HAS_TRITON and torch.backends.cuda.flash_sdp_enabled()
    return is_wanted and torch.cuda.get_device_capability(device_index)[0] == KERNEL_CAPABILITY_MAJOR


@torch.library.custom_op("pixart::text_attention", mutates_args=())
def text_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int
) -> tuple[Tensor, Tensor]:
    """Attend to packed keys, as `pixart.attention_kernels.text_attention_forward` says; an operator of torch."""
    from pixart.attention_kernels import text_attention_forward

    return text_attention_forward(query, key, value, offsets)


@text_attention.register_fake
def _shapes(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    num_images, num_queries, num_heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, query.new_empty(num_images, num_heads, num_queries, dtype=torch.float32)


@torch.library.custom_op("pixart::text_attention_backward", mutates_args=())
def text_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    offsets: Tensor,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of queries, keys and values, as `pixart.attention_kernels.text_attention_backward` says."""
    from pixart import attention_kernels

    return attention_kernels.text_attention_backward(
        gradient, query, key, value, out, sums, offsets, max_length=max_length
    )


@text_attention_backward.register_fake
def _gradient_shapes(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    offsets: Tensor,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (query.shape, key.shape, value.shape)
    of_queries, of_keys, of_values = (torch.empty(shape, dtype=key.dtype, device=key.device) for shape in shapes)
    return of_queries, of_keys, of_values


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, ctx.max_length = inputs
    ctx.save_for_backward(query, key, value, *output, offsets)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, sums, offsets = ctx.saved_tensors
    gradients = torch.ops.pixart.text_attention_backward(
        gradient.contiguous(), query, key, value, out, sums, offsets, ctx.max_length
    )
    return *gradients, None, None


text_attention.register_autograd(_backward, setup_context=_keep)
