"""What drawing is reckoned to take, against what a CPU takes; and published models against the cards they are for."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from sampling_run import DIT, randomised, save_branch, save_checkpoint, save_edges, write_recipe
from tiny_encoders import save_text_encoder

from encoders import vae_tiles
from encoders.living_bytes import LivingBytes, storage_bytes
from encoders.opening import open_text_encoder
from pipelines.recipe import load_recipe
from pixart.dit import DiT
from pixart.model import PIXART_XL_2_1024, PixArt, PixArtConfig
from pixart.processes.specs import ddpm_spec
from sampling.__main__ import main
from sampling.branches import add_branch
from sampling.card import find_switches, usable_bytes
from sampling.config import SamplingConfig
from sampling.control_images import open_control_image
from sampling.footprint import DECODING, DENOISING, READING, Footprint, Moment
from sampling.renderer import Renderer
from sampling.requests import ImageRequest
from sampling.trained_model import TrainedModel, open_run_model

# Longer than what is read.
CONFIG = SamplingConfig(
    device="cpu", dtype="float32", vae_dtype="float32", text_dtype="float32", num_steps=3, negative_prompt="b" * 60
)
SMALL = PixArtConfig(num_layers=3, num_heads=4, head_dim=32, caption_channels=32, sample_size=16)
# Name of a size: images of a batch, their side in pixels, and settings.
SIZES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one of 128px": (1, 128, {}),
    "four of 64px, unguided, reused": (4, 64, {"guidance_scale": 1.0, "cache": 2}),
    "two of 192px, 8 bits, by tiles": (2, 192, {"weight_dtype": "int8", "vae_tiles": True, "text_encoder": "8bit"}),
}


def save_vae(folder: Path) -> None:
    torch.manual_seed(0)
    model_class: type = AutoencoderKL
    vae = model_class(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.45,
    )
    vae.save_pretrained(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_text_encoder(folder / "t5")
    save_vae(folder / "vae")
    save_checkpoint(folder, 1, randomised(DiT(replace(DIT, num_heads=4, head_dim=32))))
    save_checkpoint(folder, 2, randomised(PixArt(SMALL)))
    return folder


def requests_of(number: int, side: int, *, label: int | None = None) -> list[ImageRequest]:
    return [
        ImageRequest(
            number=each,
            key=f"{each}",
            prompt=f"{each % 10}{'a' * 60}",
            label=label,
            seed=each,
            width=side,
            height=side,
            file=f"{each}.png",
        )
        for each in range(number)
    ]


def moments_of(
    config: SamplingConfig, trained: TrainedModel, requests: Sequence[ImageRequest], room_bytes: int | None = None
) -> dict[str, Moment]:
    moments = Footprint(config=config, trained=trained, requests=requests, room_bytes=room_bytes).moments()
    return {moment.name: moment for moment in moments}


def model_of(opened: Any) -> torch.nn.Module:
    return opened.model


def measure(config: SamplingConfig, trained: TrainedModel, requests: Sequence[ImageRequest]) -> dict[str, int]:
    """What a CPU holds at each moment, by the storages that live."""
    found, texts = {}, {}
    if trained.text is not None:
        text = trained.text
        is_8bit = config.text_encoder == "8bit"
        encoder = open_text_encoder(text["model"], max_tokens=text["max_tokens"], dtype="float32", is_8bit=is_8bit)
        prompts = [config.negative_prompt, *(request.prompt for request in requests)]
        meter = LivingBytes()
        weights = list(model_of(encoder).parameters())
        with torch.inference_mode(), meter.watching(ignored=weights):
            embeddings = encoder.encode(prompts)
        found[READING] = storage_bytes(weights) + meter.peak_bytes
        texts = dict(zip(prompts, embeddings, strict=True))
    renderer = Renderer(config, trained)
    weights = [*renderer.model.parameters(), *model_of(renderer.codec).parameters()]
    meter, passes = LivingBytes(), []
    with meter.watching(ignored=[*weights, *texts.values()]):
        drawing = renderer.draw(requests, texts, on_step=lambda _: passes.append(meter.restart()))
    assert len(drawing.images()) == len(requests)
    return found | {
        DENOISING: storage_bytes(weights) + max(passes),
        DECODING: storage_bytes(weights) + meter.peak_bytes,
    }


@pytest.mark.parametrize("stage", [1, 2], ids=["dit", "pixart"])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_reckoned_is_what_a_cpu_takes(run, stage, size, monkeypatch):
    monkeypatch.setattr(vae_tiles, "TILE_BYTES", 400_000)
    number, side, settings = SIZES[size]
    config = CONFIG.model_copy(update=settings)
    trained = open_run_model(run, f"stage{stage}")
    requests = requests_of(number, side, label=1 if stage == 1 else None)
    reckoned, measured = moments_of(config, trained, requests), measure(config, trained, requests)
    assert reckoned.keys() == measured.keys()
    for name, moment in reckoned.items():
        assert moment.total_bytes == pytest.approx(measured[name], rel=0.1), name


def test_of_batches_as_large_it_is_one_that_an_image_leads(run: Path, tmp_path: Path) -> None:
    branch = save_branch(tmp_path / "branch", config=SMALL)
    trained = add_branch(open_run_model(run, "stage2"), str(branch), run=run)
    control = open_control_image(save_edges(tmp_path / "edges.png"))
    plain = requests_of(2, 64)
    led = [replace(item, control=control) for item in plain]
    config = CONFIG.model_copy(update={"batch_size": 2})
    alone, of_led, of_both = (
        moments_of(config, trained, requests)[DENOISING].total_bytes for requests in (plain, led, [*plain, *led])
    )
    assert alone < of_led == of_both


T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 4,
}
SIGMA_2K = PixArtConfig(sample_size=256, interpolation_scale=4.0)
SMALL_CARD = {"text_encoder": "8bit", "weight_dtype": "int8", "dtype": "bfloat16", "batch_size": 1}


def published(folder: Path, config: PixArtConfig, *, max_tokens: int) -> TrainedModel:
    """A published model by its configs, which is all that is read of it."""
    for name, content in (("t5", T5_XXL), ("vae", VAE)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
    resolution = 8 * config.sample_size
    return TrainedModel(
        name="published",
        kind="pixart",
        model_path=folder,
        identity="",
        num_classes=None,
        resolution=resolution,
        patch_pixels=16,
        buckets=((resolution, resolution),),
        text={"model": str(folder / "t5"), "revision": None, "max_tokens": max_tokens},
        vae={"model": str(folder / "vae"), "revision": None},
        process=ddpm_spec(),
        original_config=config,
    )


@pytest.mark.parametrize(
    ("config", "max_tokens", "card_gigabytes"),
    [(PIXART_XL_2_1024, 120, 8), (SIGMA_2K, 300, 12)],
    ids=["alpha 1024", "sigma 2K"],
)
def test_published_models_fit_the_cards_they_are_for(tmp_path, config, max_tokens, card_gigabytes):
    trained = published(tmp_path, config, max_tokens=max_tokens)
    settings = SamplingConfig.model_validate(SMALL_CARD | {"vae_dtype": "tested"})
    room = usable_bytes(card_gigabytes * 10**9)
    moments = moments_of(settings, trained, requests_of(4, trained.resolution), int(room))
    assert max(moment.total_bytes for moment in moments.values()) <= room


def test_short_passes_are_counted_as_captured_and_long_ones_as_they_are(tmp_path: Path) -> None:
    trained = published(tmp_path, SMALL, max_tokens=120)
    config = SamplingConfig(dtype="bfloat16", vae_dtype="float32", batch_size=2, compile=True)
    long, short = requests_of(2, 1024), requests_of(2, 512)
    parts = [moments_of(config, trained, requests, 10**12)[DENOISING].parts for requests in (short, long, short + long)]
    names = [{name for name in found if name not in ("transformer", "VAE")} for found in parts]
    at_once = "2 of 1024x1024 at once"
    assert names == [{"captured passes"}, {at_once}, {"captured passes", at_once}]


@pytest.mark.parametrize(("name", "side"), [("lora", 1024), ("dreambooth", 512)])
def test_recipes_of_small_cards_draw_in_8_gigabytes(tmp_path: Path, name: str, side: int) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / f"{name}.toml"
    settings = load_recipe(recipe).table("sampling", SamplingConfig)
    settings = settings.model_copy(update={"dtype": "bfloat16", "vae_dtype": "tested"})
    trained = published(tmp_path, PixArtConfig(sample_size=side // 8), max_tokens=120)
    moments = moments_of(settings, trained, requests_of(1, side), int(usable_bytes(8 * 10**9)))
    assert max(moment.total_bytes for moment in moments.values()) <= usable_bytes(8 * 10**9)


def test_a_plan_says_what_fits_and_what_would(run, tmp_path, capsys):
    (run / "raw").mkdir(exist_ok=True)
    (run / "raw" / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')

    def plan(**table: object) -> str:
        recipe = write_recipe(run, size="192x192", device="cpu", **table)
        main(["--recipe", str(recipe), "--run", str(run), "--stage", "2", "--plan"])
        return " ".join(capsys.readouterr().err.split())

    said = plan()
    for name in (READING, DENOISING, DECODING):
        assert f"memory while {name}: 0.0" in said
    assert "card of" not in said, "of a CPU there is none"
    assert "card of 8 GB has 7.2 GB for it, workspace and driver left out: it fits" in plan(card_gigabytes=8)
    assert "card of 0.5 GB has no room for it: workspace and driver take 0.8 GB" in plan(card_gigabytes=0.5)


def test_switches_are_found_that_make_it_fit(tmp_path):
    trained = published(tmp_path, SIGMA_2K, max_tokens=300)
    config = SamplingConfig(dtype="bfloat16", vae_dtype="bfloat16", vae_tiles=False, batch_size=4)
    footprint = Footprint(
        config=config, trained=trained, requests=requests_of(4, 2048), room_bytes=usable_bytes(8 * 10**9)
    )
    switches, moments = find_switches(footprint, footprint.moments())
    assert switches == {"text_encoder": "8bit", "vae_tiles": True}
    assert max(moment.total_bytes for moment in moments) <= 7.2e9
