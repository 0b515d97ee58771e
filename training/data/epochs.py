"""How often an epoch draws each sample: once, or by its weight.

With weights all samples of a dataset lie on a line, bucket by bucket and in it shard by shard, each on a stretch as
long as its weight. An epoch's draws are points on that line at equal distances; where the first of them lies changes
from epoch to epoch by the golden ratio. So a sample of share 2.3 gets two or three draws of an epoch, and of many
epochs 2.3 times their number, but for a few draws. How many points fall on a cell (the samples of a shard in a bucket)
is known from the cells' ends alone, and how many fell on a bucket in all epochs before from a closed formula. Which
sample of a cell a point hits, the shard's own table tells (`training.data.index`).
"""

# S shards, K buckets

import itertools
from bisect import bisect_right
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

# Points on the line from one draw to the next, and by how many an epoch's first draw lies behind the last one's:
# neighbours of the Fibonacci numbers, whose ratio is the golden one. So each offset comes once in that many epochs.
UNITS, UNITS_PER_EPOCH = 102_334_155, 63_245_986
# In any number of epochs a stretch of the line gets less than so many draws more or fewer than its share: each of at
# most 20 runs of epochs, as long as Fibonacci numbers, adds at most two (Denjoy and Koksma).
MAX_DEVIATION = 64
# A place on the line of a cell is counted in so many parts of its length.
PLACES = 1 << 53
# Draws that a shard may have in an epoch, in samples of the largest shard. Where weights give one more, epochs are
# shorter: a block of shards stays small enough to be shuffled whole.
MAX_DRAWS_OF_SHARD = 8


