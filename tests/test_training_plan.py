"""The order of samples: exact epochs, independent of ranks, found from the step alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.plan import Plan, PlannedBatch


def samples_of(batch: PlannedBatch) -> list[tuple[int, int, int]]:
    pairs = zip(batch.shards.tolist(), batch.ordinals.tolist(), strict=True)
    return [(shard, batch.bucket, ordinal) for shard, ordinal in pairs]


def all_samples(counts: np.ndarray) -> set[tuple[int, int, int]]:
    return {(shard, bucket, ordinal) for (shard, bucket), count in np.ndenumerate(counts) for ordinal in range(count)}


def rank_samples(plan: Plan, *, num_steps: int, num_ranks: int) -> list[Counter[tuple[int, int, int]]]:
    """What each rank draws when it takes its stretch of every batch."""
    share = plan.batch_size // num_ranks
    ranks: list[Counter[tuple[int, int, int]]] = [Counter() for _ in range(num_ranks)]
    for step in range(num_steps):
        samples = samples_of(plan.batch(step))
        for rank in range(num_ranks):
            ranks[rank].update(samples[rank * share : (rank + 1) * share])
    return ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_shards", [1, 5])
def test_every_epoch_draws_every_sample_once(num_ranks: int, num_shards: int) -> None:
    # 24 steps of 24 are three whole epochs of both buckets, though neither fills whole batches in one epoch.
    counts = np.zeros((num_shards, 2), dtype=np.int64)
    counts[0] = [40, 152]
    for shard in range(1, num_shards):
        counts[0] -= [6 + shard, 20 + shard]
        counts[shard] = [6 + shard, 20 + shard]
    plan = Plan(counts, batch_size=24, seed=3, shards_per_block=2)
    drawn = sum(rank_samples(plan, num_steps=24, num_ranks=num_ranks), Counter())
    assert drawn == Counter(dict.fromkeys(all_samples(counts), 3))
    first_epoch = sum(rank_samples(plan, num_steps=7, num_ranks=num_ranks), Counter())
    assert plan.epoch_of(6) == 0
    assert plan.epoch_of(7) == 1
    assert max(first_epoch.values()) == 1
    assert len(first_epoch) == 7 * 24, "what does not fill a batch is carried over, not drawn twice"


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=6),
    batch_size=st.integers(1, 12),
    shards_per_block=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_counts_never_differ_by_more_than_what_is_carried_over(
    counts: list[list[int]], batch_size: int, shards_per_block: int, seed: int
) -> None:
    table = np.array(counts)
    if table.sum() == 0:
        return
    plan = Plan(table, batch_size=batch_size, seed=seed, shards_per_block=shards_per_block)
    num_epochs = 3
    num_steps = sum(num_epochs * int(size) // batch_size for size in table.sum(axis=0))
    drawn: Counter[tuple[int, int, int]] = Counter()
    for step in range(num_steps):
        batch = plan.batch(step)
        assert len(batch.shards) == batch_size
        drawn.update(samples_of(batch))
    assert drawn.keys() <= all_samples(table)
    for bucket, size in enumerate(table.sum(axis=0).tolist()):
        missing = [num_epochs - drawn[sample] for sample in all_samples(table) if sample[1] == bucket]
        # After whole epochs nothing was drawn too often, and less than a batch of each bucket is still to come.
        assert all(lack >= 0 for lack in missing)
        assert sum(missing) == num_epochs * size % batch_size


def test_order_depends_on_the_seed_and_on_nothing_but_the_step() -> None:
    counts = np.array([[30], [20], [10]])
    plan = Plan(counts, batch_size=8, seed=1, shards_per_block=2)
    forward = [samples_of(plan.batch(step)) for step in range(40)]
    fresh = [samples_of(Plan(counts, batch_size=8, seed=1, shards_per_block=2).batch(step)) for step in range(40)]
    backward = [samples_of(plan.batch(step)) for step in reversed(range(40))]
    other = [samples_of(Plan(counts, batch_size=8, seed=2, shards_per_block=2).batch(step)) for step in range(40)]
    assert forward == fresh == backward[::-1]
    assert forward != other
    # 60 samples are 7.5 batches: the second epoch starts inside batch 7, in another order.
    epochs = [sample for batch in forward for sample in batch]
    assert sorted(epochs[:60]) == sorted(epochs[60:120])
    assert epochs[:60] != epochs[60:120]


def test_samples_of_a_block_of_shards_mix() -> None:
    plan = Plan(np.full((8, 1), 100), batch_size=50, seed=0, shards_per_block=4)
    shards_of_first_batches = [set(plan.batch(step).shards.tolist()) for step in range(8)]
    assert all(shards == shards_of_first_batches[0] for shards in shards_of_first_batches)
    assert len(shards_of_first_batches[0]) == 4


def test_a_hundred_million_samples_need_neither_time_nor_memory() -> None:
    counts = np.full((10_000, 40), 250)
    plan = Plan(counts, batch_size=178 * 64, seed=0, shards_per_block=16)
    batch = plan.batch(150_000)
    assert plan.num_samples == 100_000_000
    assert plan.epoch_of(150_000) == 150_000 * 178 * 64 // plan.num_samples
    assert len(set(samples_of(batch))) == 178 * 64


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Plan(np.zeros((3, 2), dtype=np.int64), batch_size=4, seed=0, shards_per_block=1)
