"""Control maps: what of an image a control branch is shown, such as its edges, white on black."""

# B batch, H W pixels

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np

from encoders.transfers import to_device
from errors import UserError
from pipelines.recipe import TableConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ControlMaps(Protocol):
    """Draws the maps of one kind; `encoders.control_kinds` opens one by its name.

    Attributes:
        kind: how recipes and manifests call it.
        settings_class: its own keys; those that `Decides` decide what is drawn, and a `model` does so by its bytes.
        packages: modules it needs beside those that every encoder does.
    """

    kind: ClassVar[str]
    settings_class: ClassVar[type[TableConfig]]
    packages: ClassVar[tuple[str, ...]]

    @classmethod
    def identity(cls, settings: Any, *, key: str) -> str | None:
        """Return what tells the model from all others, as `encoders.weights.resolve_model` does; None without a model.

        Raises:
            MissingFileError: a path names nothing; begins with the `key` of the settings.
        """
        ...

    @classmethod
    def require(cls, settings: Any, *, key: str) -> None:
        """Find out before any work that a model is not here.

        Raises:
            UserError: names the `key` of the settings, the model and the way out.
        """
        ...

    @classmethod
    def open(cls, settings: Any, *, device: torch.device, key: str) -> Self:
        """Load what draws; raises as `require` does, and where the weights are another network's."""
        ...

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Return the map of an image, uint8 [H, W, 3] both, its three channels alike."""
        ...


class NetworkMaps(ABC):
    """The half of `ControlMaps` that networks share: they draw a batch at a time, on one device, from one thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def grey(self, images: Tensor) -> Tensor:
        """Return maps [B, H, W] from 0 to 1 of images, uint8 [B, 3, H, W], all on the device."""

    def draw_batch(self, images: Tensor) -> Tensor:
        """Return the maps of images, uint8 [B, 3, H, W] both, on the device, which nobody has waited for."""
        import torch

        with torch.inference_mode():
            grey = self.grey(to_device(images, self.device))
            levels = (255 * grey).round().clamp(0, 255).to(torch.uint8)
            return levels[:, None].expand(-1, 3, -1, -1)

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Return the map of one image, see `ControlMaps`."""
        import torch

        images = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        return np.ascontiguousarray(self.draw_batch(images)[0].permute(1, 2, 0).cpu().numpy())


def require_finite(model: torch.nn.Module, *, named: str) -> None:
    """Refuse weights that are not finite, whose maps would be black without a word.

    Raises:
        UserError: begins with `named`, and gives the first such weight.
    """
    wrong = next((name for name, value in model.state_dict().items() if not value.isfinite().all()), None)
    if wrong is not None:
        raise UserError(f"{named} has weights that are not finite ({wrong}): fetch it again")
