"""The embedded class-conditional DiT at 64 pixels, five blocks of width 128; stands where PixArt has ImageNet's DiT.

24 classes, shape x colour. As in ImageNet a label names one thing in a picture that may show more: half of the scenes
hold a single object, the others are labelled with one of theirs at random. So it learns what pictures of this world
look like and how a thing is drawn, but nothing of words, and nothing that ties a place to anything. It sees labels
while it is trained. Latents come from the embedded VAE. 15 minutes on one core.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from pipelines.engine.progress import get_logger
from pixart.convert import save_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.processes.ddpm import DDPM
from toyworld.render import render
from toyworld.scenes import NUM_CLASSES, Scene, class_label, random_scene
from toyworld.zoo import vae as zoo_vae
from toyworld.zoo.optimizer import Trainer

# B batch, C latent channels, h x w latent size

log = get_logger("toyworld.zoo")

SEED = 5
NUM_STEPS = 4000
BATCH_SIZE = 128
NUM_SCENES = 30_000
_LEARNING_RATE = 2e-3
_LABEL_DROPOUT = 0.1
_ENCODE_BATCH = 100


def build() -> DiT:
    """The untrained transformer, with PixArt's spacing of timestep frequencies."""
    return DiT(
        DiTConfig(num_layers=5, num_heads=4, head_dim=32, num_classes=NUM_CLASSES, sample_size=8, timestep_shift=0)
    )


def labelled_scene(rng: np.random.Generator) -> tuple[Scene, int]:
    """A scene and the class of one of its objects."""
    scene = random_scene(rng, num_objects=1 if rng.random() < 0.5 else None)
    item = scene.objects[rng.integers(len(scene.objects))]
    return scene, class_label(Scene((item,), scene.background, scene.pattern))


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, num_scenes: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents of new scenes as mean and deviation [B, C, 8, 8], and their labels [B]."""
    means, deviations, labels = [], [], []
    for _ in range(num_scenes // _ENCODE_BATCH):
        batch = [labelled_scene(rng) for _ in range(_ENCODE_BATCH)]
        pixels = np.stack([np.asarray(render(scene, 64, 64, rng=rng)) for scene, _ in batch])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = zoo_vae.encode(vae, images)
        means.append(posterior.mean * vae.config["scaling_factor"])
        deviations.append(posterior.std * vae.config["scaling_factor"])
        labels += [label for _, label in batch]
    return torch.cat(means), torch.cat(deviations), torch.tensor(labels)


def train(folder: Path, *, vae_folder: Path) -> None:
    """Train on cached latents and save to `folder` as diffusers does, fp16 on disk."""
    torch.manual_seed(SEED)
    vae = zoo_vae.load(vae_folder)
    means, deviations, labels = encode_scenes(vae, NUM_SCENES, np.random.default_rng(SEED))
    dit = build()
    process = DDPM()
    trainer = Trainer(dit, num_steps=NUM_STEPS, learning_rate=_LEARNING_RATE, average_decay=0.998)
    recent = 0.0
    for step in range(NUM_STEPS):
        chosen = torch.randint(len(means), (BATCH_SIZE,))
        latents = means[chosen] + deviations[chosen] * torch.randn_like(means[chosen])
        is_dropped = torch.rand(BATCH_SIZE) < _LABEL_DROPOUT
        shown = torch.where(is_dropped, dit.null_label, labels[chosen])
        loss = _loss(dit, process, latents, shown)
        trainer.step(loss)
        recent = 0.99 * recent + 0.01 * loss.item() if step else loss.item()
        if (step + 1) % 250 == 0:
            log.info("dit step %d loss %.4f", step + 1, recent)
    averaged = trainer.averaged
    save_diffusers(averaged.to(torch.float16), folder)


def _loss(dit: DiT, process: DDPM, latents: Tensor, labels: Tensor) -> Tensor:
    timesteps = torch.randint(process.num_times, (len(latents),))
    noise = torch.randn_like(latents)
    output = dit(process.noisy(latents, noise, timesteps), timesteps, labels)  # [B, 2C, h, w]
    return process.loss(output, latents, noise, timesteps).total.mean()
