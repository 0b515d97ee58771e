"""Epochs with weights: exact shares, independent of ranks, found from the step alone."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.epochs import MAX_DRAWS_OF_SHARD, WeightedEpochs, epoch_length, floor_sum
from training.data.index import ShardTable
from training.data.plan import Plan, PlannedBatch
from training.data.stream import SampleStream

Sample = tuple[int, int, int]
# Of each shard, the weights of the samples in each bucket.
Weights = list[list[np.ndarray]]


def tables_of(weights: Weights) -> list[ShardTable]:
    """Tables of shards as the index gives them: only of buckets that they have samples of."""
    tables = []
    for number, buckets in enumerate(weights):
        sizes = {f"{bucket}x8": len(each) for bucket, each in enumerate(buckets) if len(each)}
        num_samples = sum(sizes.values())
        tables.append(
            ShardTable(
                name=str(number),
                keys=np.arange(num_samples).astype(object),
                bucket_names=list(sizes),
                bucket_starts=np.cumsum([0, *sizes.values()]),
                labels=np.full(num_samples, -1),
                original_sizes=np.full((num_samples, 2), -1),
                families={},
                weights=np.concatenate(buckets),
            )
        )
    return tables


def counts_of(weights: Weights) -> np.ndarray:
    return np.array([[len(each) for each in buckets] for buckets in weights])


def sums_of(weights: Weights) -> np.ndarray:
    return np.array([[math.fsum(each) for each in buckets] for buckets in weights])


def plan_of(weights: Weights, *, batch_size: int = 12, seed: int = 3, shards_per_block: int = 2) -> Plan:
    return Plan(
        [counts_of(weights)],
        sample_weights=[sums_of(weights)],
        batch_size=batch_size,
        seed=seed,
        shards_per_block=shards_per_block,
    )


def found(tables: list[ShardTable], bucket: int, shards: np.ndarray, ordinals: np.ndarray) -> list[Sample]:
    """Which samples the ordinals mean: shard, bucket, number within both."""
    samples = []
    for shard, ordinal in zip(shards.tolist(), ordinals, strict=True):
        name = f"{bucket}x8"
        (place,) = tables[shard].find(name, np.array([ordinal]))
        samples.append((shard, bucket, int(place) - tables[shard].first_rows[name]))
    return samples


def samples_of(batch: PlannedBatch, tables: list[ShardTable]) -> list[Sample]:
    return found(tables, batch.bucket, batch.shards, batch.ordinals)


def drawn_in_epoch(weights: Weights, epoch: int) -> Counter[Sample]:
    """What one epoch of a dataset draws."""
    counts, sums, tables = counts_of(weights), sums_of(weights), tables_of(weights)
    epochs = WeightedEpochs(sums, length=epoch_length(counts, sums), start=12345)
    stream = SampleStream(epochs, number=0, seed=1, shards_per_block=2)
    drawn: Counter[Sample] = Counter()
    for bucket, (start, stop) in enumerate(zip(epochs.before(epoch), epochs.before(epoch + 1), strict=True)):
        if start < stop:
            drawn.update(found(tables, bucket, *stream.take(bucket, int(start), int(stop))))
    return drawn


def shares_of(weights: Weights) -> dict[Sample, float]:
    """How many draws of an epoch each sample should have."""
    sums = sums_of(weights)
    per_weight = epoch_length(counts_of(weights), sums) / math.fsum(sums.ravel())
    return {
        (shard, bucket, number): weight * per_weight
        for shard, buckets in enumerate(weights)
        for bucket, each in enumerate(buckets)
        for number, weight in enumerate(each.tolist())
    }


weight = st.one_of(st.floats(2**-7, 10.0, width=32), st.sampled_from([0.25, 1.0, 2.0]))
cell = st.lists(weight, max_size=6)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.lists(cell, min_size=3, max_size=3), min_size=1, max_size=5))
def test_an_epoch_draws_each_sample_by_its_share_rounded_up_or_down(cells: list[list[list[float]]]) -> None:
    weights = [[np.array(each) for each in buckets] for buckets in cells]
    if not counts_of(weights).sum():
        return
    shares, length = shares_of(weights), epoch_length(counts_of(weights), sums_of(weights))
    for epoch in (0, 1, 7):
        drawn = drawn_in_epoch(weights, epoch)
        assert drawn.total() == length
        for sample, share in shares.items():
            assert math.floor(share - 1e-5) <= drawn[sample] <= math.ceil(share + 1e-5)


def random_weights(*, seed: int = 0, num_shards: int = 5, largest: int = 30) -> Weights:
    """Weights over three decades; some cells have no samples."""
    random = np.random.default_rng(seed)
    return [
        [np.exp(random.normal(0, 1.5, size=max(0, int(random.integers(-5, largest))))) for _ in range(3)]
        for _ in range(num_shards)
    ]


def test_over_epochs_each_sample_is_drawn_as_often_as_its_share() -> None:
    weights, drawn = random_weights(), Counter[Sample]()
    shares = shares_of(weights)
    for epoch in range(200):
        drawn += drawn_in_epoch(weights, epoch)
        if epoch in (1, 20, 199):
            worst = max(abs(drawn[sample] - share * (epoch + 1)) for sample, share in shares.items())
            assert worst < 3, "by chance it would be 20 of 200 epochs"


@pytest.mark.parametrize("factor", [1.0, 0.1, 3.7e-5])
def test_equal_weights_are_no_weights(factor: float) -> None:
    """Batch for batch the same samples in the same order, whatever the weights' rounding."""
    weights = [[np.full_like(each, np.float32(factor)) for each in buckets] for buckets in random_weights()]
    plain = Plan([counts_of(weights)], batch_size=12, seed=3, shards_per_block=2)
    plan, tables = plan_of(weights), tables_of(weights)
    for step in range(80):
        batch = plain.batch(step)
        pairs = zip(batch.shards.tolist(), batch.ordinals.tolist(), strict=True)
        assert samples_of(plan.batch(step), tables) == [(shard, batch.bucket, ordinal) for shard, ordinal in pairs]


