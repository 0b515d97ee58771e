"""Checkpoints from elsewhere: diffusers' pipelines and transformers, hub ids, original files; and broken ones."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from sampling_run import DIT, FLOW, MAX_TOKENS, PIXART, make_run, randomised, save_checkpoint, write_recipe
from transformers import AutoTokenizer, T5EncoderModel

from errors import UserError
from pipelines.recipe import load_recipe
from pixart.convert import save_diffusers
from pixart.dit import DiT
from pixart.drawing.denoise import draw_noise, make_generators
from pixart.layouts import export_weights, original_layout
from pixart.model import PixArt
from pixart.processes.specs import ddpm_spec
from sampling.__main__ import main
from sampling.config import EncoderConfig, encoder_config
from sampling.foreign_weights import open_trained_model
from sampling.trained_model import open_run_model

# published width and heads, one block
WIDE = replace(PIXART, num_layers=1, num_heads=6, head_dim=64)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture
def encoders(run: Path) -> EncoderConfig:
    return EncoderConfig(text_model=str(run / "t5"), vae_model=str(run / "vae"), max_tokens=MAX_TOKENS)


def make_pipeline(run: Path) -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(run / "t5"),
        text_encoder=T5EncoderModel.from_pretrained(run / "t5"),
        vae=AutoencoderKL.from_pretrained(run / "vae"),
        transformer=PixArtTransformer2DModel.from_pretrained(run / "training" / "stage2" / "step-7" / "model"),
        scheduler=DPMSolverMultistepScheduler(beta_end=0.03),
    )


def sample(run: Path, **table: object) -> np.ndarray:
    """Draw one image and return its pixels."""
    table = {"prompt": "a red circle", "size": "32x32", "num_steps": 5} | table
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", "2"])
    (path,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_a_pipeline_folder_brings_its_own_encoders_and_schedule(run):
    pipeline = make_pipeline(run)
    pipeline.save_pretrained(run / "saved")
    for name in ("t5", "vae", "training"):
        shutil.rmtree(run / name)
    actual = sample(run, checkpoint=str(run / "saved"), seed=3)
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_noise(make_generators([3]), (4, 4, 4))
    options = {"use_resolution_binning": False, "clean_caption": False, "width": 32, "height": 32, "latents": noise}
    expected = pipeline("a red circle", num_inference_steps=5, **options).images[0]
    assert np.abs(actual - np.asarray(expected).astype(int)).max() <= 2
    trained = open_trained_model(str(run / "saved"), None)
    assert trained.text is not None and trained.text["max_tokens"] == 120
    index = run / "saved" / "model_index.json"
    index.write_text(index.read_text().replace("PixArtAlphaPipeline", "PixArtSigmaPipeline"))
    trained = open_trained_model(str(run / "saved"), None)
    assert trained.text is not None and trained.text["max_tokens"] == 300


def test_a_pipeline_folder_without_a_text_encoder_keeps_its_vae(run, encoders):
    make_pipeline(run).save_pretrained(run / "saved")
    shutil.rmtree(run / "saved" / "text_encoder")
    with pytest.raises(
        UserError, match=r"features\.max_tokens is 40, but .* with 120 \(PixArtAlphaPipeline of .*json\)"
    ):
        open_trained_model(str(run / "saved"), encoders)
    encoders = encoders.model_copy(update={"max_tokens": None})
    trained = open_trained_model(str(run / "saved"), encoders)
    assert trained.text is not None and trained.text["model"] == encoders.text_model
    assert trained.vae["model"] == str(run / "saved" / "vae")
    shutil.rmtree(run / "saved" / "vae")
    assert open_trained_model(str(run / "saved"), encoders).vae["model"] == encoders.vae_model


def test_pickled_weights_are_fetched_of_parts_that_have_no_others(run, tmp_path, monkeypatch):
    make_pipeline(run).save_pretrained(tmp_path / "saved")
    weights = next((tmp_path / "saved" / "transformer").glob("*.safetensors"))
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path / "saved")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("sampling.foreign_weights.require_model", lambda source, key: None)
    open_trained_model("someone/pixart", None)
    assert asked == [["*.json", "*.safetensors", "*.model"], ["transformer/*.bin"]]


def test_a_hub_id_is_found_in_the_cache_by_revision(run, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--someone--pixart" / "snapshots" / "abc"
    make_pipeline(run).save_pretrained(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "v2").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    trained = open_trained_model("someone/pixart", None, revision="v2")
    assert trained.model_path == snapshot / "transformer"
    with pytest.raises(UserError, match=r"sampling\.checkpoint = 'someone/pixart' \(main\) is .* not in the hub cache"):
        open_trained_model("someone/pixart", None)


def test_a_bare_transformer_needs_encoders(run, encoders):
    own = run / "training" / "stage2" / "step-7" / "model"
    trained = open_trained_model(str(own), None)  # trainer.json lies beside it
    assert trained.text is not None and trained.vae["model"] == str(run / "vae")
    assert (trained.text["model"], trained.text["max_tokens"]) == (str(run / "t5"), MAX_TOKENS)
    folder = shutil.copytree(own, run / "bare")
    with pytest.raises(UserError, match=r"features\.text_model and features\.vae_model"):
        open_trained_model(str(folder), None)
    trained = open_trained_model(str(folder), encoders)
    text = {"model": str(run / "t5"), "revision": None, "max_tokens": MAX_TOKENS, "cleaning": "lower"}
    assert trained.text == text
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_type": "layer_norm"}))
    with pytest.raises(UserError, match="PixArtTransformer2DModel of norm_type layer_norm, not a PixArt or DiT"):
        open_trained_model(str(folder), encoders)


def test_the_folder_of_a_checkpoint_or_of_its_stage_opens_as_the_runs_own(run):
    own, stage = open_run_model(run, "stage3"), run / "training" / "stage3"
    assert open_trained_model(str(stage / "step-7"), None) == open_trained_model(str(stage), None) == own
    (own.model_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-7 is damaged: model/diffusion_pytorch_model\.safetensors is empty"):
        open_trained_model(str(stage / "step-7"), None)
    with pytest.raises(UserError, match=r"step-7 is damaged: model/diffusion_pytorch_model\.safetensors is empty"):
        open_trained_model(str(stage), None)


def test_a_checkpoints_model_folder_is_of_the_process_beside_it(run, encoders):
    save_checkpoint(run, 2, randomised(PixArt(replace(PIXART, out_channels=4))))
    folder = run / "training" / "stage2" / "step-7"
    trained = open_trained_model(str(folder / "model"), encoders)
    assert trained.process == FLOW
    assert trained.load().config.out_channels == 4
    shutil.rmtree(folder / "scheduler")
    assert open_trained_model(str(folder / "model"), encoders).process == FLOW  # trainer.json says it, too
    (folder / "trainer.json").unlink()
    with pytest.raises(UserError, match=r"model gives 4 channels for latents of 4, but process ddpm needs 8"):
        open_trained_model(str(folder / "model"), encoders).load()


def test_a_trainer_of_before_there_was_a_choice_is_of_ddpm(run):
    path = run / "training" / "stage2" / "step-7" / "trainer.json"
    trainer = json.loads(path.read_text())
    schedule = trainer.pop("process")["schedule"] | {"beta_end": 0.03}
    path.write_text(json.dumps(trainer | {"schedule": schedule}))
    assert open_run_model(run, "stage2").process == ddpm_spec(schedule)


def test_a_folder_of_256_pixels_offers_the_forty_sizes_of_the_paper(run, encoders):
    save_diffusers(PixArt(replace(PIXART, sample_size=32)), run / "model256")
    trained = open_trained_model(str(run / "model256"), encoders)
    assert len(trained.buckets) == 40
    assert {trained.buckets[0], (256, 256), trained.buckets[-1]} == {(128, 512), (256, 256), (512, 128)}


@pytest.mark.parametrize("has_positions", [True, False])
def test_an_original_pth_draws_what_its_conversion_draws(run, has_positions):
    model = randomised(PixArt(WIDE))
    save_diffusers(model, run / "converted")
    weights = export_weights(model, original_layout(WIDE))
    if has_positions:
        weights["pos_embed"] = torch.zeros(1, 4, 384)
    torch.save({"state_dict": {}, "state_dict_ema": weights}, run / "PixArt.pth")
    recipe = write_recipe(run)
    features = f'[features]\ntext_model = "{run / "t5"}"\nvae_model = "{run / "vae"}"\nmax_tokens = 40\n'

    def draw(*settings: str) -> bytes:
        recipe.write_text(write_recipe(run, prompt="a fox", num_steps=2).read_text() + features)
        flags = [flag for setting in settings for flag in ("--set", f"sampling.{setting}")]
        main(["--recipe", str(recipe), "--run", str(run), "--stage", "2", *flags])
        (path,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
        return Image.open(path).tobytes()

    resolution = [] if has_positions else ["checkpoint_resolution=32"]
    original = draw(f"checkpoint={run / 'PixArt.pth'}", *resolution)
    assert original == draw(f"checkpoint={run / 'converted'}")


def test_an_original_dit_knows_its_classes(run, encoders):
    config = replace(DIT, num_layers=1, num_heads=6, head_dim=64)
    weights = export_weights(randomised(DiT(config)), original_layout(config))
    torch.save(weights | {"pos_embed": torch.zeros(1, 4, 384)}, run / "DiT.pt")
    trained = open_trained_model(str(run / "DiT.pt"), encoders)
    assert (trained.kind, trained.num_classes, trained.resolution, trained.text) == ("dit", 5, 32, None)
    assert trained.load().config == config


def original_mistakes(run: Path) -> dict[str, tuple[object, str]]:
    weights = export_weights(PixArt(WIDE), original_layout(WIDE))
    narrow = export_weights(PixArt(PIXART), original_layout(PIXART))
    return {
        "positions": (weights, r"hold no positions, .* \(see sampling\.checkpoint_resolution\)"),
        "narrow": (narrow, r"width 24 is none of \[384, 768, 1024, 1152\]"),
        "other": ({"a": torch.zeros(1)}, "neither an original PixArt nor a DiT"),
        "code": (
            {"a": Fraction(1, 2)},
            r"holds more than weights, namely fractions\.Fraction; to open that could run any",
        ),
    }


@pytest.mark.parametrize("name", ["positions", "narrow", "other", "code"])
def test_originals_that_cannot_be_used_are_refused(run, encoders, name):
    content, message = original_mistakes(run)[name]
    torch.save(content, run / "x.pth")
    with pytest.raises(UserError, match=message):
        open_trained_model(str(run / "x.pth"), encoders)
    (run / "x.pth").write_bytes(b"no zip, no pickle")
    with pytest.raises(UserError, match=r"x\.pth is not a checkpoint of torch"):
        open_trained_model(str(run / "x.pth"), encoders)


def test_a_checkpoint_without_ema_is_refused(run):
    path = run / "training" / "stage2" / "step-7" / "trainer.json"
    path.write_text(path.read_text().replace('"ema"', '"raw"'))
    with pytest.raises(UserError, match="holds raw weights, samples are drawn from ema weights"):
        open_run_model(run, "stage2")


def test_weights_that_give_nan_leave_no_image(run):
    model = randomised(PixArt(PIXART))
    model.blocks[1].mlp.out.weight.data[0] = 1e38
    save_checkpoint(run, 2, model)
    with pytest.raises(UserError) as error:
        sample(run)
    weights = run / "training" / "stage2" / "step-7" / "model"
    said = "a-red-circle-549fab96.png (seed 0): the model gave latents that are not finite, at pass 1 of 5"
    assert str(error.value) == f"{said}: `make verify RUN={run}` finds weights that are damaged in {weights}"
    make_pipeline(run).save_pretrained(run / "pipeline")
    with pytest.raises(UserError) as error:
        sample(run, checkpoint=str(run / "pipeline"), dtype="bfloat16")
    weights = run / "pipeline" / "transformer"
    other = "if they are sound, set sampling.dtype = 'float32', it is bfloat16 now"
    assert str(error.value) == f"{said}: the weights of {weights} are at fault, put them there anew; {other}"
    assert not list((run / "samples" / "stage2-prompt").glob("*.png"))


def test_nan_weights_are_named_before_anything_is_drawn(run):
    model = randomised(PixArt(PIXART))
    model.blocks[1].mlp.out.bias.data[0] = torch.nan
    save_checkpoint(run, 2, model)
    with pytest.raises(UserError) as error:
        sample(run)
    weights = run / "training" / "stage2" / "step-7" / "model"
    said = f"{weights}: 1 of the 24 numbers of transformer_blocks.1.ff.net.2.bias are not finite: the training that wro"
    assert str(error.value).startswith(said)
    assert not list((run / "samples" / "stage2-prompt").glob("*.png"))


def test_a_vae_of_nan_leaves_no_image(run):
    (path,) = (run / "vae").glob("*.safetensors")
    weights = load_file(path)
    save_file(weights | {"decoder.conv_out.weight": weights["decoder.conv_out.weight"] * torch.nan}, path)
    with pytest.raises(UserError) as error:
        sample(run)
    said = "a-red-circle-549fab96.png (seed 0): the VAE gave pixels that are not finite: the weights of VAE of stage 2,"
    assert str(error.value).startswith(said) and str(error.value).endswith("vae are at fault, put them there anew")
    assert not list((run / "samples" / "stage2-prompt").glob("*.png"))


def test_weights_that_were_cut_short_are_named(run):
    (path,) = (run / "training" / "stage2" / "step-7" / "model").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"step-7 is damaged: model/.*\.safetensors is cut short or overwritten"):
        sample(run)


def test_wrong_encoder_settings_name_their_key(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[features]\ntext_model = "a"\nvae_model = 3\n')
    with pytest.raises(UserError, match=r"features\.vae_model: Input should be a valid string"):
        encoder_config(load_recipe(recipe))
    recipe.write_text('[features]\ntext_model = "a"\n')
    assert encoder_config(load_recipe(recipe)) is None
