"""Attention of image tokens over the texts of a batch in Triton, keys and values of all texts end to end.

torch's fused kernels want every text padded to the longest and lay a head of 72 channels out as 128; their backward
pass takes twice as long (docs/BENCHMARKS.md). Here a head is a power of two and a rest (72 is 64 and 8), a text has the
keys that it has, and sums are made in a fixed order, so that the same inputs give the same bits. Among themselves image
tokens are left to torch, whose kernels are faster there.
"""

# B images, N queries of an image, H heads, E head width, T keys of all texts, S parts that queries are split into

from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Rows that a program works on at a time, queries and keys, its warps, and the loads it has under way."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# The fastest of those tried on an H100 with heads of 72.
FORWARD = Tiles(queries=64, keys=128, num_warps=4, num_stages=2)
BACKWARD = Tiles(queries=64, keys=128, num_warps=8, num_stages=2)
MIN_PROGRAMS = 512  # of a backward pass: a few for each multiprocessor


@triton.jit
def _load(base, rows, row_stride, num_rows, channels, num_channels: tl.constexpr, IS_FULL: tl.constexpr):
    """Load [rows, channels]; zero behind the last row and channel."""
    pointers = base + rows[:, None] * row_stride + channels[None, :]
    if IS_FULL:
        return tl.load(pointers, mask=rows[:, None] < num_rows, other=0.0)
    else:
        return tl.load(pointers, mask=(rows[:, None] < num_rows) & (channels[None, :] < num_channels), other=0.0)


@triton.jit
def _store(base, rows, row_stride, num_rows, channels, values, num_channels: tl.constexpr):
    pointers = base + rows[:, None] * row_stride + channels[None, :]
    mask = (rows[:, None] < num_rows) & (channels[None, :] < num_channels)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _products(left, right):
    """Give the sum over channels of the products, fp32."""
    return tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)


