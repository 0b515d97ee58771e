"""Grids hold every image and keep text inside its cell."""

import numpy as np
from PIL import Image, ImageFont

from sampling.grid import CAPTION_SIZE, CELL_PIXELS, MAX_LINES, Sample, make_grid, wrap

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]


def samples(sizes: list[tuple[int, int]], caption: str) -> list[Sample]:
    return [Sample(Image.new("RGB", size, colour), caption) for size, colour in zip(sizes, COLOURS, strict=False)]


def test_every_image_is_there_with_its_aspect_ratio():
    sizes = [(64, 64), (96, 48), (48, 96), (64, 64), (128, 128)]
    grid = np.asarray(make_grid(samples(sizes, "a caption"), title="title"))
    for (width, height), colour in zip(sizes, COLOURS, strict=True):
        rows, columns = np.nonzero((grid == colour).all(axis=2))
        found = (np.ptp(columns) + 1, np.ptp(rows) + 1)
        scale = CELL_PIXELS / max(width, height)
        assert found == (round(width * scale), round(height * scale))
        assert len(rows) == found[0] * found[1]


def test_captions_never_reach_the_next_cell():
    font = ImageFont.load_default(CAPTION_SIZE)
    for text in ("word " * 100, "x" * 300, "", "Füchslein 狐 🦊 " * 9):
        lines = wrap(text, font)
        assert len(lines) <= MAX_LINES
        assert all(font.getlength(line) <= CELL_PIXELS for line in lines)
    assert wrap("word " * 100, font)[-1].endswith("…")
    assert wrap("a short one", font) == ["a short one"]


def test_a_prompt_without_spaces_is_cut_in_few_looks():
    font = ImageFont.load_default(CAPTION_SIZE)
    looked = []

    class Counting:
        def getlength(self, text):
            looked.append(len(text))
            return font.getlength(text)

    (line,) = wrap("狐" * 30_000, Counting())
    assert line.endswith("…") and font.getlength(line) <= CELL_PIXELS
    assert sum(looked) < 100_000


def test_columns_can_be_given():
    five = samples([(64, 64)] * 5, "a")
    narrow, wide = make_grid(five, title="t", num_columns=1), make_grid(five, title="t", num_columns=5)
    assert narrow.height > narrow.width and wide.width > wide.height
