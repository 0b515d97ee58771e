"""Parts `sample_1024` and `sample_1024_4`: XL/2 at 1024 pixels, one image and four, against diffusers' pipeline.

Part `lcm_1024`: these weights drawn as a student, in 4 steps and in one, a pass each, against our own 20 with guidance.

Both sides have the same random weights, embeddings of texts, first noise, solver, steps and guidance, and a VAE of
Stable Diffusion's shape. Ours is what a job of eight images or more gets; theirs is `PixArtAlphaPipeline` as it is, and
with its blocks compiled. Distances are of images of few steps, from those of theirs in float32.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from benchmarks.gpu.parts import Figures, Size
from benchmarks.sample import random_model
from encoders.kl import PUBLISHED_VAE
from pixart.drawing.denoise import draw_noise, make_generators
from pixart.layouts import export_weights, pixart_diffusers_layout
from pixart.model import PixArt, PixArtConfig
from pixart.processes.specs import LCM, ddpm_spec, lcm_student
from pixart.transformer_config import to_json
from sampling.config import SamplingConfig
from sampling.renderer import Renderer
from sampling.requests import ImageRequest
from sampling.trained_model import TrainedModel

GUIDANCE, NUM_STEPS, NUM_REFERENCE_STEPS, NUM_REPEATS = 4.5, 20, 4, 2
NUM_STUDENT_STEPS = 4
MAX_TOKENS = 120
TEXT_LENGTHS = (80, 40, 120, 80)
Images = list[Image.Image]
XL_1024 = PixArtConfig(sample_size=128, interpolation_scale=2.0)
TINY = PixArtConfig(num_layers=2, num_heads=2, head_dim=16, caption_channels=32, sample_size=4)


@dataclass(frozen=True, kw_only=True)
class GivenModel(TrainedModel):
    """A checkpoint whose network is in memory."""

    network: PixArt

    def load(self) -> PixArt:
        """Return the network."""
        return self.network


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What both sides draw with."""

    device: str
    dtype: torch.dtype
    pixels: int
    network: PixArt
    vae_folder: Path
    texts: list[Tensor]
    null_text: Tensor


def sample_1024(size: Size) -> Figures:
    """One image at a time."""
    return _against_pipeline("sample_1024", size, batch_size=1)


def sample_1024_4(size: Size) -> Figures:
    """Four images at a time."""
    return _against_pipeline("sample_1024_4", size, batch_size=4)


