"""The network of the judge: one crop around an anchor in, shape (or nothing) and colour out; 0.1M weights."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from toyworld.render import ANCHORS
from toyworld.scenes import COLOURS, POSITIONS, SHAPES

# B crops, P crop pixels

CROP_PIXELS = 32
EMPTY = len(SHAPES)  # shape index of a crop with nothing in its middle
_CROP_FRACTION = 0.46  # of the shorter side


class JudgeNet(nn.Module):
    """Four convolutions and a read-out: [B, 3, P, P] to shape logits [B, 5] and colour logits [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        blocks: list[nn.Module] = []
        for i, (num_in, num_out) in enumerate(itertools.pairwise(widths)):
            blocks += [nn.Conv2d(num_in, num_out, 3, stride=1 if i == 0 else 2, padding=1), nn.ReLU()]
        self.trunk = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(64 * (CROP_PIXELS // 8) ** 2, EMPTY + 1 + len(COLOURS))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Shape logits (the last is EMPTY) and colour logits."""
        logits = self.head(self.trunk(crops))  # [B, 11]
        shape_logits, colour_logits = torch.split(logits, [EMPTY + 1, len(COLOURS)], dim=1)
        return shape_logits, colour_logits


def anchor_crops(image: Image.Image) -> list[np.ndarray]:
    """The five crops around the anchors in the order of POSITIONS, uint8 [P, P, 3]; edges are continued outwards."""
    side = round(_CROP_FRACTION * min(image.size))
    pixels = np.pad(np.asarray(image.convert("RGB")), ((side, side), (side, side), (0, 0)), mode="edge")
    crops = []
    for position in POSITIONS:
        x, y = ANCHORS[position]
        left, top = round(x * image.width + side / 2), round(y * image.height + side / 2)
        crop = Image.fromarray(pixels[top : top + side, left : left + side])
        crops.append(np.asarray(crop.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BILINEAR)))
    return crops


def crops_to_tensor(crops: Sequence[np.ndarray]) -> Tensor:
    """Crops as the network takes them, float32 [B, 3, P, P] in -1 to 1."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
