"""Soft edges of images by the network that ControlNet and PixArt use, see `encoders/hed_network.py`."""

# B batch, H W pixels

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import pydantic

from encoders.control_maps import NetworkMaps
from encoders.state_dicts import read_tensors
from encoders.weights import HUB_FOLDER, REPOSITORY, cached_hub_file
from errors import MissingFileError
from pipelines.as_typed import typed_path
from pipelines.recipe import TableConfig
from pipelines.store.files import sha256_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from encoders.hed_network import HedNetwork

PUBLISHED = "lllyasviel/Annotators/ControlNetHED.pth"


class HedSettings(TableConfig):
    """Which network draws."""

    model: str = pydantic.Field(
        default=PUBLISHED,
        pattern=r"\S",
        description="Weights of ControlNet's HED: a file, or org/name/file.pth of the hub, in its cache",
    )
    revision: str | None = pydantic.Field(default=None, description="Commit of the hub repository; null = main")


def find_hed(settings: HedSettings, *, key: str) -> Path:
    """Return the file of weights: by path, relative to the working folder or the repository, or in the hub's cache.

    Raises:
        MissingFileError: it is in neither; names the `key`, and of a hub's file the line that fetches it.
    """
    path = _local_file(settings)
    return path or cached_hub_file(settings.model, settings.revision, key=f"{key}.model")


def _local_file(settings: HedSettings) -> Path | None:
    places = (root / typed_path(settings.model) for root in (Path(), REPOSITORY))
    return next((path for path in places if path.is_file()), None)


class HedMaps(NetworkMaps):
    """Soft edges, from 0 to 255."""

    kind: ClassVar[str] = "hed"
    settings_class: ClassVar[type[TableConfig]] = HedSettings
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, network: HedNetwork, *, device: torch.device) -> None:
        super().__init__(device)
        self._network = network.to(device)

    @classmethod
    def identity(cls, settings: HedSettings, *, key: str) -> str | None:
        """Return a hash over a local file, or the name and commit of the hub's."""
        path = _local_file(settings)
        if path is not None:
            return f"sha256:{sha256_file(path)}"
        if HUB_FOLDER.fullmatch(settings.model) is None:
            raise MissingFileError(f"{key}.model: {settings.model} does not exist")
        return f"{settings.model}@{settings.revision or 'main'}"

    @classmethod
    def require(cls, settings: HedSettings, *, key: str) -> None:
        """Find out that the weights are not here, or are another network's, before any work."""
        _read(settings, key=key)

    @classmethod
    def open(cls, settings: HedSettings, *, device: torch.device, key: str) -> Self:
        """Load the network."""
        return cls(_read(settings, key=key), device=device)

    def grey(self, images: Tensor) -> Tensor:
        """Return edges [B, H, W] of images [B, 3, H, W]."""
        return self._network(images.float())


def _read(settings: HedSettings, *, key: str) -> HedNetwork:
    from encoders.hed_network import hed_of

    origin = f"{key}.model {settings.model}"
    return hed_of(read_tensors(find_hed(settings, key=key), origin=origin, wanted=PUBLISHED), origin=origin)
