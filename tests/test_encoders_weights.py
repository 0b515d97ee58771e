"""Frozen models in folders as people have them: variants, pieces and pickles open, damage is said in our own words."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tiny_encoders import save_codec, save_text_encoder
from transformers import T5EncoderModel

from encoders.opening import latent_spec, open_codec, open_text_encoder, text_spec
from encoders.tokens import find_tokenizer, load_tokenizer
from encoders.weights import resolve_model
from errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_text_encoder(folder / "t5")
    save_codec(folder / "vae")
    return folder


def copy(models: Path, name: str, folder: Path, **keywords: object) -> Path:
    """Save a model again, with its files named as the keywords make the libraries name them."""
    model_class, dtype = (AutoencoderKL, torch.float32) if name == "vae" else (T5EncoderModel, torch.bfloat16)
    model_class.from_pretrained(str(models / name), torch_dtype=dtype).save_pretrained(folder, **keywords)
    for path in (models / name).iterdir():
        if not path.name.endswith(".safetensors") and not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["vae", "t5"])
@pytest.mark.parametrize("keywords", [{"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "20KB"}])
def test_a_variant_opens_where_it_is_all_there_is(models: Path, tmp_path: Path, name: str, keywords: dict) -> None:
    folder = copy(models, name, tmp_path / "model", **keywords)
    if name == "vae":
        image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        expected = open_codec(str(models / name)).encode(image)[0]
        assert torch.equal(open_codec(str(folder)).encode(image)[0], expected)
    else:
        expected = open_text_encoder(str(models / name), max_tokens=8, dtype="float32").encode(["a fox"])[0]
        opened = open_text_encoder(str(folder), max_tokens=8, dtype="float32")
        torch.testing.assert_close(opened.encode(["a fox"])[0], expected, rtol=2e-2, atol=2e-2)


class Program:
    def __reduce__(self) -> tuple:
        return os.system, ("touch trace-of-a-pickle",)


FAULTS = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a pointer of git-lfs, not the file itself: run `git",
    ),
    "empty": (b"", "is empty: it was not written or fetched to its end"),
    "page": (b"<html>", "is a web page that was saved under this name"),
}


@pytest.mark.parametrize("name", ["vae", "t5"])
def test_damaged_files_are_said_in_our_own_words(models: Path, tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    stem = {"vae": "diffusion_pytorch_model", "t5": "model"}[name]

    def refuse() -> str:
        with pytest.raises(UserError) as caught:
            open_codec(str(folder)) if name == "vae" else open_text_encoder(str(folder), max_tokens=8)
        assert "weights_only" not in str(caught.value)
        return str(caught.value)

    folder = copy(models, name, tmp_path / "model")
    path = folder / f"{stem}.safetensors"
    whole = path.read_bytes()
    for content, message in FAULTS.values():
        path.write_bytes(content)
        assert f"cannot be loaded: {path.name} {message}" in refuse()
    path.write_bytes(whole[:-100])
    assert "cannot be loaded: " in refuse()
    path.rename(folder / f"{stem}.fp16.safetensors")
    (folder / f"{stem}.bf16.safetensors").write_bytes(b"x")
    assert "holds weights as bf16 and as fp16: keep the files of one of them" in refuse()
    for other in folder.glob("*.safetensors"):
        other.unlink()
    torch.save({"a": Program()}, folder / {"vae": "diffusion_pytorch_model.bin", "t5": "pytorch_model.bin"}[name])
    assert "cannot be loaded: " in refuse()
    assert not (tmp_path / "trace-of-a-pickle").exists()


def test_configs_that_change_numbers_are_honoured_or_refused(models: Path, tmp_path: Path) -> None:
    def write(**config: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    write(_class_name="AutoencoderDC")
    spec = latent_spec(resolve_model(str(tmp_path)))
    assert spec is not None and (spec.scale, spec.channels, spec.factor) == (1.0, 32, 32)
    write(_class_name="AutoencoderKL", latents_mean=[0.5] * 4)
    with pytest.raises(UserError, match=r"features\.vae_model .*: latents_mean is \[0\.5, .*scaling_factor alone"):
        latent_spec(resolve_model(str(tmp_path)))
    write(model_type="t5")
    with pytest.raises(UserError, match=r"features\.text_model .*: config\.json gives no d_model"):
        text_spec(resolve_model(str(tmp_path)), max_tokens=8)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged .*fetch the model again"):
        latent_spec(resolve_model(str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_tokenizer_or_config_is_named(models: Path, tmp_path: Path, content: bytes) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        folder = tmp_path / name
        shutil.copytree(models / "t5", folder)
        (folder / name).write_bytes(content)
        message = (
            f"{folder}/config.json is " if name == "config.json" else f"the tokenizer in {folder} cannot be loaded: "
        )
        with pytest.raises(UserError, match=re.escape(message)):
            open_text_encoder(str(folder), max_tokens=8)
    with pytest.raises(UserError, match=r"tokenizer\.json is (empty|a pointer|damaged or no tokenizer)"):
        load_tokenizer(tmp_path / "tokenizer.json" / "tokenizer.json")


def test_the_encoder_of_a_pipeline_has_its_tokenizer_beside_it(models: Path, tmp_path: Path) -> None:
    encoder, tokenizer = tmp_path / "text_encoder", tmp_path / "tokenizer"
    shutil.copytree(models / "t5", encoder)
    tokenizer.mkdir()
    for path in encoder.glob("*token*"):
        path.rename(tokenizer / path.name)
    with pytest.raises(
        UserError, match=r"the tokenizer in .*text_encoder cannot be loaded: it has none of tokenizer\.json"
    ):
        open_text_encoder(str(encoder), max_tokens=8)
    (tmp_path / "model_index.json").write_text("{}")
    found, expected = (
        open_text_encoder(str(folder), max_tokens=8).encode(["a dog"]) for folder in (encoder, models / "t5")
    )
    assert torch.equal(found[0], expected[0])
    assert find_tokenizer(resolve_model(str(encoder))) == tokenizer / "tokenizer.json"


OFFLINE = """
import sys
from encoders.opening import open_codec, open_text_encoder
from encoders.tokens import fetch_tokenizer
from encoders.weights import resolve_model
encoder = open_text_encoder("toy/t5", max_tokens=9, dtype="float32")
print(len(encoder.encode(["a dog"])), open_codec("toy/vae").spec.channels)
other = resolve_model("toy/other")
for fetch in (lambda: fetch_tokenizer(other, key="features.text_model"), lambda: open_codec("toy/x")):
    try:
        fetch()
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_is_taken(models: Path, tmp_path: Path) -> None:
    """The libraries ask six times for each file that a model lacks, such as a chat template: for minutes."""
    commit = "0" * 40
    for name in ("t5", "vae"):
        cached = tmp_path / "hub" / f"models--toy--{name}"
        shutil.copytree(models / name, cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
    # Port 9 takes no connections.
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=REPOSITORY, env=os.environ | hub, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Retry" not in done.stderr and "127.0.0.1" not in done.stderr, done.stderr
    read, tokenizer, codec = done.stdout.splitlines()[-3:]
    assert read == "1 4"
    assert tokenizer.startswith(
        "UserError features.text_model = 'toy/other' (main) is no local folder and not in the hub"
    )
    assert codec.startswith("UserError features.vae_model = 'toy/x' (main) is no local folder")
    for said in (tokenizer, codec):
        assert "(http://127.0.0.1:9 does not answer: " in said
