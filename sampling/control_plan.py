"""What is said of control images before anything is drawn, and what is wrong with them."""

from collections.abc import Sequence

import numpy as np

from pipelines.engine.progress import get_logger
from sampling.config import SamplingConfig
from sampling.control_images import ControlImage
from sampling.control_kind import KIND_KEY, describe_other_photo_maps, maps_of, require_maps
from sampling.requests import ImageRequest
from sampling.trained_model import TrainedModel

MAX_SHOWN = 3

log = get_logger("sampling")


def describe_control(config: SamplingConfig, trained: TrainedModel, requests: Sequence[ImageRequest]) -> list[str]:
    """Return what leads the images, through what, and what is done to it, line by line; nothing where nothing does."""
    led = _led(requests)
    if not led or trained.branch is None:
        return []
    of = "" if config.control_is == "map" else f", a photo of which a map is drawn ({maps_of(trained)[0]})"
    lines = [
        f"led by {control.path}{of}: {control.describe_crop(width, height)}"
        for control, width, height in led[:MAX_SHOWN]
    ]
    if len(led) > MAX_SHOWN:
        lines.append(f"and by {len(led) - MAX_SHOWN:,} more")
    copies = f"{trained.branch.num_copies} copies"
    return [*lines, f"through {trained.branch.path} ({copies}) at strength {config.control_strength:g}"]


def check_control(config: SamplingConfig, trained: TrainedModel, requests: Sequence[ImageRequest]) -> None:
    """Decode every control image, look for what draws maps of photos, and say what is blank and once what is cut.

    Raises:
        UserError: an image cannot be decoded, or a model is not here.
    """
    led = _led(requests)
    if not led:
        return
    if config.control_is == "photo":
        require_maps(trained)
        if (said := describe_other_photo_maps(trained)) is not None:
            log.warning(said)
    elif config.control_kind is not None:
        log.info(f"{KIND_KEY} = {config.control_kind!r} is of photos, and control images are taken as maps here")
    for control in dict.fromkeys(control for control, _, _ in led):
        pixels = np.asarray(control.decode())
        if (pixels == pixels[0, 0]).all():
            log.warning(f"{control.path} is of one colour all over, and leads nothing; what is transparent is white")
    others = [item for item in led if (item[0].width, item[0].height) != item[1:]]
    if others:
        control, width, height = others[0]
        of_all = "" if len(led) == 1 else f"{len(others):,} of {len(led):,} control images have another size, such as "
        log.info(f"{of_all}{control.path}: {control.describe_crop(width, height)}")


def _led(requests: Sequence[ImageRequest]) -> list[tuple[ControlImage, int, int]]:
    """Return each control image with the width and height that it is drawn at."""
    found = ((item.control, item.width, item.height) for item in requests if item.control is not None)
    return list(dict.fromkeys(found))
