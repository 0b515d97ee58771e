"""One picture of many samples, each with its prompt wrapped underneath."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL_PIXELS = 224
GAP_PIXELS = 20
MARGIN_PIXELS = 28
TITLE_SIZE = 22
CAPTION_SIZE = 13
LINE_PIXELS = 17
MAX_LINES = 6
MAX_LINE_CHARACTERS = 200  # more than a cell holds
MAX_COLUMNS = 8
PAPER = "#ffffff"
INK = "#1f2430"
FAINT_INK = "#5b6270"
EDGE = "#d5d8de"  # so that a white image ends somewhere


@dataclass(frozen=True)
class Sample:
    """An image and what is written under it."""

    image: Image.Image
    caption: str


def make_grid(samples: Sequence[Sample | None], *, title: str, num_columns: int | None = None) -> Image.Image:
    """Lay out samples row by row, images scaled to a cell's width or height, captions wrapped to the cell's width.

    In the place of a None nothing stands. Without `num_columns` the grid is somewhat wider than high.
    """
    num_columns = num_columns or min(MAX_COLUMNS, math.ceil(math.sqrt(1.6 * len(samples))))
    font = ImageFont.load_default(CAPTION_SIZE)
    rows = [samples[start : start + num_columns] for start in range(0, len(samples), num_columns)]
    tiles = [[sample and (fit(sample.image), wrap(sample.caption, font)) for sample in row] for row in rows]
    image_heights = [max((tile[0].height for tile in row if tile), default=0) for row in tiles]
    text_heights = [max((len(tile[1]) for tile in row if tile), default=0) * LINE_PIXELS for row in tiles]
    top = MARGIN_PIXELS + TITLE_SIZE + GAP_PIXELS
    row_heights = [
        image + GAP_PIXELS // 2 + text + GAP_PIXELS for image, text in zip(image_heights, text_heights, strict=True)
    ]
    width = 2 * MARGIN_PIXELS + num_columns * CELL_PIXELS + (num_columns - 1) * GAP_PIXELS
    grid = Image.new("RGB", (width, top + sum(row_heights) + MARGIN_PIXELS - GAP_PIXELS), PAPER)
    draw = ImageDraw.Draw(grid)
    draw.text((MARGIN_PIXELS, MARGIN_PIXELS - 6), title, fill=INK, font=ImageFont.load_default(TITLE_SIZE))
    for row, image_height, row_height in zip(tiles, image_heights, row_heights, strict=True):
        for column, tile in enumerate(row):
            if tile is None:
                continue
            image, lines = tile
            left = MARGIN_PIXELS + column * (CELL_PIXELS + GAP_PIXELS)
            x, y = left + (CELL_PIXELS - image.width) // 2, top + image_height - image.height
            draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=EDGE)
            grid.paste(image, (x, y))
            for number, line in enumerate(lines):
                below = top + image_height + GAP_PIXELS // 2 + number * LINE_PIXELS
                draw.text((left, below), line, fill=FAINT_INK, font=font)
        top += row_height
    return grid


def fit(image: Image.Image) -> Image.Image:
    """Scale an image so that its longer side fills a cell."""
    scale = CELL_PIXELS / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break text into at most six lines of a cell's width, by words; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > CELL_PIXELS:
            lines.append(line)
            if len(lines) > MAX_LINES:
                break
            longer = word
        line = longer
    lines.append(line)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"{lines[MAX_LINES - 1]} …"]
    return [_cut(line, font) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= CELL_PIXELS:
        return line
    line = line[:MAX_LINE_CHARACTERS]
    while line and font.getlength(f"{line}…") > CELL_PIXELS:
        line = line[:-1]
    return f"{line.rstrip()}…"
