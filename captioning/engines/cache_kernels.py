"""Triton kernels of the text model: a token's attention over the cache, and prompts' keys and values put into it.

A token's attention turns it by its position, puts it into the cache and reads the cache once. A query of one token has
no use for tensor cores: each byte of the cache is used for one product, so that memory is the limit, and kernels made
for 64 to 128 queries are not made for it. Rows are read to their own length, so that neither a mask nor a bound on
lengths is needed. Online softmax (arXiv 1805.02867) with one stream per position of a block, joined at the end.

Prompts are turned and put into the cache in one pass over memory, where torch's own operations take seven.
`LlamaForward` has both in torch's own operations for a CPU.
"""

# B rows, N packed tokens, H query heads, K key heads, D head width, S slots, C capacity

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK_TOKENS = 32
NUM_WARPS = 4
# Heads of a token that one program places: with one head each, programs would start more slowly than memory is read.
BLOCK_HEADS = 8
LOG2_E = 1.4426950408889634


def append_and_attend(
    mixed: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    cos: Tensor,
    signed_sin: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Append a token to each of the first B slots of a layer and attend to all that each holds then.

    Args:
        mixed: queries, keys and values of the tokens, not yet turned, [B, H + 2 K, D], contiguous.
        lengths: int64 [B], tokens in the slots before.
        keys, values: the layer's cache, [S, K, C, D], contiguous; the new token is written to it.
        cos, signed_sin: rotary tables, [positions, D]; the first half of `signed_sin` has its sign changed.
        num_heads: H.
        scale: of the scores.

    Returns:
        What was attended, [B, H * D].
    """
    num_rows, _, width = mixed.shape
    answers = mixed.new_empty(num_rows, num_heads * width)
    _append_and_attend[(num_heads, num_rows)](  # pyright: ignore[reportIndexIssue]
        mixed,
        lengths,
        keys,
        values,
        answers,
        cos,
        signed_sin,
        keys.shape[2],
        scale * LOG2_E,
        num_heads,
        keys.shape[1],
        width,
        triton.next_power_of_2(width),
        BLOCK_TOKENS,
        num_warps=NUM_WARPS,
    )
    return answers


def turn_and_place(
    mixed: Tensor,
    slots: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    cos: Tensor,
    signed_sin: Tensor,
    num_heads: int,
) -> Tensor:
    """Turn tokens by their `positions` and write their keys and values to those of `slots`, both int64 [N].

    The other arguments are those of `append_and_attend`, `mixed` [N, H + 2 K, D]. Returns the queries, [N, H, D].
    """
    num_tokens, num_mixed, width = mixed.shape
    queries = mixed.new_empty(num_tokens, num_heads, width)
    _turn_and_place[(num_tokens, triton.cdiv(num_mixed, BLOCK_HEADS))](  # pyright: ignore[reportIndexIssue]
        mixed,
        slots,
        positions,
        keys,
        values,
        queries,
        cos,
        signed_sin,
        keys.shape[2],
        num_heads,
        keys.shape[1],
        width,
        triton.next_power_of_2(width),
        BLOCK_HEADS,
        num_warps=NUM_WARPS,
    )
    return queries


@triton.jit
def _turn_and_place(
    mixed: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    queries: tl.tensor,
    cos: tl.tensor,
    signed_sin: tl.tensor,
    capacity: tl.tensor,
    num_heads: tl.constexpr,
    num_key_heads: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * block + tl.arange(0, block)
    channels = tl.arange(0, padded_width)
    is_channel = channels < width
    num_mixed: tl.constexpr = num_heads + 2 * num_key_heads
    is_there = (heads < num_mixed)[:, None] & is_channel[None, :]
    kind = keys.dtype.element_ty
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    cosine = tl.load(cos + position * width + channels, mask=is_channel, other=0.0).to(tl.float32)
    sine = tl.load(signed_sin + position * width + channels, mask=is_channel, other=0.0).to(tl.float32)

    source = mixed + token * (num_mixed * width) + heads[:, None] * width
    own = tl.load(source + channels[None, :], mask=is_there, other=0.0)
    opposite = tl.load(source + ((channels + width // 2) % width)[None, :], mask=is_there, other=0.0)
    turned = own.to(tl.float32) * cosine[None, :] + opposite.to(tl.float32) * sine[None, :]

    asked = queries + token * (num_heads * width) + heads[:, None] * width + channels[None, :]
    tl.store(asked, turned.to(kind), mask=is_there & (heads < num_heads)[:, None])
    is_value = heads >= num_heads + num_key_heads
    key_heads = tl.where(is_value, heads - num_heads - num_key_heads, heads - num_heads)
    places = ((slot * num_key_heads + key_heads) * capacity + position) * width
    places = places[:, None] + channels[None, :]
    tl.store(
        keys + places,
        turned.to(kind),
        mask=is_there & ((heads >= num_heads) & (heads < num_heads + num_key_heads))[:, None],
    )
    tl.store(values + places, own, mask=is_there & is_value[:, None])


@triton.jit
def _append_and_attend(
    mixed: tl.tensor,
    lengths: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    answers: tl.tensor,
    cos: tl.tensor,
    signed_sin: tl.tensor,
    capacity: tl.tensor,
    scale: tl.tensor,
    num_heads: tl.constexpr,
    num_key_heads: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    group: tl.constexpr = num_heads // num_key_heads
    key_head = head // group
    length = tl.load(lengths + row).to(tl.int32)
    channels = tl.arange(0, padded_width)
    is_channel = channels < width
    opposite = (channels + width // 2) % width
    kind = keys.dtype.element_ty

    # The new token, turned, as the cache holds it.
    token = mixed + row * ((num_heads + 2 * num_key_heads) * width)
    cosine = tl.load(cos + length * width + channels, mask=is_channel, other=0.0).to(tl.float32)
    sine = tl.load(signed_sin + length * width + channels, mask=is_channel, other=0.0).to(tl.float32)
    asked = token + head * width
    query = tl.load(asked + channels, mask=is_channel, other=0.0).to(tl.float32) * cosine
    query += tl.load(asked + opposite, mask=is_channel, other=0.0).to(tl.float32) * sine
    query = query.to(kind).to(tl.float32) * scale
    own = token + (num_heads + key_head) * width
    key = tl.load(own + channels, mask=is_channel, other=0.0).to(tl.float32) * cosine
    key += tl.load(own + opposite, mask=is_channel, other=0.0).to(tl.float32) * sine
    key = key.to(kind)
    value = tl.load(own + num_key_heads * width + channels, mask=is_channel, other=0.0)
    slot = (row * num_key_heads + key_head) * capacity * width
    place = slot + length * width + channels
    # The other query heads of the group read tokens before this one only.
    if head % group == 0:
        tl.store(keys + place, key, mask=is_channel)
        tl.store(values + place, value, mask=is_channel)

    # Finite, so that a stream without a token has no infinity less infinity.
    highest = tl.full([block], -1e30, tl.float32)
    total = tl.zeros([block], tl.float32)
    sums = tl.zeros([block, padded_width], tl.float32)
    for start in range(0, length, block):
        tokens = start + tl.arange(0, block)
        is_token = tokens < length
        index = slot + tokens[:, None] * width + channels[None, :]
        is_there = is_token[:, None] & is_channel[None, :]
        cached_keys = tl.load(keys + index, mask=is_there, other=0.0)
        cached_values = tl.load(values + index, mask=is_there, other=0.0)
        scores = tl.sum(cached_keys.to(tl.float32) * query[None, :], axis=1)
        scores = tl.where(is_token, scores, -1e30)
        higher = tl.maximum(highest, scores)
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher)
        total = total * shrink + weights
        sums = sums * shrink[:, None] + weights[:, None] * cached_values.to(tl.float32)
        highest = higher

    score = tl.sum(query * key.to(tl.float32), axis=0)
    top = tl.maximum(tl.max(highest, axis=0), score)
    shares = tl.exp2(highest - top)
    weight = tl.exp2(score - top)
    answer = tl.sum(sums * shares[:, None], axis=0) + weight * value.to(tl.float32)
    answer = answer / (tl.sum(total * shares, axis=0) + weight)
    tl.store(answers + (row * num_heads + head) * width + channels, answer.to(kind), mask=is_channel)
