"""A picture of what the VAE does to the images: originals above their reconstructions, and maps between them."""

# H W pixels, C latent channels, h w latent height and width

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from encoders.latents import LatentCodec
from pipelines.store.files import atomic_file

CELL_PIXELS = 192
GAP_PIXELS = 4


def write_preview(path: Path, columns: Sequence[Sequence[np.ndarray]], codec: LatentCodec) -> float | None:
    """Write a grid: in each column its pictures (uint8 [H, W, 3]), and below what the last one's latent decodes to.

    Columns whose latents are not finite are rejected elsewhere, and left out here. Returns the mean PSNR of the
    reconstructions in dB, of images about 30 and more for the right VAE, under 20 for a wrong one; None if there are
    none.
    """
    drawn = [(column, image) for column in columns if (image := _reconstruct(column[-1], codec)) is not None]
    if not drawn:
        return None
    with atomic_file(path) as temporary:
        grid = _draw_grid([[*map(Image.fromarray, column), image] for column, image in drawn])
        grid.save(temporary, format="PNG")
    return round(float(np.mean([_psnr_db(column[-1], np.asarray(image)) for column, image in drawn])), 2)


def _reconstruct(original: np.ndarray, codec: LatentCodec) -> Image.Image | None:
    import torch

    mean, _ = codec.encode(torch.from_numpy(original).permute(2, 0, 1)[None])  # [1, C, h, w]
    return codec.decode(mean)[0] if mean.isfinite().all() else None


def _psnr_db(original: np.ndarray, reconstruction: np.ndarray) -> float:
    error = np.mean((original.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return float(10.0 * np.log10(255.0**2 / max(error, 1e-3)))


def _draw_grid(columns: Sequence[Sequence[Image.Image]]) -> Image.Image:
    cells = [[_fit(image) for image in column] for column in columns]
    cell_width = max(image.width for column in cells for image in column) + GAP_PIXELS
    cell_height = max(image.height for column in cells for image in column) + GAP_PIXELS
    size = (len(cells) * cell_width + GAP_PIXELS, len(cells[0]) * cell_height + GAP_PIXELS)
    grid = Image.new("RGB", size, "white")
    for x, column in enumerate(cells):
        for y, image in enumerate(column):
            grid.paste(image, (GAP_PIXELS + x * cell_width, GAP_PIXELS + y * cell_height))
    return grid


def _fit(image: Image.Image) -> Image.Image:
    scale = CELL_PIXELS / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
