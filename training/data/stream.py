"""One dataset's samples, epoch after epoch: an endless stream for each bucket, found anywhere without walking to it.

In every epoch the shards are shuffled and cut into blocks; inside a block the draws of each bucket are shuffled. How
often an epoch draws each sample, `training.data.epochs` says: once, or by its weight.
"""

# S shards, K buckets

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from training.data.epochs import Epochs

SHARD_ORDER, BATCH_ORDER, SAMPLE_ORDER = range(3)
NUM_ORDERS = 3


def shuffled(seed: int, purpose: int, *, epoch: int, block: int, bucket: int, size: int) -> np.ndarray:
    """Return a permutation of range(size) that depends on the arguments alone."""
    # Raw Philox words are the same in every version of numpy; Generator.permutation need not be.
    words = np.random.Philox(key=[seed, purpose], counter=[0, bucket, block, epoch]).random_raw(size)
    return np.argsort(words, kind="stable")


def first_offset(seed: int, number: int) -> int:
    """Return where the draws of the first epoch of dataset `number` of a mixture lie, of one with weights."""
    # The order of shards has a bucket of 0, and no other.
    return int(np.random.Philox(key=[seed, SHARD_ORDER + NUM_ORDERS * number], counter=[0, 1, 0, 0]).random_raw())


class _Epoch(NamedTuple):
    """Layout of an epoch.

    Draws by shard and bucket [S, K], shard order [S], and after each block the draws so far by bucket [blocks, K] and
    in all.
    """

    counts: np.ndarray
    shard_order: np.ndarray
    bucket_ends: np.ndarray
    ends: np.ndarray


class SampleStream:
    """Gives any stretch of a dataset's bucket streams.

    Args:
        epochs: how often each epoch draws which samples; at least one.
        number: of the dataset in its mixture; datasets of one seed are shuffled differently.
        seed: decides the order.
        shards_per_block: shards among whose samples are shuffled.
    """

    def __init__(self, epochs: Epochs, *, number: int, seed: int, shards_per_block: int) -> None:
        self.epochs = epochs
        self.num_samples = epochs.length
        self.num_blocks = -(-epochs.num_shards // shards_per_block)
        self._seed = seed
        self._purpose_offset = NUM_ORDERS * number
        self._shards_per_block = shards_per_block
        self._epoch = lru_cache(maxsize=4)(self._lay_out_epoch)
        self._permutation = lru_cache(maxsize=256)(self._shuffle)

    def samples_in_blocks(self, num_blocks: int) -> int:
        """Return the number of samples in the first `num_blocks` blocks, counted over epochs."""
        epoch, block = divmod(num_blocks, self.num_blocks)
        return epoch * self.num_samples + (int(self._epoch(epoch).ends[block - 1]) if block else 0)

    def progress(self, num_samples: int) -> np.ndarray:
        """Return how far each bucket's stream has come when `num_samples` of the dataset are drawn, [K].

        Inside a block its buckets advance side by side. Sums to `num_samples` at the end of a block; in between it
        may fall short by less than K.
        """
        epoch, rest = divmod(num_samples, self.num_samples)
        if rest == 0:
            return self.epochs.before(epoch)
        layout = self._epoch(epoch)
        block = int(np.searchsorted(layout.ends, rest, side="right"))
        before = layout.bucket_ends[block - 1] if block else np.zeros_like(layout.bucket_ends[0])
        start = int(layout.ends[block - 1]) if block else 0
        size = int(layout.ends[block]) - start
        return self.epochs.before(epoch) + before + (layout.bucket_ends[block] - before) * (rest - start) // size

    def take(self, bucket: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return samples [start, stop) of a bucket's stream: their shards, and their ordinals as in a planned batch.

        The stretch may cross blocks and epochs.
        """
        shards, ordinals = [], []
        while start < stop:
            epoch_index = self.epochs.epoch_at(bucket, start)
            rest = start - int(self.epochs.before(epoch_index)[bucket])
            epoch = self._epoch(epoch_index)
            block = int(np.searchsorted(epoch.bucket_ends[:, bucket], rest, side="right"))
            end = int(epoch.bucket_ends[block, bucket])
            first = int(epoch.bucket_ends[block - 1, bucket]) if block else 0
            num_taken = min(stop - start, end - rest)
            permutation = self._permutation(SAMPLE_ORDER, epoch_index, block, bucket, end - first)
            chosen = permutation[rest - first : rest - first + num_taken]
            block_shards = self._block_shards(epoch, block)
            sizes = epoch.counts[block_shards, bucket]
            shard_ends = np.cumsum(sizes)
            position = np.searchsorted(shard_ends, chosen, side="right")
            shards.append(block_shards[position])
            draws = chosen - (shard_ends - sizes)[position]
            ordinals.append(self.epochs.ordinals(epoch_index, bucket, shards[-1], draws))
            start += num_taken
        return np.concatenate(shards), np.concatenate(ordinals)

    def shards_between(self, start: int, stop: int) -> np.ndarray:
        """Return the shards of all blocks that samples [start, stop) of the dataset lie in."""
        shards = []
        while start < stop:
            epoch_index, rest = divmod(start, self.num_samples)
            epoch = self._epoch(epoch_index)
            block = int(np.searchsorted(epoch.ends, rest, side="right"))
            shards.append(self._block_shards(epoch, block))
            start += int(epoch.ends[block]) - rest
        return np.unique(np.concatenate(shards)) if shards else np.zeros(0, dtype=np.int64)

    def _block_shards(self, epoch: _Epoch, block: int) -> np.ndarray:
        return epoch.shard_order[block * self._shards_per_block : (block + 1) * self._shards_per_block]

    def _lay_out_epoch(self, epoch: int) -> _Epoch:
        counts = self.epochs.counts(epoch)
        order = self._shuffle(SHARD_ORDER, epoch, 0, 0, len(counts))
        starts = np.arange(0, len(order), self._shards_per_block)
        bucket_ends = np.cumsum(np.add.reduceat(counts[order], starts, axis=0), axis=0)
        return _Epoch(counts, order, bucket_ends, bucket_ends.sum(axis=1))

    def _shuffle(self, purpose: int, epoch: int, block: int, bucket: int, size: int) -> np.ndarray:
        number = purpose + self._purpose_offset
        return shuffled(self._seed, number, epoch=epoch, block=block, bucket=bucket, size=size)
