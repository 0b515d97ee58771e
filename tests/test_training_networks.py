"""What a stage starts from, what cannot be started from, and when training gives up."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_run import D_TEXT, arguments, make_run

from errors import UserError
from pipelines.command import parse_command
from pixart.convert import save_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.layouts import export_weights, original_layout
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from training.data.stage_data import survey_stage
from training.data.survey import Survey
from training.launch.disk_needs import require_disk
from training.launch.memory import Shares
from training.launch.preflight import print_weights
from training.loop.health import Health, UnhealthyTrainingError
from training.loop.zero import Update, local_device
from training.stages.networks import (
    blank_network,
    count_parameters,
    network_config,
    parameter_counts,
)
from training.stages.stage import TrainingJob, open_stage
from training.stages.starts import starting_network
from training.stages.weights import WeightCounts

CPU = torch.device("cpu")
SHAPE = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "sample_size": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("networks"))


def open_job(run: Path, stage: int, **settings: object) -> tuple[TrainingJob, Survey]:
    argv = arguments(run, stage, **({"starts_from": "scratch"} | settings))
    job = open_stage(parse_command("training", "", argv=argv, has_stages=True))
    job.directory.mkdir(parents=True, exist_ok=True)
    return job, survey_stage(job)


def saved(network: DiT | PixArt, folder: Path) -> str:
    save_diffusers(network, folder)
    return str(folder)


def start(run: Path, stage: int, folder: str) -> DiT | PixArt:
    job, survey = open_job(run, stage, starts_from=folder)
    return starting_network(job, network_config(job, survey))


def test_shapes_come_from_the_recipe_and_the_features(run: Path) -> None:
    dit = network_config(*open_job(run, 1))
    assert dit == DiTConfig(**SHAPE, num_classes=5)
    pixart = network_config(*open_job(run, 3))
    expected = PixArtConfig(**(SHAPE | {"sample_size": 8}), caption_channels=D_TEXT, interpolation_scale=2.0)
    assert pixart == expected
    assert count_parameters(blank_network(expected)) == count_parameters(PixArt(expected))


def test_labels_beyond_the_classes_are_refused(run: Path) -> None:
    job, survey = open_job(run, 1)
    with pytest.raises(UserError, match=r"model\.num_classes is 5, but .*latent-32 has class label 7"):
        network_config(job, dataclasses.replace(survey, max_label=7))


def test_stage_2_reparameterises_a_dit_and_stage_3_moves_the_positions(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    dit = DiT(DiTConfig(**SHAPE, num_classes=5))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pixart = start(run, 2, saved(dit, tmp_path / "dit"))
    assert isinstance(pixart, PixArt)
    latents, text = torch.randn(2, 4, 4, 4), torch.randn(2, 3, D_TEXT)
    moment = torch.tensor([500, 500])
    torch.testing.assert_close(pixart(latents, moment, text), dit(latents, moment, None), rtol=1e-5, atol=1e-5)
    larger = start(run, 3, saved(pixart, tmp_path / "pixart"))
    assert isinstance(larger, PixArt)
    assert (larger.config.sample_size, larger.config.interpolation_scale) == (8, 2.0)
    assert all(torch.equal(value, pixart.state_dict()[name]) for name, value in larger.state_dict().items())
    fresh, again = (starting_network(*with_config(run, 2)) for _ in range(2))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_weights_of_another_process_keep_their_blocks_and_begin_the_output_anew(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    dit = DiT(DiTConfig(**SHAPE, num_classes=5))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    job, survey = open_job(run, 2, starts_from=saved(dit, tmp_path / "dit"), process="flow")
    config = network_config(job, survey)
    assert config.out_channels == 4 and job.begins_output_anew
    pixart = starting_network(job, config)
    assert isinstance(pixart, PixArt) and pixart.config == config
    torch.testing.assert_close(pixart.blocks[1].mlp.out.weight, dit.blocks[1].mlp.out.weight)
    assert pixart.final.weight.shape == (16, 16) and not pixart.final.weight.any() and not pixart.final.bias.any()
    # and what was trained with flow goes on with it, output layer and all
    torch.nn.init.normal_(pixart.final.weight)
    folder = saved(pixart, tmp_path / "flow" / "model")
    scheduler = process_of(job.settings.process_spec).scheduler_config()
    (tmp_path / "flow" / "scheduler").mkdir()
    (tmp_path / "flow" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    job, survey = open_job(run, 2, starts_from=folder, process="flow")
    assert not job.begins_output_anew
    assert torch.equal(starting_network(job, config).final.weight, pixart.final.weight)
    # to lose that layer somebody must have typed the other process
    with pytest.raises(UserError, match=r"process is 'ddpm' where none is typed, but .* were trained with 'flow'"):
        open_job(run, 2, starts_from=folder)
    job, survey = open_job(run, 2, starts_from=folder, process="ddpm")
    assert job.begins_output_anew
    assert starting_network(job, network_config(job, survey)).final.weight.shape == (32, 16)


def test_weights_of_a_vae_with_other_channels_keep_their_blocks_where_the_stage_says_so(
    run: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    former = PixArt(PixArtConfig(**SHAPE, in_channels=8, out_channels=16, caption_channels=D_TEXT))
    for parameter in former.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = saved(former, tmp_path / "eight")
    job, survey = open_job(run, 2, starts_from=folder)
    with pytest.raises(UserError, match=r"in_channels 8, but the features' latents have 4: .*departs_in = \['vae'\]"):
        starting_network(job, network_config(job, survey))
    job, survey = open_job(run, 2, starts_from=folder, departs_in=["vae"])
    config = network_config(job, survey)
    network, again = (starting_network(job, config) for _ in range(2))
    assert isinstance(network, PixArt) and network.config == config and config.in_channels == 4
    assert not network.final.weight.any() and not network.final.bias.any()
    assert network.patch_embed.projection.weight.shape == (16, 4, 2, 2) and network.patch_embed.projection.weight.any()
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), "every rank draws the same"
        if not name.startswith(("patch_embed.", "final.")):
            assert torch.equal(weight, former.state_dict()[name])
    # what begins anew has to train
    patterns = ["blocks.*", "final.*"]
    job, survey = open_job(run, 2, starts_from=folder, departs_in=["vae"], trains=patterns)
    with pytest.raises(UserError, match=r"training\.stage2\.trains leaves out patch_embed\.projection\.weight"):
        starting_network(job, network_config(job, survey))


def test_original_files_are_a_start(run: Path, tmp_path: Path) -> None:
    published = {"num_layers": 2, "num_heads": 6, "head_dim": 64}  # only published widths tell their heads
    shape = [f"model.{name}={value}" for name, value in published.items()]
    dit = DiT(DiTConfig(**published, sample_size=4, num_classes=5))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = export_weights(dit, original_layout(dit.config)) | {"pos_embed": torch.zeros(1, 4, 384)}
    torch.save(weights, tmp_path / "dit.pt")
    same, pixart = (start_wide(run, stage, tmp_path / "dit.pt", shape) for stage in (1, 2))
    assert all(torch.equal(value, dit.state_dict()[name]) for name, value in same.state_dict().items())
    assert isinstance(pixart, PixArt)
    assert torch.equal(pixart.blocks[0].mlp.out.weight, dit.blocks[0].mlp.out.weight)

    weights = export_weights(pixart, original_layout(pixart.config))
    torch.save({"state_dict": weights}, tmp_path / "pixart.pth")
    larger = start_wide(run, 3, tmp_path / "pixart.pth", shape)
    assert all(torch.equal(value, pixart.state_dict()[name]) for name, value in larger.state_dict().items())
    del weights["final_layer.linear.bias"]
    torch.save(weights, tmp_path / "broken.pth")
    with pytest.raises(UserError, match=r"starts_from \(.*broken\.pth\): .*missing final_layer\.linear\.bias"):
        start_wide(run, 3, tmp_path / "broken.pth", shape)


def start_wide(run: Path, stage: int, file: Path, shape: list[str]) -> DiT | PixArt:
    argv = arguments(run, stage, starts_from=str(file)) + [part for pair in shape for part in ("--set", pair)]
    job = open_stage(parse_command("training", "", argv=argv, has_stages=True))
    job.directory.mkdir(parents=True, exist_ok=True)
    return starting_network(job, network_config(job, survey_stage(job)))


def with_config(run: Path, stage: int) -> tuple[TrainingJob, DiTConfig | PixArtConfig]:
    job, survey = open_job(run, stage)
    return job, network_config(job, survey)


def test_each_stage_refuses_weights_of_another_kind_or_size(run: Path, tmp_path: Path) -> None:
    pixart = saved(PixArt(PixArtConfig(**SHAPE, caption_channels=D_TEXT)), tmp_path / "pixart")
    wide = saved(PixArt(PixArtConfig(**(SHAPE | {"head_dim": 12}), caption_channels=D_TEXT)), tmp_path / "wide")
    with pytest.raises(UserError, match=r"is a PixArt, but training\.stage1\.network is 'dit'"):
        start(run, 1, pixart)
    with pytest.raises(UserError, match=r"recipe\.toml: model\.head_dim = 8, but .*starts_from \(.*wide\) have 12: "):
        start(run, 2, wide)
    larger = saved(DiT(DiTConfig(**(SHAPE | {"sample_size": 8}), num_classes=5)), tmp_path / "larger")
    with pytest.raises(UserError, match="has sample_size 8, but the recipe and the features give 4"):
        start(run, 1, larger)


def test_figure_6_adaln_per_block_and_no_reparameterisation(run: Path, tmp_path: Path, capsys) -> None:
    argv = [*arguments(run, 2, starts_from="scratch"), "--set", "model.adaln=per-block"]
    job = open_stage(parse_command("training", "", argv=argv, has_stages=True))
    job.directory.mkdir(parents=True, exist_ok=True)
    config = network_config(job, survey_stage(job))
    expected = PixArtConfig(**SHAPE, caption_channels=D_TEXT, adaln="per-block")
    assert config == expected
    counts = parameter_counts(config)
    assert list(counts.values()) == [
        count_parameters(PixArt(config)),
        count_parameters(PixArt(dataclasses.replace(config, adaln="single"))),
    ]
    fresh = starting_network(job, config)
    assert isinstance(fresh, PixArt)
    assert all(block.modulation.weight.abs().max() == 0 for block in fresh.blocks)
    print_weights(
        job,
        WeightCounts(trained=611_000_000),
        Shares(num_micro_batches=2, micro_batch_size=4, kept="all", parts={"weights": 7}, available_bytes=9, basis="x"),
        parameter_counts={"PixArt with adaLN-single": 611_000_000, "other": 833_000_000},
        num_ranks=1,
    )
    printed = capsys.readouterr().err
    assert "611.00M parameters, from scratch" in printed
    assert "other would have 833.00M parameters" in printed
    single = saved(PixArt(PixArtConfig(**SHAPE, caption_channels=D_TEXT)), tmp_path / "single")
    argv = [*arguments(run, 2, starts_from=single), "--set", "model.adaln=per-block"]
    with pytest.raises(UserError, match=r"model\.adaln = 'per-block', but .*starts_from \(.*single\) have 'single'"):
        open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_a_full_disk_is_noticed_before_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = open_job(run, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50e9))
    require_disk(job, WeightCounts(trained=500_000_000))
    with pytest.raises(UserError, match=r"has 50\.00 GB free, but 3 more checkpoints .* need 60\.00 GB; make room"):
        require_disk(job, WeightCounts(trained=1_000_000_000))
    # Those that are kept already need no room again.
    for step in (1, 2):
        (job.directory / f"step-{step}").mkdir()
        (job.directory / f"step-{step}-best").mkdir()
    require_disk(job, WeightCounts(trained=1_000_000_000))
    with pytest.raises(UserError, match=r"but 1 more checkpoints .* need 60\.00 GB"):
        require_disk(job, WeightCounts(trained=3_000_000_000))
    # Averages that are kept for other lengths are never removed: 100 times two, of 2 bytes a weight.
    settings = job.settings.model_copy(update={"ema": "power", "num_steps": 1000, "ema_snapshot_every": 10})
    averaged = dataclasses.replace(job, settings=settings)
    require_disk(averaged, WeightCounts(trained=100_000_000))
    with pytest.raises(UserError, match=r"and averages 100 times \(training\.ema_snapshot_every = 10\) need 84\.80 GB"):
        require_disk(averaged, WeightCounts(trained=200_000_000))
    for folder in job.directory.glob("step-*"):
        folder.rmdir()


def test_a_rank_without_a_gpu_is_refused() -> None:
    assert [local_device(rank, 4, is_slurm=False) for rank in range(4)] == [0, 1, 2, 3]
    assert local_device(5, 1, is_slurm=True) == 0, "Slurm shows each task its own GPU alone"
    for is_slurm, num_devices in ((False, 1), (False, 4), (True, 4)):
        with pytest.raises(UserError, match=rf"rank 5 of .* has no GPU, there are {num_devices}: lower GPUS"):
            local_device(5, num_devices, is_slurm=is_slurm)


def count_steps(health: Health, norms: list[float], *, num_non_finite: int = 0, num_stopping: int = 0) -> list[bool]:
    """Give `health` steps whose gradients have these norms; returns which of them it lets move the weights."""
    is_moving = []
    for step, norm in enumerate(norms, 1):
        signs = {"num_non_finite": num_non_finite, "num_stopping": num_stopping}
        losses: Any = SimpleNamespace(**{name: torch.tensor(float(sign)) for name, sign in signs.items()})
        is_skipped = health.is_ruined(losses) | torch.tensor(not math.isfinite(norm))
        health.count(losses, Update(torch.tensor(norm), is_skipped), step=step)
        is_moving.append(not is_skipped)
    return is_moving


def test_skips_in_a_row_end_training_and_single_ones_do_not() -> None:
    unused: Any = None
    health = Health(3, device=CPU)
    assert count_steps(health, [math.inf, math.nan, 1.0, math.inf, math.inf]) == [False, False, True, False, False]
    health.look(unused, unused, is_all=True)
    assert health.counts() == (4, 2)
    resumed = Health(3, total=4, in_a_row=2, device=CPU)
    # The host looks at a step when it has launched the next, and by then nothing moves any more.
    assert count_steps(resumed, [math.inf, 1.0, 1.0]) == [False, False, False]
    with pytest.raises(UnhealthyTrainingError, match=r"step 1: the last 3 updates were skipped"):
        resumed.look(unused, unused, is_all=False)


def test_the_host_looks_at_a_step_when_the_next_is_launched() -> None:
    unused: Any = None
    health = Health(3, device=CPU)
    count_steps(health, [1.0], num_stopping=1)
    health.look(unused, unused, is_all=False)
    assert not health.is_stopping
    count_steps(health, [1.0])
    health.look(unused, unused, is_all=False)
    assert health.is_stopping
    assert count_steps(health, [1.0], num_non_finite=1) + count_steps(health, [1.0]) == [False, False]
