"""What weights were trained with is known where a stage starts from them; what differs is refused."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_run
from huggingface_hub import constants
from published_layouts import original_weights_of, sigma_settings, write_original, write_pipeline, write_transformer
from safetensors.torch import load_file, save_file
from tiny_encoders import save_codec, save_text_encoder
from training_run import D_TEXT, arguments, make_run

from errors import UserError
from pipelines.command import parse_command
from pipelines.store.families import NULL_CAPTION_FILE
from pixart.convert import save_diffusers
from pixart.model import PixArt, PixArtConfig
from pixart.origins import ORIGINS_FILE
from pixart.processes.specs import flow_spec
from training.convert import main as convert
from training.launch.preflight import inspect_stage, print_plan
from training.stages.stage import TrainingJob, find_weights, open_stage

T5, FLAN = "DeepFloyd/t5-v1_1-xxl", "google/flan-t5-xxl"
SD_VAE, SDXL_VAE = "stabilityai/sd-vae-ft-ema", "stabilityai/sdxl-vae"
ALPHA = {"text_model": T5, "max_tokens": 120, "cleaning": "diffusers", "vae_model": SD_VAE, "scale": 0.18215}
SIGMA = {"text_model": T5, "max_tokens": 300, "cleaning": "none", "vae_model": SDXL_VAE, "scale": 0.13025}
TINY = PixArtConfig(num_layers=1, num_heads=6, head_dim=64, caption_channels=D_TEXT, sample_size=4)

RECIPE = training_run.RECIPE
MakeRun = Callable[..., Path]


@pytest.fixture
def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Makes a run whose features say that they are of these encoders."""

    def make(*, text_model: str, max_tokens: int, cleaning: str, vae_model: str, scale: float) -> Path:
        text = {"model": text_model, "max_tokens": max_tokens, "cleaning": cleaning}
        for key, value in text.items():
            monkeypatch.setitem(training_run.TEXT, key, value)
        for key, value in {"model": vae_model, "scaling_factor": scale, "shift_factor": 0.0}.items():
            monkeypatch.setitem(training_run.VAE, key, value)
        recipe = (
            RECIPE.replace("toy/t5", text_model)
            .replace("toy/vae", vae_model)
            .replace("max_tokens = 12", f'max_tokens = {max_tokens}\ntext_cleaning = "{cleaning}"')
        )
        begin, end = recipe.index("[model]"), recipe.index("[training]")
        monkeypatch.setattr(training_run, "RECIPE", recipe[:begin] + recipe[end:])
        monkeypatch.setattr(
            training_run.write_text,
            "__kwdefaults__",
            (training_run.write_text.__kwdefaults__ or {}) | {"max_tokens": max_tokens},
        )
        return make_run(Path(tempfile.mkdtemp(dir=tmp_path)))

    return make


def job_of(run: Path, start: Path | str, *, stage: int = 2, **settings: object) -> TrainingJob:
    argv = arguments(run, stage, starts_from=str(start), **settings)
    return open_stage(parse_command("training", "", argv=argv, has_stages=True))


@pytest.mark.parametrize("layout", ["folder", "pipeline", "pth"])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, None),
        ({"text_model": "google/t5-v1_1-xxl"}, None),
        ({"text_model": FLAN}, rf"features\.text_model is '{FLAN}', but .* were trained with '{T5}' \(published as"),
        ({"max_tokens": 300}, r"features\.max_tokens is 300, but .* were trained with 120"),
        ({"cleaning": "lower"}, r"features\.text_cleaning is 'lower', but .* were trained with 'diffusers'"),
        ({"vae_model": SDXL_VAE}, rf"features\.vae_model is '{SDXL_VAE}', but .* were trained with '{SD_VAE}'"),
        ({"scale": 0.13025}, r"features\.vae_model is scale 0\.13025, but .* were trained with scale 0\.18215"),
    ],
)
def test_the_released_alpha_says_what_it_was_trained_with(
    run_with: MakeRun, tmp_path: Path, layout: str, other: dict, said: str | None
) -> None:
    run = run_with(**(ALPHA | other))
    if layout == "folder":
        start = write_transformer(tmp_path / "alpha", sample_size=64)
    elif layout == "pipeline":
        start = write_pipeline(tmp_path / "alpha", "PixArtAlphaPipeline", sample_size=64)
    else:
        start = write_original(
            tmp_path / "PixArt-XL-2-512x512.pth", sample_size=64, scale=1.0, null=torch.zeros(1).expand(120, 4096)
        )
    if said is None:
        described = job_of(run, start).origins.describe()
        expected = "published as PixArt-alpha/PixArt-XL-2-512x512"
        assert f"text by {T5}" in described and expected in described and "VAE stabilityai/sd-vae-ft-ema" in described
        return
    with pytest.raises(UserError, match=said) as caught:
        job_of(run, start)
    name = {"text_model": "text_encoder", "vae_model": "vae", "scale": "vae"}.get(next(iter(other)), next(iter(other)))
    assert f"departs_in = ['{name}']" in str(caught.value) and "\n" not in str(caught.value)
    job = job_of(run, start, departs_in=[name])
    assert any("as training.stage2.departs_in says" in line for line in job.departures)


