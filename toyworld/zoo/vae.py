"""The embedded AutoencoderKL: f8, 4 latent channels, 1.6M weights; stands where a real run names the LDM VAE.

A second one, of 8 latent channels and from another seed, stands where weights move on to another VAE.

Trained by `python -m training` with recipes/toyworld-zoo-vae.toml, on rendered scenes alone (it never sees what a scene
holds): reconstruction and a light KL term, mostly at 64 pixels.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from pipelines.store.checkpoints import find_checkpoint
from pipelines.store.files import atomic_file
from toyworld.render import render
from toyworld.scenes import random_scene

# B batch, H height pixels, W width pixels

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "toyworld-zoo-vae.toml"
LARGE_SIZES = ((96, 96), (128, 64), (64, 128))
# Name, pictures and their sizes in turn; one shard is held out.
SHARDS = (
    *((f"square_{number}", 1000, ((64, 64),)) for number in range(24)),
    ("square_held", 64, ((64, 64),)),
    *((f"large_{number}", 750, LARGE_SIZES) for number in range(4)),
)


def image_batch(rng: np.random.Generator, num_images: int, *, width: int, height: int) -> Tensor:
    """Rendered random scenes, float32 [B, 3, H, W] in -1 to 1."""
    images = [np.asarray(render(random_scene(rng), width, height, rng=rng)) for _ in range(num_images)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def load(folder: Path) -> AutoencoderKL:
    """The trained VAE in fp32, ready to use."""
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()


def encode(vae: AutoencoderKL, images: Tensor) -> DiagonalGaussianDistribution:
    """Posterior of images [B, 3, H, W] over unscaled latents [B, 4, H/8, W/8]."""
    model: Any = vae
    return model.encode(images).latent_dist


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] of unscaled latents."""
    model: Any = vae
    return model.decode(latents).sample


def mean_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the reconstruction from the posterior's mean, averaged over images."""
    with torch.no_grad():
        decoded = decode(vae, encode(vae, images).mode()).clamp(-1, 1)  # [B, 3, H, W]
    error = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    return (-10 * error.log10()).mean().item()


def train(name: str, folder: Path) -> None:
    """Train the stage `name` of the recipe on pictures drawn for it, and save it in `folder`, fp16 on disk."""
    with tempfile.TemporaryDirectory(prefix="toyworld-zoo-") as temporary:
        run = Path(temporary) / "run"
        _draw_pictures(run / "raw")
        for table in ("square", "large"):
            _run("features", run, table)
        _run("training", run, name)
        checkpoint = find_checkpoint(run / "training" / name)
        assert checkpoint is not None, "a stage that ends well leaves one"
        vae: Any = load(checkpoint.weights)
        vae.to(torch.float16).save_pretrained(folder)


def _draw_pictures(raw: Path) -> None:
    """Write shards of scenes: square ones of 64 pixels, larger ones of other aspect ratios, and some held out."""
    for name, num_pictures, sizes in SHARDS:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        with atomic_file(raw / f"{name}.tar") as path, tarfile.open(path, "w") as tar:
            for number in range(num_pictures):
                width, height = sizes[number % len(sizes)]
                data = io.BytesIO()
                render(random_scene(rng), width, height, rng=rng).save(data, "PNG")
                member = tarfile.TarInfo(f"{name}-{number:06d}.png")
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)


def _run(room: str, run: Path, stage: str, *typed: str) -> None:
    arguments = ["--recipe", str(RECIPE), "--run", str(run), "--stage", stage, *typed]
    subprocess.run([sys.executable, "-m", room, *arguments], check=True)
