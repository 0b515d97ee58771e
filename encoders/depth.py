"""Depth of an image as an estimator of transformers sees it: near is white, far is black."""

# B batch, H W pixels of the image, h w of what the estimator gives

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import pydantic

from encoders.control_maps import NetworkMaps, require_finite
from encoders.vision import image_processor
from encoders.weights import ModelSource, fetch_files, load_pretrained, read_config, require_model, resolve_model
from errors import MissingFileError, UserError
from pipelines.recipe import TableConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What they give grows towards the eye, unless their config says that it is metric: then it is a distance.
MODEL_TYPES = ("depth_anything", "dpt")
# A smaller part of the depth than differs within an image of anything.
FLAT = 1e-4


class DepthSettings(TableConfig):
    """Which network estimates."""

    model: str = pydantic.Field(
        default="depth-anything/Depth-Anything-V2-Small-hf",
        pattern=r"\S",
        description="Depth estimator of transformers (Depth Anything or DPT): hub id or local folder",
    )
    revision: str | None = pydantic.Field(default=None, description="Commit of the hub repository; null = main")


class DepthMaps(NetworkMaps):
    """Relative depth, of each image from 0 (its farthest point) to 255 (its nearest).

    Images reach the network as its own `preprocessor_config.json` says, by transformers' Pillow processor.
    """

    kind: ClassVar[str] = "depth"
    settings_class: ClassVar[type[TableConfig]] = DepthSettings
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, processor: Any, *, device: torch.device) -> None:
        super().__init__(device)
        self._model, self._processor = model.to(device), processor
        self._is_distance = getattr(model.config, "depth_estimation_type", "relative") == "metric"

    @classmethod
    def identity(cls, settings: DepthSettings, *, key: str) -> str | None:
        """Return a hash over the files of a folder, or the id and commit of the hub's."""
        return _source(settings, key=key).identity

    @classmethod
    def require(cls, settings: DepthSettings, *, key: str) -> None:
        """Find out that the model is not here, or is of another kind, before any work."""
        source, key = _source(settings, key=key), f"{key}.model"
        require_model(source, key=key)
        _require_type(source, key=key)

    @classmethod
    def open(cls, settings: DepthSettings, *, device: torch.device, key: str) -> Self:
        """Load model and processor; raises as `require` does, and where the weights are not whole."""
        import torch
        from transformers import AutoModelForDepthEstimation

        source, key = _source(settings, key=key), f"{key}.model"
        _require_type(source, key=key)
        model = load_pretrained(AutoModelForDepthEstimation, source, settings={"dtype": torch.float32}, key=key)
        require_finite(model, named=f"{key} {source.location}")
        return cls(model, image_processor(source, key=key), device=device)

    def grey(self, images: Tensor) -> Tensor:
        """Return nearness [B, H, W] of images [B, 3, H, W]."""
        import torch
        from torch.nn import functional

        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)
        depth = self._model(pixel_values=pixels).predicted_depth[:, None]  # [B, 1, h, w]
        depth = functional.interpolate(depth, size=images.shape[-2:], mode="bicubic", align_corners=False)[:, 0]
        nearness = -depth if self._is_distance else depth
        lowest, highest = nearness.amin(dim=(1, 2), keepdim=True), nearness.amax(dim=(1, 2), keepdim=True)
        spread = highest - lowest
        # All of one depth, but for rounding, is neither near nor far.
        is_flat = spread <= FLAT * highest.abs().maximum(lowest.abs())
        return torch.where(is_flat, 0.0, (nearness - lowest) / spread)


def _source(settings: DepthSettings, *, key: str) -> ModelSource:
    try:
        return resolve_model(settings.model, settings.revision)
    except MissingFileError as error:
        raise MissingFileError(f"{key}.model: {error}") from None


def _require_type(source: ModelSource, *, key: str) -> None:
    config = read_config(source)
    if config is None:
        fetch_files(source, ["*.json"], key=key)
        config = read_config(source) or {}
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(f"{key} {source.location} is a {config.get('model_type')}, not one of {', '.join(MODEL_TYPES)}")
