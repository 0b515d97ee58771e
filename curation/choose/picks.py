"""A few of many samples, the same ones each time: those nearest to a cut, and some drawn by lot.

A sample's lot is a hash over its shard and key: who reads the shards, in which order and in how many parts is nothing
to it.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Example:
    """A sample that the page shows.

    Attributes:
        value: of what it was picked by; None of one that was drawn by lot.
        failed: numbers of the clauses that are not true of it, counted from 0.
        is_chosen: whether it is.
    """

    shard: str
    key: str
    value: float | None
    failed: tuple[int, ...]
    is_chosen: bool


def lots_of(shard: str, keys: Sequence[str]) -> np.ndarray:
    """Return a number for each sample of a shard, by which some of all are drawn; uint64 [n]."""
    start = zlib.crc32(f"{shard}/".encode())
    lots = np.fromiter((zlib.crc32(key.encode(), start) for key in keys), np.uint64, count=len(keys))
    # Keys that differ in their last digit alone have checksums that are alike: the mixing of splitmix64.
    lots += np.uint64(0x9E3779B97F4A7C15)
    lots = (lots ^ (lots >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    lots = (lots ^ (lots >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return lots ^ (lots >> np.uint64(31))


class Picks:
    """The samples of least distance; of those that are equally far, by lot."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._best: list[tuple[float, int, str, str, Example]] = []

    @property
    def examples(self) -> list[Example]:
        """What was picked, nearest first."""
        return [best[-1] for best in self._best]

    def offer(self, rows: np.ndarray, distances: np.ndarray, lots: np.ndarray, make: Callable[[int], Example]) -> None:
        """Look at some samples of a shard.

        Args:
            rows: of them in the shard, int [n].
            distances: float [n].
            lots: uint64 [n].
            make: returns the example of a row.
        """
        if not len(rows):
            return
        num = min(self._num, len(rows))
        limit = np.partition(distances, num - 1)[num - 1]
        if len(self._best) == self._num:
            limit = min(limit, self._best[-1][0])
        near = np.flatnonzero(distances <= limit)
        near = near[np.lexsort((lots[near], distances[near]))][:num]
        found = list(self._best)
        for place in near:
            example = make(int(rows[place]))
            found.append((float(distances[place]), int(lots[place]), example.shard, example.key, example))
        self._best = sorted(found, key=lambda best: best[:-1])[: self._num]


class Sample:
    """Values of some samples, drawn by lot: what is there in the main, without keeping all."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._lots = np.zeros(0, np.uint64)
        self._values = np.zeros(0)

    @property
    def values(self) -> np.ndarray:
        """What was drawn, in rising order, float64 [n]."""
        return np.sort(self._values)

    def offer(self, values: np.ndarray, lots: np.ndarray) -> None:
        """Look at some values, all of them finite."""
        if len(self._lots) == self._num:  # most of many shards are beyond the largest lot that is kept
            near = lots <= self._lots[-1]
            lots, values = lots[near], values[near]
        lots, values = np.concatenate([self._lots, lots]), np.concatenate([self._values, values])
        kept = np.lexsort((values, lots))[: self._num]
        self._lots, self._values = lots[kept], values[kept]
