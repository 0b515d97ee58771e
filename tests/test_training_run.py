"""`python -m training` with two real gloo ranks: kills, signals, resumes, bad data; each ends well or in one line."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sound_run import require_sound
from training_run import D_TEXT, all_metrics, finish, make_run, metrics, start, train, validations

from pipelines.store.families import latent_directory
from pixart.convert import load_diffusers, save_diffusers
from pixart.drawing.denoise import denoise, draw_noise, make_generators
from pixart.drawing.guidance import network_of_texts
from pixart.drawing.passes import Pass
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.scheduler_configs import spec_beside
from pixart.processes.specs import ddpm_spec, flow_spec
from sampling.trained_model import open_run_model

NUM_STEPS = 200
TIMINGS = {
    "images_per_second",
    "data_wait_fraction",
    "elapsed_seconds",
    "teraflops_per_second",
    "mfu",
    "peak_memory_gigabytes",
    "device_days",
    "dollars",
    "co2_kilograms",
}
pytestmark = pytest.mark.slow


def stage2(run: Path) -> Path:
    return run / "training" / "stage2"


def settings(**changed: object) -> dict[str, object]:
    validation = {"validation_shards": ["laion_1"], "num_validation_samples": 16, "validate_every": 40}
    return {
        "starts_from": "scratch",
        "num_steps": NUM_STEPS,
        "log_every": 4,
        "checkpoint_every": 25,
        **validation,
        **changed,
    }


def ema_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(stage2(run) / f"step-{step}" / "model" / "diffusion_pytorch_model.safetensors")


def untimed(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def wait_for(condition: Callable[[], bool], *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def rank_processes(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = make_run(tmp_path_factory.mktemp("straight"))
    train(run, 2, **settings())
    require_sound(run, room="training")
    return run


def test_killed_stopped_and_resumed_equals_undisturbed(straight: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    killed = start(run, 2, **settings())
    wait_for(lambda: (stage2(run) / "latest").is_file())
    ranks = rank_processes(killed.pid)
    killed.kill()
    killed.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    (stage2(run) / ".step-199.tmp").mkdir()
    killed_after = json.loads((stage2(run) / (stage2(run) / "latest").read_text().strip() / "trainer.json").read_text())
    assert killed_after["step"] < NUM_STEPS

    stopped = start(run, 2, **settings())
    wait_for(lambda: (stage2(run) / "latest").read_text().strip() != f"step-{killed_after['step']}")
    stopped.terminate()
    assert "the same command continues" in finish(stopped)

    said = train(run, 2, **settings())
    assert "resume after step" in said
    for name, weight in ema_weights(straight, NUM_STEPS).items():
        assert torch.equal(weight, ema_weights(run, NUM_STEPS)[name]), name
    states = [
        stage2(path) / f"step-{NUM_STEPS}" / "deepspeed" / "mp_rank_00_model_states.pt" for path in (straight, run)
    ]
    ours, theirs = (torch.load(path, weights_only=False) for path in states)
    assert all(torch.equal(ours["module"][name], theirs["module"][name]) for name in ours["module"])
    moments = [[state["exp_avg"] for state in each["optimizer"]["state"].values()] for each in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    assert untimed(all_metrics(run, 2)) == untimed(all_metrics(straight, 2))
    assert not list(stage2(run).glob(".step-*.tmp"))
    assert len(list(stage2(run).glob("step-*"))) == 2, "training.keep_checkpoints"
    again = train(run, 2, **settings())
    assert "nothing to do" in again


def test_validation_repeats_and_falls(straight: Path) -> None:
    lines = validations(straight, 2)
    assert [line["step"] for line in lines] == [0, 40, 80, 120, 160, 200]
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss"]
    assert {line["num_validation_samples"] for line in lines} == {16}
    # The same samples, noise and timesteps every time: the same bins of timesteps are filled.
    filled = {tuple(value is None for value in line["validation_loss_by_timestep"]) for line in lines}
    assert len(filled) == 1
    assert len(metrics(straight, 2)) == NUM_STEPS // 4


def test_validation_is_the_same_for_any_number_of_ranks(straight: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    train(run, 2, **settings(num_steps=4, num_processes=1, gradient_accumulation_steps=2))
    alone, two = (validations(path, 2)[0] for path in (run, straight))
    assert alone["validation_loss"] == pytest.approx(two["validation_loss"], rel=1e-6)
    assert alone["validation_mse"] == pytest.approx(two["validation_mse"], rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"validation_shards": ["laion_*"]}, "training.stage2.validation_shards ['laion_*'] leaves nothing to train"),
        ({"validation_shards": ["sa_*"]}, "training.stage2.validation_shards: pattern 'sa_*' matches none"),
        ({"num_validation_samples": 7}, "give 7 samples, fewer than one batch of training.global_batch_size 8"),
    ],
)
def test_useless_validation_is_refused(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    assert message in train(make_run(tmp_path), 2, status=2, **settings(num_steps=4, num_processes=1, **changed))


def test_checkpoint_says_what_sampling_needs(straight: Path) -> None:
    folder = stage2(straight) / f"step-{NUM_STEPS}"
    trainer = json.loads((folder / "trainer.json").read_text())
    expected = {"stage": "stage2", "kind": "pixart", "weights": "ema", "dtype": "fp32", "resolution": 32}
    assert (expected | {"num_ranks": 2}).items() <= trainer.items()
    assert trainer["buckets"] == ["32x32"]
    assert trainer["vae"]["scaling_factor"] == 0.5
    assert trainer["text"]["max_tokens"] == 12
    assert trainer["process"] == ddpm_spec()
    model = load_diffusers(folder / "model")
    assert isinstance(model, PixArt)
    assert model.config.sample_size == 4
    assert all(weight.dtype == torch.float32 for weight in model.state_dict().values())
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["counts"]["training"]["stage2"]["steps"] == NUM_STEPS
    assert summary["seconds"]["training"]["stage2"] > 0


def every_step(**changed: object) -> dict[str, object]:
    return settings(log_every=1, checkpoint_every=100, global_batch_size=12, gradient_clip=0.01) | changed


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    run = make_run(tmp_path_factory.mktemp("two_ranks"))
    train(run, 2, **every_step(num_steps=12))
    require_sound(run, room="training")
    return metrics(run, 2)


def assert_same_losses(found: list[dict], expected: list[dict]) -> None:
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    norms = [[line["gradient_norm"] for line in lines] for lines in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert all(line["gradient_norm"] > 0.02 and line["max_gradient_norm"] == line["gradient_norm"] for line in found)
    # Measured in Adam's moments, whatever ZeRO shards and however often the ranks changed.
    assert [line["clipped_gradient_norm"] for line in found] == pytest.approx([0.01] * len(found), rel=1e-3)


def test_world_size_and_accumulation_change_no_loss(two_ranks: list[dict], tmp_path: Path) -> None:
    run = make_run(tmp_path)
    train(run, 2, **every_step(num_steps=6, num_processes=1, gradient_accumulation_steps=3))
    assert_same_losses(metrics(run, 2), two_ranks[:6])


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_resume_at_another_world_size(two_ranks: list[dict], tmp_path: Path, zero_stage: int) -> None:
    run = make_run(tmp_path)
    for num_processes, num_steps in ((2, 4), (1, 8), (3, 12)):
        train(run, 2, **every_step(num_steps=num_steps, num_processes=num_processes, zero_stage=zero_stage))
    assert_same_losses(metrics(run, 2), two_ranks)


def test_stages_follow_each_other(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for stage in (1, 2, 3):
        train(run, stage, num_steps=3, num_processes=1, zero_stage=1, dtype="bf16")
    model = load_diffusers(run / "training" / "stage3" / "step-3" / "model")
    assert isinstance(model, PixArt)
    assert (model.config.sample_size, model.config.interpolation_scale) == (8, 2.0)
    assert metrics(run, 3)[-1]["step"] == 3


def test_flow_trains_from_a_ddpm_resumes_and_draws(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shape = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "sample_size": 4, "caption_channels": D_TEXT}
    save_diffusers(PixArt(PixArtConfig(**shape)), tmp_path / "former")
    changed = {"starts_from": str(tmp_path / "former"), "process": "flow", "flow_shift": 2.0, "num_processes": 1}
    said = train(run, 2, num_steps=3, log_every=1, **changed)
    assert "flow, velocity, logit-normal times (0, 1), shift 2; the output layer begins anew, for the weights" in said
    train(run, 2, num_steps=5, log_every=1, **changed)
    lines = metrics(run, 2)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["mse"] == line["loss"] and "vlb" not in line for line in lines)

    trained = open_run_model(run, "stage2")
    assert trained.process == flow_spec(shift=2.0) == spec_beside(trained.model_path)
    model, generators = trained.load(), make_generators([0])
    texts = [torch.randn(3, D_TEXT), torch.randn(1, D_TEXT)]
    scheduler, passes = process_of(trained.process).scheduler("heun", 2), [Pass(is_guided=True)] * 3
    network = network_of_texts(model, texts[:1], texts[1], passes=passes, guidance_scale=2.0, size_pixels=(32, 32))
    latents, _ = denoise(network, draw_noise(generators, (4, 4, 4)), scheduler, generators=generators)
    assert latents.shape == (1, 4, 4, 4)


def test_the_ablation_of_figure_6_trains_from_stage_1(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[model]", '[model]\nadaln = "per-block"'))
    train(run, 1, num_steps=3, num_processes=1)
    train(run, 2, num_steps=3, num_processes=2, zero_stage=3, keep_activations="inputs")
    model = load_diffusers(run / "training" / "stage2" / "step-3" / "model")
    assert isinstance(model, PixArt) and model.config.adaln == "per-block"
    assert all(block.modulation.weight.abs().max() > 0 for block in model.blocks)


def test_a_loss_that_is_not_finite_stops_and_names_the_keys(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    directory = latent_directory(run, 32)
    rows = [row for row in pq.read_table(directory / "laion_1.parquet").to_pylist() if row["reject"] is None]
    with (directory / "laion_1.tar").open("r+b") as tar:
        for row in rows:
            tar.seek(row["mean_offset"])
            tar.write(np.full(1, np.nan, np.float16).tobytes())
    said = train(run, 2, status=2, **settings(validation_shards=[]))
    assert "is not finite, first laion_1_" in said and " of shard laion_1; " in said
    assert f"`make verify RUN={run}` finds features that are damaged" in said
    assert "Traceback" not in said
    (dump,) = stage2(run).glob("non-finite-step-*.json")
    content = json.loads(dump.read_text())
    assert [sample["position"] for sample in content["samples"]] == list(range(8)), "the global batch, of both ranks"
    assert all(sample["key"].startswith(f"{sample['shard']}_") for sample in content["samples"])
    assert all(key.startswith("laion_1_") for key in content["non_finite"])
    assert content["weights"]["norm"] > 0 and content["weights"]["num_non_finite"] == 0
    checkpoint = stage2(run) / "latest"
    if checkpoint.is_file():
        assert all(weight.isfinite().all() for weight in ema_weights(run, int(checkpoint.read_text()[5:])).values())


def test_a_rank_that_dies_ends_the_others_with_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    process = start(run, 2, **settings(num_steps=100_000))
    wait_for(lambda: (stage2(run) / "latest").is_file())
    ranks = rank_processes(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    said = finish(process, status=2, timeout_seconds=60)
    assert "rank 1 was ended by SIGKILL" in said
    assert "Traceback" not in said
    assert not Path(f"/proc/{ranks[0]}").exists()


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = start(run, 2, **settings(num_steps=100_000))
    wait_for(lambda: (stage2(run) / "latest").is_file())
    said = train(run, 2, status=2, **settings(num_steps=100_000))
    assert "is being trained by another process" in said
    first.send_signal(signal.SIGINT)
    assert "interrupted; the same command continues" in finish(first, status=130)
