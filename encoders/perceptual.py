"""How far two images are to a frozen vision model, by the features of several of its layers (as LPIPS, 1801.03924)."""

# B images, H W pixels, N places, D feature width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from encoders.vision import image_processor
from encoders.weights import ModelSource, load_pretrained
from errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """How a model sees images.

    Attributes:
        identity: of its files.
        side: to which images are resized, squashed; None where the model reads any size.
        mean, std: of each channel, that are taken out of values in 0 to 1.
        layers: hidden states that count.
    """

    identity: str
    side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layers: tuple[int, ...]


class PerceptualModel(nn.Module):
    """A vision model of transformers, of a LLaVA or a CLIP its tower; gradients go through it to the images."""

    def __init__(self, model: nn.Module, config: PerceptualConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of images [B, 3, H, W] in -1 to 1 in each layer, of unit length, fp32 [B, N, D]."""
        side, dtype = self.config.side, next(self.model.parameters()).dtype
        values = images.float() / 2 + 0.5
        if side is not None and values.shape[-2:] != (side, side):
            values = F.interpolate(values, (side, side), mode="bilinear", antialias=True, align_corners=False)
        # Numbers become tensors where images are: by shapes alone there are no others.
        mean, std = (values.new_tensor(each)[:, None, None] for each in (self.config.mean, self.config.std))
        states: Any = self.model(pixel_values=((values - mean) / std).to(dtype), output_hidden_states=True)
        found = [states.hidden_states[layer].float() for layer in self.config.layers]
        # A convolutional model has [B, D, h, w].
        flat = [each.flatten(2).mT if each.ndim == 4 else each for each in found]
        return [F.normalize(each, dim=-1) for each in flat]


def perceptual_distance(model: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """Return the squared distance of two images' features, a mean over places and a sum over layers, fp32 [B]."""
    pairs = zip(model(first), model(second), strict=True)
    return torch.stack([(one - other).square().sum(-1).mean(-1) for one, other in pairs]).sum(0)


def open_perceptual(source: ModelSource, *, layers: Sequence[int] | None, key: str) -> PerceptualModel:
    """Load a vision model, frozen, fp32 on the CPU; `layers` are the hidden states that count, None all but the first.

    Raises:
        UserError: it is no such model, lacks weights, or has fewer layers; names the recipe `key`.
    """
    from transformers import AutoModel

    processor = image_processor(source, key=key)
    loaded: Any = load_pretrained(AutoModel, source, settings={"dtype": torch.float32}, key=key)
    tower = next((part for part in (getattr(loaded, name, None) for name in TOWERS) if part is not None), loaded)
    depth = getattr(tower.config, "num_hidden_layers", None) or len(getattr(tower.config, "depths", ()))
    chosen = tuple(layers) if layers is not None else tuple(range(1, depth + 1))
    if not chosen or not all(-depth - 1 <= layer <= depth for layer in chosen):
        raise UserError(f"{key} {source.location} has hidden states 0 to {depth}, not all of {list(chosen)}")
    config = PerceptualConfig(
        identity=source.identity,
        side=getattr(tower.config, "image_size", None),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        layers=chosen,
    )
    return PerceptualModel(tower, config).eval().requires_grad_(False)


# What models of several parts call the one that sees.
TOWERS = ("vision_tower", "vision_model")
