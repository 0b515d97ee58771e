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
from pipelines.recipe import TableConfig

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
    """Return what draws the maps of a kind as its settings say; raises as `read_settings` does.

    Raises:
        UserError: a model is not here; begins with `key`.
    """
    return maps_class(kind).open(read_settings(kind, settings, key=key), device=device, key=key)


def read_settings(kind: str, settings: Mapping[str, Any], *, key: str) -> TableConfig:
    """Return the settings of a kind of maps, which are those of a recipe or of a manifest.

    Raises:
        UserError: there is no such kind, or a setting is wrong; the latter begins with `key`.
    """
    try:
        return maps_class(kind).settings_class.model_validate(dict(settings))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, (key, *first["loc"])))
        raise UserError(f"{name} = {first['input']!r}: {first['msg']} (of control maps of kind {kind})") from None


def describe_other_maps(trained: Mapping[str, Any], used: Mapping[str, Any]) -> str | None:
    """Return in words how maps differ from those that a branch was trained with; None where nothing tells that they do.

    Both are as manifests say them: `kind`, `settings` and the `identity` of the model that drew them.
    """
    kind = trained.get("kind")
    if kind != used.get("kind"):
        return f"was trained with {kind} maps, and these are {used.get('kind')} maps"
    if kind not in {chosen.kind for chosen in MAP_CLASSES}:
        return None
    former, present = (read_settings(kind, made.get("settings") or {}, key=kind) for made in (trained, used))
    # Of settings at their defaults fingerprints say nothing.
    for name in sorted(former.fingerprint_fields().keys() | present.fingerprint_fields().keys()):
        theirs, ours = getattr(former, name), getattr(present, name)
        if theirs != ours:
            return f"was trained with {kind} maps of {name} {theirs}, and these have {ours}"
    drew, draws = trained.get("identity"), used.get("identity")
    if drew is None or draws is None or drew == draws:
        return None
    drew, draws = _weights(former, drew), _weights(present, draws)
    return f"was trained with {kind} maps drawn by {drew}, and these are drawn by {draws}"


def _weights(settings: TableConfig, identity: str) -> str:
    """Return what people call the weights of a network that draws: its name, and of local files enough of the hash."""
    name = settings.model_dump()["model"]
    return f"{name} ({identity[:19]})" if identity.startswith("sha256:") else identity
