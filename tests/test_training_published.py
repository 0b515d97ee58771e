"""Every published PixArt, tiny and in exactly its layout: opened, trained, exported, drawn as diffusers draws it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_run
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from PIL import Image
from published_layouts import ALPHA_CONFIG, PARTS, sigma_settings
from sampling_run import write_recipe
from tiny_encoders import save_codec, save_text_encoder
from training_run import finish, write_latents, write_text
from transformers import AutoTokenizer, T5EncoderModel
from warm_python import WarmProcess

from errors import UserError
from pixart.convert import original_weights, save_diffusers
from pixart.drawing.denoise import draw_noise, make_generators
from pixart.layouts import NULL_CAPTION
from pixart.model import PixArt, PixArtConfig
from pixart.processes.noise_flow import NoiseFlow
from sampling.__main__ import main as sample
from training.convert import main as convert
from training.stages.starts import load_network

D_TEXT = 32
TINY = {"num_layers": 2, "num_heads": 6, "head_dim": 64, "caption_channels": D_TEXT}  # heads are known by this width


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A published model: latent side, scale of positions, size condition, and what its config and pipeline say."""

    side: int
    scale: float
    is_told: bool = False
    is_sigma: bool = False

    @property
    def shape(self) -> PixArtConfig:
        """Its tiny shape."""
        positions = {"sample_size": self.side, "interpolation_scale": self.scale}
        return PixArtConfig(**TINY, **positions, has_size_condition=self.is_told)

    @property
    def config(self) -> dict[str, Any]:
        """Its published config, of the tiny shape."""
        tiny = {"num_layers": 2, "num_attention_heads": 6, "attention_head_dim": 64, "cross_attention_dim": 384}
        tiny |= {"caption_channels": D_TEXT, "sample_size": self.side}
        told = {"use_additional_conditions": True} if self.is_told and self.side != 128 else {}
        return ALPHA_CONFIG | tiny | told | (sigma_settings(self.side) if self.is_sigma else {})

    @property
    def max_tokens(self) -> int:
        """Of its texts."""
        return 300 if self.is_sigma else 120

    @property
    def cleaning(self) -> str:
        """Of its texts."""
        return "none" if self.is_sigma else "diffusers"

    @property
    def pipeline(self) -> type[PixArtAlphaPipeline] | type[PixArtSigmaPipeline]:
        """What opens it."""
        return PixArtSigmaPipeline if self.is_sigma else PixArtAlphaPipeline


LAYOUTS = {
    "alpha-256": Layout(side=32, scale=1.0),
    "alpha-512": Layout(side=64, scale=1.0),
    "alpha-512-MS": Layout(side=64, scale=1.0, is_told=True),
    "alpha-1024-MS": Layout(side=128, scale=2.0, is_told=True),
    "sigma-256": Layout(side=32, scale=0.5, is_sigma=True),
    "sigma-512": Layout(side=64, scale=1.0, is_sigma=True),
    "sigma-1024": Layout(side=128, scale=2.0, is_sigma=True),
    "sigma-2K": Layout(side=256, scale=4.0, is_sigma=True),
}


def tiny_network(layout: Layout) -> PixArt:
    torch.manual_seed(0)
    network = PixArt(layout.shape)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return network.eval()


def write_folder(folder: Path, layout: Layout, network: PixArt) -> Path:
    """Write a transformer's folder with the config that was published, keys that it lacks included."""
    save_diffusers(network, folder)
    (folder / "config.json").write_text(json.dumps(layout.config))
    return folder


