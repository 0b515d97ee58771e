"""Folders of the hub's repositories, named as `someone/model/vae`: found in the hub's cache, or said how to fetch."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_encoders import save_codec, save_text_encoder

import encoders.weights
from encoders.opening import open_codec, open_text_encoder
from encoders.weights import hub_repository, model_folder, require_model, resolve_model
from errors import MissingFileError, UserError
from pixart.convert import save_diffusers
from pixart.model import PixArt, PixArtConfig
from sampling.config import EncoderConfig
from sampling.foreign_weights import open_trained_model
from training.convert import main as convert
from training.stages.stage import find_weights


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `someone/pipe` in a hub's cache beside which no hub answers."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(encoders.weights, "hub_silence", lambda: "HF_HUB_OFFLINE is set")
    repository = tmp_path / "models--someone--pipe"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    save_codec(folder / "vae")
    save_text_encoder(folder / "text_encoder")
    shape = PixArtConfig(num_layers=1, num_heads=2, head_dim=12, caption_channels=32, sample_size=4)
    save_diffusers(PixArt(shape), folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    return folder


def test_encoders_are_opened_by_the_folder_of_a_repository(cached: Path) -> None:
    assert open_codec("someone/pipe/vae").spec.channels == 4
    assert len(open_text_encoder("someone/pipe/text_encoder", max_tokens=4, dtype="float32").encode(["a"])) == 1
    assert resolve_model("someone/pipe/vae").identity == "someone/pipe/vae@main"
    assert model_folder("someone/pipe/vae") == cached / "vae"
    assert hub_repository("someone/pipe/vae") == "someone/pipe"
    assert hub_repository(str(cached / "vae")) is None is hub_repository("../pipe/vae")


def test_a_transformer_is_named_by_its_folder_as_by_its_repository(cached: Path) -> None:
    whole, part = (find_weights(name, key="x") for name in ("someone/pipe", "someone/pipe/transformer"))
    assert part.path == whole.path == cached / "transformer"
    assert part.identity == whole.identity and part.origins.cleaning == whole.origins.cleaning is not None
    assert open_trained_model("someone/pipe/transformer", None).model_path == cached / "transformer"


@pytest.mark.usefixtures("cached")
def test_folders_that_are_not_there_are_said_with_the_way_to_fetch_them() -> None:
    way = r"someone/pipe/unet does not exist; .* run `hf download someone/pipe --include 'unet/\*'`"
    with pytest.raises(MissingFileError, match=rf"training\.x\.starts_from: model folder {way}"):
        find_weights("someone/pipe/unet", key="training.x.starts_from")
    with pytest.raises(MissingFileError, match=way):
        resolve_model("someone/pipe/unet")
    # two names that no repository of the hub can have
    assert model_folder("run--1/vae") is None
    with pytest.raises(UserError, match=r"features\.vae_model = 'run--1/vae' \(main\) is no local folder"):
        require_model(resolve_model("run--1/vae"), key="features.vae_model")


def test_an_original_file_is_named_as_the_hub_calls_it(cached: Path) -> None:
    encoders_of = EncoderConfig(text_model="someone/pipe/text_encoder", vae_model="someone/pipe/vae")
    convert([str(cached / "transformer"), str(cached / "PixArt-XL-2.pth")])
    start = find_weights("someone/pipe/PixArt-XL-2.pth", key="x")
    assert start.path == cached / "PixArt-XL-2.pth" and start.location == "someone/pipe/PixArt-XL-2.pth"
    assert open_trained_model("someone/pipe/PixArt-XL-2.pth", encoders_of).model_path == start.path
    way = r"someone/pipe/other\.pth does not exist; .* run `hf download someone/pipe other\.pth`"
    with pytest.raises(MissingFileError, match=rf"training\.x\.starts_from: {way}"):
        find_weights("someone/pipe/other.pth", key="training.x.starts_from")
    with pytest.raises(MissingFileError, match=rf"sampling\.checkpoint: {way}"):
        open_trained_model("someone/pipe/other.pth", encoders_of)
    with pytest.raises(MissingFileError, match=r"x: /no/such\.pth does not exist$"):
        find_weights("/no/such.pth", key="x")
