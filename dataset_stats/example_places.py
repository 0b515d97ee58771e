"""Which caption is shown for a noun: one drawn from all that have it.

The first one would be the same few captions for most nouns. Here every noun renumbers the captions by XOR with a hash
of its own, and the smallest new number counts. A minimum of minima is the minimum of all, so parts, shards and workers
may be added up in any order, and the same captions give the same example.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataset_stats.hashes import hash_strings

# Rows of a shard are numbered within it; the shard's place in its set makes them unique: shard << 32 | row.
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1
PLACE_MASK = (1 << 63) - 1  # places stay positive as int64


def noun_masks(nouns: Sequence[str] | np.ndarray) -> np.ndarray:
    """A hash of each noun, int64 [num_nouns], positive; the same in every process and on every machine."""
    return (hash_strings(nouns) & np.uint64(PLACE_MASK)).astype(np.int64)


def in_set(examples: np.ndarray, masks: np.ndarray, *, shard: int) -> np.ndarray:
    """Renumbered rows of a shard as renumbered places of its set, int64 [num_nouns]."""
    return (examples | (shard << ROW_BITS)) ^ (masks & ~ROW_MASK)


def places(examples: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The places (shard << 32 | row) behind renumbered ones, int64 [num_nouns]."""
    return examples ^ masks
