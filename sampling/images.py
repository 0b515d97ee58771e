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
        chunks.add_itxt(name, value)
    chunks.add_itxt("fingerprint", fingerprint.digest)
    chunks.add_itxt("settings", json.dumps(_in_full(fingerprint.fields), sort_keys=True, ensure_ascii=False))
    chunks.add_itxt("computed_in", json.dumps(computed_in, sort_keys=True))
    if adapters:
        chunks.add_itxt(ADAPTERS, json.dumps([_record(adapter) for adapter in adapters], ensure_ascii=False))
    with atomic_file(folder / request.file) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def is_written(folder: Path, request: ImageRequest, *, fingerprint: Fingerprint) -> bool:
    """Whether the request's file is this very image, to its end: same prompt, seed, size, model and settings.

    A setting that the file does not know was at its default.
    """
    path = folder / request.file
    if not is_whole(path):
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
            return {"prompt", "checkpoint"} <= image.info.keys()
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


def _identity(request: ImageRequest, fingerprint: Fingerprint) -> Mapping[str, Any]:
    return {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "checkpoint": str(fingerprint.fields["checkpoint"]),
    }
