"""DreamBooth's objective: what it minimises, which samples are what, and what of a recipe is refused."""

from pathlib import Path

import pytest
import torch
from test_training_objective import DRAWS, SCALE, SHIFT, Recorder, make_batch
from test_training_reader import open_reader
from training_run import arguments, make_run, metrics, train

from errors import MissingFileError, UserError
from pipelines.command import parse_command
from pixart.processes.ddpm import DDPM
from training.config import stage_training
from training.data.datasets import Dataset
from training.data.index import FeatureIndex
from training.data.stage_data import survey_stage
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Frozen, Trained
from training.objectives.prior_preservation import PriorPreservation, prior_share
from training.stages.stage import TrainingJob, open_stage

INSTANCE, PRIOR = 'shards = ["laion_0"], weight = 1', 'shards = ["laion_1"], weight = 3, role = "prior"'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def command_line(run: Path, *datasets: str, objective: str = "prior_preservation", extra: str = "") -> list[str]:
    tables = ", ".join("{" + dataset + "}" for dataset in datasets)
    settings = [f"training.stage2.datasets=[{tables}]", f"training.stage2.objective={objective}", extra]
    flags = [flag for setting in settings if setting for flag in ("--set", setting)]
    return [*arguments(run, 2, starts_from="scratch", num_processes=1), *flags]


def open_job(run: Path, *datasets: str, objective: str = "prior_preservation", extra: str = "") -> TrainingJob:
    argv = command_line(run, *datasets, objective=objective, extra=extra)
    return open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_the_loss_is_the_mean_of_the_subject_and_the_weighted_mean_of_the_prior() -> None:
    batch = make_batch(has_text=True)
    inputs = NetworkInputs(scaling_factor=SCALE, shift_factor=SHIFT, null_label=None, dtype=torch.float32)
    denoise = Denoise(process=DDPM(), inputs=inputs)
    plain = denoise.loss({"network": Recorder(torch.float32)}, batch)
    objective = PriorPreservation(denoise=denoise, prior_weight=0.3, prior_share=0.5)
    losses = objective.loss({"network": Recorder(torch.float32)}, batch)
    instance, prior = plain.total[~batch.is_prior].mean(), plain.total[batch.is_prior].mean()
    assert batch.is_prior.sum() == len(DRAWS) / 2, "as the share says"
    torch.testing.assert_close(losses.total.mean(), instance + 0.3 * prior)
    torch.testing.assert_close(losses.parts["instance"].mean(), instance)
    torch.testing.assert_close(losses.parts["prior"].mean(), prior)
    torch.testing.assert_close(losses.parts["mse"], plain.parts["mse"])


def test_a_teacher_says_what_prior_samples_keep() -> None:
    batch = make_batch(has_text=True)
    inputs = NetworkInputs(scaling_factor=SCALE, shift_factor=SHIFT, null_label=None, dtype=torch.float32)
    network, teacher = Recorder(torch.float32), Recorder(torch.float32)
    network.output.requires_grad_()
    teacher.output = teacher.output + torch.arange(4.0)[:, None, None, None]
    denoise = Denoise(process=DDPM(), inputs=inputs)
    objective = PriorPreservation(denoise=denoise, prior_weight=0.3, prior_share=0.5, has_teacher=True)
    assert objective.networks == {"network": Trained(), "teacher": Frozen()}
    losses = objective.loss({"network": network, "teacher": teacher}, batch)
    plain = denoise.loss({"network": network}, batch)
    distance = torch.arange(4.0).square()[batch.is_prior].mean()
    torch.testing.assert_close(losses.parts["prior"].mean(), distance)
    torch.testing.assert_close(losses.total.mean(), plain.total[~batch.is_prior].mean() + 0.3 * distance)
    for one, other in zip(network.calls[0][:2], teacher.calls[0][:2], strict=True):
        assert torch.equal(one, other), "both see the same noisy latents"


def test_a_batch_says_which_samples_are_prior_ones(run: Path) -> None:
    job = open_job(run, INSTANCE, PRIOR)
    assert prior_share(job.features.datasets) == 0.75
    reader = open_reader(FeatureIndex(job.features.datasets), steps=range(6), batch_size=8, survey=survey_stage(job))
    found = []
    with reader:
        for packed in reader:
            batch = packed.to(torch.device("cpu"))
            assert batch.is_prior.tolist() == [shard == "laion_1" for shard in batch.shards]
            found += batch.is_prior.tolist()
    assert sum(found) / len(found) == pytest.approx(0.75, abs=0.05)


