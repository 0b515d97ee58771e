"""The order of samples: exact epochs, independent of ranks, found from the step alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from training.data.plan import Plan, PlannedBatch

Sample = tuple[int, int, int]


def samples_of(batch: PlannedBatch) -> list[Sample]:
    pairs = zip(batch.shards.tolist(), batch.ordinals.tolist(), strict=True)
    return [(shard, batch.bucket, ordinal) for shard, ordinal in pairs]


def all_samples(counts: np.ndarray) -> set[Sample]:
    return {(shard, bucket, ordinal) for (shard, bucket), count in np.ndenumerate(counts) for ordinal in range(count)}


def rank_samples(plan: Plan, *, num_steps: int, num_ranks: int) -> list[Counter[Sample]]:
    """What each rank draws when it takes its stretch of every batch."""
    share = plan.batch_size // num_ranks
    ranks: list[Counter[Sample]] = [Counter() for _ in range(num_ranks)]
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
    plan = Plan([counts], batch_size=24, seed=3, shards_per_block=2)
    drawn = sum(rank_samples(plan, num_steps=24, num_ranks=num_ranks), Counter())
    assert drawn == Counter(dict.fromkeys(all_samples(counts), 3))
    first_epoch = sum(rank_samples(plan, num_steps=7, num_ranks=num_ranks), Counter())
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
    plan = Plan([table], batch_size=batch_size, seed=seed, shards_per_block=shards_per_block)
    num_epochs = 3
    num_steps = sum(num_epochs * int(size) // batch_size for size in table.sum(axis=0))
    drawn: Counter[Sample] = Counter()
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
    plan = Plan([counts], batch_size=8, seed=1, shards_per_block=2)
    forward = [samples_of(plan.batch(step)) for step in range(40)]
    fresh = [samples_of(Plan([counts], batch_size=8, seed=1, shards_per_block=2).batch(step)) for step in range(40)]
    backward = [samples_of(plan.batch(step)) for step in reversed(range(40))]
    other = [samples_of(Plan([counts], batch_size=8, seed=2, shards_per_block=2).batch(step)) for step in range(40)]
    assert forward == fresh == backward[::-1]
    assert forward != other
    # 60 samples are 7.5 batches: the second epoch starts inside batch 7, in another order.
    epochs = [sample for batch in forward for sample in batch]
    assert sorted(epochs[:60]) == sorted(epochs[60:120])
    assert epochs[:60] != epochs[60:120]


def test_samples_of_a_block_of_shards_mix() -> None:
    plan = Plan([np.full((8, 1), 100)], batch_size=50, seed=0, shards_per_block=4)
    shards_of_first_batches = [set(plan.batch(step).shards.tolist()) for step in range(8)]
    assert all(shards == shards_of_first_batches[0] for shards in shards_of_first_batches)
    assert len(shards_of_first_batches[0]) == 4


def test_a_hundred_million_samples_need_neither_time_nor_memory() -> None:
    counts = np.full((10_000, 40), 250)
    plan = Plan([counts], batch_size=178 * 64, seed=0, shards_per_block=16)
    batch = plan.batch(150_000)
    assert len(set(samples_of(batch))) == 178 * 64


def test_the_shards_around_a_step_are_those_of_its_block_and_the_next() -> None:
    plan = Plan([np.full((12, 1), 100)], batch_size=60, seed=0, shards_per_block=4)
    for step in range(0, 200, 7):
        around = set(plan.shards_around(step).tolist())
        assert 4 <= len(around) <= 8, "fewer than 8 where an epoch ends: the next may begin with the same shards"
        assert all(len(around & set(plan.batch(near).shards.tolist())) >= 4 for near in (step, step + 1))
    assert set(plan.batch(6).shards.tolist()) <= set(plan.shards_around(0).tolist()), "batch 6 crosses two blocks"


def test_no_samples_are_refused() -> None:
    with pytest.raises(UserError, match="no samples to train on in dataset 2 of 2"):
        Plan([[[3]], [[0]]], weights=(1, 1), batch_size=4, seed=0, shards_per_block=1)


# Two datasets of three buckets: the second lacks the first bucket, and its shards come in another mix of buckets.
MIXED = [np.array([[9, 20, 4], [7, 31, 0], [8, 11, 10]]), np.array([[0, 5, 40], [0, 25, 3]])]


def mixed_plan(weights: tuple[float, float], *, batch_size: int = 12, seed: int = 0) -> Plan:
    return Plan(MIXED, weights=weights, batch_size=batch_size, seed=seed, shards_per_block=2)


def drawn_by_dataset(batches: list[PlannedBatch]) -> tuple[list[Sample], list[Sample]]:
    """Samples in the order they are drawn, by dataset; the second one's shards are numbered from 0 again."""
    samples = [sample for batch in batches for sample in samples_of(batch)]
    first = len(MIXED[0])
    return (
        [sample for sample in samples if sample[0] < first],
        [(shard - first, bucket, ordinal) for shard, bucket, ordinal in samples if shard >= first],
    )


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_ranks_share_a_mixture_without_loss(num_ranks: int) -> None:
    plan = mixed_plan((0.7, 0.3), batch_size=24)
    whole = Counter(sample for step in range(60) for sample in samples_of(plan.batch(step)))
    assert sum(rank_samples(plan, num_steps=60, num_ranks=num_ranks), Counter()) == whole
    assert whole.total() == 60 * 24


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 4)])
def test_no_dataset_of_a_mixture_loses_or_repeats_a_sample_in_its_epoch(weights: tuple[float, float]) -> None:
    """At the end of a round a bucket's batches are the first of its stream: whole epochs, and the start of the next."""
    plan = mixed_plan(weights)
    for num_rounds in (1, 2, 7, 40):
        num_steps = int(plan._batches_before(num_rounds).sum())
        datasets = drawn_by_dataset([plan.batch(step) for step in range(num_steps)])
        for table, drawn in zip(MIXED, datasets, strict=True):
            for bucket in range(3):
                times = Counter(sample for sample in drawn if sample[1] == bucket)
                everything = [sample for sample in all_samples(table) if sample[1] == bucket]
                num_epochs, rest = divmod(times.total(), max(1, len(everything)))
                assert sorted(times[sample] for sample in everything) == sorted(
                    num_epochs + (i < rest) for i in range(len(everything))
                )


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=2), min_size=1, max_size=5),
    weights=st.tuples(st.sampled_from([0.05, 0.3, 1, 7]), st.sampled_from([0.1, 0.9, 3])),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_mixture_keeps_its_proportions(
    counts: list[list[int]], weights: tuple[float, float], batch_size: int, seed: int
) -> None:
    tables = [np.array(counts), np.array([[13, 0], [5, 29]])]
    if tables[0].sum() == 0:
        return
    plan = Plan(tables, weights=weights, batch_size=batch_size, seed=seed, shards_per_block=2)
    num_steps = 200
    num_first = sum(int((plan.batch(step).shards < len(counts)).sum()) for step in range(num_steps))
    share = weights[0] / sum(weights)
    # Off by what waits in the two buckets for its batch to fill, and by one round, whose batches are shuffled.
    largest_block = max(2 * 60 * 5, 47) * max(1.0, sum(weights) / max(weights))
    assert abs(num_first - share * num_steps * batch_size) <= 2 * batch_size + largest_block


