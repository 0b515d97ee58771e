"""The embedded AutoencoderKL: f8, 4 latent channels, 1.6M weights; stands where a real run names the LDM VAE.

A second one, of 8 latent channels and from another seed, stands where weights move on to another VAE.

Trained on rendered scenes alone (it never sees what a scene holds): reconstruction and a light KL term, mostly at 64
pixels, every few steps at another size. 14 minutes on one core (34 dB).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from pipelines.engine.progress import get_logger
from toyworld.render import render
from toyworld.scenes import random_scene
from toyworld.zoo.optimizer import Trainer

# B batch, H height pixels, W width pixels

log = get_logger("toyworld.zoo")

SEED = 1
NUM_STEPS = 3000
NUM_STEPS_OF_SECOND = 1200
BATCH_SIZE = 16
_LEARNING_RATE = 2e-3
_KL_WEIGHT = 2e-4
_OTHER_SIZES = ((96, 64), (64, 96), (96, 96), (128, 128), (128, 64), (64, 128))
_PIXELS_PER_BATCH = BATCH_SIZE * 64 * 64


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


def build(*, latent_channels: int = 4) -> AutoencoderKL:
    """The untrained network; two norm groups, because more of them wipe out absolute colour at this width."""
    make: Any = AutoencoderKL
    return make(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=64,
    )


def train(folder: Path, *, latent_channels: int = 4, num_steps: int, seed: int = SEED) -> None:
    """Train and save to `folder`, fp16 on disk, with the scaling factor that gives latents unit deviation."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = build(latent_channels=latent_channels)
    trainer = Trainer(vae, num_steps=num_steps, learning_rate=_LEARNING_RATE, average_decay=0.995)
    for step in range(num_steps):
        width, height = _size_of_step(step)
        num_images = _PIXELS_PER_BATCH // (width * height)
        images = image_batch(rng, num_images, width=width, height=height)
        loss = _loss(vae, images)
        trainer.step(loss)
        if (step + 1) % 250 == 0 or step + 1 == num_steps:
            held_out = image_batch(np.random.default_rng(0), 64, width=64, height=64)
            log.info("vae step %d loss %.4f psnr %.2f dB", step + 1, loss.item(), mean_psnr(trainer.averaged, held_out))
    averaged: Any = trainer.averaged
    averaged.register_to_config(scaling_factor=_scaling_factor(averaged, rng))
    averaged.to(torch.float16).save_pretrained(folder)


def _size_of_step(step: int) -> tuple[int, int]:
    return _OTHER_SIZES[step // 4 % len(_OTHER_SIZES)] if step % 4 == 3 else (64, 64)


def _loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = encode(vae, images)
        decoded = decode(vae, posterior.sample())
    error = decoded.float() - images
    kl_per_latent = posterior.kl().float().mean() / posterior.mean[0].numel()
    return 2 * error.square().mean() + 0.3 * error.abs().mean() + _KL_WEIGHT * kl_per_latent


def _scaling_factor(vae: AutoencoderKL, rng: np.random.Generator) -> float:
    with torch.no_grad():
        latents = encode(vae, image_batch(rng, 512, width=64, height=64)).sample()
    return round(1 / latents.std().item(), 4)
