"""Which times a stage trains at: spread over a batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from test_training_reader import batches_of, open_index, open_reader
from torch import Tensor
from training_run import make_run

from training.data.batch import Batch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("times"))


def stratified_batches(run: Path, *, num_steps: int, ranks: int = 1, num_micro_batches: int = 1) -> list[list[Batch]]:
    """The batches of each rank."""
    found = []
    for rank in range(ranks):
        reader = open_reader(
            open_index(run),
            steps=range(num_steps),
            rank=rank,
            num_ranks=ranks,
            num_micro_batches=num_micro_batches,
        )
        reader._assembler._is_stratified = True
        found.append(batches_of(reader))
    return found


def draws_of(batches: list[Batch], step: int) -> Tensor:
    return torch.cat([batch.timestep_draws for batch in batches if batch.step == step])


def test_each_batch_covers_the_times_evenly_in_an_order_of_its_own(run: Path) -> None:
    (batches,) = stratified_batches(run, num_steps=200)
    draws = torch.stack([draws_of(batches, step) for step in range(200)])  # [steps, 12]
    assert ((draws * 12).long().sort(1).values == torch.arange(12)).all(), "one in each twelfth"
    assert ((draws * 12) % 1).std(1).max() < 1e-9, "a grid"
    orders = (draws * 12).long()
    assert len({tuple(order) for order in orders.tolist()}) > 190
    for position in (0, 11):  # a sample's times are as likely as any
        assert stats.kstest(draws[:, position].numpy(), "uniform").pvalue > 1e-3
    mine = draws.mean(1).std()
    independent = draws.flatten()[torch.randperm(2400, generator=torch.Generator().manual_seed(0))].view(200, 12)
    assert mine < 0.4 * independent.mean(1).std()


def test_ranks_and_micro_batches_change_no_time_and_nothing_else_changes(run: Path) -> None:
    (whole,) = stratified_batches(run, num_steps=3)
    ranks = stratified_batches(run, num_steps=3, ranks=2, num_micro_batches=3)
    plain = batches_of(open_reader(open_index(run), steps=range(3)))
    for step in range(3):
        parts = torch.cat([draws_of(batches, step) for batches in ranks])
        assert torch.equal(draws_of(whole, step), parts)
        ours, theirs = whole[step], plain[step]
        assert not torch.equal(ours.timestep_draws, theirs.timestep_draws)
        same = replace(ours, timestep_draws=theirs.timestep_draws)
        assert same.keys == theirs.keys
        pairs = zip(same.device_tensors(), theirs.device_tensors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
