"""PNG files that say what they are: prompt, seed, checkpoint and settings travel in text chunks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from pipelines.store.files import atomic_file
from pipelines.store.manifest import Fingerprint
from sampling.config import SamplingConfig
from sampling.requests import ImageRequest


def write_image(folder: Path, image: Image.Image, request: ImageRequest, *, fingerprint: Fingerprint) -> None:
    """Write the image atomically; its settings are the fingerprint's fields and those at their default."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in _identity(request, fingerprint).items():
        chunks.add_itxt(name, value)
    chunks.add_itxt("fingerprint", fingerprint.digest)
    settings = {**SamplingConfig.fingerprint_defaults(), **fingerprint.fields}
    chunks.add_itxt("settings", json.dumps(settings, sort_keys=True, ensure_ascii=False))
    with atomic_file(folder / request.file) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def is_written(folder: Path, request: ImageRequest, *, fingerprint: Fingerprint) -> bool:
    """Whether the request's file is this very image: same prompt, seed, size, model and settings.

    A setting that the file does not know was at its default.
    """
    path = folder / request.file
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            expected = _identity(request, fingerprint)
            found = {name: image.info.get(name) for name in expected}
            if found != expected or image.size != (request.width, request.height):
                return False
            settings = json.loads(image.info.get("settings", "{}"))
    except (UnidentifiedImageError, json.JSONDecodeError):
        return False
    defaults = SamplingConfig.fingerprint_defaults()
    return {**defaults, **settings} == {**defaults, **fingerprint.fields}


def _identity(request: ImageRequest, fingerprint: Fingerprint) -> Mapping[str, Any]:
    return {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "checkpoint": str(fingerprint.fields["checkpoint"]),
    }
