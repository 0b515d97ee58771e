"""How many parameters networks have: of the published size, and of a folder of trained weights."""

import json
import math
from pathlib import Path
from typing import Literal

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
HEADER_BYTES = 8


def published_parameters(adaln: Literal["single", "per-block"]) -> int:
    """Return how many parameters PixArt-XL/2 has with one adaLN for all blocks, or one in each."""
    import torch

    from pixart.model import PixArtConfig

    with torch.device("meta"):
        network = PixArtConfig(adaln=adaln).network()
    return sum(parameter.numel() for parameter in network.parameters())


def stored_parameters(folder: Path) -> int:
    """Return how many values the weights in a diffusers folder have, from the head of their file."""
    with (folder / WEIGHTS_NAME).open("rb") as file:
        size = int.from_bytes(file.read(HEADER_BYTES), "little")
        header = json.loads(file.read(size))
    return sum(math.prod(item["shape"]) for name, item in header.items() if name != "__metadata__")
