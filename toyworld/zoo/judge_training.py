"""How the judge's network is trained: on crops whose scene is known (ground truth), at several sizes.

Pictures are clean, blurred, noisy, or through the embedded VAE with some noise on the latents, as samples have it.
2 minutes on one core. Needs the VAE.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from pipelines.engine.progress import get_logger
from toyworld.render import render
from toyworld.scenes import COLOURS, POSITIONS, SHAPES, Scene, random_scene
from toyworld.zoo import vae as zoo_vae
from toyworld.zoo.judge_net import EMPTY, JudgeNet, anchor_crops, crops_to_tensor
from toyworld.zoo.optimizer import Trainer

log = get_logger("toyworld.zoo")

SEED = 4
NUM_STEPS = 600
_LEARNING_RATE = 2e-3
_NUM_SCENES = 24
_SIZES = ((64, 64), (64, 64), (64, 64), (96, 96), (128, 128), (64, 128), (96, 64), (128, 80))
_MAX_SHIFT = 0.03  # of the shorter side: samples put objects a little off
_MAX_LATENT_NOISE = 0.3  # of the latents' deviation
_NO_COLOUR = -100  # ignored by the loss


def train(folder: Path, *, vae_folder: Path) -> None:
    """Train and save to `folder`, fp16 on disk."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    vae = zoo_vae.load(vae_folder)
    net = JudgeNet()
    trainer = Trainer(net, num_steps=NUM_STEPS, learning_rate=_LEARNING_RATE)
    for step in range(NUM_STEPS):
        crops, shapes, colours = _training_crops(vae, _SIZES[step % len(_SIZES)], rng)
        shape_logits, colour_logits = net(crops)
        loss = functional.cross_entropy(shape_logits, shapes) + functional.cross_entropy(colour_logits, colours)
        trainer.step(loss)
        if (step + 1) % 100 == 0:
            accuracy = (shape_logits.argmax(dim=1) == shapes).float().mean().item()
            log.info("judge step %d loss %.4f shape or empty %.3f", step + 1, loss.item(), accuracy)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in trainer.averaged.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def _training_crops(
    vae: AutoencoderKL, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of new scenes with their shape and colour indices; half of the pictures come out of the VAE."""
    scenes = [random_scene(rng) for _ in range(_NUM_SCENES)]
    images = [_shifted(render(scene, *size, rng=rng), rng) for scene in scenes]
    images = _through_vae(vae, images[::2], rng) + [_worn(image, rng) for image in images[1::2]]
    crops = crops_to_tensor([crop for image in images for crop in anchor_crops(image)])
    answers = [_answer(scene, position) for scene in scenes[::2] + scenes[1::2] for position in POSITIONS]
    shapes, colours = torch.tensor(answers).unbind(dim=1)
    return crops, shapes, colours


def _answer(scene: Scene, position: str) -> tuple[int, int]:
    for item in scene.objects:
        if item.position == position:
            return SHAPES.index(item.shape), COLOURS.index(item.colour)
    return EMPTY, _NO_COLOUR


def _shifted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    reach = round(_MAX_SHIFT * min(image.size))
    shift = rng.integers(-reach, reach + 1, size=2)
    return Image.fromarray(np.roll(np.asarray(image), (int(shift[0]), int(shift[1])), axis=(0, 1)))


def _worn(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as it is, or blurred, or noisy."""
    kind = rng.integers(3)
    if kind == 0:
        return image
    if kind == 1:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2) * min(image.size) / 64))
    noisy = np.asarray(image) + rng.normal(0, rng.uniform(2, 15), size=(image.height, image.width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@torch.no_grad()
def _through_vae(vae: AutoencoderKL, images: list[Image.Image], rng: np.random.Generator) -> list[Image.Image]:
    latents = zoo_vae.encode(vae, crops_to_tensor([np.asarray(image) for image in images])).mode()
    strength = rng.uniform(0, _MAX_LATENT_NOISE, size=(len(images), 1, 1, 1)) * (rng.random() < 0.5)
    noise = torch.randn_like(latents) * torch.from_numpy(strength).float() * latents.std()
    decoded = zoo_vae.decode(vae, latents + noise).clamp(-1, 1)
    pixels = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]
