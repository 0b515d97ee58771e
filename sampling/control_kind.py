"""Which maps a control branch was trained with, and what draws them of photos."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from errors import UserError
from pipelines.as_typed import ANY, typed_flag
from pipelines.engine.preflight import require_packages
from sampling.config import SamplingConfig
from sampling.trained_model import TrainedModel

KEY, KIND_KEY, SETTINGS_KEY = "sampling.control_is", "sampling.control_kind", "sampling.control_settings"
# Of maps that people have made elsewhere.
GIVEN = "given"


def with_maps(trained: TrainedModel, config: SamplingConfig) -> TrainedModel:
    """Return the model whose branch's maps are drawn of photos as the recipe says, where the branch's file does not.

    Raises:
        UserError: there is no such kind, or the branch says another; names the key.
    """
    wanted, settings, branch = config.control_kind, config.control_settings, trained.branch
    if wanted is not None:
        _require_kind(wanted)
    if branch is None or (wanted is None and not settings):
        return trained
    maps = branch.maps or {}
    kind = maps.get("kind")
    if wanted is not None and kind not in (None, GIVEN, wanted):
        raise UserError(
            f"{KIND_KEY} = {wanted!r}, but {branch.path} says that it was trained with {kind} maps: leave it out, or "
            f"draw a {wanted} map of the photo yourself and leave {KEY} at 'map'"
        )
    settings = {**(maps.get("settings") or {}), **settings}
    return replace(trained, branch=replace(branch, photo_maps={"kind": wanted or kind, "settings": settings}))


def photo_kind(trained: TrainedModel) -> str | None:
    """Return the kind of the maps that are drawn of photos; None where nothing says one, or there is no branch."""
    branch = trained.branch
    maps = None if branch is None else branch.photo_maps or branch.maps
    kind = None if maps is None else maps.get("kind")
    return None if kind == GIVEN else kind


def maps_of(trained: TrainedModel) -> tuple[str, Mapping[str, Any]]:
    """Return kind and settings of the maps to be drawn of photos.

    Raises:
        UserError: nothing says them; names the keys.
    """
    branch, kind = trained.branch, photo_kind(trained)
    assert branch is not None
    maps = branch.photo_maps or branch.maps
    if kind is None or maps is None:
        is_given = branch.maps is not None and branch.maps.get("kind") == GIVEN
        says = "says that its maps were made elsewhere" if is_given else "does not say which maps it was trained with"
        raise UserError(
            f"{KEY} = 'photo', but {branch.path} {says}: name their kind as {KIND_KEY} "
            f"({typed_flag('control-kind', ANY)}: {_kinds()}), or draw such a map of the photo yourself and leave "
            f"{KEY} at 'map'"
        )
    return kind, maps.get("settings") or {}


def identify_maps(trained: TrainedModel) -> dict[str, Any]:
    """Return what decides the map of a photo: kind, settings and model; raises as `require_maps` does."""
    from encoders.control_kinds import maps_class, read_settings

    kind, settings = maps_of(trained)
    read = read_settings(kind, settings, key=SETTINGS_KEY)
    model = maps_class(kind).identity(read, key=SETTINGS_KEY)
    return {"kind": kind, "settings": read.fingerprint_fields(), "model": model}


def require_maps(trained: TrainedModel) -> None:
    """Find out before any work that what draws the maps of photos is not here.

    Raises:
        UserError: the kind or a model is not known or not here.
    """
    from encoders.control_kinds import maps_class, read_settings

    kind, settings = maps_of(trained)
    maps = maps_class(kind)
    require_packages(*maps.packages)
    maps.require(read_settings(kind, settings, key=SETTINGS_KEY), key=SETTINGS_KEY)


def describe_other_photo_maps(trained: TrainedModel) -> str | None:
    """Return how the maps of photos differ from those that the branch was trained with; None where they do not."""
    from encoders.control_kinds import describe_other_maps

    kind, settings = maps_of(trained)
    branch = trained.branch
    if branch is None or branch.maps is None or branch.maps.get("kind") in (None, GIVEN):
        return None
    used = {"kind": kind, "settings": settings, "identity": identify_maps(trained)["model"]}
    said = describe_other_maps(branch.maps, used)
    return None if said is None else f"{branch.path} {said}: what the photos give may not lead as maps did there"


def _require_kind(kind: str) -> None:
    from encoders.control_kinds import maps_class

    try:
        maps_class(kind)
    except UserError as error:
        raise UserError(f"{KIND_KEY} = {kind!r}: {error}") from None


def _kinds() -> str:
    from encoders.control_kinds import MAP_CLASSES

    return ", ".join(chosen.kind for chosen in MAP_CLASSES)