def test_any_step_is_found_without_the_steps_before_it() -> None:
    weights = random_weights()
    tables, plan = tables_of(weights), plan_of(weights)
    forward = [samples_of(plan.batch(step), tables) for step in range(60)]
    # Twelve steps are less than half an epoch: most of these begin inside one.
    assert forward[12:] == [samples_of(plan_of(weights).batch(step), tables) for step in range(12, 60)]
    assert forward != [samples_of(plan_of(weights, seed=4).batch(step), tables) for step in range(60)]


def test_whole_rounds_draw_what_their_epochs_draw() -> None:
    """What does not fill a batch is carried over from epoch to epoch, with weights as without."""
    weights = random_weights()
    tables, plan = tables_of(weights), plan_of(weights)
    num_rounds = 3 * plan._streams[0].num_blocks * 2
    num_steps = int(plan._batches_before(num_rounds).sum())
    drawn = Counter(sample for step in range(num_steps) for sample in samples_of(plan.batch(step), tables))
    length = epoch_length(counts_of(weights), sums_of(weights))
    assert 6 * length - 3 * 12 < drawn.total() <= 6 * length
    for sample, share in shares_of(weights).items():
        assert drawn[sample] < 6 * share + 3


def test_draws_of_all_former_epochs_are_counted_without_walking() -> None:
    epochs = WeightedEpochs(sums_of(random_weights()), length=200, start=98_765_432_109)
    total = np.zeros(3, dtype=np.int64)
    for epoch in range(500):
        assert (epochs.before(epoch) == total).all()
        total += epochs.counts(epoch).sum(axis=0)
    for bucket in range(3):
        for position in range(0, int(total[bucket]), 997):
            epoch = epochs.epoch_at(bucket, position)
            assert epochs.before(epoch)[bucket] <= position < epochs.before(epoch + 1)[bucket]


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 99), st.integers(-200, 200))
def test_floors_are_summed_in_closed_form(num: int, divisor: int, factor: int, start: int) -> None:
    expected = sum((factor * i + start) // divisor for i in range(num))
    assert floor_sum(num, divisor, factor=factor, start=start) == expected


def test_one_sample_of_a_million_times_the_weight_costs_no_more_than_others() -> None:
    weights = random_weights(num_shards=40)
    weights[7][1] = np.array([1e6 * sums_of(weights).max(), 1.0])
    sizes = counts_of(weights).sum(axis=1)
    length = epoch_length(counts_of(weights), sums_of(weights))
    assert length == MAX_DRAWS_OF_SHARD * sizes.max() < sizes.sum()
    drawn = drawn_in_epoch(weights, 0)
    assert drawn.total() == length and drawn[7, 1, 0] >= length - 1
    batch = plan_of(weights).batch(10_000)
    assert len(samples_of(batch, tables_of(weights))) == 12


def test_ten_million_samples_with_weights_need_neither_time_nor_memory() -> None:
    counts = np.full((1000, 40), 250)
    sums = np.random.default_rng(0).exponential(size=counts.shape)
    sums[5, 3] = 1e9
    plan = Plan([counts], sample_weights=[sums], batch_size=1024, seed=0, shards_per_block=16)
    for step in (0, 15_000, 10**9):
        assert len(plan.batch(step).shards) == 1024
    largest = max(permutation.ends[0] for permutation in map(plan._streams[0]._epoch, range(3)))
    assert largest <= MAX_DRAWS_OF_SHARD * 16 * 10_000


def test_datasets_with_and_without_weights_mix() -> None:
    weights, counts = random_weights(), np.array([[9, 20, 4], [7, 31, 0]])
    tables, first = tables_of(weights), len(random_weights())
    plan = Plan(
        [counts_of(weights), counts],
        weights=(3, 1),
        sample_weights=[sums_of(weights), None],
        batch_size=8,
        seed=0,
        shards_per_block=2,
    )
    drawn: list[Counter[Sample]] = [Counter(), Counter()]
    for step in range(400):
        batch = plan.batch(step)
        for shard, ordinal in zip(batch.shards, batch.ordinals, strict=True):
            if shard < first:
                drawn[0].update(found(tables, batch.bucket, np.array([shard]), np.array([ordinal])))
            else:
                drawn[1][int(shard) - first, batch.bucket, int(ordinal)] += 1
    assert drawn[0].total() == pytest.approx(3 * drawn[1].total(), rel=0.05)
    assert max(drawn[1].values()) - min(drawn[1].values()) <= 2
    num_epochs = drawn[0].total() / epoch_length(counts_of(weights), sums_of(weights))
    for sample, share in shares_of(weights).items():
        assert abs(drawn[0][sample] - share * num_epochs) < 3 + share
