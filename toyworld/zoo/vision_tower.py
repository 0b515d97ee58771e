"""The captioner's vision tower: a CLIPVisionModel on 64 patches, warmed up by slots; stands where LLaVA has CLIP.

It sees ground truth: shape, colour, size and place of every object, background and pattern. Pictures come at many sizes
and aspect ratios, some through JPEG, and are squashed to 64x64 as the shipped image processor does.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from pipelines.engine.progress import get_logger
from toyworld.render import render
from toyworld.scenes import POSITIONS, Scene, random_scene
from toyworld.zoo.optimizer import Trainer
from toyworld.zoo.slots import Probed, SlotReadout, scene_targets, slot_accuracy, slot_loss

# B batch, N patches, D width

log = get_logger("toyworld.zoo")

IMAGE_PIXELS = 64
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)
NUM_STEPS = 2400
BATCH_SIZE = 64
_LEARNING_RATE = 2e-3
_WIDTH = 128


def vision_config() -> CLIPVisionConfig:
    """Four layers of width 128 on patches of 8 pixels."""
    return CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_PIXELS,
        patch_size=8,
        projection_dim=_WIDTH,
    )


def picture_of(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A picture of any usual size and aspect ratio from 1:2 to 2:1, a third of them through JPEG."""
    width, height = _random_size(rng)
    image = render(scene, width, height, rng=rng)
    if rng.random() < 0.33:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(75, 96)))
        image = Image.open(buffer)
    return image


def _random_size(rng: np.random.Generator) -> tuple[int, int]:
    if rng.random() < 0.4:
        return 64, 64
    shorter = int(rng.choice((64, 96, 128)))
    longer = int(shorter * rng.choice((1.0, 1.0, 1.25, 1.5, 1.75, 2.0)))
    return (shorter, longer) if rng.random() < 0.5 else (longer, shorter)


def pixel_values(images: list[Image.Image]) -> Tensor:
    """What the image processor makes of pictures: squashed to 64x64, float32 [B, 3, 64, 64] in -1 to 1."""
    size = (IMAGE_PIXELS, IMAGE_PIXELS)
    pixels = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vision_tower(rng: np.random.Generator) -> CLIPVisionModel:
    """A tower whose last hidden states tell what is at every anchor."""
    probed = Probed(CLIPVisionModel(vision_config()), SlotReadout(_WIDTH, num_slots=len(POSITIONS)))
    trainer = Trainer(probed, num_steps=NUM_STEPS, learning_rate=_LEARNING_RATE)
    for step in range(NUM_STEPS):
        scenes = [random_scene(rng) for _ in range(BATCH_SIZE)]
        targets = scene_targets(scenes)
        pixels = pixel_values([picture_of(scene, rng) for scene in scenes])
        logits = probed.readout(_patch_states(probed.encoder, pixels))
        loss = slot_loss(logits, targets)
        trainer.step(loss)
        if (step + 1) % 200 == 0:
            accuracy = {k: round(v, 3) for k, v in slot_accuracy(logits, targets).items()}
            log.info("vision step %d loss %.4f %s", step + 1, loss.item(), accuracy)
    return trainer.averaged.encoder


def _patch_states(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Hidden states that LLaVA's projector reads: the last layer without the class token, [B, N, D]."""
    output = tower(pixel_values=pixels, output_hidden_states=True)
    return output.hidden_states[-1][:, 1:]
