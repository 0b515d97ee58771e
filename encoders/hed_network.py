"""The network of ControlNet's HED: soft edges by holistically-nested edge detection (Xie & Tu 2015).

Layout and weights are those of `ControlNetHED.pth` (lllyasviel/Annotators): VGG-16's convolutions in five blocks, each
with a projection to one channel, over RGB from 0 to 255 less a learnt mean.
"""

# B batch, C channels, H W pixels

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders.control_maps import require_finite
from errors import UserError

# Width and number of the convolutions of each block.
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
NUM_NAMED = 3


class HedBlock(nn.Module):
    """Convolutions at one scale, and what they make of an edge."""

    def __init__(self, num_in: int, num_out: int, *, num_layers: int) -> None:
        super().__init__()
        widths = [num_in] + [num_out] * num_layers
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.projection = nn.Conv2d(num_out, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, num_in, H, W] to the features [B, num_out, H, W] and their projection [B, 1, H, W]."""
        for conv in self.convs:
            x = functional.relu(conv(x))
        return x, self.projection(x)


class HedNetwork(nn.Module):
    """Images to edges at five scales, halved from each to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        num_in = 3
        for number, (width, num_layers) in enumerate(BLOCKS, start=1):
            self.add_module(f"block{number}", HedBlock(num_in, width, num_layers=num_layers))
            num_in = width

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] from 0 to 255 to edges [B, H, W] from 0 to 1.

        The logits of all scales are brought to the size of the image and averaged, as published.
        """
        size = images.shape[-2:]
        x, logits = images - self.norm, []
        for number in range(1, len(BLOCKS) + 1):
            if number > 1:
                x = functional.max_pool2d(x, 2)
            x, edges = self.get_submodule(f"block{number}")(x)
            logits.append(functional.interpolate(edges, size=size, mode="bilinear", align_corners=False))
        return torch.cat(logits, dim=1).mean(dim=1).sigmoid()


def hed_of(weights: Mapping[str, Tensor], *, origin: str) -> HedNetwork:
    """Return the network with these weights; `origin` names their file in an error.

    Raises:
        UserError: they are not exactly this network's; names keys and shapes.
    """
    with torch.device("meta"):
        network = HedNetwork()
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [
        f"{name} is {_shape(found.get(name))}, not {_shape(expected.get(name))}"
        for name in [*expected, *sorted(found.keys() - expected.keys())]
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = "" if len(wrong) <= NUM_NAMED else f", and {len(wrong) - NUM_NAMED} more"
        raise UserError(f"{origin} is not ControlNet's HED: of its weights {'; '.join(wrong[:NUM_NAMED])}{more}")
    network.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    require_finite(network, named=origin)
    return network.eval().requires_grad_(False)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"[{', '.join(map(str, shape))}]"
