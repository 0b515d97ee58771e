"""PNG files that say what they are: prompt, seed, checkpoint and settings travel in text chunks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from pipelines.store.files import atomic_file
from pipelines.store.manifest import Fingerprint
from pipelines.store.png_files import DAMAGE, SIGNATURE, missing_of_png
from sampling.config import SamplingConfig, without_auto
from sampling.requests import ImageRequest
from sampling.trained_model import WeightedAdapter, adapter_name

# What to do about an image that cannot be read; a cut one is drawn anew without being asked.
MEND = "delete it, and the command that drew it draws it anew"

# The text chunk with the adapters, in images that were drawn with any.
ADAPTERS = "adapters"
# That with the hash of the image that has led an image, and that of maps with what has drawn them of photos; this is
# the name of those settings among what decides images, too.
CONTROL, CONTROL_MAPS = "control", "control_maps"


def write_image(
    folder: Path,
    image: Image.Image,
    request: ImageRequest,
    *,
    fingerprint: Fingerprint,
    computed_in: Mapping[str, str],
    adapters: Sequence[WeightedAdapter] = (),
) -> None:
    """Write the image atomically; its settings are the fingerprint's fields and those at their default.

    `computed_in` are the dtypes of transformer and VAE: of one that was tested what came of it. `adapters` are those
    that were added to the checkpoint, which knows them by hash.
    """
    chunks = PngImagePlugin.PngInfo()
    for name, value in _identity(request, fingerprint).items():
        if value is not None:
            chunks.add_itxt(name, value)
    chunks.add_itxt("fingerprint", fingerprint.digest)
    chunks.add_itxt("settings", json.dumps(_in_full(fingerprint.fields), sort_keys=True, ensure_ascii=False))
    chunks.add_itxt("computed_in", json.dumps(computed_in, sort_keys=True))
    if adapters:
        chunks.add_itxt(ADAPTERS, json.dumps([_record(adapter) for adapter in adapters], ensure_ascii=False))
    with atomic_file(folder / request.file) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def write_map(folder: Path, image: Image.Image, request: ImageRequest, *, fingerprint: Fingerprint) -> None:
    """Write the map that leads a request's image atomically, unless it is there."""
    assert request.control_map is not None
    if _is_map_written(folder, request, fingerprint=fingerprint):
        return
    chunks = PngImagePlugin.PngInfo()
    for name, value in _map_identity(request, fingerprint).items():
        chunks.add_itxt(name, value)
    with atomic_file(folder / request.control_map) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def _is_map_written(folder: Path, request: ImageRequest, *, fingerprint: Fingerprint) -> bool:
    """Whether the map of an image that is led by one is there, to its end, and of that image and kind."""
    if request.control_map is None:
        return True
    path = folder / request.control_map
    if not is_whole(path):
        return False
    try:
        with Image.open(path) as image:
            expected = _map_identity(request, fingerprint)
            found = {name: image.info.get(name) for name in expected}
            return found == expected and image.size == (request.width, request.height)
    except DAMAGE:
        return False


def is_written(folder: Path, request: ImageRequest, *, fingerprint: Fingerprint) -> bool:
    """Whether the request's file is this very image, to its end: same prompt, seed, size, model, control and settings.

    A setting that the file does not know was at its default. The map of one that is led is there, too.
    """
    path = folder / request.file
    if not is_whole(path) or not _is_map_written(folder, request, fingerprint=fingerprint):
        return False
    try:
        with Image.open(path) as image:
            expected = _identity(request, fingerprint)
            found = {name: image.info.get(name) for name in expected}
            if found != expected or image.size != (request.width, request.height):
                return False
            settings = json.loads(image.info.get("settings", "{}"))
    except DAMAGE:
        return False
    return isinstance(settings, dict) and _in_full(settings) == _in_full(fingerprint.fields)


def is_own(path: Path) -> bool:
    """Whether a file may be drawn over: an image of the house, whatever of, or too little of one to be anybody's."""
    try:
        with Image.open(path) as image:
            return {"prompt", "checkpoint"} <= image.info.keys() or {CONTROL, CONTROL_MAPS} <= image.info.keys()
    except DAMAGE:
        with path.open("rb") as file:
            return SIGNATURE.startswith(file.read(4))  # also where what follows is not a PNG's


def is_whole(path: Path) -> bool:
    """Whether a file is there and a PNG to its end: text chunks stand before the pixels, so a cut one has them all."""
    return path.is_file() and missing_of_png(path) is None


def _record(adapter: WeightedAdapter) -> dict[str, Any]:
    return {
        "name": adapter_name(adapter.path),
        "location": adapter.location,
        "weight": adapter.weight,
        "identity": adapter.identity,
    }


def _in_full(fields: Mapping[str, Any]) -> dict[str, Any]:
    return without_auto({**SamplingConfig.fingerprint_defaults(), **fields})


def _identity(request: ImageRequest, fingerprint: Fingerprint) -> Mapping[str, str | None]:
    return {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "checkpoint": str(fingerprint.fields["checkpoint"]),
        CONTROL: None if request.control is None else request.control.identity,
    }


def _map_identity(request: ImageRequest, fingerprint: Fingerprint) -> Mapping[str, str]:
    """Return what tells a map from others: the image, and what has drawn it of a photo."""
    assert request.control is not None
    drawn = json.dumps(fingerprint.fields.get(CONTROL_MAPS), sort_keys=True)
    return {CONTROL: request.control.identity, CONTROL_MAPS: drawn}
