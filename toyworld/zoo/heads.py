"""The embedded head `sound`: how likely a picture is a sound one, from the embedded CLIP's embedding.

Its layout is that of LAION's NSFW heads. It sees sound pictures and those that are spoilt in every way, as CLIP has.
A minute on one core. Needs the CLIP.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from encoders.vision import ClipTowers
from encoders.weights import resolve_model
from pipelines.engine.progress import get_logger
from toyworld.scenes import random_scene
from toyworld.spoiling import PICTURE_KINDS
from toyworld.zoo.clip import broken_picture
from toyworld.zoo.vision_tower import picture_of

# N pictures, D width of embeddings

log = get_logger("toyworld.zoo")

SEED = 7
NUM_PICTURES = 8000
NUM_STEPS = 1500
NAME = "sound"
_HIDDEN = 32
_LEARNING_RATE = 3e-3
_BATCH = 256


def random_pictures(num: int, rng: np.random.Generator) -> tuple[list[Image.Image], list[str | None]]:
    """Half of them sound, and how each of the others is broken."""
    kinds = [None if i % 2 else PICTURE_KINDS[i // 2 % len(PICTURE_KINDS)] for i in range(num)]
    scenes = [random_scene(rng) for _ in kinds]
    pictures = [
        picture_of(scene, rng) if kind is None else broken_picture(scene, kind, rng)
        for scene, kind in zip(scenes, kinds, strict=True)
    ]
    return [picture.convert("RGB") for picture in pictures], kinds


@torch.no_grad()
def embeddings(towers: ClipTowers, pictures: list[Image.Image]) -> Tensor:
    """Embeddings [N, D] of unit length."""
    looks = torch.from_numpy(np.stack([towers.prepare(picture) for picture in pictures]))
    return torch.cat([towers.features(part) for part in looks.split(_BATCH)]).float()


def train(folder: Path, *, clip_folder: Path) -> None:
    """Train the head and save it as `sound.safetensors` in `folder`."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    towers = ClipTowers(resolve_model(str(clip_folder)), device=torch.device("cpu"), dtype=torch.float32, key="clip")
    pictures, kinds = random_pictures(NUM_PICTURES, rng)
    seen = embeddings(towers, pictures)
    is_sound = torch.tensor([kind is None for kind in kinds]).float()
    mean, variance = seen.mean(dim=0), seen.var(dim=0)
    states = (seen - mean) / variance.sqrt()
    first, second = nn.Linear(seen.shape[1], _HIDDEN), nn.Linear(_HIDDEN, 1)
    weights = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, weight_decay=0.05)
    for step in range(NUM_STEPS):
        rows = torch.from_numpy(rng.integers(NUM_PICTURES, size=_BATCH))
        logits = second(functional.relu(first(states[rows])))[:, 0]
        loss = functional.binary_cross_entropy_with_logits(logits, is_sound[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 500 == 0:
            log.info("head step %d loss %.4f", step + 1, loss.item())
    folder.mkdir(parents=True, exist_ok=True)
    layers = {"linear_1": first, "linear_2": second}
    named = {f"{name}.{part}": value for name, layer in layers.items() for part, value in layer.state_dict().items()}
    save_file({"norm.mean": mean, "norm.variance": variance, **named}, folder / f"{NAME}.safetensors")