@triton.jit
def _forward_kernel(
    query, key, value, out, sums, offsets, scale,
    num_queries, query_row, key_row, value_row, out_row,
    H: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(0) // H, tl.program_id(0) % H
    start = tl.load(offsets + image)
    length = tl.load(offsets + image + 1) - start
    rows, head_1, head_2 = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, E1), E1 + tl.arange(0, E2)
    first = (image * num_queries).to(tl.int64)
    query += first * query_row + head * E
    key += start.to(tl.int64) * key_row + head * E
    value += start.to(tl.int64) * value_row + head * E
    query_1 = _load(query, rows, query_row, num_queries, head_1, E, True)
    query_2 = _load(query, rows, query_row, num_queries, head_2, E, False)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sum_1, sum_2 = tl.zeros([M, E1], tl.float32), tl.zeros([M, E2], tl.float32)
    for first_key in range(0, length, K):
        keys = first_key + tl.arange(0, K)
        key_1 = _load(key, keys, key_row, length, head_1, E, True)
        key_2 = _load(key, keys, key_row, length, head_2, E, False)
        scores = tl.dot(query_1, tl.trans(key_1))
        scores = tl.dot(query_2, tl.trans(key_2), scores) * scale
        scores = tl.where(keys[None, :] < length, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        kept = tl.exp2(largest - new_largest)
        total = total * kept + tl.sum(weights, 1)
        largest = new_largest
        weights = weights.to(value.dtype.element_ty)
        value_1 = _load(value, keys, value_row, length, head_1, E, True)
        value_2 = _load(value, keys, value_row, length, head_2, E, False)
        sum_1 = tl.dot(weights, value_1, sum_1 * kept[:, None])
        sum_2 = tl.dot(weights, value_2, sum_2 * kept[:, None])
    out += first * out_row + head * E
    _store(out, rows, out_row, num_queries, head_1, sum_1 / total[:, None], E)
    _store(out, rows, out_row, num_queries, head_2, sum_2 / total[:, None], E)
    tl.store(sums + tl.program_id(0) * num_queries + rows, largest + tl.log2(total), mask=rows < num_queries)


@triton.jit
def _backward_kernel(
    query, key, value, out, sums, gradient, partial, query_gradient, key_gradient, value_gradient, offsets, scale,
    num_queries, part_queries, part_stride, query_row, key_row, value_row, out_row, gradient_row,
    H: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Give the gradients of a part of an image's queries in a head, and what that part adds to those of its keys."""
    image, head = tl.program_id(0) // H, tl.program_id(0) % H
    start = tl.load(offsets + image)
    length = tl.load(offsets + image + 1) - start
    head_1, head_2 = tl.arange(0, E1), E1 + tl.arange(0, E2)
    first = (image * num_queries).to(tl.int64)
    query += first * query_row + head * E
    out += first * out_row + head * E
    gradient += first * gradient_row + head * E
    key += start.to(tl.int64) * key_row + head * E
    value += start.to(tl.int64) * value_row + head * E
    query_gradient += first * (H * E) + head * E
    partial += first * (H * E) + head * E
    place = tl.program_id(1).to(tl.int64) * part_stride + start.to(tl.int64) * (H * E) + head * E
    natural = scale * 0.6931471805599453  # back from base 2
    # What is added for queries behind the last is zero, as are their values.
    last = tl.minimum((tl.program_id(1) + 1) * part_queries, num_queries)
    for first_key in range(0, length, K):
        keys = first_key + tl.arange(0, K)
        key_1 = _load(key, keys, key_row, length, head_1, E, True)
        key_2 = _load(key, keys, key_row, length, head_2, E, False)
        value_1 = _load(value, keys, value_row, length, head_1, E, True)
        value_2 = _load(value, keys, value_row, length, head_2, E, False)
        of_keys_1, of_keys_2 = tl.zeros([K, E1], tl.float32), tl.zeros([K, E2], tl.float32)
        of_values_1, of_values_2 = tl.zeros([K, E1], tl.float32), tl.zeros([K, E2], tl.float32)
        tl.debug_barrier()  # `partial` of the keys before is read below, perhaps by other threads
        for first_query in range(tl.program_id(1) * part_queries, last, M):
            rows = first_query + tl.arange(0, M)
            query_1 = _load(query, rows, query_row, last, head_1, E, True)
            query_2 = _load(query, rows, query_row, last, head_2, E, False)
            gradient_1 = _load(gradient, rows, gradient_row, last, head_1, E, True)
            gradient_2 = _load(gradient, rows, gradient_row, last, head_2, E, False)
            out_1 = _load(out, rows, out_row, last, head_1, E, True)
            out_2 = _load(out, rows, out_row, last, head_2, E, False)
            mean = _products(out_1, gradient_1) + _products(out_2, gradient_2)  # [M]
            logs = tl.load(sums + tl.program_id(0) * num_queries + rows, mask=rows < last, other=0.0)
            scores = tl.dot(key_1, tl.trans(query_1))  # [K, M]
            scores = tl.dot(key_2, tl.trans(query_2), scores)
            # Without a mask keys behind the last would have the score 0, whose weight may overflow.
            weights = tl.where(keys[:, None] < length, tl.exp2(scores * scale - logs[None, :]), 0.0)
            low = weights.to(key_1.dtype)
            of_values_1 = tl.dot(low, gradient_1, of_values_1)
            of_values_2 = tl.dot(low, gradient_2, of_values_2)
            of_weights = tl.dot(value_1, tl.trans(gradient_1))
            of_weights = tl.dot(value_2, tl.trans(gradient_2), of_weights)
            of_scores = (weights * (of_weights - mean[None, :])).to(key_1.dtype)  # [K, M]
            of_keys_1 = tl.dot(of_scores, query_1, of_keys_1)
            of_keys_2 = tl.dot(of_scores, query_2, of_keys_2)
            of_queries_1 = tl.dot(tl.trans(of_scores), key_1)
            of_queries_2 = tl.dot(tl.trans(of_scores), key_2)
            if first_key > 0:
                of_queries_1 += _load(partial, rows, H * E, last, head_1, E, True)
                of_queries_2 += _load(partial, rows, H * E, last, head_2, E, False)
            if first_key + K < length:
                _store(partial, rows, H * E, last, head_1, of_queries_1, E)
                _store(partial, rows, H * E, last, head_2, of_queries_2, E)
            else:
                _store(query_gradient, rows, H * E, last, head_1, of_queries_1 * natural, E)
                _store(query_gradient, rows, H * E, last, head_2, of_queries_2 * natural, E)
        _store(key_gradient + place, keys, H * E, length, head_1, of_keys_1 * natural, E)
        _store(key_gradient + place, keys, H * E, length, head_2, of_keys_2 * natural, E)
        _store(value_gradient + place, keys, H * E, length, head_1, of_values_1, E)
        _store(value_gradient + place, keys, H * E, length, head_2, of_values_2, E)


def _widths(head_dim: int) -> tuple[int, int]:
    """Split a head's channels into a power of two and a rest, rounded up to what the matrix units take."""
    whole = 1 << (head_dim.bit_length() - 1)
    if whole == head_dim:
        whole //= 2
    return whole, max(16, triton.next_power_of_2(head_dim - whole))


def _row(rows: Tensor) -> int:
    """Return the stride of rows [T, H, E] or [B, N, H, E] which, as their heads, lie one behind the other."""
    is_dense = rows.stride(-1) == 1 and rows.stride(-2) == rows.shape[-1]
    assert is_dense and (rows.ndim == 3 or rows.stride(0) == rows.shape[1] * rows.stride(1)), (
        f"{rows.stride()} of {rows.shape}"
    )
    return rows.stride(-3)


def text_attention_forward(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from queries [B, N, H, E] to keys and values [T, H, E], of which image i has offsets[i] to offsets[i + 1].

    Returns [B, N, H, E] and the base-2 logarithms of the sums of weights, fp32 [B, H, N]. `offsets` is int32 [B + 1].
    """
    num_images, num_queries, num_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    sums = torch.empty(num_images, num_heads, num_queries, dtype=torch.float32, device=query.device)
    tiles, (whole, rest) = FORWARD, _widths(head_dim)
    grid = (num_images * num_heads, triton.cdiv(num_queries, tiles.queries))
    _forward_kernel[grid](  # pyright: ignore[reportIndexIssue]
        query, key, value, out, sums, offsets, head_dim**-0.5 * LOG2_E,
        num_queries, _row(query), _row(key), _row(value), _row(out),
        H=num_heads, E=head_dim, E1=whole, E2=rest,
        M=tiles.queries, K=tiles.keys, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, sums


def text_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    offsets: Tensor,
    *,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, given that of `out`; no text has more than `max_length` keys.

    `out` and `sums` are what `text_attention_forward` gave. Rows of keys that are no text's get zeros.
    """
    num_images, num_queries, num_heads, head_dim = query.shape
    (whole, rest), tiles, num_programs = _widths(head_dim), BACKWARD, num_images * num_heads
    # Few images of many tokens: their queries are shared out, and what the parts give to keys is added up.
    num_parts = min(triton.cdiv(MIN_PROGRAMS, num_programs), triton.cdiv(num_queries, 256))
    part_queries = triton.cdiv(triton.cdiv(num_queries, num_parts), tiles.queries) * tiles.queries
    num_parts = triton.cdiv(num_queries, part_queries)
    of_queries = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Where a text has more keys than a program takes at a time, what they add to queries meanwhile.
    partial = torch.empty(query.shape if max_length > tiles.keys else 1, dtype=torch.float32, device=query.device)
    dtype = key.dtype if num_parts == 1 else torch.float32
    of_keys, of_values = (torch.zeros(num_parts, *key.shape, dtype=dtype, device=key.device) for _ in range(2))
    _backward_kernel[num_programs, num_parts](  # pyright: ignore[reportIndexIssue]
        query, key, value, out, sums, gradient, partial, of_queries, of_keys, of_values, offsets,
        head_dim**-0.5 * LOG2_E, num_queries, part_queries, of_keys.stride(0),
        _row(query), _row(key), _row(value), _row(out), _row(gradient), H=num_heads, E=head_dim, E1=whole, E2=rest,
        M=tiles.queries, K=tiles.keys, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if num_parts == 1:
        return of_queries, of_keys[0], of_values[0]
    return of_queries, of_keys.sum(0).to(key.dtype), of_values.sum(0).to(value.dtype)
