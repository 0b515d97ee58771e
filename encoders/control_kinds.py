"""The kinds of control maps that are drawn of an image: one class each, by the name that recipes and manifests have.

Another kind is a file of its own, as `encoders/canny.py` is, and its name here. What is drawn so when features are made
is drawn so of a photo when a picture is drawn by it: a manifest says kind and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pydantic

from encoders.canny import CannyMaps
from encoders.control_maps import ControlMaps
from encoders.depth import DepthMaps
from encoders.hed import HedMaps
from errors import UserError

if TYPE_CHECKING:
    import torch

MAP_CLASSES: tuple[type[ControlMaps], ...] = (CannyMaps, HedMaps, DepthMaps)


def maps_class(kind: str) -> type[ControlMaps]:
    """Return the class that draws maps of a kind.

    Raises:
        UserError: there is no such kind.
    """
    for chosen in MAP_CLASSES:
        if kind == chosen.kind:
            return chosen
    known = ", ".join(chosen.kind for chosen in MAP_CLASSES)
    raise UserError(f"control maps of kind {kind!r} are not drawn here; there are {known}")


def open_control_maps(
    kind: str, settings: Mapping[str, Any], *, device: torch.device, key: str = "control"
) -> ControlMaps:
    """Return what draws the maps of a kind as its settings say, which are those of a recipe or of a manifest.

    Raises:
        UserError: there is no such kind, a setting is wrong, or a model is not here; begins with `key`.
    """
    chosen = maps_class(kind)
    try:
        read = chosen.settings_class.model_validate(dict(settings))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, (key, *first["loc"])))
        raise UserError(f"{name} = {first['input']!r}: {first['msg']}") from None
    return chosen.open(read, device=device, key=key)
