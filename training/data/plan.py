"""The order of all samples: a pure function of (counts, seed, step), the same for any number of ranks and workers.

Epoch after epoch the shards are shuffled and cut into blocks; inside a block the samples of each bucket are shuffled.
So every bucket has one endless stream of samples, and its batch k is samples [k*B, (k+1)*B) of the stream. A batch
takes its turn in the block where its last sample lies; within a block the buckets' batches are shuffled. What does
not fill a batch at the end of a block or of an epoch is therefore carried over: in every epoch each sample is drawn
exactly once. All of this follows from the number of samples per shard and bucket, so any step is found without
walking to it.
"""

# S shards, K buckets, B samples in a global batch

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

SHARD_ORDER, BATCH_ORDER, SAMPLE_ORDER = range(3)


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: sample i is the `ordinals[i]`-th sample of `bucket` in shard `shards[i]`, in index order."""

    step: int
    bucket: int
    shards: np.ndarray
    ordinals: np.ndarray


class _Epoch(NamedTuple):
    """Layout of an epoch: shard order [S], and after each block the bucket totals [blocks, K] and steps [blocks]."""

    shard_order: np.ndarray
    bucket_ends: np.ndarray
    step_ends: np.ndarray


class Plan:
    """Gives the samples of any step.

    Args:
        counts: number of samples by shard and bucket, [S, K].
        batch_size: samples in a global batch, over all ranks and gradient accumulation.
        seed: decides the order.
        shards_per_block: shards among whose samples are shuffled; more mix better and keep more tars open.

    Raises:
        ValueError: there are no samples.
    """

    def __init__(self, counts: ArrayLike, *, batch_size: int, seed: int, shards_per_block: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.shards_per_block = shards_per_block
        self.bucket_sizes = self.counts.sum(axis=0)
        self.num_samples = int(self.bucket_sizes.sum())
        if self.num_samples == 0:
            raise ValueError("there are no samples to train on")
        self._epoch = lru_cache(maxsize=4)(self._lay_out_epoch)
        self._permutation = lru_cache(maxsize=256)(self._shuffle)

    @property
    def steps_per_epoch(self) -> float:
        """Average number of steps that draw every sample once."""
        return self.num_samples / self.batch_size

    def batch(self, step: int) -> PlannedBatch:
        """Return the samples of `step`, counted from 0."""
        epoch_index = self.epoch_of(step)
        epoch = self._epoch(epoch_index)
        block = int(np.searchsorted(epoch.step_ends, step, side="right"))
        ends = epoch.bucket_ends[block] // self.batch_size
        previous = epoch.bucket_ends[block - 1] if block else epoch_index * self.bucket_sizes
        starts = previous // self.batch_size
        # The batches that this block completes, bucket by bucket; the step takes one of them in shuffled order.
        order = self._permutation(BATCH_ORDER, epoch_index, block, 0, int((ends - starts).sum()))
        index = int(order[step - int(starts.sum())])
        cumulative = np.cumsum(ends - starts)
        bucket = int(np.searchsorted(cumulative, index, side="right"))
        batch_of_bucket = int(ends[bucket] - (cumulative[bucket] - index))
        return self._gather(step, bucket, batch_of_bucket * self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Return the epoch in which the last sample of `step` is drawn."""
        epoch = max(0, step * self.batch_size // self.num_samples - 1)
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def _steps_before(self, epoch: int) -> int:
        return int((epoch * self.bucket_sizes // self.batch_size).sum())

    def _gather(self, step: int, bucket: int, start: int) -> PlannedBatch:
        """Collect samples [start, start + B) of the bucket's stream, which may cross blocks and epochs."""
        shards, ordinals = [], []
        for part_shards, part_ordinals in self._stretches(bucket, start, start + self.batch_size):
            shards.append(part_shards)
            ordinals.append(part_ordinals)
        return PlannedBatch(step, bucket, np.concatenate(shards), np.concatenate(ordinals))

    def _stretches(self, bucket: int, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while start < stop:
            epoch_index = start // int(self.bucket_sizes[bucket])
            epoch = self._epoch(epoch_index)
            block = int(np.searchsorted(epoch.bucket_ends[:, bucket], start, side="right"))
            end = int(epoch.bucket_ends[block, bucket])
            block_shards = epoch.shard_order[block * self.shards_per_block : (block + 1) * self.shards_per_block]
            sizes = self.counts[block_shards, bucket]
            first = end - int(sizes.sum())
            permutation = self._permutation(SAMPLE_ORDER, epoch_index, block, bucket, end - first)
            chosen = permutation[start - first : min(stop, end) - first]
            shard_ends = np.cumsum(sizes)
            position = np.searchsorted(shard_ends, chosen, side="right")
            yield block_shards[position], chosen - (shard_ends - sizes)[position]
            start = min(stop, end)

    def _lay_out_epoch(self, epoch: int) -> _Epoch:
        order = self._shuffle(SHARD_ORDER, epoch, 0, 0, len(self.counts))
        starts = np.arange(0, len(order), self.shards_per_block)
        per_block = np.add.reduceat(self.counts[order], starts, axis=0)
        bucket_ends = epoch * self.bucket_sizes + np.cumsum(per_block, axis=0)
        return _Epoch(order, bucket_ends, (bucket_ends // self.batch_size).sum(axis=1))

    def _shuffle(self, purpose: int, epoch: int, block: int, bucket: int, size: int) -> np.ndarray:
        # Raw Philox words are the same in every version of numpy; Generator.permutation need not be.
        words = np.random.Philox(key=[self.seed, purpose], counter=[0, bucket, block, epoch]).random_raw(size)
        return np.argsort(words, kind="stable")
