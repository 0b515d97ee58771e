"""Canny's edges, drawn by OpenCV as ControlNet draws them (Zhang et al. 2023; Canny 1986)."""

# H W pixels

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import pydantic

from pipelines.recipe import Decides, TableConfig

if TYPE_CHECKING:
    import torch


class CannySettings(TableConfig):
    """What decides which gradients are edges; in units of OpenCV's 3 x 3 Sobel kernels, over levels from 0 to 255."""

    low_threshold: Decides[int] = pydantic.Field(
        default=100, ge=1, le=2000, description="Gradient from which an edge goes on that has begun elsewhere"
    )
    high_threshold: Decides[int] = pydantic.Field(
        default=200, ge=1, le=2000, description="Gradient from which an edge begins"
    )
    widen_pixels: Decides[int] = pydantic.Field(
        default=0,
        ge=0,
        le=8,
        description="Pixels by which lines are widened each way; 0 = one pixel wide, as ControlNet's; at 64px a VAE "
        "keeps more of lines that are widened by 1",
    )

    @pydantic.model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low_threshold > self.high_threshold:
            raise ValueError(f"low_threshold {self.low_threshold} is above high_threshold {self.high_threshold}")
        return self


class CannyMaps:
    """Edges, 0 or 255, one pixel wide unless they are widened; image by image, from any thread.

    OpenCV takes for each pixel the gradient of the channel in which it is largest, so that colours which are equally
    bright have an edge between them.
    """

    kind: ClassVar[str] = "canny"
    settings_class: ClassVar[type[TableConfig]] = CannySettings
    packages: ClassVar[tuple[str, ...]] = ("cv2",)

    def __init__(self, settings: CannySettings) -> None:
        import cv2

        cv2.setNumThreads(1)  # images are drawn in threads of the caller's
        self._settings = settings

    @classmethod
    def identity(cls, settings: CannySettings, *, key: str) -> str | None:
        """Return None: there is no model."""
        return None

    @classmethod
    def require(cls, settings: CannySettings, *, key: str) -> None:
        """Do nothing: there is no model."""

    @classmethod
    def open(cls, settings: CannySettings, *, device: torch.device, key: str) -> Self:
        """Return what draws, on the CPU whatever the device is."""
        return cls(settings)

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Return the edges of an image, uint8 [H, W, 3] both."""
        import cv2

        settings = self._settings
        edges = cv2.Canny(image, settings.low_threshold, settings.high_threshold)  # [H, W]
        if settings.widen_pixels:
            edges = cv2.dilate(edges, np.ones((2 * settings.widen_pixels + 1,) * 2, np.uint8))
        return np.repeat(edges[..., None], 3, axis=2)
