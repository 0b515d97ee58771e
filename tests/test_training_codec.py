"""A codec trained by `python -m training`: killed and resumed once its critic has begun, on fewer ranks, opened."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_run import BUCKETS, copy_of, lines, make_codec_run, weights
from PIL import Image
from training_run import arguments, finish, start, train

from encoders.opening import open_codec
from errors import UserError
from pipelines.command import parse_command
from pipelines.store.checkpoints import read_trainer
from pipelines.store.previews import preview_steps, read_previews
from pipelines.store.verify.run import verify_run
from pixart.stored_shapes import kind_of
from sampling.app_choices import checkpoint_choices
from sampling.trained_model import open_checkpoint_model
from training.codec.autoencoder import Autoencoder
from training.codec.files import load_codec
from training.codec.statistics import measure_latents, stage_crops
from training.config import stage_training
from training.stages.stage import open_stage

pytestmark = pytest.mark.slow
TIMINGS = ("seconds", "per_second", "wait_fraction", "memory", "gigabytes", "days", "dollars", "kilograms", "mfu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage of 8 steps on two ranks, whose discriminator begins with the fourth."""
    run = make_codec_run(tmp_path_factory.mktemp("codec"))
    train(run, "vae")
    return run


def start_of(run: Path) -> Path:
    return run / "training" / "vae" / "step-8" / "model"


