"""The compiled half of the chunk tokeniser: a hash table of chunks, and captions as word ids."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

# Bits of a chunk's flags.
IS_SLOW = 1  # the caption must go through NLTK itself
IS_SLOW_AT_END = 2  # the same, where this chunk is the caption's last
HAS_OUTER_QUOTE = 4  # NLTK's quote rules see a difference between a space and other white space
HAS_INNER_BREAK = 8  # Punkt finds a break in it, also when it looks at the period of the chunk before
ENDS_WITH_PERIOD = 16  # or ? or !

# How the chunks of a caption are set apart.
SPACE = 32
SPACING_PLAIN, SPACING_OTHER, SPACING_LEADING, SPACING_SLOW = range(4)

NUM_POSITIONS = 4  # inside, first, last, both: first + 2 * last
_HASH_SEED = np.uint64(0xCBF29CE484222325)
_HASH_PRIME = np.uint64(0x100000001B3)


class ChunkProperties(NamedTuple):
    """One row per distinct chunk; token lists are slices of `tokens`."""

    flags: np.ndarray  # uint8 [num_chunks]
    breaks: np.ndarray  # uint8 [num_chunks], bit k: Punkt breaks before a follower of kind k
    follower: np.ndarray  # uint8 [num_chunks], the kind this chunk is as a follower
    spans: np.ndarray  # int32 [num_chunks, NUM_POSITIONS * 2], begin and end in `tokens`
    tokens: np.ndarray  # int32, word ids


class Tokens(NamedTuple):
    """Captions as word ids, and the captions that only NLTK itself can tokenise."""

    words: np.ndarray  # int32 [num_tokens]
    sentence_ends: np.ndarray  # int64 [num_sentences], into `words`
    sentence_captions: np.ndarray  # int64 [num_sentences], index of the caption
    slow_captions: np.ndarray  # int64, captions left out of the above


@njit(cache=True, nogil=True)
def fill_slots(slots: np.ndarray, hashes: np.ndarray) -> None:
    """Put chunk 0, 1, ... into the empty slots of an open-addressing table."""
    mask = np.uint64(len(slots) - 1)
    for chunk in range(len(hashes)):
        slot = hashes[chunk] & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = chunk


@njit(cache=True, nogil=True)
def find_chunks(
    data: np.ndarray,
    offsets: np.ndarray,
    slots: np.ndarray,
    num_known: int,
    table: tuple[np.ndarray, np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> tuple[int, int]:
    """Split captions at white space and number every chunk; unknown chunks are added to the table."""
    hashes, starts, arena = table
    chunks, caption_ends, spacing = found
    mask = np.uint64(len(slots) - 1)
    num_all, num_chunks = num_known, 0
    for caption in range(len(offsets) - 1):
        i, end = offsets[caption], offsets[caption + 1]
        if i < end and data[i] <= SPACE:
            spacing[caption] = SPACING_LEADING
        while i < end:
            if _is_separator(data[i]):
                if data[i] != SPACE and spacing[caption] == SPACING_PLAIN:
                    spacing[caption] = SPACING_OTHER
                i += 1
                continue
            begin, value = i, _HASH_SEED
            while i < end and not _is_separator(data[i]):
                value = (value ^ np.uint64(data[i])) * _HASH_PRIME
                i += 1
            value ^= value >> np.uint64(29)
            slot = value & mask
            while slots[slot] >= 0 and not (
                hashes[slots[slot]] == value and _is_same(data[begin:i], slots[slot], starts, arena)
            ):
                slot = (slot + np.uint64(1)) & mask
            if slots[slot] < 0:
                slots[slot] = num_all
                hashes[num_all] = value
                start = starts[num_all]
                arena[start : start + i - begin] = data[begin:i]
                num_all += 1
                starts[num_all] = start + i - begin
            chunks[num_chunks] = slots[slot]
            num_chunks += 1
        caption_ends[caption] = num_chunks
    return num_chunks, num_all


@njit(cache=True, nogil=True)
def _is_separator(byte: Any) -> bool:
    return byte == SPACE or byte == 10 or byte == 9 or byte == 13


@njit(cache=True, nogil=True)
def _is_same(chunk: np.ndarray, candidate: int, starts: np.ndarray, arena: np.ndarray) -> bool:
    start = starts[candidate]
    if starts[candidate + 1] - start != len(chunk):
        return False
    for k in range(len(chunk)):  # noqa: SIM110 - numba compiles loops, not generators
        if arena[start + k] != chunk[k]:
            return False
    return True


@njit(cache=True, nogil=True)
def emit_tokens(
    chunks: np.ndarray,
    caption_ends: np.ndarray,
    spacing: np.ndarray,
    table: ChunkProperties,
    words: np.ndarray,
    sentences: tuple[np.ndarray, np.ndarray],
) -> tuple[int, int]:
    """Write word ids and sentence ends of all captions but the slow ones, which get `SPACING_SLOW`."""
    sentence_ends, sentence_captions = sentences
    num_words, num_sentences, begin = 0, 0, 0
    for caption in range(len(caption_ends)):
        end = caption_ends[caption]
        if _is_slow(chunks[begin:end], spacing[caption], table.flags):
            spacing[caption] = SPACING_SLOW
            begin = end
            continue
        is_first = True
        for i in range(begin, end):
            chunk = chunks[i]
            is_last = i + 1 == end
            if not is_last:
                after = chunks[i + 1]
                is_last = (table.breaks[chunk] >> table.follower[after]) & 1 == 1
                if table.flags[chunk] & ENDS_WITH_PERIOD and table.flags[after] & HAS_INNER_BREAK:
                    is_last = True
            position = 2 * (is_first + 2 * is_last)
            for k in range(table.spans[chunk, position], table.spans[chunk, position + 1]):
                words[num_words] = table.tokens[k]
                num_words += 1
            is_first = is_last
            if is_last:
                sentence_ends[num_sentences] = num_words
                sentence_captions[num_sentences] = caption
                num_sentences += 1
        begin = end
    return num_words, num_sentences


@njit(cache=True, nogil=True)
def _is_slow(chunks: np.ndarray, spacing: int, flags: np.ndarray) -> bool:
    if spacing == SPACING_LEADING:
        return True
    for chunk in chunks:
        if flags[chunk] & IS_SLOW or (spacing == SPACING_OTHER and flags[chunk] & HAS_OUTER_QUOTE):
            return True
    return len(chunks) > 0 and flags[chunks[-1]] & IS_SLOW_AT_END != 0
