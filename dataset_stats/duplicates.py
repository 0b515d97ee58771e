"""Captions that occur more than once: counted by hashes of 64 bits, in memory that does not grow with the captions.

Two texts of 10 million share a hash by accident with a probability of 3 in a million.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dataset_stats.example_places import ROW_BITS
from dataset_stats.hashes import hash_strings
from dataset_stats.set_rows import SetRows

EXACT, FOLDED = "text_hash", "folded_hash"  # columns of the caption files; null of rejects
MAX_HASHES = 1 << 24  # in memory at once, 128 MB; more are counted in several passes, each a part of all hashes
NUM_MOST_FREQUENT = 10


@dataclass(frozen=True)
class Repeated:
    """A text that occurs more than once, up to case and white space: how often, and where first."""

    count: int
    place: int  # shard << 32 | row


@dataclass(kw_only=True)
class Duplicates:
    """Captions whose text occurred before, and the texts that occur most often.

    Attributes:
        num_exact: captions less distinct texts.
        num_folded: the same when case and white space do not count.
        most_frequent: by `folded` equality, most frequent first.
    """

    num_exact: int = 0
    num_folded: int = 0
    most_frequent: list[Repeated] = field(default_factory=list)


def hash_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of texts as they are, and with case folded and white space as single spaces; int64 [num_texts] each."""
    folded = [" ".join(text.casefold().split()) for text in texts]
    return hash_strings(texts).view(np.int64), hash_strings(folded).view(np.int64)


def count_duplicates(rows: SetRows, *, num_captions: int) -> Duplicates:
    """Count the duplicates of a set of `num_captions` captions over all of its shards."""
    num_parts = -(-num_captions // MAX_HASHES)
    duplicates = Duplicates()
    duplicates.num_exact = sum(int((counts - 1).sum()) for _, counts in _repeated(rows, EXACT, num_parts))
    most: list[tuple[int, int]] = []  # (-count, hash)
    for hashes, counts in _repeated(rows, FOLDED, num_parts):
        duplicates.num_folded += int((counts - 1).sum())
        order = np.lexsort((hashes, -counts))[:NUM_MOST_FREQUENT]
        most += zip((-counts[order]).tolist(), hashes[order].tolist(), strict=True)
    most = sorted(most)[:NUM_MOST_FREQUENT]
    places = _first_places(rows, [number for _, number in most])
    duplicates.most_frequent = [Repeated(-count, places[number]) for count, number in most]
    # The order of two texts that are as frequent is that of the captions, not that of their hashes.
    duplicates.most_frequent.sort(key=lambda repeated: (-repeated.count, repeated.place))
    return duplicates


def _repeated(rows: SetRows, column: str, num_parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hashes that occur more than once and how often, part by part of all hashes."""
    for part in range(num_parts):
        found = []
        for shard in range(len(rows.files)):
            hashes = rows.read(shard, [column])[column].drop_null().to_numpy()
            found.append(hashes[hashes.view(np.uint64) % np.uint64(num_parts) == part] if num_parts > 1 else hashes)
        hashes, counts = np.unique(np.concatenate(found), return_counts=True)
        yield hashes[counts > 1], counts[counts > 1]


def _first_places(rows: SetRows, wanted: Sequence[int]) -> dict[int, int]:
    places: dict[int, int] = {}
    for shard in range(len(rows.files)):
        if len(places) == len(wanted):
            break
        column = rows.read(shard, [FOLDED])[FOLDED]
        kept = rows.numbers(shard, np.flatnonzero(column.is_valid().to_numpy()))
        hashes = column.drop_null().to_numpy()
        for number in set(wanted) - places.keys():
            found = kept[hashes == number]
            if len(found):
                places[number] = shard << ROW_BITS | int(found[0])
    return places
