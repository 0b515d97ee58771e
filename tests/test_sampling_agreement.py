"""A checkpoint from elsewhere is drawn from with what it was trained with, or it is said or refused."""

import json
from pathlib import Path

import pytest
import torch
from published_layouts import sigma_settings, write_original, write_pipeline, write_transformer
from safetensors.torch import load_file, save_file
from sampling_run import MAX_TOKENS, make_run, write_recipe
from tiny_encoders import save_codec, save_text_encoder

from encoders.opening import open_text_encoder
from errors import UserError
from pixart.model import PixArtConfig
from pixart.origins import ORIGINS_FILE
from pixart.processes.specs import ddpm_spec, flow_spec
from sampling.__main__ import main
from sampling.config import EncoderConfig
from sampling.foreign_weights import open_trained_model

T5, FLAN = "DeepFloyd/t5-v1_1-xxl", "google/flan-t5-xxl"
SD_VAE, SDXL_VAE = "stabilityai/sd-vae-ft-ema", "stabilityai/sdxl-vae"
ALPHA, SIGMA = EncoderConfig(text_model=T5, vae_model=SD_VAE), EncoderConfig(text_model=T5, vae_model=SDXL_VAE)
TINY = PixArtConfig(num_layers=1, num_heads=6, head_dim=64, caption_channels=32, sample_size=4)