@pytest.mark.parametrize("side", [32, 64, 128, 256])
@pytest.mark.parametrize("layout", ["named folder", "pipeline", "pth", "pth without positions"])
def test_the_released_sigma_says_what_it_was_trained_with(
    run_with: MakeRun, tmp_path: Path, side: int, layout: str
) -> None:
    run = run_with(**SIGMA)
    name = {32: "256x256", 64: "512-MS", 128: "1024-MS", 256: "2K-MS"}[side]
    if layout == "named folder":
        start = write_transformer(tmp_path / f"PixArt-Sigma-XL-2-{name}", **sigma_settings(side))
    elif layout == "pipeline":
        start = write_pipeline(
            tmp_path / "sigma", "PixArtSigmaPipeline", vae={"scaling_factor": 0.13025}, **sigma_settings(side)
        )
    else:
        scale = side / 64 if layout == "pth" else None
        start = write_original(
            tmp_path / "sigma.pth", sample_size=side, scale=scale, null=torch.zeros(1).expand(300, 4096)
        )
    job = job_of(run, start)
    described = job.origins.describe()
    assert "300 tokens" in described and "cleaned as none" in described and "scale 0.13025" in described
    if layout != "pth without positions":
        # what positions span stays, whatever the resolution: 32 pixels are 4 latents here
        assert job.settings.interpolation_scale == 4 / 64
    alpha_features = run_with(**ALPHA | {"max_tokens": 300, "cleaning": "strip"})
    with pytest.raises(UserError, match=r"features\.vae_model is '.*sd-vae-ft-ema', but .* were trained with"):
        job_of(alpha_features, start)


def test_alpha_and_sigma_of_512_pixels_are_told_apart_where_anything_tells(run_with: MakeRun, tmp_path: Path) -> None:
    """A config that has been written anew says neither: what both have is known, and the rest is not guessed."""
    run = run_with(**ALPHA)
    start = write_transformer(tmp_path / "mine", **sigma_settings(64))
    job = job_of(run, start)
    both = "published as PixArt-alpha/PixArt-XL-2-512x512 or PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
    described = job.origins.describe()
    assert both in described and "not known: tokens, cleaning, VAE, its scale" in described
    with pytest.raises(UserError, match=r"text_model is 'google/flan-t5-xxl', but"):
        job_of(run_with(**ALPHA | {"text_model": FLAN}), start)


def as_fp16(folder: Path, copy: Path) -> Path:
    """Copy a model with its weights in half precision, as people keep them."""
    shutil.copytree(folder, copy)
    for path in copy.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return copy


def tiny_pipeline(folder: Path, *, seed: int = 0) -> Path:
    """A pipeline with encoders of its own, which is none that was published."""
    write_pipeline(
        folder, "PixArtAlphaPipeline", num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=4
    )
    save_text_encoder(folder / "text_encoder", seed=seed)
    save_codec(folder / "vae", seed=seed)
    return folder


def test_encoders_on_disk_are_known_by_their_weights_and_not_by_their_names(run_with: MakeRun, tmp_path: Path) -> None:
    start = tiny_pipeline(tmp_path / "pipeline")
    text, vae = as_fp16(start / "text_encoder", tmp_path / "t5-copy"), as_fp16(start / "vae", tmp_path / "vae-copy")
    right = ALPHA | {"text_model": str(text), "vae_model": str(vae), "scale": 0.45}
    for named in (start, start / "transformer"):
        assert not job_of(run_with(**right), named).departures
    other_text = save_text_encoder(tmp_path / "t5-other", seed=1)
    with pytest.raises(UserError, match=r"features\.text_model is '.*t5-other', but .* with '.*pipeline/text_encoder'"):
        job_of(run_with(**right | {"text_model": str(other_text)}), start)
    other_vae = save_codec(tmp_path / "vae-other", seed=1)  # of the same scale
    with pytest.raises(UserError, match=r"features\.vae_model is '.*vae-other', but .* with '.*pipeline/vae'"):
        job_of(run_with(**right | {"vae_model": str(other_vae)}), start)