def lcm_1024(size: Size) -> Figures:
    """One image at a time, as a student of the same shape and as what it was distilled from."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _bench(size, Path(folder), batch_size=1)
        base = _measure("lcm_1024_base", size, our_side(bench), 1)
        student = our_side(bench, solver=LCM)
        four = _measure("lcm_1024_student", size, student, 1, num_steps=NUM_STUDENT_STEPS)
        size.keep({"lcm_1024_ratio": round(base / four, 3)})
        one = _measure("lcm_1024_one_step", size, student, 1, num_steps=1)
    return {"lcm_1024_ratio": round(base / four, 3), "lcm_1024_ratio_one_step": round(base / one, 3)}


def _against_pipeline(name: str, size: Size, *, batch_size: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        bench = _bench(size, Path(folder), batch_size=batch_size)
        theirs, ours = their_side(bench, bench.dtype), our_side(bench)
        eager = _measure(f"{name}_diffusers_eager", size, theirs, batch_size)
        own = _measure(f"{name}_ours", size, ours, batch_size)
        figures: Figures = {f"{name}_ratio_eager": round(eager / own, 3)}
        size.keep(figures)
        of_ours, of_theirs = (draw(NUM_REFERENCE_STEPS) for draw in (ours, theirs))
        exact = their_side(bench, torch.float32)(NUM_REFERENCE_STEPS)
        distances = _distance(of_ours, exact), _distance(of_theirs, exact)
        figures |= {f"{name}_ours_distance": distances[0], f"{name}_diffusers_distance": distances[1]}
        figures[f"{name}_distance_ratio"] = round(distances[0] / distances[1], 3) if distances[1] else None
        size.keep(figures)
        compiled_side = their_side(bench, bench.dtype, is_compiled=True)
        compiled = _measure(f"{name}_diffusers_compiled", size, compiled_side, batch_size)
    return {**figures, f"{name}_ratio_compiled": round(compiled / own, 3)}


def _bench(size: Size, folder: Path, *, batch_size: int) -> Bench:
    config = TINY if size.is_tiny else XL_1024
    with torch.device(size.device):
        network = random_model(config).eval().requires_grad_(False)
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8) if size.is_tiny else (128, 256, 512, 512),
        "norm_num_groups": 4 if size.is_tiny else 32,
        "layers_per_block": 2,
    }
    AutoencoderKL(**shape).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randn(length, config.caption_channels, generator=generator) for length in (*TEXT_LENGTHS[:batch_size], 1)
    ]
    return Bench(
        device=size.device,
        dtype=torch.float32 if size.is_tiny else torch.bfloat16,
        pixels=config.sample_size * PUBLISHED_VAE.factor,
        network=network,
        vae_folder=folder,
        texts=texts[:-1],
        null_text=texts[-1],
    )


def our_side(bench: Bench, *, solver: Literal["dpm-solver++", "lcm"] = "dpm-solver++") -> Callable[[int], Images]:
    """Return what draws so many steps with our sampler; by lcm as a student, whose guidance is inside its weights."""
    is_student = solver == LCM
    device = "cuda" if bench.device == "cuda" else "cpu"
    # As theirs: by themselves random weights are decoded in float32, since a test picture of noise tells them apart.
    vae_dtype = "bfloat16" if bench.dtype == torch.bfloat16 else "float32"
    config = SamplingConfig(guidance_scale=GUIDANCE, solver=solver, device=device, vae_dtype=vae_dtype)
    trained = GivenModel(
        network=copy.deepcopy(bench.network),
        name="random weights",
        kind="pixart",
        model_path=Path(),
        identity="",
        num_classes=None,
        resolution=bench.pixels,
        patch_pixels=PUBLISHED_VAE.factor * bench.network.config.patch_size,
        buckets=((bench.pixels, bench.pixels),),
        text={"max_tokens": MAX_TOKENS},
        vae={"model": str(bench.vae_folder), "revision": None},
        process=ddpm_spec(student=lcm_student(guidance=GUIDANCE) if is_student else None),
        inner_guidance=GUIDANCE if is_student else None,
    )
    shape = len(bench.texts), bench.pixels, bench.pixels
    renderer = Renderer(config, trained, compiled_shapes=[shape])
    texts = {str(number): text.to(bench.dtype) for number, text in enumerate(bench.texts)}
    texts[config.negative_prompt] = bench.null_text.to(bench.dtype)
    sides: dict[str, Any] = {"width": bench.pixels, "height": bench.pixels, "label": None, "file": "", "key": ""}
    requests = [ImageRequest(number=i, prompt=str(i), seed=i, **sides) for i in range(len(bench.texts))]

    def draw(num_steps: int) -> Images:
        renderer.config = config.model_copy(update={"num_steps": num_steps})
        return renderer.draw(requests, texts).images()

    return draw


def their_side(bench: Bench, dtype: torch.dtype, *, is_compiled: bool = False) -> Callable[[int], Images]:
    """Return what draws so many steps with diffusers' pipeline."""
    with torch.device(bench.device):
        transformer: Any = PixArtTransformer2DModel.from_config(to_json(bench.network.config))
    transformer.load_state_dict(export_weights(bench.network, pixart_diffusers_layout(bench.network.config)))
    pipeline_class: Any = PixArtAlphaPipeline  # which takes None for encoders that nobody asks
    pipeline: Any = pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKL.from_pretrained(bench.vae_folder, torch_dtype=dtype),
        transformer=transformer.to(dtype),
        scheduler=DPMSolverMultistepScheduler(),
    ).to(bench.device)
    pipeline.set_progress_bar_config(disable=True)
    if is_compiled:
        for block in pipeline.transformer.transformer_blocks:
            block.compile()
    embeddings, mask = _padded(bench.texts, dtype=dtype, device=bench.device)
    null, null_mask = _padded([bench.null_text] * len(bench.texts), dtype=dtype, device=bench.device)
    side = bench.pixels // PUBLISHED_VAE.factor
    noise = draw_noise(make_generators(range(len(bench.texts))), (PUBLISHED_VAE.channels, side, side))

    def draw(num_steps: int) -> Images:
        return pipeline(
            prompt_embeds=embeddings,
            prompt_attention_mask=mask,
            negative_prompt=None,
            negative_prompt_embeds=null,
            negative_prompt_attention_mask=null_mask,
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE,
            width=bench.pixels,
            height=bench.pixels,
            latents=noise.to(bench.device, dtype),
            use_resolution_binning=False,
        ).images

    return draw


def _padded(texts: Sequence[Tensor], *, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return embeddings [B, 120, D] and their mask [B, 120], as the pipeline's own encoder gives them."""
    embeddings = torch.zeros(len(texts), MAX_TOKENS, texts[0].shape[1])
    mask = torch.zeros(len(texts), MAX_TOKENS)
    for i, text in enumerate(texts):
        embeddings[i, : len(text)] = text
        mask[i, : len(text)] = 1
    return embeddings.to(device, dtype), mask.to(device)


def _measure(
    name: str, size: Size, draw: Callable[[int], Images], batch_size: int, *, num_steps: int = NUM_STEPS
) -> float:
    """Return seconds of an image, a first batch not counted; keeps them, and the memory that drawing takes."""
    draw(NUM_REFERENCE_STEPS)
    weights_bytes = torch.cuda.memory_allocated() if size.device == "cuda" else 0
    if size.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(NUM_REPEATS):
        start_seconds = time.perf_counter()
        draw(num_steps)  # which waits for its images
        found.append((time.perf_counter() - start_seconds) / batch_size)
    seconds = median(found)
    figures: Figures = {f"{name}_seconds": round(seconds, 4)}
    if size.device == "cuda":
        figures[f"{name}_gigabytes"] = round((torch.cuda.max_memory_allocated() - weights_bytes) / 1e9, 2)
    size.keep(figures)
    return seconds


def _distance(images: Sequence[Image.Image], exact: Sequence[Image.Image]) -> float:
    """Return the root of the mean squared difference, in levels of 255."""
    pairs = zip(images, exact, strict=True)
    errors = [
        np.square(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean() for image, other in pairs
    ]
    return round(float(np.sqrt(np.mean(errors))), 3)
