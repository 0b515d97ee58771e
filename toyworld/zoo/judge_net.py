"""The network of the judge: one crop around an anchor in, shape (or nothing) and colour out; 0.1M weights.

It is trained on crops whose scene is known: clean, blurred, noisy, and passed through the embedded VAE, at several sizes.
About 3 minutes on one core. Needs the VAE.
"""

import torch
from torch import Tensor, nn

from toyworld.scenes import COLOURS, SHAPES

# B crops, P crop pixels

CROP_PIXELS = 32
EMPTY = len(SHAPES)  # shape index of a crop with nothing in its middle


class JudgeNet(nn.Module):
    """Four convolutions and a read-out: [B, 3, P, P] to shape logits [B, 5] and colour logits [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        blocks: list[nn.Module] = []
        for i, (num_in, num_out) in enumerate(zip(widths, widths[1:], strict=False)):
            blocks += [nn.Conv2d(num_in, num_out, 3, stride=1 if i == 0 else 2, padding=1), nn.ReLU()]
        self.trunk = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(64 * (CROP_PIXELS // 8) ** 2, EMPTY + 1 + len(COLOURS))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Shape logits (the last is EMPTY) and colour logits."""
        logits = self.head(self.trunk(crops))  # [B, 11]
        shape_logits, colour_logits = torch.split(logits, [EMPTY + 1, len(COLOURS)], dim=1)
        return shape_logits, colour_logits