class Epochs(Protocol):
    """What a stream of samples needs to know of its epochs.

    Attributes:
        length: draws of an epoch.
        num_shards, num_buckets: S, K.
    """

    length: int
    num_shards: int
    num_buckets: int

    def counts(self, epoch: int) -> np.ndarray:
        """Return the draws of an epoch by shard and bucket, [S, K]; sums to `length`."""
        ...

    def before(self, epoch: int) -> np.ndarray:
        """Return how often each bucket was drawn in all epochs before, [K]."""
        ...

    def epoch_at(self, bucket: int, position: int) -> int:
        """Return the epoch that has draw `position` of a bucket, counted over epochs."""
        ...

    def ordinals(self, epoch: int, bucket: int, shards: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return what draws `draws` of `shards` in a bucket hit, [n]: as `PlannedBatch.ordinals`."""
        ...


class EqualEpochs:
    """Each sample once an epoch. `counts` are the samples by shard and bucket, [S, K]."""

    def __init__(self, counts: ArrayLike) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self._bucket_sizes = self._counts.sum(axis=0)
        self.length = int(self._bucket_sizes.sum())
        self.num_shards, self.num_buckets = self._counts.shape

    def counts(self, epoch: int) -> np.ndarray:
        """Return the samples by shard and bucket, [S, K]."""
        return self._counts

    def before(self, epoch: int) -> np.ndarray:
        """Return how often each bucket was drawn in all epochs before, [K]."""
        return epoch * self._bucket_sizes

    def epoch_at(self, bucket: int, position: int) -> int:
        """Return the epoch that has draw `position` of a bucket, counted over epochs."""
        return position // int(self._bucket_sizes[bucket])

    def ordinals(self, epoch: int, bucket: int, shards: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return `draws`: the samples of a cell, one after the other."""
        return draws


class WeightedEpochs:
    """Each sample the floor or the ceiling of its share: `length` times its weight over the sum of all.

    Args:
        weights: sums of the samples' weights by shard and bucket, [S, K]; their sum is positive.
        length: draws of an epoch, see `epoch_length`.
        start: any number; decides where the first epoch's draws lie.
    """

    def __init__(self, weights: ArrayLike, *, length: int, start: int) -> None:
        cells = np.asarray(weights, dtype=np.float64)
        self.length = length
        self.num_shards, self.num_buckets = cells.shape
        self._start = start % UNITS
        # Where each cell ends on the line, bucket by bucket: exact, so that equal weights give equal stretches.
        whole = np.ldexp(cells.T.ravel(), PLACES.bit_length() - 1 - int(np.frexp(cells.max())[1]))
        ends = [0, *itertools.accumulate(np.rint(whole).astype(np.int64).tolist())]
        self._ends = np.array([end * length * UNITS // ends[-1] for end in ends], dtype=np.int64)
        self._bucket_ends = self._ends[:: self.num_shards].tolist()
        self._drawn = lru_cache(maxsize=4096)(self._count_before)

    def counts(self, epoch: int) -> np.ndarray:
        """Return the draws of an epoch by shard and bucket, [S, K]; sums to `length`."""
        draws = np.diff(self._draws_before(self._ends, epoch))
        return np.ascontiguousarray(draws.reshape(self.num_buckets, self.num_shards).T)

    def before(self, epoch: int) -> np.ndarray:
        """Return how often each bucket was drawn in all epochs before, [K]."""
        return np.array([self._drawn(bucket, epoch) for bucket in range(self.num_buckets)], dtype=np.int64)

    def epoch_at(self, bucket: int, position: int) -> int:
        """Return the epoch that has draw `position` of a bucket, counted over epochs."""
        size = self._bucket_ends[bucket + 1] - self._bucket_ends[bucket]
        first = max(0, (position - MAX_DEVIATION) * UNITS // size)
        last = (position + MAX_DEVIATION) * UNITS // size + 1
        later = range(first + 1, last + 1)
        return first + bisect_right(later, position, key=lambda epoch: self._drawn(bucket, epoch))

    def ordinals(self, epoch: int, bucket: int, shards: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return where on the lines of their cells the draws lie, in `PLACES` of the cell's length, [n]."""
        cells = bucket * self.num_shards + shards
        starts = self._ends[cells]
        sizes = self._ends[cells + 1] - starts
        points = (self._draws_before(starts, epoch) + draws) * UNITS + self._offset(epoch) - starts
        # In the middle of its unit, so that it is never where a stretch ends.
        return ((points + 0.5) / sizes * PLACES).astype(np.int64)

    def _offset(self, epoch: int) -> int:
        """Return where on the line the first draw of an epoch lies."""
        return (self._start + epoch * UNITS_PER_EPOCH) % UNITS

    def _draws_before(self, ends: np.ndarray, epoch: int) -> np.ndarray:
        """Return how many draws of an epoch lie before places on the line."""
        return (ends - self._offset(epoch) + UNITS - 1) // UNITS

    def _count_before(self, bucket: int, epoch: int) -> int:
        """Return the draws of a bucket in all epochs before."""
        start, end = self._bucket_ends[bucket : bucket + 2]
        return self._count_up_to(end, epoch) - self._count_up_to(start, epoch)

    def _count_up_to(self, end: int, num_epochs: int) -> int:
        """Return how many draws of so many epochs lie before a place on the line."""
        whole, rest = divmod(end, UNITS)
        # Epochs whose offset is below `rest` have one more.
        rounds = floor_sum(num_epochs, UNITS, factor=UNITS_PER_EPOCH, start=self._start)
        below = floor_sum(num_epochs, UNITS, factor=UNITS_PER_EPOCH, start=self._start - rest)
        return num_epochs * whole + rounds - below


def epoch_length(counts: ArrayLike, weights: ArrayLike) -> int:
    """Return the draws of an epoch of samples with weights.

    As many as there are samples, and fewer where one shard would have more than `MAX_DRAWS_OF_SHARD` times the samples
    of the largest.

    Args:
        counts: samples of a weight above zero, by shard and bucket, [S, K].
        weights: the sums of their weights, [S, K].
    """
    sizes = np.asarray(counts, dtype=np.int64).sum(axis=1)
    of_shards = np.asarray(weights, dtype=np.float64).sum(axis=1)
    most = MAX_DRAWS_OF_SHARD * int(sizes.max())
    return min(int(sizes.sum()), int(most * (of_shards.sum() / of_shards.max())))


def floor_sum(num: int, divisor: int, *, factor: int, start: int) -> int:
    """Return the sum of (factor * i + start) // divisor over i in range(num), in as many steps as Euclid takes."""
    total = 0
    while num > 0:
        total += num * (num - 1) // 2 * (factor // divisor) + num * (start // divisor)
        factor, start = factor % divisor, start % divisor
        num, start = divmod(factor * num + start, divisor)
        divisor, factor = factor, divisor
    return total