def write_pipeline(folder: Path, layout: Layout, network: PixArt, encoders: Path) -> Path:
    write_folder(folder / "transformer", layout, network)
    for name, path in (("text_encoder", "t5"), ("tokenizer", "t5"), ("vae", "vae")):
        shutil.copytree(encoders / path, folder / name)
    index = {"_class_name": layout.pipeline.__name__, **PARTS}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_original(path: Path, layout: Layout, network: PixArt, *, prefix: str = "") -> Path:
    """Write a `.pth` as it was published: positions and null caption among the weights, and an average beside them."""
    weights = original_weights(network)
    weights[NULL_CAPTION] = torch.randn(layout.max_tokens, D_TEXT) / D_TEXT**0.5
    others = {name: torch.full_like(value, 9.0) for name, value in weights.items()}
    named = [{f"{prefix}{name}": value for name, value in each.items()} for each in (others, weights)]
    torch.save({"state_dict": named[0], "state_dict_ema": named[1], "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    save_text_encoder(folder / "t5")
    save_codec(folder / "vae")
    return folder


def same_as_diffusers(found: PixArt, reference: PixArtTransformer2DModel) -> None:
    torch.manual_seed(1)
    latents, text, times = torch.randn(2, 4, 8, 12), torch.randn(2, 5, D_TEXT), torch.tensor([3, 700])
    size = torch.tensor([[64.0, 96.0, 0.67], [300.0, 200.0, 0.67]]) if found.config.has_size_condition else None
    added = {"resolution": None, "aspect_ratio": None}
    if size is not None:
        added = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}
    with torch.no_grad():
        expected = reference(latents, text, timestep=times, added_cond_kwargs=added).sample
        actual = found(latents, times, text, size=size)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_opens_and_computes_what_diffusers_does(tmp_path: Path, encoders: Path, name: str) -> None:
    layout = LAYOUTS[name]
    network = tiny_network(layout)
    folder = write_folder(tmp_path / "folder", layout, network)
    write_pipeline(tmp_path / "pipeline", layout, network, encoders)
    write_original(tmp_path / "plain.pth", layout, network)
    write_original(tmp_path / "prefixed.pth", layout, network, prefix="module.")
    reference = PixArtTransformer2DModel.from_pretrained(folder)
    for path in (folder, tmp_path / "pipeline" / "transformer", tmp_path / "plain.pth", tmp_path / "prefixed.pth"):
        found = load_network(path, None, sample_size=layout.side, key="x")
        assert isinstance(found, PixArt) and found.config == layout.shape, path
        same_as_diffusers(found, reference)


def make_run(run: Path, layout: Layout, encoders: Path, start: Path) -> Path:
    """Write a recipe and features of the layout's resolution, whose images are small, of the tiny encoders."""
    resolution, shards = 8 * layout.side, {"laion_0": 12}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "D_TEXT", D_TEXT)
        text = {"model": str(encoders / "t5"), "d_text": D_TEXT, "cleaning": layout.cleaning}
        patch.setattr(training_run, "TEXT", training_run.TEXT | text)
        vae = {"model": str(encoders / "vae"), "scaling_factor": 0.45, "shift_factor": 0.0, "factor": 8}
        patch.setattr(training_run, "VAE", training_run.VAE | vae)
        write_latents(run, resolution, shards, buckets=["64x64"], is_bucketed=False, has_sizes=True)
        write_text(run, shards, max_tokens=layout.max_tokens)
    (run.parent / "recipe.toml").write_text(
        f"""
[features]
text_model = "{encoders / "t5"}"
vae_model = "{encoders / "vae"}"
max_tokens = {layout.max_tokens}
text_cleaning = "{layout.cleaning}"

[features.tune]
resolution = {resolution}

[training.tune]
network = "pixart"
starts_from = "{start}"
num_processes = 1
threads_per_process = 1
dtype = "fp32"
global_batch_size = 4
num_steps = 5
learning_rate = 1e-4
gradient_clip = 1.0
ema_decay = 0.5
"""
    )
    return run