def test_a_role_is_part_of_what_a_checkpoint_is_bound_to(run: Path) -> None:
    plain = open_job(run, INSTANCE, PRIOR.replace(', role = "prior"', ""), objective="denoise")
    named = open_job(run, INSTANCE, PRIOR.replace("prior", "instance"), objective="denoise")
    assert plain.fingerprint == named.fingerprint, "what is no prior is as it was before there were roles"
    fields = open_job(run, INSTANCE, PRIOR).fingerprint.fields
    assert fields["datasets.1.role"] == "prior" and "datasets.0.role" not in fields
    assert "prior_weight" not in plain.fingerprint.fields


@pytest.mark.parametrize(
    ("datasets", "objective", "extra", "message"),
    [
        ((INSTANCE,), "prior_preservation", "", r"has no dataset with role = 'prior'"),
        ((PRIOR,), "prior_preservation", "", r"has no dataset with role = 'instance'"),
        (
            (INSTANCE, PRIOR),
            "denoise",
            "",
            r"datasets\.1\.role = 'prior' is for objective prior_preservation, .*denoise",
        ),
        ((INSTANCE,), "denoise", "training.stage2.prior_weight=2", r"prior_weight = 2 is for objective prior_pres"),
        ((INSTANCE, PRIOR), "prior_preservation", "training.stage2.prior_weight=0", r"stage2\.prior_weight = 0"),
        ((INSTANCE, PRIOR.replace("prior", "class")), "prior_preservation", "", r"datasets\.1\.role = 'class'"),
    ],
)
def test_roles_without_their_objective_are_refused(
    run: Path, datasets: tuple[str, ...], objective: str, extra: str, message: str
) -> None:
    argv = command_line(run, *datasets, objective=objective, extra=extra)
    command = parse_command("training", "", argv=argv, has_stages=True)
    with pytest.raises(UserError, match=message):
        stage_training(command.recipe, "stage2")


def test_missing_prior_images_are_said_with_the_command_that_draws_them(run: Path, tmp_path: Path) -> None:
    said = r"datasets\.1: there are no prior images, .*/none/.* sampling\.checkpoint: `.* sample .*none.*`; then "
    read = r"`.* features .*/none/samples/stage2-prompt/samples\.parquet`"
    with pytest.raises(MissingFileError, match=said + read):
        open_job(run, INSTANCE, f'run = "{tmp_path}/none", role = "prior"')


def test_prior_images_may_have_features_of_their_own_table(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    recipe = run.parent / "recipe.toml"
    recipe.write_text(
        recipe.read_text().replace("[model]", '[features.prior]\nshards = ["laion_1"]\nresolution = 32\n\n[model]')
    )
    first, second = open_job(run, INSTANCE, f'run = "{other}", features = "prior", role = "prior"').features.datasets
    assert isinstance(second, Dataset) and (first.shards, second.shards) == (["laion_0"], ["laion_1"])
    larger = 'shards = ["hq_0"]\nresolution = 64\nbuckets = true\n\n[model]'
    recipe.write_text(recipe.read_text().replace('shards = ["laion_1"]\nresolution = 32\n\n[model]', larger))
    with pytest.raises(UserError, match=r"resolution is 64, but 32 is needed"):
        open_job(run, INSTANCE, f'run = "{other}", features = "prior", role = "prior"')


@pytest.mark.slow
def test_metrics_show_both_losses_and_a_resume_is_exact(tmp_path: Path) -> None:
    whole, parted = make_run(tmp_path / "whole"), make_run(tmp_path / "parted")
    datasets = [
        {"shards": ["laion_0"], "weight": 1.0},
        {"shards": ["laion_1"], "weight": 1.0, "role": "prior"},
    ]
    settings = {"starts_from": "scratch", "objective": "prior_preservation", "prior_weight": 0.5}
    written = ", ".join(
        "{" + ", ".join(f"{key} = {value!r}" for key, value in dataset.items()) + "}" for dataset in datasets
    )
    for run in (whole, parted):
        recipe = run.parent / "recipe.toml"
        recipe.write_text(recipe.read_text().replace("[training.stage2]", f"[training.stage2]\ndatasets = [{written}]"))
    train(whole, 2, **settings)
    train(parted, 2, **settings, num_steps=6)
    train(parted, 2, **settings, num_processes=1)
    lines, resumed = metrics(whole, 2), metrics(parted, 2)
    for line, again in zip(lines, resumed, strict=True):
        assert line["loss"] == pytest.approx(line["instance"] + 0.5 * line["prior"], rel=1e-6)
        for name in ("loss", "instance", "prior"):
            assert again[name] == pytest.approx(line[name], rel=1e-5)
