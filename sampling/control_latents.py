"""Control images as a network sees them: cut to what is drawn, of photos their maps, through the VAE; each once."""

# B images, C latent channels, h x w latent size

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.latents import LatentCodec
from sampling.control_kind import SETTINGS_KEY, maps_of
from sampling.requests import ImageRequest
from sampling.trained_model import TrainedModel

if TYPE_CHECKING:
    from encoders.control_maps import ControlMaps

# Of the latest, so many are kept: latents of 1024 pixels are 256 KB, pictures 3 MB.
MAX_LATENTS, MAX_PICTURES = 256, 16

Key = tuple[str, int, int, bool]  # an image's bytes, the height and width that are drawn, and whether it is a photo


class ControlPictures:
    """The maps that lead images, drawn by a checkpoint's branch's kind where photos are given; the latest are kept."""

    def __init__(self, trained: TrainedModel, *, device: torch.device) -> None:
        self._trained, self._device = trained, device
        self._maps: ControlMaps | None = None
        self._kept: OrderedDict[Key, Image.Image] = OrderedDict()
        self.num_kept = MAX_PICTURES

    def of(self, request: ImageRequest, *, is_photo: bool) -> Image.Image:
        """Return the map that leads a request, as large as what is drawn.

        Raises:
            UserError: the image cannot be decoded, or what draws maps of photos is not here.
        """
        key = _key(request, is_photo=is_photo)
        if key not in self._kept:
            self._kept[key] = self._draw(request, is_photo=is_photo)
            if len(self._kept) > self.num_kept:
                self._kept.popitem(last=False)
        return self._kept[key]

    def _draw(self, request: ImageRequest, *, is_photo: bool) -> Image.Image:
        assert request.control is not None
        picture = request.control.cut(request.width, request.height)
        if not is_photo:
            return picture
        from encoders.control_kinds import open_control_maps

        if self._maps is None:
            kind, settings = maps_of(self._trained)
            self._maps = open_control_maps(kind, settings, device=self._device, key=SETTINGS_KEY)
        return Image.fromarray(self._maps.draw(np.asarray(picture)))


class ControlLatents:
    """The maps that lead images as the network knows latents, each encoded once."""

    def __init__(self, pictures: ControlPictures, codec: LatentCodec, *, device: torch.device) -> None:
        self._pictures, self._codec, self._device = pictures, codec, device
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()

    def of(self, requests: Sequence[ImageRequest], *, are_photos: bool) -> Tensor:
        """Return the latents [B, C, h, w] of the images that lead requests, fp32 on the device.

        They are the mean of what the VAE says, scaled and shifted. Raises as `ControlPictures.of` does.
        """
        self._pictures.num_kept = max(MAX_PICTURES, len(requests))  # they are asked for when the batch is drawn
        return torch.stack([self._encode(request, is_photo=are_photos) for request in requests]).to(self._device)

    def _encode(self, request: ImageRequest, *, is_photo: bool) -> Tensor:
        """Return the latents [C, h, w] of one image, alone in its batch: they do not depend on others."""
        key = _key(request, is_photo=is_photo)
        if key not in self._kept:
            picture = self._pictures.of(request, is_photo=is_photo)
            pixels = torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())  # [3, H, W]
            mean, _ = self._codec.encode(pixels[None])
            spec = self._codec.spec
            self._kept[key] = (mean[0] - spec.shift) * spec.scale
            if len(self._kept) > MAX_LATENTS:
                self._kept.popitem(last=False)
        return self._kept[key]


def _key(request: ImageRequest, *, is_photo: bool) -> Key:
    assert request.control is not None
    return request.control.identity, request.height, request.width, is_photo
