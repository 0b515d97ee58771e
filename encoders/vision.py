"""Frozen networks that look at images: CLIP's two towers, any vision model of transformers, Inception-v3.

What is measured with their features (distances, scores) belongs to the rooms that measure.
"""

# B images, D feature width, H W pixels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from encoders.tokens import TextCut, count_cut, count_tokens, pretrained_tokenizer
from encoders.weights import ModelSource, load_pretrained, loadable
from errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INCEPTION_RESIZER = "PIL bicubic with antialiasing, each channel in float32, squashed to 299x299 (as clean-fid)"
INCEPTION_PIXELS = 299
RESAMPLING = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}


class VisionTower(Protocol):
    """A loaded network that turns images into features."""

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as the network reads it, float32 [3, H, W]; may be called from several threads."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Turn prepared images [B, 3, H, W] into features [B, D], float32."""
        ...


def image_processor(source: ModelSource, *, key: str) -> Any:
    """Return what transformers prepares a model's images with, on Pillow.

    Raises:
        UserError: the model has none; names the recipe `key`.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(loadable(source, key=key), revision=source.revision, backend="pil")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key} {source.location} has no image processor: {reason}") from None


def describe_resizer(source: ModelSource, *, key: str) -> str:
    """Return how a model's images reach its size, in words; raises as `image_processor` does."""
    processor = image_processor(source, key=key)
    method = RESAMPLING.get(int(processor.resample), str(processor.resample))
    sides = {name: side for name, side in dict(processor.size).items() if side is not None}
    size = f"{sides['width']}x{sides['height']}" if "width" in sides else f"shortest side {sides.get('shortest_edge')}"
    crop = dict(processor.crop_size) if processor.do_center_crop else {}
    cut = f", centre crop {crop['width']}x{crop['height']}" if crop else ""
    return f"PIL {method} with antialiasing to {size}{cut}"


def find_resize(source: ModelSource, *, key: str) -> int | tuple[int, int] | None:
    """Return to which size images are resized before edges are cut off; raises as `image_processor` does.

    It is the shortest side in pixels, or (width, height); None where they keep their size.
    """
    processor = image_processor(source, key=key)
    size = dict(processor.size)
    if not processor.do_resize:
        return None
    if size.get("width") is not None:
        return size["width"], size["height"]
    # Only square images become of one size by their longest side, and theirs is the shortest, too.
    return size.get("shortest_edge") or size.get("longest_edge")


def find_crop(source: ModelSource, *, key: str) -> str:
    """Return of which images edges are cut off: "none", "oblong" ones or "all"; raises as `image_processor` does."""
    processor = image_processor(source, key=key)
    if not processor.do_center_crop:
        return "none"
    size, crop = dict(processor.size), dict(processor.crop_size)
    shortest = size.get("shortest_edge")
    height, width = (size.get("height"), size.get("width")) if shortest is None else (shortest, shortest)
    if (height, width) != (crop["height"], crop["width"]):
        return "all"
    return "none" if shortest is None else "oblong"


class InceptionTower:
    """The Inception-v3 of FID with clean-fid's resizing (Parmar et al. 2022).

    Raises:
        UserError: the weights are not its own; names their `origin`.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, origin: str, device: torch.device) -> None:
        from encoders.inception import inception_of

        self._device = device
        self._model = inception_of(weights, origin=origin).to(device)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image squashed to 299 x 299, [3, 299, 299] from 0 to 255."""
        size = (INCEPTION_PIXELS, INCEPTION_PIXELS)
        channels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
        # In mode F nothing is rounded or clipped between resizing and the network (Parmar et al. 2022).
        return np.stack(
            [np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)) for channel in channels]
        )

    def features(self, images: Tensor) -> Tensor:
        """Turn prepared images into features [B, 2048]."""
        return self._model(images.to(self._device))


class ClipTowers:
    """Both towers of a CLIP of transformers; embeddings have unit length.

    Attributes:
        max_tokens: of a text, of what is longer the start is read.

    Raises:
        UserError: the model is no CLIP, or lacks weights; names the recipe `key`.
    """

    def __init__(self, source: ModelSource, *, device: torch.device, dtype: torch.dtype, key: str) -> None:
        from transformers import CLIPModel

        self._processor = image_processor(source, key=key)
        self._tokenizer = pretrained_tokenizer(source)
        self._model = load_pretrained(CLIPModel, source, settings={"dtype": dtype}, key=key).to(device)
        self.max_tokens = self._model.config.text_config.max_position_embeddings

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as CLIP reads it, [3, H, W]."""
        return self._processor(images=image, return_tensors="np")["pixel_values"][0]

    def features(self, images: Tensor) -> Tensor:
        """Turn prepared images [B, 3, H, W] into embeddings [B, D]."""
        pixels = images.to(self._model.device, self._model.dtype)
        return _unit(self._model.get_image_features(pixel_values=pixels))

    def count_cut(self, texts: Sequence[str]) -> TextCut:
        """Count what `text_features` does not see of texts."""
        return count_cut(texts, self._tokenizer, max_tokens=self.max_tokens)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how long each text is to CLIP, begin and end included."""
        return count_tokens(texts, self._tokenizer)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into embeddings [B, D]; of what is longer than CLIP's 77 tokens the start is read."""
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self._model.device)
        output = self._model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return _unit(output)


class VisionModel:
    """Any vision model of transformers, in float32; of a LLaVA its tower, at the layer that its language model reads.

    Raises:
        UserError: it lacks weights; names the recipe `key`.
    """

    def __init__(self, source: ModelSource, *, device: torch.device, key: str) -> None:
        import torch
        from transformers import AutoModel

        self._device = device
        self._processor = image_processor(source, key=key)
        model = load_pretrained(AutoModel, source, settings={"dtype": torch.float32}, key=key).to(device)
        self._layer = getattr(model.config, "vision_feature_layer", None)
        self._model = model if self._layer is None else model.vision_tower

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as the model reads it, [3, H, W]."""
        return self._processor(images=image, return_tensors="np")["pixel_values"][0]

    def features(self, images: Tensor) -> Tensor:
        """Turn prepared images into features [B, D]: what the model pools, or the mean of a tower's patches."""
        images = images.to(self._device)
        if self._layer is None:
            return self._model(pixel_values=images).pooler_output
        states = self._model(pixel_values=images, output_hidden_states=True).hidden_states  # [B, 1 + N, D] each
        return states[self._layer][:, 1:].mean(dim=1)


def _unit(output: Any) -> Tensor:
    from torch.nn.functional import normalize

    return normalize(output.pooler_output.float(), dim=-1)
