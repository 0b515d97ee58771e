"""Networks that are told each image's size, as PixArt-alpha's 512-MS and 1024-MS: from the index to the weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from training_run import D_TEXT, arguments, make_run, train, validations, write_latents, write_text

from errors import UserError
from pipelines.command import parse_command
from pipelines.store.feature_store import load_index
from pixart.convert import load_diffusers, save_diffusers
from pixart.model import PixArt, PixArtConfig
from training.data.assembly import BatchAssembler, bucket_ratio
from training.data.batch import Buffers, PackedBatch
from training.data.index import FeatureIndex
from training.data.stage_data import stage_plan, survey_stage
from training.objectives.inputs import NetworkInputs
from training.stages.networks import network_config
from training.stages.stage import TrainingJob, open_stage

SHAPE = {"num_layers": 1, "num_heads": 2, "head_dim": 12, "caption_channels": D_TEXT, "sample_size": 8}
TOLD = PixArtConfig(**SHAPE, has_size_condition=True, interpolation_scale=2.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage 3 has the sizes of its images, and weights `told` beside it that are told them."""
    run = make_run(tmp_path_factory.mktemp("sizes"))
    recipe = (run.parent / "recipe.toml").read_text()
    model = recipe[recipe.index("[model]") : recipe.index("[training]")]
    (run.parent / "recipe.toml").write_text(recipe.replace(model, ""))
    shutil.rmtree(run / "features" / "latent-64")
    write_latents(run, 64, {"hq_0": 60}, buckets=["64x64", "80x48", "48x80"], is_bucketed=True, has_sizes=True)
    torch.manual_seed(0)
    save_diffusers(randomised(PixArt(TOLD)), run.parent / "told")
    return run


def randomised(network: PixArt) -> PixArt:
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return network


def open_job(run: Path, stage: int = 3, **settings: object) -> TrainingJob:
    argv = arguments(run, stage, starts_from=str(run.parent / "told"), **settings)
    job = open_stage(parse_command("training", "", argv=argv, has_stages=True))
    job.directory.mkdir(parents=True, exist_ok=True)
    return job


def batches(job: TrainingJob, num_steps: int) -> list[PackedBatch]:
    survey, datasets = survey_stage(job), job.features.datasets
    plan, index = stage_plan(job, survey), FeatureIndex(datasets)
    assembler = BatchAssembler(datasets[0], buckets=survey.buckets, seed=0, stream=3, caption_dropout=0.1)
    shards = {0: index.open(0)}
    planned = [plan.batch(step) for step in range(num_steps)]
    return [
        assembler.assemble(Buffers(is_pinned=False), batch, range(job.settings.global_batch_size), shards)
        for batch in planned
    ]


def test_ratios_are_the_keys_of_pixarts_tables() -> None:
    for key, (height, width) in ASPECT_RATIO_2048_BIN.items():
        assert bucket_ratio(f"{int(height)}x{int(width)}") == float(key)


def test_a_batch_has_the_original_sizes_and_the_ratio_of_its_bucket(run: Path) -> None:
    job = open_job(run)
    rows = load_index(run / "features" / "latent-64", ["hq_0"]).to_pylist()
    sizes = {row["key"]: (row["original_height"], row["original_width"]) for row in rows}
    ratios = {"64x64": 1.0, "80x48": 1.67, "48x80": 0.6}
    found = batches(job, 6)
    assert {batch.bucket for batch in found} == ratios.keys()
    for batch in found:
        expected = [[*sizes[key], ratios[batch.bucket]] for key in batch.keys]
        assert torch.equal(batch.size, torch.tensor(expected))
        assert torch.equal(batch.to(CPU).size, batch.size)


def test_the_network_is_told_them_and_another_is_not(run: Path) -> None:
    job = open_job(run)
    network = load_diffusers(run.parent / "told")
    assert isinstance(network, PixArt) and network_config(job, survey_stage(job)).has_size_condition
    batch = batches(job, 1)[0].to(CPU)
    inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=None, dtype=torch.float32)
    latents, times = inputs.latents(batch), torch.arange(8)
    found = inputs.output(network, latents, times, batch=batch)
    text = batch.text._replace(values=batch.text.values.float())
    assert torch.equal(found, network(latents, times, text, size=batch.size))
    assert not torch.allclose(found, network(latents, times, text, size=batch.size + 100))
    plain = randomised(PixArt(PixArtConfig(**SHAPE)))
    assert inputs.output(plain, latents, times, batch=batch).isfinite().all()


def test_embedders_of_sizes_are_trained_validated_and_saved(run: Path) -> None:
    settings = {"num_steps": 5, "num_processes": 1, "learning_rate": 1e-2, "validation_shards": ["hq_1"]}
    write_text(run, {"hq_0": 60, "hq_1": 40})
    write_latents(run, 64, {"hq_0": 60, "hq_1": 40}, buckets=["64x64", "80x48"], is_bucketed=True, has_sizes=True)
    shutil.rmtree(run / "training", ignore_errors=True)
    train(run, 3, starts_from=str(run.parent / "told"), **settings)
    assert [line["step"] for line in validations(run, 3)] == [0, 5]
    saved = run / "training" / "stage3" / "step-5" / "model"
    assert json.loads((saved / "config.json").read_text())["use_additional_conditions"] is True
    trained, before = load_diffusers(saved), load_diffusers(run.parent / "told")
    for name in ("size_embed.hidden.weight", "size_embed.out.weight", "aspect_ratio_embed.out.bias"):
        assert not torch.equal(trained.state_dict()[name], before.state_dict()[name]), name


def test_features_without_sizes_are_refused(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path)
    shutil.copy(run.parent / "recipe.toml", tmp_path / "recipe.toml")
    shutil.copytree(run.parent / "told", tmp_path / "told")
    job = open_job(other)
    with pytest.raises(UserError, match=r"training\.stage3: the network is told each image's size .*, but 4\d of 4\d"):
        network_config(job, survey_stage(job))


def test_a_stage_from_scratch_may_ask_for_it_and_a_contradiction_is_refused(run: Path) -> None:
    shutil.rmtree(run / "training", ignore_errors=True)
    argv = [*arguments(run, 3, starts_from="scratch"), "--set", "model.size_condition=true"]
    job = open_stage(parse_command("training", "", argv=argv, has_stages=True))
    assert network_config(job, survey_stage(job)).has_size_condition
    argv = [*arguments(run, 3, starts_from=str(run.parent / "told")), "--set", "model.size_condition=false"]
    with pytest.raises(UserError, match=r"model\.size_condition = False, but the weights of .*told\) have True"):
        open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_fresh_embedders_change_nothing_at_the_start() -> None:
    torch.manual_seed(0)
    network = PixArt(TOLD)
    torch.nn.init.normal_(network.final.weight)
    latents, times, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 4, D_TEXT)
    one, two = (network(latents, times, text, size=torch.full((2, 3), side)) for side in (512.0, 2048.0))
    assert torch.equal(one, two)
