"""Which maps a control branch was trained with, and what draws them of photos."""

from collections.abc import Mapping
from typing import Any

from errors import UserError
from pipelines.engine.preflight import require_packages
from sampling.trained_model import TrainedModel

KEY = "sampling.control_is"
# Of maps that people have made elsewhere.
GIVEN = "given"


def maps_of(trained: TrainedModel) -> tuple[str, Mapping[str, Any]]:
    """Return kind and settings of the maps to be drawn of photos.

    Raises:
        UserError: nothing says them, or they were not drawn here; names the key.
    """
    branch = trained.branch
    assert branch is not None
    kind = None if branch.maps is None else branch.maps.get("kind")
    if branch.maps is None or kind is None:
        raise UserError(
            f"{KEY} = 'photo', but {branch.path} does not say which maps it was trained with: draw such a map of the "
            f"photo yourself and leave {KEY} at 'map'"
        )
    if kind == GIVEN:
        raise UserError(
            f"{KEY} = 'photo', but {branch.path} was trained with maps that were made elsewhere: make one of the photo "
            f"in the same way and leave {KEY} at 'map'"
        )
    return kind, branch.maps.get("settings") or {}


def identify_maps(trained: TrainedModel) -> dict[str, Any]:
    """Return what decides the map of a photo: kind, settings and model; raises as `require_maps` does."""
    from encoders.control_kinds import maps_class

    kind, settings = maps_of(trained)
    maps = maps_class(kind)
    read = maps.settings_class.model_validate(dict(settings))
    return {"kind": kind, "settings": read.fingerprint_fields(), "model": maps.identity(read, key=KEY)}


def require_maps(trained: TrainedModel) -> None:
    """Find out before any work that what draws the maps of photos is not here.

    Raises:
        UserError: the kind or a model is not known or not here.
    """
    from encoders.control_kinds import maps_class

    kind, settings = maps_of(trained)
    maps = maps_class(kind)
    require_packages(*maps.packages)
    maps.require(maps.settings_class.model_validate(dict(settings)), key=KEY)
