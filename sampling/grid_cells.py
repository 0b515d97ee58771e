"""What stands where in `grid.png`: images by prompt, seed and style, and beside them the maps that led them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from pipelines.store.png_files import read_picture
from sampling.config import SamplingConfig
from sampling.grid import MAX_COLUMNS, Sample
from sampling.images import MEND
from sampling.requests import ImageRequest


def lay_out(
    requests: Sequence[ImageRequest], config: SamplingConfig, *, folder: Path, lost: Mapping[str, str]
) -> tuple[list[Sample | None], int | None]:
    """Return the cells of the grid in rows, None where nothing stands, and how many columns it has (None: any).

    Images of one prompt are a row; in several styles each of its seeds is one, and each style a column. A map stands in
    front of the images that it led. `folder` has images and maps, `lost` what the model does not read of prompts that
    are too long; `requests` are by prompt, of those by style, and of those by seed.
    """
    num_per_prompt, most_images = config.images_per_prompt, config.num_grid_images
    num_styles = len({request.style for request in requests})
    is_led = any(request.control is not None for request in requests)
    if not is_led and num_styles == 1:
        cells = [_cell(item, folder, lost, num_per_prompt=num_per_prompt) for item in requests[:most_images]]
        return [*cells], num_per_prompt if 1 < num_per_prompt <= MAX_COLUMNS else None
    rows = _rows(requests, num_per_prompt=num_per_prompt, num_styles=num_styles)
    if len(rows[0]) > MAX_COLUMNS and num_styles == 1:
        rows = [[request] for row in rows for request in row]
    rows, length = rows[: max(1, most_images // len(rows[0]))], len(rows[0])
    found: list[Sample | None] = []
    for row in rows:
        if is_led:
            found.append(_map_cell(row[0], folder))
        found += [_cell(item, folder, lost, num_per_prompt=num_per_prompt) for item in row]
    if length == 1 and is_led:  # several pairs of a map and its image beside each other
        return found, min(MAX_COLUMNS, 2 * math.ceil(math.sqrt(0.8 * len(rows))))
    return found, length + is_led


def _rows(requests: Sequence[ImageRequest], *, num_per_prompt: int, num_styles: int) -> list[list[ImageRequest]]:
    if num_styles == 1:
        return [list(requests[start : start + num_per_prompt]) for start in range(0, len(requests), num_per_prompt)]
    block = num_per_prompt * num_styles
    return [
        list(requests[start + number : start + block : num_per_prompt])
        for start in range(0, len(requests), block)
        for number in range(num_per_prompt)
    ]


def _cell(request: ImageRequest, folder: Path, lost: Mapping[str, str], *, num_per_prompt: int) -> Sample:
    prompt = f"[cut] {request.prompt}" if request.prompt in lost else request.prompt
    is_first = request.number % num_per_prompt == 0
    return Sample(_picture(folder / request.file), prompt if is_first else f"seed {request.seed}")


def _map_cell(request: ImageRequest, folder: Path) -> Sample | None:
    if request.control_map is None or request.control is None:
        return None
    return Sample(_picture(folder / request.control_map), f"led by {request.control.path.name}")


def _picture(path: Path) -> Image.Image:
    return read_picture(path, mend=MEND)
