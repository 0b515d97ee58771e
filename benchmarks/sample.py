"""`make bench-sample`: images/s of our sampler against diffusers' `PixArtAlphaPipeline` on the same checkpoint.

Same weights, prompts, first noise, solver, steps and guidance on both sides, models loaded beforehand, and the images
are compared, on one core of a CPU; `make bench-gpu PARTS=sample_1024` is the one for a GPU. The checkpoint has the
demo's shape: the embedded DiT re-parameterised, with random cross-attention, as no text-to-image weights are shipped,
behind the embedded T5 and VAE.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, T5EncoderModel

from encoders.kl import PUBLISHED_VAE
from encoders.opening import open_text_encoder
from pixart.convert import load_diffusers, save_diffusers
from pixart.dit import DiT
from pixart.drawing.denoise import draw_noise, make_generators
from pixart.model import PixArt, PixArtConfig
from pixart.reparameterize import reparameterize
from sampling.config import SamplingConfig
from sampling.foreign_weights import open_trained_model
from sampling.renderer import Renderer
from sampling.requests import ImageRequest
from toyworld.scenes import random_scene
from toyworld.wording import dense_caption

RESULT = Path(__file__).parent / "results" / "sample.json"
WEIGHTS = Path("toyworld/weights")
TEXT_WIDTH = 96  # of the embedded T5
MAX_TOKENS = 120
GUIDANCE = 4.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: size of the images, and how many at once."""

    pixels: int
    batch_size: int

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.pixels}px, batch {self.batch_size}"


CASES = [Case(pixels=64, batch_size=8), Case(pixels=64, batch_size=1), Case(pixels=256, batch_size=2)]


def toy_model() -> PixArt:
    """The demo's stage 2 before its first step, but with cross-attention that does something."""
    dit = load_diffusers(WEIGHTS / "dit")
    assert isinstance(dit, DiT)
    torch.manual_seed(0)
    config = PixArtConfig(
        num_layers=dit.config.num_layers,
        num_heads=dit.config.num_heads,
        head_dim=dit.config.head_dim,
        sample_size=dit.config.sample_size,
        caption_channels=TEXT_WIDTH,
    )
    model = reparameterize(dit, config)
    for name, parameter in model.named_parameters():
        if name.endswith("cross_attention.out.weight"):
            torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return model


def random_model(config: PixArtConfig) -> PixArt:
    """Weights that keep the scale of what passes through them, zero nowhere."""
    torch.manual_seed(0)
    model = PixArt(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 / parameter.shape[-1] ** 0.5)
    return model


def save_pipeline(folder: Path, model: PixArt, vae: AutoencoderKL) -> None:
    """Write what both sides open: a folder of diffusers' pipeline."""
    save_diffusers(model, folder / "exported")
    PixArtAlphaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(WEIGHTS / "t5"),
        text_encoder=T5EncoderModel.from_pretrained(WEIGHTS / "t5"),
        vae=vae,
        transformer=PixArtTransformer2DModel.from_pretrained(folder / "exported"),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder / "pipeline")


def demo_prompts(count: int) -> list[str]:
    """Captions of generated scenes, as the demo samples them."""
    rng = np.random.default_rng(0)
    return [dense_caption(random_scene(rng), rng) for _ in range(count)]


class Ours:
    """Our sampler with its models loaded."""

    def __init__(self, folder: Path, *, num_steps: int) -> None:
        config = SamplingConfig(guidance_scale=GUIDANCE, num_steps=num_steps, device="cpu")
        trained = open_trained_model(str(folder), None)
        assert trained.text is not None
        text = trained.text
        self.encoder = open_text_encoder(
            text["model"], max_tokens=MAX_TOKENS, dtype="float32", tokenizer=text["tokenizer"]
        )
        self.renderer = Renderer(config, trained)

    def draw(self, prompts: Sequence[str], pixels: int) -> list[Image.Image]:
        """Encode and draw one batch."""
        distinct = list(dict.fromkeys(["", *prompts]))
        texts = dict(zip(distinct, self.encoder.encode(distinct), strict=True))
        shape: dict[str, Any] = {"width": pixels, "height": pixels, "label": None, "file": "", "key": ""}
        requests = [ImageRequest(number=i, prompt=prompt, seed=i, **shape) for i, prompt in enumerate(prompts)]
        return self.renderer.draw(requests, texts).images()


class Theirs:
    """diffusers' pipeline with its models loaded."""

    def __init__(self, folder: Path, *, num_steps: int) -> None:
        self.num_steps = num_steps
        self.pipeline: Any = PixArtAlphaPipeline.from_pretrained(folder, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, prompts: Sequence[str], pixels: int) -> list[Image.Image]:
        """Encode and draw one batch."""
        size = pixels // PUBLISHED_VAE.factor
        noise = draw_noise(make_generators(range(len(prompts))), (PUBLISHED_VAE.channels, size, size))
        return self.pipeline(
            list(prompts),
            num_inference_steps=self.num_steps,
            guidance_scale=GUIDANCE,
            width=pixels,
            height=pixels,
            latents=noise,
            use_resolution_binning=False,
            clean_caption=False,
            max_sequence_length=MAX_TOKENS,
        ).images


def timed(draw: Callable[[], list[Image.Image]]) -> tuple[float, list[Image.Image]]:
    """Return the process's own seconds, free of other jobs, and the images."""
    start_seconds = time.process_time()
    images = draw()
    return time.process_time() - start_seconds, images


def compare(case: Case, ours: Ours, theirs: Theirs, *, num_rounds: int) -> dict[str, float]:
    """Draw the same images both ways in turns, after one round that is not counted."""
    prompts = demo_prompts(case.batch_size)
    sides = {"ours": ours, "pipeline": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    images: dict[str, list[Image.Image]] = {}
    for number in range(num_rounds + 1):
        for name, side in sides.items():
            elapsed, images[name] = timed(lambda side=side: side.draw(prompts, case.pixels))
            if number:
                seconds[name].append(elapsed)
    fastest = {name: min(times) / case.batch_size for name, times in seconds.items()}
    pairs = zip(images["ours"], images["pipeline"], strict=True)
    differences = [np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() for one, other in pairs]
    return {
        **{f"{name}_images_per_second": round(1 / value, 3) for name, value in fastest.items()},
        "ratio": round(fastest["pipeline"] / fastest["ours"], 2),
        "max_difference": int(max(differences)),
    }


def measure(
    model: PixArt, vae: AutoencoderKL, cases: Sequence[Case], *, num_steps: int, num_rounds: int
) -> dict[str, Any]:
    """Compare every case on one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(Path(folder), model, vae)
        ours = Ours(Path(folder) / "pipeline", num_steps=num_steps)
        theirs = Theirs(Path(folder) / "pipeline", num_steps=num_steps)
    return {case.name: compare(case, ours, theirs, num_rounds=num_rounds) for case in cases}


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/sample.json."""
    parser = argparse.ArgumentParser(description="Our sampler against diffusers' PixArtAlphaPipeline.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae")
    figures = measure(toy_model(), vae, CASES, num_steps=options.steps, num_rounds=options.rounds)
    result = {
        "ratio_pipeline": figures[CASES[0].name]["ratio"],
        **figures,
        "device": "cpu, 1 thread",
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }
    names = list(figures[CASES[0].name])
    table = Table("images", *(name.replace("_", " ") for name in names))
    for case, values in figures.items():
        table.add_row(case, *(str(values[name]) for name in names))
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