def test_every_batch_of_a_mixture_has_its_proportions() -> None:
    plan = Plan(
        [np.full((4, 1), 500), np.full((9, 1), 70)], weights=(0.7, 0.3), batch_size=100, seed=1, shards_per_block=2
    )
    counts = [int((plan.batch(step).shards >= 4).sum()) for step in range(500)]
    assert set(counts) <= {28, 29, 30, 31, 32}
    assert abs(sum(counts) - 0.3 * 500 * 100) <= 2
    # Ten thousand steps on, nothing has drifted: the weights are taken as the decimals they are written as.
    far = [int((plan.batch(step).shards >= 4).sum()) for step in range(1_000_000, 1_000_100)]
    assert abs(sum(far) - 3000) <= 3


def test_a_step_of_a_mixture_is_found_without_those_before() -> None:
    forward = [samples_of(mixed_plan((0.7, 0.3)).batch(step)) for step in range(60)]
    plan = mixed_plan((0.7, 0.3))
    assert [samples_of(plan.batch(step)) for step in reversed(range(60))] == forward[::-1]
    assert samples_of(mixed_plan((0.7, 0.3), seed=1).batch(0)) != forward[0]
    assert samples_of(mixed_plan((0.6, 0.4)).batch(20)) != forward[20]
    assert all(len({bucket for _, bucket, _ in batch}) == 1 for batch in forward)