def drawn(run: Path, checkpoint: Path) -> np.ndarray:
    table = {"prompt": "a red circle", "size": "64x64", "num_steps": 4, "seed": 3, "checkpoint": str(checkpoint)}
    sample(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", "2"])
    (path,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def drawn_by(pipeline: Any, *, times: list[int] | None = None) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_noise(make_generators([3]), (4, 8, 8))
    options = {"use_resolution_binning": False, "clean_caption": False, "width": 64, "height": 64, "latents": noise}
    (image,) = pipeline("a red circle", num_inference_steps=4, timesteps=times, **options).images
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_trained_exported_and_drawn_as_diffusers_does(
    tmp_path: Path, encoders: Path, name: str
) -> None:
    layout = LAYOUTS[name]
    network = tiny_network(layout)
    starts = {"alpha-256": "x.pth", "sigma-2K": "x.pth", "alpha-1024-MS": "pipeline"}
    if starts.get(name) == "x.pth":
        start = write_original(tmp_path / "x.pth", layout, network)
    elif starts.get(name) == "pipeline":
        start = write_pipeline(tmp_path / "pipeline", layout, network, encoders)
    else:
        start = write_folder(tmp_path / "folder" / "transformer", layout, network).parent
    run = make_run(tmp_path / "run", layout, encoders, start)
    finish(WarmProcess("training", ["--recipe", str(tmp_path / "recipe.toml"), "--run", str(run), "--stage", "tune"]))
    saved = run / "training" / "tune" / "step-5" / "model"
    trained = load_network(saved, None, sample_size=layout.side, key="x")
    assert isinstance(trained, PixArt) and trained.config == layout.shape
    assert not torch.equal(trained.final.weight, network.final.weight)

    convert([str(run / "training" / "tune"), str(tmp_path / "back.pth")])
    back = load_network(tmp_path / "back.pth", None, sample_size=layout.side, key="x")
    assert back.config == layout.shape
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in back.state_dict().items())

    if name == "alpha-512-MS":
        with pytest.raises(UserError, match=r"is told each image's size, .* 128 alone, but this one's is 64"):
            convert([str(run / "training" / "tune"), str(tmp_path / "exported"), "--pipeline"])
        return
    convert([str(run / "training" / "tune"), str(tmp_path / "exported"), "--pipeline"])
    assert (
        json.loads((tmp_path / "exported" / "model_index.json").read_text())["_class_name"] == layout.pipeline.__name__
    )
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"from diffusers import {layout.pipeline.__name__}" in card and "Stage `tune`, 5 steps, 20 samples" in card
    pipeline = layout.pipeline.from_pretrained(tmp_path / "exported")
    assert np.abs(drawn(run, saved.parent) - drawn_by(pipeline)).max() <= 2


@pytest.mark.parametrize("name", ["alpha-512", "sigma-256"])
def test_released_weights_go_on_as_flow_in_files_that_diffusers_draws(
    tmp_path: Path, encoders: Path, name: str
) -> None:
    layout = LAYOUTS[name]
    network = tiny_network(layout)
    run = make_run(tmp_path / "run", layout, encoders, write_pipeline(tmp_path / "start", layout, network, encoders))
    with (tmp_path / "recipe.toml").open("a") as recipe:
        recipe.write('process = "flow"\nflow_prediction = "noise"\nflow_shift = 3.0\n')
    finish(WarmProcess("training", ["--recipe", str(tmp_path / "recipe.toml"), "--run", str(run), "--stage", "tune"]))
    trained = load_network(run / "training/tune/step-5/model", None, sample_size=layout.side, key="x")
    assert isinstance(trained, PixArt) and trained.config == layout.shape, "the variance has its channels, too"
    change = (trained.final.weight - network.final.weight).abs()
    assert 0 < change.max() < 0.01, "it goes on from what it was"

    convert([str(run / "training" / "tune"), str(tmp_path / "exported"), "--pipeline"])
    pipeline = layout.pipeline.from_pretrained(tmp_path / "exported")
    assert pipeline.scheduler.config.prediction_type == "epsilon" and not pipeline.scheduler.config.use_flow_sigmas
    times = NoiseFlow(shift=3.0).scheduler("dpm-solver++", 4).timesteps.tolist()
    by_diffusers = drawn_by(pipeline, times=times)
    for checkpoint in (run / "training" / "tune", tmp_path / "exported"):
        assert np.abs(drawn(run, checkpoint) - by_diffusers).max() <= 2
    assert np.abs(by_diffusers - drawn_by(pipeline)).max() > 2, "its steps are flow's"


def test_a_pipeline_without_its_encoders_is_opened_with_those_that_are_passed(tmp_path: Path, encoders: Path) -> None:
    layout = LAYOUTS["alpha-512"]
    write_folder(tmp_path / "x" / "transformer", layout, tiny_network(layout))
    convert([str(tmp_path / "x"), str(tmp_path / "bare"), "--pipeline"])
    index = json.loads((tmp_path / "bare" / "model_index.json").read_text())
    assert index["vae"] == index["text_encoder"] == index["tokenizer"] == [None, None]
    card = (tmp_path / "bare" / "README.md").read_text()
    assert 'license: "FILL IN"' in card and "vae=AutoencoderKL.from_pretrained(" in card
    with pytest.raises(ValueError, match="vae"):
        PixArtAlphaPipeline.from_pretrained(tmp_path / "bare")
    pipeline = PixArtAlphaPipeline.from_pretrained(
        tmp_path / "bare",
        vae=AutoencoderKL.from_pretrained(encoders / "vae"),
        text_encoder=T5EncoderModel.from_pretrained(encoders / "t5"),
        tokenizer=AutoTokenizer.from_pretrained(encoders / "t5"),
    )
    assert drawn_by(pipeline).std() > 1
