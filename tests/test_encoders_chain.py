"""A text encoder and a codec of other kinds go from captions and images to samples; no room knows them by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from feature_run import extract, write_run
from PIL import Image
from safetensors.numpy import load
from tiny_encoders import save_decoder, save_deep_codec
from training_run import metrics, train

from errors import UserError
from pipelines.store.feature_store import load_index
from pipelines.store.manifest import read_manifest
from pipelines.store.verify.run import verify_run
from sampling.__main__ import main as sample

TRAINING = """
[model]
num_layers = 2
num_heads = 2
head_dim = 8

[training]
num_processes = 1
threads_per_process = 1
dtype = "fp32"
zero_stage = 0
global_batch_size = 4
num_steps = 5
log_every = 1
checkpoint_every = 5
[training.stage2]
network = "pixart"
[training.stage3]
network = "pixart"

[sampling]
prompt = "a Red circle on the left"
num_steps = 2
text_dtype = "float32"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose features were made by a Gemma and a deep autoencoder of factor 16."""
    run = write_run(tmp_path_factory.mktemp("chain"), num_shards=1, samples_per_shard=12)
    folder = run.parent
    recipe = (folder / "recipe.toml").read_text()
    recipe = recipe.replace(str(folder / "t5"), str(save_decoder(folder / "gemma")))
    recipe = recipe.replace(str(folder / "vae"), str(save_deep_codec(folder / "dc")))
    recipe = recipe.replace("max_tokens = 40", 'max_tokens = 40\ntext_cleaning = "strip"')
    recipe = recipe.replace("resolution = 32", "resolution = 64")
    (folder / "recipe.toml").write_text(recipe + TRAINING)
    extract(run)
    return run


def test_features_hold_what_the_encoders_give(run: Path) -> None:
    manifest = read_manifest(run / "features" / "latent-64")
    vae = manifest.extra["vae"]
    assert (vae["channels"], vae["factor"], vae["has_std"], vae["shift_factor"]) == (8, 16, False, 0.0)
    row = load_index(run / "features" / "latent-64", ["laion_00000"]).to_pylist()[0]
    assert (row["channels"], row["height"], row["width"]) == (8, 4, 4) and "std_offset" not in row
    data = (run / "features" / "latent-64" / "laion_00000.tar").read_bytes()[512:]
    size = int.from_bytes(data[:8], "little")
    member = load(data[: 8 + size + row["nbytes"]])
    assert {name: tensor.shape for name, tensor in member.items()} == {"mean": (8, 4, 4)}
    text = read_manifest(run / "features" / "text").extra["text"]
    assert (text["d_text"], text["cleaning"]) == (24, "strip")
    assert not verify_run(run).problems


def test_a_resolution_of_cut_patches_is_refused_before_anything_is_made(run: Path) -> None:
    # Stage 3 asks for buckets at 48 pixels, which a factor of 8 could do.
    with pytest.raises(
        UserError,
        match=r"^features\.stage3\.resolution 48 is not a multiple of 32 \(VAE factor 16 times patch size 2\)$",
    ):
        extract(run, stage=3)
    assert not (run / "features" / "latent-48").exists()


def test_a_model_trains_on_them_and_draws(run: Path) -> None:
    train(run, 2)
    losses = [line["loss"] for line in metrics(run, 2)]
    assert len(losses) == 5 and np.isfinite(losses).all()
    config = json.loads((run / "training" / "stage2" / "step-5" / "model" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"], config["caption_channels"]) == (8, 4, 24)
    arguments = ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", "2"]
    sample(arguments)
    (path,) = (run / "samples" / "stage2-prompt").glob("a-*.png")
    with Image.open(path) as image:
        assert image.size == (64, 64)
    with pytest.raises(UserError, match=r"sampling\.size 48x64: 48 is not a positive multiple of 32"):
        sample([*arguments, "--set", "sampling.size=48x64"])


def test_buckets_are_whole_patches_of_the_codec(run: Path) -> None:
    extract(run, "features.stage3.resolution=96", stage=3)
    names = read_manifest(run / "features" / "latent-96").extra["buckets"]
    sides = {int(side) for name in names for side in name.split("x")}
    assert len(names) > 1 and all(side % 32 == 0 for side in sides)
    found = set(load_index(run / "features" / "latent-96", ["laion_00000"]).column("bucket").to_pylist())
    assert found <= set(names)
