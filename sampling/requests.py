"""From prompts to single images: size, seed and file of each."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.as_typed import typed_flag
from pipelines.engine.progress import get_logger
from sampling.config import SamplingConfig
from sampling.control_images import ControlImage, open_control_image
from sampling.prompts import NUM_SEEDS, Prompt
from sampling.trained_model import TrainedModel

# Of one folder: of each image there is a row, a file and a request in memory.
MAX_IMAGES = 1_000_000
# Of a side in pixels: far beyond what any weights were trained at, or any memory holds.
MAX_SIDE = 2**15
# Below a folder of samples: the maps that led them.
MAP_FOLDER = "control"

# Of an image's request, in the hash of a job.
OUTLINED = ("number", "key", "prompt", "label", "seed", "width", "height", "file")

log = get_logger("sampling")


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image to draw: what, from which seed, how large in pixels, and its file's name; `number` counts from 0.

    `control` leads it; the map that it gives is kept as the file `control_map`. `style` is that of a prompt that is
    drawn in several.
    """

    number: int
    key: str
    prompt: str
    label: int | None
    seed: int
    width: int
    height: int
    file: str
    control: ControlImage | None = None
    control_map: str | None = None
    style: str | None = None

    @property
    def shape(self) -> tuple[int, int, bool]:
        """What the images of a batch have alike: height, width, and whether they are led by an image."""
        return self.height, self.width, self.control is not None

    def outline(self) -> dict[str, Any]:
        """Return what is requested as JSON values, wherever the image lies that leads it."""
        fields = {name: getattr(self, name) for name in OUTLINED}
        return fields if self.control is None else {**fields, "control": self.control.identity}


def make_requests(prompts: Sequence[Prompt], config: SamplingConfig, trained: TrainedModel) -> list[ImageRequest]:
    """Return the images of all prompts, in order; further images of a prompt take the next seeds.

    Raises:
        MissingFileError, UserError: a control image is not there or no image.
        UserError: sampling.size is not whole patches of latents, or two images would share a file, or there are more
            than `MAX_IMAGES`.
    """
    if (num_images := len(prompts) * config.images_per_prompt) > MAX_IMAGES:
        raise UserError(
            f"sampling.images_per_prompt = {config.images_per_prompt}: of {len(prompts):,} prompts that is "
            f"{num_images:,} images, and one folder takes {MAX_IMAGES:,}: ask for fewer ({typed_flag('n')})"
        )
    requests: list[ImageRequest] = []
    images: dict[Path, ControlImage] = {}
    for prompt in prompts:
        if prompt.control is not None and prompt.control not in images:
            images[prompt.control] = open_control_image(prompt.control)
        control = None if prompt.control is None else images[prompt.control]
        height, width = _size_of(prompt, control, config, trained)
        if control is not None:
            control.plan_crop(width, height)
        for number in range(config.images_per_prompt):
            suffix = f"-{number}" if number else ""
            requests.append(
                ImageRequest(
                    number=len(requests),
                    key=prompt.key,
                    prompt=prompt.text,
                    label=prompt.label,
                    seed=(prompt.seed + number) % NUM_SEEDS,
                    width=width,
                    height=height,
                    file=f"{prompt.key}{suffix}.png",
                    control=control,
                    style=prompt.style,
                    control_map=None if control is None else f"{MAP_FOLDER}/{prompt.key}.png",
                )
            )
    repeated = [name for name, count in Counter(request.file for request in requests).items() if count > 1]
    if repeated:
        raise UserError(f"two images would be called {repeated[0]}: give the prompts other keys")
    return requests


def warn_of_untrained_size(config: SamplingConfig, trained: TrainedModel) -> None:
    """Log a warning when sampling.size is none of the sizes that the model has seen."""
    if config.size is None:
        return
    width, height = _parse_size(config.size, trained)
    if (height, width) not in trained.buckets:
        log.warning(
            f"sampling.size {config.size}: {trained.name} was trained at {trained.resolution} pixels, in "
            f"{len(trained.buckets)} sizes, and not at this one"
        )


def _size_of(
    prompt: Prompt, control: ControlImage | None, config: SamplingConfig, trained: TrainedModel
) -> tuple[int, int]:
    """Return (height, width): the size asked for, or the trained one of the nearest aspect ratio.

    That is the prompt's, where it says one, or that of the image that leads it.
    """
    if config.size is not None:
        width, height = _parse_size(config.size, trained)
        return height, width
    target = -math.log(prompt.aspect_ratio or (1.0 if control is None else control.aspect_ratio))
    return min(trained.buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - target), size))


def _parse_size(size: str, trained: TrainedModel) -> tuple[int, int]:
    multiple = trained.patch_pixels
    width, height = (int(side) for side in size.split("x"))
    if max(width, height) > MAX_SIDE:
        raise UserError(f"sampling.size {size}: {max(width, height)} is more than {MAX_SIDE} pixels a side")
    for side in (width, height):
        if side < multiple or side % multiple:
            raise UserError(f"sampling.size {size}: {side} is not a positive multiple of {multiple}")
    return width, height