def test_a_decoder_of_its_own_makes_no_other_latents(run_with: MakeRun, tmp_path: Path) -> None:
    start = tiny_pipeline(tmp_path / "pipeline")
    vae = tmp_path / "vae-mse"
    shutil.copytree(start / "vae", vae)
    (path,) = vae.glob("*.safetensors")
    weights = load_file(path)
    tuned = {name: tensor + (0.1 if name.startswith("decoder.") else 0) for name, tensor in weights.items()}
    save_file(tuned, path, {"format": "pt"})
    right = ALPHA | {"text_model": str(start / "text_encoder"), "vae_model": str(vae), "scale": 0.45}
    assert not job_of(run_with(**right), start).departures


def test_a_hub_id_is_known_by_its_pipeline_and_its_name(
    run_with: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the encoders around a transformer on the hub the configs are fetched alone."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("PixArt-Sigma-XL-2-512-MS", "PixArt-XL-2-512x512"):
        snapshot = tmp_path / "hub" / f"models--PixArt-alpha--{name}" / "snapshots" / "abc"
        (snapshot.parent.parent / "refs").mkdir(parents=True)
        (snapshot.parent.parent / "refs" / "main").write_text("abc")
        write_transformer(snapshot / "transformer", **sigma_settings(64))
    start = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
    vae = save_codec(tmp_path / "hub" / "models--stabilityai--sdxl-vae" / "snapshots" / "abc")
    (vae.parent.parent / "refs").mkdir()
    (vae.parent.parent / "refs" / "main").write_text("abc")
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}
    sigma = tmp_path / "hub/models--PixArt-alpha--PixArt-Sigma-XL-2-512-MS/snapshots/abc"
    (sigma / "vae").mkdir()
    (sigma / "vae" / "config.json").write_text(json.dumps(config))
    (sigma / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    job = job_of(run_with(**SIGMA), start)
    assert not job.departures and f"published as {start}" in job.origins.describe()
    with pytest.raises(UserError, match=r"max_tokens is 120, but .* were trained with 300"):
        job_of(run_with(**SIGMA | {"max_tokens": 120}), start)
    alpha = job_of(run_with(**ALPHA), "PixArt-alpha/PixArt-XL-2-512x512").origins.describe()
    assert "120 tokens" in alpha and "Sigma" not in alpha


def test_what_nothing_tells_is_said_and_not_refused(run_with: MakeRun, tmp_path: Path) -> None:
    start = tiny_pipeline(tmp_path / "pipeline")
    job = job_of(run_with(**ALPHA | {"vae_model": str(start / "vae"), "scale": 0.45}), start)
    (line,) = job.departures
    assert f"features.text_model is '{T5}'" in line and "whether they are the same, nothing here tells" in line


def test_positions_of_a_file_are_taken_and_a_typed_scale_that_contradicts_is_refused(
    run_with: MakeRun, tmp_path: Path
) -> None:
    """Sigma's file of 256 pixels has positions half as far apart; opened as 1 its output was 40% off."""
    run = run_with(**ALPHA)
    start = write_original(tmp_path / "sigma.pth", TINY, scale=0.5)
    assert job_of(run, start).settings.interpolation_scale == 0.5
    twice = tmp_path / "folder"
    save_diffusers(PixArt(PixArtConfig(**{**vars(TINY), "sample_size": 2, "interpolation_scale": 0.5})), twice)
    assert job_of(run, twice).settings.interpolation_scale == 1.0
    said = r"training\.stage2\.interpolation_scale is 1, but .*sigma\.pth\) were trained with 0\.5"
    with pytest.raises(UserError, match=said):
        job_of(run, start, interpolation_scale=1.0)
    job = job_of(run, start, interpolation_scale=1.0, departs_in=["positions"])
    assert job.settings.interpolation_scale == 1.0
    # at another resolution both are used, as in the paper: it is said
    job = job_of(run, twice, interpolation_scale=2.0)
    assert (
        "interpolation_scale 2 at 4 latents a side; the weights have 0.5 at 2, which spans what 1" in job.departures[0]
    )
    # of weights that nobody has trained positions are as they always were, and so is what identifies the stage
    argv = [*arguments(run, 2, starts_from="scratch"), "--set", "model.num_layers=1"]
    scratch = open_stage(parse_command("training", "", argv=argv, has_stages=True))
    assert scratch.settings.position_scale == 1.0
    assert "training.interpolation_scale" not in scratch.fingerprint.fields


def features_null(run: Path) -> torch.Tensor:
    (null,) = load_file(run / "features" / "text" / NULL_CAPTION_FILE).values()
    return null.float()


def test_the_null_caption_of_a_file_is_compared_with_the_features(run_with: MakeRun, tmp_path: Path) -> None:
    run = run_with(**ALPHA | {"text_model": "someone/t5"})
    null = features_null(run)
    padded = torch.cat([null * 1.01, torch.full((10, D_TEXT), 7.0)])  # rounded, and padding that nobody attends to
    same = write_original(tmp_path / "same.pth", TINY, scale=1.0, null=padded)
    assert not job_of(run, same, departs_in=["max_tokens"]).departures[1:]
    torch.manual_seed(0)
    random = torch.randn(120, D_TEXT) / D_TEXT**0.5
    drawn = write_original(tmp_path / "drawn.pth", TINY, scale=1.0, null=random)
    (line,) = job_of(run, drawn).departures
    assert "drawn.pth was drawn at random, as PixArt-alpha's code does" in line
    other = write_original(tmp_path / "other.pth", TINY, scale=1.0, null=torch.ones(120, D_TEXT) * 3)
    with pytest.raises(UserError, match=r"text_model is 'someone/t5', but .* with another null caption, which is in"):
        job_of(run, other)


def test_a_recorded_origin_goes_with_the_folder(run_with: MakeRun, tmp_path: Path) -> None:
    """Our own XL/2 is no released alpha, though it has its shape: its record says what it was trained with."""
    run = run_with(**ALPHA | {"text_model": FLAN, "cleaning": "lower"})
    start = write_transformer(tmp_path / "mine" / "transformer", sample_size=64).parent
    with pytest.raises(UserError, match="text_model is 'google/flan-t5-xxl', but"):
        job_of(run, start)
    record = {"text_encoder": [FLAN], "max_tokens": 120, "cleaning": "lower", "vae": [SD_VAE], "vae_scale": 0.18215}
    (start / ORIGINS_FILE).write_text(json.dumps(record))
    job = job_of(run, start)
    assert not job.departures and f"text by {FLAN}" in job.origins.describe()
    # the table of published models says nothing beside it: no other name of the encoder, and not what is left out
    with pytest.raises(UserError, match=rf"text_model is '{T5}', but .* were trained with '{FLAN}'"):
        job_of(run_with(**ALPHA | {"cleaning": "lower"}), start)
    (start / ORIGINS_FILE).write_text(json.dumps({"vae": [SD_VAE]}))  # as of a DiT that was re-parameterised
    assert "not known: text encoder, tokens, cleaning" in job_of(run, start).origins.describe()
    (start / ORIGINS_FILE).write_text(json.dumps(record | {"max_tokens": "many"}))
    with pytest.raises(UserError, match=rf"{ORIGINS_FILE}: max_tokens is 'many', which is no value of it"):
        job_of(run, start)


def test_a_checkpoint_of_a_published_shape_was_trained_with_what_it_says_alone(tmp_path: Path) -> None:
    """Our XL/2 of Flan-T5 went by the name of the released models' encoder, too, and was no other than that."""
    weights = write_transformer(tmp_path / "step-5" / "model", sample_size=64, interpolation_scale=1.0)
    text = {"model": FLAN, "max_tokens": 120, "cleaning": "lower"}
    trainer = {"text": text, "vae": {"model": SD_VAE, "scaling_factor": 0.18215, "factor": 8}, "resolution": 512}
    (weights.parent / "trainer.json").write_text(json.dumps(trainer | {"interpolation_scale": 1.0}))
    origins = find_weights(str(weights), key="x").origins
    assert origins.text_encoder is not None and origins.text_encoder.value == (FLAN,)
    # and a file of it, too
    record = json.dumps({"text_encoder": [FLAN], "max_tokens": 120})
    shape = PixArtConfig(sample_size=64)
    file = tmp_path / "mine.pth"
    torch.save({"state_dict": original_weights_of(shape, scale=1.0), "origins": record}, file)
    origins = find_weights(str(file), key="x").origins
    assert origins.text_encoder is not None and origins.text_encoder.value == (FLAN,) and origins.cleaning is None


@pytest.mark.parametrize("fault", ["never fetched", "cut", "before torch 1.6", "a program"])
def test_an_encoder_that_cannot_be_read_tells_nothing(run_with: MakeRun, tmp_path: Path, fault: str) -> None:
    """People clone a pipeline and fetch its transformer alone: its text encoder is a pointer of git-lfs then."""
    start = tiny_pipeline(tmp_path / "pipeline")
    copy = shutil.copytree(start / "text_encoder", tmp_path / "copy")
    file = copy / "model.safetensors"
    if fault == "never fetched":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:99])
    else:
        stored: object = load_file(file) if fault == "before torch 1.6" else {"shared.weight": Path.cwd}
        file.unlink()
        torch.save(stored, copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    right = {"text_model": str(copy), "vae_model": str(start / "vae"), "scale": 0.45}
    departures = job_of(run_with(**ALPHA | right), start).departures
    if fault == "before torch 1.6":
        assert not departures
    else:
        assert [line.endswith("whether they are the same, nothing here tells") for line in departures] == [True]


def test_the_plan_names_what_the_weights_were_trained_with(
    run_with: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = write_transformer(tmp_path / "alpha", sample_size=64)
    job = job_of(run_with(**ALPHA), start)
    print_plan(job, inspect_stage(job, 1))
    said = " ".join(capsys.readouterr().err.split())
    source = "(published as PixArt-alpha/PixArt-XL-2-512x512)"
    assert f"start from {start}: text by {T5}, 120 tokens, cleaned as diffusers {source};" in said
    assert f"VAE {SD_VAE}, scale 0.18215 {source}; positions of 64 latents a side at scale 1" in said


def test_what_weights_were_trained_with_goes_through_every_conversion(run_with: MakeRun, tmp_path: Path) -> None:
    """A folder, an original file and a safetensors file of it, and back: none forgets the encoders."""
    pipeline = tiny_pipeline(tmp_path / "pipeline")
    save_diffusers(PixArt(TINY), pipeline / "transformer")
    start = str(pipeline)
    for target in ("one", "two.pth", "three", "four.safetensors", "five"):
        convert([start, str(tmp_path / target)])
        start = str(tmp_path / target)
        origins = find_weights(start, key="x").origins
        assert origins.max_tokens is not None and origins.cleaning is not None
        assert (origins.max_tokens.value, origins.cleaning.value) == (120, "diffusers")
        assert origins.text_encoder is not None and origins.text_encoder.value[0] == str(pipeline / "text_encoder")
        assert origins.vae_scale is not None and origins.vae_scale.value == 0.45
    record = json.loads((tmp_path / "five" / ORIGINS_FILE).read_text())
    assert record == json.loads((tmp_path / "one" / ORIGINS_FILE).read_text())
    right = {"text_model": str(pipeline / "text_encoder"), "vae_model": str(pipeline / "vae"), "scale": 0.45}
    assert not job_of(run_with(**ALPHA | right), tmp_path / "four.safetensors").departures
    with pytest.raises(UserError, match=r"max_tokens is 300, but .*four\.safetensors\) were trained with 120"):
        job_of(run_with(**ALPHA | right | {"max_tokens": 300}), tmp_path / "four.safetensors")


def test_networks_beside_the_trained_one_are_compared_too(run_with: MakeRun, tmp_path: Path) -> None:
    start, teacher = tiny_pipeline(tmp_path / "pipeline"), tiny_pipeline(tmp_path / "teacher", seed=1)
    right = {"text_model": str(start / "text_encoder"), "vae_model": str(start / "vae"), "scale": 0.45}
    run = run_with(**ALPHA | right)
    argv = [*arguments(run, 2, starts_from=str(start)), "--set", f'training.stage2.networks.teacher="{teacher}"']
    with pytest.raises(UserError, match=r"text_model is .*, but .*networks\.teacher \(.*teacher/transformer\) were"):
        open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_a_file_says_of_which_process_it_is_to_adapters_and_to_networks_beside(
    run_with: MakeRun, tmp_path: Path
) -> None:
    """They went by the default: flow's adapters were refused, ddpm's let on, and a teacher of flow was one of ddpm."""
    run = run_with(**ALPHA)
    weights = original_weights_of(replace(TINY, out_channels=4), scale=1.0)
    file = tmp_path / "flow.pth"
    torch.save({"state_dict": weights, "origins": json.dumps({"process": flow_spec()})}, file)
    assert job_of(run, file, process="flow", trains="lora").start.process == flow_spec()
    argv = [*arguments(run, 2, starts_from=str(file), trains="lora"), "--set", "training.stage2.process='ddpm'"]
    with pytest.raises(UserError, match=r"flow\.pth\) were trained with process flow, and .*\.process is 'ddpm'"):
        open_stage(parse_command("training", "", argv=argv, has_stages=True))
    argv = [*arguments(run, 2, starts_from=str(file), process="flow"), "--set", f'training.networks.teacher="{file}"']
    job = open_stage(parse_command("training", "", argv=argv, has_stages=True))
    assert job.networks["teacher"].process == flow_spec()
