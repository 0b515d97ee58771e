"""Which times a stage trains at: spread over a batch, and how likely ddpm's are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from test_training_features import open_job
from test_training_reader import batches_of, open_index, open_reader
from torch import Tensor
from training_run import make_run

from errors import UserError
from pipelines.recipe import load_recipe
from pixart.processes.ddpm import DDPM
from pixart.processes.make import process_of
from pixart.processes.specs import ddpm_spec
from training.config import stage_training
from training.data.batch import Batch
from training.data.batches import training_reader
from training.data.stage_data import survey_stage


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
    assert ((draws * 12) % 1).std(1).min() > 0.05, (
        "each at a place of its own, of which objectives take further numbers"
    )
    orders = (draws * 12).long()
    assert len({tuple(order) for order in orders.tolist()}) > 190
    for position in (0, 11):  # a sample's times are as likely as any
        assert stats.kstest(draws[:, position].numpy(), "uniform").pvalue > 1e-3
    mine = draws.mean(1).std()
    independent = draws.flatten()[torch.randperm(2400, generator=torch.Generator().manual_seed(0))].view(200, 12)
    assert mine < 0.4 * independent.mean(1).std()


def test_the_setting_reaches_the_reader_of_a_stage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    for setting, is_even in (("stratified", True), ("independent", False)):
        job = open_job(run, f"training.timestep_sampling={setting}", "training.stage2.num_steps=3")
        batches = batches_of(training_reader(job, survey_stage(job)))
        strata = [(draws_of(batches, step) * len(draws_of(batches, step))).long().sort().values for step in range(3)]
        assert all(torch.equal(each, torch.arange(len(each))) for each in strata) is is_even


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


GRID = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000


@pytest.mark.parametrize("is_weighted", [False, True])
def test_timesteps_of_ddpm_are_as_likely_as_their_logits(is_weighted: bool) -> None:
    process = DDPM(times_density={"logit_mean": 0.5, "logit_std": 0.8, "is_weighted": is_weighted})
    counts = torch.bincount(process.times(GRID), minlength=1000).double() / len(GRID)
    edges = torch.arange(1001, dtype=torch.float64) / 1000
    normal = torch.from_numpy(stats.norm(0.5, 0.8).cdf(edges.logit().numpy())).diff()
    expected = 0.9 * normal + 1e-4 if is_weighted else normal
    assert (counts - expected).abs().max() < 2e-6
    ends = process.times(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist()
    assert 0 <= ends[0] <= ends[1] <= 999


def test_importance_weights_keep_the_objective_and_are_at_most_ten() -> None:
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).expand(1000, 2, 4, 4)
    output = torch.cat([0.9 * noise, torch.zeros_like(noise)], 1)
    times = torch.arange(1000)

    def losses(**density: object) -> Tensor:
        process = DDPM(times_density={"logit_mean": -0.5, "logit_std": 1.2, **density} if density else None)
        return process.loss(output, noise, noise, times).total.double()

    plain, weighted = losses(), losses(is_weighted=True)
    assert torch.equal(losses(is_weighted=False), plain), "without weights a sample's loss is what it was"
    assert (weighted / plain).max() <= 10.001 and (weighted / plain).min() < 0.9
    process = DDPM(times_density={"logit_mean": -0.5, "logit_std": 1.2, "is_weighted": True})
    assert weighted[process.times(GRID)].mean() == pytest.approx(float(plain.mean()), rel=1e-4)


def test_densities_stand_in_specs_and_fingerprints_where_there_is_one(run: Path) -> None:
    def settings(*typed: str):
        return stage_training(load_recipe(run.parent / "recipe.toml", list(typed)), "stage2")

    plain, other = settings(), settings("training.ddpm_logit_std=0.8", "training.ddpm_importance_weights=true")
    assert plain.process_spec == ddpm_spec() and "times_density" not in plain.process_spec
    assert not any(name.startswith(("ddpm_", "timestep_sampling")) for name in plain.fingerprint_fields())
    assert other.process_spec["times_density"] == {"logit_mean": 0.0, "logit_std": 0.8, "is_weighted": True}
    assert process_of(other.process_spec).spec == other.process_spec
    assert other.fingerprint_fields()["ddpm_logit_std"] == 0.8
    shared = settings("training.ddpm_logit_std=0.8", "training.process=flow")
    assert "ddpm_logit_std" not in shared.fingerprint_fields() and "times_density" not in shared.process_spec
    with pytest.raises(UserError, match=r"ddpm_logit_std = 0\.8 is for process ddpm, but the stage's is 'flow'"):
        settings("training.stage2.ddpm_logit_std=0.8", "training.process=flow")