def read(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def told(run: Path) -> list[dict]:
    """The lines of metrics, less what clocks and memory say."""
    return [{key: value for key, value in line.items() if not key.endswith(TIMINGS)} for line in lines(run)]


def test_a_killed_stage_goes_on_to_the_very_bytes_and_metrics_that_it_would_have_had(run: Path, tmp_path: Path) -> None:
    other = make_codec_run(tmp_path)
    process = start(other, "vae", num_steps=8)
    deadline = time.monotonic() + 120
    while not (other / "training" / "vae" / "latest").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    train(other, "vae")
    files = sorted((run / "training" / "vae" / "step-8" / "model").iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"} and len(files) == 3
    for path in files:
        assert (other / path.relative_to(run)).read_bytes() == path.read_bytes(), path.name
    assert told(other) == told(run)


def test_a_line_has_no_losses_by_times_that_crops_have_not(run: Path) -> None:
    assert {"loss", "mse", "kl", "psnr"} <= lines(run)[0].keys() and "loss_by_timestep" not in lines(run)[0]


def test_the_discriminator_begins_when_it_is_told_and_changes_what_comes(run: Path) -> None:
    found = [line for line in lines(run) if "loss" in line]
    assert [line["discriminator"] == line["adversarial"] == 0 for line in found] == [True] * 3 + [False] * 5
    assert found[-1]["psnr"] > found[0]["psnr"]


def test_one_rank_goes_on_where_two_were(run: Path, tmp_path: Path) -> None:
    other = copy_of(run, tmp_path / "one")
    (other / "training" / "vae" / "latest").write_text("step-4")
    said = train(other, "vae", num_processes=1)
    assert "ranks: 2 -> 1" in said
    for name, weight in weights(run, 8).items():
        torch.testing.assert_close(weights(other, 8)[name], weight, atol=2e-4, rtol=1e-3)


def test_what_it_writes_opens_as_a_codec_of_features_whose_latents_have_unit_deviation(run: Path) -> None:
    folder = run / "training" / "vae" / "step-8" / "model"
    codec = open_codec(str(folder))
    trainer = read_trainer(folder.parent)
    assert (codec.spec.channels, codec.spec.factor, codec.spec.shift) == (3, 2, 0.0)
    assert trainer["vae"] == {"channels": 3, "factor": 2, "has_std": True, "scaling_factor": codec.spec.scale}
    job = open_stage(parse_command("training", "", argv=arguments(run, "vae"), has_stages=True))
    moments: list[torch.Tensor] = []
    for crops in stage_crops(job.features.datasets, 12):
        mean, std = codec.encode(crops)
        assert std is not None
        first, second = (each.permute(1, 0, 2, 3).flatten(1) for each in (mean, mean.square() + std.square()))
        moments.append(torch.stack([first, second]))
    first, second = torch.cat(moments, dim=2).double()  # of drawn latents, [C, values] each
    told = json.loads((folder / "latent_statistics.json").read_text())
    assert told["num_images"] == 12
    means = first.mean(dim=1)
    assert means.tolist() == pytest.approx(told["channel_mean"], rel=1e-4, abs=1e-6)
    assert (second.mean(dim=1) - means.square()).sqrt().tolist() == pytest.approx(told["channel_std"], rel=1e-4)
    assert (second.mean() - first.mean().square()).sqrt().item() * codec.spec.scale == pytest.approx(1.0, rel=1e-4)
    assert not verify_run(run).problems


def test_previews_are_crops_beside_what_the_average_makes_of_them(run: Path) -> None:
    assert preview_steps(run / "training" / "vae") == [0, 8]
    codec = open_codec(str(run / "training" / "vae" / "step-8" / "model"))
    job = open_stage(parse_command("training", "", argv=arguments(run, "vae"), has_stages=True))
    crops = [crop for batch in stage_crops(job.features.datasets, 3) for crop in batch]
    previews = read_previews(run / "training" / "vae", 8)
    assert len(previews) == len(crops) == 3
    for preview, crop in zip(previews, crops, strict=True):
        original, decoded = np.split(np.asarray(Image.open(preview.path)), 2, axis=1)
        assert (original == crop.permute(1, 2, 0).numpy()).all()
        mean, _ = codec.encode(crop[None])
        assert np.abs(decoded.astype(int) - np.asarray(codec.decode(mean)[0])).max() <= 1


def test_nothing_is_drawn_with_it_nor_offered_to_draw_with(run: Path) -> None:
    with pytest.raises(UserError, match=r"step-8 is a codec, which draws nothing .*features\.vae_model"):
        open_checkpoint_model(start_of(run).parent)
    assert checkpoint_choices(run) == []
    with pytest.raises(UserError, match=r"config\.json describes AutoencoderKL, not a PixArt or DiT"):
        kind_of(read(start_of(run)), start_of(run) / "config.json")


def test_averages_that_nothing_can_be_made_of_are_not_kept(run: Path, tmp_path: Path) -> None:
    stage = copy_of(run, tmp_path / "power")
    with (stage.parent / "recipe.toml").open("a") as recipe:
        recipe.write('\n[training.power]\nextends = "vae"\nfeatures = "vae"\nnum_steps = 2\nema = "power"\n')
        recipe.write("ema_snapshot_every = 1\n")
    train(stage, "power", num_processes=1)
    folder = stage / "training" / "power"
    assert (folder / "step-2" / "second_average.safetensors").is_file() and not (folder / "averages").exists()


def test_another_stage_goes_on_from_its_weights_and_trains_the_decoder_alone(run: Path, tmp_path: Path) -> None:
    other = copy_of(run, tmp_path / "next")
    with (other.parent / "recipe.toml").open("a") as recipe:
        recipe.write('\n[training.next]\nextends = "vae"\nfeatures = "vae"\nstarts_from = "vae"\nnum_steps = 2\n')
        recipe.write('trains = ["decoder.*", "post_quant_conv.*"]\n')
    config = start_of(other) / "config.json"
    config.write_text(json.dumps(read(start_of(other)) | {"scaling_factor": 0.25, "shift_factor": None}))
    train(other, "next", num_processes=1)
    before, after = weights(run, 8), weights(other, 2, stage="next")
    same = {name: torch.equal(before[name], after[name]) for name in before}
    assert all(is_same != name.startswith(("decoder.", "post_quant_conv.")) for name, is_same in same.items())
    # So latents are what they were, and so is what they are scaled by, though it is of other crops than are seen now.
    scales = [read(folder)["scaling_factor"] for folder in (start_of(other), other / "training/next/step-2/model")]
    assert scales == [0.25, 0.25]
    trainer = json.loads((other / "training/next/step-2/trainer.json").read_text())
    assert trainer["vae"]["scaling_factor"] == 0.25 and "shift_factor" not in trainer["vae"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("training.vae.objective='denoise'", "reconstruction = .* is for objective reconstruct"),
        ("training.vae.trains='lora'", "trains = 'lora' does not go with"),
        ("training.vae.optimizer='muon'", "optimizer = 'muon' does not go with .* and a discriminator"),
        ("training.vae.reconstruction.perceptual_weight=1.0", "name a vision model and give it a weight"),
        ("training.vae.networks={perceptual='toyworld/weights/clip'}", "name a vision model and give it a weight"),
        ("training.vae.starts_from='toyworld/weights/nothing'", "toyworld/weights/nothing"),
        (
            "training.vae.starts_from='toyworld/weights/vae'",
            "codec is for a codec from scratch, but .*whose shape",
        ),
        ("training.vae.caption_dropout=0.2", r"caption_dropout = 0\.2 is for networks dit and pixart, but .* 'vae'"),
        ("training.vae.reconstruction={kl_weight=1.0,l1_weight=0.0}", "nothing asks images to come back"),
        ("training.vae.reconstruction={discriminator_from_step=5}", "from_step = 5 needs a discriminator_weight"),
        ("training.vae.reconstruction.perceptual_layers=[1]", r"layers = \[1\] needs a perceptual_weight"),
    ],
)
def test_what_does_not_go_together_is_said(run: Path, changed: str, said: str) -> None:
    argv = [*arguments(run, "vae"), "--set", changed]
    with pytest.raises(UserError, match=said):
        open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_a_weight_of_zero_that_is_typed_switches_off_what_a_recipe_has(run: Path) -> None:
    argv = [*arguments(run, "vae"), "--set", "training.vae.reconstruction.discriminator_weight=0"]
    settings = stage_training(parse_command("training", "", argv=argv, has_stages=True).recipe, "vae")
    assert not settings.reconstruction.has_discriminator and settings.reconstruction.discriminator_from_step == 3


def test_crops_that_are_no_whole_number_of_latents_are_refused(tmp_path: Path) -> None:
    run = make_codec_run(tmp_path)
    argv = ("vae",)
    process = start(run, *argv, **{"vae.codec.block_channels": [8, 8, 8, 8, 8]})
    said = finish(process, status=2)
    assert f"crops of {BUCKETS[1]} pixels, no multiples of the codec's factor 16" in said


def test_the_network_is_the_published_one(run: Path) -> None:
    folder = run / "training" / "vae" / "step-8" / "model"
    from encoders.weights import resolve_model

    network = load_codec(resolve_model(str(folder)), key="codec")
    assert isinstance(network, Autoencoder)
    model = network.config.model()
    model.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    noise = torch.randn(network.latent_shape(images.shape))
    with torch.no_grad():
        found, posterior = network(images, noise), model.encode(images).latent_dist
        expected = model.decode(posterior.mean + posterior.std * noise).sample
    assert torch.equal(found.mean, posterior.mean) and torch.equal(found.log_variance, posterior.logvar)
    torch.testing.assert_close(found.images, expected)
    assert measure_latents(network, iter([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])).num_images == 2