@pytest.fixture(autouse=True)
def _weights_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders here have configs alone."""
    monkeypatch.setattr("sampling.foreign_weights.find_weight_files", lambda folder: [])


@pytest.mark.parametrize("layout", ["folder", "pth"])
@pytest.mark.parametrize(
    ("name", "encoders", "max_tokens", "cleaning"),
    [("alpha", ALPHA, 120, "diffusers"), ("sigma", SIGMA, 300, "none")],
)
def test_tokens_and_cleaning_are_the_weights_own(
    tmp_path: Path, layout: str, name: str, encoders: EncoderConfig, max_tokens: int, cleaning: str
) -> None:
    settings = {"sample_size": 32} if name == "alpha" else sigma_settings(32)
    if layout == "folder":
        start = write_transformer(tmp_path / name, **settings)
    else:
        scale = 1.0 if name == "alpha" else 0.5
        null = torch.zeros(1).expand(max_tokens, 4096)
        start = write_original(tmp_path / f"{name}.pth", scale=scale, null=null)
    told = {"PixArt-Sigma-XL-2-256x256"} if name == "sigma" else {"PixArt-XL-2-256x256"}
    trained = open_trained_model(str(start), encoders)
    assert trained.text is not None
    assert (trained.text["max_tokens"], trained.text["cleaning"]) == (max_tokens, cleaning)
    assert told.pop() in trained.origins.describe()
    # and who names no encoders gets those that it was trained with
    own = open_trained_model(str(start), None)
    assert own.text is not None and (own.text["model"], own.vae["model"]) == (T5, encoders.vae_model)


@pytest.mark.parametrize(
    ("other", "said", "name"),
    [
        ({"text_model": FLAN}, rf"features\.text_model is '{FLAN}', but .* were trained with '{T5}'", "text_encoder"),
        ({"max_tokens": 300}, r"features\.max_tokens is 300, but .* were trained with 120", "max_tokens"),
        ({"text_cleaning": "lower"}, r"features\.text_cleaning is 'lower', but .* with 'diffusers'", "cleaning"),
        ({"vae_model": SDXL_VAE}, rf"features\.vae_model is '{SDXL_VAE}', but .* with '{SD_VAE}'", "vae"),
    ],
)
def test_a_recipe_that_names_others_is_refused(tmp_path: Path, other: dict, said: str, name: str) -> None:
    start = str(write_transformer(tmp_path / "alpha", sample_size=64))
    encoders = EncoderConfig.model_validate(ALPHA.model_dump() | other)
    with pytest.raises(UserError, match=said):
        open_trained_model(start, encoders)
    trained = open_trained_model(start, encoders, departs_in=[name])
    assert trained.text is not None
    if name == "max_tokens":
        assert trained.text["max_tokens"] == 300


def test_a_vae_of_another_scale_is_refused_where_it_is_on_disk(tmp_path: Path) -> None:
    start = write_pipeline(tmp_path / "sigma", "PixArtSigmaPipeline", **sigma_settings(128))
    vae = save_codec(tmp_path / "vae")  # of scale 0.45
    with pytest.raises(UserError, match=r"features\.vae_model is scale 0\.45, but .* scale 0\.13025 \(published as"):
        open_trained_model(str(start), EncoderConfig(text_model=T5, vae_model=str(vae)))


def test_a_pipelines_prompts_are_cleaned_as_its_weights_texts_were(tmp_path: Path) -> None:
    for class_name, cleaning in (("PixArtAlphaPipeline", "diffusers"), ("PixArtSigmaPipeline", "none")):
        start = write_pipeline(tmp_path / class_name, class_name, num_layers=1, sample_size=64)
        save_text_encoder(start / "text_encoder")
        save_codec(start / "vae")
        trained = open_trained_model(str(start), None)
        assert trained.text is not None and trained.text["cleaning"] == cleaning


@pytest.mark.parametrize("kind", ["same", "random", "other"])
def test_the_null_caption_of_a_file_is_compared_with_the_encoders(
    tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    run = make_run(tmp_path)
    encoder = open_text_encoder(str(run / "t5"), max_tokens=MAX_TOKENS, dtype="float32")
    (own,) = encoder.encode([""])
    torch.manual_seed(0)
    null = {
        "same": torch.cat([own, torch.zeros(MAX_TOKENS - len(own), 32)]),
        "random": torch.randn(MAX_TOKENS, 32) / 32**0.5,
        "other": torch.full((MAX_TOKENS, 32), 2.0),
    }[kind]
    start = write_original(tmp_path / "PixArt.pth", TINY, scale=1.0, null=null)
    recipe = write_recipe(run, prompt="a fox", num_steps=2, checkpoint=str(start))
    features = f'[features]\ntext_model = "{run / "t5"}"\nvae_model = "{run / "vae"}"\n'
    recipe.write_text(recipe.read_text() + features)
    words = ["--recipe", str(recipe), "--run", str(run), "--stage", "2"]
    if kind == "other":
        with pytest.raises(
            UserError, match=r"text encoder .*t5 is not the one that .* null caption in .*PixArt\.pth; name"
        ):
            main(words)
        return
    main(words)
    said = " ".join(capsys.readouterr().err.split())
    assert ("PixArt.pth was drawn at random" in said) == (kind == "random")
    assert "PixArt: " in said and f"{MAX_TOKENS} tokens" in said


def test_an_encoder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "t5").rename(run / "moved")
    with pytest.raises(UserError) as caught:
        main(["--recipe", str(write_recipe(run, prompt="a fox")), "--run", str(run), "--stage", "2"])
    said = str(caught.value)
    assert "text encoder of stage 2, step 7" in said and f"{run / 't5'}" in said and "\n" not in said
    start = write_pipeline(tmp_path / "mine", "PixArtAlphaPipeline", num_layers=1, sample_size=64)
    with pytest.raises(UserError, match=r"mine comes without text encoder and VAE: the recipe must name them"):
        open_trained_model(str(start), None)


def test_copies_of_an_encoder_are_known_and_others_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    own = run / "training" / "stage2" / "step-7" / "model"
    copy = save_text_encoder(tmp_path / "copy")
    for path in copy.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    vae = str(run / "vae")
    assert open_trained_model(str(own), EncoderConfig(text_model=str(copy), vae_model=vae)).text is not None
    other = save_text_encoder(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"features\.text_model is '.*other', but .* with '.*t5' \(.*trainer\.json\)"):
        open_trained_model(str(own), EncoderConfig(text_model=str(other), vae_model=vae))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"process": {"name": "foo"}}, r"process is \{'name': 'foo'\}, which is no value of it"),
        ({"process": ddpm_spec() | {"schedule": {}}}, r"process is .*, which is no value of it"),
        ({"process": flow_spec() | {"prediction": "noise"}}, r"process is .*, which is no value of it"),
        ({"max_tokens": True}, "max_tokens is True, which is no value of it"),
        ({"vae": [""]}, r"vae is \[''\], which is no value of it"),
        ({"cleaning": "foo"}, "texts were cleaned as 'foo', which is none of lower, diffusers, strip, none"),
    ],
)
def test_a_record_of_what_is_not_known_here_is_one_line(tmp_path: Path, wrong: dict, said: str) -> None:
    folder = write_transformer(tmp_path / "mine" / "transformer", sample_size=64).parent
    (folder / ORIGINS_FILE).write_text(json.dumps({"text_encoder": [T5], "vae": [SD_VAE]} | wrong))
    with pytest.raises(UserError, match=rf"{ORIGINS_FILE}: {said}"):
        open_trained_model(str(folder), None)


def test_encoders_of_a_record_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    folder = write_transformer(tmp_path / "mine" / "transformer", sample_size=64).parent
    record = {"text_encoder": ["/gone/t5", str(save_text_encoder(tmp_path / "t5"))], "vae": ["/gone/vae", SD_VAE]}
    (folder / ORIGINS_FILE).write_text(json.dumps(record | {"process": flow_spec()}))
    trained = open_trained_model(str(folder), None)
    assert trained.text is not None
    assert (trained.text["model"], trained.vae["model"]) == (record["text_encoder"][1], SD_VAE)
    assert trained.process == flow_spec()
    (folder / ORIGINS_FILE).write_text(json.dumps(record | {"text_encoder": ["/gone/t5", "sha256:12"]}))
    said = r"mine was trained with '/gone/t5' \(.*origins\.json\), which is not there: name .* as features\.text_model"
    with pytest.raises(UserError, match=said):
        open_trained_model(str(folder), None)
