"""The order of all samples: a pure function of (counts, weights, seed, step), the same for any number of ranks.

Every dataset has an endless stream of samples for each bucket (`SampleStream`). Time goes in rounds: a round ends where
the dataset of the largest weight ends a block, and by then every other dataset has been drawn in proportion to its
weight. In a round each bucket gets the next samples of all datasets, evenly interleaved: that is the bucket's own
endless stream, and its batch k is samples [k*B, (k+1)*B) of it. A batch takes its turn in the round where its last
sample lies; within a round the buckets' batches are shuffled. What does not fill a batch is therefore carried over to
the next round, block and epoch: no sample is lost or drawn twice in an epoch of its dataset. All of this follows from
the number of samples per shard and bucket, so any step is found without walking to it.

Where samples have weights, an epoch of their dataset draws each as often as its share of it says, rounded up or down,
and over epochs as often as that share (`training.data.epochs`). Then all follows from the sums of weights per shard and
bucket, and which sample a draw hits from the weights in its shard.
"""

# S shards, K buckets, M datasets, B samples in a global batch

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from errors import UserError
from training.data.epochs import Epochs, EqualEpochs, WeightedEpochs, epoch_length
from training.data.stream import BATCH_ORDER, SampleStream, first_offset, shuffled


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: sample i is the `ordinals[i]`-th sample of `bucket` in shard `shards[i]`, in index order.

    Of a dataset whose samples have weights it is the one on whose stretch of the shard's line in that bucket place
    `ordinals[i]` of `PLACES` lies; `ShardTable.find` looks it up. Shards are numbered through all datasets: those of
    the first, then those of the second, and so on.
    """

    step: int
    bucket: int
    shards: np.ndarray
    ordinals: np.ndarray


class Plan:
    """Gives the samples of any step.

    Args:
        counts: of each dataset, the number of samples by shard and bucket, [S, K]; K is the same for all.
        weights: share of each dataset in the samples drawn, relative to the others'; the decimal that is written is
            what counts, so 0.3 is 3/10.
        sample_weights: of each dataset whose samples have weights, their sums by shard and bucket, [S, K]; None of the
            others.
        batch_size: samples in a global batch, over all ranks and gradient accumulation.
        seed: decides the order.
        shards_per_block: shards of a dataset among whose samples are shuffled; more mix better and keep more tars open.

    Raises:
        UserError: a dataset has no samples.
    """

    def __init__(
        self,
        counts: Sequence[ArrayLike],
        *,
        weights: Sequence[float] = (1.0,),
        sample_weights: Sequence[ArrayLike | None] | None = None,
        batch_size: int,
        seed: int,
        shards_per_block: int,
    ) -> None:
        assert len(counts) == len(weights)
        self.batch_size = batch_size
        self._seed = seed
        for number, table in enumerate(counts):
            if not np.any(table):
                raise UserError(f"there are no samples to train on in dataset {number + 1} of {len(counts)}")
        pairs = zip(counts, sample_weights or [None] * len(counts), strict=True)
        self._streams = [
            SampleStream(
                _epochs(*pair, seed=seed, number=number), number=number, seed=seed, shards_per_block=shards_per_block
            )
            for number, pair in enumerate(pairs)
        ]
        sizes = [stream.epochs.num_shards for stream in self._streams]
        self._first_shards = np.cumsum([0, *sizes[:-1]])
        exact = [Fraction(str(weight)) for weight in weights]
        self._pacer = exact.index(max(exact))
        self._paces = [weight / exact[self._pacer] for weight in exact]
        self._ends = lru_cache(maxsize=1024)(self._count_round)
        self._steps_before = lru_cache(maxsize=1024)(self._count_steps)
        self._order = lru_cache(maxsize=64)(self._interleave)

    def batch(self, step: int) -> PlannedBatch:
        """Return the samples of `step`, counted from 0."""
        number = self._round_of(step)
        starts, ends = self._batches_before(number), self._batches_before(number + 1)
        # The batches that this round completes, bucket by bucket; the step takes one of them in shuffled order.
        cumulative = np.cumsum(ends - starts)
        epoch, block = divmod(number, self._streams[self._pacer].num_blocks)
        order = shuffled(self._seed, BATCH_ORDER, epoch=epoch, block=block, bucket=0, size=int(cumulative[-1]))
        index = int(order[step - self._steps_before(number)])
        bucket = int(np.searchsorted(cumulative, index, side="right"))
        start = int(ends[bucket] - (cumulative[bucket] - index)) * self.batch_size
        parts = list(self._stretches(bucket, start, start + self.batch_size, last=number))
        shards, ordinals = zip(*parts, strict=True)
        return PlannedBatch(step, bucket, np.concatenate(shards), np.concatenate(ordinals))

    def shards_around(self, step: int) -> np.ndarray:
        """Return the shards, of all datasets, of the round of `step` and the next: one batch may draw from both."""
        number = self._round_of(step)
        pairs = zip(self._drawn(number), self._drawn(number + 2), strict=True)
        found = [stream.shards_between(*pair) for stream, pair in zip(self._streams, pairs, strict=True)]
        return np.concatenate([shards + first for shards, first in zip(found, self._first_shards, strict=True)])

    def _round_of(self, step: int) -> int:
        """Return the round that completes the batch of `step`."""
        pacer = self._streams[self._pacer]
        share = 1 / sum(self._paces)
        num_buckets = pacer.epochs.num_buckets
        # At least this many samples are drawn by then, and at most so many more wait for their batch to fill.
        fewest = step * self.batch_size
        most = (step + 1 + num_buckets) * self.batch_size + len(self._streams) * (num_buckets + 1)
        first = int(fewest * share) // pacer.num_samples * pacer.num_blocks
        last = (int(most * share) // pacer.num_samples + 1) * pacer.num_blocks
        rounds = range(first + 1, last + 1)
        return first + bisect_right(rounds, step, key=self._steps_before)

    def _drawn(self, number: int) -> list[int]:
        """Return how many samples of each dataset are drawn before round `number`."""
        paced = self._streams[self._pacer].samples_in_blocks(number)
        return [int(paced * pace) for pace in self._paces]

    def _count_round(self, number: int) -> np.ndarray:
        """Return how many samples of each dataset each bucket has got before round `number`, [M, K]."""
        pairs = zip(self._streams, self._drawn(number), strict=True)
        return np.stack([stream.progress(num_samples) for stream, num_samples in pairs])

    def _batches_before(self, number: int) -> np.ndarray:
        return self._ends(number).sum(axis=0) // self.batch_size

    def _count_steps(self, number: int) -> int:
        return int(self._batches_before(number).sum())

    def _stretches(self, bucket: int, start: int, stop: int, *, last: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield samples [start, stop) of the bucket's stream, round by round up to round `last`, which has the end."""
        first = 0
        while start < stop:
            # The round in which the bucket's stream gets its sample `start`; usually the last one or the one before.
            recent = max(first, last - 1)
            first = recent if self._size(bucket, recent) <= start else first
            number = first + bisect_right(
                range(first + 1, last + 1), start, key=lambda number: self._size(bucket, number)
            )
            before = self._size(bucket, number)
            end = min(stop, self._size(bucket, number + 1))
            yield self._take(number, bucket, start - before, end - before)
            start, first = end, number + 1

    def _size(self, bucket: int, number: int) -> int:
        return int(self._ends(number)[:, bucket].sum())

    def _take(self, number: int, bucket: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return places [start, stop) of what the bucket gets in a round."""
        order = self._order(number, bucket)
        chosen = order[start:stop]
        shards, ordinals = np.empty(len(chosen), dtype=np.int64), np.empty(len(chosen), dtype=np.int64)
        for dataset in np.unique(chosen).tolist():
            is_its = chosen == dataset
            first = int(self._ends(number)[dataset, bucket]) + int(np.count_nonzero(order[:start] == dataset))
            found = self._streams[dataset].take(bucket, first, first + int(is_its.sum()))
            shards[is_its] = found[0] + self._first_shards[dataset]
            ordinals[is_its] = found[1]
        return shards, ordinals

    def _interleave(self, number: int, bucket: int) -> np.ndarray:
        """Return the dataset of each sample a bucket gets in a round: sample i of n stands at (i + 1/2) / n."""
        sizes = (self._ends(number + 1) - self._ends(number))[:, bucket]
        places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes.tolist() if size])
        return np.repeat(np.arange(len(sizes)), sizes)[np.argsort(places, kind="stable")]


def _epochs(counts: ArrayLike, weights: ArrayLike | None, *, seed: int, number: int) -> Epochs:
    """Return how often epochs of dataset `number` draw its samples."""
    if weights is None:
        return EqualEpochs(counts)
    return WeightedEpochs(weights, length=epoch_length(counts, weights), start=first_offset(seed, number))
